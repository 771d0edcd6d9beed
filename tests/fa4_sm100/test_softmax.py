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
from cute_fa.tools.inputs import InputSpec, make_inputs
from fa4_sm100.forward.entry import Fa4Forward
from tests.testing.scores import scored, spikes, visits
from tests.testing.tiled_forward import Forward

B200, B300 = (Forward(Fa4Forward, arch) for arch in (SmArch.SM_100A, SmArch.SM_103A))
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


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [*((shape, DType.FP16) for shape in SHAPES), ("two tiles", DType.BF16), ("one tile, 96 keys", DType.BF16)],
)
def test_spikes_in_every_place_that_needs_a_look(shape, dtype):
    (head_dim, head_dim_v), queries, tiles = SHAPES[shape]
    spec = InputSpec(1, queries, 1024, 1, 1, head_dim, head_dim_v, dtype)
    config = B200.config_of(spec)
    assert (config.q_tiles, config.tile_n, config.ctas) == tiles and config.emulated == 8
    schedule = SCHEDULES[list(SHAPES).index(shape) % len(SCHEDULES)]
    B200.check(spikes(config, spec), **schedule)


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


@pytest.mark.parametrize(
    "features", [{"alibi": True}, {"softcap": 8000.0}, {"alibi": True, "softcap": 8000.0}], ids=str
)
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
    _, lse = B200.check(given)
    assert abs(lse[0, 0, 0] / math.log(2) - level - 8) < 2  # of 256 keys


def test_packed_heads_that_see_their_first_key_in_a_block_without_a_mask():
    """All heads of a token, and the same rows of the second tile where a token's heads end before the tile does."""
    tokens = 2 * 42
    spec = InputSpec(1, tokens, 3 * 128 + tokens - 1, 3, 1, 64, causal=True, softmax_scale=20.0)
    B200.run(spec, "random", pack_gqa=True)


@pytest.mark.parametrize("depth", [100.0, 126.0, 150.0, 1000.0, 2.0**15])
@pytest.mark.parametrize("forward", [B200, B300], ids=lambda forward: forward.arch.value)
def test_scores_far_below_the_reference(forward, depth):
    """They count for nothing: they are not what 8 bits of an exponent make of them."""
    depths = depth * (visits(forward.config_of(InputSpec(1, 200, 500, 1, 1)), 500) > 0)
    given = scored([(-torch.ones(200), depths)], noise=0.25)
    forward.check(given)
    few = dataclasses.replace(given, k=given.k[:, -116:].contiguous(), v=given.v[:, -116:].contiguous())
    if depth > 100:
        assert all(torch.equal(*pair) for pair in zip(forward.launch(given)[:2], forward.launch(few)[:2], strict=True))


@pytest.mark.parametrize(("dtype", "largest"), [(DType.BF16, 1.75 * 2.0**29), (DType.FP16, 0.99 * 2.0**27)])
def test_scores_beyond_the_digits_of_fp32(dtype, largest):
    """From 2^24 on 1 is no digit of a score in log2 units, from 2^27 on 8 is none; each query sees its best key alone,
    whose P may then be as small as 2^-8, or 2^-32, of which fp16 has no digits."""
    given = make_inputs(InputSpec(1, 200, 700, 1, 1, 64, dtype=dtype), "random")
    products = torch.einsum("bqhd,bkhd->bhqk", given.q.double(), given.k.double())
    scale = largest * math.log(2) / products.max().item()
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
    rows[::32] = torch.tensor([7.5, 8.25, 8.5, 9.0, 12.0, 14.75, 15.25, 16.0])
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
