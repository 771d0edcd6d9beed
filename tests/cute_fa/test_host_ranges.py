"""Plans of ranges on the host, against the definition of their types, and the arguments of paths against the plan."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cute_fa.semantics.errors import ArgumentError, DTypeError, RangeError, ShapeError
from cute_fa.semantics.ranges import HostRanges

TOTALS = {"total_q": 40, "total_k": 48}


def plan(*ranges, total_q: int = 40, total_k: int = 48) -> HostRanges:
    """Of (q_start, q_stop, k_start, k_stop, type)."""
    rows = np.array(ranges, np.int64).reshape(-1, 5)
    return HostRanges(rows[:, :2], rows[:, 2:4], rows[:, 4], total_q, total_k)


def sees(i: int, j: int, q_start: int, q_stop: int, k_start: int, k_stop: int, kind: int) -> bool:
    """Whether one range names a pair, as the design has it."""
    inside = q_start <= i < q_stop and k_start <= j < k_stop
    not_behind = kind in (0, 2) or j - i <= k_stop - q_stop
    not_before = kind in (0, 1) or j - i >= k_start - q_start
    return inside and not_behind and not_before


def mask_of(ranges, total_q: int, total_k: int) -> np.ndarray:
    return np.array(
        [[any(sees(i, j, *one) for one in ranges) for j in range(total_k)] for i in range(total_q)], bool
    ).reshape(total_q, total_k)


@st.composite
def drawn_ranges(draw, total_q: int, total_k: int, last_kind: int = 3):
    queries, keys = (st.lists(st.integers(0, total), min_size=2, max_size=2) for total in (total_q, total_k))
    return draw(
        st.lists(
            st.tuples(queries, keys, st.integers(0, last_kind)).map(lambda r: (*sorted(r[0]), *sorted(r[1]), r[2])),
            max_size=7,
        )
    )


@given(ranges=drawn_ranges(11, 14))
@settings(deadline=None)
def test_mask_and_area_by_the_definition(ranges):
    found = plan(*ranges, total_q=11, total_k=14)
    expected = mask_of(ranges, 11, 14)
    assert np.array_equal(found.mask(), expected)
    assert found.area() == expected.sum()


def test_area_where_a_mask_would_not_fit():
    """A million tokens: a triangle, a band of 1000 keys and, twice, 10 keys, some of which the triangle has too."""
    n = 1_000_000
    found = plan(
        (0, n // 2, 0, n // 2, 1),
        (n // 2, n, n // 2 - 999, n, 3),
        (n // 2 - 5, n // 2 + 5, 0, 10, 0),
        (n // 2 - 5, n // 2 + 5, 0, 10, 0),
        total_q=n,
        total_k=n,
    )
    half = n // 2
    assert found.area() == half * (half + 1) // 2 + half * 1000 + 5 * 10


WRONG = {
    "reversed": (dict(q_ranges=[[0, 4], [9, 4]]), RangeError, r"q_ranges\[1\]=\(9, 4\): a range ends"),
    "beyond the queries": (dict(q_ranges=[[0, 4], [4, 41]]), RangeError, r"q_ranges\[1\]=\(4, 41\).*the 40 queries"),
    "beyond the keys": (dict(k_ranges=[[0, 49], [4, 6]]), RangeError, r"k_ranges\[0\]=\(0, 49\).*the 48 keys"),
    "negative": (dict(k_ranges=[[0, 4], [-1, 6]]), RangeError, r"k_ranges\[1\]=\(-1, 6\)"),
    "unknown type": (dict(types=[1, 4]), RangeError, r"attn_type_map\[1\]=4: one of 0 \(full\).*3 \(both\)"),
    "fewer key ranges": (dict(k_ranges=[[0, 4]]), ShapeError, "k_ranges has 1 ranges, q_ranges 2"),
    "fewer types": (dict(types=[0]), ShapeError, r"attn_type_map \(1,\): \(2,\)"),
    "no pairs": (dict(q_ranges=[0, 4]), ShapeError, r"q_ranges \(2,\): \(n, 2\)"),
    "fractions": (dict(q_ranges=[[0.0, 4.0]] * 2), DTypeError, "q_ranges is float64"),
    "a bool": (dict(types=[True, False]), DTypeError, "attn_type_map is bool"),
    "a negative total": (dict(total_k=-1), ArgumentError, "total_k=-1"),
    "2^31 queries": (dict(total_q=2**31), ArgumentError, "total_q=2147483648"),
}


@pytest.mark.parametrize(("wrong", "error", "message"), WRONG.values(), ids=WRONG)
def test_what_is_no_plan(wrong, error, message):
    right = dict(q_ranges=[[0, 4], [4, 9]], k_ranges=[[0, 4], [2, 6]], types=[0, 1], **TOTALS)
    assert len(HostRanges(**right)) == 2
    with pytest.raises(error, match=message) as raised:
        HostRanges(**right | wrong)
    assert type(raised.value) is error


def test_nothing_is_a_plan():
    empty = HostRanges([], [], None, 3, 4)
    assert (empty.q_ranges.shape, empty.types.dtype, empty.area()) == ((0, 2), np.int32, 0)
    assert np.array_equal(empty.mask(), np.zeros((3, 4), bool))


def test_types_are_full_by_default():
    assert HostRanges([[0, 2]], [[1, 4]], None, 3, 4).mask().tolist() == [[False, True, True, True]] * 2 + [[False] * 4]


SEGMENTS = dict(
    q_ranges=[[0, 4], [4, 9], [9, 12]],
    k_ranges=[[0, 4], [8, 16], [20, 30]],
    attn_type_map=[1, 0, 0],
    segment_offsets=[0, 1, 1, 3],
)


def test_segments_belong_to_the_range_of_their_offsets():
    found = HostRanges.from_segment_offsets(**SEGMENTS, **TOTALS)
    assert found.q_ranges.tolist() == [[0, 4], [9, 12], [9, 12]]
    assert (found.k_ranges.tolist(), found.types.tolist()) == (SEGMENTS["k_ranges"], [1, 0, 0])


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (dict(segment_offsets=[0, 1, 3]), ShapeError, r"segment_offsets \(3,\): \(4,\) is needed for 3"),
        (dict(segment_offsets=[1, 1, 1, 3]), RangeError, r"segment_offsets\[0\]=1: 0 is needed"),
        (dict(segment_offsets=[0, 1, 1, 2]), RangeError, r"segment_offsets\[3\]=2: 3 is needed for 3 k_ranges"),
        (dict(segment_offsets=[0, 2, 1, 3]), RangeError, "segment_offsets goes from 2 to 1 at 2"),
        (dict(attn_type_map=[1, 2, 0]), RangeError, r"attn_type_map\[1\]=2: one of 0 \(full\), 1 \(causal\)$"),
        (dict(q_ranges=[[0, 4], [4, 9], [9, 8]]), RangeError, r"q_ranges\[2\]=\(9, 8\)"),
    ],
)
def test_offsets_that_fit_no_segments(wrong, error, message):
    with pytest.raises(error, match=message):
        HostRanges.from_segment_offsets(**SEGMENTS | wrong, **TOTALS)


def test_sequences_one_behind_the_other():
    first, second = plan((0, 3, 1, 4, 1), total_q=4, total_k=5), plan((1, 2, 0, 6, 0), total_q=3, total_k=6)
    both = HostRanges.concatenate([first, second])
    assert (both.total_q, both.total_k) == (7, 11)
    expected = np.zeros((7, 11), bool)
    expected[:4, :5], expected[4:, 5:] = first.mask(), second.mask()
    assert np.array_equal(both.mask(), expected) and both.area() == 6 + 6
    assert len(HostRanges.concatenate([])) == 0


def mask_of_sequences(found: HostRanges) -> np.ndarray:
    """What varlen attention shows of the arguments that the plan gives it."""
    args = found.simple()
    visible = np.zeros((found.total_q, found.total_k), bool)
    assert args.cu_seqlens_q[[0, -1]].tolist() == [0, found.total_q]
    assert args.cu_seqlens_k[[0, -1]].tolist() == [0, found.total_k]
    held_q, held_k = np.diff(args.cu_seqlens_q), np.diff(args.cu_seqlens_k)
    used = held_k if args.seqused_k is None else args.seqused_k
    assert (used <= held_k).all() and (held_q >= 0).all()
    assert args.max_seqlen_q == max([1, *held_q]) and args.max_seqlen_k == max([1, *used])
    for q, k, rows, keys in zip(args.cu_seqlens_q, args.cu_seqlens_k, held_q, used, strict=False):
        distance = np.arange(keys) - np.arange(rows)[:, None]
        visible[q : q + rows, k : k + keys] = distance <= (keys - rows if args.causal else keys)
    return visible


SIMPLE = {
    "back to back": plan((0, 10, 0, 20, 1), (10, 40, 20, 48, 1)),
    "gaps everywhere": plan((3, 10, 5, 20, 1), (12, 30, 22, 40, 1)),
    "a gap in the queries alone": plan((0, 10, 0, 20, 0), (12, 40, 20, 48, 0)),
    "a gap before the keys alone": plan((0, 10, 5, 20, 0), (10, 40, 20, 48, 0)),
    "a gap behind the keys alone": plan((0, 40, 0, 20, 0)),
    "a single query fits any type": plan((0, 10, 0, 20, 1), (10, 11, 20, 30, 0), (11, 12, 30, 31, 3)),
    "without keys": plan((0, 10, 0, 0, 1), (10, 40, 0, 48, 1)),
    "without queries": plan((5, 5, 0, 10, 1), (5, 40, 20, 48, 1)),
    "more queries than keys": plan((0, 30, 0, 12, 1)),
    "nothing": plan(),
}


@pytest.mark.parametrize("found", SIMPLE.values(), ids=SIMPLE)
def test_packed_sequences(found):
    assert found.simple_objection() is None
    assert np.array_equal(mask_of_sequences(found), found.mask())


def test_sequences_without_gaps_need_no_lengths():
    args = SIMPLE["back to back"].simple()
    assert (args.cu_seqlens_q.tolist(), args.cu_seqlens_k.tolist()) == ([0, 10, 40], [0, 20, 48])
    assert args.seqused_k is None and args.causal
    assert SIMPLE["a gap in the queries alone"].simple().cu_seqlens_k.tolist() == [0, 20, 20, 48]
    assert SIMPLE["a gap before the keys alone"].simple().seqused_k.tolist() == [0, 15, 28]
    assert {array.dtype for array in (args.cu_seqlens_q, args.cu_seqlens_k)} == {np.dtype(np.int32)}


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (plan((0, 10, 0, 20, 1), (9, 40, 20, 48, 1)), r"q_ranges\[1\]=\(9, 40\) begins before q_ranges\[0\]=\(0, 10\)"),
        (plan((0, 10, 0, 20, 1), (10, 40, 19, 48, 1)), r"k_ranges\[1\]=\(19, 48\) begins before"),
        (plan((10, 20, 0, 20, 0), (0, 10, 20, 48, 0)), r"q_ranges\[1\]=\(0, 10\) begins before"),
        (plan((0, 10, 0, 20, 0), (10, 40, 20, 48, 1)), "the ranges are full, causal"),
        (plan((0, 10, 0, 20, 2)), "the ranges are inverse causal"),
    ],
)
def test_what_is_no_packed_sequences(found, message):
    assert found.simple_objection() is not None
    with pytest.raises(RangeError, match="path='simple': .*" + message):
        found.simple()


def mask_of_pages(found: HostRanges) -> np.ndarray:
    """What paged attention shows of the arguments that the plan gives it."""
    args = found.packed()
    visible = np.zeros((found.total_q, found.total_k), bool)
    assert args.cu_seqlens_q[[0, -1]].tolist() == [0, found.total_q]
    assert args.page_table.min() >= 0 and args.page_table.max() < found.total_k // args.page_size
    assert args.max_seqlen_q == np.diff(args.cu_seqlens_q).max() and args.max_seqlen_k == max(1, *args.seqused_k)
    for b, (start, stop) in enumerate(zip(args.cu_seqlens_q[:-1], args.cu_seqlens_q[1:], strict=True)):
        rows = (args.page_table[b][:, None] * args.page_size + np.arange(args.page_size)).ravel()
        assert args.seqused_k[b] <= len(rows)
        keys = rows[: args.seqused_k[b]]
        assert len(set(keys.tolist())) == len(keys)
        visible[start:stop, keys] = True
    return visible


PACKED = {
    # plan, page size
    "two segments": (plan((0, 4, 0, 16, 0), (0, 4, 32, 48, 0)), 16),
    "one begins at a smaller page": (plan((0, 4, 0, 16, 0), (0, 4, 24, 48, 0)), 8),
    "the last is not full": (plan((4, 9, 32, 43, 0), (4, 9, 0, 16, 0), (20, 21, 16, 19, 1)), 16),
    "the first is not full": (plan((0, 40, 0, 5, 0), (0, 40, 16, 48, 0)), 16),
    "parts of a page that meet": (plan((0, 4, 0, 5, 0), (0, 4, 32, 48, 0), (0, 4, 5, 16, 0), (0, 4, 8, 24, 0)), 16),
    "the last page of the keys is cut short": (plan((0, 4, 0, 16, 0), (0, 4, 32, 42, 0), total_k=47), None),
    "a smaller page is whole": (plan((0, 4, 0, 16, 0), (0, 4, 32, 39, 0), total_k=47), 8),
    "queries in no order": (plan((20, 30, 0, 16, 0), (0, 4, 16, 32, 0), (20, 30, 32, 48, 0)), 16),
    "keys that two share": (plan((0, 4, 0, 32, 0), (4, 8, 0, 32, 0)), 32),
    "without keys": (plan((0, 4, 7, 7, 0), (5, 8, 0, 40, 0)), 16),
    "without queries": (plan((6, 6, 1, 7, 0), (5, 8, 0, 40, 0)), 16),
    "two are not full": (plan((0, 4, 0, 5, 0), (0, 4, 16, 21, 0)), None),
    "begins within a page": (plan((0, 4, 4, 16, 0)), None),
    "queries overlap": (plan((0, 4, 0, 16, 0), (3, 8, 0, 16, 0)), None),
    "causal": (plan((0, 4, 0, 16, 1)), None),
    "nothing": (plan(), None),
}


@pytest.mark.parametrize(("found", "page_size"), PACKED.values(), ids=PACKED)
def test_pages(found, page_size):
    assert (found.packed_objection() is None) == (page_size is not None)
    if page_size is None:
        with pytest.raises(RangeError, match="path='packed': "):
            found.packed()
        return
    assert found.packed().page_size == page_size
    assert np.array_equal(mask_of_pages(found), found.mask())


def test_pages_have_at_most_256_rows():
    assert plan((0, 4, 0, 1024, 0), total_k=1024).packed().page_size == 256


@given(ranges=drawn_ranges(6, 6, last_kind=1), in_order=st.booleans())
@settings(deadline=None, max_examples=300)
def test_a_path_without_objection_shows_what_the_plan_does(ranges, in_order):
    """Of ranges that begin and end at multiples of 4."""
    wide = [tuple(4 * bound for bound in one[:4]) + one[4:] for one in (sorted(ranges) if in_order else ranges)]
    found = plan(*wide, total_q=24, total_k=24)
    if found.simple_objection() is None:
        assert np.array_equal(mask_of_sequences(found), found.mask())
    if found.packed_objection() is None:
        assert np.array_equal(mask_of_pages(found), found.mask())
