"""Predicted deterministic backwards: which tile waits for which, what a turn takes, and what waiting costs."""

from __future__ import annotations

import pytest

import ptxsim
from cute_fa.semantics.errors import ArgumentError
from cute_fa.semantics.types import Direction, SmArch
from fa3_sm90.backward.entry import Fa3Backward
from perf.predict.chains import ChainedTile, Turns, chained_makespan, fa4_chain, our_chain, turns_of
from perf.predict.kernels import Fa4Kernel, OurKernel, problem_of
from perf.predict.model import Predictor
from perf.predict.tiles import TileShape, makespan
from perf.workload import Workload
from ptxsim.timing import gpus
from tests.testing.key_tiles import key_tiles

H200 = gpus.load("h200")
L2 = 50 << 20
TURNS = Turns(hold=1.0, signal=2.0)


def cost(steps):
    return 1 + 10 * steps


def workload(**changes):
    sizes = dict(heads=4, heads_kv=4, head_dim=64, head_dim_v=64, seqlen=512, tokens=512, causal=True)
    return Workload(direction=Direction.BACKWARD, deterministic=True, **sizes | changes)


@pytest.mark.parametrize("slots, cycles", [(1, 3 * 41), (2, 82), (3, 47)])
def test_a_chain_of_three_tiles(slots, cycles):
    """Of 1 cycle and 4 steps of 10 each. Alone on a place each finds its turn come. On three the first ends its steps
    at 11, 21, 31, 41, the second 3 later, the third 6. On two the third begins at 41, when the second has one
    step left, at 44: its steps end at 52 and on."""
    tiles = [ChainedTile(0, 4), ChainedTile(0, 4, after=0), ChainedTile(0, 4, after=1)]
    assert chained_makespan(tiles, cost, slots, TURNS) == cycles


def test_a_chain_waits_only_for_sums_that_both_add_to():
    """Causal: the second tile adds to sums 0 to 3, the first to 2 and 3, at 11 and 21; the second's third step ends at
    31 in any case. With 30 cycles from one to the other it ends at 41, and the last at 51. The other way round it
    waits for 34 and 44."""
    tiles = [ChainedTile(2, 2), ChainedTile(0, 4, after=0)]
    assert chained_makespan(tiles, cost, 2, TURNS) == 41
    assert chained_makespan(tiles, cost, 2, Turns(hold=1.0, signal=29.0)) == 51
    assert chained_makespan([ChainedTile(0, 4), ChainedTile(2, 2, after=0)], cost, 2, TURNS) == 44


def test_a_late_turn_within_the_slack_holds_up_no_step_behind_it():
    """The second tile adds at 14, 24, 34, 44 with the first's turns at 11, 21, 31, 41, and computes on as if they came
    at once; with a slack of 1 it is held up by 2 in each of the first steps."""
    tiles = [ChainedTile(0, 4), ChainedTile(0, 4, after=0)]
    assert chained_makespan(tiles, cost, 2, Turns(1.0, 2.0, slack=3.0)) == 41
    assert chained_makespan(tiles, cost, 2, Turns(1.0, 2.0, slack=1.0)) == 43


def test_the_heads_of_a_tile_have_sums_of_their_own():
    """Two heads, two steps each, sums 1 and 2 of each: a tile before it that adds to sum 2 alone delays the second
    step of both, the first of which ends at 21 and the second at 41, by 20 cycles."""
    tiles = [ChainedTile(2, 1, heads=2), ChainedTile(1, 2, heads=2, after=0)]
    assert chained_makespan(tiles, cost, 2, Turns(1.0, 2.0)) == 41
    assert chained_makespan(tiles, cost, 2, Turns(1.0, 29.0)) == 41 + (11 + 30 - 21)


def test_query_heads_of_a_kv_head_add_to_dk_and_dv_one_after_the_other():
    """Two turns of 4 cycles at a tile's end. At once on three places: the first ends at 49 with dK at 45, the others'
    dK and dV follow each other, 2 cycles after the tile before."""
    tiles = [ChainedTile(0, 4), ChainedTile(0, 4, behind=0), ChainedTile(0, 4, behind=1)]
    turns = Turns(1.0, 2.0, end=4.0)
    alone = 8 + 41
    assert chained_makespan(tiles[:1], lambda n: 8 + cost(n), 1, turns) == alone
    assert chained_makespan(tiles, lambda n: 8 + cost(n), 3, turns) == alone + 2 * (4 + 2)
    assert chained_makespan(tiles, lambda n: 8 + cost(n), 1, turns) == 3 * alone


def test_tiles_that_wait_for_none_end_as_without_a_chain():
    steps = [8, 1, 1, 8, 1, 1]
    tiles = [ChainedTile(0, n) for n in steps]
    assert chained_makespan(tiles, float, 2, TURNS) == makespan(TileShape(1, 1), steps, float, 2, 0.0)


@pytest.mark.parametrize("waits", ["after", "behind"])
@pytest.mark.parametrize("other", [1, 2])
def test_an_order_that_may_deadlock_is_an_error(other, waits):
    tiles = [ChainedTile(0, 2), ChainedTile(0, 2, **{waits: other}), ChainedTile(0, 2)]
    with pytest.raises(ArgumentError, match=f"tile 1 waits for tile {other}"):
        chained_makespan(tiles, float, 1, TURNS)


def test_our_chain():
    """Blocks of 128 queries from the first on: of 512 the last tile of keys, which goes first, meets one, the first
    one four. A tile waits for the one behind it in its head."""
    shape = TileShape(128, 128, heads=2)
    row = 2 * 512 * (2 * 64 * 2 + 64 * 4)  # bytes of Q, dO and dQ of two heads
    chain = our_chain(shape, workload(heads_kv=2), row)  # one row at a time
    assert chain[:4] == [
        ChainedTile(3, 1, 2),
        ChainedTile(2, 2, 2, 0),
        ChainedTile(1, 3, 2, 1),
        ChainedTile(0, 4, 2, 2),
    ]
    assert [tile.after for tile in chain[4:]] == [None, 4, 5, 6]
    both = our_chain(shape, workload(heads_kv=2), 50 << 20)
    assert [(tile.first, tile.after) for tile in both[:4]] == [(3, None), (3, None), (2, 0), (2, 1)]
    windowed = our_chain(shape, workload(heads_kv=2, window=100), row)
    assert [(tile.first, tile.steps) for tile in windowed[:4]] == [(3, 1), (2, 2), (1, 2), (0, 2)]


@pytest.mark.parametrize("heads_kv, batches, group", [(2, 2, 1), (4, 1, 4), (3, 2, 4), (2, 1, 1000)])
@pytest.mark.parametrize("causal", [True, False])
def test_the_order_of_our_chain_is_the_kernels(heads_kv, batches, group, causal):
    """Tile by tile: ``key_tile`` says which block of keys of which head a ticket is."""
    w = workload(seqlen=700, tokens=700 * batches, heads=2 * heads_kv, heads_kv=heads_kv, causal=causal)
    config = Fa3Backward.configure(problem_of(w, SmArch.SM_90A))
    row = 700 * 2 * (64 * 4 + 64 * 4)  # bytes of Q, dO and dQ of two heads
    chain = our_chain(TileShape(128, 128, heads=2), w, int(1.5625 * group * row) + 1)
    with ptxsim.simulate("sm_90a") as simulation:
        places = key_tiles(simulation, config, 700, heads_kv, batches, group)
    assert len(set(places)) == len(chain) == 6 * heads_kv * batches
    for (n, head, batch), tile in zip(places, chain, strict=True):
        assert tile.steps == (6 - n if causal else 6)
        assert tile.first == (n if causal else 0)
        assert tile.after == (places.index((n + 1, head, batch)) if n < 5 else None)


def test_the_chain_of_flash_attention_4():
    """Causal: the last keys, which the fewest queries see, first, of two heads at a time: three heads of 14.7 MB fit
    50 MiB, and groups are powers of two. Every second head is behind the first of its kv head."""
    w = workload(seqlen=16384, tokens=16384, heads=6, heads_kv=3, head_dim=128, head_dim_v=64)
    chain = fa4_chain(TileShape(8192, 4096), w)
    pair = [ChainedTile(2, 2), ChainedTile(2, 2, behind=0), ChainedTile(0, 4, after=0), ChainedTile(0, 4, 1, 1, 2)]
    assert chain[:4] == pair
    assert [(tile.after, tile.behind) for tile in chain[4:8]] == [(None, None), (None, 4), (4, None), (5, 6)]
    full = fa4_chain(TileShape(8192, 4096), workload(seqlen=16384, tokens=16384, heads=1, heads_kv=1, causal=False))
    assert full == [ChainedTile(0, 4), ChainedTile(0, 4, after=0)]


def test_what_is_left_of_a_group_of_heads_is_a_group():
    chain = fa4_chain(TileShape(256, 256), workload(heads=5, heads_kv=5, head_dim=8192, head_dim_v=8192))
    # 4 + 1 heads: 512 * 8 * 8192 bytes are 32 MiB, so that each head is a group; at half the width two are
    assert [tile.after for tile in chain] == [x for n in range(5) for x in (None, 2 * n)]
    chain = fa4_chain(TileShape(256, 256), workload(heads=5, heads_kv=5, head_dim=4096, head_dim_v=4096))
    assert [tile.after for tile in chain] == [*2 * [None], 0, 1, *2 * [None], 4, 5, None, 8]


@pytest.fixture(scope="module", params=[OurKernel, Fa4Kernel])
def recorded(request):
    w = workload(heads=2, heads_kv=2, seqlen=2048, tokens=2048, causal=False)
    return Predictor(request.param(w, SmArch.SM_90A, {}))


@pytest.mark.thorough
def test_what_a_turn_takes(recorded):
    """The additions of both warpgroups at the SM's rate, then the store's latency, a round trip to the L2 until others
    see them, and one for the fence. dK and dV of heads of their own are nobody else's."""
    sample = recorded.sample(H200)
    long = recorded.launches[1]
    turns = turns_of(long, long.replay(H200, times=True), H200, sample.cost.step)
    rate = H200.bytes_per_cycle(H200.l2_reductions) / H200.sms
    least = 128 * 64 * 4 / rate + H200.store_latency + 2 * H200.global_latency
    assert least - 200 < turns.hold < least + 100
    assert turns.signal == 1.5 * H200.global_latency
    assert 0 < turns.slack < sample.cost.step - turns.hold
    assert turns.end == 0
    later = H200.with_values(global_latency=H200.global_latency + 100)
    held = turns_of(long, long.replay(later, times=True), later, sample.cost.step).hold
    assert held == pytest.approx(turns.hold + 200, abs=20)


def test_a_deterministic_backward_is_slower_by_its_turns(recorded):
    """16 tiles of two heads, all at once: each begins a turn after the one before."""
    fast = H200.with_values(global_latency=1)
    slow = H200.with_values(global_latency=1500)
    assert recorded.predict(H200, 2).busy["turns"] > 0
    assert recorded.sample(slow).busy["turns"] > recorded.sample(fast).busy["turns"] + 0.1
    assert recorded.sample(slow).seconds > 1.2 * recorded.sample(fast).seconds


def test_turns_that_take_long_are_what_binds(recorded):
    assert recorded.predict(H200.with_values(global_latency=1500), ensemble=2).bound == "turns"


def test_a_deterministic_forward_is_an_error():
    with pytest.raises(ArgumentError, match="deterministic forward"):
        Workload(deterministic=True)
