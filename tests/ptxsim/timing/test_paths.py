"""Paths of warps through machine code: of our kernels and FlashAttention-4's, where one SASS instruction for each of
the PTX is checked line by line, and of toy kernels whose branches are awkward."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest
import torch

import cute_fa
from ptxsim.host.images import cubin_of
from ptxsim.timing import assembler
from ptxsim.timing.paths import OFF, ONE_TO_ONE, PathFinder, PathNotFound
from ptxsim.timing.recorder import Recorder
from ptxsim.timing.replay import TimedLaunch
from tests.testing.commands import run_ptxsim
from tests.testing.timed import A100, H100, chains, issued, recorded, timed

OUT = [np.zeros(2048, np.float32)]


def recordings(arch, head_dim, tokens, backward=False, num_sms=2):
    """Of a causal problem of one head."""
    torch.manual_seed(1)
    q, k, v = (torch.randn(1, tokens, 1, head_dim, dtype=torch.bfloat16, requires_grad=backward) for _ in range(3))
    recorder = Recorder()
    with cute_fa.simulate(arch, num_sms=num_sms) as simulation:
        simulation.observers.append(recorder)
        out = cute_fa.flash_attn_func(q, k, v, causal=True)
        if backward:
            out.backward(torch.randn_like(out))
    return recorder.recordings


def executed(recording, pattern):
    """How often the warps executed PTX instructions of a pattern."""
    lines = {n for n, line in enumerate(recording.ptx.split("\n"), 1) if re.search(pattern, line)}
    count = 0
    for trace in (trace for cta in recording.ctas for trace in cta):
        for entry in trace:
            if isinstance(entry, int) or isinstance(entry[0], int):
                block = recording.blocks[entry if isinstance(entry, int) else entry[0]]
                count += sum(line in lines for line in block.lines)
    return count


def of_opcodes(launch, opcodes, modifier):
    """How often the paths execute SASS instructions."""
    wanted = [re.fullmatch(opcodes, i.opcode) and (modifier is None or modifier in i.modifiers)
              for i in launch.code.instructions]  # fmt: skip
    return sum(count for n, count in Counter(launch.rows[:, 0].tolist()).items() if n >= 0 and wanted[n])


KERNELS = {
    "FA3 forward 64": ("sm_90a", 64, 256, False, H100, {"ex2", "wgmma"}),
    "FA3 forward 128": ("sm_90a", 128, 256, False, H100, {"ex2", "wgmma"}),
    "FA2 64": ("sm_80", 64, 128, True, A100, {"ex2", "mma", "ldmatrix"}),
    "FA2 128": ("sm_80", 128, 64, True, A100, {"ex2", "mma", "ldmatrix"}),
}


@pytest.mark.sampled
@pytest.mark.parametrize("name", KERNELS)
def test_our_kernels(name):
    """Forward, and the kernels of the backward: counts agree for all of them together, as they do line by line."""
    arch, head_dim, tokens, backward, gpu, present = KERNELS[name]
    found = recordings(arch, head_dim, tokens, backward)
    assert len(found) == (4 if backward else 1)
    seen = set()
    for recording in found:
        launch = TimedLaunch(recording)
        for pattern, (opcodes, modifier) in ONE_TO_ONE.items():
            count = executed(recording, pattern)
            assert count == of_opcodes(launch, opcodes, modifier), (recording.name, pattern)
            seen |= {word for word in ("ex2", "wgmma", "mma", "ldmatrix") if count and rf"\b{word}" in pattern}
        replay = launch.replay(gpu, min(launch.ctas, 4) // launch.cluster_size * launch.cluster_size)
        assert 500 < replay.cycles < 60_000 and (replay.ends > 0).all()
    assert present <= seen


@pytest.mark.thorough
def test_fa4_forward():
    """In a process of its own, as a script: each launch's paths are checked before it is replayed."""
    code, output = run_ptxsim("time", "examples/fa4_forward.py", "--arch", "sm_90a", "--gpu", "h100", "--sms", "2")
    assert code == 0, output
    (found,) = re.findall(r"│ flash_attncuteflash_fwd_sm90.*?│\s*(\d)×1×1 │ 2 SMs.*?│\s*([\d,]+) │", output)
    assert 3000 < int(found[1].replace(",", "")) < 30_000


# ---- other paths --------------------------------------------------------------------------------------------------
def finder_of(recording):
    code = assembler.assemble(recording.ptx, cubin_of(recording.ptx))[recording.name]
    return PathFinder(code, recording.blocks, recording.ptx)


def test_another_warps_trace_has_another_path():
    """The exponentials of one block of keys more, without its barriers."""
    (recording,) = recordings("sm_80", 64, 128)
    finder = finder_of(recording)
    trace = recording.ctas[0][0]
    path = finder.find(trace)
    lines = {n for n, line in enumerate(recording.ptx.split("\n"), 1) if "ex2.approx" in line}
    block = max((e for e in trace if isinstance(e, int)), key=lambda n: len(lines & {*recording.blocks[n].lines}))
    with pytest.raises(
        PathNotFound,
        match=r"no path of a warp executes what PTX line \d+ becomes \d+ times, as the PTX did: .*ex2\.approx",
    ):
        finder.find([*trace, block])
    assert finder.find(trace) == path


LOOP = """setp.eq.u32 %p1, %t, 0; ld.global.u32 %r1, [%in0]; cvt.rn.f32.u32 %f1, %t; mov.u32 %r2, 0;
LOOP: ex2.approx.ftz.f32 %f1, %f1; add.u32 %r2, %r2, 1; setp.lt.u32 %p2, %r2, %r1; @%p2 bra LOOP;
mad.wide.u32 %rd1, %g, 4, %out0; st.global.f32 [%rd1], %f1;"""


@pytest.mark.parametrize("turns", [1, 2, 3, 4, 5, 8, 13])
def test_a_loop_that_ptxas_unrolls(turns):
    """Without a barrier, copy or product in it: the branches' outcomes alone say how often it turns."""
    launch = timed(LOOP, [np.array([turns], np.uint32)], OUT)
    code = launch.code.instructions
    executed = Counter(code[n].predicate is None for n in launch.rows[:, 0].tolist() if code[n].opcode == "MUFU")
    assert executed[True] <= turns <= executed.total() <= turns + 4


def sides(first, second, ends=""):
    """Even and odd lanes go different ways, ten instructions each."""
    return f"""cvt.rn.f32.u32 %f1, %t; mov.f32 %f2, 0f3F000001; mov.f32 %f3, 0f3F000011; and.b32 %r1, %t, 1;
    mad.wide.u32 %rd1, %g, 4, %out0; setp.eq.u32 %p1, %r1, 0; @%p1 bra EVEN; {first * 10} {ends} bra JOIN;
    EVEN: {second * 10} JOIN: add.f32 %f1, %f1, %f2; st.global.f32 [%rd1], %f1;"""


@pytest.mark.sampled
@pytest.mark.parametrize(
    "instructions",
    [
        ("fma.rn.f32 %f1, %f1, %f2, %f3;", "fma.rn.f32 %f1, %f1, %f3, %f2;"),
        ("ex2.approx.ftz.f32 %f1, %f1;", "ex2.approx.ftz.f32 %f1, %f1; mul.rn.f32 %f1, %f1, %f2;"),
    ],
)
@pytest.mark.parametrize("ends", ["", "st.global.f32 [%rd1], %f1; exit;"])
def test_lanes_that_part_execute_both_sides(instructions, ends):
    """One after the other; where all lanes go one way, that side alone."""
    body = sides(*instructions, ends)
    launch = timed(body, [], OUT)
    assert of_opcodes(launch, "FFMA|MUFU", None) == 20
    launch.replay(H100)
    for together, count in (("setp.eq.u32 %p1, %r1, 2;", 10), ("setp.ne.u32 %p1, %r1, 2;", 10)):
        launch = timed(
            body.replace("setp.eq.u32 %p1, %r1, 0;", together + "setp.eq.and.u32 %p1, %n, 32, %p1;"), [], OUT
        )
        assert of_opcodes(launch, "FFMA|MUFU", None) == count


def test_the_poll_behind_a_wait_is_not_the_next_wait():
    """Behind a TRYWAIT that timed out ptxas sleeps for the time that the wait names and polls once more, in the same
    line: two waits in a loop of five turns are ten TRYWAIT."""
    wait = (
        "{{ .reg .pred P; W{0}: mbarrier.try_wait.parity.shared.b64 P, [{1}], 1, 9999; @P bra D{0}; bra W{0}; D{0}: }}"
    )
    body = f"""mov.u32 %r1, first; mov.u32 %r2, second; ld.global.u32 %r4, [%in0]; mov.u32 %r3, 0;
    setp.eq.u32 %p1, %t, 0; @!%p1 bra READY; mbarrier.init.shared.b64 [%r1], 1; mbarrier.init.shared.b64 [%r2], 1;
    READY: bar.sync 0; LOOP: {wait.format(1, "%r1")} {wait.format(2, "%r2")}
    add.u32 %r3, %r3, 1; setp.lt.u32 %p2, %r3, %r4; @%p2 bra LOOP;
    mad.wide.u32 %rd1, %g, 4, %out0; st.global.u32 [%rd1], %t;"""
    declared = ".shared .align 8 .b64 first; .shared .align 8 .b64 second;"
    launch = timed(declared + body, [np.array([5], np.uint32)], OUT)
    assert of_opcodes(launch, "SYNCS", "TRYWAIT") == 10


def test_what_follows_a_predicated_exit():
    """A path goes on behind the exit of other warps, also when nothing else is left to do."""
    body = "setp.ge.u32 %p1, %t, 32; @%p1 exit;" + chains("fma.rn.f32 {d}, {d}, %f2, %f3;", 1, 20)
    launch = timed(body, [], OUT, threads=64)
    replay = launch.replay(H100, times=True)
    assert [len(issued(launch, replay, warp, "FFMA|STG")) for warp in (0, 1)] == [21, 0]


def test_line_information_does_not_matter():
    """``.loc`` between the instructions moves them apart."""
    from tests.ptxsim.timing.test_barriers import ring

    plain = recorded(ring(4), [], OUT, threads=64)
    located = recorded(
        re.sub(r";\s*", ";\n.loc 1 7 0\n.loc 1 8 0\n.loc 1 9 0\n", ring(4).split("READY:", 1)[0]) + "READY:"
        + re.sub(r";\s*", ";\n.loc 1 7 0\n.loc 1 8 0\n.loc 1 9 0\n", ring(4).split("READY:", 1)[1]), [], OUT,
        threads=64,
    )  # fmt: skip
    assert located.ptx.count(".loc") > 100
    a, b = (TimedLaunch(recording) for recording in (plain, located))
    assert (a.rows == b.rows).all() and a.replay(H100).cycles == b.replay(H100).cycles
    assert OFF not in a.rows
