"""The race detector on lanes of one warp: what a release, or a bulk store, by one of them has of the others' writes."""

from __future__ import annotations

import pytest

from tests.ptxsim.test_races import FOUR, INIT, WAIT, reported, run, without

# Warp 0 writes 512 bytes, lane 0 tells warp 1, which reads them.
MEET = "bar.warp.sync 0xffffffff;"
HANDED_OVER = f"""{INIT} @!%p1 bra READER; st.shared.v4.u32 [%r51], {FOUR}; {MEET}
  @%p10 mbarrier.arrive.shared.b64 _, [%r52]; bra END;
  READER: {WAIT} ld.shared.v4.u32 {FOUR}, [%r51]; END:""".replace("COUNT", "1").replace("INIT_FENCE", "")
ARRIVAL = "@%p10 mbarrier.arrive.shared.b64 _, [%r52];"


def test_arrival_of_one_lane():
    run(HANDED_OVER)
    error = reported(without(HANDED_OVER, MEET))
    assert "st.shared" in error.other[1] and "ld.shared" in error.text
    assert "some lanes of that warp release alone: bar.warp.sync before it is missing" in error.message
    # neither does what follows it belong to the release
    reported(HANDED_OVER.replace(f"{MEET}\n  {ARRIVAL}", f"{ARRIVAL} {MEET}"))
    # lanes that have met: where the CTA does, too
    run(without(HANDED_OVER, MEET, "bar.sync 1, 32;"))
    # writes before the lanes met, and after it
    again = f"{MEET} st.shared.v4.u32 [%r51+512], {FOUR};"
    run(without(HANDED_OVER, MEET, again))
    both = without(HANDED_OVER, MEET, again).replace(f"ld.shared.v4.u32 {FOUR}, [%r51]",
                                                     f"ld.shared.v4.u32 {FOUR}, [%r51+512]")  # fmt: skip
    reported(both)


def test_lanes_release_their_own_writes():
    """Every lane arrives; or lane 0 alone wrote."""
    alone = without(HANDED_OVER, MEET)
    run(alone.replace(ARRIVAL, ARRIVAL.removeprefix("@%p10 ")).replace("[%r52], 1;", "[%r52], 32;", 1))
    run(alone.replace("st.shared", "@%p10 st.shared").replace("ld.shared", "@%p12 ld.shared").replace(
        "READER:", "READER: setp.eq.u32 %p12, %r61, 0;"))  # fmt: skip
    half = alone.replace(ARRIVAL, "@%p12 mbarrier.arrive.shared.b64 _, [%r52];").replace("[%r52], 1;", "[%r52], 16;", 1)
    half = half.replace("st.shared", "setp.lt.u32 %p12, %r61, 16; WRITERS st.shared")
    half = half.replace("READER:", "READER: setp.lt.u32 %p12, %r61, 16;").replace("ld.shared", "@%p12 ld.shared")
    run(half.replace("WRITERS", "@%p12"))
    reported(half.replace("WRITERS", ""))


def test_copies_of_several_lanes():
    """A lane has waited for its own cp.async."""
    copy = "mad.wide.u32 %rd1, %r61, 16, %out0; cp.async.cg.shared.global [%r51], [%rd1], 16; cp.async.commit_group;"
    body = without(HANDED_OVER, f"st.shared.v4.u32 [%r51], {FOUR};", f"{copy} cp.async.wait_group 0;")
    run(body)
    error = reported(without(body, MEET))
    assert "cp.async.cg" in error.other[1] and "ld.shared" in error.text
    assert "some lanes of that warp release alone: bar.warp.sync before it is missing" in error.message
    # the lanes meet before they have waited
    reported(without(body, f"cp.async.wait_group 0; {MEET}", f"{MEET} cp.async.wait_group 0;"))
    # lane 0 alone copies; every lane arrives
    run(without(body, MEET).replace("cp.async.cg", "@%p10 cp.async.cg").replace("ld.shared", "@%p12 ld.shared").replace(
        "READER:", "READER: setp.eq.u32 %p12, %r61, 0;"))  # fmt: skip
    run(without(body, MEET).replace(ARRIVAL, ARRIVAL.removeprefix("@%p10 ")).replace("[%r52], 1;", "[%r52], 32;", 1))


def test_one_lane_beside_several():
    """What lane 0 wrote alone is released, without what all lanes wrote before it."""
    own = "@%p10 st.shared.u32 [%r50+1024], %r1;"
    body = without(HANDED_OVER, MEET, own)
    reported(body)
    run(body.replace(f"ld.shared.v4.u32 {FOUR}, [%r51]", "ld.shared.u32 %r1, [%r50+1024]"))
    other = body.replace(own, "setp.eq.u32 %p12, %r61, 3;" + own.replace("%p10", "%p12"))
    reported(other.replace(f"ld.shared.v4.u32 {FOUR}, [%r51]", "ld.shared.u32 %r1, [%r50+1024]"))


def test_reads_are_no_part_of_it():
    """A stage is released by one lane as soon as the values are in registers, wherever else the lanes write."""
    body = f"""{INIT} @%p1 st.shared.v4.u32 [%r51], {FOUR}; bar.sync 1; @!%p1 bra NEXT; ld.shared.v4.u32 {FOUR}, [%r51];
      WRITE {ARRIVAL} bra END; NEXT: {WAIT} st.shared.v4.u32 [%r51], {FOUR}; END:"""
    body = body.replace("COUNT", "1").replace("INIT_FENCE", "")
    run(body.replace("WRITE", ""))
    run(body.replace("WRITE", f"st.shared.v4.u32 [%r51+512], {FOUR}; @%p10 st.shared.u32 [%r50+1024], %r1;"))
    run(body.replace("WRITE", "").replace("ld.shared", f"st.shared.v4.u32 [%r51+512], {FOUR}; ld.shared"))
    error = reported(body.replace("WRITE", "").replace(f"{ARRIVAL} bra", f"{ARRIVAL} ld.shared.u32 %r1, [%r51]; bra"))
    assert "write of shared memory" in error.message and "ld.shared.u32" in error.other[1]
    reported(body.replace("WRITE", f"mov.u32 %r2, 9; st.shared.v4.u32 [%r51], {FOUR};"), match="after the write")


STORE = f"""@!%p1 bra END; st.shared.v4.u32 [%r51], {FOUR}; fence.proxy.async.shared::cta; {MEET} @!%p10 bra END;
  cp.async.bulk.global.shared::cta.bulk_group [%out0], [%r50], 512; cp.async.bulk.commit_group;
  cp.async.bulk.wait_group.read 0; END:"""


def test_bulk_store_of_one_lane():
    """The warp's own tile, stored by one lane."""
    run(STORE)
    error = reported(without(STORE, MEET))
    assert "st.shared" in error.other[1] and "cp.async.bulk.global" in error.text
    assert "(lanes of the same warp: bar.warp.sync orders them)" in error.message
    run(without(STORE, MEET).replace("512; cp.async.bulk.commit", "16; cp.async.bulk.commit").replace(
        "st.shared", "@%p10 st.shared"))  # fmt: skip


@pytest.mark.parametrize(
    "release", ["red.release.gpu.global.add.u32 [%out0+1024], 1", "st.release.gpu.global.u32 [%out0+1024], %r1"]
)
def test_release_in_global_memory(release):
    """One lane tells another CTA that the warp's data is there."""
    data = "mad.wide.u32 %rd1, %r61, 16, %out0;"
    body = f"""mov.u32 %r62, %ctaid.x; setp.eq.u32 %p2, %r62, 1; {data} @%p2 bra READER;
      st.global.v4.u32 [%rd1], {FOUR}; {MEET} @%p10 {release}; bra END;
      READER: ld.acquire.gpu.global.u32 %r63, [%out0+1024]; setp.eq.u32 %p11, %r63, 0; @%p11 bra READER;
      ld.global.v4.u32 {FOUR}, [%rd1]; END:"""
    run(body, threads=32, grid=2)
    error = reported(without(body, MEET), threads=32, grid=2)
    assert "st.global" in error.other[1] and "bar.warp.sync before it is missing" in error.message
