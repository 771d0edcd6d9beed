"""Deterministic backwards: which tile adds to which sums after which other, and when the last one ends.

Tiles of keys add to dQ of a head one after the other, each block of queries for itself; with heads of their own, query
heads of a group also add to dK and dV of their kv head so. A tile's *turn* at a sum comes when the tile before it has
passed it on.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from cute_fa.semantics.errors import ArgumentError
from perf.predict.tiles import Cost, TileShape, row_group, span_of
from perf.workload import Workload
from ptxsim.timing.gpus import Gpu
from ptxsim.timing.replay import REDUCE, Replay, TimedLaunch


@dataclass(frozen=True)
class ChainedTile:
    """A tile whose steps add to sums, number ``first`` to ``first + steps - 1`` of each of ``heads`` heads, one head
    after the other. At a sum that tile number ``after`` in the order of the launch (None: no tile) adds to, it waits
    until that one has. ``behind``: the tile that has to have added its dK and dV before."""

    first: int
    steps: int
    heads: int = 1
    after: int | None = None
    behind: int | None = None


@dataclass(frozen=True)
class Turns:
    """Cycles of turns. ``hold``: from the moment when it is a tile's turn and its dQ is there until it passes the turn
    on; ``signal``: from there until the next tile knows; ``slack``: how late a turn may come without holding up
    the step after it, since a step's dQ leaves its place while the next one is computed; ``end``: like ``hold``, of dK
    and of dV (0: tiles do not share them)."""

    hold: float
    signal: float
    slack: float = 0.0
    end: float = 0.0


def chained_makespan(tiles: Sequence[ChainedTile], cost: Cost, slots: int, turns: Turns) -> float:
    """Cycles until the last of ``tiles``, handed out in their order to ``slots`` places, ends. A step takes
    ``cost(2) - cost(1)`` cycles; of the rest of a tile, dK's and dV's turns come after its last step, all else before
    the first. A tile that has been held up never catches up.

    ArgumentError for a tile that waits for itself or a later one: all places may then be taken by tiles that wait.
    """
    step = cost(2) - cost(1)
    last = _last_readers(tiles)
    free = [0.0] * slots
    passed: dict[int, np.ndarray] = {}  # [heads, steps] of a tile: when it passes its turns at dQ on
    ended: dict[int, float] = {}  # and that at dV
    for number, tile in enumerate(tiles):
        count = tile.heads * tile.steps
        begin = heapq.heappop(free) + cost(count) - step * count - 2 * turns.end
        turn = np.full((tile.heads, tile.steps), -np.inf)
        if tile.after is not None:
            before, times = tiles[tile.after], passed[tile.after]
            if last[tile.after] == number:
                del passed[tile.after]
            low, high = max(tile.first, before.first), min(tile.first + tile.steps, before.first + before.steps)
            if low < high:
                known = times[:, low - before.first : high - before.first]
                turn[:, low - tile.first : high - tile.first] = known + turns.signal
        ready, added = _steps(begin, step, turn.ravel(), turns.slack)
        if number in last:
            passed[number] = (added + turns.hold).reshape(turn.shape)
        end = float(max(ready[-1], added[-1] - turns.slack))
        if turns.end:
            # the tile before has added its dK one turn before its dV, and its dV while this one adds its dK
            released = -np.inf if tile.behind is None else ended[tile.behind]
            end = ended[number] = max(end + 2 * turns.end, released + turns.signal + turns.end)
        heapq.heappush(free, end)
    return float(max(free))


def _steps(begin: float, step: float, turn: np.ndarray, slack: float) -> tuple[np.ndarray, np.ndarray]:
    """When each step's dQ is there and when it is added, of a tile whose turn at each comes at a time."""
    at = step * np.arange(1, len(turn) + 1)
    held = np.concatenate([[-np.inf], (turn - slack - at)[:-1]])  # what each step is held up by: those before it
    ready = at + np.maximum(begin, np.maximum.accumulate(held))
    return ready, np.maximum(ready, turn)


def _last_readers(tiles):
    """Of each tile that another waits for, the last one that does."""
    last: dict[int, int] = {}
    for number, tile in enumerate(tiles):
        for other in (tile.after, tile.behind):
            if other is not None and not 0 <= other < number:
                raise ArgumentError(f"tile {number} waits for tile {other}: only for one handed out before it")
        if tile.after is not None:
            last[tile.after] = number
    return last


_ACQUIRE, _RELEASE = re.compile(r"\bld\.(global\.)?acquire\b"), re.compile(r"\bred\.release\b")


def turns_of(launch: TimedLaunch, replay: Replay, gpu: Gpu, step: float) -> Turns:
    """What turns cost in a replay of one tile (with ``times``) where each comes at once. The warp that adds to dQ
    passes one on in every step, of ``step`` cycles, the one that adds to dK and dV two.

    ``signal`` is one and a half round trips to the L2: half of one for what is passed on, on average half of one until
    the next poll comes there, since polls come one after the other, and half of one back.
    """
    code = launch.code.instructions
    acquires, releases = (
        np.array([i.opcode in names and text.search(launch.ptx_line(i.line)) is not None for i in code])
        for names, text in ((("LDG", "LD"), _ACQUIRE), (("REDG", "RED"), _RELEASE))
    )
    found = []
    for start, end in pairwise(launch.offsets[: launch.warps_per_cta + 1].tolist()):
        rows, at = launch.rows[start:end], replay.issued[start:end]
        first, adds = rows[:, 0] >= 0, rows[:, 1] == REDUCE
        came, passed = (at[first & of[rows[:, 0]]] for of in (acquires, releases))
        if len(passed) and len(came):  # others skip both, or have them switched off by a predicate
            found.append((passed, came + gpu.global_latency, at[adds], rows[adds, 2].sum() / len(passed)))
    found.sort(key=lambda warp: -len(warp[0]))
    passed, _, added, moved = found[0]
    hold = float((passed - _latest(added, passed)).mean())
    # dQ's place is free, the consumers hear of it, fill it, and say so
    filled = moved / gpu.shared_bytes + 2 * gpu.bar
    end = float((found[1][0] - _latest(found[1][1], found[1][0])).mean()) if len(found) > 1 else 0.0
    return Turns(hold, 1.5 * gpu.global_latency, max(step - hold - filled, 0.0), end)


def _latest(times, before):
    """Of each of ``before`` the latest of the ascending times that is not later."""
    return times[np.searchsorted(times, before, "right") - 1]


def our_chain(shape: TileShape, workload: Workload, l2_bytes: int) -> list[ChainedTile]:
    """The Hopper backward's (``fa3_sm90/backward``): tiles by ticket in the order of ``work.key_tile``, the last ones
    of all heads of a group before those ahead of them, the last group first; tile n waits for n + 1. Blocks of queries
    are walked over from the first to the last (without a mask the other way round, which is as long)."""
    spans, group = _spans(shape, workload), row_group(shape, workload, l2_bytes)
    rows = workload.batch * workload.heads_kv
    out: list[ChainedTile] = []
    for lowest in reversed(range(0, rows, group)):
        members = min(group, rows - lowest)
        for place, (first, steps) in enumerate(reversed(spans)):
            before = len(out) - members
            out += [ChainedTile(first, steps, shape.heads, before + k if place else None) for k in range(members)]
    return out


# SingleTileLPTBwdScheduler's L2, whatever the GPU's is.
_FA4_L2 = 50 << 20


def fa4_chain(shape: TileShape, workload: Workload) -> list[ChainedTile]:
    """FlashAttention-4's on sm_90 (``SingleTileLPTBwdScheduler``, ``dQaccum_store`` and ``epilogue_dKV`` of
    ``flash_bwd_sm90``): in groups of 2^k heads whose Q, dO and dQ fit the L2 the first tiles of all heads, then the
    second ones. Under a mask the last tile of keys goes first, which has the fewest queries, and tile n waits for
    n + 1, else for n - 1. Query heads of one kv head add to dK and dV one after the other."""
    spans, w = _spans(shape, workload), workload
    masked = w.window_size != (None, None)
    order = range(len(spans))[:: -1 if masked else 1]
    head = w.seqlen * ((w.head_dim + w.head_dim_v) * w.dtype.bytes + 4 * w.head_dim)
    group, rows, ratio = 1 << max((_FA4_L2 // head).bit_length() - 1, 0), w.batch * w.heads, w.heads // w.heads_kv
    places: dict[tuple[int, int], int] = {}
    out = []
    for lowest in range(0, rows, group):
        for n in order:
            for row in range(lowest, min(lowest + group, rows)):
                places[row, n] = len(out)
                after = places.get((row, n + 1 if masked else n - 1))
                behind = places[row - 1, n] if row % ratio else None
                out.append(ChainedTile(*spans[n], after=after, behind=behind))
    return out


def _spans(shape, workload):
    return [span_of(shape, workload, first) for first in range(0, workload.seqlen, shape.tokens)]
