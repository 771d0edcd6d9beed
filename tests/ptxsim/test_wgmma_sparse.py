"""wgmma.mma_async.sp, single bits and saturation (PTX ISA 9.7.15.5 and 9.7.15.6)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ptxsim.errors import PtxError
from tests.ptxsim.test_tcgen05_mma import sparse_rows
from tests.ptxsim.test_warp_mma import BITS, fragment, matrix, metadata
from tests.ptxsim.test_wgmma import A_AT, B_AT, SHARED, kernel, place
from tests.testing.ptx import run

N = 16
START = {"f32": 1.0, "s32": 3}


def issue(k, result, a_kind, b_kind, a, b, *, from_registers=False, words=None, selector=0, suffix="", late=False):
    """One wgmma of raw operands (bytes of rows); accumulators [64, 16] that started from ``START``."""
    image_a, desc_a = place(torch.from_numpy(a), A_AT, 32, 0, 1)
    image_b, desc_b = place(torch.from_numpy(b), B_AT, 64 if b.shape[1] > 32 else 32, 0, 1)
    fragments = np.concatenate([fragment(a[16 * w : 16 * w + 16]) for w in range(4)])
    operand = "{%r5, %r6, %r7, %r8}" if from_registers else "%rd3"
    two_bytes = BITS.get(a_kind) == 16
    transposes = "" if not two_bytes else ", 0" if from_registers else ", 0, 0"
    body = kernel(N, k, result, a_kind, b_kind, operand, transposes=transposes)
    if words is not None:
        body = body.replace("wgmma.mma_async.", "wgmma.mma_async.sp.")
        body = body.replace("%rd4,\n      %p1", f"%rd4, %r9, {selector}, %p1")
        body = "mad.wide.u32 %rd20, %t, 4, %in3; ld.global.u32 %r9, [%rd20];" + body
    body = body.replace(f".{a_kind}.{b_kind} ", f".{a_kind}.{b_kind}{suffix} ")
    if suffix == ".satfinite":
        body = body.replace(f".{result}.{a_kind}.{b_kind}{suffix}", f"{suffix}.{result}.{a_kind}.{b_kind}")
    inputs = [np.concatenate([image_a, image_b]), np.array([desc_a, desc_b], np.uint64), fragments]
    inputs += [] if words is None else [words]
    out = run(body, inputs, [np.zeros((128, N // 2), np.uint32)], threads=128, declarations=SHARED, late=late)
    values = out.view(np.float32 if result == "f32" else np.int32).reshape(4, 8, 4, N // 8, 2, 2)
    return values.transpose(0, 4, 1, 3, 2, 5).reshape(64, N)  # warp, row half, row, block, t, e


SPARSE = [("f16", "f16", 32, "f32"), ("bf16", "bf16", 32, "f32"), ("tf32", "tf32", 16, "f32"),
          ("e4m3", "e5m2", 64, "f32"), ("s8", "u8", 64, "s32")]  # fmt: skip


@pytest.mark.parametrize(("a_kind", "b_kind", "k", "result"), SPARSE)
@pytest.mark.parametrize("from_registers", [False, True])
def test_sparse(a_kind, b_kind, k, result, from_registers):
    """Each warp holds the metadata of its 16 rows as a warp's mma.sp does."""
    rng = np.random.default_rng(1)
    a_values, a = matrix(rng, 64, k // 2, a_kind)
    b_values, b = matrix(rng, N, k, b_kind)
    whole, codes = sparse_rows(rng, a_values, a_kind)
    bits = BITS.get(a_kind, 8)
    words = np.concatenate([metadata(codes[16 * w : 16 * w + 16], bits) for w in range(4)])
    for selector, late in ((0, False), (int(bits > 8), True)):
        mine = np.roll(words, 2 * selector)
        got = issue(
            k, result, a_kind, b_kind, a, b, from_registers=from_registers, words=mine, selector=selector, late=late
        )
        np.testing.assert_allclose(got, whole @ b_values.T + START[result], rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("from_registers", [False, True])
def test_single_bits(from_registers):
    rng = np.random.default_rng(2)
    (a_values, a), (b_values, b) = matrix(rng, 64, 256, "b1"), matrix(rng, N, 256, "b1")
    got = issue(256, "s32", "b1", "b1", a, b, from_registers=from_registers, suffix=".and.popc")
    np.testing.assert_array_equal(got, a_values @ b_values.T + 3)


def test_saturation():
    """The first accumulator starts near the largest number, the others from 3."""
    a, b = np.full((64, 32), 127, np.uint8), np.full((N, 32), 127, np.uint8)
    top = "mov.b32 %r100, 0x7ffffff0;"
    body = kernel(N, 32, "s32", "s8", "s8", "%rd3", before=top).replace("m64n16k32.s32", "m64n16k32.satfinite.s32")
    (image_a, desc_a), (image_b, desc_b) = (
        place(torch.from_numpy(x), at, 32, 0, 1) for x, at in ((a, A_AT), (b, B_AT))
    )
    inputs = [np.concatenate([image_a, image_b]), np.array([desc_a, desc_b], np.uint64), np.zeros((128, 4), np.uint32)]
    out = run(body, inputs, [np.zeros((128, N // 2), np.int32)], threads=128, declarations=SHARED)
    assert (out[:, 0] == 0x7FFFFFFF).all() and (out[:, 1] == 32 * 127 * 127 + 3).all()


@pytest.mark.parametrize(
    ("a_kind", "selector", "suffix", "message"),
    [
        ("f16", 2, "", "sparsity selector 2 for f16"),
        ("f16", 0, ".satfinite", "satfinite exists for integer types only"),
    ],
)
def test_what_is_refused(a_kind, selector, suffix, message):
    with pytest.raises(PtxError, match=message):
        issue(32, "f32", a_kind, a_kind, np.zeros((64, 32), np.uint8), np.zeros((N, 64), np.uint8), suffix=suffix,
              words=np.full(128, 0x44444444, np.uint32), selector=selector)  # fmt: skip
