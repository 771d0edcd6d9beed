"""Which keys a query sees: intervals of keys. Masks, the ranges of blocks in kernels and counts on the host follow.

With D = seqlen_k − seqlen_q, query i stands at position i + D among the keys. It sees the keys of its window, and the
sink tokens, the first keys of the sequence, as far as its window's right end.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np


class Neighbourhood(NamedTuple):
    """What lies at most ``before`` in front of a position and ``after`` behind it, None for infinite; of integers, of
    arrays, or of integers in device code.

    The keys in the window of query i are those around i + D, ``left`` in front and ``right`` behind; seen from a key,
    the queries that have key j in theirs are those around j − D, ``right`` in front and ``left`` behind.
    """

    position: Any
    before: Any
    after: Any

    @property
    def first(self) -> Any:
        """None for −∞."""
        return None if self.before is None else self.position - self.before

    @property
    def last(self) -> Any:
        """None for ∞; of device code, computed where it is asked for."""
        return None if self.after is None else self.position + self.after


class Interval(NamedTuple):
    """[start, stop) of keys for each of some queries; int64 arrays with 0 ≤ start ≤ stop."""

    start: np.ndarray
    stop: np.ndarray


def key_intervals(
    queries: range, seqlen_q: int, seqlen_k: int, left: int | None, right: int | None, sink_tokens: int = 0
) -> list[Interval]:
    """What these queries see: intervals of which no two have a key in common, in the order of the keys."""
    position = np.arange(queries.start, queries.stop, dtype=np.int64) + (seqlen_k - seqlen_q)
    window = Neighbourhood(position, left, right)
    first, last = window.first, window.last
    stop = np.full_like(position, seqlen_k) if last is None else (last + 1).clip(0, seqlen_k)
    if first is None:
        return [Interval(np.zeros_like(stop), stop)]
    sink_stop = np.minimum(stop, sink_tokens)
    start = np.minimum(np.maximum(first, sink_stop), stop)
    return [Interval(np.zeros_like(stop), sink_stop), Interval(start, stop)]


def visible_pairs(seqlen_q: int, seqlen_k: int, left: int | None, right: int | None, sink_tokens: int = 0) -> int:
    """Pairs of a query and a key that it sees, in one sequence."""
    intervals = key_intervals(range(seqlen_q), seqlen_q, seqlen_k, left, right, sink_tokens)
    return sum(int((interval.stop - interval.start).sum()) for interval in intervals)


def visible_keys(seqlen_q: int, seqlen_k: int, left: int | None, right: int | None, sink_tokens: int = 0) -> int:
    """Keys of one sequence that at least one query sees."""
    intervals = key_intervals(range(seqlen_q), seqlen_q, seqlen_k, left, right, sink_tokens)
    start, stop = (np.concatenate(bounds) for bounds in zip(*intervals, strict=True))
    order = np.argsort(start)
    reached = np.concatenate(([0], np.maximum.accumulate(stop[order])))
    new = reached[1:] - np.maximum(start[order], reached[:-1])
    return int(new.clip(0).sum())
