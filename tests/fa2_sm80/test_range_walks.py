"""Walks of range plans, made on the simulated device, read on the host and held against a dense mask."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

import cute_fa
from cute_fa.api import range_plan
from cute_fa.engine.range_plans import WalkShape, WalkSizes
from tests.testing.range_walks import BOTH, CAUSAL, FULL, INVERSE, Ranges, Walk, assert_walk, expected_lists

# rows × columns of the kernels' tiles: two mask words a row, or one, or four of which the last is empty
QUERY_TILES = [(128, 64), (128, 48), (128, 32), (64, 32), (128, 80)]
KEY_TILES = [(128, 32), (256, 128), (192, 128), (64, 32)]
TILES = [("queries", tile) for tile in QUERY_TILES] + [("keys", tile) for tile in KEY_TILES]
INT32 = -(2**31), 2**31 - 1


@pytest.mark.sampled
@pytest.mark.parametrize(("rows", "tile"), TILES, ids=str)
@pytest.mark.parametrize(("n", "longest"), [(0, None), (1, None), (9, None), (120, 40), (160, 150)])
def test_random_ranges(rows, tile, n, longest):
    for total_q, total_k in ((300, 333), (512, 256)) if n < 10 else ((300, 333),):
        ranges = Ranges.random(n, total_q, total_k, seed=n + tile[1], longest=longest)
        with cute_fa.simulate("sm_80"):
            walk = assert_walk(ranges, tile, rows)
        assert walk.filled == len(walk.order) or n < 10


@pytest.mark.sampled
@pytest.mark.parametrize("tile", [(128, 64), (64, 32)], ids=str)
@pytest.mark.parametrize("rows", ["queries", "keys"])
def test_one_range_of_each_type_at_the_edges_of_tiles(tile, rows):
    """A range from, to and across the edges of tiles, each alone, so that nothing hides an error of one."""
    edges = [0, 1, 63, 64, 65, 128, 129, 140]
    rng = np.random.default_rng(tile[0])
    with cute_fa.simulate("sm_80"):
        for kind in (FULL, CAUSAL, INVERSE, BOTH):
            for _ in range(12):
                (a, b), (c, d) = (sorted(rng.choice(edges, 2, replace=False)) for _ in range(2))
                assert_walk(Ranges.of([(a, b, c, d, kind)], 140, 140), tile, rows)


bounds = st.integers(-30, 330) | st.sampled_from([*INT32, INT32[0] + 1, 2**30, -(2**30), 2**30 - 1])
any_range = st.tuples(bounds, bounds, bounds, bounds, st.integers(0, 3) | st.sampled_from([4, -1, *INT32]))


@seed(18)
@settings(max_examples=40, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(any_range, max_size=12),
    st.sampled_from([(1, 1), (127, 300), (129, 64), (300, 97), (256, 256)]),
    st.sampled_from([("queries", (128, 64)), ("queries", (64, 32)), ("keys", (128, 32)), ("keys", (256, 128))]),
)
def test_any_ints(ranges, totals, tiles):
    """Empty, reversed, out of range, huge: what is left inside the tensors counts, by a type's two low bits."""
    rows, tile = tiles
    with cute_fa.simulate("sm_80"):
        assert_walk(Ranges.of(ranges, *totals), tile, rows)


def test_ints_at_both_ends():
    """Differences of starts and ends, which do not fit into 32 bits; all queries and keys; none."""
    low, high = INT32
    ranges = [(low, high, low, high, kind) for kind in range(4)]
    ranges += [(low, 100, 200, high, CAUSAL), (100, high, low, 50, INVERSE), (high, low, 0, 100, FULL)]
    ranges += [(low, high, 0, 5, BOTH), (0, 5, low, high, BOTH), (low, low, high, high, BOTH)]
    with cute_fa.simulate("sm_80"):
        for case in ranges:
            for rows in ("queries", "keys"):
                assert_walk(Ranges.of([case], 140, 150), (128, 64), rows)
        assert_walk(Ranges.of(ranges, 140, 150), (128, 64))


@pytest.mark.parametrize("rows", ["queries", "keys"])
def test_what_several_ranges_cover_together_needs_no_mask(rows):
    """A block cut into pieces along queries, keys, or both, in any order, with overlaps or without; not with a hole."""
    quarters = [(q, q + 64, k, k + 64, FULL) for q in (0, 64) for k in (0, 64)]
    plans = [quarters, quarters[::-1], [*quarters, (0, 128, 0, 128, CAUSAL), (30, 50, 20, 90, BOTH)]]
    plans.append([(0, 128, 0, 128, CAUSAL), (0, 128, 0, 128, INVERSE)])
    with cute_fa.simulate("sm_80"):
        for plan in plans:
            walk = assert_walk(Ranges.of(plan, 256, 256), (128, 64), rows)
            assert (walk.tiles[0].masked, walk.tiles[0].covered) == ([], [0, 1])
        for missing in quarters:
            hole = [r for r in quarters if r is not missing] + [(*missing[:3], missing[3] - 1, FULL)]
            walk = assert_walk(Ranges.of(hole, 256, 256), (128, 64), rows)
            assert len(walk.tiles[0].masked) == 1


def test_a_ragged_tile_of_rows():
    """Rows behind the last one hide nothing of a tile of queries, and all of a tile of keys: the backward sums over
    the queries of its blocks, whose tiles are whole. Columns behind the last one always need a mask."""
    everything = Ranges.of([(0, 200, 0, 200, FULL)], 200, 200)
    with cute_fa.simulate("sm_80"):
        queries, keys = (assert_walk(everything, (128, 64), rows) for rows in ("queries", "keys"))
    assert [(t.masked, t.covered) for t in queries.tiles] == [([3], [0, 1, 2])] * 2
    assert [(t.masked, t.covered) for t in keys.tiles] == [([3], [0, 1, 2]), ([3, 2, 1, 0], [])]


def test_more_ranges_than_threads_in_a_tile():
    """Of one class and of many, in blocks where all of them meet and where the last one alone does."""
    many = [(i % 100, i % 100 + 28, 64 + i % 7, 70 + i % 7, i % 4) for i in range(500)]
    many += [(5, 5 + 2**c, 192 + c, 193 + c, FULL) for c in range(8)] + [(127, 128, 250, 251, FULL)]
    with cute_fa.simulate("sm_80"):
        for rows in ("queries", "keys"):
            assert_walk(Ranges.of(many, 300, 260), (128, 64), rows)


def test_ranges_much_longer_than_a_tile():
    """Classes far above the tile's rows: found wherever they begin before it, and not behind their end."""
    ranges = [
        (i, i + 2**c + extra, 16 * c, 16 * c + 9, FULL) for c in range(11) for extra in (0, 2**c - 1) for i in (0, 700)
    ]
    with cute_fa.simulate("sm_80"):
        assert_walk(Ranges.of(ranges, 2000, 300), (64, 32))
        assert_walk(Ranges.of([(r[2], r[3], r[0], r[1], CAUSAL) for r in ranges], 300, 2000), (128, 32), "keys")


def test_wide_plans():
    """More words of blocks than a warp has lanes, 1,250 blocks: seen whole, in part, not at all."""
    stripes = [(0, 70, k, k + 40 + k % 60, k // 700 % 4) for k in range(0, 40_000, 700)]
    stripes += [(0, 70, 5_000, 15_000, FULL), (3, 60, 39_000, 39_990, FULL)]
    with cute_fa.simulate("sm_80"):
        walk = assert_walk(Ranges.of(stripes, 70, 40_000), (64, 32))
    assert len(walk.tiles[0].masked) > 90 and len(walk.tiles[0].covered) > 300


@pytest.mark.sampled
@pytest.mark.parametrize("schedule", [{"schedule_seed": 1}, {"schedule_seed": 2, "late": True}], ids=str)
def test_every_schedule(schedule):
    ranges = Ranges.random(150, 700, 500, seed=3, longest=120)
    with cute_fa.simulate("sm_80", **schedule):
        assert_walk(ranges, (128, 64))
        assert_walk(ranges, (128, 32), "keys")


def capacities():
    """Walks with room for less and less, beside what a dense mask has."""
    ranges, tile = Ranges.random(60, 700, 640, seed=4, longest=200), (128, 64)
    expected = expected_lists(ranges.mask(), tile, whole_tiles=False)
    entries = sum(len(t.masked) + len(t.covered) for t in expected)
    return ranges, tile, expected, entries


@pytest.mark.sampled
@pytest.mark.parametrize("kind", ["entries", "masks"])
@pytest.mark.parametrize("share", [0.0, 0.4, 0.9, "one less"])
def test_capacities_exceeded(kind, share):
    """Tiles of rows that find no room say so and are counted, the others have their lists, and the header says what
    would have been needed."""
    ranges, tile, expected, entries = capacities()
    with cute_fa.simulate("sm_80"):
        needed = {"entries": entries, "masks": Walk.read(ranges.walk(tile), 700, tile, 60).mask_tiles}[kind]
        room = needed - 1 if share == "one less" else int(share * needed) or (kind == "masks")
        walk = ranges.walk(tile, **{kind: room})
        read = Walk.read(walk, 700, tile, room if kind == "entries" else 60)
    lacking = [ours.masked is None for ours in read.tiles]
    assert read.no_room == sum(lacking) > 0 and read.filled == len(expected) - sum(lacking)
    assert {"entries": read.entries, "masks": read.mask_tiles}[kind] == needed
    for ours, theirs in zip(read.tiles, expected, strict=True):
        if ours.masked is not None:
            assert ours.masked == theirs.masked and ours.covered == theirs.covered
            assert (ours.masks == theirs.masks).all()
    assert sorted(read.order) == list(range(len(expected)))
    assert [lacking[i] for i in read.order] == sorted(lacking)
    if share == "one less":
        assert sum(lacking) == 1
    if share == 0.0:
        assert all(lacking) if kind == "entries" else all(not t.masked for t in read.tiles if t.masked is not None)


def test_room_that_is_just_enough():
    ranges, tile, expected, entries = capacities()
    with cute_fa.simulate("sm_80"):
        masks = Walk.read(ranges.walk(tile), 700, tile, 60).mask_tiles
        read = Walk.read(ranges.walk(tile, entries=entries, masks=masks), 700, tile, entries)
    assert read.no_room == 0
    assert [(t.masked, t.covered) for t in read.tiles] == [(t.masked, t.covered) for t in expected]


@pytest.mark.parametrize("totals", [(0, 50), (50, 0), (0, 0)], ids=str)
def test_no_rows_or_no_columns(totals):
    """No tile has a block, and each stands in the order once."""
    ranges = Ranges.of([(0, 50, 0, 50, FULL)], *totals)
    with cute_fa.simulate("sm_80"):
        walk = ranges.walk((32, 32))
    tiles = -(-totals[0] // 32)
    assert walk[:4].tolist() == [0, 1, 0, 0]
    assert sorted(walk[8 : 8 + tiles].tolist()) == list(range(tiles))
    assert (walk[8 + -(-tiles // 4) * 4 :].reshape(-1)[: 4 * tiles].view(tiles, 4)[:, 2] == 0).all()


def test_a_plan_makes_each_walk_once():
    ranges = Ranges.random(20, 300, 200, seed=6)
    plan = ranges.plan()
    with cute_fa.simulate("sm_80"):
        walk = plan.walk("queries", WalkShape(128, 64))
        assert plan.walk("queries", WalkShape(128, 64)) is walk
        assert plan.walk("keys", WalkShape(128, 64)) is not walk
    read = Walk.read(walk, 300, (128, 64), 3 * 4)
    expected = expected_lists(ranges.mask(), (128, 64), whole_tiles=False)
    assert [(t.masked, t.covered) for t in read.tiles] == [(t.masked, t.covered) for t in expected]


def test_places_are_int32(monkeypatch):
    """Whatever room is asked for, a walk ends below 2^31 words."""
    sizes = []
    monkeypatch.setattr(range_plan, "range_walk", lambda *given: sizes.append(given[2:]) or torch.zeros(8))
    for total, capacity in ((2**20, 2**30), (2**23, 2**40), (2**20, 5)):
        with cute_fa.simulate("sm_80"):
            Ranges.of([(0, 9, 0, 9, FULL)], total, total).plan(mask_capacity=capacity).walk("queries", (128, 64))
    words = [WalkSizes(*numbers).words for numbers in sizes]
    assert 2**31 - 2**10 < words[0] < 2**31 and 2**31 - 2**10 < words[1] < 2**31
    assert sizes[2][-1] == 6


@pytest.mark.without_races
def test_work_follows_what_the_ranges_name():
    """Not how many there are: short ranges that lie elsewhere cost a tile of rows a longer search at most."""
    with cute_fa.simulate("sm_80") as simulation:
        for n in (16, 1024):
            near = [(0, 64, 0, 40, FULL)]
            far = [(1024 + i, 1025 + i, 0, 64, FULL) for i in range(n)]
            Ranges.of(near + far, 64, 64).walk((64, 32))
            Ranges.of(near + far, 64 + 64 * 64, 64).walk((64, 32))
    few, few_all, many, many_all = (launch.warp_instrs for launch in simulation.launches)
    assert many < 1.05 * few
    assert many_all < 8 * few_all


@pytest.mark.without_races
def test_ten_thousand_ranges():
    """As many as a large plan has, short enough to leave most blocks in part."""
    ranges = Ranges.random(10_000, 2048, 2048, seed=7, longest=24)
    with cute_fa.simulate("sm_80") as simulation:
        walk = assert_walk(ranges, (128, 64))
    print("warp instructions", simulation.launches[-1].warp_instrs, "entries", walk.entries)
