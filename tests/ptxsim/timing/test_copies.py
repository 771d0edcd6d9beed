"""TMA loads, stores and reductions, cp.async: latency, bandwidth of an SM's port, and what SMs share of the L2."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ptxsim.timing.replay import GROUP_WAIT
from tests.testing.timed import A100, H100, gaps, issued, timed

DATA, OUT = [np.zeros(1 << 16, np.uint32)], [np.zeros(1 << 14, np.uint32)]
STORE = "mad.wide.u32 %rd1, %g, 4, %out0; st.global.u32 [%rd1], %t;"
BUFFER = ".shared .align 128 .b8 buffer[32768]; .shared .align 8 .b64 bars[16];"
LOAD = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"


def loads(count, size, *, each=False, store=STORE):
    """Thread 0 loads ``count`` pieces and waits for them: at once, or for ``each``."""
    wait = "W{0}: mbarrier.try_wait.parity.shared.b64 %p3, [%r1], {1}; @!%p3 bra W{0};".format
    piece = f"{LOAD} [%r3], [%in0], {size}, [%r1];"
    expect = "mbarrier.arrive.expect_tx.shared.b64 _, [%r1], {};".format
    if each:
        body = "".join(expect(size) + piece + wait(n, n % 2) for n in range(count))
    else:
        body = expect(size * count) + piece * count + wait(0, 0)
    return f"""mov.u32 %r1, bars; mov.u32 %r3, buffer; setp.eq.u32 %p1, %t, 0; @!%p1 bra DONE;
    mbarrier.init.shared.b64 [%r1], 1; {body} DONE: {store}"""


def cycles(launch, gpu=H100, **options):
    return launch.replay(gpu, **options).cycles


TRY = r"SYNCS\.PHASECHK\.TRANS64\.TRYWAIT"


def test_latency_of_a_load():
    """Setup, the L2, the port, then the latency until the barrier has the bytes, and the wake."""
    launch = timed(loads(8, 1024, each=True), DATA, OUT, declarations=BUFFER)
    times = np.array(gaps(launch, H100, TRY))[1:]
    expected = H100.tma_setup + 1024 / H100.tma_bytes + H100.tma_latency + H100.wake
    assert (times >= expected - 1).all() and (times < expected + 60).all(), (times, expected)
    for name, weight in (("tma_latency", 1), ("tma_setup", 1), ("wake", 1), ("arrive", 0)):
        changed = H100.with_values(**{name: getattr(H100, name) + 100})
        assert set(np.array(gaps(launch, changed, TRY))[1:] - times) == {100 * weight}, name


def test_bandwidth_of_an_sm():
    """Large pieces are bound by the port, small ones by the distance of two copies. The L2 is fast enough."""
    fast = H100.with_values(l2=500)
    few, many = (timed(loads(n, 8192), DATA, OUT, declarations=BUFFER) for n in (8, 24))
    assert (cycles(many, fast) - cycles(few, fast)) / 16 == pytest.approx(8192 / 64, abs=1)
    half = fast.with_values(tma_bytes=32)
    assert (cycles(many, half) - cycles(few, half)) / 16 == pytest.approx(8192 / 32, abs=1)
    few, many = (timed(loads(n, 64), DATA, OUT, declarations=BUFFER) for n in (8, 24))
    for interval in (60, 90):  # the instructions of a copy take some 40
        apart = fast.with_values(tma_interval=interval)
        assert (cycles(many, apart) - cycles(few, apart)) / 16 == pytest.approx(interval, abs=1)


def test_sms_share_the_l2():
    """Eight SMs have eight shares of the L2's rate; one that loads alone among eight has all of them."""
    gpu = H100.with_values(l2_saved=0, tma_bytes=256, l2=2.6)
    share = gpu.bytes_per_cycle(gpu.l2) / gpu.sms
    few, many = (timed(loads(n, 8192), DATA, OUT, declarations=BUFFER, grid=8) for n in (4, 24))
    assert (cycles(many, gpu, sms=8) - cycles(few, gpu, sms=8)) / 20 == pytest.approx(8192 / share, rel=0.01)
    few, many = few.only([3]), many.only([3])
    assert (cycles(many, gpu, sms=1) - cycles(few, gpu, sms=1)) / 20 == pytest.approx(8192 / share, rel=0.01)
    assert (cycles(many, gpu, sms=8) - cycles(few, gpu, sms=8)) / 20 == pytest.approx(8192 / share / 8, rel=0.02)


def test_what_was_saved_of_the_l2s_rate_is_spent_first():
    """What was saved is served at once, the rest at the SM's share."""
    gpu = H100.with_values(l2_saved=32, tma_bytes=1e6, tma_interval=0)
    share = gpu.bytes_per_cycle(gpu.l2) / gpu.sms
    few, many = (timed(loads(n, 8192), DATA, OUT, declarations=BUFFER) for n in (8, 16))
    assert cycles(many, gpu) - cycles(few, gpu) == pytest.approx(8 * 8192 / share, abs=2)
    assert cycles(few, gpu.with_values(l2_saved=16)) - cycles(few, gpu) == pytest.approx(16384 / share, abs=2)


def test_multicast_reads_the_l2_once():
    """Two CTAs share what both need: half the bytes of the L2, all of them through both ports."""
    gpu = H100.with_values(l2_saved=0, tma_bytes=256)
    share = gpu.bytes_per_cycle(gpu.l2) / gpu.sms
    cluster = "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;"

    def body(count, multicast):
        one = (
            f"{LOAD}.multicast::cluster [%r3], [%in0], 4096, [%r1], %rs1;"
            if multicast
            else f"{LOAD} [%r3], [%in0], 4096, [%r1];"
        )
        times = count // 2 if multicast else count
        return f"""mov.u32 %r1, bars; mov.u32 %r3, buffer; mov.u16 %rs1, 3; setp.eq.u32 %p1, %t, 0; @!%p1 bra A;
        mbarrier.init.shared.b64 [%r1], 1; mbarrier.arrive.expect_tx.shared.b64 _, [%r1], {4096 * count}; A: {cluster}
        @!%p1 bra B; {one * times} B: W: mbarrier.try_wait.parity.shared.b64 %p3, [%r1], 0; @!%p3 bra W;
        {cluster} {STORE}"""

    found = {}
    for multicast in (False, True):
        few, many = (timed(body(n, multicast), DATA, OUT, declarations=BUFFER, grid=2, cluster=2) for n in (8, 40))
        a, b = few.replay(gpu, 2), many.replay(gpu, 2)
        found[multicast] = (b.cycles - a.cycles) / 32, sum(sm.tma_bytes for sm in b.sms)
    assert found[False] == (pytest.approx(4096 / share, rel=0.02), 2 * 40 * 4096)
    assert found[True] == (pytest.approx(4096 / share / 2, rel=0.02), 40 * 4096)


# ---- stores -------------------------------------------------------------------------------------------------------
def stores(count, size, what, read=""):
    name = (
        "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32"
        if what == "reduce"
        else "cp.async.bulk.global.shared::cta.bulk_group"
    )
    clear = "".join(f"st.shared.v4.u32 [%r4+{512 * j}], {{%r5, %r5, %r5, %r5}};" for j in range(16))
    return f"""mov.u32 %r3, buffer; shl.b32 %r4, %t, 4; add.u32 %r4, %r4, %r3; mov.u32 %r5, 0; {clear}
    fence.proxy.async.shared::cta; bar.sync 0; setp.eq.u32 %p1, %t, 0; @!%p1 bra DONE;
    {f"{name} [%out0], [%r3], {size}; cp.async.bulk.commit_group;" * count} cp.async.bulk.wait_group{read} 0;
    DONE: {STORE.replace("[%rd1]", "[%rd1+32768]")}"""


@pytest.mark.parametrize("what", ["store", "reduce"])
def test_stores_and_reductions_take_their_rate_of_the_l2(what):
    gpu = H100.with_values(l2_saved=0)
    rate = gpu.bytes_per_cycle(gpu.l2 if what == "store" else gpu.l2_reductions) / gpu.sms
    few, many = (timed(stores(n, 8192, what), DATA, OUT, declarations=BUFFER) for n in (4, 24))
    assert (cycles(many, gpu) - cycles(few, gpu)) / 20 == pytest.approx(8192 / rate, rel=0.01)
    later = gpu.with_values(store_latency=gpu.store_latency + 100)
    assert cycles(few, later) - cycles(few, gpu) == 100


def test_bulk_reductions_of_an_sm_take_its_share_whatever_the_others_do():
    """One after the other, also where the L2 has nothing else to do and has saved up; stores do not."""
    gpu = H100.with_values(l2_saved=1024)
    share = gpu.bytes_per_cycle(gpu.l2_reductions) / gpu.sms
    few, many = (timed(stores(n, 8192, "reduce"), DATA, OUT, declarations=BUFFER, grid=8).only([3]) for n in (4, 24))
    assert (cycles(many, gpu, sms=8) - cycles(few, gpu, sms=8)) / 20 == pytest.approx(8192 / share, rel=0.01)
    few, many = (timed(stores(n, 8192, "store"), DATA, OUT, declarations=BUFFER, grid=8).only([3]) for n in (4, 24))
    assert (cycles(many, gpu, sms=8) - cycles(few, gpu, sms=8)) / 20 < 100


@pytest.mark.parametrize("what", ["store", "reduce"])
def test_what_others_can_see_takes_a_round_trip_more_than_what_has_been_read(what):
    seen, read = (timed(stores(4, 8192, what, read), DATA, OUT, declarations=BUFFER) for read in ("", ".read"))
    for latency in (300, 500):
        gpu = H100.with_values(global_latency=latency)
        assert cycles(seen, gpu) - cycles(read, gpu) == pytest.approx(latency, abs=10)


@pytest.mark.parametrize("scope, weight", [("cta", 0), ("cluster", 0), ("gpu", 1), ("sys", 1)])
def test_a_fence_beyond_the_cluster_takes_a_round_trip(scope, weight):
    body = "mad.wide.u32 %rd1, %g, 4, %out0; st.global.u32 [%rd1], %t;" + f"fence.acq_rel.{scope};" * 3
    fences = timed(body + "st.global.u32 [%rd1], %g;", DATA, OUT)
    later = H100.with_values(global_latency=H100.global_latency + 100)
    assert cycles(fences, later) - cycles(fences) == 300 * weight


def test_reductions_of_threads_take_the_rate_of_reductions():
    """red.global of 32 lanes and 4 bytes; the first 400 cycles of what is to be done do not hold up the warp."""
    gpu = H100.with_values(l2_saved=0, l2_reductions=2)  # an instruction takes 12 cycles of it, 4 to issue
    rate = gpu.bytes_per_cycle(gpu.l2_reductions) / gpu.sms
    body = "cvt.rn.f32.u32 %f1, %t; mad.wide.u32 %rd1, %t, 4, %out0;"
    out = [np.zeros(1 << 15, np.uint32)]
    few, many = (
        timed(body + "".join(f"red.global.add.f32 [%rd1+{128 * k}], %f1;" for k in range(n)), DATA, out)
        for n in (200, 300)
    )
    assert (cycles(many, gpu) - cycles(few, gpu)) / 100 == pytest.approx(128 / rate, rel=0.03)


# ---- cp.async -----------------------------------------------------------------------------------------------------
def groups(pending):
    """Six groups of one copy of a warp, each committed, a wait for all but ``pending``, then the clock's landmark."""
    copies = "".join(
        f"cp.async.cg.shared.global [%r3+{512 * n}], [%rd2+{512 * n}], 16; cp.async.commit_group;" for n in range(6)
    )
    return f"""mov.u32 %r3, buffer; shl.b32 %r4, %t, 4; add.u32 %r3, %r3, %r4; mad.wide.u32 %rd2, %t, 16, %in0; {copies}
    cp.async.wait_group {pending}; bar.sync 0; {STORE}"""


@pytest.mark.parametrize(("gpu", "target"), [(A100, "sm_80"), (H100, "sm_90a")])
def test_groups_of_cp_async(gpu, target):
    """The group that is waited for ends ``global_latency`` after its copy, whatever comes behind it."""
    for pending in (0, 2, 5, 6):
        launch = timed(groups(pending), DATA, OUT, declarations=BUFFER, target=target)
        replay = launch.replay(gpu, times=True)
        copies, (barrier,) = issued(launch, replay, 0, "LDGSTS"), issued(launch, replay, 0, "BAR")
        if pending == 6:
            assert barrier < copies[-1] + 60
        else:
            ends = copies[5 - pending] + gpu.global_latency
            assert ends <= barrier < ends + 20


def test_another_scoreboards_depbar_is_no_wait_for_groups():
    launch = timed(groups(2), DATA, OUT, declarations=BUFFER)
    (wait,) = (i for i in launch.code.instructions if i.opcode == "DEPBAR")
    assert (wait.operands[0], launch._operations(wait, None, 1)) == ("SB0", [(GROUP_WAIT, 2, 0, 0)])
    assert launch._operations(replace(wait, operands=["SB3", "0x1"]), None, 1) == []


def test_bandwidth_of_cp_async():
    gpu = A100.with_values(l2_saved=0)
    rate = gpu.bytes_per_cycle(gpu.l2) / gpu.sms

    def body(count):
        copies = "".join(
            f"cp.async.cg.shared.global [%r3+{512 * (n % 8)}], [%rd2+{512 * n}], 16;" for n in range(count)
        )
        return f"""mov.u32 %r3, buffer; shl.b32 %r4, %t, 4; add.u32 %r3, %r3, %r4; mad.wide.u32 %rd2, %t, 16, %in0;
        {copies}
        cp.async.commit_group; cp.async.wait_group 0; {STORE}"""

    few, many = (timed(body(n), DATA, OUT, declarations=BUFFER, target="sm_80") for n in (40, 100))
    assert (cycles(many, gpu) - cycles(few, gpu)) / 60 == pytest.approx(512 / rate, rel=0.02)


@pytest.mark.parametrize(("noinc", "count"), [(".noinc", 32), ("", 1)])
def test_cp_async_arrives_at_an_mbarrier(noinc, count):
    """With .noinc the barrier expects the lanes' arrivals; without, it waits for them beside the one it expects."""
    body = f"""mov.u32 %r1, bars; mov.u32 %r3, buffer; shl.b32 %r4, %t, 4; add.u32 %r3, %r3, %r4;
    mad.wide.u32 %rd2, %t, 16, %in0;
    setp.eq.u32 %p1, %t, 0; @!%p1 bra READY; mbarrier.init.shared.b64 [%r1], {count}; READY: bar.sync 0;
    cp.async.cg.shared.global [%r3], [%rd2], 16; cp.async.mbarrier.arrive{noinc}.shared.b64 [%r1];
    {"" if noinc else "@%p1 mbarrier.arrive.shared.b64 _, [%r1];"}
    W: mbarrier.try_wait.parity.shared.b64 %p3, [%r1], 0; @!%p3 bra W; bar.sync 0; {STORE}"""
    launch = timed(body, DATA, OUT, declarations=BUFFER)
    replay = launch.replay(H100, times=True)
    (copy,), barriers = issued(launch, replay, 0, "LDGSTS"), issued(launch, replay, 0, "BAR")
    least = copy + H100.global_latency + H100.arrive + H100.wake
    assert least <= barriers[-1] < least + 60
