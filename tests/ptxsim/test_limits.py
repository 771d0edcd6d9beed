"""What the hardware has only so much of: registers, shared and tensor memory, barriers, and the geometry of a launch.

Each limit is broken once and reached once.
"""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

import cute_fa
import ptxsim
from ptxsim.errors import Deadlock, MemoryFault, SimError, SyncError
from ptxsim.host import images
from ptxsim.host.cubin import register_counts, resizing_kernels
from ptxsim.host.launches import LaunchRequest, LoadedKernel
from ptxsim.host.simulation import Simulation
from ptxsim.machine import machine
from tests.testing.copy_kernel import compile_scale
from tests.testing.ptx import kernel_text, run

OUT = "mul.wide.u32 %rd40, %g, 4; add.s64 %rd41, %out0, %rd40;"


def threads_run(body, threads=128, **options):
    return run(OUT + body, [], [np.zeros(threads * options.get("grid", 1), np.uint32)], threads=threads, **options)


# ---- registers -----------------------------------------------------------------------------------------------------

ROLES = """shr.u32 %r1, %t, 7; setp.eq.u32 %p1, %r1, 0; @%p1 bra PRODUCER;
    setmaxnreg.inc.sync.aligned.u32 {consumer}; bra END;
  PRODUCER: setmaxnreg.dec.sync.aligned.u32 {producer};
  END: st.global.u32 [%rd41], %g;"""


@pytest.mark.parametrize("seed", [None, 1])
def test_registers_that_fit(seed):
    """The split of FlashAttention-3's three warpgroups: 24 + 2 * 240 registers are what 3 * 168 were."""
    out = threads_run(ROLES.format(consumer=240, producer=24), threads=384, registers=168, seed=seed)
    np.testing.assert_array_equal(out, np.arange(384))


def test_launch_registers_are_rounded_up():
    """161 registers are launched as 168: a pool of 3 * 161 would not do."""
    threads_run(ROLES.format(consumer=240, producer=24), threads=384, registers=161)


@pytest.mark.parametrize("seed", [None, 1])
def test_an_increase_that_the_pool_can_never_serve_is_a_hang(seed):
    with pytest.raises(Deadlock) as caught:
        threads_run(ROLES.format(consumer=240, producer=32), threads=384, registers=168, seed=seed)
    text = str(caught.value)
    assert re.search(r"cta\(0,0,0\): \d+ registers are free of 64512 \(launched with 168 a thread, 12 warps\)", text)
    assert "warpgroup 0 owns 32 a thread" in text
    assert re.search(r"warpgroup [12] owns (168|168/240|240/168) a thread and waits for 240: \d+ registers more", text)
    assert "setmaxnreg.inc.sync.aligned.u32 240" in caught.value.text


def test_exited_warps_do_not_fill_the_pool():
    body = "setp.lt.u32 %p1, %t, 128; @%p1 exit; setmaxnreg.inc.sync.aligned.u32 176;"
    with pytest.raises(Deadlock, match="warpgroup 1 owns 168 a thread and waits for 176: 1024 registers more"):
        threads_run(body, threads=256, registers=168)


def test_part_of_a_warpgroup():
    with pytest.raises(SyncError, match=r"some of the warps of warpgroup 1 of cta\(1,0,0\)"):
        body = "setp.lt.u32 %p1, %t, 128; @%p1 exit; setp.eq.u32 %p1, %c, 0; @%p1 exit;"
        threads_run(body + "setmaxnreg.dec.sync.aligned.u32 40;", threads=160, grid=2, registers=168)


def test_one_setmaxnreg_in_several_branches():
    """Each warp of a warpgroup may have its own copy of the instruction, with the same count."""
    body = """setp.lt.u32 %p1, %t, 64; @%p1 bra A; setmaxnreg.dec.sync.aligned.u32 {}; bra END;
    A: setmaxnreg.dec.sync.aligned.u32 48; END:"""
    threads_run(body.format(48), registers=168)
    with pytest.raises(SyncError, match="some of the warps of warpgroup 0"):
        threads_run(body.format(56), registers=168)


@pytest.mark.parametrize(
    ("instruction", "message"),
    [
        ("setmaxnreg.dec.sync.aligned.u32 16;", r"16 registers, not a multiple of 8 in 24\.\.256"),
        ("setmaxnreg.inc.sync.aligned.u32 264;", r"264 registers, not a multiple of 8 in 24\.\.256"),
        ("setmaxnreg.dec.sync.aligned.u32 100;", r"100 registers, not a multiple of 8"),
        ("setmaxnreg.dec.sync.aligned.u32 176;", r"dec to 176 registers by a warp that owns 168"),
        ("setmaxnreg.inc.sync.aligned.u32 160;", r"inc to 160 registers by a warp that owns 168"),
        ("setp.lt.u32 %p1, %t, 96; @%p1 setmaxnreg.dec.sync.aligned.u32 160;", r"some of the warps of warpgroup 0"),
    ],
)
def test_wrong_setmaxnreg(instruction, message):
    with pytest.raises(SyncError, match=message) as caught:
        threads_run(instruction, registers=168)
    assert "setmaxnreg" in caught.value.text


def test_registers_of_a_kernel_come_from_its_cubin():
    """FA3's kernel fills the register file: 65536 / threads, rounded down to a multiple of 8; and its roles fit."""
    q = torch.zeros(1, 130, 1, 64, dtype=torch.bfloat16)
    with cute_fa.simulate("sm_90a") as simulation:
        cute_fa.flash_attn_func(q, q, q)
        launched = simulation.launches[-1]
        assert launched.registers == 65536 // launched.block[0] // 8 * 8
        cubin = compile_scale().artifacts.CUBIN
        kept = frozenset().union(*(image.resizing for image in images._images.values()))
    (count,) = register_counts(cubin).values()
    assert 8 <= count <= 32
    assert launched.name in kept and resizing_kernels(cubin) == frozenset()
    with pytest.raises(SimError, match="not a cubin"):
        register_counts(b"nothing")


def launch(grid=(1, 1, 1), block=(32, 1, 1), cluster=(1, 1, 1), smem=0, arch="sm_90a", directives="", target="sm_90a",
           registers=None):  # fmt: skip
    """What a launch of an empty kernel meets before it runs; needs no stand-in library."""
    text = kernel_text("", 0, 0, target=target).replace("kernel()", f"kernel() {directives}")
    simulation = Simulation(arch, None, False, False, 4, None)
    simulation.launch(LaunchRequest(LoadedKernel(text, "kernel", registers), grid, block, cluster, smem))
    return simulation.launches[-1]


def test_setmaxnreg_that_ptxas_has_dropped():
    """Without .minnctapersm ptxas leaves it out of the machine code (warning C7508)."""
    text = kernel_text("setmaxnreg.inc.sync.aligned.u32 232;", 0, 0)
    simulation = Simulation("sm_90a", None, False, False, 4, None)
    dropped, kept = (
        LaunchRequest(LoadedKernel(text, "kernel", 92, resizes), (1, 1, 1), (160, 1, 1)) for resizes in (False, True)
    )
    simulation.launch(dropped)
    with pytest.raises(Deadlock, match="waits in setmaxnreg"):
        simulation.launch(kept)


def test_registers_of_a_launch():
    assert launch(block=(384, 1, 1), registers=168).registers == 168
    with pytest.raises(SimError, match=r"169 registers a thread in a CTA of \(384, 1, 1\) are 67584, an SM has 65536"):
        launch(block=(384, 1, 1), registers=169)


# ---- shared memory, grid, block, cluster ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "geometry",
    [
        dict(grid=(700, 1, 1)),
        dict(grid=(1, 65, 2), block=(16, 1, 64)),
        dict(block=(1, 1024, 1)),
        dict(block=(64, 2, 1), directives=".reqntid 64, 2, 1"),
        dict(block=(64, 2, 1), directives=".maxntid 128"),
        dict(grid=(16, 2, 1), cluster=(8, 2, 1)),
        dict(grid=(6, 1, 1), directives=".reqnctapercluster 2, 1, 1"),
        dict(smem=232448),
        dict(smem=166912, arch="sm_80", target="sm_80"),
        dict(smem=101376, arch="sm_86", target="sm_80"),
    ],
)
def test_launches_within_the_limits(geometry):
    launched = launch(**geometry)
    assert launched.grid == geometry.get("grid", (1, 1, 1))
    assert launched.warp_instrs > 0


@pytest.mark.parametrize(
    ("geometry", "message"),
    [
        (dict(grid=(1, 65536, 1)), r"the grid \(1, 65536, 1\) has more than \(2147483647, 65535, 65535\) CTAs"),
        (dict(grid=(1, 1, 65536)), "has more than"),
        (dict(grid=(2**31, 1, 1)), "has more than"),
        (dict(grid=(1, 0, 1)), "is empty"),
        (dict(block=(1025, 1, 1)), r"\(1025, 1, 1\) threads in a CTA; at most 1024"),
        (dict(block=(1, 1, 65)), r"and \(1024, 1024, 64\) in x, y, z"),
        (dict(block=(0, 1, 1)), "threads in a CTA"),
        (dict(block=(2, 64, 1), directives=".reqntid 64, 2, 1"), r"the kernel requires \(64, 2, 1\)"),
        (dict(block=(129, 1, 1), directives=".maxntid 128"), "the kernel allows 128"),
        (dict(grid=(17, 1, 1), cluster=(17, 1, 1)), "at most 16"),
        (dict(grid=(6, 1, 1), cluster=(4, 1, 1)), r"do not divide the grid \(6, 1, 1\)"),
        (dict(grid=(5, 1, 1), directives=".reqnctapercluster 2, 1, 1"), "do not divide the grid"),
        (dict(grid=(4, 1, 1), cluster=(4, 1, 1), directives=".reqnctapercluster 2, 1, 1"), r"requires \(2, 1, 1\)"),
        (dict(grid=(2, 1, 1), cluster=(2, 1, 1), arch="sm_80", target="sm_80"), "clusters exist from sm_90 on"),
        (dict(smem=232449), r"0 \+ 232449 bytes of shared memory, a CTA of sm_90 has 232448"),
        (dict(smem=166913, arch="sm_80", target="sm_80"), "a CTA of sm_80 has 166912"),
        (dict(smem=101377, arch="sm_89", target="sm_80"), "a CTA of sm_89 has 101376"),
    ],
)
def test_launches_that_the_device_refuses(geometry, message):
    with pytest.raises(SimError, match=message):
        launch(**geometry)


# ---- offsets -------------------------------------------------------------------------------------------------------

WIDEN = "mul.wide.{} %rd1, %r1, 4; add.s64 %rd2, %out0, %rd1; st.global.u32 [%rd2], %t;"
# 65536 * 65536 + tid is tid in 32 bits: the store goes to legal memory
PRODUCTS = {
    "mad": "mov.u32 %r2, {}; mad.lo.s32 %r1, %r2, 65536, %t;",
    "mul": "mov.u32 %r2, {}; mul.lo.s32 %r3, %r2, 65536; add.s32 %r1, %r3, %t;",
    "shl": "mov.u32 %r2, {}; shl.b32 %r3, %r2, 16; add.s32 %r1, %t, %r3;",
}


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("widening", ["s32", "u32"])
def test_offsets_that_overflow(product, widening):
    body = PRODUCTS[product] + WIDEN.format(widening)
    np.testing.assert_array_equal(threads_run(body.format(0), threads=32), np.arange(32))
    with pytest.raises(
        MemoryFault, match=r"32-bit offset into global memory overflows: 65536 (\* 65536|<< 16)"
    ) as caught:
        threads_run(body.format(65536), threads=32)
    assert PRODUCTS[product].split(";")[1].split()[0] in caught.value.text
    assert "lane 0" in caught.value.where


def test_offsets_with_and_without_a_sign():
    """-1 * 4 fits int32; 3 * 10^9 fits uint32, and overflows only where it is widened as a signed number."""
    body = "sub.u32 %r2, %t, 1; mul.lo.s32 %r3, %r2, 1; add.s32 %r1, %r3, 1;" + WIDEN.format("s32")
    np.testing.assert_array_equal(threads_run(body, threads=32), np.arange(32))
    body = "mov.u32 %r2, 3; mul.lo.s32 %r3, %r2, 1000000000; sub.u32 %r4, %r3, 3000000000; add.u32 %r1, %r4, %t;"
    small = body.replace("1000000000", "10000000").replace("3000000000", "30000000")
    for widening in ("s32", "u32"):
        np.testing.assert_array_equal(threads_run(small + WIDEN.format(widening), threads=32), np.arange(32))
    body = "mov.u32 %r2, 300; mul.lo.s32 %r3, %r2, 10000000; sub.u32 %r4, %r3, 3000000000; add.u32 %r1, %r4, %t;"
    np.testing.assert_array_equal(threads_run(body + WIDEN.format("u32"), threads=32), np.arange(32))
    with pytest.raises(MemoryFault, match=r"300 \* 10000000 = 3000000000"):
        threads_run(body + WIDEN.format("s32"), threads=32)


def test_lanes_that_are_not_there_and_numbers_that_are_no_offsets():
    """A guarded product counts in the lanes of its guard; a hash that wraps, and is masked, is no offset."""
    body = "setp.ge.u32 %p1, %t, 32; mov.u32 %r1, %t; @%p1 mul.lo.s32 %r1, %t, 16777216;" + WIDEN.format("s32")
    np.testing.assert_array_equal(threads_run(body, threads=32), np.arange(32))
    body = "mul.lo.s32 %r2, %t, 16777213; and.b32 %r3, %r2, 0; add.s32 %r1, %r3, %t;" + WIDEN.format("s32")
    np.testing.assert_array_equal(threads_run(body, threads=1024), np.arange(1024))


def test_bits_of_fp8_sums_reach_the_launch(monkeypatch):
    """``simulate(fp8_bits=…)`` is checked, and every wave of a launch gets it."""
    seen = []
    finish = machine.Machine.run
    monkeypatch.setattr(machine.Machine, "run", lambda self: (seen.append(self.wave.launch.fp8_bits), finish(self))[1])
    with ptxsim.simulate("sm_90a", fp8_bits=14) as simulation:
        a, b = torch.ones(300), torch.zeros(300)
        simulation.call(compile_scale(), (a, b, None, 3.0, 300))
    assert seen and set(seen) == {14}
    for bits in (7, 25):
        with (
            pytest.raises(SimError, match=f"fp8_bits is {bits}; .* are 8 to 24, or None"),
            ptxsim.simulate("sm_90a", fp8_bits=bits),
        ):
            pass
