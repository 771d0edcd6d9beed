"""Chains and streams of instructions whose cycles follow from the constants: issue, pipes, latencies, shared memory."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from ptxsim.timing.assembler import find_ptxas
from ptxsim.timing.cubin import parse_listing, run_ptxas
from ptxsim.timing.instructions import register_reads
from ptxsim.timing.recorder import bank_passes
from ptxsim.timing.replay import TimedLaunch
from tests.testing import ptx
from tests.testing.timed import A100, H100, chains, gaps, issued, recorded, timed

OUT = [np.zeros(2048, np.float32)]
NO_PORTS = H100.with_values(register_ports=0)
FMA = "fma.rn.f32 {d}, {d}, %f2, %f3;"
EX2 = "ex2.approx.ftz.f32 {d}, {d};"
REGISTERS = "".join(f"mov.b32 %r{k}, %t;" for k in range(1, 7))


def stream(launch, gpu, warps, opcode):
    """Cycles from the first to the last issue of an opcode, by any warp, and how many of them there are."""
    replay = launch.replay(gpu, times=True)
    times = np.concatenate([issued(launch, replay, warp, opcode) for warp in range(warps)])
    return int(times.max() - times.min()), len(times)


def test_a_chain_of_ffma_takes_the_compilers_stall_counts():
    launch = timed(chains(FMA, 1, 64), [], OUT)
    assert gaps(launch, H100, "FFMA") == [4] * 63


@pytest.mark.parametrize(("gpu", "target"), [(A100, "sm_80"), (H100, "sm_90a")])
def test_the_compiler_of_cuda_13(monkeypatch, gpu, target):
    """PTX 9.4 is that of another ptxas; the chain is the same, and its machine code is read as well."""
    monkeypatch.setattr(ptx, "HEADER", ptx.HEADER.replace("8.8", "9.4"))
    recording = recorded(chains(FMA, 1, 16), [], OUT, target=target)
    made = run_ptxas(find_ptxas(recording.ptx), recording.ptx)
    launch = TimedLaunch(recording, made)
    assert 8 <= launch.registers <= 16 and gaps(launch, gpu, "FFMA")[-14:] == [4] * 14


@pytest.mark.parametrize(("gpu", "target", "interval"), [(NO_PORTS, "sm_90a", 1), (A100, "sm_80", 2)])
def test_independent_ffma_are_bound_by_their_lanes(gpu, target, interval):
    """32 lanes a quarter on Hopper, 16 on Ampere; four warps have a quarter each, eight share them."""
    body = chains(FMA, 8, 32)
    for warps in (1, 4, 8, 16):
        cycles, count = stream(timed(body, [], OUT, threads=32 * warps, target=target), gpu, warps, "FFMA")
        least = interval * count / min(warps, 4)
        assert count == 256 * warps and least - 2 <= cycles < 1.2 * least, warps


def test_the_quarters_issue_one_instruction_a_cycle():
    """FFMA and integers have different pipes, of 1 and 2 cycles; two FFMA for each integer are bound by issue, though
    warps that are in step want the same pipe at the same time."""
    two = "fma.rn.f32 {d}, {d}, %f2, %f3; fma.rn.f32 {d}, {d}, %f3, %f2;"
    two += "add.u32 %r1{k}, %r1{k}, %r2{k};" + two + "xor.b32 %r1{k}, %r1{k}, %r2{k};"
    start = "".join(f"mul.lo.u32 %r{n}{k}, %g, {n * k + 3};" for n in (1, 2) for k in range(8))
    body = chains(two, 8, 8, start=start) + "".join(f"xor.b32 %r1, %r1, %r1{k};" for k in range(8))
    launch = timed(body + "st.global.u32 [%rd1+4096], %r1;", [], OUT, threads=512)
    cycles, count = stream(launch, NO_PORTS, 16, "FFMA|IADD|LOP3")
    assert count > 0.95 * 16 * 8 * 8 * 6 and count / 4 - 1 <= cycles < 1.35 * count / 4


def test_register_ports_bind_what_reads_three_registers():
    """3 registers at 2 a cycle and quarter: 1.5 cycles an instruction."""
    start = "".join(f"add.f32 %f{n}{k}, %f1, 0f3F{n}{k}0000;" for n in (5, 6) for k in range(8))
    body = chains("fma.rn.f32 {d}, %f5{k}, %f6{k}, {d};", 8, 32, start=start)
    launch = timed(body, [], OUT, threads=256)
    cycles, count = stream(launch, H100.with_values(register_ports=2), 8, "FFMA")
    reads = sum(cost for cost, row in zip(reads_of(launch, "FFMA"), range(count // 8), strict=True)) / (count // 8)
    assert reads > 2.5 and cycles == pytest.approx(count / 4 * reads / 2, rel=0.06)
    free, _ = stream(launch, NO_PORTS, 8, "FFMA")
    assert free == pytest.approx(count / 4, rel=0.12)
    lost, _ = stream(launch, NO_PORTS.with_values(slots_lost=0.5), 8, "FFMA")
    assert lost == free  # slots are lost beside busy tensor cores alone


def reads_of(launch, opcode):
    table = launch.instruction_table(H100)
    return [int(row[9]) for row, i in zip(table, launch.code.instructions, strict=True) if i.opcode == opcode]


def test_the_reuse_cache_saves_reads():
    """Of the operand in the same place of the instruction before, where that has .reuse."""
    instructions = ["FFMA R0, R1.reuse, R2, R3", "FFMA R4, R1, R5, R6", "FFMA R7, R1, R5, R6", "FADD R7, R5, R1",
                    "STS.128 [R1], R8", "MUFU.EX2 R3, R4", "HGMMA.64x8x16.F32 R24, R4, gdesc[UR4], R24"]  # fmt: skip
    listing = "\n.target sm_90\n//--------------------- .text.kernel ----------\n"
    listing += "".join(f"/*{16 * n:04x}*/ {text} ; /* 0x0 */\n" for n, text in enumerate(instructions))
    code = parse_listing(listing)[1]["kernel"]
    assert register_reads(code) == [3, 2, 3, 2, 5, 1, 0]


@pytest.mark.parametrize(("lanes", "interval"), [(4, 8), (8, 4)])
def test_ex2_takes_the_mufu_pipe(lanes, interval):
    launch = timed(chains(EX2, 16, 8), [], OUT, threads=256)
    cycles, count = stream(launch, H100.with_values(mufu_lanes=lanes), 8, "MUFU.EX2")
    assert count == 8 * 128 and interval * (count / 4 - 1) <= cycles < 1.1 * interval * count / 4
    assert launch.replay(H100).sms[0].pipes["mufu"] == 8 * count / 4


def test_a_dependent_ex2_waits_for_the_latency():
    """The next one issues a cycle after the scoreboard of the result is free, if anything: 22 cycles of latency."""
    launch = timed(chains(EX2, 1, 16), [], OUT)
    assert set(gaps(launch, H100, "MUFU.EX2")) == {22}
    assert set(gaps(launch, H100.with_values(mufu_latency=40), "MUFU.EX2")) == {40}


def mma(steps, count):
    """``steps`` products on each of ``count`` accumulators."""
    registers = [", ".join(f"%f{n}" for n in range(k, k + 4)) for k in range(10, 10 + 4 * count, 4)]
    product = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {{{0}}}, {{%r1,%r2,%r3,%r4}}, {{%r5,%r6}}, {{{0}}};"
    return "".join(product.format(r) for r in registers) * steps


def mma_stream(count, steps):
    body = chains("", 4 * count, 0)
    at = body.index("add.f32 %f1, %f1, %f10;")
    return body[:at] + REGISTERS + mma(steps, count) + body[at:]


@pytest.mark.parametrize(("gpu", "target"), [(A100, "sm_80"), (H100, "sm_90a")])
def test_a_chain_of_mma_sync_takes_the_compilers_stall_counts(gpu, target):
    """24 cycles; arXiv 2206.02874 measured 24.7 on an A100."""
    launch = timed(mma_stream(1, 16), [], OUT, threads=128, target=target)
    assert gaps(launch, gpu, "HMMA") == [24] * 15


def test_mma_sync_takes_its_flops_of_the_quarters():
    """m16n8k16 has 4096 FLOP: 8 cycles on an A100's quarter with 512 FLOP a cycle."""
    launch = timed(mma_stream(8, 8), [], OUT, threads=256, target="sm_80")
    cycles, count = stream(launch, A100, 8, "HMMA")
    assert count == 8 * 64 and cycles == pytest.approx(8 * count / 4, rel=0.05)


# ---- shared memory ------------------------------------------------------------------------------------------------
LANES = np.arange(32)


@pytest.mark.parametrize(
    ("index", "size", "passes"),
    [
        (4 * LANES, 4, 1),
        (0 * LANES, 4, 1),  # one word for all
        (8 * LANES, 4, 2),
        (128 * LANES, 4, 32),
        (132 * LANES, 4, 1),  # padded rows
        (2 * LANES, 2, 1),
        (LANES, 1, 1),
        (8 * LANES, 8, 2),  # 256 bytes
        (16 * LANES, 16, 4),  # 512 bytes
        (128 * LANES, 16, 32),  # eight lanes go together, all at the same four banks
        (144 * LANES, 16, 4),
        (128 * LANES[:8] ^ 16 * LANES[:8], 16, 1),  # ldmatrix.x1 of a swizzled tile
        (128 * LANES[:8], 16, 8),
        (128 * LANES + 16 * (LANES // 8), 16, 32),  # each eight lanes meet, though not with the others
        (4 * LANES[:1], 4, 1),
        (4 * LANES[:0], 4, 1),  # no lane is active
    ],
)
def test_bank_passes(index, size, passes):
    assert bank_passes(np.asarray(index), size) == passes


def ldmatrix(address):
    """Eight ldmatrix.x4, of 4 KB each."""
    loads = "".join(
        f"ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{{', '.join(f'%r{n}' for n in range(k, k + 4))}}}, "
        f"[%r1+{1024 * (k - 10)}];"
        for k in range(10, 42, 4)
    )
    return f""".shared .align 128 .b8 buf[32768]; mov.u32 %r3, buf; and.b32 %r2, %t, 31; mov.u32 %r9, 0;
    mad.lo.u32 %r4, %t, 4, %r3; {"".join(f"st.shared.u32 [%r4+{512 * k}], %t;" for k in range(64))}
    {address} add.u32 %r1, %r1, %r3; bar.sync 0; {loads} {"".join(f"xor.b32 %r9, %r9, %r{k};" for k in range(10, 42))}
    mad.wide.u32 %rd1, %g, 4, %out0; st.global.u32 [%rd1], %r9;"""


@pytest.mark.parametrize(("gpu", "target"), [(A100, "sm_80"), (H100, "sm_90a")])
@pytest.mark.parametrize(
    ("address", "passes"),
    [
        ("shl.b32 %r1, %r2, 4;", 4),
        ("shl.b32 %r1, %r2, 7;", 32),
        ("and.b32 %r5, %r2, 7; shl.b32 %r1, %r2, 7; shl.b32 %r5, %r5, 4; xor.b32 %r1, %r1, %r5;", 4),
    ],
    ids=["rows of 16 bytes", "rows of 128 bytes", "swizzled"],
)
def test_ldmatrix_goes_through_the_banks(gpu, target, address, passes):
    """Four warps, each with a quarter and an ldmatrix.x4 of 512 bytes; the SM has one shared memory. With conflicts the
    quarters' own 8 cycles do not matter."""
    launch = timed(ldmatrix(address), [], OUT, threads=128, target=target)
    cycles, count = stream(launch, gpu, 4, "LDSM")
    assert count == 32 and cycles == pytest.approx(passes * (count - 1), abs=10)
    assert Counter(launch.conflicts[i.line] for i in launch.code.instructions if i.opcode == "LDSM") == {passes: 8}
