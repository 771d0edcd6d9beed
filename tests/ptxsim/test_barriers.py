"""mbarriers, named barriers, cluster barriers, deadlock reports (PTX ISA 9.7.13.1, 9.7.13.3, 9.7.13.15)."""

from __future__ import annotations

import numpy as np
import pytest

from ptxsim.errors import Deadlock, MemoryFault, SyncError
from ptxsim.machine import scheduler
from tests.testing.ptx import run

SHARED = ".shared .align 128 .b8 buffer[1024]; .shared .align 8 .b64 bar; .shared .align 8 .b64 bar2;"
FIRST = "mov.u32 %r50, bar; mov.u32 %r51, buffer; mov.u32 %r52, bar2; setp.eq.u32 %p10, %t, 0;"
OUT = "mul.wide.u32 %rd40, %g, 4; add.s64 %rd41, %out0, %rd40;"


def wait(barrier="%r50", parity="0", label="W"):
    return f"{label}: mbarrier.try_wait.parity.shared::cta.b64 %p11, [{barrier}], {parity}; @!%p11 bra {label};"


def threads_run(body, threads=64, **options):
    return run(FIRST + OUT + body, [], [np.zeros(threads * options.get("grid", 1), np.uint32)], threads=threads,
               declarations=SHARED, **options)  # fmt: skip


def test_phases():
    """A producer warp hands over four values, each in its own phase, through one slot and two barriers."""
    body = """@%p10 mbarrier.init.shared::cta.b64 [%r50], 32; @%p10 mbarrier.init.shared::cta.b64 [%r52], 32;
    bar.sync 0; setp.ge.u32 %p1, %t, 32; mov.u32 %r1, 0; mov.u32 %r2, 0; @%p1 bra CONSUMER;
  PRODUCER: xor.b32 %r3, %r1, 1; and.b32 %r3, %r3, 1;
  EMPTY: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r52], %r3; @!%p2 bra EMPTY;
    mad.lo.u32 %r4, %r1, 10, %t; mad.lo.u32 %r5, %t, 4, %r51; st.shared.u32 [%r5], %r4;
    mbarrier.arrive.shared::cta.b64 %rd1, [%r50]; add.u32 %r1, %r1, 1; setp.lt.u32 %p3, %r1, 4; @%p3 bra PRODUCER;
    bra END;
  CONSUMER: and.b32 %r3, %r1, 1;
  FULL: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r50], %r3; @!%p2 bra FULL;
    sub.u32 %r6, %t, 32; mad.lo.u32 %r5, %r6, 4, %r51; ld.shared.u32 %r7, [%r5]; mad.lo.u32 %r2, %r2, 3, %r7;
    mbarrier.arrive.shared::cta.b64 _, [%r52]; add.u32 %r1, %r1, 1; setp.lt.u32 %p3, %r1, 4; @%p3 bra CONSUMER;
  END: st.global.u32 [%rd41], %r2;"""
    for seed in (None, 1, 2, 3):
        out = threads_run(body, seed=seed)
        lane = np.arange(32)
        value = 0
        for phase in range(4):
            value = value * 3 + phase * 10 + lane
        np.testing.assert_array_equal(out[32:], value)


def test_arrival_counts_states_and_pending():
    body = """@%p10 mbarrier.init.shared.b64 [%r50], 3; bar.sync 0; setp.ne.u32 %p1, %t, 0; @%p1 bra END;
    mbarrier.arrive.shared.b64 %rd1, [%r50]; mbarrier.test_wait.shared.b64 %p2, [%r50], %rd1; selp.u32 %r1, 1, 0, %p2;
    mbarrier.pending_count.b64 %r2, %rd1; mbarrier.arrive.shared.b64 %rd2, [%r50], 2;
    mbarrier.test_wait.shared.b64 %p3, [%r50], %rd2; selp.u32 %r3, 1, 0, %p3; mbarrier.pending_count.b64 %r4, %rd2;
    mbarrier.test_wait.parity.shared.b64 %p4, [%r50], 0; selp.u32 %r5, 1, 0, %p4;
    mbarrier.test_wait.parity.shared.b64 %p5, [%r50], 1; selp.u32 %r6, 1, 0, %p5;
    st.global.v4.u32 [%out0], {%r1, %r2, %r3, %r4}; st.global.v2.u32 [%out0+16], {%r5, %r6}; END:"""
    np.testing.assert_array_equal(threads_run(body)[:6], [0, 3, 1, 2, 1, 0])


def test_transaction_counts():
    """expect_tx keeps the phase open until complete_tx has brought the count back to zero."""
    body = """@%p10 mbarrier.init.shared.b64 [%r50], 1; bar.sync 0; setp.ne.u32 %p1, %t, 0; @%p1 bra END;
    mov.u32 %r9, 48; mbarrier.arrive.expect_tx.shared.b64 _, [%r50], %r9;
    mbarrier.test_wait.parity.shared.b64 %p2, [%r50], 0; selp.u32 %r1, 1, 0, %p2;
    mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [%r50], 16; mbarrier.test_wait.parity.shared.b64 %p3, [%r50], 0;
    selp.u32 %r2, 1, 0, %p3; mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [%r50], 32;
    mbarrier.test_wait.parity.shared.b64 %p4, [%r50], 0; selp.u32 %r3, 1, 0, %p4; mov.u32 %r4, 9;
    st.global.v4.u32 [%out0], {%r1, %r2, %r3, %r4}; END:"""
    np.testing.assert_array_equal(threads_run(body)[:4], [0, 0, 1, 9])


def test_dropped_participant():
    body = """@%p10 mbarrier.init.shared.b64 [%r50], 2; bar.sync 0; setp.ne.u32 %p1, %t, 0; @%p1 bra END;
    mbarrier.arrive_drop.shared.b64 _, [%r50]; mbarrier.arrive.shared.b64 _, [%r50]; mbarrier.arrive.shared.b64 _,
    [%r50]; mbarrier.test_wait.parity.shared.b64 %p2, [%r50], 1; selp.u32 %r1, 1, 0, %p2; st.global.u32 [%out0], %r1;
    END:"""
    assert threads_run(body)[0] == 1  # the second phase needed one arrival only


def test_too_many_arrivals():
    body = """@%p10 mbarrier.init.shared.b64 [%r50], 40; bar.sync 0;
    mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%r50], 1;"""
    with pytest.raises(SyncError, match="more arrivals than expected on the mbarrier at shared memory 0x") as caught:
        threads_run(body + "mbarrier.arrive.shared.b64 _, [%r50];")
    assert "mbarrier.arrive.shared.b64" in caught.value.text


def test_one_instruction_does_not_complete_two_phases():
    """A count of 2 where all 32 lanes arrive. Two lanes of 16 warps each are what a count of 32 is for; two warps may
    complete a phase each."""
    body = """@%p10 mbarrier.init.shared::cta.b64 [%r50], COUNT; bar.sync 0; and.b32 %r1, %t, 31;
    setp.lt.u32 %p1, %r1, LANES; @%p1 mbarrier.arrive.shared::cta.b64 _, [%r50];"""
    threads_run((body + wait()).replace("COUNT", "32").replace("LANES", "2"), threads=512)
    threads_run((body + wait(parity="1")).replace("COUNT", "32").replace("LANES", "32"))
    match = "32 arrivals of one warp's lanes on the mbarrier at .*, where a phase expects 2"
    with pytest.raises(SyncError, match=match) as found:
        threads_run(body.replace("COUNT", "2").replace("LANES", "32"))
    assert "mbarrier.arrive" in found.value.text
    with pytest.raises(SyncError, match=r"33 arrivals .* expects 32"):
        threads_run(body.replace("COUNT", "32").replace("LANES", "2").replace(", [%r50];", ", [%r50], %r2;").replace(
            "bar.sync 0;", "bar.sync 0; mov.u32 %r2, 1; @%p10 mov.u32 %r2, 32;"))  # fmt: skip


def test_arrival_counts_at_their_limits():
    """2^20 - 1 arrivals a phase, all at once."""
    body = "@%p10 mbarrier.init.shared.b64 [%r50], {}; bar.sync 0; @%p10 mbarrier.arrive.shared.b64 _, [%r50], {};"
    threads_run(body.format(1048575, 1048575) + wait())
    with pytest.raises(SyncError, match=r"mbarrier count 1048576 is not in 1\.\.1048575"):
        threads_run(body.format(1048576, 1))
    with pytest.raises(SyncError, match=r"arrive of 0 to 0 at an mbarrier: not in 1\.\.1048575"):
        threads_run(body.format(1, 0))


def test_transaction_count_at_its_limits():
    """2^20 - 1 bytes are expected and come."""
    body = """@%p10 mbarrier.init.shared.b64 [%r50], 1; bar.sync 0; mov.u32 %r9, 1048575;
    @%p10 mbarrier.arrive.expect_tx.shared.b64 _, [%r50], %r9;
    @%p10 mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [%r50], 1048575;"""
    threads_run(body + wait())


def test_transaction_overflow():
    body = "@%p10 mbarrier.init.shared.b64 [%r50], 2; bar.sync 0; mov.u32 %r9, 1048575;"
    with pytest.raises(SyncError, match=r"tx-count .* overflows"):
        threads_run(body + "mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%r50], %r9;")


def test_uninitialised_and_misaligned_mbarriers():
    with pytest.raises(SyncError, match="uninitialised mbarrier"):
        threads_run("mbarrier.arrive.shared.b64 _, [%r50];")
    with pytest.raises(SyncError, match="wait on an uninitialised mbarrier"):
        threads_run(wait())
    with pytest.raises(MemoryFault, match="misaligned"):
        threads_run("mbarrier.init.shared.b64 [%r50+4], 1;")
    with pytest.raises(SyncError, match="mbarrier count 0"):
        threads_run("mbarrier.init.shared.b64 [%r50], 0;")


def test_deadlock_names_barrier_phase_warps_and_line():
    body = """@%p10 mbarrier.init.shared.b64 [%r50], 3; bar.sync 0; setp.lt.u32 %p1, %t, 32; @%p1 bra WAIT;
    elect.sync %r1|%p2, -1; @%p2 mbarrier.arrive.shared.b64 _, [%r50]; bra END; WAIT: """
    with pytest.raises(Deadlock) as caught:
        threads_run(body + wait() + "END:")
    text = str(caught.value)
    assert "mbarrier at shared memory 0x" in text and "of cta(0,0,0)" in text
    assert "waits for the phase of parity 0; it is in phase 0, 2 of 3 arrivals pending, tx-count 0" in text
    assert "cta(0,0,0).w0" in text and "mbarrier.try_wait" in caught.value.text and caught.value.line


def test_wrong_parity_deadlocks():
    body = "@%p10 mbarrier.init.shared.b64 [%r50], 64; bar.sync 0; mbarrier.arrive.shared.b64 _, [%r50];"
    threads_run(body + wait(parity="0"))
    threads_run(
        body.replace("mbarrier.arrive", "@%p10 mbarrier.arrive") + wait(parity="1")
    )  # the phase before the first
    with pytest.raises(Deadlock, match="parity 1; it is in phase 1"):
        threads_run(body + wait(parity="1"))


def test_short_expect_tx_deadlocks():
    body = """@%p10 mbarrier.init.shared.b64 [%r50], 1; bar.sync 0;
    @%p10 mbarrier.arrive.expect_tx.shared.b64 _, [%r50], 64; @%p10 mbarrier.complete_tx.relaxed.cta.shared::cta.b64
    [%r50], 48;"""
    with pytest.raises(Deadlock, match="0 of 1 arrivals pending, tx-count 16"):
        threads_run(body + wait())


# ---- bar and barrier -----------------------------------------------------------------------------------------------


def test_named_barriers_order_warps():
    """Two warps take turns by bar.sync and bar.arrive on two named barriers."""
    body = """setp.ge.u32 %p1, %t, 32; @%p1 bra SECOND; st.shared.u32 [%r51], 5; bar.arrive 1, 64; bar.sync 2, 64;
    ld.shared.u32 %r1, [%r51]; bra END;
  SECOND: bar.sync 1, 64; ld.shared.u32 %r2, [%r51]; add.u32 %r2, %r2, 1; bar.warp.sync -1; st.shared.u32 [%r51], %r2;
    barrier.arrive 2, 64; mov.u32 %r1, 0; END: st.global.u32 [%rd41], %r1;"""
    for seed in (None, 1, 2, 3, 4):
        out = threads_run(body, seed=seed)
        np.testing.assert_array_equal(out, [6] * 32 + [0] * 32)


@pytest.mark.parametrize(
    "barrier", ["bar.sync 0;", "bar.sync 1, 64;", "bar.arrive 1, 64;", "bar.red.popc.u32 %r5, 0, %p10;"]
)
def test_barrier_in_a_divergent_branch(barrier):
    """bar is barrier.aligned: half a warp comes to one barrier, the other half to the next."""
    body = """setp.lt.u32 %p1, %t, 16; @%p1 bra LOW; BARRIER mov.u32 %r1, 1; bra END; LOW: BARRIER mov.u32 %r1, 2;
      END: st.global.u32 [%rd41], %r1;"""
    match = r"aligned instruction is executed by a part of a warp.*\n    other lanes are at PTX line \d+: LOW: bar"
    with pytest.raises(SyncError, match=match) as found:
        threads_run(body.replace("BARRIER", barrier))
    assert found.value.text.startswith("bar") and found.value.where == "cta(0,0,0).w0 lanes 0xffff0000"
    whole = threads_run(body.replace("BARRIER", barrier).replace("%t, 16", "%t, 32"))
    np.testing.assert_array_equal(whole, np.repeat([2, 1], 32))


def test_barrier_in_a_register_and_partial_cta():
    body = """shr.u32 %r1, %t, 5; setp.eq.u32 %p1, %r1, 2; @%p1 bra END; mov.u32 %r2, 3; mov.u32 %r3, 64;
    mad.lo.u32 %r4, %t, 4, %r51; st.shared.u32 [%r4], %t; barrier.sync %r2, %r3; xor.b32 %r5, %t, 63;
    mad.lo.u32 %r4, %r5, 4, %r51; ld.shared.u32 %r6, [%r4]; st.global.u32 [%rd41], %r6; END:"""
    for seed in (None, 5):
        out = threads_run(body, threads=96, seed=seed)
        np.testing.assert_array_equal(out[:64], np.arange(64) ^ 63)


def test_exited_warps_do_not_count():
    """A barrier of all threads completes when the warps that never come have exited."""
    body = "setp.ge.u32 %p1, %t, 32; @%p1 bra OUT; bar.sync 0; st.global.u32 [%rd41], 1; OUT:"
    out = threads_run(body.replace(", 1; OUT", ", %n; OUT"), threads=96)
    np.testing.assert_array_equal(out, [96] * 32 + [0] * 64)


@pytest.mark.parametrize("operation", ["popc.u32", "and.pred", "or.pred"])
def test_barrier_reductions(operation):
    rng = np.random.default_rng(0)
    for x in (rng.integers(0, 2, 96, dtype=np.uint32), np.ones(96, np.uint32), np.zeros(96, np.uint32)):
        result = "%r2" if operation == "popc.u32" else "%p2"
        body = f"""add.s64 %rd42, %in0, %rd40; ld.global.u32 %r1, [%rd42]; setp.ne.u32 %p1, %r1, 0;
        barrier.cta.red.{operation} {result}, 0, %p1;"""
        if operation != "popc.u32":
            body += "selp.u32 %r2, 1, 0, %p2;"
        out = run(FIRST + OUT + body + "st.global.u32 [%rd41], %r2;", [x], [np.zeros(96, np.uint32)], threads=96,
                  declarations=SHARED)  # fmt: skip
        expected = {"popc.u32": x.sum(), "and.pred": x.all(), "or.pred": x.any()}[operation]
        np.testing.assert_array_equal(out, int(expected))


def test_named_barrier_deadlock_and_misuse():
    with pytest.raises(Deadlock, match=r"barrier 5 of cta\(0,0,0\): 64 of 96 threads arrived"):
        threads_run("bar.sync 5, 96;")
    with pytest.raises(SyncError, match=r"not in 0\.\.15"):
        threads_run("bar.sync 16, 64;")
    with pytest.raises(SyncError, match="48 is not a positive multiple of 32"):
        threads_run("bar.sync 1, 48;")
    with pytest.raises(SyncError, match=r"bar\.arrive without a thread count"):
        threads_run("bar.arrive 1;")
    with pytest.raises(SyncError, match="different thread counts"):
        threads_run("shr.u32 %r1, %t, 5; mad.lo.u32 %r1, %r1, 32, 64; bar.sync 1, %r1;")


# ---- clusters ------------------------------------------------------------------------------------------------------

REMOTE = """mov.u32 %r1, %cluster_ctarank; xor.b32 %r2, %r1, 1; mapa.shared::cluster.u32 %r3, %r51, %r2;
    mad.lo.u32 %r4, %t, 4, %r3; add.u32 %r5, %g, 100; st.shared::cluster.u32 [%r4], %r5;"""
READ = "mad.lo.u32 %r6, %t, 4, %r51; ld.shared.u32 %r7, [%r6]; st.global.u32 [%rd41], %r7;"


def test_cluster_barrier_and_remote_stores():
    """Each CTA of a pair writes into the other one's shared memory."""
    sync = "barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;"
    body = REMOTE + sync + READ + "getctarank.shared::cluster.u32 %r8, %r3; setp.ne.u32 %p1, %r8, %r2; @%p1 trap;"
    for seed in (None, 1, 2):
        out = threads_run(body, grid=4, cluster=2, seed=seed).reshape(4, 64)
        np.testing.assert_array_equal(out, (np.arange(256) + 100).reshape(4, 64)[[1, 0, 3, 2]])


def test_remote_mbarrier():
    """Every thread arrives at the barrier of the other CTA; each waits at its own."""
    body = (
        """@%p10 mbarrier.init.shared.b64 [%r50], 64; barrier.cluster.arrive; barrier.cluster.wait;
    mov.u32 %r20, %cluster_ctarank; xor.b32 %r21, %r20, 1; mapa.shared::cluster.u32 %r22, %r50, %r21;"""
        + REMOTE
        + """
    mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r22];"""
    )
    out = threads_run(body + wait() + READ, grid=2, cluster=2).reshape(2, 64)
    np.testing.assert_array_equal(out, (np.arange(128) + 100).reshape(2, 64)[::-1])


def test_cluster_barrier_misuse():
    with pytest.raises(SyncError, match="twice without a wait"):
        threads_run("barrier.cluster.arrive; barrier.cluster.arrive; barrier.cluster.wait;", grid=2, cluster=2)
    body = "setp.eq.u32 %p1, %c, 0; @%p1 bra W; bar.sync 1, 96; W: barrier.cluster.arrive; barrier.cluster.wait;"
    with pytest.raises(Deadlock, match=r"cluster 0: 2 of 4 warps arrived \(phase 0\); missing: cta\(1,0,0\).w0"):
        threads_run(body, grid=2, cluster=2)
    with pytest.raises(MemoryFault, match="out of bounds"):
        threads_run(
            "mov.u32 %r1, 2; mapa.shared::cluster.u32 %r2, %r51, %r1; st.shared::cluster.u32 [%r2], %r1;",
            grid=2,
            cluster=2,
        )


def test_spinning_without_progress_is_a_deadlock(monkeypatch):
    monkeypatch.setattr(scheduler, "_IDLE_LIMIT", 2000)
    body = "@%p10 mbarrier.init.shared.b64 [%r50], 65; bar.sync 0; "
    spin = "S: mbarrier.test_wait.parity.shared.b64 %p1, [%r50], 0; @!%p1 bra S;"
    with pytest.raises(Deadlock, match="warps spin"):
        threads_run(body + spin)
