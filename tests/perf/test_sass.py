"""The SASS reader against a listing whose figures were counted by hand, and against a kernel compiled here."""

from __future__ import annotations

from collections import Counter

import pytest

from perf.sass.flow import ControlFlow
from perf.sass.metrics import add_per_score, report_code
from perf.sass.opcodes import classify, tensor_operation
from ptxsim.timing.cubin import parse_listing
from tests.testing.listing import listing_text

# (instruction, stall count, mask of scoreboards waited for). The loop spins on a barrier, and a block that only some
# iterations run stands out of line behind the exit.
LISTING = [
    ("MOV R1, c[0x0][0x28]", 4, 0),
    ".L_x_0:",
    ("LDSM.16.M88.4 R8, [R2]", 2, 0),
    *[("HMMA.16816.F32.BF16 R4, R8, R10, R4", 6, 1)] * 8,
    ("MUFU.EX2 R5, R4", 5, 2),
    ".L_x_1:",
    ("SYNCS.PHASECHK.TRANS64.TRYWAIT P2, [R3]", 1, 0),
    ("@!P2 BRA `(.L_x_1)", 5, 0),
    ("@P0 BRA `(.L_x_3)", 5, 0),
    ".L_x_2:",
    ("FFMA R6, R5, R5, R6", 4, 0),
    ("F2FP.BF16.PACK_AB R7, R6, R5", 2, 0),
    ("@P1 BRA `(.L_x_0)", 5, 0),
    ("STL [R1], R4", 1, 0),
    ("EXIT", 5, 0),
    ".L_x_3:",
    ("FADD R6, R6, R5", 4, 0),
    ("IMAD.MOV.U32 R7, RZ, RZ, R6", 3, 0),
    ("BRA `(.L_x_2)", 5, 0),
]


# A consumer on sm_90: its spin on a barrier stands out of line, and O is rescaled in a nested loop that runs at most
# once.
CONSUMER_LISTING = [
    ("MOV R1, c[0x0][0x28]", 4, 0),
    ".L_x_0:",
    ("HGMMA.64x128x16.F32.BF16 R88, gdesc[UR24], RZ, !UPT, gsb0", 1, 0),
    ("SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R0+UR32+0x30020], R21", 4, 0),
    ("@!P0 BRA `(.L_x_4)", 5, 1),
    ".L_x_1:",
    ("HGMMA.64x128x16.F32.BF16 R24, R180, gdesc[UR8].tnspB, R24, gsb0", 1, 0),
    ("WARPGROUP.DEPBAR.LE gsb0, 0x1", 2, 0),
    ("MUFU.EX2 R5, R88", 8, 0),
    ("VOTE.ANY P0, !P0", 4, 0),
    ("@!P0 BRA `(.L_x_3)", 5, 0),
    ".L_x_2:",
    ("VOTE.ANY P0, !PT", 4, 0),
    ("FMUL R24, R24, R5", 4, 0),
    ("@P0 BRA `(.L_x_2)", 5, 0),
    ".L_x_3:",
    ("F2FP.BF16.PACK_AB R180, R89, R88", 2, 0),
    ("@P1 BRA `(.L_x_0)", 5, 0),
    ("EXIT", 5, 0),
    ".L_x_4:",
    ("IMAD.U32 R21, RZ, RZ, UR9", 3, 0),
    ".L_x_5:",
    ("SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R23+URZ+0x30020], R21", 4, 0),
    ("@!P0 NANOSLEEP.SYNCS 0x989680", 4, 0),
    ("@!P0 BRA `(.L_x_5)", 5, 0),
    ("BRA `(.L_x_1)", 5, 0),
]


@pytest.fixture(scope="module")
def report():
    arch, kernels = parse_listing(listing_text(LISTING))
    assert arch == 80
    return report_code("kernel", kernels["kernel"], arch, {"regs": 20})


def test_parse_reads_predicates_modifiers_and_control_bits():
    _, kernels = parse_listing(listing_text(LISTING))
    code = kernels["kernel"]
    spin = next(i for i in code.instructions if i.predicate == "@!P2")
    assert (spin.opcode, spin.operands, spin.stall) == ("BRA", ["`(.L_x_1)"], 5)
    load = code.instructions[1]
    assert (load.opcode, load.modifiers, load.operands) == ("LDSM", ["16", "M88", "4"], ["R8", "[R2]"])
    assert [code.instructions[2].wait, code.instructions[10].wait, load.wait] == [1, 2, 0]
    assert code.instructions[code.labels[".L_x_3"]].opcode == "FADD"


def test_control_flow_finds_the_loop_with_its_block_out_of_line():
    _, kernels = parse_listing(listing_text(LISTING))
    flow = ControlFlow(kernels["kernel"])
    outer = max(flow.loops.values(), key=lambda loop: len(loop.body))
    assert sorted(map(len, (loop.body for loop in flow.loops.values()))) == [1, 5]
    opcodes = [i.opcode for i in flow.instructions(outer.body)]
    assert "FADD" in opcodes
    assert "EXIT" not in opcodes


def test_loop_figures(report):
    (loop,) = report.loops
    assert loop is report.main_loop
    # 17 = LDSM, 8 HMMA, MUFU, BRA, FFMA, F2FP, BRA and the three out of line; the spin's two do not count.
    assert (loop.instructions, loop.conditional, loop.copying) == (17, 3, 0)
    expected = Counter(tensor=8, ldsm=1, mufu_ex2=1, ffma=1, conv=1, branch=3, fadd=1, mov=1)
    assert loop.counts == expected
    assert loop.opcodes == Counter(HMMA=8, LDSM=1, MUFU=1, BRA=3, FFMA=1, F2FP=1, FADD=1, IMAD=1)
    assert loop.flops == 8 * 4 * (2 * 16 * 8 * 16)
    # tc 131072 flops / 2048; LDSM.4 moves 512 bytes a warp; FP32 takes two cycles on sm_80.
    assert loop.cycles == {"tc": 64, "mufu": 8, "fma": 4, "alu": 2, "issue": 17, "smem": 16}
    assert loop.stall_sum == 2 + 5 + 5 + 4 + 2 + 5 + 4 + 3 + 5
    assert loop.conditional_stall == 4 + 3 + 5
    assert loop.sb_waits == 9
    assert loop.row()["bound"] == "tc"
    assert loop.row()["util_serial"] == round(64 / (64 + 17), 3)


def test_consumer_loop():
    arch, kernels = parse_listing(listing_text(CONSUMER_LISTING, 90))
    report = report_code("kernel", kernels["kernel"], arch, {"threads": 384})
    (loop,) = report.loops
    assert loop is report.main_loop
    assert (loop.role, loop.nested, loop.address) == ("mma", 1, 0x10)
    # 10 always; conditional are the rescaling's three, and the two on the way to the spin and back; the spin's three
    # do not count
    assert (loop.instructions, loop.conditional) == (15, 5)
    assert loop.opcodes["SYNCS"] == 1
    assert loop.opcodes["NANOSLEEP"] == 0
    assert loop.conditional_stall == 4 + 4 + 5 + 3 + 5
    assert loop.stall_sum - loop.conditional_stall == 4 + 5 + 2 + 8 + 4 + 5 + 2 + 5
    assert loop.shapes == {"HGMMA.64x128x16.F32.BF16.SS": 1, "HGMMA.64x128x16.F32.BF16.RS": 1}
    assert loop.cycles["tc"] == 2 * 2 * 64 * 128 * 16 / 4096
    assert not report.wgmma_serialised


def test_kernel_figures(report):
    row = report.row()
    assert (row["regs"], row["ldl"], row["stl"], row["spill_in_hot"]) == (20, 0, 1, 0)
    assert (row["insts"], row["tensor_total"], row["tensor_peeled"], row["loops"]) == (22, 8, 0, 2)
    assert row["roles"] == "mma"


def test_per_score(report):
    add_per_score(report, 64)
    # 131072 flops are 4 score elements a thread at d = dv = 64.
    assert (report.loops[0].per_score, report.loops[0].cond_per_score) == (6 / 4, 3 / 4)
    add_per_score(report, 128, 64)
    assert report.loops[0].per_score == round(6 / (131072 / 384 / 128), 2)
    add_per_score(report, 64, backward=True)
    assert report.loops[0].per_score == round(6 / (131072 / 640 / 128), 2)


def test_a_conditional_block_that_copies_is_told_apart():
    """With an LDGSTS in the place of its FADD the block out of line, three instructions, copies."""
    text = listing_text(LISTING).replace("FADD R6, R6, R5", "LDGSTS.E.BYPASS.128 [R9], [R10.64]")
    arch, kernels = parse_listing(text)
    copying = report_code("kernel", kernels["kernel"], arch, {})
    add_per_score(copying, 64)
    assert (copying.loops[0].conditional, copying.loops[0].copying) == (3, 3)
    assert copying.loops[0].copy_per_score == 3 / 4


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("IMAD.MOV.U32", "mov"),
        ("IMAD.WIDE", "imad"),
        ("MUFU.RCP", "mufu_other"),
        ("UTMALDG.2D", "tma"),
        ("UIADD3", "uniform"),
        ("ISETP.GE.AND", "int_alu"),
        ("HGMMA.64x128x16.F32", "tensor"),
        ("LDL.64", "local"),
    ],
)
def test_classify(instruction, expected):
    opcode, *modifiers = instruction.split(".")
    assert classify(opcode, modifiers) == expected


def test_wgmma_operand_bytes():
    both = tensor_operation("HGMMA", ["64x128x16", "F32", "BF16"], ["R24", "gdesc[UR4]", "R24"])
    assert (both.flops, both.smem_bytes) == (2 * 64 * 128 * 16, (64 + 128) * 16 * 2)
    from_registers = tensor_operation("HGMMA", ["64x128x16", "F32", "BF16"], ["R24", "R4", "gdesc[UR4]", "R24"])
    assert (from_registers.smem_bytes, from_registers.label[-3:]) == (128 * 16 * 2, ".RS")
    fp8 = tensor_operation("QGMMA", ["64x128x32", "F32", "E4M3", "E4M3"], ["R24", "gdesc[UR4]", "R24"])
    assert (fp8.rate, fp8.smem_bytes) == (2, (64 + 128) * 32)


WAIT_ALL, WAIT_ONE = "WARPGROUP.DEPBAR.LE gsb0, 0x0", "WARPGROUP.DEPBAR.LE gsb0, 0x1"
FIRST = "HGMMA.64x128x16.F32.BF16 R88, gdesc[UR24], RZ, !UPT"
SECOND, LAST = "HGMMA.64x128x16.F32.BF16 R88, gdesc[UR8], R88", "HGMMA.64x128x16.F32.BF16 R88, gdesc[UR8], R88, gsb0"


@pytest.mark.parametrize(
    ("instructions", "serialised"),
    [
        ([FIRST, SECOND, LAST, WAIT_ALL], False),
        ([FIRST, LAST, WAIT_ALL, FIRST, LAST, WAIT_ALL], False),
        ([f"{FIRST}, gsb0", WAIT_ALL, LAST, WAIT_ALL, LAST, WAIT_ALL], True),
        ([f"{FIRST}, gsb0", WAIT_ALL, "WARPGROUP.ARRIVE", LAST, WAIT_ALL], True),
        # the first product stays in flight beside the second
        ([f"{FIRST}, gsb0", "WARPGROUP.ARRIVE", LAST, WAIT_ONE, WAIT_ALL], False),
        ([f"{FIRST}, gsb0", WAIT_ONE, LAST, WAIT_ALL], False),
        (["HMMA.16816.F32.BF16 R4, R8, R10, R4", WAIT_ALL], False),
    ],
)
def test_serialised_wgmma(instructions, serialised):
    """ptxas, where it serialises, has every wgmma waited for before the next."""
    listing = [(text, 1, 0) for text in [*instructions, "EXIT"]]
    arch, kernels = parse_listing(listing_text(listing, 90))
    assert report_code("kernel", kernels["kernel"], arch, {}).wgmma_serialised is serialised


def test_a_listing_without_an_architecture_is_refused():
    with pytest.raises(ValueError, match="no architecture"):
        parse_listing("MOV R1, R2 ;")
