"""The heuristic of the FA4 forward: every pair of head_dims fits; pipelines are data; names tell configs apart."""

import dataclasses
import itertools
import math
from typing import ClassVar

import pytest

from cute_fa.device.pipeline_spec import HANDOUT_STAGES, RESPONSE_BYTES, PipelineSpec
from cute_fa.semantics.problem import PAGE_SIZES, AttentionProblem
from cute_fa.semantics.types import DType, PersistentMode, SmArch
from fa4_sm100.forward.config import BARRIER_BYTES, SCORE_CHUNK, TILE_M
from fa4_sm100.forward.entry import Fa4Forward
from tests.testing.cases import refusals, small_problem
from tests.testing.config_tests import ConfigTests
from tests.testing.tiled_forward import Forward

REGISTERS = 65536  # of an SM
TENSOR_COLUMNS = 512


def problem(**changes) -> AttentionProblem:
    return small_problem(**{"arch": SmArch.SM_100A, "seqlen_q": 4096, "seqlen_k": 4096, **changes})


def configure(**changes):
    return Fa4Forward.configure(problem(**changes))


MASKS = [{}, {"window_right": 0}]
OTHERS = [{}, {"page_size": 8}, {"page_size": 128}, {"persistent": PersistentMode.OFF}, {"seqlen_q": 100}]


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("change", OTHERS, ids=str)
@pytest.mark.parametrize("dtype", [DType.BF16, DType.E4M3])
def test_every_pair_of_head_dims_fits(dtype, change, mask):
    step = 8 if dtype is DType.BF16 else 16
    head_dims = range(step, 257, step)
    for head_dim, head_dim_v in itertools.product(head_dims, head_dims):
        asked = problem(head_dim=head_dim, head_dim_v=head_dim_v, dtype=dtype, **change, **mask)
        assert Fa4Forward.supports(asked) == []
        holds_what_it_needs(Fa4Forward.configure(asked))


def holds_what_it_needs(c) -> None:
    """Tiles, shared memory, tensor memory and registers within the hardware's limits."""
    size, k_step = c.dtype.bytes, 32 // c.dtype.bytes
    for dim, padded in ((c.head_dim, c.head_dim_padded), (c.head_dim_v, c.value_columns * c.ctas)):
        assert dim <= padded < dim + k_step and padded % k_step == 0
    assert c.head_dim_v <= c.head_dim_v_padded < c.head_dim_v + 16 and c.head_dim_v_padded % 16 == 0
    # of n tcgen05.mma takes multiples of 16 up to 256, of 32 in pairs
    for n in (c.tile_n, c.head_dim_v_padded):
        assert n % (16 * c.ctas) == 0 and n <= 256
    assert c.tile_n % SCORE_CHUNK == 0 and c.tile_n >= 2 * SCORE_CHUNK
    # a panel is as wide as a swizzle pattern: 32, 64 or 128 bytes, of which rows are a multiple
    assert c.value_columns * size % 32 == 0 and c.head_dim_padded * size % 32 == 0

    q, o = TILE_M * c.head_dim_padded * size, TILE_M * min(c.head_dim_v_padded, 128) * c.out_dtype.bytes
    k, v = c.tile_n // c.ctas * c.head_dim_padded * size, c.tile_n * c.value_columns * size
    assert (c.k_bytes, c.v_bytes, c.o_bytes) == (k, v, o) and c.stage_bytes >= max(k, v)
    # every tile starts at a swizzle atom of 1024 bytes
    assert c.q_bytes % 1024 == c.stage_bytes % 1024 == o % 1024 == 0
    needed = c.q_tiles * max(q, o) + c.stages * c.stage_bytes + c.q_tiles * TILE_M * 8 + BARRIER_BYTES
    needed += o if c.own_output else 0
    assert needed == c.smem_bytes <= c.arch.smem_bytes
    barriers = 8 * 2 * sum(spec.stages for spec in c.pipelines)
    assert barriers + 16 * HANDOUT_STAGES + 16 <= BARRIER_BYTES

    # two buffers of scores and O of each tile, none over another; P in the half of its scores that is read first
    columns = 2 * c.tile_n + c.q_tiles * c.head_dim_v_padded
    assert 32 <= columns <= c.tensor_columns <= TENSOR_COLUMNS and c.tensor_columns.bit_count() == 1
    assert c.output_column == 2 * c.score_columns >= 2 * c.tile_n
    assert c.probability_column + c.tile_n * size // 4 <= c.score_columns

    softmax, epilogue, others = c.registers
    assert 128 * (c.q_tiles * softmax + epilogue + others) <= REGISTERS
    assert all(count % 8 == 0 and 24 <= count <= 256 for count in c.registers)  # what setmaxnreg takes
    assert c.num_threads == 128 * (c.q_tiles + 2)
    assert c.page_size is None or c.key_rows == math.gcd(c.page_size, c.tile_n // c.ctas) >= min(c.page_size, 32)
    assert c.tile_n // c.ctas // c.key_rows <= 32  # each lane of the loader looks one page up


@pytest.mark.parametrize(
    ("dtype", "queries", "stages"), [(DType.BF16, 4096, {3, 4, 6, 8}), (DType.E4M3, 4096, {4, 6, 8})]
)
def test_all_counts_of_stages_occur(dtype, queries, stages):
    """Those of SHAPES in test_tiles.py are among them."""
    step = 8 if dtype is DType.BF16 else 16
    head_dims = range(step, 257, step)
    found = {
        configure(dtype=dtype, head_dim=head_dim, head_dim_v=head_dim_v, seqlen_q=queries).stages
        for head_dim, head_dim_v in itertools.product(head_dims, head_dims)
    }
    assert found == stages


def test_pipelines_are_data():
    assert configure(head_dim=64, head_dim_v=64).pipelines == (
        PipelineSpec("q0", 1, 128 * 64 * 2, 1),
        PipelineSpec("q1", 1, 128 * 64 * 2, 1),
        PipelineSpec("kv", 8, 128 * 64 * 2, 1),
        PipelineSpec("s", 2, 0, 4),
        PipelineSpec("p", 2, 0, 1, 4),
        PipelineSpec("o", 2, 0, 4),
        PipelineSpec("stats", 2, 0, 4, 4),
        # two softmax warpgroups, the epilogue's, and the load, MMA and scheduler warps
        PipelineSpec("tiles", HANDOUT_STAGES, RESPONSE_BYTES, 15),
    )
    pair = {spec.name: spec for spec in configure(head_dim=256, head_dim_v=256).pipelines}
    assert pair["kv"].stage_bytes == 64 * 256 * 2  # half of a block's keys
    assert pair["s"] == PipelineSpec("s", 2, 0, 8, shared=True)  # the softmax warps of both CTAs
    assert pair["o"].shared and pair["p"].shared and not pair["stats"].shared
    # the softmax, epilogue, load and MMA warps of both CTAs, and the scheduler of one
    assert pair["tiles"] == PipelineSpec("tiles", HANDOUT_STAGES, RESPONSE_BYTES, 21, shared=True)
    packed = configure(num_heads=7, num_heads_kv=1, pack_gqa=True)
    # TMA brings 18 tokens of 7 heads to 128 rows
    assert {spec.stage_bytes for spec in packed.pipelines if spec.name in ("q0", "q1")} == {126 * 64 * 2}


@pytest.mark.parametrize("page_size", [size for size in PAGE_SIZES if size >= 8])
@pytest.mark.parametrize("head_dim", [8, 64, 128, 192, 256])
def test_boxes_of_pages_are_swizzle_atoms(page_size, head_dim):
    c = configure(head_dim=head_dim, head_dim_v=head_dim, page_size=page_size)
    assert c.key_rows % 8 == 0 and c.key_rows >= min(page_size, 64 if page_size > 32 else 32)


@pytest.mark.parametrize(
    ("seqlen_q", "ratio", "packed"),
    [
        (1, 8, True),  # decoding: 8 of 128 rows instead of 1
        (1, 128, True),
        (1, 129, False),  # more heads than a tile has rows
        (1, 1, False),
        (4096, 8, False),  # 16 tiles of 256: nothing to gain
        (4096, 7, False),  # and 2 rows of 128 to lose
        (150, 4, True),  # 600 of 768 rows against 150 of 256
    ],
)
def test_heads_are_packed_where_that_fills_tiles(seqlen_q, ratio, packed):
    heads = dict(num_heads=ratio * 2, num_heads_kv=2)
    assert configure(seqlen_q=seqlen_q, **heads).pack_gqa == (ratio if packed else 1)
    if 1 < ratio <= TILE_M:
        assert configure(seqlen_q=seqlen_q, pack_gqa=True, **heads).pack_gqa == ratio
    assert configure(seqlen_q=seqlen_q, pack_gqa=False, **heads).pack_gqa == 1


@pytest.mark.parametrize("ratio", range(1, 129))
def test_rows_of_a_packed_tile(ratio):
    c = configure(num_heads=ratio, num_heads_kv=1, pack_gqa=True)
    assert c.tokens >= 1 and c.tokens * c.pack_gqa <= TILE_M < (c.tokens + 1) * c.pack_gqa
    assert c.tile_tokens == c.q_tiles * c.ctas * c.tokens


class TestNames(ConfigTests):
    forward = Forward(Fa4Forward, SmArch.SM_100A)
    prefix = "fa4_fwd_sm100a"
    too_many: ClassVar = ({"num_heads": 258, "pack_gqa": True}, "gqa_ratio 129")


def test_a_b300_computes_all_exponentials_by_mufu():
    here, there = configure(), configure(arch=SmArch.SM_103A)
    assert dataclasses.replace(there, arch=here.arch, emulated=here.emulated) == here
    assert (here.emulated, there.emulated) == (8, 0)
    assert there.compile_name == "fa4_fwd_sm103a_bf16_hd64"


@pytest.mark.parametrize(
    ("change", "tiles"),
    [
        ({}, (2, 128, 8, 1)),
        ({"head_dim": 128, "head_dim_v": 128}, (2, 128, 8, 2)),
        ({"head_dim": 128, "head_dim_v": 128, "window_right": 0}, (2, 128, 4, 1)),
        ({"head_dim": 128, "head_dim_v": 128, "seqlen_q": 256}, (2, 128, 4, 1)),
        ({"head_dim": 128, "head_dim_v": 128, "seqlen_q": 100}, (1, 128, 6, 1)),
        ({"head_dim": 192, "head_dim_v": 128}, (2, 128, 4, 2)),
        ({"head_dim": 192, "head_dim_v": 128, "window_right": 0}, (2, 96, 3, 1)),
        ({"head_dim": 256, "head_dim_v": 256}, (1, 128, 4, 2)),
        ({"head_dim": 256, "head_dim_v": 256, "persistent": PersistentMode.OFF}, (1, 96, 3, 1)),
        ({"head_dim": 256, "head_dim_v": 64, "window_right": 0}, (2, 64, 3, 1)),
        ({"head_dim": 256, "head_dim_v": 256, "dtype": DType.E4M3}, (1, 128, 8, 2)),
        ({"dtype": DType.E4M3, "v_layout": "key_major", "head_dim": 128, "head_dim_v": 128}, (2, 128, 8, 1)),
    ],
)
def test_tiles(change, tiles):
    """Tiles of queries, keys of a block, stages, CTAs."""
    c = configure(**change)
    assert (c.q_tiles, c.tile_n, c.stages, c.ctas) == tiles


def distinct(change: dict) -> list[str]:
    return list(dict.fromkeys(refusals(Fa4Forward, problem(**change))))


SMALL = "pairs: at head_dim 64 exponentials take longer than shared memory as it is"


K_DESCALES = ("q_descale", "k_descale", "k_block_descale")


def smem(used: int) -> str:
    return f"shared memory: {used:,} bytes of Q, K, V, O and barriers, 232,448 available"


@pytest.mark.parametrize(
    ("change", "reasons"),
    [
        ({}, [SMALL]),
        ({"persistent": PersistentMode.OFF}, ["pairs walk over tiles"]),
        (
            {"seqlen_q": 100},
            [f"100 queries of 1 heads fill half of {rows} rows at most" for rows in (512, 256)],
        ),
        ({"head_dim": 128, "head_dim_v": 128}, []),
        (
            {"head_dim": 128, "head_dim_v": 128, "window_right": 0},
            [
                "pairs: tiles of 512 queries meet more masked blocks under a window or causal than those of 256",
                # 2·128 rows of Q and 8 or 6 blocks of 128 keys, of 256 bytes, 2·128·8 of sums, 1024 of barriers
                smem(2 * 32768 + 8 * 32768 + 2048 + 1024),
                smem(2 * 32768 + 6 * 32768 + 2048 + 1024),
            ],
        ),
        (
            {"head_dim": 128, "head_dim_v": 120},
            [
                "pairs: half of head_dim_v 120 is no multiple of 16, or less than 32",
                smem(2 * 32768 + 8 * 32768 + 2048 + 1024),
                smem(2 * 32768 + 6 * 32768 + 2048 + 1024),
            ],
        ),
        (
            {"head_dim": 128, "head_dim_v": 128, "seqlen_q": 256},
            [
                "256 queries of 1 heads fill half of 512 rows at most",
                smem(2 * 32768 + 8 * 32768 + 2048 + 1024),
                smem(2 * 32768 + 6 * 32768 + 2048 + 1024),
            ],
        ),
        (
            {"head_dim": 128, "head_dim_v": 128, "seqlen_q": 550},
            [
                "pairs: 550 queries fill 1024 rows of tiles of pairs, 768 of a CTA's",
                smem(2 * 32768 + 8 * 32768 + 2048 + 1024),
                smem(2 * 32768 + 6 * 32768 + 2048 + 1024),
            ],
        ),
        (
            {"head_dim": 256, "head_dim_v": 256, "persistent": PersistentMode.OFF},
            [
                *(f"tensor memory: {2 * keys + 2 * 256} columns of S and O, 512 available" for keys in (128, 96, 64)),
                "pairs walk over tiles",
                *(smem(65536 + stages * 65536 + 1024 + 1024) for stages in (8, 6, 4, 3)),
                smem(65536 + 6 * 49152 + 1024 + 1024),  # 8 and 4 blocks of 96 keys are as large as 6 and 3 of 128
            ],
        ),
        (
            {"dtype": DType.E4M3, "head_dim": 240, "head_dim_v": 144, **dict.fromkeys(K_DESCALES, True)},
            [
                "tensor memory: 544 columns of S and O, 512 available",
                "pairs: half of head_dim_v 144 is no multiple of 32, or less than 32",
                "descales of blocks: 96 keys may have several, of 128 keys each",
            ],
        ),
        (
            {"head_dim": 152, "head_dim_v": 136, "page_size": 64},
            [
                "tensor memory: 544 columns of S and O, 512 available",
                "pairs: half of head_dim_v 136 is no multiple of 16, or less than 32",
                "paged keys: a block of 96 and a page of 64 have 32 rows in common",
                smem(2 * 40960 + 8 * 20480 + 2048 + 1024),
            ],
        ),
        (
            {"num_heads": 8, "num_heads_kv": 1, "seqlen_q": 1, "pack_gqa": False},
            [
                *(f"1 queries of 8 heads fill half of {rows} rows at most" for rows in (512, 256)),
                "pack_gqa False is asked for",
            ],
        ),
        (
            {"num_heads": 8, "num_heads_kv": 1, "seqlen_q": 4096},
            [SMALL, "packed heads fill 100.0% of the tiles' rows, heads apart 100.0%: a tenth more is needed"],
        ),
    ],
)
def test_refused_tiles_say_why(change, reasons):
    assert distinct(change) == reasons
