"""The heuristic of the FA2 backward: every pair of head dims fits every arch, and can be shared by the warps."""

import pytest

from cute_fa.semantics.problem import AttentionProblem
from cute_fa.semantics.types import Direction, DType, SmArch
from fa2_sm80.backward.entry import Fa2Backward
from fa2_sm80.common.copies import panel_width
from tests.testing.cases import refusals, small_problem

FP8 = {"dtype": DType.E4M3} | dict.fromkeys(("dtype_k", "dtype_v", "out_dtype"))


def problem(**changes) -> AttentionProblem:
    return small_problem(**{"arch": SmArch.SM_80, "direction": Direction.BACKWARD, **changes})


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("arch", SmArch)
def test_every_pair_of_head_dims_fits(arch, deterministic):
    for head_dim in range(8, 257, 8):
        for head_dim_v in range(8, 257, 8):
            sizes = {"head_dim": head_dim, "head_dim_v": head_dim_v}
            c = Fa2Backward.configure(problem(arch=arch, deterministic=deterministic, **sizes))
            assert c.smem_bytes <= arch.smem_bytes
            assert c.head_dim_padded >= head_dim and c.head_dim_v_padded >= head_dim_v
            # every panel exists, and warps get whole blocks of 16 rows and columns
            panel_width(c.head_dim_padded, c.keys.columns, c.queries.columns)
            panel_width(c.head_dim_v_padded, c.keys.columns)
            for rows, columns, grid in (
                (c.tile_n, c.tile_m, c.scores),
                (c.tile_n, c.head_dim_padded, c.keys),
                (c.tile_n, c.head_dim_v_padded, c.keys),
                (c.tile_m, c.head_dim_padded, c.queries),
            ):
                assert rows % (16 * grid.rows) == 0 and columns % (16 * grid.columns) == 0
                assert grid.rows * grid.columns * grid.depth == c.num_warps
            assert c.tile_n % (16 * c.queries.depth) == 0
            # accumulators of dK, dV, and of S and dP or dQ, in registers a thread
            kept = c.tile_n * (c.head_dim_padded + c.head_dim_v_padded) // c.num_threads
            passing = max(2 * c.tile_n * c.tile_m // c.num_threads, 0 if deterministic else dq_registers(c))
            assert kept + passing <= 224
            if deterministic:
                assert c.query_kernel_smem_bytes <= arch.smem_bytes


def dq_registers(c) -> int:
    return c.tile_m // c.queries.rows * (c.head_dim_padded // c.queries.columns) // 32


@pytest.mark.parametrize(
    ("change", "flag"),
    [
        ({"window_right": 0}, "right"),
        ({"window_left": 5}, "left"),
        ({"softcap": 1.0}, "softcap"),
        ({"alibi": True}, "alibi"),
        ({"learnable_sink": True}, "lsink"),
        ({"varlen_q": True}, "cuq"),
        ({"seqused_k": True}, "usedk"),
        ({"deterministic": True}, "det"),
        ({"lse_gradient": True}, "dlse"),
        ({"alibi": True, "slopes_gradient": True}, "dslopes"),
    ],
)
def test_each_feature_has_its_own_code(change, flag):
    plain, changed = (Fa2Backward.configure(problem(**c)) for c in ({}, change))
    assert plain != changed
    assert flag in changed.compile_name.split("_") and flag not in plain.compile_name.split("_")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"head_dim": 260, "head_dim_v": 260}, "head_dim 260"),
        (FP8, "e4m3"),
        ({"page_size": 16, "seqused_k": True}, "page_size 16"),
        ({"num_splits": 2}, "num_splits 2"),
        ({"softcap": 8193.0}, "softcap 8193"),
        ({"batch": 2**14, "num_heads": 128, "num_heads_kv": 128, "seqlen_q": 2**16}, "4294967296 tiles of queries"),
        ({"batch": 2**14, "num_heads": 128, "num_heads_kv": 128, "seqlen_k": 2**18}, "4294967296 tiles of keys"),
    ],
)
def test_reasons_name_the_value(change, word):
    assert Fa2Backward.supports(problem()) == []
    reasons = Fa2Backward.supports(problem(**change))
    assert len(reasons) >= 1 and any(word in reason for reason in reasons)


def registers(count: int, what: str) -> str:
    return f"registers: {count} a thread for {what}, at most 128 of 255 beside scores and operands"


@pytest.mark.parametrize(
    ("change", "reasons"),
    [
        ({"head_dim": 64, "deterministic": True}, []),
        ({"head_dim": 72}, [registers(160, "dK and dV of 128 keys in 4 warps, 80 wide")]),
        (
            {"head_dim": 128, "arch": SmArch.SM_86},
            [
                registers(256, "dK and dV of 128 keys in 4 warps, 128 wide"),
                # (128 + 2·64 rows)·2·128 columns, Pᵀ and dSᵀ of 128·64, two bytes each, and 2·64 LSE and D
                "shared memory: 164,864 bytes of K, V, Q, dO and scores 128 wide, 101,376 available",
            ],
        ),
        (
            {"head_dim": 256, "arch": SmArch.SM_86, "deterministic": True},
            [
                registers(512, "dK and dV of 128 keys in 4 warps, 256 wide"),
                registers(256, "dK and dV of 128 keys in 8 warps, 256 wide"),
                registers(256, "dK and dV of 64 keys in 4 warps, 256 wide"),
                "shared memory: 139,776 bytes of K, V, Q, dO and scores 256 wide, 101,376 available",
                registers(256, "dQ of 32 queries a warp, 256 wide"),
                "shared memory: 163,840 bytes of Q, dO, K and V 256 wide for dQ alone, 101,376 available",
            ],
        ),
    ],
)
def test_refused_tiles_say_why(change, reasons):
    assert refusals(Fa2Backward, problem(**change)) == reasons
