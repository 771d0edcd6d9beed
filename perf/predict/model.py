"""A predicted time, with its spread over what is not known of the GPU, and what binds it."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from cute_fa.semantics.types import Direction
from perf.predict.chains import chained_makespan, turns_of
from perf.predict.cost import ProbeResult, TileCost
from perf.predict.kernels import Kernel, probe_steps
from perf.predict.store import kept
from perf.predict.tiles import makespan, ordered_steps
from ptxsim.timing.gpus import Gpu
from ptxsim.timing.occupancy import ctas_an_sm
from ptxsim.timing.replay import REASONS, TimedLaunch
from ptxsim.timing.timeline import Timeline

FEWEST_KERNELS = 3  # of a backward: before the main one, it, and after it


@dataclass(frozen=True)
class Sample:
    """One prediction with one set of constants: seconds, and the shares of time that parts of the GPU are busy, or that
    the wait for turns takes."""

    seconds: float
    busy: dict[str, float]
    tail: float
    l2_bound: bool
    cost: TileCost


@dataclass(frozen=True)
class Prediction:
    """Mean and standard deviation over an ensemble of constants; TFLOP/s as FlashAttention counts them."""

    milliseconds: float
    milliseconds_spread: float
    tflops: float
    tflops_spread: float
    bound: str
    busy: dict[str, float]
    waits: dict[str, float] = field(default_factory=dict)


class Predictor:
    """A kernel's probes, simulated once, to be replayed with any constants."""

    def __init__(self, kernel: Kernel, cubin: Path | None = None):
        """``cubin``: a file with the machine code that the kernel has to have (``assembler.CodeDiffers`` otherwise)."""
        self.kernel = kernel
        self.cubin = None if cubin is None else cubin.read_bytes()
        self.plan = probe_steps(kernel)
        first = self._probe(*self.plan[0])
        self.residency = 1 if kernel.shape.persistent else ctas_an_sm(first)
        self.launches = [self._probe(tiles * self.residency, steps) for tiles, steps in self.plan]
        self.others = [Predictor(other, cubin) for other in kernel.others]

    @property
    def spills(self) -> int:
        """Accesses to local memory in the kernel's code."""
        own = sum(i.opcode in ("LDL", "STL") for i in self.launches[0].code.instructions)
        return own + sum(other.spills for other in self.others)

    def of(self, kernel: Kernel) -> Predictor:
        """The same probes for another workload of the kernel."""
        other = copy.copy(self)
        other.kernel = kernel
        other.others = [part.of(k) for part, k in zip(self.others, kernel.others, strict=True)]
        return other

    def _probe(self, tiles: int, steps: int) -> TimedLaunch:
        identity = (*self.kernel.identity, tiles, steps, self.cubin)
        return kept(identity, lambda: self.kernel.probe(tiles, steps, self.cubin))

    def trace(self, gpu: Gpu, file: Path) -> None:
        """Write a timeline of a tile of many steps for Perfetto."""
        launch, timeline = self.launches[1], Timeline(file)
        timeline.add(launch, launch.replay(gpu, self.kernel.shape.cluster, self.residency, times=True))
        timeline.write()

    def sample(self, gpu: Gpu) -> Sample:
        """The prediction with these constants, of all that a call launches."""
        parts = [self._alone(gpu), *(other._alone(gpu) for other in self.others)]
        workload = self.kernel.workload
        seconds = sum(part.seconds for part in parts)
        beside = gpu.kernel_start * 1e-6
        if workload.direction is Direction.BACKWARD:
            beside += _beside_backward(workload, gpu, bool(self.others))

        def mean(figure: Callable[[Sample], float]) -> float:
            return sum(figure(part) * part.seconds for part in parts) / seconds

        busy = {name: mean(lambda part, name=name: part.busy[name]) for name in parts[0].busy}
        busy["hbm"] *= seconds / (seconds + beside)
        l2_bound = mean(lambda part: part.l2_bound) > 0.5
        return Sample(seconds + beside, busy, mean(lambda part: part.tail), l2_bound, parts[0].cost)

    def _alone(self, gpu: Gpu) -> Sample:
        """Of the kernel alone, without its start."""
        shape, workload = self.kernel.shape, self.kernel.workload
        results = [
            ProbeResult(tiles, steps, launch.replay(gpu, shape.cluster, self.residency))
            for (tiles, steps), launch in zip(self.plan, self.launches, strict=True)
        ]
        cost = TileCost.fit(*results, gpu, shape.cluster)
        slots, l2_bytes = int(gpu.sms) // shape.cluster * self.residency, int(gpu.l2_size * 2**20)
        if workload.deterministic:
            chain = self.kernel.chain(l2_bytes)
            steps = [tile.heads * tile.steps for tile in chain]
        else:
            steps = ordered_steps(shape, workload, l2_bytes)
        # cta_start is part of what a further tile costs in a probe
        cycles = free = cost.first + makespan(shape, steps, cost, slots, 0.0)
        if workload.deterministic:
            alone = self.launches[1].replay(gpu, shape.cluster, self.residency, times=True)
            turns = turns_of(self.launches[1], alone, gpu, cost.step)
            cycles = cost.first + chained_makespan(chain, cost, slots, turns)
        even = cost.first + sum(map(cost, steps)) / min(slots, len(steps))
        seconds = cycles / (gpu.clock * 1e9)
        memory = workload.work.bytes / (gpu.hbm * 1e12)
        total = max(seconds, memory)
        busy = _busy(results[0], results[1], gpu)
        busy["hbm"] = memory / total
        if workload.deterministic:
            busy["turns"] = 1 - free / cycles
        return Sample(total, busy, 1 - even / cycles, cost.l2_bound, cost)

    def predict(self, gpu: Gpu, ensemble: int = 12) -> Prediction:
        """Over the GPU's constants as they are and ``ensemble`` − 1 draws of those that have a spread."""
        samples = [self.sample(gpu if seed == 0 else gpu.sample(seed)) for seed in range(ensemble)]
        flops = self.kernel.workload.work.flops
        times = [1e3 * s.seconds for s in samples]
        rates = [flops / s.seconds / 1e12 for s in samples]
        busy = {name: statistics.mean(s.busy[name] for s in samples) for name in samples[0].busy}
        tail = statistics.mean(s.tail for s in samples)
        bound = _bound(busy, tail, statistics.mean(s.l2_bound for s in samples))
        return Prediction(statistics.mean(times), statistics.pstdev(times), statistics.mean(rates),
                          statistics.pstdev(rates), bound, {**busy, "tail": tail}, _waits(samples[0].cost))  # fmt: skip


def _beside_backward(workload, gpu, dq_alone):
    """Seconds of a backward's other kernels: they read O and dO and, unless dQ has a kernel of its own, clear dQ's
    accumulator, and convert it."""
    elements = workload.tokens * workload.heads * workload.head_dim
    moved = elements * (2 * workload.dtype.bytes + (0 if dq_alone else 4 + 4 + workload.dtype.bytes))
    return moved / (gpu.hbm * 1e12) + (FEWEST_KERNELS - 1) * gpu.kernel_start * 1e-6 / 2


def _busy(short: ProbeResult, long: ProbeResult, gpu: Gpu) -> dict[str, float]:
    """Shares of the cycles in which parts of an SM are busy in the steady state: between the two probes."""
    cycles = max(long.cycles - short.cycles, 1)
    a, b = short.replay.sms[0], long.replay.sms[0]
    busy = {"tensor": b.tensor - a.tensor, "shared memory": b.shared - a.shared,
            "issue": (b.instructions - a.instructions) / 4}  # fmt: skip
    busy |= {name: b.pipes[name] - a.pipes[name] for name in ("mufu", "alu", "fma", "imad", "convert", "mma_sync")}
    loaded = sum(sm.tma_bytes for sm in long.replay.sms) - sum(sm.tma_bytes for sm in short.replay.sms)
    busy["l2"] = loaded / len(long.replay.sms) / (gpu.bytes_per_cycle(gpu.l2) / gpu.sms)
    return {name: value / cycles for name, value in busy.items()}


def _bound(busy: dict[str, float], tail: float, l2: float) -> str:
    """What binds: the wait for turns if it takes 15 % of the time, else a part that is busy 85 % of it, else the tail
    if it takes 15 %, else latency."""
    if busy.get("turns", 0) >= 0.15:
        return "turns"
    if l2 > 0.5:
        return "l2"
    name = max(busy, key=lambda part: busy[part])
    if busy[name] >= 0.85:
        return name
    return "tail" if tail >= 0.15 else "latency"


def _waits(cost: TileCost) -> dict[str, float]:
    """Where the cycles of the warps that compute go: shares, of the warps that issue most."""
    reasons = cost.probe.replay.reasons
    most = reasons[:, 0] > 0.5 * reasons[:, 0].max()
    total = reasons[most].sum(0)
    return {name: float(x) for name, x in zip(REASONS, total / np.sum(total), strict=True)}
