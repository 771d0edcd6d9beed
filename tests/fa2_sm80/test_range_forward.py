"""The FA2 forward under range plans, simulated; a dense mask decides."""

import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

import cute_fa
from cute_fa.api.range_plan import RangePlan
from cute_fa.api.ranges import range_attention
from cute_fa.engine import worlds
from tests.testing.grid import pairwise
from tests.testing.range_reference import RangeInputs
from tests.testing.range_walks import BOTH, CAUSAL, FULL, INVERSE, Ranges
from tests.testing.simulated import unwritten_is_nan

ALIBI = {"none": {}, "alibi": {"alibi": True}, "positions": {"alibi": True, "positions": True}}
FEATURES = {
    "head_dims": [(8, 8), (64, 64), (72, 40), (96, 96), (128, 128), (192, 128), (256, 256)],
    "dtype": [torch.bfloat16, torch.float16],
    "alibi": list(ALIBI),
    "softcap": [0.0, 15.0],
    "sink": [False, True],
    "softmax_scale": [None, 0.2],
    "heads": [(2, 2), (4, 2), (3, 1)],
    "peaked": [False, True],
    "plan": [(6, None), (40, 60)],
    "totals": [(150, 170), (300, 90), (1, 260)],
    "schedule": [{}, {"late": True, "schedule_seed": 1}, {"late": True, "schedule_seed": 2}],
}


def run(ranges: Ranges, inputs: RangeInputs, arch: str = "sm_80", plan: RangePlan | None = None, **schedule):
    """(out, lse) of one call."""
    choices = {"plan": plan or ranges.plan(), "return_lse": True, "family": "fa2"}
    with cute_fa.simulate(arch, **schedule), unwritten_is_nan():
        return range_attention(inputs.q, inputs.k, inputs.v, **choices, **inputs.options())


def assert_right(ranges: Ranges, inputs: RangeInputs, **options):
    out, lse = run(ranges, inputs, **options)
    result = inputs.check(out, lse)
    assert result.ok, result
    return out, lse


def inputs_of(case: dict, ranges: Ranges, **options) -> RangeInputs:
    """Of a case of FEATURES."""
    names = ("heads", "head_dims", "dtype", "softcap", "sink", "softmax_scale", "peaked")
    return RangeInputs.make(ranges, **{n: case[n] for n in names}, **ALIBI[case["alibi"]], **options)


def case_name(case: dict) -> str:
    return "-".join(str(case[name]).replace(" ", "") for name in FEATURES if name not in ("plan", "schedule"))


@pytest.mark.sampled
@pytest.mark.parametrize("case", pairwise(FEATURES, seed=3), ids=case_name)
def test_features_in_pairs(case):
    n, longest = case["plan"]
    ranges = Ranges.random(n, *case["totals"], seed=n, longest=longest)
    assert_right(ranges, inputs_of(case, ranges), **case["schedule"])


@pytest.mark.gpu
@pytest.mark.parametrize("case", pairwise(FEATURES, seed=3), ids=case_name)
def test_features_in_pairs_on_the_gpu(case):
    n, longest = case["plan"]
    ranges = Ranges.random(n, *case["totals"], seed=n, longest=longest)
    inputs = inputs_of(case, ranges).on("cuda")
    given_ranges = (t.cuda() for t in (ranges.q, ranges.k, ranges.types))
    choices = {"return_lse": True, "family": "fa2"}
    out, lse = range_attention(inputs.q, inputs.k, inputs.v, *given_ranges, **choices, **inputs.options())
    result = inputs.check(out, lse)
    assert result.ok, result


def a_range(total: int):
    """Two bounds, most of them a range inside [0, total)."""
    inside = st.tuples(st.integers(0, total), st.integers(0, total)).map(sorted)
    return inside | inside | st.tuples(*[st.integers(-(2**31), 2**31 - 1)] * 2)


@st.composite
def plans(draw):
    totals = draw(st.sampled_from([(130, 190), (65, 64), (200, 33), (1, 1)]))
    ranges = st.tuples(*(a_range(total) for total in totals), st.integers(0, 3)).map(lambda r: (*r[0], *r[1], r[2]))
    return Ranges.of(draw(st.lists(ranges, max_size=8)), *totals)


@seed(18)
@settings(max_examples=18, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(plans(), st.integers(0, 99), st.sampled_from([{}, {"late": True}]))
def test_any_plan(ranges, schedule_seed, late):
    """Ranges of any ints, twice the same, none at all."""
    assert_right(ranges, RangeInputs.make(ranges, (1, 1), peaked=True), schedule_seed=schedule_seed, **late)


# tiles are of 128 queries and 64 keys at head_dim 64
@pytest.mark.parametrize("kind", [FULL, CAUSAL, INVERSE, BOTH])
def test_edges_that_meet_tiles(kind):
    """Ranges that begin and end within two of the corner of a tile, on either side."""
    for off in (-2, -1, 0, 1, 2):
        ranges = Ranges.of(
            [(64 + off, 128 - off, 64 - off, 128 + off, kind), (130, 190, 128 + off, 192, kind)], 200, 200
        )
        inputs = RangeInputs.make(ranges, (1, 1), peaked=True)
        assert_right(ranges, inputs)


def test_named_twice_counts_once():
    """Repeated and overlapping ranges give the same bits as their union."""
    union = Ranges.of([(0, 150, 0, 100, FULL)], 150, 170)
    pieces = [(0, 150, 0, 64, FULL), (0, 150, 30, 100, FULL), (0, 150, 30, 100, FULL), (20, 60, 0, 100, CAUSAL)]
    several = Ranges.of(pieces, 150, 170)
    inputs = RangeInputs.make(union)
    one, many = assert_right(union, inputs), assert_right(several, inputs)
    assert torch.equal(one[0], many[0]) and torch.equal(one[1], many[1])


@pytest.mark.parametrize("sink", [False, True])
def test_rows_in_no_range(sink):
    """O is 0 and LSE −inf or the sink, for rows of a tile that others see through, and for tiles of none."""
    ranges = Ranges.of([(0, 50, 0, 170, CAUSAL), (100, 110, 20, 30, FULL)], 400, 170)
    inputs = RangeInputs.make(ranges, sink=sink)
    out, lse = assert_right(ranges, inputs)
    empty = ~inputs.mask.any(1)
    assert empty.sum() == 340
    assert (out[empty] == 0).all()
    if sink:
        torch.testing.assert_close(lse[:, empty], inputs.learnable_sink[:, None].expand(-1, 340), atol=1e-6, rtol=0)
    else:
        assert (lse[:, empty] == -torch.inf).all()


@pytest.mark.parametrize("totals", [(70, 0), (0, 70), (0, 0)], ids=str)
def test_no_queries_or_no_keys(totals):
    ranges = Ranges.of([(0, 70, 0, 70, FULL)], *totals)
    out, lse = run(ranges, RangeInputs.make(ranges))
    assert out.shape == (totals[0], 2, 64) and lse.shape == (2, totals[0])
    assert (out == 0).all() and (lse == -torch.inf).all()


def poisoned(inputs: RangeInputs, ranges: Ranges) -> RangeInputs:
    """Queries in no range NaN; keys that no range names NaN where no block holds one that is named. V of other hidden
    keys is large: P = 0 times NaN would be NaN, as under any mask."""
    q, k, v = inputs.q.clone(), inputs.k.clone(), inputs.v.clone()
    named = inputs.mask.any(0)
    blocks = torch.arange(len(named)) // 64
    touched = torch.isin(blocks, blocks[named])
    q[~inputs.mask.any(1)] = torch.nan
    k[~named] = torch.nan
    v[~named], v[~touched] = 1e4, torch.nan
    return dataclasses.replace(inputs, q=q, k=k, v=v)


def test_what_no_query_sees_changes_nothing():
    ranges = Ranges.of([(10, 90, 20, 61, BOTH), (140, 150, 200, 290, FULL), (5, 12, 30, 33, FULL)], 160, 300)
    inputs = RangeInputs.make(ranges, alibi=True, positions=True, sink=True)
    out, lse = assert_right(ranges, inputs)
    again, lse_again = run(ranges, poisoned(inputs, ranges))
    assert torch.equal(out, again) and torch.equal(lse, lse_again)


@pytest.mark.parametrize("base", [-(2**31), 2**24, 2**31 - 101])
def test_neighbouring_positions_far_from_zero(base):
    """Distances are exact where fp32 does not hold the positions."""
    ranges = Ranges.of([(0, 70, 0, 100, FULL)], 70, 100)
    inputs = RangeInputs.make(ranges, alibi=True, positions=True)
    q, k = ((base + torch.arange(n)).int() for n in (70, 100))
    slopes = torch.tensor([0.3, 0.1])
    assert_right(ranges, dataclasses.replace(inputs, q_positions=q, k_positions=k, alibi_slopes=slopes))


def test_positions_at_both_ends():
    """Of distances up to 2^31 − 1 in fp32, and a slope that keeps them finite."""
    ranges = Ranges.random(12, 130, 140, seed=1)
    inputs = RangeInputs.make(ranges, alibi=True, positions=True)
    q = torch.full_like(inputs.q_positions, 2**30)
    k = torch.where(torch.arange(140) % 2 == 0, 2**30 - 3, -(2**30) + 1).int()
    slopes = torch.tensor([1e-9, 2e-9])
    assert_right(ranges, dataclasses.replace(inputs, q_positions=q, k_positions=k, alibi_slopes=slopes))


@pytest.mark.parametrize("sink", [False, True])
def test_no_room_is_nan(sink, monkeypatch):
    """O and LSE of tiles of queries whose lists found no room are NaN, and no others are touched by that."""
    monkeypatch.setattr(worlds, "checks_values", lambda: False)
    ranges = Ranges.of([(3, 128, 5, 150, BOTH), (128, 300, 0, 192, FULL), (300, 390, 7, 170, CAUSAL)], 400, 192)
    inputs = RangeInputs.make(ranges, sink=sink)
    right, right_lse = assert_right(ranges, inputs)
    out, lse = run(ranges, inputs, plan=ranges.plan(mask_capacity=3))
    tiles = torch.stack([t.isnan().all() for t in out.split(128)])
    rows = tiles.repeat_interleave(128)[:400]
    assert 0 < tiles.sum() < 4
    assert torch.equal(out[~rows], right[~rows]) and torch.equal(lse[:, ~rows], right_lse[:, ~rows])
    assert lse[:, rows].isnan().all()


def test_one_plan_serves_other_heads_and_types():
    ranges = Ranges.random(15, 200, 220, seed=2)
    plan = ranges.plan()
    for heads, dtype in (((2, 1), torch.bfloat16), ((3, 3), torch.float16)):
        assert_right(ranges, RangeInputs.make(ranges, heads, dtype=dtype), plan=plan)


@pytest.mark.sampled
@pytest.mark.parametrize("arch", ["sm_89", "sm_90a", "sm_120a"])
def test_later_archs_run_the_same_source(arch):
    ranges = Ranges.random(15, 140, 170, seed=2)
    assert_right(ranges, RangeInputs.make(ranges, (1, 1), (128, 128), peaked=True), arch=arch)


def test_same_bits_under_every_schedule():
    ranges = Ranges.random(30, 300, 220, seed=5, longest=90)
    inputs = RangeInputs.make(ranges, alibi=True)
    first, first_lse = run(ranges, inputs)
    for schedule_seed in range(3):
        out, lse = run(ranges, inputs, schedule_seed=schedule_seed, late=True)
        assert torch.equal(out, first) and torch.equal(lse, first_lse)


@pytest.mark.without_races
def test_cost_follows_the_mask():
    """The same blocks among 4 times as many keys cost the same; twice the blocks twice as much."""
    costs = []
    for stop, total in ((512, 512), (512, 2048), (1024, 2048)):
        ranges = Ranges.of([(0, 128, 0, stop, FULL)], 128, total)
        with cute_fa.simulate("sm_80") as simulation:
            inputs = RangeInputs.make(ranges, (1, 1))
            range_attention(inputs.q, inputs.k, inputs.v, plan=ranges.plan(), family="fa2")
        costs.append(simulation.launches[-1].warp_instrs)
    near, far, twice = costs
    assert far == near
    assert 1.8 * near < twice < 2.0 * near
