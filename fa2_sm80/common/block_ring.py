"""A ring of key blocks in shared memory, filled by cp.async."""

from abc import ABC, abstractmethod

import cutlass
import cutlass.cute as cute
from cutlass import Int32, const_expr

from cute_fa.device.block_range import BlockRange
from cute_fa.device.visibility import Window


def stage_of(iteration: Int32, stages: int):
    """Stage of an iteration ≥ 0; of two or four without the three instructions that a remainder of any sign takes."""
    if stages == 1:
        return 0
    return iteration & (stages - 1) if stages in (2, 4) else iteration % stages


class BlockRing(ABC):
    """``stages`` steps in flight, K and V of one in one cp.async group; the next step is issued as soon as its stage is
    free."""

    def __init__(self, stages: int, blocks: BlockRange, window: Window, stop: Int32):
        """``stop``: the iteration after the last."""
        self.stages, self.blocks, self.window, self.stop = stages, blocks, window, stop

    @abstractmethod
    def load(self, block: Int32, stage: Int32, first: bool):
        """Issue the copies of one key block; ``first``: whether it may be that of the first step."""

    def stage(self, iteration: Int32):
        return stage_of(iteration, self.stages)

    @cute.jit
    def prologue(self, start: Int32):
        """The first steps, one fewer than there are stages, or the only one; copies issued before join the first."""
        for i in cutlass.range_constexpr(max(self.stages - 1, 1)):
            self._issue(start + i, i == 0)

    @cute.jit
    def wait(self, iteration: Int32):
        """This step's K and V are in shared memory, and the previous step is over for all warps."""
        cute.arch.cp_async_wait_group(max(self.stages - 2, 0))
        cute.arch.sync_threads()
        if const_expr(self.stages > 1):
            self._issue(iteration + self.stages - 1, False)

    @cute.jit
    def release(self, iteration: Int32):
        """With one stage: once all warps are done with it, the next step takes its place."""
        if const_expr(self.stages == 1):
            cute.arch.sync_threads()
            self._issue(iteration + 1, False)

    @cute.jit
    def _issue(self, iteration: Int32, first: cutlass.Constexpr[bool]):
        load = self.load
        if iteration < self.stop:
            load(self.blocks.block(iteration, self.window), self.stage(iteration), first)
        cute.arch.cp_async_commit_group()
