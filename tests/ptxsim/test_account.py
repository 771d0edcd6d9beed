"""Accounts of failures: which roles are where, what they wait for, and what they did last."""

import numpy as np
import pytest

from ptxsim.errors import Deadlock, MemoryFault, RaceError
from ptxsim.report import history
from ptxsim.report.account import role_name
from ptxsim.report.history import DEPTH, Event, History, Latest
from tests.testing import exceptions, ptx

# Warps 0-3 arrive once each at a barrier of five arrivals, warps 4-7 wait for it, warp 8 runs to its end.
STUCK = """.shared .align 8 .b64 bar;
  mov.u32 %r1, bar; shr.u32 %r2, %t, 5; and.b32 %r3, %t, 31; setp.eq.u32 %p1, %t, 0;
  @%p1 mbarrier.init.shared.b64 [%r1], 5; bar.sync 0;
  setp.ge.u32 %p2, %r2, 4; @%p2 bra CONSUMER;
  setp.eq.u32 %p3, %r3, 0; @%p3 mbarrier.arrive.shared.b64 _, [%r1]; bar.sync 1, 256; exit;
  CONSUMER: setp.ge.u32 %p4, %r2, 8; @%p4 bra END;
  .loc 1 42 7
  WAIT: mbarrier.try_wait.parity.shared.b64 %p5, [%r1], 0; @!%p5 bra WAIT; bar.sync 1, 256;
  END: """


def failure(body, kind, **options):
    declarations = options.pop("declarations", "")
    with pytest.raises(kind) as caught:
        ptx.launch(ptx.kernel_text(body, 0, 1, declarations=declarations), [ptx.aligned(np.zeros(64))],
                   observers=[History()], **options)  # fmt: skip
    exceptions.assert_survives(caught.value)
    return caught.value


def test_deadlock_tells_every_role():
    """Two CTAs in the same state are told once; the producers wait for the consumers, these for an arrival."""
    error = failure(STUCK, Deadlock, threads=288, grid=2, declarations='.file 1 "kernel.py"')
    producers, consumers = sorted(error.account.roles, key=lambda role: role.name)
    assert producers.name == "warpgroup 0 (warps 0-3) of cta(0,0,0) and 1 other CTA"
    assert producers.state.startswith("waits at barrier 1 (bar.sync): ")
    assert producers.state.endswith("barrier 1: 128 of 256 threads arrived (phase 0)")
    assert producers.text == "bar.sync 1, 256;"
    assert consumers.name == "warpgroup 1 (warps 4-7) of cta(0,0,0) and 1 other CTA"
    assert consumers.state.startswith("waits for mbarrier 0x400, parity 0: ")
    assert consumers.state.endswith("it is in phase 0, 1 of 5 arrivals pending, tx-count 0")
    assert consumers.text.startswith("WAIT: mbarrier.try_wait") and consumers.source == " (kernel.py:42)"
    barrier, arrival, wait = producers.events
    assert "waits at barrier 0 (bar.sync), until step " in barrier
    assert arrival.endswith("arrive at mbarrier 0x400") and wait.endswith("and has not gone on")
    assert all(text in str(error) for text in (producers.name, consumers.state, arrival, "no warp can run"))
    # try_wait gave up and was tried again many times before the deadlock was clear: one wait, since its first step
    assert [event.split(": ", 1)[1] for event in consumers.events[1:]] == [
        "waits for mbarrier 0x400, parity 0, and has not gone on"]  # fmt: skip
    steps = [int(event.split()[1].rstrip(",")) for event in producers.events]
    assert steps == sorted(steps) and len(set(steps)) == 3


def test_fault_tells_the_warp_that_did_it():
    """Warp 2 alone stores out of bounds: its account, not that of the others."""
    body = """bar.sync 0; setp.eq.u32 %p1, %t, 70; mov.u64 %rd1, 64; @%p1 st.global.u32 [%rd1], %t; bar.sync 0;"""
    (role,) = failure(body, MemoryFault, threads=128).account.roles
    assert role.name == "warp 2 of cta(0,0,0)" and role.state == "is at the fault"
    assert "st.global.u32" in role.text
    assert [event.split(": ", 1)[1].split(",")[0] for event in role.events] == ["waits at barrier 0 (bar.sync)"]


def test_race_tells_both_sides():
    """The warp that reads and the one that wrote, without a barrier between."""
    body = """.shared .align 16 .b8 buffer[128];
    mov.u32 %r1, buffer; and.b32 %r2, %t, 31; mad.lo.u32 %r1, %r2, 4, %r1; setp.ge.u32 %p1, %t, 32; mov.u32 %r3, 7;
    @!%p1 st.shared.u32 [%r1], %r3; @%p1 ld.shared.u32 %r3, [%r1]; st.global.u32 [%out0], %r3;"""
    error = failure(body, RaceError, threads=64, race=True)
    writer, reader = sorted(error.account.roles, key=lambda role: role.name)
    assert (writer.name, writer.state) == ("warp 0 of cta(0,0,0)", "made the earlier access")
    assert (reader.name, reader.state) == ("warp 1 of cta(0,0,0)", "is at the fault")
    assert "st.shared" in writer.text and "ld.shared" in reader.text


def test_latest_events_of_each_warp(monkeypatch):
    """A warp that does a lot pushes out its own events only, also where those that nobody refers to are dropped."""
    monkeypatch.setattr(history, "_KEPT", 64)
    latest = Latest(2)
    latest.add(Event(0, 1, np.array([0, 1]), lambda j: "both"))
    for step in range(1, 200):
        latest.add(Event(step, 1, np.array([1]), lambda j: "one"))
    assert [event.since[0] for event in latest.of(0)] == [0]
    assert [event.since[0] for event in latest.of(1)] == list(range(200 - DEPTH, 200))
    assert len(latest.events) <= 65


@pytest.mark.parametrize(
    ("warps", "name"),
    [
        ((3,), "warp 3"),
        ((0, 1, 2), "warps 0-2"),
        ((4, 5, 6, 7), "warpgroup 1 (warps 4-7)"),
        ((0, 1, 2, 4), "warps 0-2, 4"),
        ((4, 5, 6, 7, 12, 13, 14, 15), "warpgroups 1, 3 (warps 4-7, 12-15)"),
        ((2, 3, 4, 5), "warps 2-5"),
    ],
)
def test_role_name(warps, name):
    assert role_name(warps) == name
