"""The FA4 forward's softmax, which looks for a row's maximum only where its sums or largest scores say that it must:
scores that outgrow the reference, in all places that need a look of their own; scores far below, beyond fp32, NaN."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from cute_fa.semantics.problem import LiteralWindow
from cute_fa.semantics.reference import expected
from cute_fa.semantics.types import DType, SmArch
from cute_fa.tools.inputs import Inputs, InputSpec, make_inputs
from fa4_sm100.forward.config import SCORE_CHUNK
from fa4_sm100.forward.entry import Fa4Forward
from tests.testing.tiled_forward import Forward

B200, B300 = (Forward(Fa4Forward, arch) for arch in (SmArch.SM_100A, SmArch.SM_103A))
WARP = 32
# By dtype how far a score may grow beyond the reference until P, or what emulates it, is wrong: fp16 ends at 2^16, fp32
# and bf16 at 2^128, and what is shifted into an exponent's 8 bits comes round at 2^512.
GROWTHS = {DType.FP16: (16.5, 17.0, 40.0, 15.5, 14.5), DType.BF16: (130.0, 512.0, 256.0, 384.0, 20.0, 140.0)}
# (head_dim, head_dim_v), queries, and the config's (q_tiles, tile_n, ctas).
SHAPES = {
    "two tiles": ((64, 64), 256, (2, 128, 1)),
    "two tiles, 96 keys": ((192, 128), 256, (2, 96, 1)),
    "two tiles, 64 keys": ((256, 64), 256, (2, 64, 1)),
    "one tile": ((96, 40), 100, (1, 128, 1)),
    "one tile, 96 keys": ((256, 248), 128, (1, 96, 1)),
    "a pair": ((256, 256), 256, (1, 128, 2)),
    "a pair with two tiles each": ((128, 128), 512, (2, 128, 2)),
}
SCHEDULES = [{}, {"late": True, "schedule_seed": 1}, {"schedule_seed": 2}, {"late": True}]


def scored(terms: list[tuple[torch.Tensor, torch.Tensor]], noise: float = 0.5, **spec) -> Inputs:
    """One head whose scores in log2 units are Σ a[query]·b[key] of the ``terms`` (a, b), and noise of that size."""
    queries, keys = (len(side) for side in terms[0])
    spec = InputSpec(1, queries, keys, 1, 1, softmax_scale=math.log(2), **{"head_dim": 64, **spec})
    given = make_inputs(spec)
    q, k = given.q.clone(), given.k * (noise / math.sqrt(spec.head_dim))
    for column, (of_query, of_key) in enumerate(terms):
        q[0, :, 0, column], k[0, :, 0, column] = of_query, of_key
    return dataclasses.replace(given, q=q, k=k.to(given.k.dtype))


def visits(config, seqlen_k: int) -> torch.Tensor:
    """How many blocks are visited before a key's, from the last one on."""
    block = torch.arange(seqlen_k) // config.tile_n
    return block.max() - block


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", GROWTHS)
def test_spikes_in_every_place_that_needs_a_look(shape, dtype):
    """In each block behind the first one key stands out, another one for each warp, and for one of its rows alone: in
    the last columns of the block, which are not summed before they are asked about, in emulated ones, and elsewhere."""
    (head_dim, head_dim_v), queries, tiles = SHAPES[shape]
    sizes = dict(head_dim=head_dim, head_dim_v=head_dim_v, dtype=dtype)
    c = B200.config_of(InputSpec(1, queries, 1024, 1, 1, **sizes))
    assert (c.q_tiles, c.tile_n, c.ctas) == tiles and c.emulated == 8
    warps = -(-queries // WARP)
    blocks = min(10, 1 + (head_dim - 8) // warps)
    seqlen_k = blocks * c.tile_n - 3  # the first block has an edge
    columns = [c.tile_n - 1, 6, c.tile_n - SCORE_CHUNK, 0, SCORE_CHUNK + 31, c.tile_n - 20, 14, SCORE_CHUNK - 1, 17]
    columns = [column % c.tile_n for column in columns]
    growths = GROWTHS[dtype]
    terms = []
    for place in range((blocks - 1) * warps):
        block, warp = divmod(place, warps)
        of_query, of_key = torch.zeros(queries), torch.zeros(seqlen_k)
        of_query[(warp * WARP + (7 * block + 3) % WARP) % queries] = growths[place % len(growths)]
        of_key[block * c.tile_n + columns[(block + warp) % len(columns)]] = 1.0
        terms.append((of_query, of_key))
    schedule = SCHEDULES[list(SHAPES).index(shape) % len(SCHEDULES)]
    B200.check(scored(terms, **sizes), **schedule)


@pytest.mark.parametrize("forward", [B200, B300], ids=lambda forward: forward.arch.value)
@pytest.mark.parametrize(("dtype", "growth"), [(DType.FP16, 17.0), (DType.BF16, 140.0), (DType.BF16, 600.0)])
def test_scores_that_outgrow_the_reference_in_every_block(forward, dtype, growth):
    """In all rows, in one row of a warp alone, and in rows whose scores fall as fast."""
    rows = torch.ones(256)
    rows[64:96], rows[128:192], rows[200], rows[224:] = 0.0, -1.0, 0.5, 0.0
    rows[71], rows[231] = 1.0, -1.0
    blocks = visits(forward.config_of(InputSpec(1, 256, 600, 1, 1)), 600)
    forward.check(scored([(rows, growth * blocks)], dtype=dtype), late=True, schedule_seed=3)


@pytest.mark.parametrize("head_dims", [(256, 256), (40, 200)])
def test_they_do_so_with_one_tile_of_queries(head_dims):
    """O is rescaled where the scores of the next block are no sign that it is complete."""
    spec = dict(head_dim=head_dims[0], head_dim_v=head_dims[1], dtype=DType.FP16)
    config = B200.config_of(InputSpec(1, 100, 600, 1, 1, **spec))
    assert config.q_tiles == 1 and config.ctas == 1
    given = scored([(torch.ones(100), 17.0 * visits(config, 600))], **spec)
    for schedule in SCHEDULES:
        B200.check(given, **schedule)


@pytest.mark.parametrize("features", [{"alibi": True}, {"softcap": 8000.0}, {"alibi": True, "softcap": 8000.0}], ids=str)
def test_they_do_so_by_a_bias_and_under_a_cap(features):
    """What is looked at and what is summed are scores of the formula, not of Q·Kᵀ."""
    given = scored([(torch.ones(200), 30.0 * visits(B200.config_of(InputSpec(1, 200, 700, 1, 1)), 700))], **features)
    if given.alibi_slopes is not None:  # the last blocks are the farthest from the first queries
        given = dataclasses.replace(given, alibi_slopes=torch.tensor([1.0]), k=0.1 * given.k)
    B200.check(given, late=True)


@pytest.mark.parametrize("level", [-1000.0, 1000.0, 3.0])
@pytest.mark.parametrize("right", [0, -5])
def test_rows_that_see_their_first_key_in_a_block_without_a_mask(level, right):
    """The last block that all queries of the tile see ends with the last key that the first query sees."""
    seqlen_k = 2 * 128 + 255 - right
    first = torch.zeros(256)
    first[0] = level
    given = scored([(first, torch.ones(seqlen_k))], window=LiteralWindow(None, right))
    out, lse = B200.check(given)
    assert abs(lse[0, 0, 0] / math.log(2) - level - 8) < 2  # of 256 keys


def test_packed_heads_that_see_their_first_key_in_a_block_without_a_mask():
    """All heads of a token, and the same rows of the second tile where a token's heads end before the tile does."""
    tokens = 2 * 42
    spec = InputSpec(1, tokens, 3 * 128 + tokens - 1, 3, 1, 64, causal=True, softmax_scale=20.0)
    B200.run(spec, "random", pack_gqa=True)


@pytest.mark.parametrize("depth", [100.0, 126.0, 150.0, 1000.0, 2.0**15])
@pytest.mark.parametrize("forward", [B200, B300], ids=lambda forward: forward.arch.value)
def test_scores_far_below_the_reference(forward, depth):
    """They count for nothing: not as 2^-127 would beside rows of −inf, nor as what an exponent of 8 bits makes of it."""
    depths = depth * (visits(forward.config_of(InputSpec(1, 200, 500, 1, 1)), 500) > 0)
    given = scored([(-torch.ones(200), depths)], noise=0.25)
    forward.check(given)
    few = dataclasses.replace(given, k=given.k[:, -116:].contiguous(), v=given.v[:, -116:].contiguous())
    if depth > 100:
        assert all(torch.equal(*pair) for pair in zip(forward.launch(given)[:2], forward.launch(few)[:2], strict=True))


@pytest.mark.parametrize("dtype", [DType.BF16, DType.FP16])
def test_scores_beyond_the_digits_of_fp32(dtype):
    """From 2^24 on 1 is no digit of a score in log2 units, from 2^27 on 8 is none; each query sees its best key alone,
    whose P may be any power of 2 up to 2^8."""
    given = make_inputs(InputSpec(1, 200, 700, 1, 1, 64, dtype=dtype), "random")
    products = torch.einsum("bqhd,bkhd->bhqk", given.q.double(), given.k.double())
    scale = 1.75 * 2.0**27 * math.log(2) / products.max().item()
    given = dataclasses.replace(given, spec=dataclasses.replace(given.spec, softmax_scale=scale))
    out, lse, _ = B200.launch(given)
    torch.testing.assert_close(lse.double(), scale * products.amax(-1), rtol=1e-6, atol=0.0)
    rounding = torch.finfo(out.dtype).eps  # of P and of O
    torch.testing.assert_close(out[0], given.v[0, products[0, 0].argmax(-1)], rtol=rounding, atol=0.0)


@pytest.mark.parametrize("key", [130, 134, 200, 252, 5, 690])
def test_nan_in_one_key_stays_in_the_rows_that_see_it(key):
    """In the last columns of a block, in emulated ones and in others, of blocks with and without a mask."""
    spec = InputSpec(1, 300, 700, 1, 1, 64, causal=True)
    given = make_inputs(spec, "random")
    k = given.k.clone()
    k[0, key] = math.nan
    out, lse, _ = B200.launch(dataclasses.replace(given, k=k), late=True)
    sees = torch.arange(300) + 400 >= key
    assert out[0, sees].isnan().all() and lse[0, 0, sees].isnan().all()
    clean = expected(given.q, given.k, given.v, **given.options())
    out[0, sees], lse[0, 0, sees] = clean.out[0, sees].to(out.dtype), clean.lse[0, 0, sees]
    result = clean.check(out, lse)
    assert result.ok, result


def test_fp16_sums_near_the_limit():
    """Rows whose every score exceeds the reference by as much, in one block or in all, so that sums end on both sides
    of 2^15 and P on both sides of 2^16."""
    rows = torch.zeros(256)
    rows[::WARP] = torch.tensor([7.5, 8.25, 8.5, 9.0, 12.0, 14.75, 15.25, 16.0])
    blocks = visits(B200.config_of(InputSpec(1, 256, 500, 1, 1)), 500)
    for steps in (blocks, (blocks == 2).float()):
        B200.check(scored([(rows, steps)], noise=0.0625, dtype=DType.FP16))


def test_ordinary_scores_never_take_the_slow_way():
    """Warp instructions are those of scores that are all alike, however the scores vary below 2^15."""
    plain, wavy, grown = (
        B200.launch(scored([(torch.ones(256), level * visits(B200.config_of(InputSpec(1, 256, 1100, 1, 1)), 1100))]))
        for level in (0.0, 0.75, 2.0)
    )
    counts = [simulation.launches[-1].warp_instrs for _, _, simulation in (plain, wavy, grown)]
    assert counts[0] == counts[1] < counts[2]
