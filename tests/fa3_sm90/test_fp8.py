"""The FA3 forward in fp8: pairs of head_dims, tiles, what it refuses, edges of the lengths. Features in pairs:
``test_fp8_features.py``, accuracy over many keys: ``test_fp8_accuracy.py``."""

import dataclasses
import itertools

import pytest
import torch

from cute_fa.semantics.types import DType, SmArch
from cute_fa.tools.inputs import InputSpec, make_inputs
from fa3_sm90.common.wgmma import WGMMA_M
from fa3_sm90.forward.config import BARRIER_BYTES
from fa3_sm90.forward.entry import Fa3Forward
from tests.testing.cases import refusals, small_problem
from tests.testing.forward_grid import E4M3
from tests.testing.fp8_tests import HEAD_DIMS, Fp8Tests
from tests.testing.tiled_forward import Forward


def problem(**changes):
    return small_problem(**{"arch": SmArch.SM_90A, "dtype": DType.E4M3, "seqlen_q": 4096, "seqlen_k": 4096, **changes})


class TestFp8(Fp8Tests):
    forward = Forward(Fa3Forward, SmArch.SM_90A)

    def test_scores_beyond_the_digits_of_fp32(self):
        """From 2^27 on 8 is no digit of a score in log2 units; each query sees its best key alone."""
        given = make_inputs(InputSpec(1, 64, 300, 1, 1, 64, dtype=E4M3, descales=False), "random")
        descales = dict.fromkeys(("q_descale", "k_descale"), torch.full((1, 1), 1e4))
        out, lse, _ = self.forward.launch(dataclasses.replace(given, **descales))
        scores = torch.einsum("bqhd,bkhd->bhqk", given.q.double(), given.k.double()) * 1e8 / 8.0
        assert scores.max() > 2.0**27
        torch.testing.assert_close(lse.double(), scores.amax(-1), rtol=1e-6, atol=0.0)
        best = given.v[0, scores[0, 0].argmax(-1)]
        torch.testing.assert_close(out[0].float(), best.float(), rtol=0.0, atol=0.0)


@pytest.mark.parametrize("window", [{}, {"window_right": 0}, {"window_left": 100, "window_right": 0}], ids=str)
@pytest.mark.parametrize("page_size", [None, 8, 128])
def test_every_pair_of_head_dims_fits(page_size, window):
    for head_dim, head_dim_v in itertools.product(HEAD_DIMS, HEAD_DIMS):
        asked = problem(head_dim=head_dim, head_dim_v=head_dim_v, page_size=page_size, **window)
        assert Fa3Forward.supports(asked) == []
        c = Fa3Forward.configure(asked)
        # wgmma takes 32 columns of K at a time, the transposer 16 of V, a TMA panel is 32 wide at least
        assert head_dim <= c.head_dim_padded < head_dim + 32 and c.head_dim_padded % 32 == 0
        assert head_dim_v == c.head_dim_v_padded <= c.value_columns < head_dim_v + 32 and c.value_columns % 32 == 0
        assert c.tile_n % 32 == 0 and head_dim_v % (8 * c.output_parts) == 0
        assert page_size is None or c.tile_n in (64, 128) or head_dim_v == 208
        q, o = WGMMA_M * c.head_dim_padded, WGMMA_M * head_dim_v * 2
        k, v, transposed = (c.tile_n * size for size in (c.head_dim_padded, c.value_columns, head_dim_v))
        # every tile starts at a swizzle atom of 1024 bytes, the panels in it at one of 512 or 256
        assert q % 1024 == o % 1024 == c.stages * k % 1024 == c.stages * v % 1024 == c.stages * transposed % 1024 == 0
        per_warpgroup = q + o if c.own_output else max(q, o)
        needed = c.warpgroups * per_warpgroup + c.stages * (k + v + transposed) + BARRIER_BYTES
        assert needed == c.smem_bytes <= SmArch.SM_90A.smem_bytes
        assert 8 * 2 * sum(spec.stages for spec in c.pipelines) <= BARRIER_BYTES
        # scores, P, O and a part of P·V leave room
        registers = c.tile_n // 2 + c.tile_n // 8 + (head_dim_v + head_dim_v // c.output_parts) // 2
        assert registers <= c.registers[1] - 40


@pytest.mark.parametrize(
    ("head_dim", "changes", "tiles"),
    [
        (64, {}, (128, 1, 4)),
        (64, {"promote_every": 5}, (160, 1, 5)),
        (64, {"promote_every": 1}, (32, 1, 1)),
        (128, {}, (128, 2, 4)),
        (256, {}, (64, 4, 2)),
        (64, {"page_size": 16}, (128, 1, 4)),
        (128, {"window_left": 100}, (96, 1, 3)),
        (256, {"window_left": 100}, (64, 8, 2)),
        (128, {"head_dim_v": 256}, (64, 4, 2)),
        (192, {"head_dim_v": 128}, (128, 2, 4)),
    ],
)
def test_tiles(head_dim, changes, tiles):
    """Keys of a block, parts of P·V, wgmma whose sums stay in their accumulator."""
    c = Fa3Forward.configure(problem(**{"head_dim": head_dim, "head_dim_v": head_dim, **changes}))
    assert (c.tile_n, c.output_parts, c.promote_every) == tiles


def test_reasons_against_wider_blocks():
    plain, paged, window = (
        refusals(Fa3Forward, problem(head_dim=128, head_dim_v=128, **changes))
        for changes in ({}, {"page_size": 64}, {"window_left": 100})
    )
    assert plain == [
        "registers: about 272 a thread for 128 keys, O 128 wide and P·V 128 wide, 240 available",
    ]
    assert paged == plain
    assert window[-1] == "registers: about 256 a thread for 128 keys, O 128 wide and P·V 64 wide, 240 available"
    assert Fa3Forward.supports(problem(page_size=64, promote_every=5)) == [
        "promote_every 5: paged keys: a block of 160 and a page of 128 have 32 rows in common for a TMA copy, "
        "one of 64 has 64"
    ]
    assert Fa3Forward.supports(problem(head_dim_v=256, promote_every=4)) == [
        "promote_every 4: registers: about 304 a thread for 128 keys, O 256 wide and P·V 64 wide, 240 available"
    ]


def test_what_is_not_served():
    odd = Fa3Forward.supports(problem(head_dim=72, head_dim_v=24))
    assert odd == [
        "head_dim 72 in fp8: a multiple of 16 is needed (16-byte strides of TMA)",
        "head_dim_v 24 in fp8: a multiple of 16 is needed (16-byte strides of TMA)",
    ]
    (mixed,) = Fa3Forward.supports(problem(dtype=DType.BF16, dtype_k=DType.E4M3, dtype_v=DType.E4M3))
    assert "k and v in codes with q in 16 bits" in mixed
    for dtypes in itertools.product((DType.E4M3, DType.E5M2), repeat=3):
        names = dict(zip(("dtype", "dtype_k", "dtype_v"), dtypes, strict=True))
        assert Fa3Forward.supports(problem(**names, out_dtype=DType.FP16)) == []
