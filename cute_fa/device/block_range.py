"""Which key blocks a tile of queries visits, and which of them need a mask.

Key j is visible to query i, with D = seqlen_k − seqlen_q, iff i + D − left ≤ j ≤ i + D + right, or j < sink_tokens and
j ≤ i + D + right. Blocks are visited from the right to the left, each at most once, in four ranges:

    right edge   masked: the diagonal, the right side of the window, the end of the sequence
    full         every key visible to every query of the tile: no mask
    left edge    masked: the left side of the window
    sink         masked: blocks before the window that hold sink tokens

If the sink reaches the window's first block, or the right edge, its range is merged with the others: the left edge
then runs down to block 0.
"""

from typing import NamedTuple

import cutlass
from cutlass import Boolean, Int32, const_expr

from cute_fa.device.visibility import Window


class MaskedRange(NamedTuple):
    """Iterations [start, stop) of a tile's walk, and on which sides of a window a score of theirs may be hidden."""

    start: Int32
    stop: Int32
    right_edge: bool
    left_edge: bool


class BlockRange(NamedTuple):
    """Iterations 0 … ``total`` of one tile: right edge up to ``right_end``, full up to ``full_end``, left edge up to
    ``window_end``, then the sink's blocks."""

    last_block: Int32
    right_end: Int32
    full_end: Int32
    window_end: Int32
    total: Int32

    def ranges(self, left_bound: bool) -> list[MaskedRange]:
        """The walk over all iterations. ``left_bound``: whether there is a left edge; its range has the sink's, too."""
        ranges = [
            MaskedRange(Int32(0), self.right_end, True, left_bound),
            MaskedRange(self.right_end, self.full_end, False, False),
        ]
        return [*ranges, MaskedRange(self.full_end, self.total, False, True)] if left_bound else ranges

    def block(self, iteration: Int32, window: Window) -> Int32:
        """Key block of an iteration."""
        if const_expr(window.sink_tokens is None):
            return self.last_block - iteration
        inside = self.last_block - iteration
        sink = self.total - 1 - iteration
        return cutlass.select_(iteration < self.window_end, inside, sink)


def block_range(
    window: Window, seqlen_q: Int32, seqlen_k: Int32, m_start: Int32, tile_m: int, tile_n: int
) -> BlockRange:
    """Ranges for the queries [m_start, m_start + tile_m) of a sequence; all empty if the tile sees no key."""
    m_end = cutlass.min(m_start + tile_m, seqlen_q)
    diagonal = seqlen_k - seqlen_q

    key_end, full_key_end = seqlen_k, seqlen_k
    if const_expr(window.right is not None):
        # the last key of the next query is where the keys of a query end
        key_end = cutlass.min(seqlen_k, window.keys(m_end + diagonal).last)
        full_key_end = cutlass.min(seqlen_k, window.keys(m_start + diagonal + 1).last)
    key_end = cutlass.max(key_end, 0)
    stop = (key_end + tile_n - 1) // tile_n
    full_stop = cutlass.max(full_key_end, 0) // tile_n

    start, full_start = Int32(0), Int32(0)
    if const_expr(window.left is not None):
        start = cutlass.max(window.keys(m_start + diagonal).first, 0) // tile_n
        full_start = (cutlass.max(window.keys(m_end - 1 + diagonal).first, 0) + tile_n - 1) // tile_n
        if const_expr(window.right is not None):
            start = cutlass.select_(window.empty, stop, start)
    sink_blocks = Int32(0)
    if const_expr(window.sink_tokens is not None):
        sink_blocks = cutlass.min((cutlass.min(window.sink_tokens, key_end) + tile_n - 1) // tile_n, stop)
        # the second where the window begins behind what a query may see: the sink then ends at the right edge
        merged = (sink_blocks >= start) | (sink_blocks > full_stop)
        start = cutlass.select_(merged, Int32(0), start)
        sink_blocks = cutlass.select_(merged, Int32(0), sink_blocks)

    nothing = Boolean(m_start >= seqlen_q)
    stop = cutlass.select_(nothing, Int32(0), stop)
    sink_blocks = cutlass.select_(nothing, Int32(0), sink_blocks)
    start = cutlass.min(start, stop)
    right_start = cutlass.min(cutlass.max(full_stop, start), stop)
    left_stop = cutlass.min(cutlass.max(full_start, start), right_start)
    window_end = stop - start
    return BlockRange(
        last_block=stop - 1,
        right_end=stop - right_start,
        full_end=stop - left_stop,
        window_end=window_end,
        total=window_end + sink_blocks,
    )
