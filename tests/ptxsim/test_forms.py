"""What is not known is refused: instructions, modifiers, operands, directives; and what errors say."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from click.testing import CliRunner

from ptxsim.errors import PtxError, SimError
from ptxsim.frontend.parser import parse_module
from ptxsim.frontend.program import Program
from ptxsim.report.cli import main
from tests.testing.ptx import kernel_text, run

UNKNOWN = [
    "frobnicate.u32 %r1, %r2",
    "add.u8 %rs1, %rs2, %rs3",
    "add.rn.u32 %r1, %r2, %r3",
    "add.cc.u32 %r1, %r2, %r3",
    "add.rna.f32 %f1, %f2, %f3",
    "mul24.lo.u32 %r1, %r2, %r3",
    "max.xorsign.abs.f32 %f1, %f2, %f3",
    "ex2.f32 %f1, %f2",
    "sqrt.rz.f64 %fd1, %fd2",
    "div.rz.f64 %fd1, %fd2, %fd3",
    "tanh.f32 %f1, %f2",
    "fma.rn.oob.f16 %rs1, %rs2, %rs3, %rs4",
    "cvt.rs.f16x2.f32 %r1, %f1, %f2, %r2",
    "cvt.rs.satfinite.e4m3x4.f32 %r1, {%f1, %f2, %f3, %f4}, %r2",
    "cvt.rn.e4m3x2.f32 %rs1, %f1, %f2",
    "cvt.rzi.f32.f64 %f1, %fd1",
    "cvt.rn.f64.f32 %fd1, %f1",
    "setp.lt.f16x2 %p1|%p2, %r1, %r2",
    "setp.lt.b32 %p1, %r1, %r2",
    "setp.equ.u32 %p1, %r1, %r2",
    "selp.v2 %r1, %r2, %r3, %p1",
    "lop3.or.b32 %r1|%p1, %r2, %r3, %r4, 1, %p2",
    "ld.global.L3::x.u32 %r1, [%in0]",
    "ld.weird.u32 %r1, [%in0]",
    "ld.global.v3.u32 {%r1, %r2, %r3}, [%in0]",
    "ld.global.v4.u32 {%r1, %r2}, [%in0]",
    "ld.shared.f16x2 %r1, [%r2]",
    "st.async.shared::cta.mbarrier::complete_tx::bytes.u32 [%r1], %r2, [%r3]",
    "st.const.u32 [%in0], %r1",
    "red.async.relaxed.cluster.global.add.u32 [%in0], %r1",
    "atom.global.add.s64 %rd1, [%in0], %rd2",
    "atom.global.mul.u32 %r1, [%in0], %r2",
    "multimem.ld_reduce.global.add.f32 %f1, [%in0]",
    "shfl.bfly.b32 %r1, %r2, 1, 31",
    "shfl.sync.rot.b32 %r1, %r2, 1, 31, -1",
    "vote.all.pred %p1, %p2",
    "redux.sync.mul.u32 %r1, %r2, -1",
    "ldmatrix.sync.aligned.m16n16.x1.shared.b8 {%r1, %r2}, [%r3]",
    "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r1, %r2}, [%r3]",
    "mma.sync.aligned.m8n8k8.row.col.f64.f64.f64.f64 {%fd1, %fd2}, {%fd3}, {%fd4}, {%fd1, %fd2}",
    "mma.sync.aligned.m16n8k16.row.col.f16.bf16.bf16.f16 {%r1, %r2}, {%r1, %r2, %r3, %r4}, {%r1, %r2}, {%r1, %r2}",
    "mma.sp.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%f1, %f2, %f3, %f4}, {%r1, %r2}, {%r1, %r2}, "
    "{%f1, %f2, %f3, %f4}, %r5, 0",
    "wgmma.mma_async.sp.sync.aligned.m64n8k16.f32.f16.f16 {%f1, %f2, %f3, %f4}, %rd1, %rd2, %r1, 0, %p1, 1, 1, 0, 0",
    "cp.async.cg.shared.global.evict_first [%r1], [%in0], 16",
    "cp.async.bulk.tensor.6d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%r1], [%in0, {%r1}], [%r2]",
    "cp.reduce.async.bulk.global.shared::cta.bulk_group.inc.u32 [%in0], [%r1], 16",
    "mbarrier.arrive.noComplete.shared.b64 %rd1, [%r1], 2",
    "mbarrier.try_wait.parity.sideways.shared.b64 %p1, [%r1], 0",
    "bar.red.xor.pred %p1, 0, %p2",
    "barrier.cluster.arrive.acquire",
    "fence.proxy.imaginary",
    "tensormap.replace.tile.swizzle_offset.global.b1024.b32 [%in0], 1",
    "clusterlaunchcontrol.try_cancel.shared::cta.mbarrier::complete_tx::bytes.b128 [%r1], [%r2]",
    "call.uni (%r1), malloc, (%rd1)",
    "call.uni vprintf, (%rd1, %rd2)",
    "brx.idx %r1, table",
    "mov.b128 %rd1, {%rd2, %rd3}",
    "discard.global.L2 [%in0], 128",
    "brkpt",
    "mov.u32 %r1, %envreg3",
]


# What one might miss, by kind; in no form of ``ops``.
REFUSED = {
    "carry chains": [
        "add.cc.u32 %r1, %r2, %r3",
        "addc.u32 %r1, %r2, %r3",
        "madc.lo.u32 %r1, %r2, %r3, %r4",
    ],
    "24-bit products, rare integers": [
        "mul24.lo.u32 %r1, %r2, %r3",
        "sad.u32 %r1, %r2, %r3, %r4",
        "fns.b32 %r1, %r2, %r3, %r4",
        "cnot.b32 %r1, %r2",
    ],
    "integers in pairs, video": [
        "add.u16x2 %r1, %r2, %r3",
        "vadd4.u32.u32.u32 %r1, %r2, %r3, %r4",
        "cvt.pack.sat.u8.s32.b32 %r1, %r2, %r3, %r4",
    ],
    "comparisons of halves in pairs": [
        "setp.lt.f16x2 %p1|%p2, %r1, %r2",
        "set.lt.f16x2.f16x2 %r1, %r2, %r3",
    ],
    "f64 rounded otherwise than to nearest": [
        "add.rz.f64 %fd1, %fd2, %fd3",
        "sqrt.rz.f64 %fd1, %fd2",
        "rcp.approx.ftz.f64 %fd1, %fd2",
    ],
    "further modifiers of floats": [
        "max.xorsign.abs.f32 %f1, %f2, %f3",
        "fma.rn.oob.f16 %rs1, %rs2, %rs3, %rs4",
    ],
    "stochastic rounding to 8 and 6 bits, to f16 without saturation; s2f6": [
        "cvt.rs.satfinite.e4m3x4.f32 %r1, {%f1, %f2, %f3, %f4}, %r2",
        "cvt.rs.f16x2.f32 %r1, %f1, %f2, %r2",
        "cvt.rn.satfinite.s2f6x2.f32 %rs1, %f1, %f2",
    ],
    "wmma": [
        "wmma.load.a.sync.aligned.row.m16n16k16.global.f16 {%r1, %r2, %r3, %r4, %r5, %r6, %r7, %r8}, [%in0], 16",
    ],
    "128 bits at once in global memory": [
        "ld.global.b128 %rd1, [%in0]",
        "atom.global.cas.b128 %rd1, [%in0], %rd2, %rd3",
    ],
    "memory of several GPUs or of the host's devices": [
        "multimem.ld_reduce.global.add.f32 %f1, [%in0]",
        "ld.mmio.relaxed.sys.global.u32 %r1, [%in0]",
    ],
    "asynchronous copies: im2col, gather, scatter, byte masks, bulk stores of zeros": [
        "cp.async.bulk.tensor.3d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes [%r1], [%in0, "
        "{%r1, %r2, %r3}], [%r2], {%rs1}",
        "cp.async.bulk.tensor.2d.global.shared::cta.tile::scatter4.bulk_group [%in0, {%r1, %r2, %r3, %r4, %r5}], [%r2]",
        "cp.async.bulk.global.shared::cta.bulk_group.cp_mask [%in0], [%r1], 16, %rs1",
        "st.bulk.weak.shared::cta [%r1], 64, 0",
    ],
    "arrivals that must not complete a phase": [
        "mbarrier.arrive.noComplete.shared.b64 %rd1, [%r1], 2",
    ],
    "warps without `.sync`": [
        "shfl.up.b32 %r1, %r2, 1, 31",
        "vote.all.pred %p1, %p2",
    ],
    "textures and surfaces": [
        "tex.2d.v4.f32.s32 {%f1, %f2, %f3, %f4}, [%rd1, {%r1, %r2}]",
        "suld.b.1d.b32.trap %r1, [%rd1, {%r2}]",
    ],
    "calls but of vprintf, jump tables, stacks, breakpoints": [
        "call.uni (%r1), malloc, (%rd1)",
        "brx.idx %r1, table",
        "alloca.u32 %r1, %r2",
        "brkpt",
    ],
    "caches: what may be dropped, and uniform loads": [
        "discard.global.L2 [%in0], 128",
        "ldu.global.u32 %r1, [%in0]",
    ],
    "special registers of environment and performance counters": [
        "mov.u32 %r1, %envreg3",
        "mov.u32 %r1, %pm0",
    ],
}


@pytest.mark.parametrize("instruction", list(dict.fromkeys([*UNKNOWN, *itertools.chain(*REFUSED.values())])))
def test_unknown_forms(instruction):
    """Refused at translation, before anything runs, naming line and text."""
    text = kernel_text(f"add.u32 %r9, %t, 1; {instruction};", 1, 1, declarations="")
    with pytest.raises(PtxError) as caught:
        Program(parse_module(text).kernels["kernel"])
    line = next(n for n, content in enumerate(text.split("\n"), 1) if instruction in content)
    assert caught.value.line == line
    assert instruction.split()[0] in str(caught.value)


@pytest.mark.parametrize(
    "instruction",
    [
        "add.u32 %r1, %r2",
        "add.u32 %r1, %nothing, %r3",
        "add.u32 %r1, %p1, %r3",
        "add.u64 %rd1, %r1, %rd2",
        "setp.eq.u32 %r1, %r2, %r3",
        "mov.u64 %r1, %rd1",
        "mul.wide.u32 %r1, %r2, %r3",
        "ld.param.u32 %r1, [nothing]",
        "add.u32 5, %r2, %r3",
    ],
)
def test_operands_that_do_not_fit(instruction):
    text = kernel_text(f"{instruction};", 1, 1)
    with pytest.raises(PtxError) as caught:
        Program(parse_module(text).kernels["kernel"])
    assert instruction.split()[0] in caught.value.text and caught.value.line


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("{\n  .reg .pred", "{\n  .reg .b256 %q<4>;\n  .reg .pred"),
        ("{\n  .reg .pred", "{\n  .mystery 3;\n  .reg .pred"),
        (".visible .entry", ".texref tex;\n.visible .entry"),
        (")\n{", ")\n.blocksareclusters\n{"),
        ("  ret;", "  bra NOWHERE;"),
    ],
)
def test_unknown_directives_and_labels(old, new):
    text = kernel_text("", 1, 1)
    assert old in text
    with pytest.raises(PtxError) as caught:
        Program(parse_module(text.replace(old, new, 1)).kernels["kernel"])
    assert caught.value.line


def test_directives_without_meaning_here():
    text = kernel_text('.loc 1 2 3\n  .pragma "nounroll"; mov.u32 %r1, 1;', 1, 1, declarations='.file 1 "x.cu"\n')
    Program(parse_module(text.replace(")\n{", ")\n.maxntid 128, 1, 1\n.minnctapersm 1\n{")).kernels["kernel"])


def test_scopes_of_inline_assembly():
    """Registers and labels of two scopes with the same names do not meet."""
    scope = """{{ .reg .b32 x; .reg .pred q; mov.u32 x, {v}; setp.gt.u32 q, x, 5; @q bra L; add.u32 x, x, 100;
    L: add.u32 %r1, %r1, x; }}"""
    body = "mov.u32 %r1, 0; " + scope.format(v=3) + scope.format(v=7) + "st.global.u32 [%out0], %r1;"
    assert run(body, [], [np.zeros(1, np.uint32)])[0] == 3 + 100 + 7


def test_errors_are_of_one_family():
    error = SimError("what", line=3, text="add.u32 x", where="cta(0,0,0).w1")
    assert str(error) == "what\n    at PTX line 3: add.u32 x\n    by cta(0,0,0).w1"
    assert error.located(9, "other", "elsewhere").line == 3
    assert str(SimError("what").located(4, "t")) == "what\n    at PTX line 4: t"


def test_command_lists_forms():
    """Each form once, with the alternatives of its names; of all instructions, or of one."""
    listed = CliRunner().invoke(main, ["forms", "bar"])
    assert listed.exit_code == 0 and listed.output.splitlines() == [
        "bar.warp.sync", "bar[.cta].red.popc.u32", "bar[.cta].red.{and|or}.pred", "bar[.cta].{sync|arrive}",
    ]  # fmt: skip
    everything = CliRunner().invoke(main, ["forms"]).output.splitlines()
    assert everything == sorted(set(everything)) and set(listed.output.splitlines()) < set(everything)
    unknown = CliRunner().invoke(main, ["forms", "frobnicate"])
    assert unknown.exit_code == 2 and "no instruction 'frobnicate' is simulated" in unknown.output
