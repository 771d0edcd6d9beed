"""Traces: valid JSON, spans that nest, asynchronous slices and flows that match, and the events of a small kernel."""

import json

import numpy as np
import pytest

from ptxsim.errors import Deadlock
from ptxsim.trace import Trace, TracedMachine
from tests.testing import ptx
from tests.testing.traces import check_trace

# Warp 0 loads 64 bytes four times through a buffer of two stages, warp 1 waits for them and gives the stages back.
PIPELINE = """.shared .align 128 .b8 buffer[128]; .shared .align 8 .b64 full[2]; .shared .align 8 .b64 empty[2];
  mov.u32 %r1, full; mov.u32 %r2, empty; mov.u32 %r3, buffer; setp.eq.u32 %p1, %t, 0; @!%p1 bra READY;
  mbarrier.init.shared.b64 [%r1], 1; mbarrier.init.shared.b64 [%r1+8], 1;
  mbarrier.init.shared.b64 [%r2], 1; mbarrier.init.shared.b64 [%r2+8], 1;
  READY: bar.sync 0; mov.u32 %r4, 0; setp.ge.u32 %p2, %t, 32; @%p2 bra CONSUMER; @!%p1 exit;
  LOAD: and.b32 %r5, %r4, 1; shl.b32 %r6, %r5, 3; shr.u32 %r7, %r4, 1; xor.b32 %r8, %r7, 1;
  add.u32 %r9, %r1, %r6; add.u32 %r10, %r2, %r6; shl.b32 %r11, %r5, 6; add.u32 %r12, %r3, %r11;
  FREE: mbarrier.try_wait.parity.shared.b64 %p3, [%r10], %r8; @!%p3 bra FREE;
  mbarrier.arrive.expect_tx.shared.b64 _, [%r9], 64;
  cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r12], [%in0], 64, [%r9];
  add.u32 %r4, %r4, 1; setp.lt.u32 %p4, %r4, 4; @%p4 bra LOAD; exit;
  CONSUMER: and.b32 %r5, %r4, 1; shl.b32 %r6, %r5, 3; shr.u32 %r7, %r4, 1;
  add.u32 %r9, %r1, %r6; add.u32 %r10, %r2, %r6; shl.b32 %r11, %r5, 6; add.u32 %r12, %r3, %r11;
  FULL: mbarrier.try_wait.parity.shared.b64 %p3, [%r9], %r7; @!%p3 bra FULL;
  ld.shared.u32 %r13, [%r12]; st.global.u32 [%out0], %r13; setp.eq.u32 %p5, %t, 32;
  RELEASE; add.u32 %r4, %r4, 1; setp.lt.u32 %p4, %r4, 4; @%p4 bra CONSUMER;"""
RELEASE = "@%p5 mbarrier.arrive.shared.b64 _, [%r10]"


def traced(path, monkeypatch, release=RELEASE, **options):
    trace = Trace(path)

    class Traced(TracedMachine):
        def run(self):
            self.begin(trace, "pipeline", 0)
            super().run()

    monkeypatch.setattr(ptx, "Machine", Traced)
    arrays = [ptx.aligned(np.arange(16, dtype=np.uint32)), ptx.aligned(np.zeros(1, np.uint32))]
    try:
        ptx.launch(ptx.kernel_text(PIPELINE.replace("RELEASE", release), 1, 1), arrays, threads=64, **options)
    finally:
        trace.write()
    return check_trace(path)


@pytest.mark.parametrize(("late", "seed"), [(False, None), (True, None), (False, 3), (True, 5)])
def test_pipeline(tmp_path, monkeypatch, late, seed):
    found = traced(tmp_path / "trace.json", monkeypatch, grid=2, late=late, seed=seed)
    assert sorted(found.processes.values()) == ["launch 0 cta(0,0,0) pipeline", "launch 0 cta(1,0,0) pipeline"]
    for pid in found.processes:
        tracks = found.tracks[pid]
        assert [name for name in tracks if "other lanes" not in name] == [
            "warp 0", "warp 1", *(f"mbarrier 0x{0x480 + 8 * i:x}" for i in range(4))]  # fmt: skip
        issued = [name for name, *_ in tracks["warp 0"].spans if name.startswith("bulk load")]
        assert issued == ["bulk load 0x400", "bulk load 0x440"] * 2
        assert [kind for kind, *_ in found.slices[pid]] == ["copy"] * 4
        # both full barriers complete twice, by a copy each; the empty ones twice by an arrival
        for i in range(4):
            phases = [name for name, *_ in tracks[f"mbarrier 0x{0x480 + 8 * i:x}"].spans]
            assert phases == ["phase 0", "phase 1", "phase 2, not completed"]
        arrivals = [name for name, _ in tracks["warp 1"].instants if name.startswith("arrive at")]
        assert arrivals == ["arrive at mbarrier 0x490", "arrive at mbarrier 0x498"] * 2
        expected = [name for name, _ in tracks["warp 0"].instants]
        assert [f"arrive.expect_tx 64 bytes at mbarrier 0x{a:x}" in expected for a in (0x480, 0x488)] == [True, True]
        loads = sorted((name, end) for name, start, end, *_ in found.flows if start[0] == pid and "load" in name)
        assert [name for name, _ in loads] == [f"bulk load 0x{a:x} → phase" for a in (0x400, 0x400, 0x440, 0x440)]
        assert [end[1] for _, end in loads] == ["mbarrier 0x480"] * 2 + ["mbarrier 0x488"] * 2
        waits = [(start[1], end[1]) for name, start, end, *_ in found.flows if start[0] == pid and "wait" in name]
        # a wait is ended by the phase that ends then, not by the one that follows
        for name, (owner, track, time), _ in found.flows:
            if "wait" in name and owner == pid:
                ends = [end for _, start, end in tracks[track].spans if start < time < end]
                assert ends[0] - time < 0.0015, (track, time, ends)
        assert waits.count(("mbarrier 0x480", "warp 1")) == waits.count(("mbarrier 0x488", "warp 1")) == 2


def test_lanes_that_wait_for_different_things(tmp_path, monkeypatch):
    """The halves of warp 0 wait for two barriers at once, and the waits cross: they are on tracks of their own."""
    body = """.shared .align 8 .b64 bars[2]; mov.u32 %r1, bars; setp.eq.u32 %p1, %t, 0; @!%p1 bra READY;
      mbarrier.init.shared.b64 [%r1], 1; mbarrier.init.shared.b64 [%r1+8], 1;
      READY: bar.sync 0; setp.ge.u32 %p2, %t, 32; @%p2 bra OTHER; setp.ge.u32 %p3, %t, 16; @%p3 bra HIGH;
      LOW: mbarrier.try_wait.parity.shared.b64 %p4, [%r1], 0; @!%p4 bra LOW; exit;
      HIGH: mbarrier.try_wait.parity.shared.b64 %p4, [%r1+8], 0; @!%p4 bra HIGH; exit;
      OTHER: setp.ne.u32 %p5, %t, 32; @%p5 exit; mov.u32 %r2, 0;
      DELAY: add.u32 %r2, %r2, 1; setp.lt.u32 %p6, %r2, 50; @%p6 bra DELAY;
      mbarrier.arrive.shared.b64 _, [%r1]; mov.u32 %r2, 0;
      AGAIN: add.u32 %r2, %r2, 1; setp.lt.u32 %p6, %r2, 50; @%p6 bra AGAIN; mbarrier.arrive.shared.b64 _, [%r1+8];"""
    monkeypatch.setitem(globals(), "PIPELINE", body)
    (tracks,) = traced(tmp_path / "trace.json", monkeypatch).tracks.values()
    waits = [[name for name, *_ in tracks[track].spans if "mbarrier" in name] for track in
             ("warp 0", "warp 0, other lanes")]  # fmt: skip
    assert sorted(name for track in waits for name in track) == [
        "waits for mbarrier 0x400, parity 0", "waits for mbarrier 0x408, parity 0"]  # fmt: skip
    assert all(waits)


def test_failure_leaves_a_trace(tmp_path, monkeypatch):
    """The stages are never given back: the trace is written, and shows the waits that do not end."""
    path = tmp_path / "trace.json"
    with pytest.raises(Deadlock):
        traced(path, monkeypatch, release="mov.u32 %r14, 0")
    found = check_trace(path)
    ((pid, tracks),) = found.tracks.items()
    stuck = [name for track in tracks.values() for name, *_ in track.spans if name.endswith("never ends")]
    assert "waits for mbarrier 0x490, parity 0, never ends" in stuck
    assert "waits for mbarrier 0x480, parity 1, never ends" in stuck
    assert found.processes[pid].endswith("pipeline")


def test_unusable_path(tmp_path):
    with pytest.raises(FileNotFoundError):
        Trace(tmp_path / "missing" / "trace.json")


def test_time_is_in_the_file(tmp_path):
    trace = Trace(tmp_path / "trace.json")
    trace.write()
    assert "scheduler steps" in json.loads((tmp_path / "trace.json").read_text())["otherData"]["time"]
