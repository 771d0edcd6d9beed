"""Walks of range plans (``cute_fa.device.range_walk``): random ranges, what a tensor of words says, and what it should
say by a dense mask."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch

from cute_fa.api.range_plan import RangePlan
from cute_fa.device.tiling import ceil_div
from cute_fa.engine.range_plans import SortedRanges, range_walk
from cute_fa.semantics.walk_layout import NO_ROOM, TABLE_WORDS, Header, entries_start, mask_words, table_start
from tests.testing.simulated import unwritten_is_nan

FULL, CAUSAL, INVERSE, BOTH = range(4)


@dataclass(frozen=True)
class Ranges:
    """``q``, ``k`` int32 (n, 2), ``types`` int32 (n): a plan for total_q queries and total_k keys."""

    q: torch.Tensor
    k: torch.Tensor
    types: torch.Tensor
    total_q: int
    total_k: int

    @classmethod
    def of(cls, ranges: list[tuple], total_q: int, total_k: int) -> Ranges:
        """Of tuples (first query, last query, first key, last key, type)."""
        table = torch.tensor(ranges, dtype=torch.int64).reshape(-1, 5).to(torch.int32)
        return cls(table[:, :2].contiguous(), table[:, 2:4].contiguous(), table[:, 4].contiguous(), total_q, total_k)

    @classmethod
    def random(cls, n: int, total_q: int, total_k: int, seed: int, longest: int | None = None) -> Ranges:
        """Of any place, length (up to ``longest``) and type, some empty, some twice."""
        rng = np.random.default_rng(seed)
        table = np.zeros((n, 5), np.int64)
        for first, total in ((0, total_q), (2, total_k)):
            length = rng.integers(0, 1 + (total if longest is None else min(longest, total)), n)
            table[:, first] = (rng.random(n) * (total - length + 1)).astype(np.int64)
            table[:, first + 1] = table[:, first] + length
        table[:, 4] = rng.integers(0, 4, n)
        table[n - n // 8 :] = table[: n // 8]
        return cls.of(list(map(tuple, table.tolist())), total_q, total_k)

    def mask(self) -> np.ndarray:
        """bool (total_q, total_k): which pairs a range names."""
        # of a row of queries +1 where a range begins, −1 behind it
        steps = np.zeros((self.total_q, self.total_k + 1), np.int64)
        table = torch.cat([self.q, self.k, self.types[:, None]], 1).tolist()
        for q_start, q_end, k_start, k_end, kind in table:
            rows = np.arange(max(q_start, 0), min(q_end, self.total_q), dtype=np.int64)
            least = rows + (k_start - q_start) if kind & INVERSE else np.full_like(rows, -(2**40))
            most = rows + (k_end - q_end) if kind & CAUSAL else np.full_like(rows, 2**40)
            first = np.maximum(np.maximum(least, k_start), 0)
            stop = np.minimum(np.minimum(most + 1, k_end), self.total_k)
            some = first < stop
            np.add.at(steps, (rows[some], first[some]), 1)
            np.add.at(steps, (rows[some], stop[some]), -1)
        return steps.cumsum(1)[:, :-1] > 0

    def plan(self, **choices: int) -> RangePlan:
        """Native, of whatever these ranges hold: values are not checked."""
        return RangePlan(self.q, self.k, self.types, self.total_q, self.total_k, **choices)

    def walk(self, tile: tuple[int, int], rows: str = "queries", **capacities: int) -> torch.Tensor:
        """The walk's tensor for tiles of (rows, columns), made on the device; ``capacities``: entries, masks."""
        totals = (self.total_q, self.total_k) if rows == "queries" else (self.total_k, self.total_q)
        make = SortedRanges.of_queries if rows == "queries" else SortedRanges.of_keys
        blocks = ceil_div(totals[0], tile[0]) * ceil_div(totals[1], tile[1])
        rooms = capacities.get("entries", blocks), capacities.get("masks", blocks + 1)
        ranges = make(self.q, self.k, self.types, self.total_q, self.total_k)
        with unwritten_is_nan():
            return range_walk(*ranges, *totals, *tile, rows == "keys", *rooms)


@dataclass
class TileList:
    """What a walk says of a tile of rows: ``masked`` and ``covered`` blocks in their order, ``masks`` bool (masked,
    rows, columns); None for all where it found no room. ``first_mask``: its first mask tile."""

    masked: list[int] | None
    covered: list[int] | None
    masks: np.ndarray | None
    first_mask: int


@dataclass
class Walk:
    """A walk's tensor read: the header's numbers, tiles of rows in their order, and their lists."""

    entries: int
    mask_tiles: int
    filled: int
    no_room: int
    order: list[int]
    tiles: list[TileList]
    mask_zero: np.ndarray

    @classmethod
    def read(cls, walk: torch.Tensor, rows: int, tile: tuple[int, int], room: int) -> Walk:
        """Of a tensor for ``rows`` rows in tiles of (rows, columns), with room for so many entries."""
        words = walk.numpy()
        tiles, per_row = ceil_div(rows, tile[0]), mask_words(tile[1])
        assert words[Header.MASKS] == entries_start(tiles) + ceil_div(room, 4) * 4
        bits = words[words[Header.MASKS] :].view(np.uint32).reshape(-1, tile[0], per_row)
        masks = (bits[..., None] >> np.arange(32, dtype=np.uint32) & 1).astype(bool).reshape(len(bits), tile[0], -1)
        masks = masks[..., : tile[1]]
        lists, table = [], words[table_start(tiles) :][: TABLE_WORDS * tiles].reshape(tiles, TABLE_WORDS)
        for first, masked, total, first_mask in table.tolist():
            if total == NO_ROOM:
                lists.append(TileList(None, None, None, first_mask))
                continue
            blocks = words[first : first + total].tolist() if total else []
            assert not total or entries_start(tiles) <= first <= entries_start(tiles) + room - total
            lists.append(
                TileList(blocks[:masked], blocks[masked:], masks[first_mask : first_mask + masked], first_mask)
            )
        header = (int(words[i]) for i in (Header.ENTRIES, Header.MASK_TILES, Header.FILLED, Header.NO_ROOM))
        return cls(*header, words[Header.WORDS :][:tiles].tolist(), lists, masks[0])


def expected_lists(mask: np.ndarray, tile: tuple[int, int], whole_tiles: bool) -> list[TileList]:
    """The lists of a dense mask (rows, columns): blocks that it touches, masked ones from the last on. A block needs a
    mask if one of its columns, those behind the last included, is hidden from a row; rows behind the last one count
    with ``whole_tiles``."""
    rows, columns = mask.shape
    padded = np.zeros((ceil_div(rows, tile[0]) * tile[0], ceil_div(columns, tile[1]) * tile[1]), bool)
    padded[:rows, :columns] = mask
    lists = []
    for first in range(0, len(padded), tile[0]):
        blocks = padded[first : first + tile[0]].reshape(tile[0], -1, tile[1]).swapaxes(0, 1)
        counted = tile[0] if whole_tiles else min(tile[0], rows - first)
        touched = np.flatnonzero(blocks.any((1, 2)))
        seen = blocks[:, :counted].all((1, 2))
        masked = [int(b) for b in touched[::-1] if not seen[b]]
        lists.append(TileList(masked, [int(b) for b in touched if seen[b]], blocks[masked], 0))
    return lists


def assert_walk(ranges: Ranges, tile: tuple[int, int], rows: str = "queries", mask: np.ndarray | None = None) -> Walk:
    """The walk, as a dense mask has it."""
    mask = ranges.mask() if mask is None else mask
    mask = mask if rows == "queries" else mask.T
    room = ceil_div(mask.shape[0], tile[0]) * ceil_div(mask.shape[1], tile[1])
    walk = Walk.read(ranges.walk(tile, rows), mask.shape[0], tile, room)
    expected = expected_lists(mask, tile, rows == "keys")
    for number, (ours, theirs) in enumerate(zip(walk.tiles, expected, strict=True)):
        assert ours.masked == theirs.masked and ours.covered == theirs.covered, (number, ours, theirs)
        assert (ours.masks == theirs.masks).all(), (number, ours.masked)
    totals = [len(t.masked) + len(t.covered) for t in expected]
    assert walk.entries == sum(totals) and walk.filled == np.count_nonzero(totals) and walk.no_room == 0
    assert walk.order == np.argsort(-np.array(totals, int), kind="stable").tolist()
    assert walk.mask_zero.all()
    # mask tiles are handed out before it is known whether several ranges together cover a block
    used = sorted((t.first_mask, t.first_mask + len(t.masked)) for t in walk.tiles if t.masked)
    assert all(stop <= following for (_, stop), (following, _) in itertools.pairwise(used))
    assert not used or (used[0][0] >= 1 and used[-1][1] <= walk.mask_tiles)
    return walk
