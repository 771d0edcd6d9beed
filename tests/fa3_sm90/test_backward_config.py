"""The heuristic of the FA3 backward: which head_dims fit, in which tiles; shared memory and registers; refusals."""

import pytest

from cute_fa.engine.table import TABLE
from cute_fa.semantics.problem import AttentionProblem
from cute_fa.semantics.types import Direction, DType, PersistentMode, SmArch
from fa3_sm90.backward.config import BARRIER_BYTES, CONSUMERS, REGISTERS, SCORE_STAGES, PipelineSpec
from fa3_sm90.backward.entry import Fa3Backward
from fa3_sm90.backward_split.entry import Fa3SplitBackward
from tests.testing.cases import refusals, small_problem

HEAD_DIMS = range(8, 129, 8)
FP8 = {"dtype": DType.E4M3} | dict.fromkeys(("dtype_k", "dtype_v", "out_dtype"))


def problem(**changes) -> AttentionProblem:
    return small_problem(**{"arch": SmArch.SM_90A, "direction": Direction.BACKWARD, **changes})


def configure(**changes):
    return Fa3Backward.configure(problem(**changes))


def sizes(head_dim: int, head_dim_v: int) -> dict[str, int]:
    return {"head_dim": head_dim, "head_dim_v": head_dim_v}


def rounded(number: int, step: int) -> int:
    return -(-number // step) * step


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_pair_of_head_dims_up_to_128_fits(head_dim):
    for head_dim_v in HEAD_DIMS:
        assert Fa3Backward.supports(problem(**sizes(head_dim, head_dim_v))) == []
        c = configure(**sizes(head_dim, head_dim_v))
        narrow = rounded(head_dim, 16) + rounded(head_dim_v, 16) <= 128
        assert (c.tile_m, c.tile_n, c.stages) == (128 if narrow else 64, 128, 2)
        assert c.head_dim_v_padded == rounded(head_dim_v, 16)
        # with 64 queries the warpgroups share dQ's columns: half a panel of 64 each, or one each
        assert c.head_dim_padded == (rounded(head_dim, 16) if narrow else 64 if head_dim <= 64 else 128)
        assert c.dq_columns == (c.head_dim_padded if narrow else c.head_dim_padded // 2)
        # tiles in bf16, dQ and the statistics in fp32
        elements = (128 + 2 * c.tile_m) * (c.head_dim_padded + c.head_dim_v_padded) + SCORE_STAGES * 128 * c.tile_m
        numbers = c.tile_m * c.head_dim_padded + 2 * 2 * c.tile_m
        assert c.smem_bytes == 2 * elements + 4 * numbers + BARRIER_BYTES <= SmArch.SM_90A.smem_bytes
        assert 8 * 2 * sum(spec.stages for spec in c.pipelines) <= BARRIER_BYTES
        # a warpgroup's sums of dK and dV, S and dP
        sums = (c.head_dim_padded + c.head_dim_v_padded) // 2
        assert sums + 2 * c.tile_m // 2 <= 192 < REGISTERS[1]


@pytest.mark.parametrize(("head_dim", "head_dim_v"), [(64, 192), (8, 184), (56, 136)])
def test_a_wide_head_dim_v_beside_up_to_64(head_dim, head_dim_v):
    c = configure(**sizes(head_dim, head_dim_v))
    assert (c.tile_m, c.head_dim_padded) == (64, 64) and c.smem_bytes <= SmArch.SM_90A.smem_bytes


def test_registers_and_named_barriers_suffice():
    producer, consumer = REGISTERS
    assert 128 * (producer + CONSUMERS * consumer) <= 65536
    assert producer % 8 == consumer % 8 == 0 and 24 <= producer < consumer <= 240  # what setmaxnreg takes


@pytest.mark.parametrize(("head_dim", "tile_m"), [(64, 128), (128, 64)])
def test_pipelines_are_data(head_dim, tile_m):
    tile = tile_m * head_dim * 2
    assert configure(**sizes(head_dim, head_dim)).pipelines == (
        PipelineSpec("k", 1, 128 * head_dim * 2, 8),
        PipelineSpec("v", 1, 128 * head_dim * 2, 8),
        PipelineSpec("q", 2, tile + 4 * tile_m, 8),
        PipelineSpec("dout", 2, tile + 4 * tile_m, 8),
    )


@pytest.mark.parametrize(
    ("change", "flag"),
    [
        ({"window_right": 0}, "right"),
        ({"window_left": 5}, "left"),
        ({"softcap": 1.0}, "softcap"),
        ({"alibi": True}, "alibi"),
        ({"learnable_sink": True}, "lsink"),
        ({"varlen_q": True}, "cuq"),
        ({"varlen_k": True}, "cuk"),
        ({"seqused_q": True}, "usedq"),
        ({"seqused_k": True}, "usedk"),
        ({"dtype": DType.FP16}, "fp16"),
        ({"deterministic": True}, "det"),
        ({"lse_gradient": True}, "dlse"),
        ({"alibi": True, "slopes_gradient": True}, "dslopes"),
    ],
)
def test_each_feature_has_its_own_code(change, flag):
    plain, changed = configure(), configure(**change)
    assert plain != changed
    assert flag in changed.compile_name.split("_") and flag not in plain.compile_name.split("_")


def test_compile_name_holds_flags_and_no_values():
    names = {
        configure(window_left=left, window_right=0, sink_tokens=sink, softcap=cap).compile_name
        for left, sink, cap in ((128, 4, 30.0), (4096, 1, 50.0))
    }
    assert names == {"fa3_bwd_sm90a_bf16_hd64_left_right_sink_softcap"}


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (FP8, "codes have no backward"),
        ({"head_dim": 12}, "head_dim 12"),
        ({"page_size": 16, "seqused_k": True}, "page_size 16: this kernel reads contiguous K and V only"),
        ({"num_heads": 4, "pack_gqa": True}, "pack_gqa: this kernel's tiles hold the queries of one head"),
        ({"persistent": PersistentMode.ON}, "persistent: this kernel launches one CTA for each tile"),
        ({"cache_leftpad": True}, "cache_leftpad: a cache has no gradient"),
        ({"cache_batch_idx": True}, "cache_batch_idx: a cache has no gradient"),
        ({"num_splits": 2}, "num_splits 2"),
        ({"softcap": 8193.0}, "softcap 8193"),
        ({"batch": 2**14, "num_heads": 128, "num_heads_kv": 128, "seqlen_q": 2**17}, "2147483648 tiles of queries"),
        ({"batch": 2**14, "num_heads": 128, "num_heads_kv": 128, "seqlen_k": 2**17}, "2147483648 tiles of keys"),
    ],
)
def test_reasons_name_the_value(change, word):
    assert Fa3Backward.supports(problem()) == []
    reasons = Fa3Backward.supports(problem(**change))
    assert any(word in reason for reason in reasons), reasons


def registers(count: int, head_dim: int, head_dim_v: int, queries: int) -> str:
    what = f"dK and dV of 64 keys, {head_dim} and {head_dim_v} wide, and scores of {queries} queries"
    return f"registers: {count} a thread for {what}, at most 192"


@pytest.mark.parametrize(
    ("change", "reasons"),
    [
        (sizes(64, 64), []),
        (sizes(64, 72), [registers(200, 64, 80, 128)]),
        (sizes(128, 128), [registers(256, 128, 128, 128)]),
    ],
    ids=str,
)
def test_refused_tiles_say_why(change, reasons):
    assert refusals(Fa3Backward, problem(**change)) == reasons


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (sizes(128, 136), registers(200, 128, 144, 64)),
        (sizes(136, 8), registers(200, 256, 16, 64)),
        (sizes(256, 256), registers(320, 256, 256, 64)),
        (sizes(64, 200), registers(200, 64, 208, 64)),
    ],
    ids=str,
)
def test_head_dims_that_no_tiles_serve(change, reason):
    """The registers of the tiles that need the least; the table then takes the kernels for wide head_dims."""
    assert Fa3Backward.supports(problem(**change)) == [reason]
    assert TABLE.lookup(problem(**change)) is Fa3SplitBackward


def test_the_table_prefers_it_on_hopper_alone():
    assert TABLE.lookup(problem()) is Fa3Backward
    assert TABLE.lookup(problem(arch=SmArch.SM_100A)).family == "fa2"
