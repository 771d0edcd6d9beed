"""The walk of a tile over its blocks, range by range, each with just the mask it needs."""

from collections.abc import Callable, Sequence

import cutlass
import cutlass.cute as cute
from cutlass import Int32

from cute_fa.device.block_range import MaskedRange


def walk(ranges: Sequence[MaskedRange], step: Callable) -> None:
    """``step(iteration, right_edge, left_edge)`` for every iteration of the ranges, in their order."""
    for masked in ranges:
        _steps(step, *masked)


@cute.jit
def _steps(
    step: cutlass.Constexpr[Callable],
    start: Int32,
    stop: Int32,
    right_edge: cutlass.Constexpr[bool],
    left_edge: cutlass.Constexpr[bool],
):
    for iteration in cutlass.range(start, stop, unroll=1):
        step(iteration, right_edge, left_edge)
