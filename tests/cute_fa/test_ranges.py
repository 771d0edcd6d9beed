"""``block_range`` and ``query_range``: every block that a tile has to visit, once, and which of them need a mask."""

import itertools

import pytest
import torch

from tests.testing.range_kernel import block_ranges, other_tile_counts, query_ranges

TILE_M, TILE_N = 8, 16
USUAL = [(None, None), (None, 0), (None, 7), (9, 0), (30, 5), (0, 0), (3, None)]
# bounds that hide the diagonal, that begin or end beyond all keys, and that leave nothing between them
NEGATIVE = [(None, -1), (None, -70), (-1, None), (-70, None), (-1, 3), (-9, 40), (3, -1), (40, -9)]
EMPTY = [(-1, 0), (5, -6), (-20, 10), (-3, -7)]
masks = pytest.mark.parametrize(
    ("window", "sink"),
    [
        (window, sink)
        for window, sink in itertools.product(USUAL + NEGATIVE + EMPTY, (None, 3, 16, 40))
        if sink is None or window[0] is not None
    ],
    ids=str,
)


def visible(left, right, sink, seqlen_q, seqlen_k, queries: range, keys: range) -> torch.Tensor:
    """Which pairs of these queries, those that exist, and keys are visible."""
    query, key = torch.tensor([i for i in queries if i < seqlen_q])[:, None], torch.tensor(keys)
    distance = query + seqlen_k - seqlen_q - key
    seen = (key < seqlen_k).expand_as(distance).clone()
    if left is not None:
        seen &= (distance <= left) | (key < (sink or 0))
    if right is not None:
        seen &= distance >= -right
    return seen


def questions(lengths_q, lengths_k, first) -> list[tuple[int, int, int]]:
    """(seqlen_q, seqlen_k, first query or key of a tile), one tile beyond the sequence among them."""
    return [(q, k, start) for q in lengths_q for k in lengths_k for start in first(q, k)]


@masks
def test_key_blocks_of_a_query_tile(window, sink):
    """From the right to the left, each once and all that are visible, hidden ones only beside the right edge, where the
    sink or the window begins there; without a mask those that the window shows in full; without the right one those
    with no key beyond it."""
    asked = questions((1, 7, 8, 23, 50), (1, 15, 16, 37, 60), lambda q, _: range(0, q + TILE_M, TILE_M))
    for question, blocks in zip(asked, block_ranges((*window, sink), asked, TILE_M, TILE_N), strict=True):
        seqlen_q, seqlen_k, m_start = question
        rows = range(m_start, m_start + TILE_M)
        columns = [range(start, start + TILE_N) for start in range(0, seqlen_k, TILE_N)]
        seen = [visible(*window, sink, seqlen_q, seqlen_k, rows, keys) for keys in columns]
        in_window = [visible(*window, 0, seqlen_q, seqlen_k, rows, keys) for keys in columns]
        from_left = [visible(None, window[1], 0, seqlen_q, seqlen_k, rows, keys) for keys in columns]

        last, right_end, full_end, window_end, total = blocks
        assert 0 <= right_end <= full_end <= total and window_end <= total
        visited = [last - i if i < window_end or sink is None else total - 1 - i for i in range(total)]
        assert visited == sorted(set(visited), reverse=True)
        shown = {j for j, pairs in enumerate(seen) if pairs.any()}
        needless = set(visited) - shown
        assert shown <= set(visited) <= set(range(len(columns)))
        edge = sink is not None or (window[0] or 0) < 0
        assert len(needless) <= ((TILE_M + TILE_N) // TILE_N if edge else 0), question
        full = [j for j, pairs in enumerate(in_window) if pairs.numel() and pairs.all()]
        assert visited[right_end:full_end] == full[::-1], question
        assert all(from_left[j].all() for j in visited[right_end:]), question


@masks
def test_query_blocks_of_a_key_tile(window, sink):
    """From the last visible block to the first, each once; unmasked exactly those with every pair visible, and in one
    row with the other unmasked ones."""
    asked = questions((1, 7, 8, 23, 50), (1, 15, 16, 37, 60), lambda _, k: range(0, k + TILE_N, TILE_N))
    for question, blocks in zip(asked, query_ranges((*window, sink), asked, TILE_M, TILE_N), strict=True):
        seqlen_q, seqlen_k, n_start = question
        last, left_end, full_end, total = blocks
        assert 0 <= left_end <= full_end <= total
        rows = [range(start, start + TILE_M) for start in range(0, seqlen_q, TILE_M)]
        keys = range(n_start, n_start + TILE_N)
        seen = [visible(*window, sink, seqlen_q, seqlen_k, queries, keys) for queries in rows]
        shown = [i for i, pairs in enumerate(seen) if pairs.any()]
        visited = [last - i for i in range(total)]
        assert visited == (list(range(shown[-1], shown[0] - 1, -1)) if shown else []), question
        unmasked = [last - i for i in range(left_end, full_end)]
        assert unmasked == [i for i in reversed(shown) if seen[i].all()], question


@masks
def test_turns_of_the_key_tiles_at_a_query_block(window, sink):
    """The tiles that meet a block are numbered from 0, in their order and from the last one on, none left out."""
    lengths = [(q, k) for q in (1, 8, 23, 50) for k in (1, 16, 37, 100)]
    tiles = [(q, k, start) for q, k in lengths for start in range(0, k, TILE_N)]
    asked, earlier, met = [], [], {}
    for (q, k, start), blocks in zip(tiles, query_ranges((*window, sink), tiles, TILE_M, TILE_N), strict=True):
        for i in range(blocks.total):
            block = blocks.last_block - i
            asked.append((q, k, start // TILE_N, block))
            earlier.append(met.get((q, k, block), 0))
            met[q, k, block] = earlier[-1] + 1
    later = [met[q, k, block] - 1 - before for (q, k, _, block), before in zip(asked, earlier, strict=True)]
    expected = list(zip(earlier, later, strict=True))
    assert not asked or other_tile_counts((*window, sink), asked, TILE_M, TILE_N) == expected
