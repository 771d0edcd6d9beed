"""Rings of shared-memory tiles, guarded by mbarriers: the loader fills a stage, the consumers read and release it."""

from typing import NamedTuple, Optional

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32
from cutlass.cute.arch import inline_ptx

from cute_fa.device.pipeline_spec import PipelineSpec


class RingState(NamedTuple):
    """Where a side of a ring is: the stage of its next tile, and the parity of how often the ring has gone round."""

    stage: Int32
    phase: Int32


def ring_start() -> RingState:
    """The state of both sides at the start of a CTA."""
    return RingState(Int32(0), Int32(0))


def ring_next(state: RingState, stages: int) -> RingState:
    """The state after one more tile."""
    if stages == 2:
        return RingState(state.stage ^ 1, state.phase ^ state.stage)
    following = state.stage + 1
    if stages & (stages - 1):
        last = following == stages
        return RingState(cutlass.select_(last, 0, following), cutlass.select_(last, state.phase ^ 1, state.phase))
    return RingState(following & (stages - 1), state.phase ^ (following >> (stages.bit_length() - 1)))


def previous_stage(state: RingState, stages: int) -> Int32:
    """The stage of the tile before."""
    if stages & (stages - 1):
        return cutlass.select_(state.stage == 0, stages - 1, state.stage - 1)
    return state.stage ^ 1 if stages == 2 else (state.stage - 1) & (stages - 1)


class Ring:
    """The mbarriers of one :class:`PipelineSpec`: ``full`` completes when a stage's bytes have arrived, ``empty`` when
    all consumer warps have released it."""

    def __init__(self, spec: PipelineSpec, barriers: cute.Pointer, everywhere: Optional[Int32] = None):
        """``barriers``: 2·stages mbarriers in shared memory; ``everywhere``: where each lane finds those of one of the
        cluster's CTAs, see :func:`in_each_cta`."""
        self.spec = spec
        self.full, self.empty = barriers, barriers + spec.stages
        self.everywhere = everywhere

    def initialize(self):
        """By one thread, before a fence and a barrier of the CTA."""
        for stage in range(self.spec.stages):
            cute.arch.mbarrier_init(self.full + stage, self.spec.producer_warps + self.spec.copying_lanes)
            cute.arch.mbarrier_init(self.empty + stage, self.spec.consumer_warps)

    def acquire(self, state: RingState) -> cute.Pointer:
        """Loader: wait until the stage is free, announce its bytes; returns the barrier for the copies."""
        full = self.full + state.stage
        cute.arch.mbarrier_wait(self.empty + state.stage, state.phase ^ 1)
        self.expect(state.stage, self.spec.stage_bytes)
        return full

    def expect(self, stage: Int32, stage_bytes: int):
        """Loader: announce what the copies of a stage bring."""
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive_and_expect_tx(self.full + stage, stage_bytes)

    def wait_free(self, state: RingState):
        """Warp that writes a stage itself: wait until it is free."""
        cute.arch.mbarrier_wait(self.empty + state.stage, state.phase ^ 1)

    def publish(self, stage: Int32):
        """Warp that has written its part of a stage: hand it to consumers that read it by wgmma or TMA."""
        cute.arch.fence_proxy("async.shared", space="cta")
        self.signal(stage)

    def signal(self, stage: Int32):
        """Warp that has done its part of a stage: hand it to the consumers."""
        cute.arch.sync_warp()
        self._arrive(self.full + stage, cute.arch.lane_idx() == 0)

    def signal_behind_copies(self, stage: Int32):
        """Each of the copying lanes: hand its part of a stage to the consumers when its cp.async so far are done."""
        cute.arch.cp_async_mbarrier_arrive_noinc(self.full + stage)

    def wait(self, state: RingState):
        """Consumer: wait until the tile is there."""
        cute.arch.mbarrier_wait(self.full + state.stage, state.phase)

    def wait_released(self, state: RingState):
        """Producer: wait until the consumers have released the tile that the state is of."""
        cute.arch.mbarrier_wait(self.empty + state.stage, state.phase)

    def release(self, stage: Int32, if_true=True):
        """Consumer warp: this warp has read the tile in a stage, by wgmma where CTAs have the same tile.

        Then there is nothing to publish. With ``.release.cluster`` ptxas puts MEMBAR.ALL.GPU before the arrival.
        """
        ctas = self.spec.ctas
        leader = cute.arch.lane_idx() == 0 if ctas == 1 else cute.arch.lane_idx() < ctas
        if if_true is not True:
            leader = leader & if_true
        if ctas == 1:
            self._arrive(self.empty + stage, leader)
        else:
            place = self.everywhere + 8 * (self.spec.stages + stage)
            inline_ptx("mbarrier.arrive.shared::cluster.b64 _, [{$r0}];", read_only_args=[place], predicate=leader)

    def _arrive(self, barrier: cute.Pointer, leader: Boolean):
        """By the one lane for which ``leader`` holds."""
        if self.spec.shared:
            first = inline_ptx(
                "mapa.shared::cluster.u32 {$w0}, {$r0}, 0;", write_only_types=[Int32], read_only_args=[barrier.toint()]
            )
            inline_ptx(
                "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [{$r0}];",
                read_only_args=[first],
                predicate=leader,
            )
        else:
            inline_ptx("mbarrier.arrive.shared.b64 _, [{$r0}];", read_only_args=[barrier.toint()], predicate=leader)


def rings(specs: tuple[PipelineSpec, ...], barriers: cute.Pointer) -> dict[str, Ring]:
    """The rings by name, their barriers one after the other."""
    made, first = {}, 0
    ctas = max(spec.ctas for spec in specs)
    everywhere = None if ctas == 1 else in_each_cta(barriers, ctas)
    for spec in specs:
        there = None if spec.ctas == 1 else everywhere + 8 * first
        made[spec.name] = Ring(spec, barriers + first, there)
        first += 2 * spec.stages
    return made


def in_each_cta(place: cute.Pointer, ctas: int) -> Int32:
    """Address of the same place in shared memory of a cluster's CTA, for each lane another one's, by turns. Kept, an
    arrival takes about three instructions less than with the address computed there."""
    return inline_ptx(
        "mapa.shared::cluster.u32 {$w0}, {$r0}, {$r1};",
        write_only_types=[Int32],
        read_only_args=[place.toint(), cute.arch.lane_idx() % ctas],
    )


def barrier_count(specs: tuple[PipelineSpec, ...]) -> int:
    """mbarriers that all rings need."""
    return sum(2 * spec.stages for spec in specs)
