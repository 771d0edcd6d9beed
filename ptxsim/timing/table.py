"""Launches replayed whole, as the rows of a table."""

from __future__ import annotations

from .gpus import Gpu
from .occupancy import ctas_an_sm
from .replay import REASONS, Replay, TimedLaunch

BUSY = ("tensor", "issue", "shared", "mufu")
_SHOWN = 4  # reasons, the largest first


def replay_whole(launch: TimedLaunch, gpu: Gpu, most_sms: int, times: bool) -> tuple[Replay, str]:
    """A launch on as many SMs as it has CTAs, at most ``most_sms`` and at least one cluster's, and what they are
    called."""
    size = launch.cluster_size
    sms = max(min(launch.ctas, most_sms) // size, 1) * size
    residency = ctas_an_sm(launch)
    replay = launch.replay(gpu, sms, residency, times)
    beside = min(residency, -(-launch.ctas // sms))
    return replay, f"{sms} SM{'s' if sms > 1 else ''}" + (f", {beside} CTAs each" if beside > 1 else "")


def figures(launch: TimedLaunch, replay: Replay, gpu: Gpu) -> list[str]:
    """Cycles, µs, the share of cycles that an SM's parts were busy (mean), where the cycles of all warps went."""
    busy = [sum(part(sm) for sm in replay.sms) / len(replay.sms) / replay.cycles for part in _PARTS]
    spent = replay.reasons.sum(0)
    order = sorted(range(len(REASONS)), key=lambda n: -spent[n])[:_SHOWN]
    went = ", ".join(f"{REASONS[n]} {spent[n] / spent.sum():.0%}" for n in order if spent[n])
    return [f"{replay.cycles:,}", f"{replay.cycles / gpu.clock / 1e3:.1f}", *(f"{share:.0%}" for share in busy), went]


_PARTS = (
    lambda sm: sm.tensor + sm.pipes["mma_sync"],
    lambda sm: sm.instructions / 4,
    lambda sm: sm.shared,
    lambda sm: sm.pipes["mufu"],
)
