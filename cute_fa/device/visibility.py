"""Which scores of a tile are hidden: those of keys outside a query's window that are no sink tokens either.

All follows from :class:`Window`, here and in the ranges of blocks. Positions count from the thread's own first row or
column, since the rows and columns of its registers are static then.
"""

from collections.abc import Callable
from typing import NamedTuple, Optional

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, const_expr

from cute_fa.semantics.visibility import Neighbourhood


class Gap(NamedTuple):
    """[start, stop) of the columns that a left bound hides: ``start`` is where the sink ends, None without a sink."""

    start: Optional[Int32]
    stop: Int32

    def holds(self, column: int) -> Boolean:
        """Whether a column is in the gap."""
        return column < self.stop if self.start is None else (column < self.stop) & (column >= self.start)


class Window(NamedTuple):
    """Run-time bounds, between −2^30 and 2^30 so that adding a position stays within int32; negative ones are meant as
    they are. None where infinite; ``sink_tokens`` is None if there are none, and needs a left bound."""

    left: Optional[Int32]
    right: Optional[Int32]
    sink_tokens: Optional[Int32]

    def keys(self, position: Int32) -> Neighbourhood:
        """Keys in the window of a query at ``position`` = i + D."""
        return Neighbourhood(position, self.left, self.right)

    def queries(self, position: Int32) -> Neighbourhood:
        """Queries that have the key at ``position`` = j − D in their window."""
        return Neighbourhood(position, self.right, self.left)

    @property
    def empty(self) -> Boolean:
        """Whether nothing lies between two bounds."""
        return self.left + self.right < 0

    def gap(self, position: Int32, first_key: Int32) -> Gap:
        """Keys that a left bound hides from a query, both counted from ``first_key``."""
        stop = self.keys(position).first
        return Gap(None if self.sink_tokens is None else self.sink_tokens - first_key, stop)


@cute.jit
def mask_scores(
    scores: cute.Tensor,
    columns: cute.Tensor,
    diagonals: list[Int32],
    keys_left: Int32,
    window: Window,
    first_key: Int32,
    right_edge: cutlass.Constexpr[bool],
    left_edge: cutlass.Constexpr[bool],
):
    """Set hidden scores to −inf, on the (rows, columns) view of an accumulator.

    Everything is relative to ``first_key``, the block's first key plus the thread's column offset: ``diagonals`` is
    i + D − first_key of each row, ``keys_left`` is seqlen_k − first_key, ``columns`` are thread 0's static columns.
    """
    for r in cutlass.range_constexpr(cute.size(scores, mode=[0])):
        stop = keys_left
        if const_expr(right_edge and window.right is not None):
            stop = cutlass.min(stop, window.keys(diagonals[r]).last + 1)
        if const_expr(left_edge):
            gap = window.gap(diagonals[r], first_key)
        for c in cutlass.range_constexpr(cute.size(scores, mode=[1])):
            column = columns[0, c][1]
            if const_expr(right_edge):
                scores[r, c] = -Float32.inf if column >= stop else scores[r, c]
            if const_expr(left_edge):
                scores[r, c] = -Float32.inf if gap.holds(column) else scores[r, c]


def hidden_keys(
    window: Window,
    diagonal: Int32,
    first_key: Int32,
    keys_left: Int32,
    left_edge: bool,
    right_edge: bool = True,
) -> Callable[[int], Boolean]:
    """Which columns of S a query does not see, by the numbers that :func:`mask_scores` takes for its row."""
    last, gap = None, window.gap(diagonal, first_key) if left_edge else None
    if right_edge:
        last = keys_left - 1
        if window.right is not None:
            last = cutlass.min(last, window.keys(diagonal).last)

    def hidden(column: int) -> Boolean:
        if last is None:
            return gap.holds(column)
        beyond = column > last
        return beyond if gap is None else gap.holds(column) | beyond

    return hidden


def hidden_queries(
    window: Window, position: Int32, key: Int32, seqlen_k: Int32, columns: int, left_edge: bool
) -> Callable[[int], Boolean]:
    """Which of the ``columns`` columns of Sᵀ, whose rows are keys, do not see ``key``: all of them where it lies beyond
    the sequence. ``position``: j − D less the thread's first query; ``left_edge``: whether a left bound may hide it."""
    seen, last = window.queries(position), None
    first = Int32(0) if window.right is None else seen.first
    first = cutlass.select_(key >= seqlen_k, Int32(columns), first)
    if left_edge:
        last = seen.last
        if window.sink_tokens is not None:
            last = cutlass.select_(key < window.sink_tokens, Int32(columns), last)

    def hidden(column: int) -> Boolean:
        before = column < first
        return before if last is None else before | (column > last)

    return hidden
