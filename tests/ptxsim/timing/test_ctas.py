"""CTAs that wait for room, several at once on an SM, clusters, parts of a launch, launches that cannot be replayed."""

from __future__ import annotations

import numpy as np
import pytest

from ptxsim.errors import SimError
from ptxsim.timing import replay
from ptxsim.timing.replay import REASONS, ReplayStuck
from tests.testing.timed import A100, H100, chains, timed

OUT = [np.zeros(1 << 14, np.float32)]
LATENCY = chains("ex2.approx.ftz.f32 {d}, {d};", 1, 32)
THROUGHPUT = chains("ex2.approx.ftz.f32 {d}, {d};", 16, 8)


def test_ctas_queue_on_an_sm():
    launch = timed(LATENCY, [], OUT, threads=128, grid=4)
    for wait in (600, 1000):
        times = launch.replay(H100.with_values(cta_start=wait)).cta_times
        assert times[0, 0] == 0 and (times[1:, 0] == times[:-1, 1] + 1 + wait).all()
        assert len(set((times[:, 1] - times[:, 0]).tolist())) == 1
    assert launch.replay(H100, sms=4).cycles == launch.only([2]).replay(H100).cycles == times[0, 1] + 1


def test_two_resident_ctas_hide_each_others_latency():
    """A dependent chain leaves the pipe free for the other CTA; a full pipe does not."""
    chain, full = (timed(body, [], OUT, threads=128, grid=2) for body in (LATENCY, THROUGHPUT))
    for launch, factor in ((chain, 1), (full, 2)):
        one = launch.only([0]).replay(H100)
        two = launch.replay(H100, residency=2)
        assert (two.cta_times[:, 0] == 0).all()
        busy = 16 * 8 * 8 if launch is full else 0
        assert two.cycles == pytest.approx(one.cycles + (factor - 1) * busy, abs=80)


def test_the_next_cta_takes_the_place_that_is_free():
    """Five CTAs on two SMs with two places each: four at once, on both SMs, then the fifth."""
    launch = timed(LATENCY, [], OUT, threads=128, grid=5)
    found = launch.replay(H100, sms=2, residency=2)
    assert (found.cta_times[:4, 0] == 0).all() and found.cta_times[4, 0] == found.cta_times[
        :4, 1
    ].min() + 1 + H100.cta_start
    assert [sm.instructions for sm in launch.only([0, 1]).replay(H100, sms=2, residency=2).sms] == [
        4 * len(launch.rows) // 20] * 2  # fmt: skip


def test_warps_of_several_ctas_share_the_quarters():
    """Four CTAs of one warp have a quarter each: as long as one alone, though each fills a pipe."""
    launch = timed(THROUGHPUT, [], OUT, threads=32, grid=8)
    one, four, eight = (launch.only(range(n)).replay(H100, residency=8).cycles for n in (1, 4, 8))
    assert one == pytest.approx(four, abs=10) and eight == pytest.approx(four + 16 * 8 * 8, abs=80)


def test_ctas_may_end_early():
    """CTAs of different length, and warps that end before the others of their CTA."""
    body = "setp.ge.u32 %p1, %c, 2; @%p1 exit; setp.ge.u32 %p2, %t, 64; @%p2 exit;" + LATENCY
    launch = timed(body, [], OUT, threads=128, grid=4)
    found = launch.replay(H100, sms=4)
    lengths = found.cta_times[:, 1] - found.cta_times[:, 0]
    assert lengths[0] == lengths[1] > lengths[2] + 500 and lengths[2] == lengths[3]
    assert found.ends[0] > found.ends[2] + 500


def test_every_cycle_of_a_warp_has_a_reason():
    """From the start of its CTA to its own end."""
    body = LATENCY + "bar.sync 0;" + "setp.ge.u32 %p1, %t, 64; @%p1 exit;" + LATENCY.replace("0f3E0000", "0f3D0000")
    launch = timed(body, [], OUT, threads=128, grid=3)
    found = launch.replay(H100, sms=1)
    starts = np.repeat(found.cta_times[:, 0], 4)
    waited_before = np.where(starts > 0, H100.cta_start, 0)  # counted as stall counts
    assert (found.reasons.sum(1) == found.ends - starts + 1 + waited_before).all()
    assert found.reasons.shape == (12, len(REASONS))


def test_a_cluster_of_four_and_parts_of_a_launch():
    body = f"barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned; {LATENCY}"
    launch = timed(body, [], OUT, threads=64, grid=8, cluster=4)
    whole = launch.replay(H100, sms=8)
    assert whole.cycles == launch.only(range(4, 8)).replay(H100, sms=4).cycles
    after = launch.replay(H100, sms=4).cta_times  # the second cluster begins when the first has ended
    assert (after[4:, 0] == after[:4, 1].max() + 1 + H100.cta_start).all()
    for ctas in ([0, 1], [4, 5, 6, 8], [1, 2, 3, 4], [], [0, 1, 2, 3, 0, 1, 2, 3], [8, 9, 10, 11]):
        with pytest.raises(SimError, match=r"clusters of 4|each once"):
            launch.only(ctas)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(sms=0), "0 SMs"),
        (dict(sms=3), "clusters of 2"),
        (dict(sms=134), "at most the 132 SMs"),
        (dict(sms=2, residency=0), "0 CTAs"),
        (dict(sms=2, residency=9), "an SM holds 64 warps"),
    ],
)
def test_what_cannot_be_replayed(options, message):
    launch = timed("bar.sync 0;", [], OUT, threads=256, grid=2, cluster=2)
    with pytest.raises(SimError, match=message):
        launch.replay(H100, **options)


def test_another_gpus_machine_code():
    with pytest.raises(SimError, match=r"A100 .*does not run machine code of sm_90"):
        timed("bar.sync 0;", [], OUT).replay(A100)
    with pytest.raises(SimError, match="wgmma_queue = 1000 of H100"):
        timed("bar.sync 0;", [], OUT).replay(H100.with_values(wgmma_queue=1000))


def test_skipped_cycles_change_nothing(tmp_path, monkeypatch):
    """The engine against itself, looking at every cycle of every SM and asking every warp."""
    text = replay.SOURCE.read_text()
    patient = tmp_path / "engine.c"
    for skips, does_not in (
        ("if (next < sm->wake) sm->wake = next;", "sm->wake = now + 1;"),
        ("if (w->until > now && w->until < NEVER) {", "if (0) {"),
    ):
        assert skips in text
        text = text.replace(skips, does_not)
    patient.write_text(text)
    cluster = "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;"
    launch = timed(cluster + THROUGHPUT + cluster + "bar.sync 0;", [], OUT, threads=128, grid=12, cluster=2)
    gpus = [H100, H100.rival("slots", 128), H100.with_values(cluster_barrier=0, bar=0), H100.sample(1), H100.sample(2)]
    options = [dict(sms=2), dict(sms=4, residency=2)]
    found = []
    for source in (replay.SOURCE, patient):
        monkeypatch.setattr(replay, "SOURCE", source)
        replay._engine.cache_clear()
        found.append([launch.replay(gpu, times=True, **some) for gpu in gpus for some in options])
    replay._engine.cache_clear()
    for a, b in zip(*found, strict=True):
        assert (
            a.cycles == b.cycles and a.sms == b.sms and (a.reasons == b.reasons).all() and (a.issued == b.issued).all()
        )


def test_a_barrier_that_never_completes():
    """What is recorded completes; here the count is damaged."""
    launch = timed("bar.sync 0;" + LATENCY, [], OUT, threads=64)
    launch.rows[launch.rows[:, 1] == replay.BAR_SYNC, 3] = 3
    with pytest.raises(ReplayStuck, match=r"warps wait for ever: CTA 0 warp 0 at .*; CTA 0 warp 1 at "):
        launch.replay(H100)


def test_the_limit_of_cycles(monkeypatch):
    monkeypatch.setattr(replay, "MOST_CYCLES", 500)
    with pytest.raises(ReplayStuck, match="more than 500 cycles"):
        timed(LATENCY, [], OUT).replay(H100)
