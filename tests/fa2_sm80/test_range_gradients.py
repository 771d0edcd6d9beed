"""The FA2 backward under range plans, simulated: any plan, edges, what is hidden, determinism, costs."""

import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

import cute_fa
from cute_fa.api.ranges import range_attention
from cute_fa.engine import worlds
from tests.testing.range_gradients import assert_right, gradients_of, same_bits
from tests.testing.range_reference import RangeInputs
from tests.testing.range_walks import BOTH, CAUSAL, FULL, INVERSE, Ranges


def a_range(total: int):
    """Two bounds, most of them a range inside [0, total)."""
    inside = st.tuples(st.integers(0, total), st.integers(0, total)).map(sorted)
    return inside | inside | st.tuples(*[st.integers(-(2**31), 2**31 - 1)] * 2)


@st.composite
def plans(draw):
    totals = draw(st.sampled_from([(70, 190), (65, 64), (130, 33), (1, 1)]))
    ranges = st.tuples(*(a_range(total) for total in totals), st.integers(0, 3)).map(lambda r: (*r[0], *r[1], r[2]))
    return Ranges.of(draw(st.lists(ranges, max_size=8)), *totals)


@seed(18)
@settings(max_examples=12, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(plans(), st.integers(0, 99), st.sampled_from([{}, {"late": True}]), st.booleans())
def test_any_plan(ranges, schedule_seed, late, deterministic):
    """Ranges of any ints, twice the same, none at all."""
    inputs = RangeInputs.make(ranges, (1, 1), peaked=True)
    assert_right(ranges, inputs, deterministic=deterministic, schedule_seed=schedule_seed, **late)


# tiles are of 128 keys and 32 queries at head_dim 64
@pytest.mark.sampled
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("kind", [FULL, CAUSAL, INVERSE, BOTH])
def test_edges_that_meet_tiles(kind, deterministic):
    """Ranges that begin and end within two of the corner of a tile, on either side."""
    for off in (-1, 0, 1):
        ranges = Ranges.of([(32 + off, 96 - off, 64 - off, 128 + off, kind), (96, 120, 128 + off, 192, kind)], 130, 200)
        assert_right(ranges, RangeInputs.make(ranges, (1, 1), peaked=True), deterministic=deterministic)


@pytest.mark.parametrize("deterministic", [False, True])
def test_rows_and_keys_in_no_range(deterministic):
    """They have no gradient: inside tiles that others see through, and in tiles of none."""
    ranges = Ranges.of([(3, 40, 0, 50, CAUSAL), (70, 80, 300, 305, FULL)], 200, 400)
    inputs = RangeInputs.make(ranges)
    grads = assert_right(ranges, inputs, deterministic=deterministic)
    rows, keys = inputs.mask.any(1), inputs.mask.any(0)
    assert (grads["q"][~rows] == 0).all() and (grads["q"][rows] != 0).any(-1).all()
    for name in ("k", "v"):
        assert (grads[name][~keys] == 0).all() and (grads[name][keys] != 0).any(-1).all()


@pytest.mark.sampled
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("totals", [(70, 0), (0, 70), (70, 70)], ids=str)
def test_nothing_visible(totals, deterministic):
    """No queries, no keys, or no ranges: gradients are 0, the sink's too."""
    ranges = Ranges.of([(0, 70, 0, 70, FULL)] if 0 in totals else [], *totals)
    grads = gradients_of(ranges, RangeInputs.make(ranges, sink=True, lse_gradient=False), deterministic)
    assert all((grad == 0).all() for grad in grads.values())


@pytest.mark.sampled
@pytest.mark.parametrize("deterministic", [False, True])
def test_what_no_query_sees_changes_nothing(deterministic):
    """Keys and queries of blocks that no range touches may be NaN, hidden ones beside others large; dLSE of rows that
    see nothing may be NaN."""
    ranges = Ranges.of([(10, 30, 20, 61, BOTH), (140, 150, 300, 370, FULL), (5, 12, 30, 33, FULL)], 192, 400)
    inputs = RangeInputs.make(ranges, alibi=True, positions=True)
    first = assert_right(ranges, inputs, deterministic=deterministic)
    q, k, v, dlse = inputs.q.clone(), inputs.k.clone(), inputs.v.clone(), inputs.dlse.clone()
    rows, keys = inputs.mask.any(1), inputs.mask.any(0)
    dlse[:, ~rows] = torch.nan
    k[~keys], v[~keys], q[~rows] = 500.0, 1e4, 500.0
    k[128:256], v[128:256], q[64:128] = torch.nan, torch.nan, torch.nan
    assert not rows[64:128].any() and not keys[128:256].any()
    again = gradients_of(ranges, dataclasses.replace(inputs, q=q, k=k, v=v, dlse=dlse), deterministic)
    assert all(torch.allclose(first[name], again[name], atol=1e-6, rtol=1e-5) for name in first)
    assert not deterministic or same_bits(first, again)


@pytest.mark.parametrize("deterministic", [False, True])
def test_neighbouring_positions_far_from_zero(deterministic):
    """Distances are exact where fp32 does not hold the positions."""
    ranges = Ranges.of([(0, 70, 0, 100, FULL)], 70, 100)
    inputs = RangeInputs.make(ranges, alibi=True, positions=True)
    q, k = ((2**25 + torch.arange(n)).int() for n in (70, 100))
    slopes = torch.tensor([0.3, 0.1])
    far = dataclasses.replace(inputs, q_positions=q, k_positions=k, alibi_slopes=slopes)
    assert_right(ranges, far, deterministic=deterministic)


@pytest.mark.thorough
def test_deterministic_under_every_schedule():
    """All features that sum over CTAs, and more CTAs than one SM takes."""
    ranges = Ranges.random(30, 200, 300, seed=5, longest=120)
    inputs = RangeInputs.make(ranges, (4, 2), alibi=True, positions=True, sink=True)
    first = assert_right(ranges, inputs, deterministic=True)
    for schedule_seed in range(3):
        again = gradients_of(ranges, inputs, deterministic=True, schedule_seed=schedule_seed, late=True)
        assert same_bits(first, again)


def test_dq_by_atomic_additions_depends_on_the_order():
    """What deterministic=True is there for: without it another schedule gives other bits, of dQ alone."""
    ranges = Ranges.random(30, 130, 1000, seed=5)
    inputs = RangeInputs.make(ranges, (4, 4), dtype=torch.float16)
    first = gradients_of(ranges, inputs)
    others = [gradients_of(ranges, inputs, schedule_seed=schedule_seed) for schedule_seed in range(3)]
    assert any(not torch.equal(first["q"], other["q"]) for other in others)
    assert all(torch.equal(first[name], other[name]) for other in others for name in ("k", "v"))


def test_deterministic_gradients_of_repeated_ranges():
    """Named twice counts once, bit for bit."""
    union = Ranges.of([(0, 100, 0, 100, FULL)], 130, 170)
    pieces = [(0, 100, 0, 64, FULL), (0, 100, 30, 100, FULL), (0, 100, 30, 100, FULL), (20, 60, 0, 100, CAUSAL)]
    several = Ranges.of(pieces, 130, 170)
    inputs = RangeInputs.make(union)
    first = assert_right(union, inputs, deterministic=True)
    assert same_bits(first, gradients_of(several, inputs, deterministic=True))


@pytest.mark.sampled
@pytest.mark.parametrize("deterministic", [False, True])
def test_no_room_is_nan(deterministic, monkeypatch):
    """Queries without a list have NaN for O and LSE, and so for whatever gradient lacks a part of theirs; tiles of keys
    without a list have NaN for dK and dV, and all sums over keys are."""
    monkeypatch.setattr(worlds, "checks_values", lambda: False)
    ranges = Ranges.of([(3, 100, 5, 150, BOTH), (100, 130, 130, 400, CAUSAL), (0, 20, 250, 390, FULL)], 130, 400)
    inputs = RangeInputs.make(ranges, alibi=True)
    right = assert_right(ranges, inputs, deterministic=deterministic)
    for mask_capacity in (6, 12):  # less than tiles of queries need, less than tiles of keys need
        grads = gradients_of(ranges, inputs, deterministic, plan=ranges.plan(mask_capacity=mask_capacity))
        for name, grad in grads.items():
            wrong = ~torch.isclose(grad, right[name], rtol=2e-2, atol=1e-2)
            assert grad[wrong].isnan().all(), name
            assert wrong.any() or (name == "q" and deterministic), name


@pytest.mark.sampled
@pytest.mark.parametrize("arch", ["sm_89", "sm_90a"])
def test_later_archs_run_the_same_source(arch):
    ranges = Ranges.random(15, 70, 170, seed=2)
    inputs = RangeInputs.make(ranges, (1, 1), (128, 128), peaked=True)
    assert_right(ranges, inputs, arch=arch, deterministic=arch == "sm_90a")


@pytest.mark.without_races
@pytest.mark.parametrize("deterministic", [False, True])
def test_cost_follows_the_mask(deterministic):
    """Whether 512 or 2048 keys lie around what 128 of 512 queries see: the same blocks, and tiles of keys that nobody
    sees cost no more than the zeros that they write."""
    costs = []
    for total in (512, 2048):
        ranges = Ranges.of([(0, 128, 0, 512, FULL)], 512, total)
        inputs = RangeInputs.make(ranges, (1, 1)).requiring_gradients()
        with cute_fa.simulate("sm_80") as simulation:
            choices = {"plan": ranges.plan(), "deterministic": deterministic, "family": "fa2"}
            range_attention(inputs.q, inputs.k, inputs.v, **choices).backward(inputs.dout)
        names = ("fa2_sm80forward", "key_gradients", "query_gradients")
        costs.append({n: l.warp_instrs for l in simulation.launches for n in names if n in l.name})
    near, far = costs
    assert len(near) == 2 + deterministic
    assert far["fa2_sm80forward"] == near["fa2_sm80forward"]
    assert not deterministic or far["query_gradients"] == near["query_gradients"]
    assert far["key_gradients"] < 2 * near["key_gradients"]
