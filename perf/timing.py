"""Interleaved timing of several callables, and the ceilings of the machine measured the same way."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from perf.device import Call, Device
from perf.workload import Work

_WARM_UP_ROUNDS = 2
_PRODUCT_SIZES = (4096, 8192)
_COPY_BYTES = 2**30


@dataclass(frozen=True)
class Timing:
    """Milliseconds of each timed call, in the order of the calls."""

    samples: tuple[float, ...]

    def quantile(self, percent: float) -> float:
        return float(np.percentile(self.samples, percent))

    @property
    def median(self) -> float:
        return self.quantile(50)


@dataclass(frozen=True)
class Effort:
    """How long to time: as many rounds as the slowest callable has in ``budget_ms`` of device time, but no fewer than
    ``least`` and no more than ``most``."""

    budget_ms: float = 100.0
    least: int = 10
    most: int = 100

    def rounds(self, slowest_ms: float) -> int:
        return int(min(max(self.budget_ms / max(slowest_ms, 1e-6), self.least), self.most))


def time_interleaved(device: Device, calls: Mapping[str, Sequence[Call]], effort: Effort) -> dict[str, Timing]:
    """Time callables against each other; each comes with several calls of the same work on buffers of their own.

    Every round runs each callable once, on its next buffers, beginning with another one: whatever drifts (clocks,
    temperature) meets all of them, and none always follows the same other. Each buffer set runs once before, untimed.
    """
    for variants in calls.values():
        for call in variants:
            device.run(call)
    names = list(calls)
    samples: dict[str, list[float]] = {name: [] for name in names}

    def round_(number: int) -> dict[str, float]:
        shift = number % max(len(names), 1)
        order = names[shift:] + names[:shift]
        times = device.time([calls[name][number % len(calls[name])] for name in order])
        return dict(zip(order, times, strict=True))

    warm_up = [round_(number) for number in range(_WARM_UP_ROUNDS)]
    slowest = max(warm_up[-1].values(), default=0.0)
    for number in range(effort.rounds(slowest) if names else 0):
        for name, time in round_(number).items():
            samples[name].append(time)
    return {name: Timing(tuple(times)) for name, times in samples.items()}


class Roofline(NamedTuple):
    """The least time that the machine's ceilings allow, in ms, and which one sets it: "compute" or "memory"."""

    ms: float
    limit: str


@dataclass(frozen=True)
class Ceilings:
    """What the machine reached in this run: TFLOP/s of the best matrix product by dtype, GB/s of a copy, counting what
    it reads and what it writes."""

    tflops: Mapping[torch.dtype, float]
    gbps: float

    def roofline(self, work: Work, dtype: torch.dtype) -> Roofline:
        compute, memory = work.flops / self.tflops[dtype] / 1e9, work.bytes / self.gbps / 1e6
        return Roofline(compute, "compute") if compute >= memory else Roofline(memory, "memory")


def measure_ceilings(
    device: Device,
    dtypes: Iterable[torch.dtype],
    effort: Effort,
    sizes: Sequence[int] = _PRODUCT_SIZES,
    copy_bytes: int = _COPY_BYTES,
) -> Ceilings:
    """Measure square matrix products and a copy; call it in the run whose results are compared with them."""
    gbps = _copy_gbps(device, effort, min(copy_bytes, device.free_bytes() // 4))
    return Ceilings({dtype: max(_tflops(device, effort, dtype, size) for size in sizes) for dtype in dtypes}, gbps)


def _copy_gbps(device: Device, effort: Effort, nbytes: int) -> float:
    source = torch.ones(nbytes // 4, device=device.torch_device)
    target = torch.empty_like(source)
    copy = time_interleaved(device, {"copy": [lambda: target.copy_(source)]}, effort)["copy"]
    return 2 * source.nbytes / copy.median / 1e6


def _tflops(device: Device, effort: Effort, dtype: torch.dtype, size: int) -> float:
    # random elements: zeros would draw less power and let the GPU clock higher
    a, b = (torch.randn(size, size, device=device.torch_device).to(dtype) for _ in range(2))
    scale = torch.ones((), device=device.torch_device)

    def product() -> torch.Tensor:
        if dtype.itemsize > 1:
            return a @ b
        # fp8 products want the second operand column-major
        return torch._scaled_mm(a, b.t(), scale_a=scale, scale_b=scale, out_dtype=torch.bfloat16)

    timing = time_interleaved(device, {"product": [product]}, effort)["product"]
    return 2 * size**3 / timing.median / 1e9
