"""Tile schedulers: every tile that exists once, in the promised order, however few CTAs there are."""

import itertools
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ptxsim
from cute_fa.device.tiling import MAX_TILES, dense_tiles, head_group, num_ctas, packed_tiles
from tests.testing.walk_kernel import TILE_TOKENS, walk

BOTH = (False, True)
SHAPES = [(1, 1, 1, 1), (3, 2, 3, 4), (5, 3, 2, 1), (2, 7, 1, 3), (4, 2, 2, 100), (1, 5, 5, 2), (4, 2, 1, 2**30)]


@pytest.fixture(scope="module")
def simulation():
    with ptxsim.simulate("sm_90a") as simulation:
        yield simulation


def rows_in_order(m_blocks, heads, group, longest_first, alternate, later=0):
    """(m_block, head) of all tiles in the promised order; ``later`` sequences with as many groups follow."""
    if not longest_first:
        return [(m_block, head) for head in range(heads) for m_block in range(m_blocks)]
    firsts = range(0, heads, group)
    rows = []
    for after in reversed(range(len(firsts))):  # groups of these heads that follow
        members = range(firsts[after], min(firsts[after] + group, heads))
        falling = not alternate or (after + later * len(firsts)) % 2 == 0
        blocks = range(m_blocks)[::-1] if falling else range(m_blocks)
        rows += [(m_block, head) for m_block in blocks for head in reversed(members)]
    return rows


def dense_order(shape, longest_first, persistent):
    m_blocks, heads, batches, group = shape
    rows = rows_in_order(m_blocks, heads * batches, group, longest_first, alternate=persistent)
    return [(m_block, row % heads, row // heads) for m_block, row in rows]


def packed_order(lengths, heads, group, longest_first, persistent):
    order = []
    for batch, length in enumerate(lengths):
        later = len(lengths) - 1 - batch
        rows = rows_in_order(-(-length // TILE_TOKENS), heads, group, longest_first, persistent, later)
        order += [(*row, batch) for row in rows]
    return order


def dealt(order, ctas, mirrored):
    """The tiles of each CTA: one of each turn, in odd turns from the back if ``mirrored``."""
    hands = [[] for _ in range(ctas)]
    for index, tile in enumerate(order):
        turn, place = divmod(index, ctas)
        hands[ctas - 1 - place if mirrored and turn % 2 else place].append(tile)
    return hands


def check_walk(simulation, grid, ctas, longest_first, persistent, lengths=None):
    """The CTAs walk over the expected tiles; gives these, CTA by CTA."""
    kind = {"longest_first": longest_first, "persistent": persistent}
    if lengths is None:
        order = dense_order(grid, **kind)
    else:
        order = packed_order(lengths, grid[1], grid[3], **kind)
    expected = dealt(order, ctas, mirrored=lengths is None)
    capacity = max(map(len, expected)) + 1
    assert walk(simulation, grid, ctas, capacity, lengths=lengths, **kind) == expected
    return expected


# ---- dense ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("longest_first", BOTH)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_one_cta_a_tile(simulation, shape, longest_first):
    tiles = shape[0] * shape[1] * shape[2]
    hands = check_walk(simulation, shape, tiles + 2, longest_first, persistent=False)
    assert [len(hand) for hand in hands] == [1] * tiles + [0, 0]


@pytest.mark.parametrize("longest_first", BOTH)
@pytest.mark.parametrize("ctas", [1, 4, 7, 40])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_persistent(simulation, shape, ctas, longest_first):
    check_walk(simulation, shape, ctas, longest_first, persistent=True)


@pytest.mark.parametrize("persistent", BOTH)
@pytest.mark.parametrize("longest_first", BOTH)
@pytest.mark.parametrize("shape", [(0, 3, 2, 1), (3, 0, 2, 1), (3, 2, 0, 1)], ids=str)
def test_no_tiles(simulation, shape, longest_first, persistent):
    assert check_walk(simulation, shape, 5, longest_first, persistent) == [[]] * 5


@pytest.mark.parametrize("shape", [(MAX_TILES, 1, 1, 1), (1, 1, MAX_TILES, 7), (46340, 20, 2317, 8)], ids=str)
@pytest.mark.parametrize("longest_first", BOTH)
def test_indices_up_to_the_limit(simulation, shape, longest_first):
    """The last two turns of a walk over some 2^31 tiles; the index of what would come next is beyond int32."""
    m_blocks, heads, batches, group = shape
    tiles, ctas = m_blocks * heads * batches, 6
    last_turn = (tiles - 1) // ctas

    def index_of(m_block, head, batch):
        row = batch * heads + head
        if not longest_first:
            return row * m_blocks + m_block
        after, first = row // group, row // group * group
        rows_after = m_block if after % 2 == 0 else m_blocks - 1 - m_block
        members = min(group, heads * batches - first)
        return tiles - 1 - (first * m_blocks + rows_after * members + row - first)

    def index_in(turn, cta):
        return turn * ctas + (ctas - 1 - cta if turn % 2 else cta)

    starts = [index_in(last_turn - 2, cta) for cta in range(ctas)]
    kind = {"longest_first": longest_first, "persistent": True}
    hands = walk(simulation, shape, ctas, 3, starts=starts, **kind)
    for cta, hand in enumerate(hands):
        indices = [index_in(turn, cta) for turn in (last_turn - 1, last_turn)]
        assert [index_of(*tile) for tile in hand] == [index for index in indices if index < tiles]
        assert all(0 <= m < m_blocks and 0 <= h < heads and 0 <= b < batches for m, h, b in hand)


# ---- packed ---------------------------------------------------------------------------------------

LENGTHS = {
    "one": [40],
    "one_empty": [0],
    "all_empty": [0] * 70,
    "empties_around": [0, 0, 17, 0, 33, 1, 0, 0, 0],
    "first_of_the_second_32": [0] * 32 + [20],
    "last_of_32_and_of_64": [0] * 31 + [16] + [0] * 31 + [15],
    "one_in_each_32": [20 * (batch % 32 == 5) for batch in range(100)],
    **{
        f"random_{batches}": random.Random(batches).choices([0, 1, 15, 16, 17, 32, 50], k=batches)
        for batches in (31, 32, 33, 100)
    },
}


@pytest.mark.parametrize("longest_first", BOTH)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_packed_one_cta_a_tile(simulation, lengths, longest_first):
    """The upper bound of CTAs is enough, and those beyond the tiles have none."""
    heads = 3
    ctas = max(1, packed_tiles(sum(lengths), TILE_TOKENS, heads, len(lengths)))
    grid = (0, heads, len(lengths), 2)
    hands = check_walk(simulation, grid, ctas, longest_first, persistent=False, lengths=lengths)
    assert all(len(hand) <= 1 for hand in hands)


@pytest.mark.parametrize("longest_first", BOTH)
@pytest.mark.parametrize("ctas", [1, 5, 64])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_packed_persistent(simulation, lengths, ctas, longest_first):
    check_walk(simulation, (0, 3, len(lengths), 2), ctas, longest_first, persistent=True, lengths=lengths)


def test_packed_no_sequences(simulation):
    assert check_walk(simulation, (0, 3, 0, 1), 2, True, True, lengths=[]) == [[], []]


@pytest.mark.parametrize("empty", BOTH)
def test_packed_walk_reads_the_lengths_once(simulation, empty):
    """Ten times the sequences in between, or before, cost a CTA ten times the scans of 32, and no more."""
    costs = []
    for batches in (320, 3200):
        lengths = [0] * (batches - 1) + [1] if empty else [1] * batches
        check_walk(simulation, (0, 1, batches, 1), 4, False, True, lengths=lengths)
        costs.append(simulation.launches[-1].warp_instrs)
    assert costs[1] <= 10 * costs[0]
    if empty:
        scans = 4 * 2 * 3200 / 32  # of 4 CTAs with two warps
        assert costs[1] < 80 * scans


def test_packed_indices_up_to_the_limit(simulation):
    """The last tiles of 33 sequences of one token and 65 million heads: 2^31 − 2, and what follows is beyond int32."""
    batches, ctas = 33, 4
    heads = MAX_TILES // batches
    tiles = batches * heads
    starts = [tiles - 2 * ctas + cta for cta in range(ctas)]
    kind = {"longest_first": False, "persistent": True, "lengths": [1] * batches}
    hands = walk(simulation, (0, heads, batches, 1), ctas, 2, starts=starts, **kind)
    assert hands == [[(0, heads - ctas + cta, batches - 1)] for cta in range(ctas)]


@pytest.mark.parametrize("longest_first", BOTH)
def test_packed_long_sequences(simulation, longest_first):
    """Two sequences of 2^30 − 1 tokens: the last tiles of the second."""
    heads, blocks = 15, 2**30 // TILE_TOKENS
    starts = [2 * blocks * heads - 6 + cta for cta in range(3)]
    kind = {"longest_first": longest_first, "persistent": True, "lengths": [2**30 - 1] * 2}
    hands = walk(simulation, (0, heads, 2, heads), 3, 2, starts=starts, **kind)
    if longest_first:
        assert hands == [[(0, head, 1)] for head in (2, 1, 0)]
    else:
        assert hands == [[(m_block, heads - 1, 1)] for m_block in range(blocks - 3, blocks)]


@pytest.mark.parametrize("persistent", BOTH)
@pytest.mark.parametrize("longest_first", BOTH)
@pytest.mark.parametrize("lengths", [None, [40, 0, 17, 100]], ids=["dense", "packed"])
def test_ctas_of_a_cluster_walk_together(simulation, lengths, longest_first, persistent):
    """Over the tiles of one CTA of half as many."""
    grid, kind = (4, 3, 4, 2), {"longest_first": longest_first, "persistent": persistent, "lengths": lengths}
    alone = walk(simulation, grid, 24, 48, **kind)
    assert len(set(map(tuple, alone))) > 20
    assert walk(simulation, grid, 48, 48, cluster=2, **kind) == [hand for hand in alone for _ in range(2)]


# ---- what the order is for ------------------------------------------------------------------------


@pytest.mark.parametrize("packed", BOTH)
@pytest.mark.parametrize("heads, group", [(7, 3), (4, 4), (5, 1), (3, 9)])
def test_longest_first_in_groups_of_heads(simulation, heads, group, packed):
    """A group holds a bounded number of heads, is never taken up again, and its m_block never increases."""
    m_blocks, batches = 4, 3
    lengths = [m_blocks * TILE_TOKENS] * batches if packed else None
    grid = (m_blocks, heads, batches, group)
    kind = {"longest_first": True, "persistent": False, "lengths": lengths}
    order = [tile for hand in walk(simulation, grid, m_blocks * heads * batches, 1, **kind) for tile in hand]
    groups = []  # a new one begins where m_block rises
    for tile in order:
        if not groups or tile[0] > groups[-1][-1][0]:
            groups.append([])
        groups[-1].append(tile)
    members = [{(head, batch) for _, head, batch in tiles} for tiles in groups]
    assert sum(map(len, members)) == heads * batches == len(set().union(*members))
    assert [len(tiles) for tiles in groups] == [m_blocks * len(rows) for rows in members]
    together, times = (heads, batches) if packed else (heads * batches, 1)
    sizes = [min(group, together - first) for first in range(0, together, group)] * times
    assert sorted(len(rows) for rows in members) == sorted(sizes)


@pytest.mark.parametrize("packed", BOTH)
def test_neighbours_share_a_head_without_a_right_bound(simulation, packed):
    m_blocks, heads, batches = 4, 3, 2
    lengths = [m_blocks * TILE_TOKENS] * batches if packed else None
    kind = {"longest_first": False, "persistent": False, "lengths": lengths}
    hands = walk(simulation, (m_blocks, heads, batches, 1), m_blocks * heads * batches, 1, **kind)
    rows = [hand[0][1:] for hand in hands]
    changes = sum(row != after for row, after in itertools.pairwise(rows))
    assert changes == heads * batches - 1


@pytest.mark.parametrize("grid, ctas", [((16, 8, 4, 6), 24), ((20, 4, 3, 4), 20), ((16, 12, 2, 4), 13)], ids=str)
def test_persistent_ctas_work_equally_long(simulation, grid, ctas):
    """Causal tiles of m_block + 1 key blocks: 10 to 19 % more than the mean if m_block fell in each group."""
    hands = walk(simulation, grid, ctas, 100, longest_first=True, persistent=True)
    work = [sum(m_block + 1 for m_block, _, _ in hand) for hand in hands]
    assert max(work) <= 1.025 * sum(work) / ctas


# ---- both -----------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_shape(simulation, data):
    """Dense and packed tiles in any number, for any number of CTAs, are dealt exactly as promised."""
    sizes = st.integers(1, 6)
    heads, group, ctas = data.draw(sizes), data.draw(st.integers(1, 40)), data.draw(st.integers(1, 30))
    longest_first, persistent = data.draw(st.booleans()), data.draw(st.booleans())
    lengths = data.draw(st.none() | st.lists(st.sampled_from([0, 0, 1, 16, 17, 48, 70]), min_size=1, max_size=70))
    grid = (data.draw(sizes), heads, data.draw(sizes) if lengths is None else len(lengths), group)
    if not persistent:
        blocks = grid[0] * grid[2] if lengths is None else sum(-(-length // TILE_TOKENS) for length in lengths)
        ctas += blocks * heads
    check_walk(simulation, grid, ctas, longest_first, persistent, lengths)


# ---- the host's side ------------------------------------------------------------------------------


def test_numbers_of_tiles():
    assert dense_tiles(seqlen_q=257, tile_tokens=128, heads=5, batches=2) == 30
    assert dense_tiles(seqlen_q=0, tile_tokens=128, heads=5, batches=2) == 0
    assert num_ctas(30, num_sms=132, persistent=True) == 30
    assert num_ctas(1000, num_sms=132, persistent=True) == 132
    assert num_ctas(1000, num_sms=132, persistent=False) == 1000


@given(lengths=st.lists(st.integers(0, 300), max_size=40), tile=st.integers(1, 130), heads=st.integers(1, 5))
def test_bound_of_packed_tiles(lengths, tile, heads):
    """Never below the tiles; reached by sequences of one token more than whole tiles; no tile without a token."""

    def tiles(lengths):
        return sum(-(-length // tile) for length in lengths) * heads

    bound = packed_tiles(sum(lengths), tile, heads, len(lengths))
    assert tiles(lengths) <= bound
    assert bound <= tiles(lengths) + len(lengths) * heads
    worst = [length // tile * tile + 1 for length in lengths]
    assert packed_tiles(sum(worst), tile, heads, len(worst)) == tiles(worst)
    assert packed_tiles(0, tile, heads, len(lengths)) == 0


def test_head_group():
    l2 = 50 * 2**20  # of which K and V get 32 MiB
    head = 4096 * (128 + 128) * 2  # 2 MiB
    assert head_group(head, l2) == 16
    assert head_group(head + 1, l2) == 15
    assert head_group(head, l2, heads_per_kv=4) == 64
    assert head_group(100 * head, l2) == 1
    assert head_group(100 * head, l2, heads_per_kv=4) == 4
    assert head_group(0, 2**30, heads_per_kv=64) == MAX_TILES
