"""How key blocks are cut between CTAs, from lengths that only the device knows, beside a cut of the whole line."""

import dataclasses
import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import cute_fa
from cute_fa.engine.contract import AttentionTensors
from cute_fa.semantics.call import Call
from cute_fa.semantics.tensors import problem_of
from cute_fa.semantics.types import SmArch
from fa2_sm80.split.entry import Fa2Split
from tests.testing.split_shares import shares

TILE_N, HEADS_KV, GQA_RATIO = 64, 2, 3
LONGEST = 1500
# Of more sequences than a warp has lanes, too; most are short, and some have no keys.
LENGTHS = st.lists(st.one_of(st.integers(0, 70), st.integers(0, LONGEST)), min_size=1, max_size=70)
SETTINGS = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}


@pytest.fixture(scope="module")
def simulation():
    with cute_fa.simulate("sm_80") as simulated:
        yield simulated


def launch_of(lengths: list[int], seqlen_q: int, num_sms: int, splits: int, causal: bool):
    """(config, launch) of a cache; ``causal``: also with lengths of queries, so that tiles differ in their blocks."""
    batch = len(lengths)
    q = torch.empty((batch, seqlen_q, HEADS_KV * GQA_RATIO, 8), dtype=torch.bfloat16)
    k = torch.empty((batch, LONGEST, HEADS_KV, 8), dtype=torch.bfloat16)
    fields = {"seqused_k": torch.tensor(lengths, dtype=torch.int32), "num_splits": splits}
    fields |= {"max_seqlen_q": seqlen_q, "max_seqlen_k": LONGEST}
    if causal:
        used_q = [length % (seqlen_q + 1) for length in lengths]
        fields |= {"window_right": 0, "seqused_q": torch.tensor(used_q, dtype=torch.int32)}
    call = Call.made(q, k, k, **fields)
    problem = dataclasses.replace(problem_of(SmArch.SM_80, call), num_splits=splits)
    config = Fa2Split.configure(problem)
    lse = torch.empty(call.lse_shape)
    tensors = AttentionTensors(q, k, k, torch.empty_like(q), lse, call.extras)
    memory = Fa2Split.scratch(problem, config, tensors, num_sms)
    scratch = tuple(torch.empty(of.shape, dtype=of.dtype) for of in memory)
    return config, Fa2Split.arguments(problem, config, tensors._replace(scratch=scratch), num_sms)


def line_of(lengths: list[int], seqlen_q: int, tile_m: int, causal: bool) -> list[tuple[int, int, int, int]]:
    """(sequence, kv head, tile, key blocks) in the line's order; a tile that sees no key has a block that is hidden."""
    tiles = []
    for batch, length in enumerate(lengths):
        used_q = length % (seqlen_q + 1) if causal else seqlen_q
        of_head = []
        for first_row in range(0, seqlen_q * GQA_RATIO, tile_m):
            last_query = min((first_row + tile_m - 1) // GQA_RATIO, used_q - 1)
            sees = length if first_row // GQA_RATIO < used_q else 0
            if causal and sees:
                sees = min(length, last_query + 1 + length - used_q)
            of_head.append(max(1, -(-sees // TILE_N)))
        tiles += [(batch, head, tile, n) for head in range(HEADS_KV) for tile, n in enumerate(of_head)]
    return tiles


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("seqlen_q", [1, 90])
@given(lengths=LENGTHS, num_sms=st.integers(1, 60))
@settings(max_examples=25, **SETTINGS)
def test_an_even_cut(simulation, seqlen_q, causal, lengths, num_sms):
    config, launch = launch_of(lengths, seqlen_q, num_sms, 0, causal)
    line = line_of(lengths, seqlen_q, config.tile_m, causal)
    blocks = [(*tile, block) for *tile, count in line for block in range(count)]
    found = shares(simulation, config, launch, len(line))
    # every block once, in the line's order, from the first CTA on
    assert [(*s[1:4], block) for s in found for block in range(s.start, s.stop)] == blocks
    assert [s.cta for s in found] == sorted(s.cta for s in found)
    of_cta = [sum(s.stop - s.start for s in found if s.cta == cta) for cta in range(launch.grid.ctas)]
    busy = min(launch.grid.ctas, -(-len(blocks) // config.least_blocks))
    assert set(of_cta[busy:]) <= {0} and max(of_cta) - min(of_cta[:busy]) <= 1
    counts = {tuple(tile): count for *tile, count in line}
    assert all(s.whole == (s.stop - s.start == counts[s[1:4]]) for s in found)
    # the parts of a tile lie in one slot of each of neighbouring CTAs: of the first its second, of the others the first
    parts = [s for s in found if not s.whole]
    for _, of_tile in itertools.groupby(parts, lambda s: s[1:4]):
        first, *others = of_tile
        assert first.slot == 2 * first.cta + 1 and others
        assert [s.slot for s in others] == [2 * (first.cta + i) for i in range(1, len(others) + 1)]
    assert all(s.slot < launch.parts.lse.shape[0] for s in parts)


@pytest.mark.parametrize("causal", [False, True])
@given(lengths=LENGTHS, splits=st.integers(1, 7))
@settings(max_examples=25, **SETTINGS)
def test_parts(simulation, causal, lengths, splits):
    """Of equally many blocks, but for the last ones that have any; a CTA and a slot each."""
    config, launch = launch_of(lengths, 90, 108, splits, causal)
    expected = [
        (*tile, min(count, part * -(-count // splits)), min(count, (part + 1) * -(-count // splits)))
        for *tile, count in line_of(lengths, 90, config.tile_m, causal)
        for part in range(splits)
    ]
    found = shares(simulation, config, launch, 1)
    assert [s[1:6] for s in found] == expected
    assert [s.cta for s in found] == [s.slot for s in found] == list(range(len(expected)))
    assert all(s.whole == (splits == 1) for s in found)
