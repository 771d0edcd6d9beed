"""Registers that nothing has written: NaNs, not zeros; and which registers those are."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from ptxsim.errors import UninitializedRead
from ptxsim.frontend.parser import parse_module
from ptxsim.frontend.program import Program
from tests.ptxsim.test_wgmma import A_AT, B_AT, SHARED, kernel, place
from tests.testing.ptx import kernel_text, run

STORE = "mad.wide.u32 %rd1, %t, 4, %out0; st.global.u32 [%rd1], %r1;"
PARTIAL = (
    "setp.lt.u32 %p1, %t, 20; @!%p1 bra SKIP; mov.b32 %f1, 0f3f800000; SKIP: add.f32 %f2, %f1, %f1; mov.b32 %r1, %f2;"
)

LOOP = "mov.u32 %r2, 0; L: WHAT add.u32 %r2, %r2, 1; setp.lt.u32 %p1, %r2, 4; @%p1 bra L;"


def undefined(body):
    program = Program(parse_module(kernel_text(body, 0, 1)).kernels["kernel"])
    return {name for name, number in program.regs.items() if number in program.undefined}


def test_elements_that_a_branch_left_out():
    """A sum with what only some lanes loaded."""
    out = run(PARTIAL + STORE, [], [np.zeros(32, np.uint32)]).view(np.float32)
    assert (out[:20] == 2).all() and np.isnan(out[20:]).all()


@pytest.mark.parametrize(
    ("register", "suffix", "types"),
    [
        ("%rs1", "u16", (torch.float16, torch.bfloat16)),
        ("%r1", "u32", (torch.float16, torch.bfloat16, torch.float32)),
        ("%f1", "f32", (torch.float32,)),
        ("%rd1", "u64", (torch.float16, torch.bfloat16, torch.float32, torch.float64)),
        ("%fd1", "f64", (torch.float64,)),
    ],
)
def test_pattern_is_a_nan_of_every_type(register, suffix, types):
    out = torch.from_numpy(run(f"st.global.{suffix} [%out0], {register};", [], [np.zeros(1, np.uint64)]).view(np.uint8))
    written = out[: int(suffix[1:]) // 8]
    assert all(written.view(kind).isnan().all() for kind in types)


@pytest.mark.parametrize("late", [False, True])
def test_accumulators_that_nobody_cleared(late):
    """wgmma with scale-input-d and without, once the accumulators are not set before."""
    body = kernel(8, 16, "f32", "f16", "f16", "%rd3", scale_d="%r10", transposes=", 0, 0")
    images = [
        place(torch.zeros((rows, 16), dtype=torch.float16), at, 128, 0, 2) for rows, at in ((64, A_AT), (8, B_AT))
    ]
    inputs = [np.concatenate([image for image, _ in images]), np.array([d for _, d in images], np.uint64),
              np.zeros((128, 4), np.uint32)]  # fmt: skip
    options = dict(threads=128, declarations=SHARED, late=late)

    def product(body, scale_d):
        return run(f"mov.u32 %r10, {scale_d};" + body, inputs, [np.zeros((128, 4), np.float32)], **options)

    assert (product(body, 1) == 1).all()
    bare, removed = re.subn(r"mov\.b32 %f\d+, 0x\w+;", "", body)
    assert removed == 4
    assert (product(bare, 0) == 0).all()
    with pytest.raises(UninitializedRead, match="accumulators that nothing has written") as found:
        product(bare, 1)
    assert found.value.text.startswith("wgmma.mma_async")


@pytest.mark.parametrize(
    ("body", "registers"),
    [
        ("mov.u32 %r1, 1;" + STORE, set()),
        (STORE, {"%r1"}),
        (PARTIAL + STORE, {"%f1"}),
        ("@%p1 bra A; mov.u32 %r1, 1; bra B; A: mov.u32 %r1, 2; B:" + STORE, {"%p1"}),
        # a guard leaves the value that was there; a loop that defines what the next round reads
        ("setp.lt.u32 %p1, %t, 4; @%p1 mov.u32 %r1, 1;" + STORE, {"%r1"}),
        (LOOP.replace("WHAT", "add.u32 %r1, %r2, 1;") + STORE, set()),
        (LOOP.replace("WHAT", "add.u32 %r1, %r1, 1;") + STORE, {"%r1"}),
        ("setp.lt.u32 %p1, %t, 4; @%p1 bra A; ret; mov.u32 %r3, 1; A: mov.u32 %r1, 1;" + STORE, set()),
    ],
)  # fmt: skip
def test_which_registers(body, registers):
    assert undefined(body) == registers
