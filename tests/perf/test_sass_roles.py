"""The SASS reader on kernels whose roles have loops of their own, against listings that were counted by hand."""

from __future__ import annotations

import pytest

from perf.sass.emulation import emulated_exp2
from perf.sass.metrics import add_per_score, report_code
from perf.sass.registers import needed, read, written
from perf.step import step_of
from ptxsim.timing.cubin import parse_listing
from tests.testing.listing import listing_text

# 2^R4 and 2^R5 on the FMA pipe into R4 and R5, beside the scaling and what is no part of it.
EMULATION = [
    "FFMA2 R4, R4.F32x2.HI_LO, R60.F32, R61.F32",
    "FMNMX R40, R4, -127, !PT",
    "FMNMX R41, R5, -127, !PT",
    "FADD2.RM R42, R40.F32x2.HI_LO, 12582912",
    "MOV R62, 0x3d9df09d",
    "FADD2 R44, R42.F32x2.HI_LO, -12582912",
    "FADD2 R44, R40.F32x2.HI_LO, -R44.F32x2.HI_LO",
    "FFMA2 R46, R44.F32x2.HI_LO, R62.F32, 0.22756439447402954102",
    "FFMA2 R46, R46.F32x2.HI_LO, R44.F32x2.HI_LO, 0.69514614343643188477",
    "FFMA2 R46, R46.F32x2.HI_LO, R44.reuse.F32x2.HI_LO, 1",
    "IMAD R4, R42, 0x800000, R46",
    "LEA R5, R43, R47, 0x17",
    "F2FP.BF16.F32.PACK_AB R4, R5, R4",
]


def block(*instructions: str, stall: int = 2) -> list:
    return [(instruction, stall, 0) for instruction in instructions]


def exponentials(first: int, count: int) -> list[str]:
    return [f"MUFU.EX2 R{first + i}, R{first + i}" for i in range(count)]


SOFTMAX = [
    ".L_masked:",  # a loop that masks, so that it is not the steady state
    *block("LDTM.x16 R4, tmem[UR4]", *["FSEL R4, R4, -INF, P3"] * 16, *exponentials(4, 16), "@P1 BRA `(.L_masked)"),
    ".L_softmax:",
    *block("LDTM.x16 R4, tmem[UR4]", *EMULATION, *exponentials(6, 14), "MUFU.EX2 R63, R63"),
    *block("VOTE.ANY P0, P0", "@!P0 BRA `(.L_p)"),
    ".L_detour:",
    *block("LDTM.x16 R64, tmem[UR4]", *exponentials(64, 16), "STL [R1], R64", "VOTE.ANY P0, !PT"),
    *block("@P0 BRA `(.L_detour)"),
    ".L_p:",
    *block("STTM.x8 tmem[UR5], R4", "@P2 BRA `(.L_softmax)", "EXIT"),
]
CORRECTION = [
    ".L_correction:",
    *block("LDTM.x16 R20, tmem[UR4+0x100]", *["FMUL2 R20, R20.F32x2.HI_LO, R43.F32"] * 8),
    *block("STTM.x16 tmem[UR5+0x100], R20", "@P0 BRA `(.L_correction)", "EXIT"),
]
# M = 128, N = 64 in the descriptor
MMA = [
    *block("UMOV UR8, 0x8100490", "MOV R30, RZ"),
    ".L_mma:",
    *block(*["UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR10], tmem[UR7], idesc[UR8], UP0", "UIADD3 UR6, UR6, 0x2"] * 4),
    *block("LDL R9, [R1]", "@P0 BRA `(.L_mma)", "EXIT"),
]
LOAD = [".L_load:", *block("UTMALDG.4D [UR24], [UR14], desc[URZ]", "R2UR UR4, R11", "@P0 BRA `(.L_load)", "EXIT")]
KERNEL = [
    *block("@P4 BRA `(.L_4)", "@P5 BRA `(.L_5)", "@P6 BRA `(.L_6)"),
    *block("USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xb8"),
    *SOFTMAX,
    ".L_4:",
    *block("USETMAXREG.DEALLOC.CTAPOOL 0x58"),
    *CORRECTION,
    ".L_5:",
    *block("USETMAXREG.DEALLOC.CTAPOOL 0x38"),
    *MMA,
    ".L_6:",
    *LOAD,
]


def code_of(listing):
    _, kernels = parse_listing(listing_text(listing, 100))
    return kernels["kernel"]


@pytest.fixture(scope="module")
def report():
    report = report_code("kernel", code_of(KERNEL), 100, {"threads": 512})
    add_per_score(report, 64)
    return report


def test_exponentials_are_traced_to_their_instructions():
    count, own = emulated_exp2(code_of(block(*EMULATION)).instructions)
    assert count == 2
    left_out = {0, 4, 12}  # the scaling, a constant, the conversion
    assert [i.text.split("  ")[1] for i in own] == [
        f"{text} ;" for k, text in enumerate(EMULATION) if k not in left_out
    ]


def test_an_exponential_without_a_clamp():
    count, own = emulated_exp2(code_of(block(EMULATION[0], *EMULATION[3:12])).instructions)
    assert (count, len(own)) == (2, 8)


def test_an_address_in_steps_of_another_size_is_no_exponential():
    code = code_of(block("MOV R4, R5", "IMAD R6, R4, 0x80000, R5", "LEA R7, R4, R5, 0x2"))
    assert emulated_exp2(code.instructions) == (0, [])


def test_softmax_warps(report):
    loop = report.score_loop
    assert loop is report.role_loops["softmax"]
    # LDTM, 13 of the emulation's listing, 15 MUFU, VOTE and branch, STTM and branch; the detour's 20 are conditional
    assert (loop.instructions - loop.conditional, loop.conditional) == (33, 20)
    # 16 scores: 14 exponentials of the MUFU and 2 emulated ones; the 15th is a factor
    assert (loop.scores, loop.emulated, loop.emulation) == (16, 2, 10)
    assert (loop.per_score, loop.cond_per_score, loop.net_per_score) == (2.06, 1.25, 1.44)
    assert loop.conditional_stall == 20 * 2
    # FFMA2 4, FADD2 3 and IMAD 1, two cycles each
    assert {name: loop.usual[name] for name in ("mufu", "fma", "issue")} == {"mufu": 15 * 8, "fma": 16, "issue": 33}
    assert loop.cycles["mufu"] == 31 * 8
    assert loop.pipe_per_score == 7.5  # the MUFU's 120


def test_roles(report):
    assert report.tcgen05
    loops = report.role_loops
    assert list(loops) == ["softmax", "correction", "mma", "load"]
    assert [loop.instructions for loop in loops.values()] == [53, 11, 10, 3]
    assert [loop.counts["local"] for loop in loops.values()] == [1, 0, 1, 0]
    assert loops["mma"].shapes == {"UTCHMMA.128x64x16": 4}
    # the detour's R64 … R79; LDTM.x16 R20 of the correction; R30 before the loop; no setmaxnreg before the load
    assert [(loop.registers, loop.register_limit) for loop in loops.values()] == [
        (80, 184),
        (44, 88),
        (31, 56),
        (None, None),
    ]


def test_a_detour_is_no_loop_of_its_own(report):
    assert sorted(loop.role.split("@")[0] for loop in report.loops) == [
        "correction",
        "load/store",
        "mma",
        "softmax",
        "softmax",
    ]
    masked = next(loop for loop in report.loops if loop.role.startswith("softmax") and not loop.main)
    assert (masked.scores, masked.emulated, masked.per_score) == (16, 0, 2.12)  # 34 / 16


def test_a_loop_that_goes_on_while_a_lane_wants_it_is_no_detour():
    text = listing_text(KERNEL, 100).replace("VOTE.ANY P0, !PT", "VOTE.ANY P0, P6")
    _, kernels = parse_listing(text)
    report = report_code("kernel", kernels["kernel"], 100, {"threads": 512})
    (inner,) = (loop for loop in report.loops if loop.scores and loop.instructions == 20)
    assert inner.conditional == 0


@pytest.mark.parametrize(
    ("instruction", "registers", "width"),
    [
        ("LDTM.x32 R100, tmem[UR7]", range(100, 132), 132),
        ("LDTM.STAT.x32.MAX.F32 R137, R100, tmem[UR9]", [137, *range(100, 132)], 138),
        ("STTM.x16 tmem[UR4], R36", [], 52),
        ("FADD2 R158, R168.F32x2.HI_LO, 12582912", [158, 159], 169),
        ("STS.128 [R4+0x10], R8", [], 12),
        ("FSETP.GE.AND P1, PT, R162, -8, PT", [], 163),
        ("SYNCS.ARRIVE.TRANS64.A1T0 RZ, [R136+URZ+0x38070], RZ", [], 137),
        ("UMOV UR200, UR15", [], 0),
    ],
)
def test_registers_that_an_instruction_names(instruction, registers, width):
    (found,) = code_of(block(instruction)).instructions
    assert written(found) == list(registers)
    assert needed([found]) == width


def test_a_pair_is_read_whole():
    assert read("-R4.F32x2.HI_LO") == [4, 5]
    assert read("R4.reuse.F32") == [4]
    assert read("[R4+0x10]") == read("12582912") == read("UR4") == []


def test_cycles_of_128_keys(report):
    """Eight blocks of 16 keys past two tiles of 128 rows, head dims 64; Q, K and V are read once for each tile."""
    step = step_of(report, 64, 64, itemsize=2)
    assert step.tensor == 8 * 2 * 256 * 16 * (64 + 64) / 8192
    assert step.smem == 8 * 2 * (128 * 64 + 16 * 64 + 16 * 64) * 2 / 128
    assert step.exp2 == 8 * 256 * 16 / 16
    assert (step.mufu, step.fma, step.issue) == (8 * 2 * 120, 8 * 2 * 16, 8 * 2 * 33)
    assert step.busiest == step.mufu
    fp8 = step_of(report, 64, 64, itemsize=1)
    assert (fp8.tensor, fp8.smem, fp8.exp2) == (step.tensor / 2, step.smem / 2, step.exp2)


def test_tensor_memory_holds_one_tile_of_256_columns(report):
    step = step_of(report, 256, 256, itemsize=2)
    assert (step.tensor, step.issue) == (8 * 2 * 128 * 16 * 512 / 8192, 8 * 33)
