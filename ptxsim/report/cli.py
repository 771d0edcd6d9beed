"""The command line: ``run`` a script that compiles and launches CuTe DSL kernels, in several schedules, ``time`` its
kernels, or ``mutate`` them.

Exit codes: 0 everything ran clean (``mutate``: every mutant was noticed or is equivalent), 1 the simulator found a
fault or the script failed (a mutant escaped), 2 there is nothing to say: a bad request, an instruction that is not
simulated, machine code that cannot be timed, or a script that launches no kernel.
"""

from __future__ import annotations

import functools
import runpy
import sys
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

import ptxsim
from ptxsim.analysis.mutants import KINDS
from ptxsim.machine.limits import SMEM_LIMIT
from ptxsim.machine.tensor_sums import ARITHMETICS
from ptxsim.names import readable
from ptxsim.ops.forms import known
from ptxsim.report.mutation_table import rows
from ptxsim.timing.gpus import Gpu, load
from ptxsim.timing.gpus import known as known_gpus
from ptxsim.timing.recorder import Recorder
from ptxsim.timing.replay import TimedLaunch
from ptxsim.timing.table import BUSY, figures, replay_whole
from ptxsim.timing.timeline import Timeline

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


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="cute-fa", prog_name="ptxsim")
def main() -> None:
    """Run CuTe DSL kernels on the CPU, instruction by instruction."""


def _of_script(command=None, *, sms=4):
    """What every command takes that runs a script; ``sms``: how many SMs the device reports by default."""
    if command is None:
        return functools.partial(_of_script, sms=sms)
    for add in (
        click.option("--line-info/--no-line-info", default=True, help="Compile with line information (the default)."),
        click.option("--sms", type=click.IntRange(1), default=sms, show_default=True,
                     help="SMs that the device reports."),
        click.option("--arch", required=True, metavar="ARCH", callback=_known_arch,
                     help="Target of ptxas: sm_80, sm_90a, sm_100a …"),
        click.argument("arguments", nargs=-1, type=click.UNPROCESSED),
        click.argument("script", type=click.Path(exists=True, dir_okay=False, path_type=Path)),
        main.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": True,
                                       "help_option_names": ["-h", "--help"]}),
    ):  # fmt: skip
        command = add(command)
    return command


def _known_arch(context, parameter, arch: str) -> str:
    if arch.removeprefix("sm_").rstrip("af") not in map(str, SMEM_LIMIT):
        known = ", ".join(f"sm_{number}" for number in sorted(SMEM_LIMIT))
        raise click.BadParameter(f"cannot simulate {arch!r}; known are {known}")
    return arch


@_of_script
@click.option("--race", is_flag=True, help="Report missing synchronisation, whether or not it did harm.")
@click.option("--seeds", type=click.IntRange(0), default=0, metavar="N",
              help="Run again in N adversarial orders of the warps.")  # fmt: skip
@click.option("--late", is_flag=True, help="Run each order again with asynchronous work as late as is legal.")
@click.option("--trace", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
              help="Write what the warps did, for Perfetto; with several runs, a file for each.")  # fmt: skip
@click.option("--arithmetic", type=click.Choice(ARITHMETICS), default="float32", show_default=True,
              help="How tensor instructions add up: as on hardware, or each kind differently (distinct).")  # fmt: skip
def run(
    script: Path, arguments: tuple[str, ...], arch: str, race: bool, seeds: int, late: bool, sms: int,
    trace: Path | None, arithmetic: str, line_info: bool,
) -> None:  # fmt: skip
    """Run SCRIPT with ARGUMENTS as if there were a GPU of architecture ARCH: tensors "on" cuda are in host memory.

    The script runs once in the default schedule and then as --seeds and --late say, until a run fails.
    """
    console = _console()
    modes = _modes(seeds, late)
    table = Table("run", "kernel", "grid", "block", "cluster", "smem", "warp instr.", "steps", "s", "result")
    code, error = CLEAN, None
    for mode in modes:
        launches: list[ptxsim.Launch] = []
        path = trace if trace is None or len(modes) == 1 else _with_mode(trace, mode)
        options = {"schedule_seed": mode.seed, "late": mode.late, "race": race, "sm_count": sms, "trace": path,
                   "arithmetic": arithmetic, "line_info": line_info}  # fmt: skip
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


@_of_script
@click.option("--seeds", type=click.IntRange(0), default=2, show_default=True, metavar="N",
              help="Adversarial orders of the warps to try on what the default one does not notice.")  # fmt: skip
@click.option("--late/--no-late", default=True, help="Try each order with late asynchronous work, too (the default).")
@click.option("--jobs", type=click.IntRange(1), default=1, show_default=True, help="Mutants that run at a time.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
              help="Keep the results there as they come (JSON lines); a run that was interrupted goes on.")  # fmt: skip
@click.option("--again", is_flag=True, help="Try once more what escaped before, according to --out.")
@click.option("--kind", "kinds", type=click.Choice(KINDS), multiple=True, help="Only instructions of this kind.")
@click.option("--sample", type=click.IntRange(1), metavar="N", help="Only N mutants of each kind, chosen by a seed.")
def mutate(
    script: Path, arguments: tuple[str, ...], arch: str, sms: int, line_info: bool, seeds: int, late: bool, jobs: int,
    out: Path | None, again: bool, kinds: tuple[str, ...], sample: int | None,
) -> None:  # fmt: skip
    """Damage each synchronisation of the kernels of SCRIPT, one at a time: is it noticed?

    Each mutant runs with the race detector in the default schedule, and in the others until an error or a check of
    the script's own notices it. The script has to check its results. See docs/sanitizer.md.
    """
    import torch

    from ptxsim.analysis.mutate import ESCAPED, Study

    torch.set_num_threads(1)  # what has started threads must not fork
    study = Study(_modes(seeds, late), kinds or KINDS, sample, jobs, out, again)
    options = {"race": True, "sm_count": sms, "line_info": line_info}
    code, error = _run_once(script, arguments, arch, options, [], study.around)
    console = _console()
    if error is not None:
        console.print(error, markup=False, soft_wrap=True)
        sys.exit(code)
    study.tidy()
    if not study.records:
        console.print("nothing was checked: no kernel has such an instruction")
        sys.exit(NOTHING)
    table = Table("kernel", "kind", "instructions", "mutants", "caught", "equivalent", "escaped")
    for row in rows(study.records):
        table.add_row(*row)
    console.print(table)
    escaped = [record for record in study.records if record.outcome == ESCAPED]
    for record in escaped:
        console.print(f"escaped: {record}", markup=False, soft_wrap=True)
    sys.exit(FOUND if escaped else CLEAN)


def _known_gpu(context, parameter, name: str) -> Gpu:
    try:
        return load(name)
    except ptxsim.SimError as error:
        raise click.BadParameter(str(error)) from None


@_of_script(sms=8)
@click.option("--gpu", required=True, metavar="GPU", callback=_known_gpu,
              help=f"Whose constants: {', '.join(known_gpus())}, or the path of a TOML file.")  # fmt: skip
@click.option("--trace", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
              help="Write what the warps waited for, for Perfetto.")  # fmt: skip
def time(
    script: Path, arguments: tuple[str, ...], arch: str, gpu: Gpu, sms: int, trace: Path | None, line_info: bool,
) -> None:  # fmt: skip
    """Run SCRIPT with ARGUMENTS as `run` does, and replay the machine code of each launch, cycle by cycle.

    A launch is replayed whole, on as many SMs as it has CTAs, at most --sms, with their share of the L2: times are
    those of so many SMs, not of the GPU. What the model leaves out is in docs/timing.md.
    """
    if arch.rstrip("af") != gpu.arch.rstrip("af"):
        raise click.BadParameter(f"{gpu.name} runs machine code of {gpu.arch}, not of {arch}", param_hint="--gpu")
    console, recorder = _console(), Recorder()
    try:
        timeline = None if trace is None else Timeline(trace)
    except OSError as problem:
        raise click.BadParameter(f"{trace}: {problem.strerror}", param_hint="--trace") from None
    launches: list[ptxsim.Launch] = []
    options = {"sm_count": sms, "line_info": line_info, "observers": [recorder]}
    code, error = _run_once(script, arguments, arch, options, launches)
    table = Table("kernel", "grid", "on", "cycles", "µs", *BUSY, "where the warps' cycles went")
    try:
        for recording in recorder.recordings if error is None else ():
            launch = TimedLaunch(recording)
            replay, places = replay_whole(launch, gpu, sms, timeline is not None)
            table.add_row(readable(launch.name, _NAME), "×".join(map(str, launch.grid)), places,
                          *figures(launch, replay, gpu))  # fmt: skip
            if timeline is not None:
                timeline.add(launch, replay)
    except ptxsim.SimError as problem:
        code, error = NOTHING, f"{type(problem).__name__}: {problem}"
    if table.rows:
        console.print(table)
    if error is not None:
        console.print(error, markup=False, soft_wrap=True)
    else:
        console.print(f"{gpu.name} at {gpu.clock:g} GHz, a model: nothing was measured", markup=False)
        if timeline is not None:
            timeline.write()
    sys.exit(code)


@main.command()
@click.argument("root", default="")
def forms(root: str) -> None:
    """List the instructions that are simulated, or the forms of one: ROOT is its first word, as mbarrier.

    {a|b} is one of the alternatives, [...] may be left out. What is in no form is refused (PtxError).
    """
    listed = known(root)
    if not listed:
        raise click.BadParameter(f"no instruction {root!r} is simulated", param_hint="ROOT")
    click.echo("\n".join(listed))


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH, highlight=False)


def _with_mode(trace: Path, mode: Mode) -> Path:
    """The trace file of one run of several."""
    return trace.with_name(f"{trace.stem}.{str(mode).replace(', ', '-').replace(' ', '')}{trace.suffix}")


def _run_once(
    script: Path, arguments: tuple[str, ...], arch: str, options: dict, launches: list,
    around: Callable[[ptxsim.Simulation], AbstractContextManager] = nullcontext,
) -> tuple:  # fmt: skip
    """(exit code, text of what went wrong or None) of one run, inside of ``around(simulation)``; its launches are added
    to ``launches``."""
    from ptxsim.host.posing import posing

    try:
        with (
            ptxsim.simulate(arch, **options) as simulation,
            posing(simulation),
            _as_main(script, arguments),
            around(simulation),
        ):
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

    sizes = (dim3(launch.grid), dim3(launch.block), dim3(launch.cluster), f"{launch.smem:,}")
    cost = (f"{launch.warp_instrs:,}", f"{launch.steps:,}", f"{launch.time:.2f}")
    table.add_row(str(mode), readable(launch.name, _NAME), *sizes, *cost, result)
