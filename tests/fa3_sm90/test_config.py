"""The heuristic of the FA3 forward: every pair of head_dims fits; pipelines are data; names tell configs apart."""

import math

import pytest

from cute_fa.semantics.problem import PAGE_SIZES, AttentionProblem
from cute_fa.semantics.types import SmArch
from fa3_sm90.common.wgmma import WGMMA_M
from fa3_sm90.forward.config import BARRIER_BYTES, PipelineSpec, forward_config, walked_keys
from fa3_sm90.forward.entry import Fa3Forward
from tests.testing.cases import refusals, small_problem
from tests.testing.config_tests import ConfigTests
from tests.testing.tiled_forward import Forward

HEAD_DIMS = range(8, 257, 8)
REGISTERS = 65536  # of an SM
BARRIERS = 16  # named barriers of a CTA


def problem(**changes) -> AttentionProblem:
    return small_problem(**{"arch": SmArch.SM_90A, "seqlen_q": 4096, "seqlen_k": 4096, **changes})


def configure(**changes):
    return Fa3Forward.configure(problem(**changes))


@pytest.mark.parametrize("page_size", [None, 8, 128])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_pair_of_head_dims_fits(head_dim, page_size):
    for head_dim_v in HEAD_DIMS:
        c = configure(head_dim=head_dim, head_dim_v=head_dim_v, page_size=page_size)
        for size, padded in ((head_dim, c.head_dim_padded), (head_dim_v, c.head_dim_v_padded)):
            assert size <= padded < size + 16 and padded % 16 == 0
        q, o, k, v = (
            rows * columns * 2
            for rows, columns in (
                (WGMMA_M, c.head_dim_padded),
                (WGMMA_M, c.head_dim_v_padded),
                (c.tile_n, c.head_dim_padded),
                (c.tile_n, c.head_dim_v_padded),
            )
        )
        # every tile starts at a swizzle atom of 1024 bytes, the panels in it at one of 512 or 256
        assert q % 1024 == o % 1024 == c.stages * k % 1024 == c.stages * v % 1024 == 0
        per_warpgroup = q + o if c.own_output else max(q, o)
        needed = c.warpgroups * per_warpgroup + c.stages * (k + v)
        assert needed + BARRIER_BYTES == c.smem_bytes <= SmArch.SM_90A.smem_bytes
        assert 8 * 2 * sum(spec.stages for spec in c.pipelines) <= BARRIER_BYTES
        # wgmma takes n in steps of 8 up to 256 and 16 keys at a time; accumulators of S and O, and P, leave room
        assert c.tile_n % 16 == 0 and c.tile_n <= 256
        assert c.tile_n // 2 + c.tile_n // 4 + c.head_dim_v_padded // 2 < c.registers[1] - 30


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_registers_and_named_barriers_suffice(head_dim):
    c = configure(head_dim=head_dim, head_dim_v=head_dim)
    producer, consumer = c.registers
    assert 128 * (producer + c.warpgroups * consumer) <= REGISTERS
    assert producer % 8 == consumer % 8 == 0 and 24 <= producer < consumer <= 240  # what setmaxnreg takes
    assert c.num_threads == 128 * (c.warpgroups + 1)
    assert 1 + 2 * c.warpgroups <= BARRIERS  # the CTA's, turns, epilogues


def test_pipelines_are_data():
    c = configure(head_dim=128, head_dim_v=128)
    assert c.pipelines == (
        PipelineSpec("q0", 1, 64 * 128 * 2, 4),
        PipelineSpec("q1", 1, 64 * 128 * 2, 4),
        PipelineSpec("k", c.stages, c.tile_n * 128 * 2, 8),
        PipelineSpec("v", c.stages, c.tile_n * 128 * 2, 8),
    )
    unequal = configure(head_dim=72, head_dim_v=40)
    assert [spec.stage_bytes for spec in unequal.pipelines[-2:]] == [unequal.tile_n * 80 * 2, unequal.tile_n * 48 * 2]
    packed = configure(num_heads=7, num_heads_kv=1, pack_gqa=True)
    # TMA brings 9 tokens of 7 heads to 64 rows
    assert {spec.stage_bytes for spec in packed.pipelines if spec.name.startswith("q")} == {63 * 64 * 2}
    for head_dim in HEAD_DIMS:
        stages = {spec.stages for spec in configure(head_dim=head_dim, head_dim_v=head_dim).pipelines}
        assert all(count.bit_count() == 1 for count in stages)  # the phase is a bit of the count


@pytest.mark.parametrize("page_size", [size for size in PAGE_SIZES if size >= 8])
@pytest.mark.parametrize("head_dim", [8, 64, 128, 192, 256])
def test_boxes_of_pages_are_swizzle_atoms(page_size, head_dim):
    c = configure(head_dim=head_dim, head_dim_v=head_dim, page_size=page_size)
    assert c.key_rows == math.gcd(page_size, c.tile_n) >= min(page_size, 64)
    assert c.key_rows % 8 == 0 and c.tile_n // c.key_rows <= 32  # each lane of the loader looks one page up


@pytest.mark.parametrize(
    ("seqlen_q", "ratio", "packed"),
    [
        (1, 8, True),  # decoding: 8 of 192 rows instead of 1
        (1, 64, True),
        (1, 65, False),  # more heads than a warpgroup has rows
        (1, 1, False),
        (4096, 8, False),  # 21.3 tiles: nothing to gain
        (4096, 7, False),  # and 1 row of 64 to lose
        (200, 4, True),  # 200 of 384 rows against 800 of 960
    ],
)
def test_heads_are_packed_where_that_fills_tiles(seqlen_q, ratio, packed):
    heads = dict(num_heads=ratio * 2, num_heads_kv=2)
    assert configure(seqlen_q=seqlen_q, **heads).pack_gqa == (ratio if packed else 1)
    if 1 < ratio <= WGMMA_M:
        assert configure(seqlen_q=seqlen_q, pack_gqa=True, **heads).pack_gqa == ratio
    assert configure(seqlen_q=seqlen_q, pack_gqa=False, **heads).pack_gqa == 1


@pytest.mark.parametrize("ratio", range(1, 65))
def test_rows_of_a_packed_warpgroup(ratio):
    c = configure(num_heads=ratio, num_heads_kv=1, pack_gqa=True)
    assert c.tokens >= 1 and c.tokens * c.pack_gqa <= WGMMA_M < (c.tokens + 1) * c.pack_gqa
    assert c.tile_tokens == c.warpgroups * c.tokens


class TestNames(ConfigTests):
    forward = Forward(Fa3Forward, SmArch.SM_90A)
    prefix = "fa3_fwd_sm90a"
    too_many = {"num_heads": 130, "pack_gqa": True}, "gqa_ratio 65"


THREE_WARPGROUPS = [
    "registers spill beyond head_dim 64 with 160 a thread: 10 accesses in the main loop at 80, and wgmma serialised",
    "6.1 instructions per score with 96 keys and three warpgroups, 5.4 with 128 and two (head_dim 96)",
]


@pytest.mark.parametrize(
    ("change", "reasons"),
    [
        ({}, []),
        (
            {"softcap": 1.0, "window_left": 9},
            ["registers spill with window_left and softcap: up to 43 accesses at 128 keys, none at 96"],
        ),
        (
            {"window_right": 0, "alibi": True},
            ["registers spill with window_right and alibi: up to 20 accesses at 128 keys, none at 96"],
        ),
        ({"alibi": True}, []),
        ({"window_right": 0, "alibi": True, "head_dim_v": 32}, []),
        ({"head_dim": 128, "head_dim_v": 128}, THREE_WARPGROUPS),
        (
            {"head_dim": 256, "head_dim_v": 256},
            [
                *THREE_WARPGROUPS,
                "registers: about 264 a thread for 128 keys and O 256 wide, 240 available",
                "registers: about 252 a thread for 112 keys and O 256 wide, 240 available",
                # 128 rows of Q and 2·96 of K and of V, 512 bytes each, and the barriers
                "shared memory: 263,168 bytes of Q, K, V and barriers, 232,448 available",
            ],
        ),
        (
            {"head_dim": 256, "head_dim_v": 256, "page_size": 16},
            [
                *THREE_WARPGROUPS,
                "registers: about 264 a thread for 128 keys and O 256 wide, 240 available",
                "registers: about 252 a thread for 112 keys and O 256 wide, 240 available",
                *(
                    f"paged keys: a block of {keys} and a page of 128 have {common} rows in common for a TMA copy, "
                    "one of 64 has 64"
                    for keys, common in ((96, 32), (80, 16))
                ),
                "cluster 2 with page_size 16: pages are looked up for whole blocks",
            ],
        ),
        (
            {"num_heads": 8, "num_heads_kv": 1, "seqlen_q": 4096},
            # 21.33 tiles of 192 queries, 170.67 of 24 queries of 8 heads
            ["packed heads fill 99.8% of the tiles' rows, heads apart 97.0%: a tenth more is needed"],
        ),
        ({"num_heads": 8, "num_heads_kv": 1, "seqlen_q": 1}, []),
        ({"num_heads": 8, "num_heads_kv": 1, "seqlen_q": 1, "pack_gqa": False}, ["pack_gqa False is asked for"]),
        ({"num_heads": 65, "num_heads_kv": 1, "seqlen_q": 1}, ["pack_gqa 65: a warpgroup holds 64 query heads"]),
    ],
)
def test_refused_tiles_say_why(change, reasons):
    assert refusals(Fa3Forward, problem(**change)) == reasons


@pytest.mark.parametrize(
    ("change", "cluster"),
    [
        ({"head_dim": 256, "head_dim_v": 256, "seqlen_q": 512}, 2),
        ({"head_dim": 256, "head_dim_v": 256, "seqlen_q": 511}, 1),
        ({"head_dim": 192, "head_dim_v": 192, "seqlen_q": 4096}, 2),
        ({"head_dim": 192, "head_dim_v": 128, "seqlen_q": 4096}, 1),
        ({"head_dim": 128, "head_dim_v": 128, "seqlen_q": 4096}, 1),
        ({"head_dim": 256, "head_dim_v": 256, "seqlen_q": 2048, "window_right": 0}, 2),
        ({"head_dim": 256, "head_dim_v": 256, "seqlen_q": 2047, "window_right": 0}, 1),
        ({"head_dim": 192, "head_dim_v": 192, "seqlen_q": 4096, "window_right": 0}, 1),
        ({"head_dim": 256, "head_dim_v": 256, "seqlen_q": 4096, "window_left": 512}, 1),
        ({"head_dim": 256, "head_dim_v": 256, "seqlen_q": 4096, "varlen_q": True, "varlen_k": True}, 1),
        ({"head_dim": 256, "head_dim_v": 256, "seqlen_q": 4096, "page_size": 64}, 1),
    ],
)
def test_clusters_are_chosen_where_the_timing_model_tells(change, cluster):
    """docs/timing.md."""
    assert forward_config(problem(**change)).cluster == cluster


WIDE = {"head_dim": 256, "head_dim_v": 256}


def lengths(seqlen_q: int, seqlen_k: int | None = None, **changes) -> dict:
    return {"seqlen_q": seqlen_q, "seqlen_k": seqlen_k or seqlen_q, **changes}


@pytest.mark.parametrize(
    ("change", "tile_n", "cluster"),
    [
        (lengths(511), 80, 1),
        (lengths(512), 64, 2),  # 560 of 512 keys in blocks of 80
        (lengths(576), 64, 1),  # 640 of 576; 5 tiles of queries
        (lengths(640), 80, 1),  # 640 in both
        (lengths(768), 64, 2),  # 800 of 768, 1.042
        (lengths(769), 80, 1),  # 800 of 832
        (lengths(1024), 80, 2),  # 1040 of 1024
        (lengths(512, 560), 80, 2),  # 560 of 576
        (lengths(512, 640), 80, 2),
        (lengths(2048, 1536), 80, 2),  # 1.042, too long
        (lengths(512, window_right=0), 64, 1),  # 1440 of 1280
        (lengths(1024, window_right=0), 64, 1),  # 4880 of 4608
        (lengths(1408, window_right=0), 64, 1),  # 8800 of 8448, 1.042
        (lengths(1792, window_right=0), 80, 1),  # 13920 of 13440, 1.036
        (lengths(2048, window_right=0), 80, 2),
        # queries that see 128 keys more: 256, 384, 512 and 640 in blocks of 64; 320, 400, 560 and 640 of 80
        (lengths(512, 640, window_right=0), 64, 1),
        (lengths(512, 640, window_right=128), 80, 1),  # 384, 512, 640 and 640; 400, 560, 640 and 640: 1.029
        (lengths(512, window_left=300), 80, 1),
        (lengths(512, varlen_q=True, varlen_k=True), 80, 1),
        (lengths(512, seqused_k=True), 80, 1),
        (lengths(1024, seqused_k=True), 80, 2),
        (lengths(512, page_size=64), 64, 1),  # which share 64 keys with a page
        (lengths(512, page_size=64, window_right=0), 64, 1),
        (lengths(512, ranges=True), 80, 1),
    ],
)
def test_short_sequences_have_blocks_that_overshoot_less(change, tile_n, cluster):
    """docs/timing.md."""
    c = forward_config(problem(**WIDE, **change))
    assert (c.tile_n, c.cluster) == (tile_n, cluster)


@pytest.mark.parametrize("head_dim", [128, 192])
def test_short_sequences_of_other_head_dims_keep_their_blocks(head_dim):
    sizes = {"head_dim": head_dim, "head_dim_v": head_dim}
    assert forward_config(problem(**sizes, **lengths(512))).tile_n == forward_config(problem(**sizes)).tile_n > 80


def test_the_overshoot_is_said():
    reasons = refusals(Fa3Forward, problem(**WIDE, **lengths(512, window_right=0)))
    # of 128, 256, 384 and 512 keys
    assert reasons[-1] == "blocks of 80 keys overshoot: 1440 keys walked over by a head's tiles, 1280 by blocks of 64"
    # the first two tiles see none of the 100 keys and walk over a block, the last 100
    few = problem(**WIDE, **lengths(512, 100, window_right=0))
    assert walked_keys(few, 128, 64) == 64 + 64 + 64 + 128 and walked_keys(few, 128, 80) == 80 + 80 + 80 + 160
    # the second tile ends with 200 queries
    assert walked_keys(problem(**lengths(200, window_right=-100)), 128, 64) == 64 + 128
