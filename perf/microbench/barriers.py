"""Hand-overs: by mbarriers within a CTA and between those of a cluster, by named barriers, by the cluster's barrier.

``try_wait``: a wait for a phase that is complete. ``arrive``: what an arrival in front of such a wait adds, the warp
being the only one. ``wake``: half of a round trip between two warpgroups, less ``arrive``. ``remote_arrive``: half of
one between two CTAs of a cluster, less ``wake``. ``bar``: half of a round trip by bar.sync and bar.arrive.
``cluster_barrier``: one arrival and wait of all warps of two CTAs.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
import torch
from cutlass import Boolean, Int32, Int64, const_expr
from cutlass.cute.arch import inline_ptx
from cutlass.memory import SmemAllocator

from cute_fa.device.fake_arguments import fake_vector
from cute_fa.semantics.types import SmArch
from perf.microbench.benchmark import (
    WARP,
    WARPGROUP,
    Measured,
    Row,
    Timed,
    TimedKernel,
    device,
    each,
    measured_each,
    repeat,
    run,
    slopes,
)

NAME = "barriers"
UNROLL = 8  # hand-overs in the timed loop's body; even, so that it begins with the same parity each time
_COUNTS = (16, 144)
# Threads of a CTA and CTAs of a cluster, by what is handed over how.
KINDS = {
    "wait": (WARP, 1),
    "arrive and wait": (WARP, 1),
    "mbarrier": (2 * WARPGROUP, 1),
    "named barrier": (2 * WARPGROUP, 1),
    "remote mbarrier": (WARP, 2),
    "cluster barrier": (WARPGROUP, 2),
}


@dataclass(frozen=True)
class HandOver(TimedKernel):
    """``kind``: one of ``KINDS``. In a round trip a side arrives and waits for the other, which waits and arrives."""

    kind: str

    @property
    def round_trip(self) -> bool:
        return self.kind in ("mbarrier", "named barrier", "remote mbarrier")

    @property
    def compile_name(self) -> str:
        return super().compile_name.replace(" ", "_")

    def build(self):
        stream = cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True)
        return HandOverKernel(self), (Arguments(Int32(0), fake_vector(Int64, 2)), stream)


class Arguments(NamedTuple):
    """``cycles``: of each CTA and warp."""

    count: Int32
    cycles: cute.Tensor


class HandOverKernel:
    """Device code of :class:`HandOver`."""

    def __init__(self, config: HandOver):
        self.config = config
        self.threads, self.cluster = KINDS[config.kind]

    @cute.jit
    def __call__(self, args: Arguments, stream):
        cluster = (self.cluster, 1, 1) if self.cluster > 1 else None
        self.kernel(args).launch(grid=(self.cluster, 1, 1), block=(self.threads, 1, 1), cluster=cluster, stream=stream)

    @cute.kernel
    def kernel(self, args: Arguments):
        """Both sides do the same, wait and arrive; the second has arrived once before. A lone wait is for the first
        phase."""
        thread, _, _ = cute.arch.thread_idx()
        cta, _, _ = cute.arch.block_idx()
        side = cta if const_expr(self.cluster > 1) else cute.arch.make_warp_uniform(thread // WARPGROUP)
        wait, arrive = self.sides(side, cute.arch.lane_idx() == 0)
        if const_expr(self.config.kind == "wait"):
            arrive()
        elif const_expr(self.config.round_trip):
            if side == 1:
                arrive()
        begin = cute.arch.clock64()
        for _ in cutlass.range(args.count, unroll=1):
            for i in cutlass.range_constexpr(UNROLL):
                if const_expr(self.config.kind == "arrive and wait"):
                    arrive()
                wait(0 if self.config.kind == "wait" else i % 2)
                if const_expr(self.config.round_trip):
                    arrive()
        end = cute.arch.clock64()
        if const_expr(self.config.round_trip):
            if side == 0:
                wait(0)
        if const_expr(self.cluster > 1):  # the other's shared memory is in use
            cute.arch.cluster_arrive()
            cute.arch.cluster_wait()
        cycles = args.cycles
        if thread % WARP == 0:
            cycles[cta, thread // WARP] = end - begin

    def sides(self, side: Int32, leader: Boolean):
        """How this side waits, given the parity of the phase, and how it arrives at the other."""
        kind = self.config.kind
        if kind == "named barrier":
            own, other = (cute.arch.make_warp_uniform(number) for number in (1 + side, 2 - side))
            return (
                lambda _: cute.arch.barrier(barrier_id=own, number_of_threads=self.threads),
                lambda: cute.arch.barrier_arrive(barrier_id=other, number_of_threads=self.threads),
            )
        if kind == "cluster barrier":

            def meet(_):
                cute.arch.cluster_arrive()
                cute.arch.cluster_wait()

            return meet, None
        barriers = SmemAllocator().allocate_array(Int64, 2)
        self.initialize(barriers)
        own = barriers + (side if kind == "mbarrier" else 0)
        address = cute.arch.make_warp_uniform(own.toint())
        other, name = address, "arrive.shared.b64"
        if kind == "mbarrier":
            other = cute.arch.make_warp_uniform((barriers + (1 - side)).toint())
        elif kind == "remote mbarrier":
            name = "arrive.shared::cluster.b64"
            other = inline_ptx(
                "mapa.shared::cluster.u32 {$w0}, {$r0}, {$r1};",
                write_only_types=[Int32],
                read_only_args=[address, 1 - side],
            )

        def wait(parity: int):
            pointer = cute.make_ptr(Int64, address, cute.AddressSpace.smem, assumed_align=8)
            cute.arch.mbarrier_wait(pointer, parity)

        def arrive():
            inline_ptx(f"mbarrier.{name} _, [{{$r0}}];", read_only_args=[other], predicate=leader)

        return wait, arrive

    @cute.jit
    def initialize(self, barriers: cute.Pointer):
        """Two mbarriers that expect an arrival of each warp of a side."""
        if cute.arch.thread_idx()[0] == 0:
            for i in cutlass.range_constexpr(2):
                cute.arch.mbarrier_init(barriers + i, min(self.threads, WARPGROUP) // WARP)
        cute.arch.mbarrier_init_fence()
        if const_expr(self.cluster > 1):
            cute.arch.cluster_arrive()
            cute.arch.cluster_wait()
        cute.arch.sync_threads()


def launch(config: HandOver, count: int) -> Timed:
    """``count`` turns of 8 hand-overs; a round trip is one of each side. There is no output."""
    threads, cluster = KINDS[config.kind]
    cycles = torch.zeros(cluster, threads // WARP, dtype=torch.int64, device=device())
    seconds = run(config, count, cycles)
    return Timed(cycles, cycles, seconds)


def hand_overs(arch: SmArch) -> list[HandOver]:
    """What is measured; before sm_90 there are named barriers alone."""
    return [HandOver(arch, kind) for kind in KINDS if arch.number >= 90 or kind == "named barrier"]


def measure(arch: SmArch) -> Iterator[Row]:
    for config in hand_overs(arch):
        yield from repeat(NAME, config, _COUNTS, lambda count, config=config: launch(config, count))


def constants(rows: list[Row]) -> dict[str, Measured]:
    def cycles(kind: str) -> list[float]:
        return [turn / UNROLL for turn in slopes(rows, kernel=NAME, kind=kind)]

    waits = cycles("wait")
    arrivals = each(lambda both, wait: both - wait, cycles("arrive and wait"), waits)
    wakes = each(lambda trip, arrive: trip / 2 - arrive, cycles("mbarrier"), arrivals)
    return measured_each(
        try_wait=waits,
        arrive=arrivals,
        wake=wakes,
        remote_arrive=each(lambda trip, wake: trip / 2 - wake, cycles("remote mbarrier"), wakes),
        bar=[trip / 2 for trip in cycles("named barrier")],
        cluster_barrier=cycles("cluster barrier"),
    )
