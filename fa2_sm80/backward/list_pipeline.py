"""The pipeline of a tile of keys over the query blocks that a range plan lists."""

import cutlass
import cutlass.cute as cute
from cutlass import Int32, const_expr

from fa2_sm80.backward.query_pipeline import QueryPipeline
from fa2_sm80.common.copies import block_offset


class ListPipeline(QueryPipeline):
    """Blocks come in any order, so that ``sources`` are where a head's first block lies, and each step adds its own.
    Strides of blocks, below 2^31 bytes, are not kept in registers, as loaders do elsewhere: this kernel has none to
    spare."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.block_strides = tuple(map(Int32, self.block_strides))

    @cute.jit
    def prologue(self, load_keys):
        """The first step's copies, and the tile's keys with them; none of a tile without queries."""
        self.next_stage[0] = Int32(0)
        for i in cutlass.range_constexpr(3):
            self.sources[i] = self.starts[i]
        if self.blocks.total > 0:
            load_keys()
            self._load_block(Int32(0), True)
        cute.arch.cp_async_commit_group()

    @cute.jit
    def _issue_next(self, head: Int32, iteration: Int32):
        load, sources, blocks = self._load_block, self.sources, self.blocks
        if iteration + 1 < blocks.total:
            load(iteration + 1, False)
        elif head + 1 < self.heads:
            for i in cutlass.range_constexpr(3):
                sources[i] = sources[i] + self.head_strides[i]
            load(Int32(0), True)
        cute.arch.cp_async_commit_group()

    @cute.jit
    def _load_block(self, iteration: Int32, may_be_last: cutlass.Constexpr[bool]):
        """Only the first block of a list can reach beyond the queries."""
        block = self.blocks.block(iteration)
        rows_left = None
        if const_expr(may_be_last):
            rows_left = self.seqlen_q - block * self.tile_m
        stage = 0 if const_expr(self.stages == 1) else self.next_stage[0]
        loads = (self.load_q, self.load_dout)
        q, dout, stats = (self.sources[i] + block_offset(block, self.block_strides[i]) for i in range(3))
        for load, source in zip(loads, (q, dout), strict=True):
            load(source, stage, rows_left)
        self.load_stats(stats, stage)
