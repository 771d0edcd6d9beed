"""A machine for sweeps on the CPU: calls really run, and the clock is made up."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cute_fa.semantics.types import SmArch
from perf.device import Clocks

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


class FakeDevice:
    """Calls take as long as they add to ``elapsed`` themselves, else as ``duration`` says of the call and of how many
    were timed before.

    ``log`` has every call in order: ("run", call) and ("time", [calls])."""

    torch_device = "cpu"
    arch = SmArch.SM_90A
    l2_bytes = 2**20

    def __init__(self, duration: Callable[[Any, int], float] = lambda call, number: 1.0, gpu: str = "Fake H100"):
        self.duration = duration
        self.gpu = gpu
        self.log: list[tuple[str, Any]] = []
        self.notes: list[str] = []
        self.broken = False
        self.elapsed = 0.0
        self._timed = 0

    def columns(self) -> dict[str, Any]:
        return {"gpu": self.gpu, "arch": self.arch.value, "driver": None, "cuda": "13.0", "torch": "2.13.0"}

    def clocks(self) -> Clocks:
        return Clocks(1980 - len(self.log), 2619, 350.5, 40)

    def free_bytes(self) -> int:
        return 2**24

    def run(self, call) -> None:
        self.log.append(("run", call))
        call()

    def time(self, calls: Sequence[Any]) -> list[float]:
        self.log.append(("time", list(calls)))
        times = []
        for call in calls:
            self.elapsed = 0.0
            call()
            times.append(self.elapsed or self.duration(call, self._timed))
            self._timed += 1
        return times

    def alive(self) -> bool:
        return not self.broken
