"""Ready-made plans against the formulas that describe them, and how many ranges they need."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cute_fa.api import ready_plans
from cute_fa.semantics.errors import ArgumentError
from cute_fa.semantics.ranges import HostRanges

sizes = st.integers(0, 9)


def check(found: HostRanges, sees, most_ranges: int) -> None:
    """``sees(i, j)`` of columns of queries and rows of keys, or of an int each; no pair is named twice."""
    queries, keys = np.arange(found.total_q)[:, None], np.arange(found.total_k)[None]
    expected = np.broadcast_to(sees(queries, keys), (found.total_q, found.total_k))
    assert np.array_equal(found.mask(), expected)
    single = (HostRanges([q], [k], [kind], found.total_q, found.total_k) for q, k, kind in ranges_of(found))
    assert sum(one.area() for one in single) == expected.sum()
    assert len(found) <= most_ranges


def ranges_of(plan: HostRanges):
    return zip(plan.q_ranges.tolist(), plan.k_ranges.tolist(), plan.types.tolist(), strict=True)


def documents(lengths) -> np.ndarray:
    """The document of each token."""
    return np.repeat(np.arange(len(lengths)), lengths)


@given(lengths=st.lists(sizes, max_size=5))
@settings(deadline=None)
def test_causal_documents(lengths):
    of = documents(lengths)
    found = ready_plans.causal_documents(lengths)
    check(found, lambda i, j: (of[i] == of[j]) & (j <= i), len(lengths))
    assert found.simple_objection() is None and (found.total_q, found.total_k) == (sum(lengths),) * 2


@given(lengths=st.lists(st.tuples(sizes, sizes), max_size=5))
@settings(deadline=None)
def test_block_diagonal(lengths):
    lengths_q, lengths_k = [q for q, _ in lengths], [k for _, k in lengths]
    of_q, of_k = documents(lengths_q), documents(lengths_k)
    check(ready_plans.block_diagonal(lengths_q, lengths_k), lambda i, j: of_q[i] == of_k[j], len(lengths))
    check(ready_plans.block_diagonal(lengths_q), lambda i, j: of_q[i] == of_q[j], len(lengths))


@given(seqlen_q=sizes, more_keys=sizes, chunk=st.integers(1, 7))
@settings(deadline=None)
def test_chunked_local(seqlen_q, more_keys, chunk):
    check(
        ready_plans.chunked_local(seqlen_q, seqlen_q + more_keys, chunk),
        lambda i, j: (j <= i + more_keys) & (j // chunk == (i + more_keys) // chunk),
        -(-seqlen_q // chunk) + 1,
    )


@given(seqlen=st.integers(0, 16), window=sizes, tokens=st.integers(0, 16))
@settings(deadline=None, max_examples=300)
def test_window_and_global(seqlen, window, tokens):
    tokens = min(tokens, seqlen)
    check(
        ready_plans.window_and_global(seqlen, window, tokens),
        lambda i, j: (abs(i - j) <= window) | (i < tokens) | (j < tokens),
        5,
    )


@given(seqlen_q=st.integers(0, 16), more_keys=sizes, sinks=st.integers(0, 16), window=st.integers(1, 12))
@settings(deadline=None, max_examples=300)
def test_streaming_llm(seqlen_q, more_keys, sinks, window):
    seqlen_k = seqlen_q + more_keys
    sinks = min(sinks, seqlen_k)
    check(
        ready_plans.streaming_llm(seqlen_q, seqlen_k, sinks, window),
        lambda i, j: (j <= i + more_keys) & ((j < sinks) | (j > i + more_keys - window)),
        5,
    )


@given(seqlen=st.integers(0, 12), prefix=st.integers(0, 12))
@settings(deadline=None)
def test_prefix_lm(seqlen, prefix):
    prefix = min(prefix, seqlen)
    check(ready_plans.prefix_lm(seqlen, prefix), lambda i, j: (j < prefix) | (j <= i), 2)


def continues(parents: list[int], later: int, earlier: int) -> bool:
    """Whether one is the other or continues it, directly or not."""
    while later > earlier:
        later = parents[later]
    return later == earlier


@st.composite
def drawn_parents(draw, most: int):
    count = draw(st.integers(0, most))
    return [draw(st.integers(-1, s - 1)) for s in range(count)]


@given(parents=drawn_parents(6), data=st.data())
@settings(deadline=None, max_examples=200)
def test_shared_prefix_tree(parents, data):
    lengths = data.draw(st.lists(st.integers(1, 4), min_size=len(parents), max_size=len(parents)))
    of = documents(lengths)
    sees = np.vectorize(lambda i, j: j <= i and continues(parents, of[i], of[j]), otypes=[bool])
    check(ready_plans.shared_prefix_tree(lengths, parents), sees, len(parents) * (len(parents) + 1) // 2)


def test_adjacent_segments_of_a_tree_are_one_range():
    """A prompt, its first answer with two continuations, and its second answer."""
    found = ready_plans.shared_prefix_tree([100, 5, 3, 4, 7], [-1, 0, 1, 1, 0])
    assert list(ranges_of(found)) == [
        ([0, 100], [0, 100], 1),
        ([100, 105], [0, 105], 1),
        ([105, 108], [0, 108], 1),
        ([108, 112], [108, 112], 1),
        ([108, 112], [0, 105], 0),
        ([112, 119], [112, 119], 1),
        ([112, 119], [0, 100], 0),
    ]


@given(parents=drawn_parents(8), before=st.integers(0, 3), cached=sizes)
@settings(deadline=None, max_examples=200)
def test_speculative_tree(parents, before, cached):
    seqlen_q = before + len(parents)
    seqlen_k, context = cached + seqlen_q, cached + before

    def sees(i: int, j: int) -> bool:
        draft_q, draft_k = i - before, j - context
        if draft_q < 0 or draft_k < 0:
            return j <= i + cached
        return continues(parents, draft_q, draft_k)

    found = ready_plans.speculative_tree(seqlen_q, seqlen_k, parents)
    check(found, np.vectorize(sees, otypes=[bool]), 2 + len(parents) * (len(parents) + 1) // 2)


def test_chains_of_drafts_are_one_range():
    """A chain of four drafts, and one that leaves it behind the second."""
    found = ready_plans.speculative_tree(5, 105, [-1, 0, 1, 2, 1])
    assert list(ranges_of(found)) == [
        ([0, 5], [0, 100], 0),
        ([0, 4], [100, 104], 1),
        ([4, 5], [104, 105], 1),
        ([4, 5], [100, 102], 0),
    ]


@given(steps=st.lists(st.tuples(sizes, st.integers(0, 4)), max_size=3), window=st.integers(1, 5), causal=st.booleans())
@settings(deadline=None)
def test_hybrid_mtp_decode(steps, window, causal):
    past, new = [p for p, _ in steps], [n for _, n in steps]
    lengths_q, lengths_k = [n + window for n in new], [p + n + window for p, n in steps]
    of_q, of_k = documents(lengths_q), documents(lengths_k)
    position = np.concatenate([[0], *(p + np.arange(n + window) for p, n in steps)])[1:]
    key = np.concatenate([[0], *map(np.arange, lengths_k)])[1:]
    begins = np.array([p + n for p, n in steps], int)

    def sees(i, j):
        p, k, begin = position[i], key[j], begins[of_q[i]]
        in_window = (k != begin - 1) & ((k < begin) | (not causal) | (k <= p))
        return (of_q[i] == of_k[j]) & np.where(p < begin, k <= p, in_window)

    check(ready_plans.hybrid_mtp_decode(past, new, window, causal_window=causal), sees, 3 * len(steps))


def test_a_step_of_windows_alone_is_full():
    """Without new tokens: two segments for each window, and between them the hidden key."""
    found = ready_plans.hybrid_mtp_decode([65, 129], [0, 0], 7)
    assert found.q_ranges.tolist() == [[0, 7], [0, 7], [7, 14], [7, 14]] and found.types.tolist() == [0] * 4
    assert found.k_ranges.tolist() == [[0, 64], [65, 72], [72, 200], [201, 208]]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ready_plans.causal_documents([3, -1]), r"lengths\[1\]=-1: at least 0"),
        (lambda: ready_plans.block_diagonal([3, 1], [3]), "2 blocks of queries and 1 of keys"),
        (lambda: ready_plans.chunked_local(5, 4, 2), "seqlen_k=4: at least seqlen_q=5"),
        (lambda: ready_plans.chunked_local(4, 5, 0), "chunk=0: at least 1"),
        (lambda: ready_plans.window_and_global(9, -1, 2), "window=-1: at least 0"),
        (lambda: ready_plans.window_and_global(9, 1, 10), "global_tokens=10: between 0 and the sequence's 9"),
        (lambda: ready_plans.streaming_llm(9, 9, 4, 0), "window=0: at least 1"),
        (lambda: ready_plans.streaming_llm(-9, 9, 4, 1), "seqlen_q=-9: at least 0"),
        (lambda: ready_plans.prefix_lm(9, 10), "prefix=10: between 0 and the sequence's 9"),
        (lambda: ready_plans.shared_prefix_tree([3, 4], [-1]), "parents is of 1 segments: 2 are given"),
        (lambda: ready_plans.shared_prefix_tree([3, 0], [-1, 0]), r"lengths\[1\]=0: at least 1"),
        (lambda: ready_plans.speculative_tree(3, 9, [-1, 1]), r"parents\[1\]=1: one that comes before it"),
        (lambda: ready_plans.speculative_tree(1, 9, [-1, 0]), r"len\(parents\)=2: between 0 and the sequence's 1"),
        (lambda: ready_plans.hybrid_mtp_decode([3], [1, 2], 4), "new is of 2 sequences and past of 1"),
        (lambda: ready_plans.hybrid_mtp_decode([3], [1], 0), "window=0: at least 1"),
        (lambda: ready_plans.hybrid_mtp_decode([-3], [1], 2), r"past\[0\]=-3: at least 0"),
    ],
)
def test_sizes_that_make_no_sense(make, message):
    with pytest.raises(ArgumentError, match=message):
        make()
