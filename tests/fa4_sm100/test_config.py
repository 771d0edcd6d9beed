"""What a config promises the hardware, over everything that the heuristic may choose. No kernel is compiled."""

from __future__ import annotations

import itertools

import pytest

from cute_fa.device.tma_boxes import panel_bytes
from cute_fa.semantics.problem import AttentionProblem
from cute_fa.semantics.types import DType, SmArch
from fa4_sm100.forward.config import Fa4ForwardConfig, forward_config

VARIANTS = {
    "full": {},
    "causal": {"window_right": 0},
    "pages": {"page_size": 64, "seqused_k": True},
    "key-major": {"v_layout": "key_major"},
}


def chosen(dtype: DType, variant: str) -> list[Fa4ForwardConfig]:
    """For every pair of head dims, with queries for one tile, two, and pairs of both."""
    sizes = range(16, 257, 16) if dtype.is_fp8 else range(8, 257, 8)
    problems = (
        AttentionProblem(
            arch=SmArch.SM_100A,
            dtype=dtype,
            batch=1,
            seqlen_q=queries,
            seqlen_k=512,
            num_heads=1,
            num_heads_kv=1,
            head_dim=head_dim,
            head_dim_v=head_dim_v,
            softmax_scale=1.0,
            **VARIANTS[variant],
        )
        for head_dim, head_dim_v, queries in itertools.product(sizes, sizes, (128, 256, 512))
    )
    return [forward_config(problem) for problem in problems]


CASES = [(dtype, variant) for dtype in (DType.BF16, DType.E4M3) for variant in VARIANTS]
CASES.remove((DType.BF16, "key-major"))  # fp8 alone has it


@pytest.mark.parametrize(("dtype", "variant"), CASES)
def test_tiles_begin_at_whole_swizzle_atoms(dtype: DType, variant: str):
    """Else a descriptor would need a base offset (PTX ISA, "Shared memory descriptor")."""
    configs = chosen(dtype, variant)
    assert not [c for c in configs if c.stage_bytes % 1024 or c.q_bytes % 1024]
    assert all(c.stage_bytes >= max(c.k_bytes, c.v_bytes) for c in configs)


@pytest.mark.parametrize(("dtype", "variant"), CASES)
def test_columns_are_whole_panels_of_what_a_product_may_span(dtype: DType, variant: str):
    """Rows of K and V in panels of swizzles; columns of O in steps of 16, of 32 in pairs."""
    for c in chosen(dtype, variant):
        row = c.tile_n if c.key_major_v else c.value_columns
        assert panel_bytes(c.head_dim_padded * c.dtype.bytes) in (32, 64, 128)
        assert panel_bytes(row * c.dtype.bytes) in (32, 64, 128), c
        assert c.head_dim_v_padded % (16 * c.ctas) == 0
        assert c.value_columns * c.ctas >= c.head_dim_v


def test_pairs_are_chosen_in_fp8():
    """Where each CTA has a panel of V: not at head_dim_v 96, 160 and 224, whose halves are 48, 80 and 112 bytes."""
    paired = {c.head_dim_v for c in chosen(DType.E4M3, "full") if c.ctas == 2}
    assert paired == {64, 128, 192, 256}
