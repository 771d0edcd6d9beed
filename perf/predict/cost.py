"""What a tile costs as a function of its steps, from replays of a few tiles."""

from __future__ import annotations

from dataclasses import dataclass

from ptxsim.timing.gpus import Gpu
from ptxsim.timing.replay import Replay


@dataclass(frozen=True)
class ProbeResult:
    """A replayed probe: ``tiles`` tiles one after the other on each place, of ``steps`` steps each."""

    tiles: int
    steps: int
    replay: Replay

    @property
    def cycles(self) -> int:
        return self.replay.cycles


@dataclass(frozen=True)
class TileCost:
    """``first`` cycles once, then ``fixed + step · steps`` a tile; ``l2_bound``: the L2's rate allows no shorter step.
    ``probe``: the replay that the breakdown is taken from, ``before`` the shorter one."""

    first: float
    fixed: float
    step: float
    l2_bound: bool
    before: ProbeResult
    probe: ProbeResult

    def __call__(self, steps: int) -> float:
        return self.fixed + self.step * steps

    @classmethod
    def fit(cls, short: ProbeResult, long: ProbeResult, several: ProbeResult, gpu: Gpu, sms: int) -> TileCost:
        """From one tile of few and of many steps, and several tiles of many steps, on ``sms`` SMs."""
        span = long.steps - short.steps
        step = (long.cycles - short.cycles) / span
        # In the long run a step takes no less than its share of the L2's rate allows; a short replay lives on what had
        # been saved.
        loaded = (_loaded(long) - _loaded(short)) / span
        least = loaded / (gpu.bytes_per_cycle(gpu.l2) * sms / gpu.sms)
        tile = (several.cycles - long.cycles) / (several.tiles - long.tiles)
        fixed = tile - step * long.steps
        first = long.cycles - tile * long.tiles
        return cls(first, fixed, max(step, least), least > 0.97 * step, short, long)


def _loaded(result):
    return sum(sm.tma_bytes for sm in result.replay.sms)
