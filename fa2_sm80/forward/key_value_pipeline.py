"""The cp.async pipeline that brings K and V blocks into shared memory."""

import cutlass
import cutlass.cute as cute
from cutlass import Int32, const_expr

from cute_fa.device.block_range import BlockRange
from cute_fa.device.visibility import Window
from fa2_sm80.common.block_ring import stage_of
from fa2_sm80.common.copies import TileLoader


class KeyValuePipeline:
    """cp.async groups in the order K0, V0, K1, V1 …: one group a tile, empty beyond the last block, so that waiting
    for all but the newest 2·(stages − 1) groups always means the tile in question.

    V of iteration i − 1 + stages is issued once all warps are past P·V of i − 1, K of i + stages once they are past
    Q·Kᵀ of i: with one stage V loads behind Q·Kᵀ and the next K behind the softmax and P·V.
    """

    def __init__(
        self,
        stages: int,
        load_k: TileLoader,
        load_v: TileLoader,
        blocks: BlockRange,
        window: Window,
        seqlen_k: Int32,
        tile_n: int,
    ):
        self.stages = stages
        self.load_k, self.load_v = load_k.load, load_v.load
        self.blocks, self.window = blocks, window
        self.seqlen_k, self.tile_n = seqlen_k, tile_n

    def stage(self, iteration: Int32):
        return stage_of(iteration, self.stages)

    @cute.jit
    def prologue(self):
        """Q's copies join the first group."""
        for i in cutlass.range_constexpr(self.stages):
            self._issue(self.load_k, Int32(i), i == 0)
            if const_expr(i < self.stages - 1):
                self._issue(self.load_v, Int32(i), i == 0)

    @cute.jit
    def wait_k(self, iteration: Int32, first: cutlass.Constexpr[bool]):
        """K of this iteration is in shared memory; start the V that takes the place of the previous one."""
        self._wait()
        self._issue(self.load_v, iteration + self.stages - 1, first and self.stages == 1)

    @cute.jit
    def wait_v(self, iteration: Int32):
        """V of this iteration is in shared memory; start the K that takes the place of this one."""
        self._wait()
        self._issue(self.load_k, iteration + self.stages, False)

    def _wait(self):
        cute.arch.cp_async_wait_group(2 * (self.stages - 1))
        cute.arch.sync_threads()

    @cute.jit
    def _issue(self, load, iteration: Int32, may_be_first: cutlass.Constexpr[bool]):
        """Only block 0 of the order can reach beyond seqlen_k: the other copies need no bound check."""
        block, stage = self.blocks.block(iteration, self.window), self.stage(iteration)
        rows_left = self.seqlen_k - block * self.tile_n if const_expr(may_be_first) else None
        if iteration < self.blocks.total:
            load(block, stage, rows_left)
        cute.arch.cp_async_commit_group()
