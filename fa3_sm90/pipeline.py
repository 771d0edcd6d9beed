"""Rings of shared-memory tiles, guarded by mbarriers: the loader fills a stage, the consumers read and release it."""

import cutlass.cute as cute
from cutlass import Int32, const_expr

from fa3_sm90.config import PipelineSpec


class Ring:
    """The mbarriers of one :class:`PipelineSpec`: ``full`` completes when a stage's bytes have arrived, ``empty`` when
    all consumer warps have released it. Both sides count tiles from 0 over the whole life of the CTA: tile ``count``
    lies in stage count % stages, and a barrier's phase is the parity of count // stages."""

    def __init__(self, spec: PipelineSpec, barriers: cute.Pointer):
        """``barriers``: 2·stages mbarriers in shared memory."""
        self.spec = spec
        self.full, self.empty = barriers, barriers + spec.stages

    def initialize(self):
        """By one thread, before a fence and a barrier of the CTA."""
        for stage in range(self.spec.stages):
            cute.arch.mbarrier_init(self.full + stage, 1)
            cute.arch.mbarrier_init(self.empty + stage, self.spec.consumer_warps)

    def stage(self, count: Int32):
        return 0 if const_expr(self.spec.stages == 1) else count & (self.spec.stages - 1)

    def phase(self, count: Int32) -> Int32:
        return (count >> (self.spec.stages.bit_length() - 1)) & 1

    def acquire(self, count: Int32) -> cute.Pointer:
        """Loader: wait until the stage is free, announce its bytes; returns the barrier for the copies."""
        stage = self.stage(count)
        cute.arch.mbarrier_wait(self.empty + stage, self.phase(count) ^ 1)
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive_and_expect_tx(self.full + stage, self.spec.stage_bytes)
        return self.full + stage

    def wait(self, count: Int32):
        """Consumer: wait until the tile is there."""
        cute.arch.mbarrier_wait(self.full + self.stage(count), self.phase(count))

    def release(self, count: Int32):
        """Consumer warp: this warp has read the tile."""
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive(self.empty + self.stage(count))


def rings(specs: tuple[PipelineSpec, ...], barriers: cute.Pointer) -> dict[str, Ring]:
    """The rings by name, their barriers one after the other."""
    made, first = {}, 0
    for spec in specs:
        made[spec.name] = Ring(spec, barriers + first)
        first += 2 * spec.stages
    return made


def barrier_count(specs: tuple[PipelineSpec, ...]) -> int:
    """mbarriers that all rings need."""
    return sum(2 * spec.stages for spec in specs)
