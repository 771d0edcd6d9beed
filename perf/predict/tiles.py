"""The tiles of a problem, how many steps each takes, in which order they are computed, and when the last one ends."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from cute_fa.device.tiling import backward_row_bytes, ceil_div, head_group
from cute_fa.semantics.types import Direction
from perf.workload import Workload

# Cycles of a tile with so many steps.
Cost = Callable[[int], float]


@dataclass(frozen=True)
class TileShape:
    """How a kernel cuts a problem. Forward: a tile has ``tokens`` queries and takes ``step`` keys at a time; backward:
    a tile has ``tokens`` keys and takes ``step`` queries at a time. ``heads``: query heads that share a tile, forward
    in the same steps, backward one after the other. ``cluster`` CTAs compute a tile together, and walk over the same
    steps. ``persistent``: CTAs walk over tiles. ``skips_left``: what lies left of a window is not walked over.
    ``by_head``: tiles of a head are neighbours, however many heads the L2 holds."""

    tokens: int
    step: int
    heads: int = 1
    cluster: int = 1
    persistent: bool = False
    skips_left: bool = True
    by_head: bool = False


def span_of(shape: TileShape, workload: Workload, first: int) -> tuple[int, int]:
    """(number of the first, how many) of the steps of the tile that begins at a token: those from the first to the last
    with a visible pair, at least one; backward: of one head, by blocks of queries."""
    left, right = workload.window_size
    length, end = workload.seqlen, min(first + shape.tokens, workload.seqlen)
    if workload.direction is Direction.BACKWARD:
        left, right = right, left  # the queries that see a key lie after it where its keys lie before a query
    low = 0 if left is None or not shape.skips_left else max(first - left, 0)
    high = length if right is None else min(end + right, length)
    return low // shape.step, max(ceil_div(high, shape.step) - low // shape.step, 1)


def steps_of(shape: TileShape, workload: Workload, first: int) -> int:
    """Steps of the tile that begins at a token (backward: of all its heads)."""
    _, steps = span_of(shape, workload, first)
    return steps * shape.heads if workload.direction is Direction.BACKWARD else steps


def ordered_steps(shape: TileShape, workload: Workload, l2_bytes: int) -> list[int]:
    """Steps of each tile, in the order in which they are handed out (``device/tile_scheduler.py``): under a
    right bound the longest first, in groups of heads that fit into the L2 together, the last group, which may have
    fewer, first; or head by head."""
    per_row = [steps_of(shape, workload, first) for first in range(0, workload.seqlen, shape.tokens)]
    rows = workload.batch * workload.heads // shape.heads
    if workload.window_size[1] is None:
        return per_row * rows
    if workload.direction is Direction.FORWARD:
        per_row.reverse()
    group = row_group(shape, workload, l2_bytes)
    out: list[int] = []
    for first in reversed(range(0, rows, group)):
        heads, falls = min(group, rows - first), not shape.persistent or first // group % 2 == 0
        out += [steps for steps in (per_row if falls else per_row[::-1]) for _ in range(heads)]
    return out


def row_group(shape: TileShape, workload: Workload, l2_bytes: int) -> int:
    """Rows of tiles that are handed out together, unless ``by_head``: under a right bound, the longest tiles of all
    first, or where tiles take turns (deterministic backwards). They are those whose heads share the L2: forward K and
    V, backward Q, dO and the sums of dQ of a row's heads."""
    w, rows = workload, workload.batch * workload.heads // shape.heads
    if shape.by_head or (w.window_size[1] is None and not w.deterministic):
        return 1
    if w.direction is Direction.BACKWARD:
        row = w.seqlen * shape.heads * backward_row_bytes(w.head_dim, w.head_dim_v, w.dtype.bytes)
        return min(head_group(row, l2_bytes), rows)
    kv = w.seqlen * (w.head_dim + w.head_dim_v) * w.dtype.bytes
    return min(head_group(kv, l2_bytes, max(w.heads // w.heads_kv // shape.heads, 1)), rows)


def makespan(shape: TileShape, steps: list[int], cost: Cost, slots: int, start: float) -> float:
    """Cycles until the last tile ends on ``slots`` places for clusters. ``start``: between two CTAs on one place."""
    costs = {n: cost(n) for n in set(steps)}
    if shape.persistent:
        ends = [0.0] * min(slots, len(steps))
        for place, n in zip(_turns(len(ends)), steps, strict=False):
            ends[place] += costs[n]
        return max(ends)
    ends = [0.0] * slots
    for n in steps:
        heapq.heappush(ends, heapq.heappop(ends) + costs[n] + start)
    return max(ends) - start


def _turns(places: int) -> Iterator[int]:
    """Which CTA takes the next tile: by turns from the front and from the back."""
    while True:
        yield from range(places)
        yield from reversed(range(places))
