"""What the groups of kernels share: their configs, launches, and how rows become constants."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from enum import Enum
from typing import Any, NamedTuple

import torch

from cute_fa.engine import worlds
from cute_fa.engine.compiler import compiled
from cute_fa.engine.contract import KernelConfig

Row = dict[str, Any]
WARP, WARPGROUP = 32, 128
QUARTERS = 4  # of an SM: schedulers, each with its own pipes
REPETITIONS = 5


@dataclass(frozen=True)
class TimedKernel(KernelConfig):
    """Config of a kernel that reads the clock around a loop."""

    @property
    def compile_name(self) -> str:
        return "_".join(
            ["microbench", type(self).__name__.lower(), self.arch.value, *map(str, self.parameters().values())]
        )

    def parameters(self) -> Row:
        """Fields by name, as rows hold them."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "arch"}
        return {name: value.value if isinstance(value, Enum) else value for name, value in values.items()}


class Timed(NamedTuple):
    """``cycles``: int64 (CTAs, readers), or with more dimensions, between two readings of clock64; steps of the
    scheduler if simulated. ``output``: what the kernel computed. ``seconds``: of the launch by events, NaN if
    simulated. ``figures``: what else a row is to have."""

    cycles: torch.Tensor
    output: torch.Tensor
    seconds: float = math.nan
    figures: Row | None = None


class Measured(NamedTuple):
    """The median of several values, and their relative standard deviation."""

    value: float
    spread: float


def device() -> str:
    """Where tensors of a launch lie."""
    return "cuda" if worlds.simulation() is None else "cpu"


def run(config: KernelConfig, *arguments: Any) -> float:
    """Launch once and wait; seconds by events, NaN in a simulation, which has no time."""
    kernel = compiled(config)
    if worlds.simulation() is not None:
        kernel.launch(arguments)
        return math.nan
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    kernel.launch(arguments)
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def repeat(
    name: str, config: TimedKernel, counts: tuple[int, int], timed: Callable[[int], Timed], **more: Any
) -> Iterator[Row]:
    """Rows of a kernel at two counts of its loop, so that whatever is outside of the loop cancels: ``cycles`` are those
    of the slowest reader. The first launch is not counted: it loads the kernel and warms caches."""
    timed(counts[0])
    for repetition in range(REPETITIONS):
        for count in counts:
            done = timed(count)
            figures = {"cycles": int(done.cycles.max()), "seconds": done.seconds, **(done.figures or {})}
            yield {"kernel": name, **config.parameters(), **more, "count": count, "repetition": repetition, **figures}


def picked(rows: Iterable[Row], **conditions: Any) -> list[Row]:
    """The rows that have these values."""
    return [row for row in rows if all(row.get(key) == value for key, value in conditions.items())]


def slopes(rows: Iterable[Row], figure: str = "cycles", **conditions: Any) -> list[float]:
    """What one more turn of the loop takes, for each repetition that has two counts; of the rows that meet the
    conditions, which leave one kernel. More turns that took less time measured something else, and are left out."""
    by_repetition: dict[int, dict[int, float]] = {}
    for row in picked(rows, **conditions):
        by_repetition.setdefault(row["repetition"], {})[row["count"]] = row[figure]
    found = []
    for points in by_repetition.values():
        if len(points) > 1:
            low, high = min(points), max(points)
            found.append((points[high] - points[low]) / (high - low))
    return [slope for slope in found if slope > 0]


def note(kernel: str, text: str) -> Row:
    """A row that says something beside constants; it goes to the head of the TOML file."""
    return {"kernel": kernel, "note": text}


def measured(values: list[float]) -> Measured:
    """Of at least one value."""
    middle = statistics.median(values)
    return Measured(middle, statistics.pstdev(values) / abs(middle) if middle else 0.0)


def each(function: Callable[..., float], *lists: list[float]) -> list[float]:
    """The function of each repetition's values; empty if one of the lists is."""
    return [function(*values) for values in zip(*lists, strict=False)]


def measured_each(**values: list[float]) -> dict[str, Measured]:
    """Constants by name, without those that have no value."""
    return {name: measured(found) for name, found in values.items() if found}
