"""Plans of ranges on the host: which query intervals see which key intervals, and what follows without a device.

A range names pairs of a query i in [q_start, q_stop) and a key j in [k_start, k_stop), by its type:

==  =============  ===================================================  =======================================
0   full           all of them
1   causal         j − i ≤ k_stop − q_stop: the last query sees all      aligned at the bottom right corner
2   inverse causal j − i ≥ k_start − q_start: the first query sees all   aligned at the top left corner
3   both           both bounds
==  =============  ===================================================  =======================================

A plan shows the union: a pair that several ranges name counts once. Positions are rows of the packed tensors q
(total_q, heads, head_dim) and k, v (total_k, heads_kv, …), and ranges are half open.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cute_fa.semantics.errors import ArgumentError, DTypeError, RangeError, ShapeError
from cute_fa.semantics.problem import INT32_MAX

if TYPE_CHECKING:
    from collections.abc import Sequence

FULL, CAUSAL, INVERSE_CAUSAL, BOTH = range(4)
TYPE_NAMES = ("full", "causal", "inverse causal", "both")
# Rows of a plan's pages. Smaller ones the kernels that load by TMA refuse; larger ones save entries of the table alone
# and would be further kernels to compile.
_PAGE_SIZES = (8, 16, 32, 64, 128, 256)
_ROWS_AT_ONCE = 512  # of queries whose intervals of keys are in memory together


@dataclass(frozen=True)
class SequenceArguments:
    """What ``flash_attn_varlen_func`` takes for a plan that is packed sequences, int32: ``cu_seqlens_q`` and
    ``cu_seqlens_k`` (batch + 1), ``seqused_k`` (batch) or None where every key counts. Queries in no range are
    sequences without keys: their LSE is −inf or the learnable sink, where rows beyond a ``seqused_q`` have −inf."""

    cu_seqlens_q: np.ndarray
    cu_seqlens_k: np.ndarray
    seqused_k: np.ndarray | None
    causal: bool

    @property
    def max_seqlen_q(self) -> int:
        return _longest(np.diff(self.cu_seqlens_q))

    @property
    def max_seqlen_k(self) -> int:
        return _longest(np.diff(self.cu_seqlens_k) if self.seqused_k is None else self.seqused_k)


@dataclass(frozen=True)
class PageArguments:
    """What ``flash_attn_varlen_func`` takes for a plan whose queries gather whole pages of keys, int32:
    ``cu_seqlens_q`` (batch + 1), ``page_table`` (batch, max_pages), ``seqused_k`` (batch). Page p is rows
    p · page_size up to (p + 1) · page_size of k and v, of which the last total_k % page_size are in no page. Queries
    in no range are sequences without keys."""

    cu_seqlens_q: np.ndarray
    page_size: int
    page_table: np.ndarray
    seqused_k: np.ndarray

    @property
    def max_seqlen_q(self) -> int:
        return _longest(np.diff(self.cu_seqlens_q))

    @property
    def max_seqlen_k(self) -> int:
        return _longest(self.seqused_k)


@dataclass(frozen=True, eq=False)
class HostRanges:
    """A plan of n ranges, checked once: ``q_ranges`` and ``k_ranges`` int32 (n, 2), ``types`` int32 (n), which callers
    know as ``attn_type_map`` and None makes full; of total_q queries and total_k keys. Anything that numpy makes arrays
    of integers from is taken.

    Raises DTypeError, ShapeError or ArgumentError for what is no plan, RangeError for a range that is reversed, leaves
    the rows that there are or has no known type.
    """

    q_ranges: np.ndarray
    k_ranges: np.ndarray
    types: np.ndarray
    total_q: int
    total_k: int

    def __post_init__(self) -> None:
        for name in ("total_q", "total_k"):
            if not 0 <= getattr(self, name) <= INT32_MAX:
                raise ArgumentError(f"{name}={getattr(self, name)}: between 0 and {INT32_MAX}")
        q_ranges = _ranges("q_ranges", self.q_ranges, self.total_q, "queries")
        k_ranges = _ranges("k_ranges", self.k_ranges, self.total_k, "keys")
        if len(k_ranges) != len(q_ranges):
            raise ShapeError(f"k_ranges has {len(k_ranges)} ranges, q_ranges {len(q_ranges)}: one for each is needed")
        checked = {"q_ranges": q_ranges, "k_ranges": k_ranges, "types": _types(self.types, len(q_ranges), BOTH)}
        for name, array in checked.items():
            object.__setattr__(self, name, array)

    @classmethod
    def from_segment_offsets(
        cls,
        q_ranges: Any,
        k_ranges: Any,
        attn_type_map: Any,
        segment_offsets: Any,
        *,
        total_q: int,
        total_k: int,
        whole: bool = True,
    ) -> HostRanges:
        """LA Flash's form: key segments ``segment_offsets[i]`` up to ``segment_offsets[i + 1]`` of ``k_ranges`` belong
        to ``q_ranges[i]``, each with the type ``attn_type_map[i]``, 0 or 1. ``segment_offsets``: (len(q_ranges) + 1).
        ``whole``: every segment belongs to one; else those before the first offset and from the last one on count for
        nothing, as room that is not needed on a device.

        Raises what the class does, and RangeError for offsets that decrease, name segments that there are not or, if
        whole, leave some out.
        """
        groups = _ranges("q_ranges", q_ranges, total_q, "queries")
        segments = _ranges("k_ranges", k_ranges, total_k, "keys")
        types = _types(attn_type_map, len(groups), CAUSAL)
        offsets = _integers("segment_offsets", segment_offsets)
        if offsets.shape != (len(groups) + 1,):
            rule = f"({len(groups) + 1},) is needed for {len(groups)} ranges of queries"
            raise ShapeError(f"segment_offsets {offsets.shape}: {rule}")
        for i, end in ((0, 0), (len(groups), len(segments))):
            if whole and offsets[i] != end:
                raise RangeError(f"segment_offsets[{i}]={offsets[i]}: {end} is needed for {len(segments)} k_ranges")
            if not 0 <= offsets[i] <= len(segments):
                raise RangeError(f"segment_offsets[{i}]={offsets[i]}: between 0 and the {len(segments)} k_ranges")
        falls = np.flatnonzero(np.diff(offsets) < 0)
        if len(falls):
            i = int(falls[0])
            rule = "offsets never decrease"
            raise RangeError(f"segment_offsets goes from {offsets[i]} to {offsets[i + 1]} at {i + 1}: {rule}")
        counts, segments = np.diff(offsets), segments[offsets[0] : offsets[-1]]
        return cls(np.repeat(groups, counts, axis=0), segments, np.repeat(types, counts), total_q, total_k)

    @classmethod
    def concatenate(cls, plans: Sequence[HostRanges]) -> HostRanges:
        """Of sequences packed one behind the other, each of which sees only its own keys by its own plan."""
        before_q, before_k = (
            np.cumsum([0, *(getattr(plan, total) for plan in plans)]) for total in ("total_q", "total_k")
        )
        q_ranges = [plan.q_ranges + start for plan, start in zip(plans, before_q[:-1], strict=True)]
        k_ranges = [plan.k_ranges + start for plan, start in zip(plans, before_k[:-1], strict=True)]
        none = np.zeros((0, 2), np.int32)
        types = np.concatenate([none[:, 0], *(plan.types for plan in plans)])
        totals = int(before_q[-1]), int(before_k[-1])
        return cls(np.concatenate([none, *q_ranges]), np.concatenate([none, *k_ranges]), types, *totals)

    def __len__(self) -> int:
        return len(self.types)

    def mask(self) -> np.ndarray:
        """bool (total_q, total_k): whether query i sees key j."""
        visible = np.zeros((self.total_q, self.total_k), bool)
        ranges = (array.tolist() for array in (self.q_ranges, self.k_ranges, self.types))
        for (q_start, q_stop), (k_start, k_stop), kind in zip(*ranges, strict=True):
            distance = np.arange(k_start, k_stop) - np.arange(q_start, q_stop)[:, None]
            named = np.ones(distance.shape, bool)
            if kind & CAUSAL:
                named &= distance <= k_stop - q_stop
            if kind & INVERSE_CAUSAL:
                named &= distance >= k_start - q_start
            visible[q_start:q_stop, k_start:k_stop] |= named
        return visible

    def area(self) -> int:
        """How many pairs are visible, each counted once; without a dense mask."""
        return sum(self._area_of(row, row + _ROWS_AT_ONCE) for row in range(0, self.total_q, _ROWS_AT_ONCE))

    def _area_of(self, first: int, stop: int) -> int:
        """Visible pairs of queries [first, stop)."""
        reach = np.flatnonzero((self.q_ranges[:, 0] < stop) & (self.q_ranges[:, 1] > first))
        (q_start, q_stop), (k_start, k_stop) = (
            ranges[reach].T.astype(np.int64) for ranges in (self.q_ranges, self.k_ranges)
        )
        begin = np.maximum(q_start, first)
        rows = np.minimum(q_stop, stop) - begin
        of = np.repeat(np.arange(len(reach)), rows)  # an element for each query of each range
        query = np.arange(len(of)) - np.repeat(rows.cumsum() - rows - begin, rows)
        kind, lower, upper = self.types[reach][of], (k_start - q_start)[of], (k_stop - q_stop)[of]
        left = np.where(kind & INVERSE_CAUSAL, np.maximum(k_start[of], query + lower), k_start[of])
        right = np.where(kind & CAUSAL, np.minimum(k_stop[of], query + upper + 1), k_stop[of])
        # one axis for the keys of all queries, on which those of different queries never meet
        axis = query * self.total_k
        begins, ends = _union(axis + left, axis + right)
        return int((ends - begins).sum())

    def simple_objection(self) -> str | None:
        """Why this is not packed sequences, None if it is: one key range for each query range, both ascending and
        disjoint, all full or all causal (a single query's may be either)."""
        for name, ranges in (("q_ranges", self.q_ranges), ("k_ranges", self.k_ranges)):
            early = np.flatnonzero(ranges[1:, 0] < ranges[:-1, 1])
            if len(early):
                i = int(early[0]) + 1
                before, this = _shown(ranges[i - 1]), _shown(ranges[i])
                return f"{name}[{i}]={this} begins before {name}[{i - 1}]={before} ends: not packed sequences"
        kinds = self._kinds()
        if len(kinds) > 1 or kinds - {FULL, CAUSAL}:
            names = ", ".join(TYPE_NAMES[kind] for kind in sorted(kinds))
            return f"the ranges are {names}: packed sequences are all full or all causal"
        return None

    def _kinds(self) -> set[int]:
        """Types of the ranges of two queries and more: to a single one every type is full."""
        return set(self.types[self.q_ranges[:, 1] - self.q_ranges[:, 0] > 1].tolist())

    def simple(self) -> SequenceArguments:
        """The plan as packed sequences. Raises RangeError where ``simple_objection`` has one."""
        _require("simple", self.simple_objection())
        bounds_q, bounds_k = _bounds(self.q_ranges, self.total_q), _bounds(self.k_ranges, self.total_k)
        kept = _not_empty(bounds_q)
        kept[0] |= bounds_k[1] > 0  # offsets of keys start at 0
        cu_seqlens_q, cu_seqlens_k = (
            np.append(bounds[:-1][kept], bounds[-1:]).astype(np.int32) for bounds in (bounds_q, bounds_k)
        )
        used = np.diff(bounds_k)
        used[::2] = 0
        seqused_k = used[kept].astype(np.int32)
        return SequenceArguments(
            cu_seqlens_q,
            cu_seqlens_k,
            None if np.array_equal(seqused_k, np.diff(cu_seqlens_k)) else seqused_k,
            causal=self._kinds() == {CAUSAL},
        )

    def packed_objection(self) -> str | None:
        """Why the keys of each query range cannot be gathered in pages, None if they can: all ranges are full, query
        ranges are equal or disjoint, and what each of them sees, its key ranges joined where they meet, begins at
        multiples of a page and fills its pages, but for one interval's last."""
        found = self._in_pages()
        return found if isinstance(found, str) else None

    def packed(self) -> PageArguments:
        """The plan as gather lists of pages. Raises RangeError where ``packed_objection`` has one."""
        found = self._in_pages()
        if isinstance(found, str):
            raise RangeError(_refusal("packed", found))
        return found

    def _in_pages(self) -> PageArguments | str:
        """The gather lists, or why there are none."""
        kinds = self._kinds() - {FULL}
        if kinds:
            return f"ranges that are {' and '.join(TYPE_NAMES[kind] for kind in sorted(kinds))}: all must be full"
        count = (self.q_ranges[:, 0] < self.q_ranges[:, 1]) & (self.k_ranges[:, 0] < self.k_ranges[:, 1])
        if not count.any():
            return "no range has queries and keys"
        groups, group_of, sizes = np.unique(self.q_ranges[count], axis=0, return_inverse=True, return_counts=True)
        early = np.flatnonzero(groups[1:, 0] < groups[:-1, 1])
        if len(early):
            before, this = (_shown(group) for group in groups[early[0] : early[0] + 2])
            return f"query ranges {before} and {this} overlap: they must be equal or disjoint"
        keys = self.k_ranges[count][np.argsort(group_of, kind="stable")]
        intervals = [_union(*of_group.T) for of_group in np.split(keys, sizes.cumsum()[:-1])]
        page_size = self._page_size(intervals)
        if page_size is None:
            return f"key ranges that begin or end within a page of {_PAGE_SIZES[0]} rows, or in one cut short"
        bounds = _bounds(groups, self.total_q)
        lists = [np.zeros(0, np.int32)] * (len(bounds) - 1)
        lists[1::2] = [_pages(*interval, page_size) for interval in intervals]
        used = np.zeros(len(lists), np.int32)
        used[1::2] = [(stop - start).sum() for start, stop in intervals]
        kept = _not_empty(bounds)
        page_table = np.zeros((kept.sum(), _longest(np.array([len(pages) for pages in lists]))), np.int32)
        for row, sequence in zip(page_table, np.flatnonzero(kept), strict=True):
            row[: len(lists[sequence])] = lists[sequence]
        cu_seqlens_q = np.append(bounds[:-1][kept], bounds[-1:]).astype(np.int32)
        return PageArguments(cu_seqlens_q, page_size, page_table, used[kept])

    def _page_size(self, intervals: list[tuple[np.ndarray, np.ndarray]]) -> int | None:
        """The largest page that all intervals begin with and all but one of each group fill; all its rows exist."""
        starts, stops = (np.concatenate(ends) for ends in zip(*intervals, strict=True))
        for size in reversed(_PAGE_SIZES):
            whole = not (starts % size).any() and (-(-stops // size) * size <= self.total_k).all()
            if whole and all((stop % size > 0).sum() <= 1 for _, stop in intervals):
                return size
        return None


def _bounds(ranges: np.ndarray, total: int) -> np.ndarray:
    """(2n + 2): where each of 2n + 1 pieces of ``total`` rows begins, and the end: what lies before the first of n
    ascending ranges, that range, what lies before the second, … and what lies behind the last."""
    return np.concatenate([[0], ranges.ravel(), [total]])


def _not_empty(bounds: np.ndarray) -> np.ndarray:
    """Which pieces are needed: ranges, and what lies between them where it has rows."""
    needed = np.diff(bounds) > 0
    needed[1::2] = True
    return needed


def _pages(start: np.ndarray, stop: np.ndarray, size: int) -> np.ndarray:
    """The pages of these intervals; the one that is not full comes last, whose rows beyond the length do not count."""
    order = np.argsort(stop % size > 0, kind="stable")
    pages = [np.arange(start[i] // size, -(-stop[i] // size), dtype=np.int32) for i in order]
    return np.concatenate([np.zeros(0, np.int32), *pages])


def _integers(name: str, value: Any) -> np.ndarray:
    """An array of what the caller calls ``name``. Raises DTypeError, and ShapeError for rows of different lengths."""
    try:
        array = np.asarray(value)
    except ValueError:
        raise ShapeError(f"{name}={value!r}: all its rows must be of one length") from None
    if array.size == 0:
        return array.astype(np.int64)
    if array.dtype.kind not in "iu":
        raise DTypeError(name, array.dtype, "integers are needed")
    return array


def _ranges(name: str, value: Any, total: int, of: str) -> np.ndarray:
    """int32 (n, 2): half-open ranges of the ``total`` rows of queries or keys."""
    array = _integers(name, value)
    if array.shape == (0,):
        array = array.reshape(0, 2)
    if array.ndim != 2 or array.shape[1] != 2:
        raise ShapeError(f"{name} {array.shape}: (n, 2), a start and an end for each range, is needed")
    for wrong, rule in (
        ((array < 0).any(1) | (array > total).any(1), f"between 0 and the {total} {of}"),
        (array[:, 1] < array[:, 0], "a range ends where it begins or behind"),
    ):
        if wrong.any():
            i = int(wrong.argmax())
            raise RangeError(f"{name}[{i}]={_shown(array[i])}: {rule}")
    return array.astype(np.int32)


def _types(value: Any, count: int, largest: int) -> np.ndarray:
    """int32 (count): types up to ``largest``, of None all full."""
    if value is None:
        return np.zeros(count, np.int32)
    array = _integers("attn_type_map", value)
    if array.shape != (count,):
        raise ShapeError(f"attn_type_map {array.shape}: ({count},) is needed, a type for each of q_ranges")
    wrong = (array < 0) | (array > largest)
    if wrong.any():
        i = int(wrong.argmax())
        known = ", ".join(f"{kind} ({TYPE_NAMES[kind]})" for kind in range(largest + 1))
        raise RangeError(f"attn_type_map[{i}]={array[i]}: one of {known}")
    return array.astype(np.int32)


def _union(start: np.ndarray, stop: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(starts, ends) of the intervals [start, stop) joined where they meet: disjoint, ascending and none empty."""
    start, stop = start[stop > start], stop[stop > start]
    order = np.argsort(start)
    start, reached = start[order], np.maximum.accumulate(stop[order])
    begins = np.append(True, start[1:] > reached[:-1])[: len(start)]
    ends = np.roll(begins, -1)
    return start[begins], reached[ends]


def _longest(lengths: np.ndarray) -> int:
    """At least 1, as callers must give it."""
    return max(1, int(lengths.max(initial=0)))


def _shown(pair: np.ndarray) -> tuple[int, int]:
    return int(pair[0]), int(pair[1])


def _refusal(path: str, objection: str) -> str:
    return f"path={path!r}: {objection}"


def _require(path: str, objection: str | None) -> None:
    if objection is not None:
        raise RangeError(_refusal(path, objection))
