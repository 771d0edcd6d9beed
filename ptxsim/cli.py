"""The command line: ``run`` a script that compiles and launches CuTe DSL kernels, in several schedules.

Exit codes: 0 everything ran clean, 1 the simulator found a fault or the script failed, 2 there is nothing to say: a bad
request, an instruction that is not simulated, or a script that launches no kernel.
"""

from __future__ import annotations

import runpy
import sys
import traceback
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

import ptxsim
from ptxsim.runtime import SMEM_LIMIT

CLEAN, FOUND, NOTHING = 0, 1, 2
_PIPE_WIDTH = 140  # columns of a table that goes to a pipe or file, which have no width of their own
_NAME = 40  # characters of a kernel's name


@dataclass(frozen=True)
class Mode:
    """One way to run the script: a seed of the schedule or None, and whether asynchronous work is late."""

    seed: int | None
    late: bool

    def __str__(self) -> str:
        schedule = "default" if self.seed is None else f"seed {self.seed}"
        return schedule + (", late" if self.late else "")


def _modes(seeds: int, late: bool) -> list[Mode]:
    return [Mode(seed, is_late) for is_late in ((False, True) if late else (False,)) for seed in (None, *range(seeds))]


@click.group()
def main() -> None:
    """Run CuTe DSL kernels on the CPU, instruction by instruction."""


@main.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": True})
@click.argument("script", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.option("--arch", required=True, metavar="ARCH", help="Target of ptxas: sm_80, sm_90a, sm_100a …")
@click.option("--race", is_flag=True, help="Report missing synchronisation, whether or not it did harm.")
@click.option("--seeds", type=click.IntRange(0), default=0, metavar="N",
              help="Run again in N adversarial orders of the warps.")  # fmt: skip
@click.option("--late", is_flag=True, help="Run each order again with asynchronous work as late as is legal.")
@click.option("--sms", type=click.IntRange(1), default=4, show_default=True, help="SMs that the device reports.")
@click.option("--trace", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
              help="Write what the warps did, for Perfetto; with several runs, a file for each.")  # fmt: skip
@click.option("--line-info/--no-line-info", default=True, help="Compile with line information (the default).")
def run(
    script: Path, arguments: tuple[str, ...], arch: str, race: bool, seeds: int, late: bool, sms: int,
    trace: Path | None, line_info: bool,
) -> None:  # fmt: skip
    """Run SCRIPT with ARGUMENTS as if there were a GPU of architecture ARCH: tensors "on" cuda are in host memory.

    The script runs once in the default schedule and then as --seeds and --late say, until a run fails.
    """
    if arch.removeprefix("sm_").rstrip("af") not in map(str, SMEM_LIMIT):
        known = ", ".join(f"sm_{number}" for number in sorted(SMEM_LIMIT))
        raise click.BadParameter(f"cannot simulate {arch!r}; known are {known}", param_hint="--arch")
    console = Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH, highlight=False)
    modes = _modes(seeds, late)
    table = Table("run", "kernel", "grid", "block", "cluster", "smem", "warp instr.", "steps", "s", "result")
    code, error = CLEAN, None
    for mode in modes:
        launches: list[ptxsim.Launch] = []
        path = trace if trace is None or len(modes) == 1 else _with_mode(trace, mode)
        options = {"schedule_seed": mode.seed, "late": mode.late, "race": race, "sm_count": sms, "trace": path,
                   "line_info": line_info}  # fmt: skip
        code, error = _run_once(script, arguments, arch, options, launches)
        for i, launch in enumerate(launches):
            _add_row(table, mode, launch, "clean" if code == CLEAN or i + 1 < len(launches) else "then failed")
        if code != CLEAN:
            break
    if table.rows:
        console.print(table)
    if error is not None:
        console.print(f"{mode}:", style="bold", markup=False)
        console.print(error, markup=False, soft_wrap=True)
    runs = f"{len(modes)} run{'s' if len(modes) > 1 else ''}"
    console.print(
        {CLEAN: f"clean in {runs}", FOUND: f"failed in the run '{mode}'", NOTHING: "nothing was checked"}[code]
    )
    sys.exit(code)


def _with_mode(trace: Path, mode: Mode) -> Path:
    """The trace file of one run of several."""
    return trace.with_name(f"{trace.stem}.{str(mode).replace(', ', '-').replace(' ', '')}{trace.suffix}")


def _run_once(script: Path, arguments: tuple[str, ...], arch: str, options: dict, launches: list) -> tuple:
    """(exit code, text of what went wrong or None) of one run; its launches are added to ``launches``."""
    from ptxsim.posing import posing

    try:
        with ptxsim.simulate(arch, **options) as simulation, posing(simulation), _as_main(script, arguments):
            try:
                runpy.run_path(str(script), run_name="__main__")
            finally:
                launches += simulation.launches
    except (ptxsim.PtxError, ptxsim.CompilerMissing, ptxsim.RuntimeAlreadyLoaded) as error:
        return NOTHING, f"{type(error).__name__}: {error}"
    except ptxsim.SimError as error:
        return FOUND, f"{type(error).__name__}: {error}"
    except SystemExit as end:
        if end.code not in (None, 0):
            return FOUND, f"the script ended with {end.code}"
    except Exception as error:
        traceback.print_exc()
        return FOUND, f"the script raised {type(error).__name__}: {error}"
    return (CLEAN, None) if launches else (NOTHING, "the script launched no kernel")


@contextmanager
def _as_main(script: Path, arguments: tuple[str, ...]):
    """sys.argv and sys.path as ``python SCRIPT ARGUMENTS`` sets them."""
    argv, path = sys.argv, sys.path
    sys.argv, sys.path = [str(script), *arguments], [str(script.resolve().parent), *path]
    try:
        yield
    finally:
        sys.argv, sys.path = argv, path


def _add_row(table: Table, mode: Mode, launch: ptxsim.Launch, result: str) -> None:
    def dim3(size: tuple) -> str:
        return "×".join(map(str, size))

    name = launch.name.removeprefix("kernel_cutlass_kernel_")
    name = name if len(name) <= _NAME else name[: _NAME - 1] + "…"
    table.add_row(str(mode), name, dim3(launch.grid), dim3(launch.block), dim3(launch.cluster), f"{launch.smem:,}",
                  f"{launch.warp_instrs:,}", f"{launch.steps:,}", f"{launch.time:.2f}", result)  # fmt: skip
