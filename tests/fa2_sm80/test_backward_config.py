"""The heuristic of the FA2 backward: every pair of head dims fits every arch, and can be shared by the warps."""

import pytest

from cute_fa.semantics.problem import AttentionProblem
from cute_fa.semantics.types import Direction, DType, SmArch
from fa2_sm80.backward.entry import Fa2Backward
from fa2_sm80.common.copies import panel_width
from tests.testing.cases import small_problem


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
        ({"dtype": DType.E4M3}, "e4m3"),
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
