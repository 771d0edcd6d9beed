"""When wgmma are issued: bursts of them with the clock read in front of the first and behind each.

Issuing is fast until as many wait as a warpgroup's queue holds, and then goes at the pace of the tensor cores: the last
of 16, issued t cycles after the start at a pace of d cycles, has ``wgmma_queue`` = 15 − t / d before it in the queue.
Of two warpgroups that begin together the same figure, and when each is done, are notes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
import torch
from cutlass import BFloat16, Float32, Int64
from cutlass.cute.nvgpu import warpgroup
from cutlass.memory import SmemAllocator

from cute_fa.device.fake_arguments import fake_tensor
from cute_fa.semantics.types import DType, SmArch
from perf.microbench.benchmark import (
    REPETITIONS,
    WARPGROUP,
    Measured,
    Row,
    Timed,
    TimedKernel,
    measured_each,
    note,
    picked,
    run,
)
from perf.microbench.products import M, Product, columns, operands, smem_bytes

NAME = "issue"
LENGTH = 16  # of a burst
_STEADY = 8  # its last ones, which go at the pace of the tensor cores


@dataclass(frozen=True)
class Burst(TimedKernel):
    """16 wgmma m64nNk16 into one accumulator, of each of ``warpgroups``, which begin together."""

    n: int
    warpgroups: int = 1

    def build(self):
        stream = cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True)
        inputs = (fake_tensor(BFloat16, rows, columns(DType.BF16), aligned=8) for rows in (M, self.n))
        issued, out = fake_tensor(Int64, self.warpgroups, LENGTH + 2), fake_tensor(Float32, self.warpgroups, M, self.n)
        return BurstKernel(self), (Arguments(issued, *inputs, out), stream)


class Arguments(NamedTuple):
    """``issued`` (warpgroups, 18): the clock of the first warp before the first wgmma, behind each, and behind the wait
    for all."""

    issued: cute.Tensor
    a: cute.Tensor
    b: cute.Tensor
    out: cute.Tensor


class BurstKernel:
    """Device code of :class:`Burst`."""

    def __init__(self, config: Burst):
        self.config = config

    @cute.jit
    def __call__(self, args: Arguments, stream):
        c = self.config
        threads = WARPGROUP * c.warpgroups
        self.kernel(args).launch(grid=(1, 1, 1), block=(threads, 1, 1), smem=smem_bytes(c.n), stream=stream)

    @cute.kernel
    def kernel(self, args: Arguments):
        c = self.config
        thread, _, _ = cute.arch.thread_idx()
        index = cute.arch.make_warp_uniform(thread // WARPGROUP)
        product = Product(DType.BF16, c.n, False, SmemAllocator())
        product.fill(args.a, args.b, thread, WARPGROUP * c.warpgroups)
        product.begin(thread % WARPGROUP)
        cute.arch.sync_threads()
        warpgroup.fence()
        clocks = [cute.arch.clock64()]
        for step in cutlass.range_constexpr(LENGTH):
            product.issue(step)
            clocks.append(cute.arch.clock64())
        warpgroup.commit_group()
        warpgroup.wait_group(0)
        clocks.append(cute.arch.clock64())
        product.store(args.out[index, None, None])
        issued = args.issued
        if thread % WARPGROUP == 0:
            for i in cutlass.range_constexpr(LENGTH + 2):
                issued[index, i] = clocks[i]


def launch(config: Burst, a: torch.Tensor, b: torch.Tensor) -> Timed:
    """One burst of each warpgroup with A (64, 64) and B (n, 64). ``cycles`` (warpgroups, 18): of the readings, from the
    first of all on; the output is (warpgroups, 64, n)."""
    issued = torch.zeros(config.warpgroups, LENGTH + 2, dtype=torch.int64, device=a.device)
    out = torch.zeros(config.warpgroups, M, config.n, device=a.device)
    seconds = run(config, issued, a, b, out)
    return Timed(issued - issued[0, 0], out, seconds)


def bursts(arch: SmArch) -> list[Burst]:
    """What is measured."""
    return [Burst(arch, n, warpgroups) for n in (64, 128, 256) for warpgroups in (1, 2)]


def measure(arch: SmArch) -> Iterator[Row]:
    for burst in bursts(arch):
        a, b = operands(DType.BF16, burst.n)
        launch(burst, a, b)  # loads the kernel
        rows = []
        for repetition in range(REPETITIONS):
            issued = launch(burst, a, b).cycles.tolist()
            rows.append({"kernel": NAME, **burst.parameters(), "repetition": repetition, "issued": issued})
            yield rows[-1]
        yield note(NAME, _remark(burst, rows))


def depth(issued: list[int]) -> float:
    """How many wgmma wait when the last is issued, from a warpgroup's readings."""
    behind = issued[1 : LENGTH + 1]
    pace = (behind[-1] - behind[-1 - _STEADY]) / _STEADY
    # a simulation issues all at once
    return LENGTH - 1 - ((behind[-1] - issued[0]) / pace if pace else 0)


def _remark(burst: Burst, rows: list[Row]) -> str:
    """What is seen beside the constant."""
    depths = [round(median(depth(row["issued"][i]) for row in rows), 1) for i in range(burst.warpgroups)]
    ends = [median(row["issued"][i][-1] for row in rows) for i in range(burst.warpgroups)]
    return f"wgmma n{burst.n}: {burst.warpgroups} warpgroups, in the queue {depths}, done after {ends} cycles"


def constants(rows: list[Row]) -> dict[str, Measured]:
    found = picked(rows, kernel=NAME, n=128, warpgroups=1)
    return measured_each(wgmma_queue=[float(round(depth(row["issued"][0]))) for row in found])
