"""The commands of ``python -m perf`` but ``predict``: static figures of kernels, and times measured on a GPU."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import click
import pandas as pd
import torch
from rich.console import Console
from rich.progress import track

from cute_fa.engine.flavour import active as active_flavour
from cute_fa.semantics.errors import ArgumentError, CuteFaError, DeviceError
from cute_fa.semantics.types import Direction, DType, SmArch
from perf import cuda_driver
from perf import flavours as dsl_flavours
from perf.device import Clocks, CudaDevice
from perf.microbench import GROUPS
from perf.plans import PLANS
from perf.providers import PROVIDERS, CuteFa
from perf.results import ResultFile, read_results, result_path, speed_table
from perf.sass import add_per_score, assemble_ptx, report_cubin
from perf.sweep import Sweep
from perf.tables import show
from perf.timing import Effort
from perf.workload import LENGTHS, Workload, grid

_ARCHS = [arch.value for arch in SmArch]
# The architectures that have a kernel of their own.
_KERNEL_ARCHS = [SmArch.SM_80.value, SmArch.SM_90A.value, SmArch.SM_100A.value]
_DIRECTIONS = [Direction.FORWARD.value, Direction.BACKWARD.value]
_DTYPES = [DType.BF16.value, DType.E4M3.value]


class _Pair(click.ParamType):
    """Two sizes, ``X,Y``, of which the second is the first unless it is given."""

    def __init__(self, first: str, second: str):
        self.names = f"{first}, or {first} and {second} with a comma between"
        self.name = f"{first}[,{second}]"

    def convert(self, value: str, param, context) -> tuple[int, int]:
        first, comma, second = value.partition(",")
        try:
            return int(first), int(second if comma else first)
        except ValueError:
            self.fail(f"{value!r}: {self.names}", param, context)


class _OrNone(click.ParamType):
    """A number of tokens, or "none"."""

    name = "N|none"

    def convert(self, value: str | int, param, context) -> int | None:
        try:
            return None if value == "none" else int(value)
        except ValueError:
            self.fail(f"{value!r}: a number or none", param, context)


_HEAD_DIMS = _Pair("head_dim", "head_dim_v")
_HEADS = _Pair("heads", "heads_kv")


@click.group()
def main() -> None:
    """What ``perf/__main__.py`` takes these commands from."""


class _Compiling(click.Command):
    """A command that compiles kernels and has :data:`_FLAVOUR`: keeps its arguments for a process that repeats it."""

    def parse_args(self, context: click.Context, args: list[str]) -> list[str]:
        context.meta["arguments"] = tuple(args)
        return super().parse_args(context, args)


def _with_flavour(context: click.Context, parameter: click.Parameter, flavour: str | None) -> None:
    """Repeats the command in a process that has another flavour than this one, and ends with its exit code."""
    if flavour in (None, active_flavour()) or context.resilient_parsing:
        return
    with _errors():
        done = dsl_flavours.run(flavour, ["-m", "perf", context.info_name, *context.meta["arguments"]])
    context.exit(done.returncode)


_FLAVOUR = click.option(
    "--flavour",
    type=click.Choice(dsl_flavours.FLAVOURS),
    callback=_with_flavour,
    expose_value=False,
    help='Of the DSL, see "flavours".  [default: the active one]',
)


@main.command(cls=_Compiling)
@click.option("--arch", "archs", multiple=True, type=click.Choice(_ARCHS), default=_KERNEL_ARCHS, show_default=True)
@click.option(
    "--head-dim", "head_dims", multiple=True, type=_HEAD_DIMS, help="[default: 64, 128, 256, of sm_100a 192,128 too]"
)
@click.option(
    "--direction", "directions", multiple=True, type=click.Choice(_DIRECTIONS), default=_DIRECTIONS, show_default=True
)
@click.option("--dtype", "dtypes", multiple=True, type=click.Choice(_DTYPES), default=_DTYPES, show_default=True)
@click.option("--fa4/--no-fa4", default=None, help="Compile FlashAttention-4 too.  [default: if it is installed]")
@click.option("--csv", type=click.Path(dir_okay=False, path_type=Path), help="Also write the table to this file.")
@click.option("--markdown", is_flag=True, help="Print the tables of docs/static.md instead of a terminal table.")
@click.option(
    "--gate", is_flag=True, help="Hold the main loops to perf/budgets.toml instead; exits with 1 if one fails."
)
@click.option("--ranges", is_flag=True, help="Range plans' main loops beside the dense kernels' instead.")
@_FLAVOUR
def static(
    archs, head_dims, directions, dtypes, fa4: bool | None, csv: Path | None, markdown: bool, gate: bool, ranges: bool
) -> None:
    """Static figures of our kernels (full and causal) beside the peers'. Needs no GPU.

    per_score: non-tensor instructions per thread and score element in the steady-state loop, without conditional
    blocks; cond_per_score: those of conditional blocks, copy_per_score of the ones among them that copy the next tiles;
    setmaxnreg: registers of the producers (-) and of the consumers (+); spills: LDL/STL of the whole kernel, then those
    in its loops; serialised: ptxas has every wgmma waited for before the next; stall: sum of the fixed stall counts,
    cond_stall of those in conditional blocks; tc, mufu, alu, smem: cycles of the bound model for one iteration of four
    warps. Of a backward, which launches several kernels, they are those of the one that does most of the products.
    Sequences have 4096 tokens, and 512 where that is another kernel.

    Forwards on tcgen05 have tables of their own, explained in docs/static.md: by role, and in cycles of a step by pipe.
    """
    from perf.static import ROLE_COLUMNS, SEQLEN, StaticKey, fa4_installed, range_row, static_table
    from perf.static_page import role_sections, to_page

    notes = Console(stderr=True)
    if gate:
        _gate(archs, head_dims, directions, dtypes, notes)
        return
    if ranges:
        dtypes, fa4 = ("bf16",), False
    if fa4 is None:
        fa4 = fa4_installed()
        if not fa4:
            notes.print("FlashAttention-4 is not installed: its figures are the recorded ones alone.")
    keys = [
        StaticKey(SmArch(arch), head_dim, causal, Direction(direction), DType(dtype), head_dim_v)
        for direction in directions
        for arch in archs
        for dtype in dtypes
        for head_dim, head_dim_v in head_dims or _usual_head_dims(arch)
        for causal in (False, True)
    ]
    keys = [kernel for key in keys if key.served for kernel in key.with_short()]
    if not keys:
        raise click.UsageError("no kernel of these architectures serves such a direction, dtype and head_dim")
    if ranges:
        show(pd.DataFrame(range_row(key) for key in keys if not key.causal and key.seqlen == SEQLEN), markdown)
        return
    table = static_table(keys, fa4=fa4, progress=notes.print)
    if csv:
        table.to_csv(csv, index=False)
    if markdown:
        click.echo(to_page(table))
        return
    by_role = table.net_per_score.notna()
    if not by_role.all():
        show(table[~by_role].drop(columns=ROLE_COLUMNS), markdown)
    for title, section in role_sections(table[by_role]):
        click.echo(f"{title}:")
        show(section, markdown)


def _usual_head_dims(arch: str) -> list[tuple[int, int]]:
    """(head_dim, head_dim_v) of the kernels that are reported unless others are asked for."""
    sizes = [(64, 64), (128, 128), (192, 128), (256, 256)]
    return [(d, dv) for d, dv in sizes if d == dv or SmArch(arch).number // 10 == 10]


def _gate(
    archs: tuple[str, ...],
    head_dims: tuple[tuple[int, int], ...],
    directions: tuple[str, ...],
    dtypes: tuple[str, ...],
    notes: Console,
) -> None:
    """Compiles each kernel that has a budget among these, and exits with 1 if one breaks it, or none has any."""
    from perf.budgets import FILE, load
    from perf.static import our_report

    held = failed = 0
    for budget in load():
        key = budget.key
        sizes = head_dims or _usual_head_dims(key.arch.value)
        if key.arch.value not in archs or (key.head_dim, key.head_dim_v) not in sizes:
            continue
        if key.direction.value not in directions or key.dtype.value not in dtypes:
            continue
        held += 1
        breaches = budget.breaches(our_report(key))
        failed += bool(breaches)
        notes.print(f"{key}: {'; '.join(breaches) or 'within its budget'}", highlight=False)
    if not held:
        raise click.UsageError(f"{FILE.name} has no budget for these kernels")
    click.echo(f"{held - failed} of {held} main loops within their budgets ({active_flavour()})")
    if failed:
        sys.exit(1)


@main.command()
@click.option("--arch", "archs", multiple=True, type=click.Choice(_ARCHS), default=_KERNEL_ARCHS, show_default=True)
@click.option("--head-dim", type=int, default=128, show_default=True, help="Of the kernel that is compiled.")
@click.option("--causal/--full", default=True, show_default=True, help="Its mask.")
@click.option(
    "--repetitions", type=click.IntRange(1), default=3, show_default=True, help="Fresh processes of each kind."
)
@click.option("--markdown", is_flag=True, help="Print Markdown instead of a terminal table.")
def host(archs: tuple[str, ...], head_dim: int, causal: bool, repetitions: int, markdown: bool) -> None:
    """What a call costs around its kernel: host time, cold compile, load from the disk cache, import; with targets.

    Needs no GPU: launches go to the stand-in runtime, which accepts them and runs nothing. Each time is the least of
    several.
    """
    from perf.host import backward_figures, call_figures, compile_figures, import_figures

    notes = Console(stderr=True)
    rows = []
    for arch in map(SmArch, archs):
        notes.print(f"{arch.value}: calls, then {repetitions} compiles each")
        rows += [figure.row() for figure in call_figures(arch)]
        rows += [figure.row() for figure in backward_figures(arch)]
        rows += [figure.row() for figure in compile_figures(arch, head_dim, causal, repetitions)]
    notes.print("imports")
    rows += [figure.row() for figure in import_figures(repetitions)]
    show(pd.DataFrame(rows), markdown)


@main.command(cls=_Compiling)
@click.option("--arch", type=click.Choice(_ARCHS), default="sm_90a", show_default=True)
@click.option("--head-dim", "head_dims", multiple=True, type=_HEAD_DIMS, help="[default: 64 … 256, and 192,128]")
@click.option("--dtype", type=click.Choice(_DTYPES), default="bf16", show_default=True)
@click.option("--direction", type=click.Choice(_DIRECTIONS), default="fwd", show_default=True)
@click.option("--offenders", is_flag=True, help="Only the kernels that spill in a loop or whose wgmma are serialised.")
@click.option("--csv", type=click.Path(dir_okay=False, path_type=Path), help="Also write the table to this file.")
@click.option("--markdown", is_flag=True, help="Print Markdown instead of a terminal table.")
@_FLAVOUR
def features(
    arch: str,
    head_dims: tuple[tuple[int, int], ...],
    dtype: str,
    direction: str,
    offenders: bool,
    csv: Path | None,
    markdown: bool,
) -> None:
    """Static figures of our kernel under each feature and every two features together.

    Several hundred kernels of a few seconds each: minutes for one head dim, most of an hour for all. Figures as in
    "static"; in_loops, in_main: LDL/STL in hot loops, and in the steady-state one.
    """
    from perf.features import HEAD_DIMS, feature_keys, feature_rows

    notes = Console(stderr=True)
    keys = feature_keys(SmArch(arch), head_dims or HEAD_DIMS, DType(dtype), Direction(direction))
    if not keys:
        raise click.UsageError(f"no kernel for {arch} serves {direction} in {dtype} with these head_dims")
    rows = []
    for key, row in zip(keys, feature_rows(keys), strict=True):
        notes.print(f"{key}: {'offends' if row['offends'] else 'fine'}")
        rows.append(row)
    table = pd.DataFrame(rows)
    if csv:
        table.to_csv(csv, index=False)
    show(table[table.offends] if offenders else table, markdown)


@main.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.argument("flavour", type=click.Choice(dsl_flavours.FLAVOURS), required=False)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.option("--install", is_flag=True, help="First fetch the libraries that are missing, 90 MB a flavour.")
def flavours(flavour: str | None, arguments: tuple[str, ...], install: bool) -> None:
    """The DSL's libraries for CUDA 12 and for CUDA 13, which make different code: which are there, which is active.

    With FLAVOUR it runs "python ARGUMENTS" in a process where that one is active:
    python -m perf flavours cu13 -m cute_fa run --head-dim 64
    """
    with _errors():
        if install:
            dsl_flavours.install()
        if flavour is not None:
            sys.exit(dsl_flavours.run(flavour, arguments).returncode)
    for name, state in dsl_flavours.states().items():
        click.echo(f"{name}: {state}")


@main.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--score", metavar="D[,DV][,bwd]", help="Head dims: adds per_score and cond_per_score.")
@click.option("--all-loops", is_flag=True, help="Every hot loop instead of the steady-state ones.")
@click.option("--csv", type=click.Path(dir_okay=False, path_type=Path), help="Also write the loops to this file.")
@click.option("--markdown", is_flag=True, help="Print Markdown instead of terminal tables.")
def sass(files: tuple[Path, ...], score: str | None, all_loops: bool, csv: Path | None, markdown: bool) -> None:
    """Resources and hot loops of any cubin, PTX file, or folder of cubins."""
    kernels, loops = [], []
    for file in (f for given in files for f in (sorted(given.rglob("*.cubin")) if given.is_dir() else [given])):
        for report in report_cubin(assemble_ptx(file) if file.suffix == ".ptx" else file.read_bytes()):
            if score:
                parts = score.split(",")
                add_per_score(report, *(int(part) for part in parts if part != "bwd"), backward=parts[-1] == "bwd")
            kernels.append({"file": file.name, **report.row()})
            loops += [{"file": file.name, **loop.row()} for loop in report.loops if all_loops or loop.main]
    if csv:
        pd.DataFrame(loops).to_csv(csv, index=False)
    for rows in (kernels, loops):
        # A kernel or loop a column; figures that are zero or unknown everywhere only take room.
        frame = pd.DataFrame(rows).set_index("file").drop(columns="kernel", errors="ignore")
        frame = frame.loc[:, frame.map(bool).any() & frame.notna().any()]
        show(frame.T.reset_index(names="figure"), markdown)


def _grid_options(command):
    """The options of ``sweep`` that span its grid: each may be given several times."""
    choices = {
        "--direction": dict(type=click.Choice(_DIRECTIONS), default=["fwd"]),
        "--dtype": dict(type=click.Choice(["fp16", "bf16", "e4m3"]), default=["bf16"]),
        "--head-dim": dict(type=_HEAD_DIMS, default=["64", "128", "256"], metavar="D[,DV]"),
        "--heads": dict(type=_HEADS, default=["16"], metavar="H[,HKV]"),
        "--seqlen": dict(type=click.IntRange(1), default=[512, 1024, 2048, 4096, 8192, 16384]),
        "--mask": dict(type=click.Choice(["full", "causal"]), default=["full", "causal"]),
        "--window": dict(type=_OrNone(), default=["none"], help="Keys to the left, and to the right unless causal."),
        "--lengths": dict(type=click.Choice(LENGTHS), default=["dense"], help="All equal, or drawn; see Workload."),
        "--page-size": dict(type=_OrNone(), default=["none"]),
        "--phase": dict(type=click.Choice(["prefill", "decode"]), default=["prefill"]),
        "--query-tokens": dict(type=click.IntRange(1), default=[1], help="Of a sequence, when decoding."),
        "--kv-dtype": dict(
            type=click.Choice(["same", "e4m3", "e5m2"]), default=["same"], help="Of an fp8 cache, without descales."
        ),
        "--plan": dict(
            type=click.Choice(["none", *PLANS]), default=["none"], help="Ranges of a sequence; see perf.plans."
        ),
    }
    for name, options in reversed(choices.items()):
        command = click.option(name, multiple=True, show_default=True, **options)(command)
    return command


@main.command()
@_grid_options
@click.option(
    "--tokens", type=click.IntRange(1), default=16384, show_default=True, help="Of the batch: of K if decoding."
)
@click.option("--provider", "names", multiple=True, help="Only these.  [default: all that can run]")
@click.option("--budget", type=float, default=100.0, show_default=True, help="Milliseconds timed for each provider.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="CSV file to append to; what it has is not measured again.  [default: perf/results/GPU/DATE-sweep.csv]",
)
@click.option("--retry", is_flag=True, help="Measure again what the file has as skipped or wrong.")
@click.option("--dry-run", is_flag=True, help="Print the problems and what they cost at least; needs no GPU.")
def sweep(
    tokens: int, names: tuple[str, ...], budget: float, seed: int, out: Path | None, retry: bool, dry_run: bool, **given
) -> None:
    """Time attention of several providers on this machine's GPU over a grid of problems.

    A provider is timed only if its output agrees with the reference. Rows go to a CSV file one problem after the other,
    at the end to a Parquet file too. Exits with 1 if our kernels disagree with the reference, 2 without a GPU.
    """
    for name in names:
        if name not in PROVIDERS:
            raise click.BadParameter(f"{name!r}: one of {', '.join(PROVIDERS)}", param_hint="--provider")
    workloads = _workloads(tokens, **given)
    if not workloads:
        raise click.UsageError("no problem of this grid makes sense")
    if dry_run:
        show(pd.DataFrame(map(_least, workloads)), markdown=False)
        return
    device = _device(" --dry-run lists the problems.")
    if device.arch.number < 89 and any(workload.dtype.is_fp8 for workload in workloads):
        raise click.UsageError(f"--dtype e4m3: {device.arch.value} has no fp8 tensor cores")
    providers = {name: PROVIDERS[name] for name in names or PROVIDERS}
    notes = Console(stderr=True)
    for note in device.notes:
        notes.print(note)
    rows: list[dict] = []
    with _errors():
        results = ResultFile(out or result_path(device.columns()["gpu"], "sweep.csv"))
        if retry:
            results.forget(["skipped", "wrong"])
        measured = Sweep(device, providers, results, Effort(budget_ms=budget), seed).run(workloads)
        try:
            for workload, new in track(measured, "measuring", len(workloads), console=notes):
                notes.print(f"{workload}: {', '.join(map(_outcome, new)) or 'already there'}")
                rows += new
        finally:
            _finish(results, notes)
    show(speed_table(results.rows()), markdown=False)
    if any(row["status"] == "wrong" and row["provider"] == CuteFa.name for row in rows):
        sys.exit(1)


_TABLE = click.Path(exists=True, dir_okay=False, path_type=Path)


@main.command()
@click.argument("files", nargs=-1, required=True, type=_TABLE)
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), help="Folder.  [default: the first file's name]"
)
def plot(files: tuple[Path, ...], out: Path | None) -> None:
    """Curves and heat maps of ratios to each peer from tables of results, CSV or Parquet: PNG files, and a page
    index.html that needs nothing else."""
    from perf.plot import load, write

    with _errors():
        table = load(list(files))
        if not (table.status == "ok").any():
            raise ArgumentError(f"{', '.join(map(str, files))}: nothing was measured")
        for path in write(table, out or files[0].with_suffix("")):
            click.echo(path)


@main.command()
@click.argument("before", type=_TABLE)
@click.argument("after", type=_TABLE)
@click.option("--threshold", type=click.FloatRange(0), default=0.03, show_default=True, help="Of the median, relative.")
@click.option("--provider", "names", multiple=True, help="Only these.  [default: all]")
@click.option("--all", "everything", is_flag=True, help="Also print what has not changed.")
@click.option("--markdown", is_flag=True, help="Print Markdown instead of a terminal table.")
def compare(
    before: Path, after: Path, threshold: float, names: tuple[str, ...], everything: bool, markdown: bool
) -> None:
    """What has become slower from one table of results to another of the same GPU, CSV or Parquet.

    Slower is what takes longer by more than the threshold and beyond the noise: the 20th percentile after lies above
    the 80th before. Exits with 1 if something is slower, or measured no more.
    """
    from perf.compare import REGRESSIONS, machine_change
    from perf.compare import compare as compared

    with _errors():
        tables = [read_results(path) for path in (before, after)]
        if names:
            tables = [table[table.provider.isin(names)] for table in tables]
        table = compared(*tables, threshold)
    click.echo(f"{len(table)} results in common; {machine_change(*tables)}")
    shown = table if everything else table[table.verdict != "same"]
    if len(shown):
        show(shown.round({"before_ms": 4, "after_ms": 4, "ratio": 3}), markdown)
    if table.verdict.isin(REGRESSIONS).any():
        sys.exit(1)


@main.command("gpu-check")
@click.option("--minutes", type=click.FloatRange(min=0.5), default=30.0, show_default=True, help="8 are useful.")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of results.  [default: perf/results/GPU/DATE-check-TIME]",
)
@click.option("--dry-run", "dry", type=click.Choice(_ARCHS), help="Walk the plan without a GPU, this one simulated.")
@click.option("--everything", is_flag=True, help="Also composable_kernel's grid of 6144 runs.")
@click.argument("pytest_arguments", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def gpu_check(
    context: click.Context,
    minutes: float,
    out: Path | None,
    dry: str | None,
    everything: bool,
    pytest_arguments: tuple[str, ...],
) -> None:
    """What a machine with a GPU can check, in an order of value, within a time: one problem per kernel, a short sweep
    beside torch's FlashAttention 2 and cuDNN, the tests marked gpu, compute-sanitizer.

    Everything is written to the folder as it comes. Exits with 1 if anything failed. On a machine without a GPU it says
    so and runs "static".
    """
    began = time.monotonic()
    if dry is None:
        found = cuda_driver.driver()
        if found is None:
            click.echo("No GPU on this machine: nothing is run on one. Static figures of the compiled kernels:")
            with _errors():
                context.invoke(static)
            return
        _require_torch_sees(found)
    # The plan is not imported before: it takes the kernels with it.
    from perf.gpu_check import report, steps

    with _errors():
        device = None if dry else CudaDevice()
        columns = device.columns() if device else {"gpu": f"simulated {dry}", "arch": dry, "torch": torch.__version__}
        facts = report.machine_facts(columns, device.clocks() if device else Clocks())
    folder = out or result_path(columns["gpu"], f"check-{datetime.now():%H%M%S}.csv").with_suffix("")
    plan = steps.Plan(folder.absolute(), dry, everything, pytest_arguments, len(os.sched_getaffinity(0)))
    written = report.Report(folder, facts, list(plan.steps()))
    del device  # its memory is for the steps

    def tell(outcome: steps.Outcome) -> None:
        written.add(outcome)
        click.echo(f"{outcome.step.phase}, {outcome.step.name}: {outcome.result} after {outcome.seconds:.0f} s")

    outcomes = steps.run(plan, began + 60 * minutes, tell)
    click.echo(written.summary())
    if any(outcome.bad for outcome in outcomes):
        sys.exit(1)


@main.command()
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="TOML file; the rows go to the .jsonl beside it.  [default: perf/results/GPU/DATE-microbench.toml]",
)
@click.option("--only", "names", multiple=True, type=click.Choice(list(GROUPS)), help="Groups.  [default: all]")
@click.option("--seconds", type=click.FloatRange(min=20), default=240.0, show_default=True)
def microbench(out: Path | None, names: tuple[str, ...], seconds: float) -> None:
    """Measure the constants of this machine's GPU for the timing model with kernels of our own, docs/timing.md.

    What is not measured is taken over from the nearest GPU that comes with the package. Rows of other groups than
    --only that the file of rows has are kept and used. Exits with 1 if a group failed, 2 without a GPU.
    """
    device = _device()
    gpu, arch = device.columns()["gpu"], device.arch
    del device  # its memory is for the groups
    # Not imported before: it takes the kernels with it.
    from perf.microbench.session import Session

    out = out or result_path(gpu, "microbench.toml")
    if out.suffix != ".toml":
        raise click.BadParameter(f"{out}: a file that ends in .toml", param_hint="--out")
    session = Session(out, gpu, arch, names or tuple(GROUPS))
    with _errors():
        outcomes = session.measure(seconds, lambda o: click.echo(f"{o.step.name}: {o.result} after {o.seconds:.0f} s"))
        measured, notes = session.write()
    for name, constant in measured.items():
        click.echo(f"{name} = {constant.value:.6g}, spread {constant.spread:.2g}")
    for note in notes:
        click.echo(note)
    click.echo(out)
    if any(outcome.bad for outcome in outcomes):
        sys.exit(1)


@main.command("gpu-pack", cls=_Compiling)
@click.option("--arch", type=click.Choice(_ARCHS), default="sm_90a", show_default=True, help="Of the GPU.")
@click.option(
    "--python",
    type=click.Choice([f"3.{minor}" for minor in range(10, 15)]),
    default="3.12",
    show_default=True,
    help="The machine's Python.",
)
@click.option("--out", type=click.Path(path_type=Path), default=Path("build", "gpu-pack"), show_default=True)
@click.option("--jobs", type=click.IntRange(min=1), default=2, show_default=True, help="Processes that compile.")
@_FLAVOUR
def gpu_pack(arch: str, python: str, out: Path, jobs: int) -> None:
    """Make a folder, and a .tar.xz of it, that runs gpu-check on a machine without a package index and without
    nvidia-cutlass-dsl: the tree, TVM-FFI for its Python, and a bundle of the kernels that a dry run launched.

    There, unpacked: ./gpu-check.sh --minutes 8 --out results
    """
    from perf.gpu_check.pack import write_pack

    notes = Console(stderr=True, highlight=False)
    with _errors():
        archive = write_pack(out, arch, python, jobs, notes.print)
    click.echo(f"{archive}: {archive.stat().st_size / 1e6:.1f} MB")


def _require_torch_sees(found: cuda_driver.Driver) -> None:
    if not torch.cuda.is_available():
        cuda = ".".join(map(str, found.cuda))
        click.echo(
            f"The driver sees {found.gpus} GPU and supports CUDA {cuda}, torch {torch.__version__} for CUDA "
            f"{torch.version.cuda} sees none: install a build for at most CUDA {cuda}.",
            err=True,
        )
        sys.exit(1)


def _workloads(tokens: int, **given: Any) -> list[Workload]:
    return grid(
        direction=[Direction(value) for value in given["direction"]],
        dtype=[DType(value) for value in given["dtype"]],
        decode=[phase == "decode" for phase in given["phase"]],
        query_tokens=given["query_tokens"],
        dtype_kv=[None if name == "same" else DType(name) for name in given["kv_dtype"]],
        head_dims=given["head_dim"],
        heads=given["heads"],
        causal=[mask == "causal" for mask in given["mask"]],
        window=given["window"],
        lengths=given["lengths"],
        page_size=given["page_size"],
        plan=[None if name == "none" else name for name in given["plan"]],
        seqlen=given["seqlen"],
        tokens=[tokens],
    )


def _least(workload: Workload) -> dict[str, Any]:
    """What a workload costs at least."""
    work = workload.work
    return {
        "problem": str(workload),
        "GFLOP": round(work.flops / 1e9, 3),
        "MB": round(work.bytes / 1e6, 3),
        "FLOP/byte": round(work.flops / work.bytes, 1),
    }


def _device(hint: str = "") -> CudaDevice:
    try:
        return CudaDevice()
    except DeviceError as error:
        click.echo(f"{error}.{hint}", err=True)
        sys.exit(2)


def _outcome(row: dict) -> str:
    """A new result in a few words."""
    return f"{row['provider']} " + (f"{row['ms_p50']:.4g} ms" if row["status"] == "ok" else row["status"])


def _finish(results: ResultFile, notes: Console) -> None:
    if results.path.exists():
        parquet = results.write_parquet()
        notes.print(f"{results.path} and {parquet.name}" if parquet else f"{results.path}, no Parquet without pyarrow")


@contextmanager
def _errors() -> Iterator[None]:
    """Turns what the user can change into one message and exit code 1."""
    try:
        yield
    except CuteFaError as error:
        click.echo(f"{type(error).__name__}: {error}", err=True)
        sys.exit(1)
