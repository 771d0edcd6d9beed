"""Named barriers, mbarriers and cluster barriers: what a turn of a toy kernel takes follows from the constants."""

from __future__ import annotations

import numpy as np
import pytest

from ptxsim.timing.replay import BAR_ARRIVE, BAR_SYNC
from tests.testing.timed import H100, issued, recorded, timed

OUT = [np.zeros(2048, np.float32)]
STORE = "mad.wide.u32 %rd1, %g, 4, %out0; st.global.u32 [%rd1], %t;"
WORK = "add.u32 %r1, %r1, 1;"


def turns(launch, gpu, warp, opcode, **options):
    """Cycles of the turns of a warp, without the first two and the last."""
    replay = launch.replay(gpu, times=True, **options)
    return np.diff(issued(launch, replay, warp, opcode))[2:-1].tolist(), replay


def slope(launch, warp, opcode, name, **options):
    """By how many times a constant's change a turn changes."""
    low = getattr(H100, name)
    (a, _), (b, _) = (turns(launch, H100.with_values(**{name: low + x}), warp, opcode, **options) for x in (0, 100))
    assert len(a) == len(b) > 4
    return {(y - x) / 100 for x, y in zip(a, b, strict=True)}


PING_PONG = "setp.ge.u32 %p1, %t, 128; @%p1 bra SECOND;" + (
    "bar.sync 1, 256; bar.arrive 2, 256;" * 10 + "bra DONE; SECOND: bar.arrive 1, 256;"
    + "bar.sync 2, 256; bar.arrive 1, 256;" * 9 + "bar.sync 2, 256; DONE:" + STORE
)  # fmt: skip


def test_ping_pong_of_two_warpgroups():
    """A turn is two waits: from each release ``bar`` cycles pass until the waiting warps go on."""
    launch = timed(PING_PONG, [], OUT, threads=256)
    for warp in (0, 5):
        times, replay = turns(launch, H100, warp, r"BAR\.SYNC")
        assert all(2 * H100.bar <= t < 2 * (H100.bar + 25) for t in times), times
        assert slope(launch, warp, r"BAR\.SYNC", "bar") == {2}
        waited = replay.reasons[warp, 4]  # named barriers
        assert 0.5 * sum(times) < waited < replay.cycles


def test_what_a_named_barrier_waits_for_is_counted_by_generations():
    """Four warps come to a barrier of two in one step of the simulator: that is two generations of two warps."""
    body = "bar.sync 1, 64;" * 3 + STORE
    launch = timed(body, [], OUT, threads=128)
    counts = {int(row[3]) for row in launch.rows if row[1] == BAR_SYNC}
    assert counts == {2}
    launch.replay(H100)


def test_another_barrier_of_the_cta_goes_on():
    """All warps meet at barrier 0 while one has arrived at barrier 1: that one still needs both."""
    body = f"""setp.ge.u32 %p1, %t, 32; @%p1 bra SECOND; bar.arrive 1, 64; bar.sync 0; bra DONE;
    SECOND: bar.sync 0; {"mul.lo.u32 %r1, %r1, %r1; add.u32 %r1, %r1, 3;" * 9} bar.sync 1, 64; DONE: {STORE}"""
    launch = timed(body, [], OUT, threads=64)
    counts = {(int(row[1]), int(row[2]), int(row[3])) for row in launch.rows if row[1] in (BAR_SYNC, BAR_ARRIVE)}
    assert counts == {(BAR_ARRIVE, 1, 2), (BAR_SYNC, 0, 2), (BAR_SYNC, 1, 2)}


def test_warps_that_have_ended_do_not_count_at_a_barrier():
    launch = timed("setp.ge.u32 %p1, %t, 96; @%p1 exit; bar.sync 0;" + STORE, [], OUT, threads=128)
    assert {int(row[3]) for row in launch.rows if row[1] == BAR_SYNC} == {3}
    launch.replay(H100)


# ---- mbarriers ----------------------------------------------------------------------------------------------------
BARS = ".shared .align 8 .b64 full[2]; .shared .align 8 .b64 empty[2];"


def ring(steps, arrivals=1, before=""):
    """Warp 0 fills one stage, warp 1 waits for it and gives it back."""
    wait = "{0}{1}: mbarrier.try_wait.parity.shared.b64 %p3, [{2}], {3}; @!%p3 bra {0}{1};".format
    arrive = "@%p4 mbarrier.arrive.shared.b64 _, [{}];".format
    fill = "".join(wait("E", n, "%r2", 1 - n % 2) + arrive("%r1") for n in range(steps))
    use = "".join(wait("F", n, "%r1", n % 2) + before + arrive("%r2") for n in range(steps))
    return f"""{BARS} mov.u32 %r1, full; mov.u32 %r2, empty; setp.eq.u32 %p1, %t, 0; @!%p1 bra READY;
    mbarrier.init.shared.b64 [%r1], {arrivals}; mbarrier.init.shared.b64 [%r2], 1;
    READY: bar.sync 0; and.b32 %r3, %t, 31; setp.eq.u32 %p4, %r3, 0; setp.ge.u32 %p2, %t, 32; @%p2 bra USE;
    {fill} bra DONE; USE: {use} DONE: {STORE}"""


TRY = r"SYNCS\.PHASECHK\.TRANS64\.TRYWAIT"


def test_a_round_trip_over_two_mbarriers():
    """Two arrivals and two wakes; published: 65 cycles alone, 120 to 200 beside others."""
    launch = timed(ring(12), [], OUT, threads=64)
    for warp in (0, 1):
        times, _ = turns(launch, H100, warp, TRY)
        hops = 2 * (H100.arrive + H100.wake)
        assert all(hops <= t < hops + 120 for t in times), (times, hops)
        assert slope(launch, warp, TRY, "arrive") == slope(launch, warp, TRY, "wake") == {2}
        assert slope(launch, warp, TRY, "bar") == slope(launch, warp, TRY, "remote_arrive") == {0}


def test_a_wait_that_is_over_takes_try_wait():
    """The barrier's phase −1 counts as complete: warp 0 waits for it ten times, each before its next."""
    body = f"""{BARS} mov.u32 %r1, full; setp.eq.u32 %p1, %t, 0; @!%p1 bra READY; mbarrier.init.shared.b64 [%r1], 1;
    READY: bar.sync 0;
    {"".join(f"W{n}: mbarrier.try_wait.parity.shared.b64 %p3, [%r1], 1; @!%p3 bra W{n};" for n in range(10))}
    {STORE}"""
    launch = timed(body, [], OUT)
    times, _ = turns(launch, H100, 0, TRY)
    assert all(H100.try_wait <= t < H100.try_wait + 20 for t in times), times
    assert slope(launch, 0, TRY, "try_wait") == {1}
    assert slope(launch, 0, TRY, "wake") == {0}


def test_the_same_wait_several_times():
    """The same phase in a loop: each is a wait of its own. In an adversarial order waits give up, and begin again."""
    body = f"""{BARS} mov.u32 %r1, full; ld.global.u32 %r9, [%in0]; setp.eq.u32 %p1, %t, 0; @!%p1 bra READY;
    mbarrier.init.shared.b64 [%r1], 1; READY: bar.sync 0; mov.u32 %r8, 0;
    W: mbarrier.try_wait.parity.shared.b64 %p3, [%r1], 1; @!%p3 bra W; add.u32 %r8, %r8, 1; setp.lt.u32 %p4, %r8, %r9;
    @%p4 bra W;
    {STORE}"""
    launch = timed(body, [np.array([7], np.uint32)], OUT)
    assert len(turns(launch, H100, 0, TRY)[0]) == 7 - 1 - 3
    plain, *others = (timed(ring(6), [], OUT, threads=64, seed=seed) for seed in (None, 4, 9))
    assert all((plain.rows == other.rows).all() for other in others)


def test_a_phase_waits_for_all_arrivals():
    """32 lanes arrive, each once, in one instruction; a barrier that expects 33 of them waits for the other warp."""
    body = f"""{BARS} mov.u32 %r1, full; setp.eq.u32 %p1, %t, 0; @!%p1 bra READY; mbarrier.init.shared.b64 [%r1], COUNT;
    READY: bar.sync 0; setp.ge.u32 %p2, %t, 32; @%p2 bra OTHER; mbarrier.arrive.shared.b64 _, [%r1];
    W: mbarrier.try_wait.parity.shared.b64 %p3, [%r1], 0; @!%p3 bra W; bra DONE;
    OTHER: setp.ne.u32 %p4, %t, 32; cvt.rn.f32.u32 %f1, %t;
    {"ex2.approx.ftz.f32 %f1, %f1;" * 50} setp.neu.f32 %p6, %f1, 0f00000000;
    @%p4 bra DONE; ARRIVE
    DONE: {STORE} st.global.f32 [%rd1+4096], %f1;"""
    one = timed(body.replace("COUNT", "32").replace("ARRIVE", ""), [], OUT, threads=64).replay(H100)
    two = timed(
        body.replace("COUNT", "33").replace("ARRIVE", "@%p6 mbarrier.arrive.shared.b64 _, [%r1];"), [], OUT, threads=64
    )
    two = two.replay(H100)
    assert one.ends[0] < one.ends[1] - 500 and abs(two.ends[0] - two.ends[1]) < 200


def test_who_drops_out_is_not_waited_for():
    """Two participants; the second leaves after the first phase, and the first goes on alone."""
    body = f"""{BARS} mov.u32 %r1, full; setp.eq.u32 %p1, %t, 0; @!%p1 bra READY; mbarrier.init.shared.b64 [%r1], 2;
    READY: bar.sync 0; setp.eq.u32 %p2, %t, 32; @%p2 mbarrier.arrive_drop.shared.b64 _, [%r1];
    setp.ge.u32 %p2, %t, 32; @%p2 bra DONE;
    {
        "".join(
            f"@%p1 mbarrier.arrive.shared.b64 _, [%r1];"
            f"W{n}: mbarrier.try_wait.parity.shared.b64 %p3, [%r1], {n % 2}; @!%p3 bra W{n};"
            for n in range(4)
        )
    } DONE: {STORE}"""
    replay = timed(body, [], OUT, threads=64).replay(H100)
    assert replay.cycles < 2000


def test_bytes_that_were_announced_and_completed():
    """A phase needs its arrival and that no bytes are outstanding."""
    body = f"""{BARS} mov.u32 %r1, full; setp.eq.u32 %p1, %t, 0; @!%p1 bra READY; mbarrier.init.shared.b64 [%r1], 1;
    READY: bar.sync 0; @%p1 mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%r1], 64;
    @%p1 mbarrier.arrive.shared.b64 _, [%r1]; @%p1 mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [%r1], 64;
    W: mbarrier.try_wait.parity.shared.b64 %p3, [%r1], 0; @!%p3 bra W; {STORE}"""
    assert timed(body, [], OUT).replay(H100).cycles < 2000


# ---- clusters -----------------------------------------------------------------------------------------------------
CLUSTER = "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;"


@pytest.mark.parametrize("size", [2, 4])
def test_cluster_barriers(size):
    launch = timed(CLUSTER * 10 + STORE, [], OUT, threads=64, grid=size, cluster=size)
    times, _ = turns(launch, H100, 0, "UCGABAR_WAIT", sms=size)
    assert all(H100.cluster_barrier <= t < H100.cluster_barrier + 120 for t in times), times
    assert slope(launch, 2 * size - 1, "UCGABAR_WAIT", "cluster_barrier", sms=size) == {1}


def test_a_warp_that_has_ended_is_not_waited_for_by_its_cluster():
    launch = timed("setp.ge.u32 %p1, %t, 32; @%p1 exit;" + CLUSTER + STORE, [], OUT, threads=64, grid=2, cluster=2)
    assert launch.replay(H100, sms=2).cycles < 2000


def test_arrivals_at_another_cta():
    """Each CTA arrives at the other's barrier and waits for its own: ``remote_arrive`` and ``wake`` a turn."""
    steps = "".join(
        f"@%p1 mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r4]; "
        f"W{n}: mbarrier.try_wait.parity.shared.b64 %p3, [%r1], {n % 2}; @!%p3 bra W{n};"
        for n in range(10)
    )
    body = f"""{BARS} mov.u32 %r1, full; mov.u32 %r5, %cluster_ctarank; xor.b32 %r5, %r5, 1;
    mapa.shared::cluster.u32 %r4, %r1, %r5;
    setp.eq.u32 %p1, %t, 0; @!%p1 bra READY; mbarrier.init.shared.b64 [%r1], 1;
    READY: {CLUSTER} {steps} {CLUSTER} {STORE}"""
    launch = timed(body, [], OUT, grid=2, cluster=2)
    times, _ = turns(launch, H100, 0, TRY, sms=2)
    hop = H100.remote_arrive + H100.wake
    assert all(hop <= t < hop + 120 for t in times), times
    for name in ("remote_arrive", "wake"):
        assert slope(launch, 0, TRY, name, sms=2) == {1}
    assert slope(launch, 0, TRY, "arrive", sms=2) == {0}


def test_several_waves_of_ctas_keep_their_own_mbarriers():
    """The recording of a launch that the simulator runs in two parts is that of one part."""
    body, options = ring(4), dict(threads=64, grid=4)
    whole = recorded(body, [], [np.zeros(4 * 2048, np.float32)], **options)
    parts = recorded(body, [], [np.zeros(4 * 2048, np.float32)], waves=2, **options)
    plain = lambda trace: [tuple(e) if isinstance(e, list) else e for e in trace]  # noqa: E731
    assert [[plain(t) for t in cta] for cta in whole.ctas] == [[plain(t) for t in cta] for cta in parts.ctas]
    assert whole.conflicts == parts.conflicts
