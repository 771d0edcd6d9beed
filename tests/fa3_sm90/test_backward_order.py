"""In which order the FA3 backward hands out its tiles of keys, and how many heads it takes at a time."""

import itertools

import pytest

import ptxsim
from cute_fa.engine import plan as plans
from cute_fa.semantics.problem import AttentionProblem
from cute_fa.semantics.types import Direction, SmArch
from cute_fa.tools.inputs import InputSpec
from fa3_sm90.backward.entry import Fa3Backward
from tests.testing.cases import small_problem
from tests.testing.gradients import assert_right, gradients_of, same_bits
from tests.testing.key_tiles import key_tiles
from tests.testing.simulated import ctas_at_a_time

FA3 = {"arch": "sm_90a", "family": "fa3"}
MASKS = {
    "full": {},
    "causal": {"window_right": 0},
    "right": {"window_right": 100},
    "window": {"window_left": 50, "window_right": 0},
    "left": {"window_left": 50},
}
# keys, kv heads, batches, heads of a group: groups that divide the heads and ones that do not, one head, all at once
SHAPES = [(1000, 3, 2, 2), (512, 4, 1, 4), (129, 2, 3, 1), (640, 5, 1, 3), (100, 3, 1, 2), (300, 2, 2, 1000)]


def problem(**changes) -> AttentionProblem:
    return small_problem(arch=SmArch.SM_90A, direction=Direction.BACKWARD, **changes)


@pytest.fixture
def simulation():
    with ptxsim.simulate("sm_90a") as simulation:
        yield simulation


@pytest.fixture
def grouped(monkeypatch):
    """Plans are made anew, with so many heads in a group."""

    def group(heads):
        monkeypatch.setattr(Fa3Backward, "head_group", lambda problem, seqlen_q: heads)
        monkeypatch.setattr(plans, "PLANS", {})

    return group


@pytest.mark.parametrize("mask", MASKS)
def test_over_several_heads_under_a_right_bound_alone_and_where_tiles_take_turns(mask):
    config = Fa3Backward.configure(problem(**MASKS[mask]))
    assert config.longest_first == (mask in ("causal", "right"))
    assert Fa3Backward.configure(problem(**MASKS[mask], deterministic=True)).longest_first


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_first_tiles_of_a_group_of_heads_go_first(simulation, shape):
    seqlen_k, heads_kv, batches, group = shape
    order = key_tiles(simulation, Fa3Backward.configure(problem(window_right=0)), *shape)
    n_blocks, rows = -(-seqlen_k // 128), heads_kv * batches
    assert sorted(order) == sorted(itertools.product(range(n_blocks), range(heads_kv), range(batches)))
    groups = [range(first, min(first + group, rows)) for first in range(0, rows, group)]
    expected = [[n_block for n_block in range(n_blocks) for _ in members] for members in reversed(groups)]
    assert [n_block for n_block, _, _ in order] == list(itertools.chain(*expected))
    place = 0
    for members in reversed(groups):
        taken = order[place : place + n_blocks * len(members)]
        assert {batch * heads_kv + head for _, head, batch in taken} == set(members)
        place += len(taken)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_tiles_of_a_head_are_neighbours_without_one(simulation, shape):
    seqlen_k, heads_kv, batches, _ = shape
    order = key_tiles(simulation, Fa3Backward.configure(problem()), *shape[:3], None)
    sizes = range(batches), range(heads_kv), range(-(-seqlen_k // 128))
    assert order == [(n_block, head, batch) for batch, head, n_block in itertools.product(*sizes)]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_where_tiles_take_turns_the_last_ones_of_a_group_of_heads_go_first(simulation, mask, shape):
    """So that all that a tile waits for are begun before it."""
    _, heads_kv, batches, group = shape
    order = key_tiles(simulation, Fa3Backward.configure(problem(**MASKS[mask], deterministic=True)), *shape)
    n_blocks, rows = -(-shape[0] // 128), heads_kv * batches
    groups = [range(first, min(first + group, rows)) for first in range(0, rows, group)]
    place = 0
    for members in reversed(groups):
        for n_block in reversed(range(n_blocks)):
            taken = order[place : place + len(members)]
            assert sorted(taken) == sorted((n_block, row % heads_kv, row // heads_kv) for row in members)
            place += len(members)
    assert place == len(order)


@pytest.mark.parametrize(
    ("heads", "heads_kv", "head_dim", "seqlen", "group"),
    [
        # 64 % of 50 MiB; a row: Q and dO in 16 bits, dQ in fp32
        (16, 16, 128, 8192, 4),  # 8 MiB a head
        (16, 16, 128, 2048, 16),
        (16, 16, 64, 8192, 8),
        (16, 4, 128, 2048, 4),  # four query heads of 2 MiB each
        (2, 2, 128, 2**17, 1),
    ],
)
def test_as_many_heads_as_the_l2_holds(heads, heads_kv, head_dim, seqlen, group):
    asked = problem(
        num_heads=heads, num_heads_kv=heads_kv, head_dim=head_dim, head_dim_v=head_dim, seqlen_q=seqlen, window_right=0
    )
    assert Fa3Backward.head_group(asked, seqlen) == group


SPEC = InputSpec(2, 300, 500, 4, 2, 64, causal=True)
PACKED = {"varlen_q": True, "varlen_k": True, "lengths_q": (300, 0, 130, 40), "lengths_k": (500, 60, 290, 0)}
SPECS = {"dense": SPEC, "packed": InputSpec(4, 300, 500, 4, 2, 128, window=(None, 30), **PACKED)}


@pytest.mark.sampled
@pytest.mark.parametrize("heads", [1, 3, 1000])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_right_in_groups_of_any_size(spec, heads, grouped):
    """Grouped heads, packed sequences: one kv head at a time, three of four or eight, all."""
    grouped(heads)
    assert_right(spec, "peaked", **FA3, race=True)


@pytest.mark.thorough
@pytest.mark.parametrize("heads", [1, 3])
def test_deterministic_gradients_have_the_same_bits_on_any_number_of_sms(heads, grouped):
    """A tile that waited for one handed out later would wait for ever: the simulator says so."""
    first, expected = gradients_of(SPEC, "peaked", **FA3, deterministic=True)
    assert all(error.ok for error in expected.check(first).values())
    grouped(heads)
    for seed, sms in enumerate((1, 2, 3, 7)):
        with ctas_at_a_time(sms):
            other, _ = gradients_of(SPEC, "peaked", **FA3, deterministic=True, schedule_seed=seed)
        assert same_bits(first, other)
