"""The race detector on small kernels: what is ordered and what is not, in the default schedule.

Each kernel runs clean as it stands; without one of its synchronisations, or with a weaker one, it is reported by name.
"""

from __future__ import annotations

import re

import numpy as np
import pytest

from ptxsim.errors import BarrierInitError, ProxyError, RaceError
from tests.ptxsim.test_copies import tensor_map
from tests.testing.ptx import aligned, kernel_text, launch

SHARED = ".shared .align 1024 .b8 buffer[8192]; .shared .align 8 .b64 bar;"
# %p1: warp 0; %p10: thread 0; %r50: the buffer; %r51: the thread's 16 bytes in it; %r52: an mbarrier
START = """mov.u32 %r50, buffer; mov.u32 %r52, bar; shr.u32 %r60, %t, 5; setp.eq.u32 %p1, %r60, 0;
  setp.eq.u32 %p10, %t, 0; and.b32 %r61, %t, 31; mad.lo.u32 %r51, %r61, 16, %r50; mov.u32 %r20, %cluster_ctarank;
  mov.u32 %r1, 7; mov.u32 %r2, 7; mov.u32 %r3, 7; mov.u32 %r4, 7;"""
FOUR = "{%r1, %r2, %r3, %r4}"


def run(body, *, arrays=None, threads=64, **options):
    """Run a body with the detector on; gives the arrays."""
    arrays = [aligned(np.zeros(4096, np.uint8)) for _ in range(2)] if arrays is None else arrays
    text = kernel_text(START + body, 1, len(arrays) - 1, declarations=SHARED, target=options.pop("target", "sm_90a"))
    launch(text, arrays, threads=threads, race=True, **options)
    return arrays


def without(body, sync, put=""):
    """The body without a synchronisation, which must be there once."""
    assert body.count(sync) == 1
    return body.replace(sync, put)


def reported(body, error=RaceError, match="not ordered", **options):
    with pytest.raises(error, match=match) as found:
        run(body, **options)
    assert type(found.value) is error
    return found.value


# ---- generic accesses and barriers of a CTA ----------------------------------------------------------------------

HAND_OVER = f"""@%p1 st.shared.v4.u32 [%r51], {FOUR}; bar.sync 0; @!%p1 ld.shared.v4.u32 {FOUR}, [%r51];
  bar.sync 1; @%p1 st.shared.v4.u32 [%r51], {FOUR};"""


def test_report_names_both_accesses():
    """Both lines and warps, and exactly the bytes that both touch."""
    run(HAND_OVER)
    error = reported(without(HAND_OVER, "bar.sync 0;"))
    assert "st.shared.v4" in error.other[1] and "ld.shared.v4" in error.text
    assert error.where == "cta(0,0,0).w1" and error.other[2] == "cta(0,0,0).w0"
    assert "read of shared memory 0x400 to 0x5ff of cta(0,0,0)" in error.message
    assert re.search(rf"PTX line {error.other[0]}: @%p1 st.shared", error.message)
    half = without(HAND_OVER, "bar.sync 0;", f"@%p1 st.shared.v4.u32 [%r51+512], {FOUR}; add.u32 %r51, %r51, 256;")
    assert "0x500 to 0x5ff" in reported(half).message


def test_write_after_read():
    error = reported(without(HAND_OVER, "bar.sync 1;"))
    assert "write of shared memory" in error.message and "ld.shared" in error.other[1]


def test_write_after_write():
    """In one instruction or in two; writes of the same value do not count."""
    run(f"st.shared.v4.u32 [%r51], {FOUR}; @%p1 st.shared.v4.u32 [%r51], {FOUR};")
    match = "write of .* not ordered after the write"
    reported(f"mov.u32 %r2, %r60; st.shared.v4.u32 [%r51], {FOUR};", match=match)
    two = f"@%p1 st.shared.v4.u32 [%r51], {FOUR}; mov.u32 %r2, CHANGE; @!%p1 st.shared.v4.u32 [%r51], {FOUR};"
    run(two.replace("CHANGE", "7"))
    reported(two.replace("CHANGE", "8"), match=match)


def test_source_lines():
    """.loc gives both accesses their Python lines."""
    body = without(HAND_OVER, "bar.sync 0;").replace("@%p1 st", ".loc 1 12 3\n@%p1 st", 1)
    text = kernel_text(START + body.replace("@!%p1 ld", ".loc 1 34 3\n@!%p1 ld"), 1, 1, declarations=SHARED)
    text = text.replace(".visible", '.file 1 "kernel.py"\n.visible')
    with pytest.raises(RaceError) as found:
        launch(text, [aligned(np.zeros(16)) for _ in range(2)], threads=64, race=True)
    assert "(kernel.py:12)" in found.value.message and "(kernel.py:34)" in found.value.message


def test_neighbouring_bytes_do_not_race():
    """Every warp writes its own bytes of the same words."""
    run("add.u32 %r51, %r50, %t; mul.lo.u32 %r5, %r61, 4; add.u32 %r51, %r5, %r50; add.u32 %r51, %r51, %r60;"
        "st.shared.u8 [%r51], %r1; ld.shared.u8 %r2, [%r51];", threads=128)  # fmt: skip


def test_named_barriers():
    """bar.arrive orders what came before it; what comes after is not part of it."""
    body = f"""@!%p1 bra READER; st.shared.v4.u32 [%r51], {FOUR}; bar.arrive 1, 64; LATER bra END;
      READER: bar.sync 1, 64; ld.shared.v4.u32 {FOUR}, [%r51]; END:"""
    run(body.replace("LATER", ""))
    reported(body.replace("LATER", f"st.shared.v4.u32 [%r51], {FOUR};"))
    # three warps and a barrier for two of them: the third is not ordered
    body = f"""@%p1 st.shared.v4.u32 [%r51], {FOUR}; setp.lt.u32 %p2, %r60, 2; @%p2 bar.sync 1, 64;
      setp.eq.u32 %p3, %r60, WHO; @%p3 ld.shared.v4.u32 {FOUR}, [%r51];"""
    run(body.replace("WHO", "1"), threads=96)
    reported(body.replace("WHO", "2"), threads=96)


def test_reduction_barrier_and_transitivity():
    """Order goes on through a third warp; bar.red synchronises too."""
    body = f"""@%p1 st.shared.v4.u32 [%r51], {FOUR}; setp.lt.u32 %p2, %r60, 2; @%p2 bar.sync 1, 64;
      setp.gt.u32 %p3, %r60, 0; @%p3 bar.red.popc.u32 %r5, 2, 64, %p1; setp.eq.u32 %p4, %r60, 2;
      @%p4 ld.shared.v4.u32 {FOUR}, [%r51];"""
    run(body, threads=96)
    reported(without(body, "@%p2 bar.sync 1, 64;"), threads=96)
    reported(without(body, "@%p3 bar.red.popc.u32 %r5, 2, 64, %p1;"), threads=96)


# ---- mbarriers ----------------------------------------------------------------------------------------------------

INIT = "@%p10 mbarrier.init.shared.b64 [%r52], COUNT; INIT_FENCE bar.sync 0;"
WAIT = "W: mbarrier.try_wait.parity.shared.b64 %p11, [%r52], 0; @!%p11 bra W;"
ARRIVAL = f"""{INIT} @!%p1 bra READER; st.shared.v4.u32 [%r51], {FOUR}; mbarrier.arrive.shared.b64 _, [%r52]; bra END;
  READER: {WAIT} ld.shared.v4.u32 {FOUR}, [%r51]; END:""".replace("COUNT", "32").replace("INIT_FENCE", "")


def test_mbarrier():
    run(ARRIVAL)
    reported(without(ARRIVAL, WAIT))
    # waiting for the phase before passes at once: the reader is first, and the write is not ordered after it
    body = f"""@%p1 st.shared.v4.u32 [%r51], {FOUR}; {INIT} @%p1 bra WRITER; {WAIT} ld.shared.v4.u32 {FOUR}, [%r51];
      bra END; WRITER: st.shared.v4.u32 [%r51], {FOUR}; mbarrier.arrive.shared.b64 _, [%r52]; END:"""
    body = body.replace("COUNT", "32").replace("INIT_FENCE", "")
    run(body)
    reported(body.replace("[%r52], 0;", "[%r52], 1;"), match="write of .* not ordered after the read")
    late = without(ARRIVAL, "mbarrier.arrive.shared.b64 _, [%r52];")
    reported(late.replace("st.shared", "mbarrier.arrive.shared.b64 _, [%r52]; st.shared"))


def test_mbarrier_initialisation():
    """Its use must come after it; by the async proxy, after a fence too."""
    reported(without(ARRIVAL, "bar.sync 0;"), BarrierInitError, "not ordered after the initialisation")
    run(LOAD_AND_READ)
    error = reported(without(LOAD_AND_READ, INIT_FENCE), BarrierInitError, "no fence.mbarrier_init")
    assert "mbarrier.init" in error.other[1] and "cp.async.bulk" in error.text
    run(without(LOAD_AND_READ, INIT_FENCE, "fence.proxy.async.shared::cta;"))
    late = without(LOAD_AND_READ, INIT_FENCE).replace("bar.sync 0;", "bar.sync 0; fence.proxy.async;", 1)
    run(late)  # on the side that uses it


# ---- asynchronous copies -------------------------------------------------------------------------------------------

CP_ASYNC = f"""mul.wide.u32 %rd1, %r61, 16; add.s64 %rd2, %in0, %rd1; @!%p1 bra READER;
  cp.async.cg.shared.global [%r51], [%rd2], 16; cp.async.commit_group; cp.async.wait_group 0; @%p1 bra READER;
  READER: bar.sync 0; ld.shared.v4.u32 {FOUR}, [%r51];"""


def test_cp_async():
    """The warp that copies must wait, then hand over."""
    run(CP_ASYNC)
    for sync in ("cp.async.commit_group;", "cp.async.wait_group 0;"):
        error = reported(without(CP_ASYNC, sync))
        assert error.other[2] == "cp.async of cta(0,0,0).w0"
    reported(without(CP_ASYNC, "bar.sync 0;"))
    run(CP_ASYNC.replace("wait_group 0", "wait_all").replace("cp.async.commit_group;", ""))
    # two groups, the older one is waited for
    younger = "cp.async.cg.shared.global [%r51+512], [%rd2], 16; cp.async.commit_group;"
    two = CP_ASYNC.replace("cp.async.wait_group 0;", f"{younger} cp.async.wait_group 1;")
    run(two)
    reported(two.replace(f"ld.shared.v4.u32 {FOUR}, [%r51]", f"ld.shared.v4.u32 {FOUR}, [%r51+512]"))


def test_cp_async_arrives_at_an_mbarrier():
    body = f"""{INIT} mul.wide.u32 %rd1, %r61, 16; add.s64 %rd2, %in0, %rd1; @!%p1 bra READER;
      cp.async.cg.shared.global [%r51], [%rd2], 16; cp.async.mbarrier.arrive.noinc.shared.b64 [%r52]; bra END;
      READER: {WAIT} ld.shared.v4.u32 {FOUR}, [%r51]; END:""".replace("COUNT", "32").replace("INIT_FENCE", "")
    run(body)
    reported(without(body, WAIT))
    reported(body.replace("cp.async.mbarrier.arrive.noinc.shared.b64 [%r52]", "mbarrier.arrive.shared.b64 _, [%r52]"))


INIT_FENCE = "fence.mbarrier_init.release.cluster;"
TRANSFER = """mbarrier.arrive.expect_tx.shared.b64 _, [%r52], 512;
  @%p10 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r50], [%in0], 512, [%r52];"""
LOAD_AND_READ = f"""{INIT} @%p10 {TRANSFER} {WAIT} ld.shared.v4.u32 {FOUR}, [%r51];""".replace("COUNT", "1").replace(
    "INIT_FENCE", INIT_FENCE)  # fmt: skip


def test_bulk_load():
    run(LOAD_AND_READ)
    error = reported(without(LOAD_AND_READ, WAIT))
    assert error.other[2] == "the bulk load of cta(0,0,0).w0"
    # overwriting what somebody may still read
    again = f"{LOAD_AND_READ} bar.sync 1; @%p10 {TRANSFER}"
    run(again + WAIT.replace("W", "V").replace("], 0", "], 1"))
    assert "ld.shared" in reported(without(again, "bar.sync 1;")).other[1]


STORE = f"""st.shared.v4.u32 [%r51], {FOUR}; fence.proxy.async.shared::cta; bar.sync 0; @!%p10 bra END;
  cp.async.bulk.global.shared::cta.bulk_group [%out0], [%r50], 512; cp.async.bulk.commit_group;
  cp.async.bulk.wait_group.read 0; END:""".replace("st.shared", "@%p1 st.shared", 1)


def test_bulk_store():
    fence = "fence.proxy.async.shared::cta;"
    out = run(STORE)[1]
    assert (out[:512].view(np.uint32) == 7).all()
    error = reported(without(STORE, fence), ProxyError, "no fence.proxy.async")
    assert "st.shared" in error.other[1] and "cp.async.bulk.global" in error.text
    run(without(STORE, fence).replace("@!%p10 bra END;", f"@!%p10 bra END; {fence}"))  # by who reads
    reported(fence + without(STORE, fence), ProxyError, "no fence.proxy.async")  # before the write
    reported(without(STORE, fence).replace("bar.sync 0;", f"bar.sync 0; @!%p1 {fence}"), ProxyError, "no fence")
    reported(without(STORE, fence, "fence.proxy.async.global;"), ProxyError, "no fence.proxy.async")


def test_bulk_store_is_waited_for():
    reported(without(STORE, "cp.async.bulk.wait_group.read 0;"), match="ends without cp.async.bulk.wait_group")
    reported(without(STORE, "cp.async.bulk.commit_group;"), match="ends without cp.async.bulk.wait_group")
    again = STORE + f"bar.sync 1; @%p1 st.shared.v4.u32 [%r51], {FOUR};"
    run(again)
    assert "cp.async.bulk.global" in reported(without(again, "cp.async.bulk.wait_group.read 0;")).other[1]
    # .read is not enough to read the output back
    back = STORE.replace("END:", "ld.global.u32 %r5, [%out0]; END:")
    assert "read of global memory" in reported(back).message
    run(back.replace(".read 0", " 0"))


def test_overlapping_stores_of_one_warp():
    """Lanes that issue the same store are one; two stores in one group to the same bytes race."""
    one = STORE.replace("@!%p10 bra END", "@!%p1 bra END")
    run(one)
    reported(one.replace("cp.async.bulk.commit_group", "cp.async.bulk.global.shared::cta.bulk_group [%out0+256], "
                         "[%r50], 512; cp.async.bulk.commit_group"), match="write of global memory")  # fmt: skip


TENSOR_MAP = """add.s64 %rd3, %in0, SKIP; @%p1 bra USE; ld.global.u64 %rd4, [%rd3]; st.global.u64 [%rd3], %rd4;
  fence.acq_rel.gpu; USE: bar.sync 1; @!%p10 bra END; FENCE
  mbarrier.arrive.expect_tx.shared.b64 _, [%r52], 512;
  cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%r50], [%in0, {0, 0}], [%r52];
  W: mbarrier.try_wait.parity.shared.b64 %p11, [%r52], 0; @!%p11 bra W; END:"""


@pytest.mark.parametrize("at", [0, 64])
def test_tensor_map(at):
    """A tensor map that the kernel writes is used through another proxy."""
    source = aligned(np.ones((16, 16), np.uint16))
    body = INIT.replace("COUNT", "1").replace("INIT_FENCE", INIT_FENCE) + TENSOR_MAP.replace("SKIP", str(at))
    options = dict(arrays=[aligned(tensor_map(source, (16, 16))), aligned(np.zeros(4))], legal=[source])
    run(body.replace("FENCE", "fence.proxy.tensormap::generic.acquire.gpu [%in0], 128;"), **options)
    reported(body.replace("FENCE", ""), ProxyError, "no fence.proxy.tensormap", **options)
    reported(body.replace("FENCE", "").replace("bar.sync 1;", ""), match="use of the tensor map", **options)


PROXY = "fence.proxy.async.global;"
WRITE_AND_LOAD = f"""{INIT} mul.wide.u32 %rd1, %r61, 16; add.s64 %rd2, %in0, %rd1; @%p1 st.global.v4.u32 [%rd2], {FOUR};
  {PROXY} bar.sync 1; setp.eq.u32 %p12, %t, 32; @%p12 {TRANSFER.replace("%p10", "%p12")}
  {WAIT} ld.shared.v4.u32 {FOUR}, [%r51];""".replace("COUNT", "1").replace("INIT_FENCE", INIT_FENCE)  # fmt: skip
REDUCE = "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.u32 [%out0], [%r50], 512;"
INIT_AND_REDUCE = f"""mul.wide.u32 %rd1, %r61, 16; add.s64 %rd2, %out0, %rd1; @%p1 st.global.v4.u32 [%rd2], {FOUR};
  {PROXY} {STORE}""".replace("cp.async.bulk.global.shared::cta.bulk_group [%out0], [%r50], 512;", REDUCE)


@pytest.mark.parametrize("body", [WRITE_AND_LOAD, INIT_AND_REDUCE])
def test_proxies_of_global_memory(body):
    """What the generic proxy wrote must be made visible before a bulk load, or a bulk reduction, reads it."""
    run(body)
    for instead in ("", "fence.proxy.async.shared::cta;", "fence.acq_rel.gpu;"):
        error = reported(without(body, PROXY, instead), ProxyError, "no fence.proxy.async .* of global memory")
        assert "st.global" in error.other[1] and "async.bulk" in error.text
    run(without(body, PROXY, "fence.proxy.async;"))
    barrier = "bar.sync 1;" if body == WRITE_AND_LOAD else "bar.sync 0;"
    run(without(body, PROXY).replace(barrier, f"{barrier} {PROXY}"))  # by who reads
    if body == WRITE_AND_LOAD:
        reported(without(body, barrier), match="read of global memory")
    # what a bulk store wrote needs no fence once it is waited for
    again = STORE.replace(".read 0", " 0") + LOAD_AND_READ.replace("%in0", "%out0").replace("bar.sync 0", "bar.sync 2")
    run(again)
    reported(again.replace("cp.async.bulk.wait_group 0;", "cp.async.bulk.wait_group.read 0;"), match="read of global")


# ---- clusters -------------------------------------------------------------------------------------------------------

CLUSTER = f"""setp.eq.u32 %p2, %r20, 0; xor.b32 %r21, %r20, 1; mapa.shared::cluster.u32 %r22, %r51, %r21;
  @%p2 st.shared::cluster.v4.u32 [%r22], {FOUR}; FENCE barrier.cluster.arrive.MODE; barrier.cluster.wait;
  @!%p2 ld.shared.v4.u32 {FOUR}, [%r51]; barrier.cluster.arrive; barrier.cluster.wait;"""


def test_cluster_barrier():
    options = dict(grid=2, cluster=2, threads=32)
    run(CLUSTER.replace("MODE", "release").replace("FENCE", ""), **options)
    error = reported(CLUSTER.replace("MODE", "relaxed").replace("FENCE", ""), **options)
    assert "of cta(1,0,0)" in error.message and error.other[2] == "cta(0,0,0).w0"
    run(CLUSTER.replace("MODE", "relaxed").replace("FENCE", "fence.acq_rel.cluster;"), **options)


def test_remote_reads():
    """A CTA reads another one's shared memory, then that CTA overwrites it."""
    body = f"""st.shared.v4.u32 [%r51], {FOUR}; barrier.cluster.arrive; barrier.cluster.wait; xor.b32 %r21, %r20, 1;
      mapa.shared::cluster.u32 %r22, %r51, %r21; ld.shared::cluster.v4.u32 {FOUR}, [%r22]; SYNC
      st.shared.v4.u32 [%r51], {FOUR};"""
    options = dict(grid=2, cluster=2, threads=32)
    run(body.replace("SYNC", "barrier.cluster.arrive; barrier.cluster.wait;"), **options)
    reported(body.replace("SYNC", ""), match="write of .* not ordered after the read", **options)


def test_remote_mbarrier():
    """Arriving at another CTA's barrier needs its initialisation: by a release, or by fence.mbarrier_init."""
    body = """@%p10 mbarrier.init.shared.b64 [%r52], 1; FENCE barrier.cluster.arrive.MODE; barrier.cluster.wait;
      xor.b32 %r21, %r20, 1; mapa.shared::cluster.u32 %r22, %r52, %r21;
      @%p10 mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r22];
      W: mbarrier.try_wait.parity.shared.b64 %p11, [%r52], 0; @!%p11 bra W;
      barrier.cluster.arrive; barrier.cluster.wait;"""
    options = dict(grid=2, cluster=2, threads=32)
    run(body.replace("MODE", "release").replace("FENCE", ""), **options)
    run(body.replace("MODE", "relaxed").replace("FENCE", INIT_FENCE), **options)
    reported(body.replace("MODE", "relaxed").replace("FENCE", ""), BarrierInitError, "not ordered", **options)


# ---- global memory --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("waves", [1, 2])
def test_global_memory(waves):
    """CTAs are not ordered, whether they run together or not; disjoint bytes and atomics do not race."""
    options = dict(grid=2, threads=32, waves=waves)
    own = "mad.wide.u32 %rd1, %g, 4, %out0; st.global.u32 [%rd1], %c; ld.global.u32 %r2, [%rd1];"
    run(own, **options)
    reported(own.replace("%g", "%t"), match="write of global memory", **options)
    run("mad.wide.u32 %rd1, %t, 4, %out0; st.global.u32 [%rd1], %t;", **options)  # the same value
    reported("mad.wide.u32 %rd1, %t, 4, %out0; setp.eq.u32 %p2, %c, 0; @%p2 ld.global.u32 %r2, [%rd1];"
             "@!%p2 st.global.u32 [%rd1], %r1;", match="write of global memory", **options)  # fmt: skip
    run("atom.global.add.u32 %r1, [%out0], 1; red.global.add.u32 [%out0], 1;", **options)
    reported("red.global.add.u32 [%out0], 1; @%p10 st.global.u32 [%out0], %r1;", **options)


def test_two_reads_then_a_write():
    """Reads by two CTAs, then a write by one of them."""
    body = """mad.wide.u32 %rd1, %t, 4, %out0; ld.global.u32 %r2, [%rd1]; setp.eq.u32 %p2, %c, WHO;
      @%p2 st.global.u32 [%rd1], %r1;"""
    for who in "01":
        reported(body.replace("WHO", who), match="write of global memory", grid=2, threads=32)


def test_many_reads_then_a_write():
    """Warps 0 to 5 read; warp 6 has waited for all but one of them before it writes, then for all."""
    body = """mad.wide.u32 %rd1, %r61, 4, %out0; setp.lt.u32 %p2, %r60, 6; @%p2 ld.global.u32 %r2, [%rd1];
      setp.ne.u32 %p3, %r60, WHO; @%p3 bar.sync 1, THREADS; setp.eq.u32 %p4, %r60, 6; @%p4 st.global.u32 [%rd1], %r1;"""
    run(body.replace("WHO", "7").replace("THREADS", "224"), threads=224)
    for who in range(6):
        error = reported(body.replace("WHO", str(who)).replace("THREADS", "192"), threads=224, match="after the read")
        assert error.other[2] == f"cta(0,0,0).w{who}" and error.where == "cta(0,0,0).w6"


def test_reads_by_several_ctas_then_a_write():
    """A CTA orders its own six readers before its writer; the read by the other CTA still races, whenever it came."""
    body = """mad.wide.u32 %rd1, %r61, 4, %out0; setp.ne.u32 %p2, %c, WRITER; setp.eq.and.u32 %p3, %r60, 0, %p2;
      setp.lt.and.u32 %p4, %r60, 6, !%p2; or.pred %p5, %p3, %p4; @%p5 ld.global.u32 %r2, [%rd1]; bar.sync 1;
      setp.eq.u32 %p6, %r60, 6; @!%p2 bra MINE; bra END; MINE: @%p6 st.global.u32 [%rd1], %r1; END:"""
    for writer, other in (("0", "1"), ("1", "0")):
        for waves in (1, 2):
            error = reported(
                body.replace("WRITER", writer), grid=2, threads=224, waves=waves, match="not ordered after"
            )
            assert f"cta({other},0,0).w0" in str(error) and f"cta({writer},0,0).w6" in str(error)


FLAG = """setp.eq.u32 %p2, %c, 0; @!%p2 bra READER; mad.wide.u32 %rd1, %t, 4, %out0; st.global.u32 [%rd1], %r1;
  bar.sync 0; WRITE bra END; READER: add.s64 %rd2, %out0, 1024; W: READ setp.eq.u32 %p3, %r5, 0; @%p3 bra W; bar.sync 0;
  mad.wide.u32 %rd1, %t, 4, %out0; ld.global.u32 %r6, [%rd1]; END:"""


@pytest.mark.parametrize(
    ("write", "read", "ordered"),
    [
        ("st.release.gpu.global.u32 [%out0+1024], %r1;", "ld.acquire.gpu.global.u32 %r5, [%rd2];", True),
        ("red.release.gpu.global.add.u32 [%out0+1024], %r1;", "ld.acquire.gpu.global.u32 %r5, [%rd2];", True),
        ("fence.acq_rel.gpu; red.relaxed.gpu.global.add.u32 [%out0+1024], %r1;",
         "ld.relaxed.gpu.global.u32 %r5, [%rd2]; fence.acq_rel.gpu;", True),
        ("membar.gl; atom.global.add.u32 %r8, [%out0+1024], %r1;",
         "atom.global.add.u32 %r5, [%rd2], 0; membar.gl;", True),
        ("st.relaxed.gpu.global.u32 [%out0+1024], %r1;", "ld.acquire.gpu.global.u32 %r5, [%rd2];", False),
        ("st.release.gpu.global.u32 [%out0+1024], %r1;", "ld.relaxed.gpu.global.u32 %r5, [%rd2];", False),
        ("red.relaxed.gpu.global.add.u32 [%out0+1024], %r1;",
         "ld.relaxed.gpu.global.u32 %r5, [%rd2]; fence.acq_rel.gpu;", False),
    ],
)  # fmt: skip
def test_flags_in_global_memory(write, read, ordered):
    """One CTA hands data to another through a flag."""
    body = FLAG.replace("WRITE", write).replace("READ ", read + " ")
    options = dict(grid=2, threads=64)
    if ordered:
        run(body, **options)
    else:
        assert "ld.global.u32 %r6" in reported(body, match="read of global memory", **options).text


FENCED = "fence.acq_rel.{}; st.relaxed.{}.global.u32 [%out0+1024], %r1;"
FENCED_READ = "ld.relaxed.{}.global.u32 %r5, [%rd2]; fence.acq_rel.{};"


@pytest.mark.parametrize(
    ("write", "read", "racing"),
    [
        ("st.release.SCOPE.global.u32 [%out0+1024], %r1;", "ld.acquire.gpu.global.u32 %r5, [%rd2];", "ld.acquire"),
        ("st.release.gpu.global.u32 [%out0+1024], %r1;", "ld.acquire.SCOPE.global.u32 %r5, [%rd2];", "ld.acquire"),
        ("atom.release.SCOPE.global.exch.b32 %r8, [%out0+1024], %r1;",
         "atom.acquire.SCOPE.global.add.u32 %r5, [%rd2], 0;", "atom"),
        (FENCED.format("SCOPE", "gpu"), FENCED_READ.format("gpu", "gpu"), "ld.global.u32 %r6"),
        (FENCED.format("gpu", "gpu"), FENCED_READ.format("gpu", "SCOPE"), "ld.global.u32 %r6"),
        (FENCED.format("gpu", "SCOPE"), FENCED_READ.format("gpu", "gpu"), "ld.relaxed"),
        ("membar.gl; " + FENCED.format("SCOPE", "gpu"), FENCED_READ.format("gpu", "gpu"), None),  # the wide one counts
    ],
)  # fmt: skip
@pytest.mark.parametrize(("scope", "cluster"), [("cta", 1), ("cta", 2), ("cluster", 1), ("cluster", 2), ("gpu", 1)])
def test_scopes(write, read, racing, scope, cluster):
    """Each side's scope must contain the other: else they do not synchronise, and a flag that both access races."""
    body = FLAG.replace("WRITE", write).replace("READ ", read + " ").replace("SCOPE", scope)
    options = dict(grid=2, cluster=cluster, threads=64)
    if racing is None or scope == "gpu" or (scope == "cluster" and cluster == 2):
        run(body, **options)
    else:
        assert racing in reported(body, match="not ordered", **options).text


def test_scope_of_a_fence_before_a_relaxed_cluster_barrier():
    body = CLUSTER.replace("MODE", "relaxed")
    options = dict(grid=2, cluster=2, threads=32)
    run(body.replace("FENCE", "fence.acq_rel.gpu;"), **options)
    reported(body.replace("FENCE", "fence.acq_rel.cta;"), **options)


def test_a_spinning_flag_read_without_atomics_races():
    body = FLAG.replace("WRITE", "@%p10 st.global.u32 [%out0+1024], %r1;").replace(
        "READ ", "ld.global.u32 %r5, [%rd2]; "
    )
    reported(body, match="read of global memory", grid=2)


def test_local_memory_is_private():
    """Local memory of a later wave may lie where that of an earlier one lay; nothing else about it can race."""
    body = ".local .align 4 .b8 own[4]; mov.u64 %rd1, own; st.local.u32 [%rd1], %t; ld.local.u32 %r2, [%rd1];"
    run(body, grid=4, waves=4)
