"""The race detector and matrix instructions: operands in shared memory, registers of wgmma, tcgen05."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ptxsim.errors import ProxyError, RaceError, WgmmaError
from tests.ptxsim import test_tcgen05 as tcgen05_tests
from tests.ptxsim import test_wgmma as wgmma_tests
from tests.ptxsim.test_wgmma import A_AT, B_AT, SHARED, place
from tests.testing.ptx import aligned, kernel_text, launch

FENCE, SYNC = "fence.proxy.async.shared::cta;", "bar.sync 0;"
REGISTERS = "{%r5, %r6, %r7, %r8}"


def multiply(change=lambda text: text, *, mn=0, a="%rd3", **options):
    """A wgmma m64n16k16 of operands that all 128 threads store to shared memory, with a changed kernel."""
    images = [place(torch.ones(rows, 16, dtype=torch.float16), at, 32, mn, 2) for rows, at in ((64, A_AT), (16, B_AT))]
    image = np.concatenate([x for x, _ in images])
    text = wgmma_tests.kernel(16, 16, "f32", "f16", "f16", a, transposes=f", {mn}, {mn}" if a == "%rd3" else f", {mn}",
                             **options)  # fmt: skip
    arrays = [image, np.array([d for _, d in images], np.uint64), np.zeros((128, 4), np.uint32), np.zeros((128, 8))]
    text = kernel_text(change(text), 3, 1, declarations=SHARED)
    launch(text, [aligned(x) for x in arrays], threads=128, race=True)


def without(sync, put=""):
    def change(text):
        assert text.count(sync) == 1
        return text.replace(sync, put)

    return change


@pytest.mark.parametrize("mn", [0, 1])
def test_wgmma_operands(mn):
    """What the generic proxy wrote must be fenced, and ordered."""
    multiply(mn=mn)
    with pytest.raises(ProxyError, match=r"no fence.proxy.async between the async proxy's read") as found:
        multiply(without(FENCE), mn=mn)
    assert "wgmma.mma" in found.value.text and "st.shared" in found.value.other[1]
    multiply(lambda text: without(FENCE)(text).replace(SYNC, SYNC + FENCE), mn=mn)
    with pytest.raises(RaceError, match=r"read of shared memory .* not ordered after the write"):
        multiply(without(SYNC), mn=mn)


OWN_ROWS = """shr.u32 %r71, %t, 5; and.b32 %r72, %t, 31; add.u32 %r70, %r50, OFFSET; mad.lo.u32 %r70, %r71, 512, %r70;
  mad.lo.u32 %r70, %r72, 16, %r70; st.shared.v4.u32 [%r70], {%r1, %r2, %r3, %r4}; fence.proxy.async.shared::cta;
  bar.warp.sync -1;"""


@pytest.mark.parametrize("mn", [0, 1])
def test_warps_read_their_own_rows_of_a(mn):
    """A warp may write its 16 rows of A (512 bytes) without a barrier of the warpgroup; other rows, and B, need one."""
    multiply(before=OWN_ROWS.replace("OFFSET", "0"), mn=mn)
    for offset in (512, B_AT - A_AT):
        with pytest.raises(RaceError, match=r"read of shared memory .* not ordered after the write"):
            multiply(before=OWN_ROWS.replace("OFFSET", str(offset)), mn=mn)


def test_operands_are_read_until_the_wait():
    """They may be written again after wgmma.wait_group and, by other warps, a barrier."""
    store = "st.shared.v4.u32 [%r51], {%r1, %r2, %r3, %r4};"
    wait = "wgmma.wait_group.sync.aligned 0;"
    multiply(wait=wait, after=f"bar.sync 1; {store}")
    with pytest.raises(RaceError, match=r"write of shared memory .* not ordered after the read") as found:
        multiply(wait="", after=f"bar.sync 1; {store} {wait}")
    assert found.value.other[2] == "wgmma of the warpgroup of cta(0,0,0).w0"


@pytest.mark.parametrize("a", ["%rd3", REGISTERS])
def test_wgmma_fence(a):
    """Before the first wgmma, and after other accesses to its registers."""
    multiply(a=a)
    with pytest.raises(WgmmaError, match=r"no wgmma.fence before the first"):
        multiply(without("wgmma.fence.sync.aligned;"), a=a)
    touches = ["add.f32 %f3, %f3, %f3;", "add.f32 %f40, %f3, %f3;"] + ["add.u32 %r6, %r6, 1;"] * (a == REGISTERS)
    for touch in touches:
        with pytest.raises(WgmmaError, match=r"no wgmma.fence between an access to") as found:
            multiply(without("wgmma.fence.sync.aligned;", f"wgmma.fence.sync.aligned; {touch}"), a=a)
        assert found.value.other[1] == touch and "wgmma.mma" in found.value.text
    moves = "wgmma.fence.sync.aligned; mov.f32 %f3, 0f00000000; mov.f32 %f40, %f3;"
    multiply(without("wgmma.fence.sync.aligned;", moves), a=a)


def test_code_after_a_return():
    """The fence comes on the one way to the wgmma, which stands behind a return that others reach without it."""

    def change(text):
        before, after = text.split("wgmma.fence.sync.aligned;")
        assert "setp.ne.b32 %p1" in before
        ways = "setp.gt.u32 %p9, %t, 4095; @%p9 bra OUT; wgmma.fence.sync.aligned; bra ON; OUT: ret; ON:"
        return before + ways + after

    multiply(change)
    with pytest.raises(WgmmaError, match=r"no wgmma.fence before the first"):
        multiply(lambda text: change(text).replace("OUT: ret;", "OUT:"))


def test_accumulators_are_in_flight_until_the_wait():
    wait = "wgmma.wait_group.sync.aligned 0;"
    for wrong in ("", "wgmma.wait_group.sync.aligned 1;"):
        with pytest.raises(WgmmaError, match=r"%f0 of a wgmma is read before wgmma.wait_group") as found:
            multiply(wait=wrong, after=f"add.f32 %f40, %f0, %f0; {wait}")
        assert "add.f32" in found.value.text
    with pytest.raises(WgmmaError, match=r"is written before wgmma.wait_group"):
        multiply(wait="", after=f"ld.global.f32 %f0, [%in0]; {wait}")
    with pytest.raises(WgmmaError, match=r"%f40 of a wgmma is read"):  # a move carries it along
        multiply(wait="", after=f"mov.f32 %f40, %f0; add.f32 %f41, %f40, %f40; {wait}")
    with pytest.raises(WgmmaError, match=r"is read before"):  # on one of two paths
        multiply(wait=f"setp.eq.u32 %p2, %t, 999; @%p2 bra SKIP; {wait} SKIP:", after=wait.replace("0", "1"))
    with pytest.raises(WgmmaError, match=r"%r6 of a wgmma is written"):
        multiply(a=REGISTERS, wait="", after=f"add.u32 %r6, %r6, 1; {wait}")


def fifth_generation(mutate="", change=lambda text: text, monkeypatch=None):
    """One tcgen05.mma of operands in shared memory; ``mutate`` comes before it, after the barrier."""
    run = tcgen05_tests.run
    with monkeypatch.context() as patch:
        patch.setattr(tcgen05_tests, "run", lambda text, *args, **more: run(change(text), *args, race=True, **more))
        tcgen05_tests.multiply("f16", "f16", "f16", mutate=mutate)


def test_tcgen05(monkeypatch):
    """Operands need the proxy fence; they may be written again when the commit has arrived."""
    fence = "fence.proxy.async;"
    fifth_generation(fence, monkeypatch=monkeypatch)
    with pytest.raises(ProxyError, match=r"async proxy's read") as found:
        fifth_generation("fence.mbarrier_init.release.cluster;", monkeypatch=monkeypatch)
    assert "tcgen05.mma" in found.value.text
    store = "st.shared.v4.u32 [%r51], {%r1, %r2, %r3, %r4};"
    wait = "WAIT: mbarrier.try_wait.parity.shared.b64 %p11, [%r52], 0; @!%p11 bra WAIT;"
    fifth_generation(fence, without(wait, wait + store), monkeypatch)
    with pytest.raises(RaceError, match=r"write of shared memory .* not ordered after the read") as found:
        fifth_generation(fence, without(wait, "bar.sync 1;" + store + wait), monkeypatch)
    assert found.value.other[2] == "tcgen05 of cta(0,0,0).w0"
