"""``python -m perf predict``."""

from __future__ import annotations

import json
import re
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from perf.predict.store import kept_rows
from perf.tables import show_rows
from ptxsim.errors import SimError
from ptxsim.timing import gpus

# What imports torch, cute_fa above all, is imported where it is used: rows that are kept need none of it.

_KEY = re.compile(r"(fwd|bwd|bwd_det):(\d+)(?:,(\d+))?:(full|causal|window(\d+)):(\d+)")


class _Key(click.ParamType):
    """DIRECTION:HEAD_DIM[,DV]:MASK:SEQLEN as (direction, deterministic, head_dim, head_dim_v, causal, window,
    seqlen)."""

    name = "key"

    def convert(self, value: str, param, context) -> tuple:
        found = _KEY.fullmatch(value)
        if not found:
            self.fail(f"{value!r}: DIRECTION:HEAD_DIM[,DV]:MASK:SEQLEN, such as fwd:128:causal:4096; DIRECTION is fwd, "
                      "bwd, or bwd_det for deterministic gradients; MASK is full, causal, or windowN for N keys to the "
                      "left and none to the right", param, context)  # fmt: skip
        direction, d, dv, mask, window, seqlen = found.groups()
        plain, deterministic = direction[:3], direction == "bwd_det"
        return plain, deterministic, int(d), int(dv or d), mask != "full", int(window) if window else None, int(seqlen)


@contextmanager
def _errors():
    try:
        yield
    except (SimError, OSError) as error:
        raise click.ClickException(str(error)) from error
    except Exception as error:
        from cute_fa.semantics.errors import CuteFaError

        if isinstance(error, CuteFaError):
            raise click.ClickException(str(error)) from error
        raise


@click.command()
@click.argument("keys", nargs=-1, type=_Key(), metavar="[KEY]...")
@click.option("--gpu", default="h100", show_default=True, help=f"{', '.join(gpus.known())}, or a TOML file.")
@click.option(
    "--kernel", "names", multiple=True, type=click.Choice(["ours", "fa4"]), default=["ours"], show_default=True
)
@click.option(
    "--set", "changes", multiple=True, metavar="FIELD=VALUE", help="Of our kernel's config; ranked beside the chosen."
)
@click.option("--dtype", type=click.Choice(["bf16", "fp16"]), default="bf16", show_default=True)
@click.option("--heads", default="16", show_default=True, metavar="H[,HKV]")
@click.option("--tokens", type=click.IntRange(1), help="Of the batch.  [default: 16384, or a sequence]")
@click.option("--ensemble", type=click.IntRange(1), default=12, show_default=True, help="Draws of the constants.")
@click.option("--search", is_flag=True, help="Every config of our kernel that fits, ranked beside the chosen one.")
@click.option(
    "--cubin",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Machine code that has to be the one timed.",
)
@click.option("--trace", type=click.Path(dir_okay=False, path_type=Path), help="Write a timeline for Perfetto.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--markdown", is_flag=True, help="Print Markdown instead of a terminal table.")
@click.option(
    "--validate", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Published rows to predict."
)
def predict(keys, gpu: str, names: tuple[str, ...], changes: tuple[str, ...], dtype: str, heads: str,
            tokens: int | None, ensemble: int, search: bool, cubin: Path | None, trace: Path | None, as_json: bool,
            markdown: bool, validate: Path | None) -> None:  # fmt: skip
    """Predict times without a GPU: kernels are simulated on a few tiles, their machine code is replayed cycle by cycle
    with a GPU's constants, and tiles are composed to the whole problem. docs/timing.md says how far to trust that.

    KEY is DIRECTION:HEAD_DIM[,DV]:MASK:SEQLEN, such as fwd:128:causal:4096 or bwd:64:window128:8192; bwd_det is a
    backward with deterministic gradients, on sm_90a.

    Means and standard deviations over draws of the constants that are not known well. Two kernels are ranked only where
    every explanation of the measured speeds agrees, beyond the spread; else it says "cannot tell".
    """
    with _errors():
        _check_options(keys, names, changes, cubin, trace, search, validate)
        if validate is not None:
            _validate(validate, ensemble, as_json, markdown)
            return
        constants, rows = gpus.load(gpu), []
        for key in keys:

            def made(key=key):
                workload = _workload(key, dtype, heads, tokens)
                if search:
                    return _found(workload, constants, ensemble)
                return _rows(workload, constants, names, changes, ensemble, cubin, trace)

            # a file that is compared or written is work for each call
            asked = (key, constants, names, changes, dtype, heads, tokens, ensemble, search)
            rows += made() if cubin or trace else kept_rows(asked, made)
    if as_json:
        click.echo(json.dumps(rows, indent=1))
        return
    show_rows([{name: row[name] for name in row if not isinstance(row[name], dict)} for row in rows], markdown)


def _check_options(keys, names, changes, cubin, trace, search, validate) -> None:
    """UsageError for options that would have no effect."""
    if not keys and validate is None:
        raise click.UsageError("no KEY, and no --validate")
    if keys and validate is not None:
        raise click.UsageError("--validate takes no KEY: the file says what is predicted")
    if trace is not None and len(keys) > 1:
        raise click.UsageError("--trace is of one KEY")
    if not (search or validate is not None):
        return
    of_one = {"--kernel fa4": "fa4" in names, "--set": changes, "--cubin": cubin, "--trace": trace}
    of_one["--search"] = search and validate is not None
    if given := [option for option, value in of_one.items() if value]:
        asked = "--search" if validate is None else "--validate"
        raise click.UsageError(f"{', '.join(given)}: not with {asked}")


def _workload(key, dtype, heads, tokens):
    from cute_fa.semantics.errors import ArgumentError
    from cute_fa.semantics.types import Direction, DType
    from perf.workload import Workload

    direction, deterministic, head_dim, head_dim_v, causal, window, seqlen = key
    h, _, hkv = heads.partition(",")
    try:
        h, hkv = int(h), int(hkv or h)
    except ValueError:
        raise ArgumentError(f"heads={heads!r}: a number, or two with a comma between") from None
    return Workload(direction=Direction(direction), dtype=DType(dtype), head_dim=head_dim, head_dim_v=head_dim_v,
                    heads=h, heads_kv=hkv, seqlen=seqlen, tokens=tokens or max(16384, seqlen), causal=causal,
                    window=window, deterministic=deterministic)  # fmt: skip


def _rows(workload, gpu, names, changes, ensemble, cubin, trace):
    """A row for each kernel, ranked beside the first one."""
    from cute_fa.semantics.types import SmArch
    from perf.predict.kernels import KERNELS, settings_of
    from perf.predict.model import Predictor
    from perf.predict.ranking import ranked

    arch = SmArch(gpu.arch)
    if trace is not None:
        trace.write_text("")  # an unusable path is an error before anything runs
    made: list[tuple[str, Any]] = [(name, {}) for name in names]
    if changes:
        made.append(("ours", settings_of(workload, arch, changes)))
    rows, first = [], None
    for name, settings in made:
        predictor = Predictor(KERNELS[name](workload, arch, settings), cubin if name == "ours" else None)
        result = predictor.predict(gpu, ensemble)
        row: dict[str, Any] = {
            "problem": str(workload), "gpu": gpu.name,
            "kernel": name + "".join(f" {k}={v}" for k, v in settings.items()),
            "ms": round(result.milliseconds, 4), "ms ±": round(result.milliseconds_spread, 4),
            "TFLOP/s": round(result.tflops, 1), "TFLOP/s ±": round(result.tflops_spread, 1), "bound": result.bound,
            "busy": result.busy, "waits": result.waits,
        }  # fmt: skip
        if first is not None:
            ranking = ranked(predictor, first[1], gpu, ensemble)
            row["against " + first[0]] = ranking.verdict
            row["ratios"] = {name: {"mean": mean, "spread": spread} for name, (mean, spread) in ranking.ratios.items()}
        first = first or (row["kernel"], predictor)
        rows.append(row)
        if trace is not None:
            predictor.trace(gpu, trace)
            trace = None
    return rows


def _found(workload, gpu, ensemble):
    """A row for each config of the grid."""
    from cute_fa.semantics.types import SmArch
    from perf.predict.search import searched

    rows = []
    for found in searched(workload, SmArch(gpu.arch), gpu, ensemble):
        row = {"problem": str(workload), **found.settings, "refused": found.refused}
        if found.prediction is not None and found.ranking is not None:
            row |= {"TFLOP/s": round(found.prediction.tflops, 1), "TFLOP/s ±": round(found.prediction.tflops_spread, 1),
                    "bound": found.prediction.bound, "spills": found.spills,
                    "against the chosen": found.ranking.verdict}  # fmt: skip
        rows.append(row)
    return sorted(rows, key=lambda row: -row.get("TFLOP/s", 0.0))


def _validate(file, ensemble, as_json, markdown):
    from rich.console import Console

    from cute_fa.semantics.errors import ArgumentError
    from perf.predict import validate

    notes = Console(stderr=True)
    listed = validate.predictors(validate.rows(file), lambda text: notes.print(text, highlight=False))
    if not listed:
        raise ArgumentError(f"{file}: none of its rows is of a kernel and a GPU that are predicted")
    constants = {name: gpus.load(name) for name in gpus.known()}
    table = validate.with_baseline(validate.validated(listed, constants, ensemble), listed, constants)
    summary = validate.summary(table)
    if as_json:
        parts = {"rows": table, "summary": summary}
        plain = {name: part.astype(object).where(part.notna(), None).to_dict("records") for name, part in parts.items()}
        click.echo(json.dumps(plain, indent=1))
        return
    for column in ("error", "baseline"):
        table[column] = [f"{value:+.1%}" if value == value else "" for value in table[column]]
    for column in ("mean", "worst", "baseline_mean", "baseline_worst"):
        summary[column] = [f"{value:.1%}" for value in summary[column]]
    for frame in (table, summary):
        show_rows(frame.astype(object).where(frame.notna(), None).to_dict("records"), markdown)
