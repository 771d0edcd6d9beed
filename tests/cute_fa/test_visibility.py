"""Intervals of visible keys, against the definition of what a query sees."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from cute_fa.semantics.visibility import Neighbourhood, key_intervals, visible_keys, visible_pairs

LENGTHS = list(itertools.product((0, 1, 3, 7), (0, 1, 5, 9)))
BOUNDS = (None, 0, 2, 4, 30, -1, -3, -30)
WINDOWS = list(itertools.product(BOUNDS, BOUNDS))


def sees(i: int, j: int, seqlen_q: int, seqlen_k: int, left, right, sink_tokens: int) -> bool:
    """Whether query i sees key j, as the design has it."""
    position = i + seqlen_k - seqlen_q
    to_the_right = right is not None and j > position + right
    to_the_left = left is not None and j < position - left and j >= sink_tokens
    return not to_the_right and not to_the_left


def seen(seqlen_q: int, seqlen_k: int, *mask) -> list[list[int]]:
    """The keys of each query."""
    return [[j for j in range(seqlen_k) if sees(i, j, seqlen_q, seqlen_k, *mask)] for i in range(seqlen_q)]


@pytest.mark.parametrize("sink_tokens", [0, 1, 3, 50])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_intervals_pairs_and_keys_by_the_definition(window, sink_tokens):
    for lengths in LENGTHS:
        expected = seen(*lengths, *window, sink_tokens)
        intervals = key_intervals(range(lengths[0]), *lengths, *window, sink_tokens)
        for i, keys in enumerate(expected):
            bounds = [(int(start[i]), int(stop[i])) for start, stop in intervals]
            ends = [0, *itertools.chain.from_iterable(bounds), lengths[1]]
            assert ends == sorted(ends), (lengths, i)
            assert [j for start, stop in bounds for j in range(start, stop)] == keys, (lengths, i)
        assert visible_pairs(*lengths, *window, sink_tokens) == sum(map(len, expected)), lengths
        assert visible_keys(*lengths, *window, sink_tokens) == len(set(itertools.chain(*expected))), lengths


def test_some_of_the_queries():
    mask = (40, 90, 6, 2, 3)
    whole, part = (key_intervals(queries, *mask) for queries in (range(40), range(11, 19)))
    for all_rows, rows in zip(whole, part, strict=True):
        assert np.array_equal(np.stack(all_rows)[:, 11:19], np.stack(rows))


@pytest.mark.parametrize("window", [window for window in WINDOWS if None not in window], ids=str)
def test_seen_from_a_key_the_window_is_mirrored(window):
    left, right = window
    for i, j in itertools.product(range(8), range(12)):
        keys, queries = Neighbourhood(i + 4, left, right), Neighbourhood(j - 4, right, left)
        visible = sees(i, j, 8, 12, left, right, 0)
        assert (keys.first <= j <= keys.last, queries.first <= i <= queries.last) == (visible, visible)
    assert Neighbourhood(3, None, 2)[1:] == (None, 2) and Neighbourhood(3, None, 2).first is None
    assert Neighbourhood(3, 2, None).last is None


@pytest.mark.parametrize(
    ("window", "sink_tokens", "keys"),
    [
        ((None, None), 4, 1000),
        ((50, 0), 4, 56),
        ((50, None), 4, 56),
        ((50, 30), 0, 52),
        ((None, 0), 0, 1000),
        ((-10, 30), 4, 4),
        ((30, -40), 4, 4),
        ((-900, None), 0, 0),
        ((None, -300), 0, 700),
        ((None, -3000), 0, 0),
    ],
)
def test_keys_of_two_queries_at_the_end(window, sink_tokens, keys):
    assert visible_keys(2, 1000, *window, sink_tokens) == keys
