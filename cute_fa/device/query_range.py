"""Which query blocks a tile of keys meets, and which of them need a mask: ``block_range`` seen from the keys.

Query i sees key j, with D = seqlen_k − seqlen_q, iff j − D − right ≤ i and (i ≤ j − D + left or j < sink_tokens).
Blocks are visited from the last to the first, so that only the first one visited can reach beyond the sequence, in
three ranges:

    left edge    masked: queries whose window begins inside the tile
    full         every query sees every key of the tile: no mask
    right edge   masked: the diagonal, the right side of the window, and everything for a tile that ends beyond the keys
"""

from typing import NamedTuple

import cutlass
from cutlass import Boolean, Int32, const_expr

from cute_fa.device.block_range import MaskedRange
from cute_fa.device.visibility import Window


class QueryRange(NamedTuple):
    """Iterations 0 … ``total`` of one tile of keys: left edge up to ``left_end``, full up to ``full_end``."""

    last_block: Int32
    left_end: Int32
    full_end: Int32
    total: Int32

    def ranges(self, left_bound: bool) -> list[MaskedRange]:
        """The walk over all iterations; ``left_bound``: whether there is a left edge. A tile that ends beyond the keys
        needs the right edge's mask there, too."""
        ranges = [
            MaskedRange(self.left_end, self.full_end, False, False),
            MaskedRange(self.full_end, self.total, True, False),
        ]
        return [MaskedRange(Int32(0), self.left_end, True, True), *ranges] if left_bound else ranges

    def block(self, iteration: Int32) -> Int32:
        """Query block of an iteration."""
        return self.last_block - iteration


def query_range(
    window: Window, seqlen_q: Int32, seqlen_k: Int32, n_start: Int32, tile_m: int, tile_n: int
) -> QueryRange:
    """Ranges for the keys [n_start, n_start + tile_n) of a sequence; all empty if no query sees one of them."""
    n_end = cutlass.min(n_start + tile_n, seqlen_k)
    diagonal = seqlen_k - seqlen_q

    start, full_start = Int32(0), Int32(0)
    if const_expr(window.right is not None):
        start = cutlass.max(window.queries(n_start - diagonal).first, 0)
        full_start = cutlass.max(window.queries(n_end - 1 - diagonal).first, 0)
    end, full_end = seqlen_q, seqlen_q
    if const_expr(window.left is not None):
        first_windowed = n_start  # the first key that the sink does not hold
        if const_expr(window.sink_tokens is not None):
            first_windowed = cutlass.max(n_start, window.sink_tokens)
        end = cutlass.min(seqlen_q, window.queries(n_end - diagonal).last)
        if const_expr(window.right is not None):
            end = cutlass.select_(window.empty, start, end)
        full_end = cutlass.min(seqlen_q, window.queries(first_windowed - diagonal).last + 1)
        if const_expr(window.sink_tokens is not None):
            end = cutlass.select_(n_start < window.sink_tokens, seqlen_q, end)
            full_end = cutlass.select_(n_end <= window.sink_tokens, seqlen_q, full_end)

    nothing = Boolean(n_start >= seqlen_k) | (start >= end)
    first = start // tile_m
    stop = cutlass.select_(nothing, first, (cutlass.max(end, 0) + tile_m - 1) // tile_m)
    # rows beyond the queries have P = 0 by their LSE, so the last block needs no mask of its own
    full_stop = cutlass.select_(full_end >= seqlen_q, stop, cutlass.max(full_end, 0) // tile_m)
    full_first = (full_start + tile_m - 1) // tile_m
    full_first = cutlass.select_(n_start + tile_n > seqlen_k, full_stop, full_first)
    full_stop = cutlass.min(cutlass.max(full_stop, first), stop)
    full_first = cutlass.min(cutlass.max(full_first, first), full_stop)
    return QueryRange(
        last_block=stop - 1,
        left_end=stop - full_stop,
        full_end=stop - full_first,
        total=stop - first,
    )


def earlier_tiles(
    window: Window, seqlen_q: Int32, seqlen_k: Int32, n_block: Int32, block: Int32, tile_m: int, tile_n: int
) -> Int32:
    """How many tiles of keys before ``n_block``, which meets the query block, meet it too.

    Where a tile's queries begin and end grows with the tile, so that an earlier one can only end too early: all its
    keys lie to the left of what the block's first query sees, and none is a sink token.
    """
    if const_expr(window.left is None):
        return n_block
    passed = block * tile_m + seqlen_k - seqlen_q - window.left
    unmet = cutlass.max(passed, 0) // tile_n
    if const_expr(window.sink_tokens is None):
        return n_block - unmet
    sinks = (window.sink_tokens + tile_n - 1) // tile_n
    return cutlass.min(n_block, sinks) + cutlass.max(n_block - cutlass.max(unmet, sinks), 0)
