"""Predicted beside published speeds."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from cute_fa.semantics.errors import ArgumentError, CuteFaError
from cute_fa.semantics.types import Direction, DType, SmArch
from perf.predict.kernels import KERNELS, Kernel
from perf.predict.model import Predictor
from perf.predict.tiles import makespan, ordered_steps
from perf.workload import Workload
from ptxsim.errors import SimError
from ptxsim.timing import gpus
from ptxsim.timing.gpus import Gpu

COLUMNS = ("source", "gpu", "kernel", "direction", "dtype", "head_dim", "head_dim_v", "seqlen", "batch", "heads",
           "heads_kv", "causal", "tflops", "notes")  # fmt: skip
# Directions of a table, and whether gradients are deterministic.
DIRECTIONS = {
    "fwd": (Direction.FORWARD, False),
    "bwd": (Direction.BACKWARD, False),
    "bwd_det": (Direction.BACKWARD, True),
}
_NUMBERS = ("head_dim", "head_dim_v", "seqlen", "batch", "heads", "heads_kv", "tflops")
# GPUs of a table by what their names contain.
GPUS = {"H100 SXM": "h100", "H200": "h200", "A100 80GB SXM": "a100", "A100 80GB PCIe": "a100-pcie"}
# (kernel of a table, architecture) -> the kernel that is predicted. The C++ FlashAttention-3 is no DSL kernel: ours
# with its conditions, K and V shared by clusters of two without causal mask from head_dim 128 on
# (hopper/flash_fwd_launch_template.h) and 80 keys a block at head_dim 256 at any length (hopper/tile_size.h), stands
# for it.
_FA4 = re.compile(r"^FA4\b")
_FA3 = re.compile(r"^FA3$")


@dataclass(frozen=True)
class Row:
    """A published row and the kernel that predicts it."""

    number: int
    workload: Workload
    gpu: str
    kernel: str
    settings: tuple[tuple[str, int], ...]
    tflops: float


def rows(file: Path) -> Iterator[Row]:
    """Rows of a table that can be predicted. ArgumentError for what is no table, lacks a column, or has a row of a
    predicted kernel without one of its numbers."""
    try:
        table = pd.read_csv(file)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise ArgumentError(f"{file} is no CSV table: {error}") from None
    if missing := [column for column in COLUMNS if column not in table]:
        raise ArgumentError(f"{file} lacks the columns {', '.join(missing)}")
    for number, row in table.iterrows():
        gpu = next((name for text, name in GPUS.items() if text in str(row.gpu)), None)
        kernel = "fa4" if _FA4.match(str(row.kernel)) else "ours" if _FA3.match(str(row.kernel)) else None
        if gpu is None or kernel is None or row.direction not in DIRECTIONS or row["dtype"] not in ("bf16", "fp16"):
            continue
        direction, deterministic = DIRECTIONS[row.direction]
        if kernel == "ours" and direction is Direction.BACKWARD:
            continue  # the C++ backward is like none of ours
        try:
            numbers = {name: float(row[name]) for name in _NUMBERS}
        except (TypeError, ValueError):
            numbers = {}
        if lacking := [name for name in _NUMBERS if not numbers.get(name, 0) > 0]:
            raise ArgumentError(f"{file}, row {number}: {', '.join(lacking)}: positive numbers are needed")
        window = re.search(r"sliding window (\d+)", str(row.notes))
        causal = bool(row.causal)
        seqlen, batch = int(row.seqlen), int(row.batch)
        shared = kernel == "ours" and not causal and window is None and row.head_dim >= 128
        wide = kernel == "ours" and row.head_dim == 256 and window is None
        settings = (("cluster", 1 + shared),) if kernel == "ours" else ()
        settings += (("tile_n", 80),) if wide else ()
        workload = Workload(
            direction=direction, deterministic=deterministic, dtype=DType(row["dtype"]), head_dim=int(row.head_dim),
            head_dim_v=int(row.head_dim_v), heads=int(row.heads), heads_kv=int(row.heads_kv), seqlen=seqlen,
            tokens=seqlen * batch, causal=causal, window=int(window[1]) - 1 if window else None,
        )  # fmt: skip
        yield Row(int(number), workload, gpu, kernel, settings, float(row.tflops))


def _direction(workload: Workload) -> str:
    """As a table has it."""
    return next(name for name, kind in DIRECTIONS.items() if kind == (workload.direction, workload.deterministic))


def predictors(listed: Iterable[Row], progress=lambda text: None) -> dict[Row, Predictor | str]:
    """A predictor of each row, shared where probes are the same; a text where there is none, which says why."""
    shared: dict[tuple, Predictor] = {}
    out: dict[Row, Predictor | str] = {}
    for row in listed:
        try:
            kernel: Kernel = KERNELS[row.kernel](row.workload, SmArch(gpus.load(row.gpu).arch), dict(row.settings))
            if kernel.identity not in shared:
                progress(f"{kernel.name} {_direction(row.workload)} {row.workload.head_dim} on {row.gpu}")
                shared[kernel.identity] = Predictor(kernel)
        except (CuteFaError, SimError) as error:
            out[row] = str(error)
            continue
        out[row] = shared[kernel.identity].of(kernel)
    return out


def validated(listed: dict[Row, Predictor | str], constants: dict[str, Gpu], ensemble: int) -> pd.DataFrame:
    """A row each: what was published, what is predicted, the relative error."""
    out = []
    for row, predictor in listed.items():
        w = row.workload
        entry = {
            "row": row.number, "gpu": row.gpu, "kernel": row.kernel, "direction": _direction(w),
            "head_dim": w.head_dim,
            "mask": "window" if w.window is not None else "causal" if w.causal else "full", "seqlen": w.seqlen,
            "published": row.tflops,
        }  # fmt: skip
        if isinstance(predictor, str):
            out.append({**entry, "refused": predictor})
            continue
        made = predictor.predict(constants[row.gpu], ensemble)
        out.append({**entry, "predicted": round(made.tflops, 1), "spread": round(made.tflops_spread, 1),
                    "error": made.tflops / row.tflops - 1, "bound": made.bound})  # fmt: skip
    if all("refused" in entry for entry in out):
        raise ArgumentError(f"none of {len(out)} rows can be predicted; the first: {out[0]['refused']}")
    return pd.DataFrame(out)


def with_baseline(table: pd.DataFrame, listed: dict[Row, Predictor | str], constants: dict[str, Gpu]) -> pd.DataFrame:
    """Beside it what needs no model: whole tiles on the GPU's SMs at one speed a step for each GPU, kernel, direction
    and head_dim, that of its longest row, without a mask if there is one."""
    by_number = {row.number: (row, predictor) for row, predictor in listed.items()}
    group = ["gpu", "kernel", "direction", "head_dim"]
    table = table.copy()
    for _, rows_ in table.groupby(group):
        known = rows_[rows_.predicted.notna()]
        if known.empty:
            continue
        reference = known.sort_values(["mask", "seqlen"], key=lambda c: c == "full" if c.name == "mask" else c).index[
            -1
        ]
        times = {n: _whole_tiles(*by_number[table.row[n]], constants) for n in known.index}
        row, _ = by_number[table.row[reference]]
        unit = row.workload.work.flops / row.tflops / times[reference]
        for n in known.index:
            other, _ = by_number[table.row[n]]
            table.loc[n, "baseline"] = other.workload.work.flops / (unit * times[n]) / other.tflops - 1
    return table


def _whole_tiles(row: Row, predictor: Predictor | str, constants: dict[str, Gpu]) -> float:
    """Steps until the last tile ends, if a tile takes as long as it has steps."""
    assert isinstance(predictor, Predictor)
    gpu, shape = constants[row.gpu], predictor.kernel.shape
    steps = ordered_steps(shape, row.workload, int(gpu.l2_size * 2**20))
    return makespan(shape, steps, float, int(gpu.sms) // shape.cluster * predictor.residency, 0.0)


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Mean and worst of the errors' absolute logarithms, the model's and the baseline's, by direction and length."""
    known = table[table.predicted.notna()].copy()
    known["size"] = [abs(math.log(1 + error)) for error in known.error]
    known["baseline"] = [abs(math.log(1 + error)) for error in known.baseline]
    known["length"] = ["2k and longer" if seqlen >= 2048 else "shorter" for seqlen in known.seqlen]
    grouped = known.groupby(["gpu", "kernel", "direction", "length"])
    figures = dict(rows=("size", "size"), mean=("size", "mean"), worst=("size", "max"))
    return grouped.agg(**figures, baseline_mean=("baseline", "mean"), baseline_worst=("baseline", "max")).reset_index()
