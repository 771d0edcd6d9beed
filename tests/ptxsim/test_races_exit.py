"""The race detector at the end of a CTA: what others, and the async proxy, may still do in its shared memory."""

from __future__ import annotations

import pytest

from tests.ptxsim.test_races import LOAD_AND_READ, TRANSFER, WAIT, reported, run

CLUSTER = dict(grid=2, cluster=2, threads=32)
SYNC = "barrier.cluster.arrive; barrier.cluster.wait;"
# CTA 0 accesses the shared memory of CTA 1, which comes to its end without anything else to wait for
PEER = f"""setp.eq.u32 %p2, %r20, 0; mov.u32 %r21, 1; mapa.shared::cluster.u32 %r22, %r51, %r21;
  st.shared.v4.u32 [%r51], {{%r1, %r2, %r3, %r4}}; {SYNC} @%p2 ACCESS LAST"""
WRITE = "st.shared::cluster.v4.u32 [%r22], {%r1, %r2, %r3, %r60};"
READ = "ld.shared::cluster.v4.u32 {%r5, %r6, %r7, %r8}, [%r22];"

BUSY = """mov.u32 %r9, 0; L: add.u32 %r9, %r9, 1; setp.lt.u32 %p5, %r9, 50; @%p5 bra L;
  st.shared.u32 [%r50+1024], %r9;"""


@pytest.mark.parametrize(("access", "kind"), [(WRITE, "write"), (READ, "read")])
def test_peer_that_ends_early(access, kind):
    """Whether or not the access comes in time: here CTA 1 ends after it, since it has more to do."""
    body = PEER.replace("ACCESS", access)
    run(body.replace("LAST", SYNC), **CLUSTER)
    error = reported(body.replace("LAST", BUSY), match="the CTA ends and gives up", **CLUSTER)
    assert error.where == "cta(1,0,0).w0" and error.other[2] == "cta(0,0,0).w0"
    assert f"shared memory 0x400 to 0x5ff of cta(1,0,0), not ordered after the {kind} by" in error.message
    assert "shared::cluster" in error.other[1]


def test_one_warp_knows():
    """Warp 1 of CTA 1 waits for the access and ends; warp 0, which ends last, does not."""
    arrive = "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r23];"
    body = f"""@%p10 mbarrier.init.shared.b64 [%r52], 32; fence.mbarrier_init.release.cluster; mov.u32 %r21, 1;
      mapa.shared::cluster.u32 %r22, %r51, %r21; mapa.shared::cluster.u32 %r23, %r52, %r21; {SYNC}
      setp.eq.u32 %p2, %r20, 0; @%p2 bra WRITER; @%p1 bra BUSY; {WAIT} bra END; BUSY: {BUSY} bra END;
      WRITER: @!%p1 bra END; {WRITE} {arrive} END:"""
    run(body, **CLUSTER | {"threads": 64})
    error = reported(body.replace(WAIT, ""), match="the CTA ends and gives up", **CLUSTER | {"threads": 64})
    assert error.where == "cta(1,0,0).w0"


def test_load_that_nobody_awaits():
    """A bulk load more than what is read, without a cluster."""
    again = f"{LOAD_AND_READ} bar.sync 1; @%p10 {TRANSFER}"
    error = reported(again, match="the CTA ends and gives up shared memory 0x400 to 0x5ff of cta\\(0,0,0\\)")
    assert "after the write by the bulk load of cta(0,0,0).w0" in error.message and "cp.async.bulk" in error.other[1]
    run(f"{again} {WAIT.replace('W', 'V').replace('], 0', '], 1')}")
