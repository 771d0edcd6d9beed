"""The command line: ``run`` one problem or the tour, ``compile`` a kernel, print the dispatch ``table``.

Exit codes: 0 within tolerance, 1 outside it or a fault in the kernel, 2 for a request that cannot be served.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path

import click
import torch
from click.core import ParameterSource
from rich.console import Console
from rich.progress import track
from rich.table import Table

from cute_fa import __version__
from cute_fa.engine import cache
from cute_fa.engine.bundles import use_bundles
from cute_fa.engine.compiler import compile_artifacts
from cute_fa.engine.contract import KernelConfig
from cute_fa.engine.table import TABLE
from cute_fa.engine.worlds import ARITHMETICS
from cute_fa.engine.worlds.simulated import SimError
from cute_fa.semantics.errors import ArgumentError, CuteFaError
from cute_fa.semantics.names import canonical_name
from cute_fa.tools import support
from cute_fa.tools.append_trial import AppendResult, run_append_trial
from cute_fa.tools.bundle import WHEEL_TAG, check_out, write_bundle
from cute_fa.tools.inputs import Inputs, make_inputs, output_gradients
from cute_fa.tools.problem_options import PROBLEM_OPTIONS, ProblemOptions, with_options
from cute_fa.tools.tour import run_tour, tour_table
from cute_fa.tools.trial import (
    BackwardResult,
    Machine,
    TrialResult,
    config_fields,
    run_backward_trial,
    run_trial,
)
from cute_fa.tools.warm import Warmed, read_keys, warm

_PIPE_WIDTH = 140  # columns of a table that goes to a pipe or file, which have no width of their own


_SEED = click.IntRange(-(2**63), 2**64 - 1)  # what torch's generators take
_EXPLAIN = click.option(
    "--explain", is_flag=True, help="Say on stderr which kernels and configs were weighed, and why they were refused."
)
_RUN_OPTIONS = [
    click.option("--seed", type=_SEED, default=0, show_default=True, help="Of the inputs."),
    click.option("--schedule-seed", type=int, help="Simulate, with warps in a seeded adversarial order."),
    click.option("--late", is_flag=True, help="Simulate, with asynchronous work done as late as is legal."),
    click.option("--race", is_flag=True, help="Simulate, and report missing synchronisation under any schedule."),
    click.option(
        "--fp8-bits",
        type=click.IntRange(8, 24),
        help="Simulate, with so many significant bits of fp8 products' sums.",
    ),
    click.option(
        "--arithmetic",
        type=click.Choice(ARITHMETICS),
        default=ARITHMETICS[0],
        show_default=True,
        help="Simulate, with tensor instructions that add as hardware does, or each kind differently (distinct).",
    ),
    click.option("--num-sms", type=click.IntRange(min=1), help="Simulate, with this many SMs. [default: a real GPU's]"),
    click.option("--inputs", type=click.Choice(["random", "peaked"]), default="random", show_default=True),
]


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="cute_fa")
def main() -> None:
    """Attention kernels in NVIDIA's CuTe DSL: run them, compile them, list them."""


@main.command()
@with_options(PROBLEM_OPTIONS, _RUN_OPTIONS)
@_EXPLAIN
@click.option(
    "--bundle",
    "bundles",
    multiple=True,
    metavar="DIR",
    help="Take kernels from this bundle; may be given several times.",
)
@click.option("--save", type=click.Path(dir_okay=False, path_type=Path), help="Write inputs and results (torch.save).")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
@click.pass_context
def run(
    context: click.Context, explain: bool, bundles: tuple[str, ...], save: Path | None, as_json: bool, **given
) -> None:
    """Run one attention problem and compare it with the reference; without options, a tour of real model layers.

    On the GPU if there is one; else, or if --arch names another architecture, simulated. Exits with 0 only if every
    result is within tolerance.
    """
    names = (*given, "explain", "save")
    chosen = [name for name in names if context.get_parameter_source(name) is not ParameterSource.DEFAULT]
    with _errors(as_json):
        if bundles:
            use_bundles(*bundles)
        if chosen:
            options = ProblemOptions(given)
            if explain:
                _explain(options)
            _run_one(options, save, as_json)
        else:
            _run_all(as_json)


def _run_one(options: ProblemOptions, save: Path | None, as_json: bool) -> None:
    if save and not save.absolute().parent.is_dir():
        raise click.BadParameter(f"{save.parent} is no folder", param_hint="--save")
    # A request that no kernel serves fails before any work.
    if options.append:
        TABLE.lookup(options.append_problem, options["family"])
    else:
        options.forward()
        if options["backward"]:
            TABLE.lookup(options.backward_problem, options["family"])
    machine = options.machine
    if options.append:
        if save:
            raise ArgumentError("--save with --append: there is no attention to recompute")
        if options["inputs"] == "peaked":
            raise ArgumentError("--inputs peaked with --append: there are no scores to peak")
        result = run_append_trial(options.append_problem, machine, options.capacity, options["seed"])
    else:
        inputs = make_inputs(options.spec, options["inputs"], options["seed"], device=machine.device)
        result = _run_attention(options, inputs, machine)
    if save:
        saved = _saved(options, inputs, result)
        with _writing("--save", save):
            torch.save(saved, save)
    if as_json:
        click.echo(json.dumps({**result.summary(), "options": options.given}))
    else:
        _console().print(_result_table(result))
    sys.exit(0 if result.ok else 1)


def _run_attention(options: ProblemOptions, inputs: Inputs, machine: Machine) -> TrialResult:
    if not options["backward"]:
        return run_trial(inputs, machine, **options.choices)
    dout, dlse = output_gradients(inputs, options["seed"])
    given = (dout, dlse if options["lse_gradient"] else None)
    return run_backward_trial(inputs, machine, *given, deterministic=options["deterministic"], **options.choices)


def _run_all(as_json: bool) -> None:
    results = run_tour(Console(stderr=True))
    if as_json:
        layers = [{"layer": stop.layer.name, "mask": stop.mask, **result.summary()} for stop, result in results]
        click.echo(json.dumps({"ok": all(result.ok for _, result in results), "layers": layers}))
    else:
        _console().print(tour_table(results))
    sys.exit(0 if all(result.ok for _, result in results) else 1)


@main.command("compile")
@with_options(PROBLEM_OPTIONS)
@_EXPLAIN
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Folder to write to.")
@click.option(
    "--keys",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Compile the problems of this file into the cache instead; a line holds the options of one.",
)
@click.option("--jobs", type=click.IntRange(min=1), default=1, show_default=True, help="Processes, for --keys.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
@click.pass_context
def compile_command(
    context: click.Context, explain: bool, out: Path | None, keys: Path | None, jobs: int, as_json: bool, **given
) -> None:
    """Write the kernel that serves the problem, and those that make the walks of a range plan, as PTX and cubin, named
    by their compile names. Needs no GPU.

    With --keys, fill the cache ahead of time; CUTE_FA_CACHE_DIR=DIR names another folder for it.
    """
    chosen = [name for name in given if context.get_parameter_source(name) is not ParameterSource.DEFAULT]
    if (out is None) == (keys is None) or (keys and chosen):
        raise click.UsageError("--out DIR with the options of one problem, or --keys FILE alone")
    with _errors(as_json):
        if keys is not None:
            _warm(keys, jobs, as_json)
            return
        options = ProblemOptions(given)
        if explain:
            _explain(options)
        problem, kernel = options.compiled()
        config, *walks = options.configs()
        with _writing("--out", out):
            out.mkdir(parents=True, exist_ok=True)
        written = _write_kernel(config, out)
        of_walks = [{"compile_name": walk.compile_name, **_write_kernel(walk, out)} for walk in walks]
        names = {"canonical_name": canonical_name(kernel, problem), "compile_name": config.compile_name}
        if as_json:
            click.echo(json.dumps({**names, "config": config_fields(config), **written, "walks": of_walks}))
        else:
            click.echo(f"canonical name  {names['canonical_name']}\ncompile name    {names['compile_name']}")
            click.echo(f"config          {_shown(config)}")
            for kernel in (written, *of_walks):
                click.echo(f"wrote           {kernel['ptx']}\nwrote           {kernel['cubin']}")


def _write_kernel(config: KernelConfig, folder: Path) -> dict[str, str]:
    """Compile a kernel; where its PTX and its cubin are."""
    contents = dict(zip(("ptx", "cubin"), compile_artifacts(config), strict=True))
    paths = {kind: folder / f"{config.compile_name}.{kind}" for kind in contents}
    with _writing("--out", folder):
        paths["ptx"].write_text(contents["ptx"])
        paths["cubin"].write_bytes(contents["cubin"])
    return {kind: str(path) for kind, path in paths.items()}


@main.command("bundle")
@click.option(
    "--keys",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    required=True,
    help="The kernels: problems as for compile --keys, or what record_keys wrote.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    help=f"Folder, or NAME-VERSION-{WHEEL_TAG}.whl.",
)
@click.option("--jobs", type=click.IntRange(min=1), default=1, show_default=True, help="Processes that compile.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
def bundle_command(keys: Path, out: Path, jobs: int, as_json: bool) -> None:
    """Make a bundle: compiled kernels that run without nvidia-cutlass-dsl, on any Python. Needs a C compiler, no GPU.

    CUTE_FA_BUNDLES=DIR, cute_fa.use_bundles(DIR) or installing the wheel makes them be found, before the cache and the
    compiler.
    """
    with _errors(as_json):
        check_out(out)
        configs = read_keys(keys, _configs_of)
        _compile_all(configs, jobs)
        done = []
        with _writing("--out", out):
            for kernel in track(write_bundle(configs, out), "linking", len(configs), console=_notes()):
                done.append(kernel)
        bytes_of = {"linked_bytes": sum(k.linked_bytes for k in done), "ptx_bytes": sum(k.ptx_bytes for k in done)}
        if as_json:
            kernels = [kernel._asdict() for kernel in done]
            click.echo(json.dumps({"ok": True, "out": str(out), **bytes_of, "kernels": kernels}))
            return
        for kernel in done:
            click.echo(f"{kernel.linked_bytes / 1e3:8.0f} kB, PTX {kernel.ptx_bytes / 1e3:5.0f} kB  {kernel.name}")
        megabytes = {name: f"{size / 1e6:.1f} MB" for name, size in bytes_of.items()}
        packed = f", {out.stat().st_size / 1e6:.1f} MB packed" if out.is_file() else ""
        click.echo(f"{len(done)} kernels: {megabytes['linked_bytes']}, PTX {megabytes['ptx_bytes']}{packed}, in {out}")


@click.command(add_help_option=False)
@with_options(PROBLEM_OPTIONS)
def _one_problem(**given) -> ProblemOptions:
    """A line of ``--keys``."""
    return ProblemOptions(given)


def _configs_of(options: list[str]) -> list[KernelConfig]:
    try:
        return _one_problem.main(options, standalone_mode=False).configs()
    except click.ClickException as error:
        raise ArgumentError(error.format_message()) from None


def _warm(keys: Path, jobs: int, as_json: bool) -> None:
    done = _compile_all(read_keys(keys, _configs_of), jobs)
    compiled = sum(kernel.compiled for kernel in done)
    if as_json:
        kernels = [kernel._asdict() for kernel in done]
        click.echo(json.dumps({"ok": True, "directory": str(cache.directory()), "kernels": kernels}))
    else:
        click.echo(f"{compiled} compiled, {len(done) - compiled} there already, in {cache.directory()}")


def _compile_all(configs: list[KernelConfig], jobs: int) -> list[Warmed]:
    notes, done = _notes(), []
    for kernel in track(warm(configs, jobs), "compiling", len(configs), console=notes):
        notes.print(f"{kernel.name}: " + (f"compiled in {kernel.seconds:.1f} s" if kernel.compiled else "in the cache"))
        done.append(kernel)
    return done


def _notes() -> Console:
    return Console(stderr=True, highlight=False)


@main.command()
@click.option(
    "--json", "as_json", is_flag=True, help="One JSON list: architecture, direction, feature, kernel, reasons."
)
@click.option("--markdown", is_flag=True)
def table(as_json: bool, markdown: bool) -> None:
    """The dispatch table: which kernel serves what on which architecture, and why none does."""
    rows = list(TABLE.rows())
    if as_json:
        click.echo(json.dumps([row._asdict() for row in rows], indent=1))
    elif markdown:
        click.echo(support.to_markdown(rows))
    else:
        _console().print(*support.to_rich(rows))


def _explain(options: ProblemOptions) -> None:
    """Tells on stderr which kernels the table weighs for the problem and which configs the chosen one's heuristic does,
    and why each was refused."""
    problem, kernel = options.compiled()
    notes = Console(stderr=True, width=None if sys.stderr.isatty() else _PIPE_WIDTH, highlight=False)
    table = Table("kernel", "config", "", header_style="bold")
    kernels = {entry.name: entry.kernel for entry in TABLE.entries}
    for name, reasons in TABLE.explain(problem, options["family"]).items():
        said = ", ".join(reasons) or "serves the problem"
        open_splits = not options["num_splits"] and not problem.seqlen_k_per_split
        if not reasons and open_splits and 0 < (most := kernels[name]().most_tokens) < problem.seqlen_q:
            said += f"; with num_splits left open up to {most} query tokens are its own, {problem.seqlen_q} a prompt's"
        table.add_row(name, "", said)
    for candidate in kernel.candidates(problem):
        table.add_row(kernel.__name__, _shown(candidate.config), candidate.reason or "[bold]chosen[/]")
    notes.print(table)


@contextmanager
def _errors(as_json: bool) -> Iterator[None]:
    """Turns a refused request, and a fault that the simulator finds, into one message on stderr (as JSON also on
    stdout) and an exit code."""
    try:
        yield
    except (CuteFaError, SimError) as error:
        if as_json:
            click.echo(json.dumps({"ok": False, "error": type(error).__name__, "message": str(error)}))
        click.echo(f"{type(error).__name__}: {error}", err=True)
        sys.exit(2 if isinstance(error, CuteFaError) else 1)


@contextmanager
def _writing(option: str, path: Path) -> Iterator[None]:
    """Turns a failure to write what ``option`` names into one message and exit code 2."""
    try:
        yield
    except CuteFaError:  # has its own message
        raise
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError
        raise click.BadParameter(f"cannot write {path}: {str(error).splitlines()[0]}", param_hint=option) from None


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH, highlight=False)


def _result_table(result: TrialResult | AppendResult) -> Table:
    table = Table(show_header=False, box=None)
    table.add_row("kernel", result.canonical_name)
    table.add_row("compiled as", result.compile_name)
    table.add_row("config", _shown(result.config))
    table.add_row("ran on", str(result.machine))
    if isinstance(result, TrialResult):
        comparison = result.comparison
        table.add_row("max error of O", f"{comparison.out_error:.3e}, allowed {comparison.out_allowed:.3e}")
        table.add_row("max error of LSE", f"{comparison.lse_error:.3e}, allowed {comparison.lse_allowed:.3e}")
    if isinstance(result, (BackwardResult, AppendResult)):
        for name, error in result.errors.items():
            table.add_row(f"max error of {name}", f"{error.error:.3e}, allowed {error.allowed:.3e}")
    table.add_row("time", f"{_seconds(result.seconds)}, after {_seconds(result.compile_seconds)} to compile or load")
    table.add_row("result", "[green]within tolerance[/]" if result.ok else "[bold red]OUTSIDE TOLERANCE[/]")
    return table


def _shown(config: KernelConfig) -> str:
    """What the heuristic chose: fields that the kernel's name does not tell already, absent features left out; the
    kernel's own before those that all have."""
    named = ("arch", "dtype", "dtype_k", "dtype_v", "out_dtype", "head_dim", "head_dim_v")
    absent = {field.name: field.default for field in fields(config) if field.default in (False, None)}
    values = {name: value for name, value in config_fields(config).items() if name not in named}
    shown = [name for name, value in values.items() if absent.get(name, ...) != value and value is not None]
    shown.sort(key=lambda name: name not in type(config).__annotations__)
    return _listed({name: values[name] for name in shown})


def _listed(values: dict) -> str:
    texts = {name: f"({_listed(value)})" if isinstance(value, dict) else value for name, value in values.items()}
    return ", ".join(f"{name}={text}" for name, text in texts.items())


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 0.1 else f"{value * 1e3:.3g} ms"


def _saved(options: ProblemOptions, inputs: Inputs, result: TrialResult) -> dict:
    """Everything that is needed to recompute the result outside, on the CPU; plain types and tensors only."""
    tensors = {field.name: getattr(inputs, field.name) for field in fields(Inputs) if field.name != "spec"}
    tensors |= {"out": result.out, "lse": result.lse}
    if isinstance(result, BackwardResult):
        tensors |= {"dout": result.dout, "dlse": result.dlse, **result.gradients._asdict()}
    dtypes = zip(("dtype", "dtype_k", "dtype_v"), inputs.spec.dtypes, strict=True)
    spec = asdict(inputs.spec) | {name: dtype.value for name, dtype in dtypes}
    return {
        "options": {**options.given, "resolved": spec},
        "canonical_name": result.canonical_name,
        "compile_name": result.compile_name,
        **{name: None if tensor is None else tensor.cpu() for name, tensor in tensors.items()},
    }
