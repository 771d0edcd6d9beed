"""Providers of attention for sweeps on the CPU, with a made-up clock."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from cute_fa.semantics import reference
from perf.providers import Attention, Provider, Unavailable

if TYPE_CHECKING:
    from tests.testing.clock import FakeDevice


class Reference(Provider):
    """Right, differentiable, and as slow as it is told; ``wrong`` is added to the output."""

    def __init__(self, name: str, device: FakeDevice, milliseconds: float = 1.0, wrong: float = 0.0):
        self.name, self.device, self.milliseconds, self.wrong = name, device, milliseconds, wrong
        self.seen: list[torch.Tensor] = []

    def version(self) -> str:
        return f"{self.name} 1"

    def prepare(self, inputs) -> Attention:
        options = inputs.options()

        def forward(q, k, v):
            self.device.elapsed += self.milliseconds
            self.seen.append(q)
            out, _ = reference.attention(q, k, v, **options, dtype=torch.float32)
            return out.to(q.dtype) + self.wrong

        return Attention(forward)


class Absent(Provider):
    name = "absent"

    def version(self) -> str:
        raise Unavailable("no module named absent")

    def prepare(self, inputs) -> Attention:
        raise AssertionError("never asked")


class Failing(Provider):
    """Runs, and fails while it does; ``breaks``: with the whole device."""

    def __init__(self, device: FakeDevice, breaks: bool):
        self.name, self.device, self.breaks = "failing", device, breaks

    def version(self) -> str:
        return "1"

    def prepare(self, inputs) -> Attention:
        def forward(q, k, v):
            self.device.broken = self.breaks
            raise RuntimeError("an illegal memory access\nwas encountered")

        return Attention(forward)
