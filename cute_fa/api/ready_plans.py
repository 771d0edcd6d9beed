"""Plans of ranges for common masks: ``HostRanges`` for ``cute_fa.RangePlan`` and ``cute_fa.range_attention``.

Each describes one sequence, but where its arguments are lists of sequences; ``HostRanges.concatenate`` packs plans of
several one behind the other. Queries are the last of a sequence: with D = seqlen_k − seqlen_q, query i stands at
position p = i + D among the keys. The number of ranges does not grow with the tokens, but with documents, chunks and
branches.

All raise ArgumentError for sizes that make no sense, and RangeError for what then leaves the sequence.
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from cute_fa.semantics.errors import ArgumentError
from cute_fa.semantics.ranges import BOTH, CAUSAL, FULL, INVERSE_CAUSAL, HostRanges

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence


class Range(NamedTuple):
    """Queries [q_start, q_stop), keys [k_start, k_stop) and the type."""

    q_start: int
    q_stop: int
    k_start: int
    k_stop: int
    kind: int


def causal_documents(lengths: Sequence[int]) -> HostRanges:
    """Documents packed one behind the other, each causal: query i sees key j of its own document where j ≤ i. One range
    each; these are packed sequences, the *simple* path."""
    return _diagonal(lengths, lengths, CAUSAL)


def block_diagonal(lengths_q: Sequence[int], lengths_k: Sequence[int] | None = None) -> HostRanges:
    """Block b of queries sees block b of keys, all of it: images or documents without a direction, or queries that
    attend to what belongs to each. ``lengths_k``: of the blocks of keys, by default those of the queries."""
    return _diagonal(lengths_q, lengths_q if lengths_k is None else lengths_k, FULL)


def chunked_local(seqlen_q: int, seqlen_k: int, chunk: int) -> HostRanges:
    """Causal attention within chunks, as in Llama 4: the query at position p sees key j where j ≤ p and
    ⌊j / chunk⌋ = ⌊p / chunk⌋. One range for each chunk that has queries."""
    ahead = _queries_ahead(seqlen_q, seqlen_k)
    _at_least("chunk", chunk, 1)
    starts = range(0, seqlen_k, chunk)
    spans = [(start, min(start + chunk, seqlen_k)) for start in starts]
    ranges = [Range(max(start - ahead, 0), stop - ahead, start, stop, CAUSAL) for start, stop in spans]
    return _plan(ranges, seqlen_q, seqlen_k)


def window_and_global(seqlen: int, window: int, global_tokens: int) -> HostRanges:
    """Longformer's: query i sees key j where |i − j| ≤ window or i < global_tokens or j < global_tokens. At most five
    ranges."""
    _at_least("window", window, 0)
    _within("global_tokens", global_tokens, seqlen)
    rest = (global_tokens, seqlen)
    queries, keys = Range(0, global_tokens, 0, seqlen, FULL), Range(*rest, 0, global_tokens, FULL)
    return _plan([queries, keys, *_band(rest, rest, -window, window)], seqlen, seqlen)


def streaming_llm(seqlen_q: int, seqlen_k: int, sink_tokens: int, window: int) -> HostRanges:
    """StreamingLLM's: the query at position p sees key j where j ≤ p and (j < sink_tokens or j > p − window). At most
    five ranges; ``sink_tokens=0`` is a causal sliding window of ``window`` keys, the query's own among them."""
    ahead = _queries_ahead(seqlen_q, seqlen_k)
    _at_least("window", window, 1)
    _within("sink_tokens", sink_tokens, seqlen_k)
    queries = (0, seqlen_q)
    sinks = _band(queries, (0, sink_tokens), None, ahead)
    return _plan([*sinks, *_band(queries, (sink_tokens, seqlen_k), ahead - window + 1, ahead)], seqlen_q, seqlen_k)


def prefix_lm(seqlen: int, prefix: int) -> HostRanges:
    """A prompt that sees all of itself and a causal answer: query i sees key j where j < prefix or j ≤ i. Two
    ranges."""
    _within("prefix", prefix, seqlen)
    return _plan([Range(0, prefix, 0, prefix, FULL), Range(prefix, seqlen, 0, seqlen, CAUSAL)], seqlen, seqlen)


def shared_prefix_tree(lengths: Sequence[int], parents: Sequence[int]) -> HostRanges:
    """Continuations of shared prefixes: segment s, of ``lengths[s]`` tokens, continues segment ``parents[s]`` < s, or
    none where that is −1. Query i sees key j where j is in a segment that i's continues, directly or not, or in i's own
    and j ≤ i. A range for each segment and each run of adjacent ones among those that it continues.

    One prompt with two answers of 5 and 7 tokens: ``shared_prefix_tree([100, 5, 7], [-1, 0, 0])``.
    """
    ends = [0, *accumulate(lengths)]
    _check_parents(parents, len(lengths))
    for s, length in enumerate(lengths):
        _at_least(f"lengths[{s}]", length, 1)
    segments = [
        Segment(*span, -1 if parent < 0 else ends[parent + 1] - 1)
        for span, parent in zip(pairwise(ends), parents, strict=True)
    ]
    return _plan(_tree(segments), ends[-1], ends[-1])


def speculative_tree(seqlen_q: int, seqlen_k: int, parents: Sequence[int]) -> HostRanges:
    """A tree of drafted tokens behind a context, to be verified at once. The drafts are the last queries and keys:
    draft t continues draft ``parents[t]`` < t, or the context where that is −1. It sees the context, itself and the
    drafts that it continues, directly or not; the query at position p before the drafts sees keys j ≤ p. One range for
    the context, and for each chain of drafts one for itself and each run of drafts that it continues."""
    cached = _queries_ahead(seqlen_q, seqlen_k)
    drafts = len(parents)
    _within("len(parents)", drafts, seqlen_q)
    _check_parents(parents, drafts)
    before = seqlen_q - drafts
    context = cached + before
    # chains: drafts each of which continues the one before it
    firsts = [t for t, parent in enumerate(parents) if t == 0 or parent != t - 1]
    chains = [Segment(*span, parents[span[0]]) for span in pairwise([*firsts, drafts])]
    to_context = [Range(0, before, 0, context, CAUSAL), Range(before, seqlen_q, 0, context, FULL)]
    return _plan([*to_context, *_tree(chains, before, context)], seqlen_q, seqlen_k)


def hybrid_mtp_decode(
    past: Sequence[int], new: Sequence[int], window: int, *, causal_window: bool = False
) -> HostRanges:
    """A step of LA Flash's decoder, which predicts ``window`` tokens at once. Sequence b has ``past[b]`` keys in the
    cache; its queries, the last of its keys too, are ``new[b]`` tokens and the window. With w = past[b] + new[b], where
    the window begins, the query at position p sees key j where

    - p < w: j ≤ p;
    - p ≥ w: j < w − 1, or j ≥ w and, with ``causal_window``, j ≤ p: all but the key right before the window.

    Three ranges a sequence: the causal part, and two segments of keys that all queries of the window share.
    """
    _at_least("window", window, 1)
    if len(past) != len(new):
        raise ArgumentError(f"new is of {len(new)} sequences and past of {len(past)}: they must be of as many")
    plans = []
    for b, (cached, tokens) in enumerate(zip(past, new, strict=True)):
        _at_least(f"past[{b}]", cached, 0)
        _at_least(f"new[{b}]", tokens, 0)
        begin = cached + tokens
        seqlen_q, seqlen_k = tokens + window, begin + window
        ranges = [
            Range(0, tokens, 0, begin, CAUSAL),
            Range(tokens, seqlen_q, 0, max(begin - 1, 0), FULL),
            Range(tokens, seqlen_q, begin, seqlen_k, CAUSAL if causal_window else FULL),
        ]
        plans.append(_plan(ranges, seqlen_q, seqlen_k))
    return HostRanges.concatenate(plans)


class Segment(NamedTuple):
    """Tokens [start, stop) that continue what ends with token ``parent``, −1 for nothing."""

    start: int
    stop: int
    parent: int


def _tree(segments: Sequence[Segment], queries_before: int = 0, keys_before: int = 0) -> Iterator[Range]:
    """Each segment is causal and sees what it continues; keys that are adjacent are one range. So many queries and keys
    lie before the first segment."""
    starts = [segment.start for segment in segments]
    for segment in segments:
        queries = segment.start + queries_before, segment.stop + queries_before
        start, stop, parent = segment
        kind = CAUSAL  # of the run of keys that ends with the segment itself
        while parent >= 0:
            if parent + 1 < start:
                yield Range(*queries, start + keys_before, stop + keys_before, kind)
                stop, kind = parent + 1, FULL
            start, _, parent = segments[bisect_right(starts, parent) - 1]
        yield Range(*queries, start + keys_before, stop + keys_before, kind)


def _band(queries: tuple[int, int], keys: tuple[int, int], lower: int | None, upper: int | None) -> Iterator[Range]:
    """Pairs with lower ≤ j − i ≤ upper, None for no bound, as at most three ranges: queries whose first key is the
    first of ``keys``, those that have both bounds (or neither), and those whose last key is the last of ``keys``."""
    (q_start, q_stop), (k_start, k_stop) = queries, keys
    # queries before ``free`` begin with the first key, those from ``last`` on end with the last
    free = q_stop if lower is None else min(max(k_start - lower, q_start), q_stop)
    last = q_start if upper is None else min(max(k_stop - upper, q_start), q_stop)
    middle = min(free, last), max(free, last)
    if upper is not None:
        yield Range(q_start, middle[0], k_start, middle[0] + upper, CAUSAL)
    if lower is not None and upper is not None and free < last:
        yield Range(*middle, free + lower, last + upper, BOTH)
    else:
        yield Range(*middle, k_start, k_stop, FULL)
    if lower is not None:
        yield Range(middle[1], q_stop, middle[1] + lower, k_stop, INVERSE_CAUSAL)


def _diagonal(lengths_q: Sequence[int], lengths_k: Sequence[int], kind: int) -> HostRanges:
    """Blocks of queries and keys along the diagonal."""
    if len(lengths_q) != len(lengths_k):
        raise ArgumentError(f"{len(lengths_q)} blocks of queries and {len(lengths_k)} of keys: they must be as many")
    for lengths in (lengths_q, lengths_k):
        for b, length in enumerate(lengths):
            _at_least(f"lengths[{b}]", length, 0)
    ends_q, ends_k = ([0, *accumulate(lengths)] for lengths in (lengths_q, lengths_k))
    ranges = (Range(*q, *k, kind) for q, k in zip(pairwise(ends_q), pairwise(ends_k), strict=True))
    return _plan(ranges, ends_q[-1], ends_k[-1])


def _plan(ranges: Iterable[Range], total_q: int, total_k: int) -> HostRanges:
    """Without the ranges that name no pair."""
    kept = [one for one in ranges if one.q_start < one.q_stop and one.k_start < one.k_stop]
    rows = np.array(kept, np.int64).reshape(-1, len(Range._fields))
    return HostRanges(rows[:, :2], rows[:, 2:4], rows[:, 4], total_q, total_k)


def _queries_ahead(seqlen_q: int, seqlen_k: int) -> int:
    """D, how many keys lie before the first query's own."""
    _at_least("seqlen_q", seqlen_q, 0)
    if seqlen_k < seqlen_q:
        raise ArgumentError(f"seqlen_k={seqlen_k}: at least seqlen_q={seqlen_q}, every query has a key of its own")
    return seqlen_k - seqlen_q


def _check_parents(parents: Sequence[int], count: int) -> None:
    if len(parents) != count:
        raise ArgumentError(f"parents is of {len(parents)} segments: {count} are given")
    for s, parent in enumerate(parents):
        if not -1 <= parent < s:
            raise ArgumentError(f"parents[{s}]={parent}: one that comes before it, or -1 for none")


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ArgumentError(f"{name}={value}: at least {least}")


def _within(name: str, value: int, most: int) -> None:
    if not 0 <= value <= most:
        raise ArgumentError(f"{name}={value}: between 0 and the sequence's {most} tokens")
