"""The cp.async pipeline that brings Q, dO and their statistics to a tile of keys, over all query heads of its kv head."""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, const_expr

from cute_fa.device.query_range import QueryRange
from fa2_sm80.copies import ELEMENT_BYTES, TileLoader, copy_async


class StatsLoader:
    """cp.async of the (LSE, D) pairs of one tile of queries: 8 bytes a query."""

    def __init__(self, stats: cute.Tensor, first_tile: Int32, smem: cute.Pointer, tile_m: int, tidx: Int32):
        """``stats`` (tiles, heads, 2 · tile_m) from the sequence's ``first_tile`` and the first head on."""
        self.tidx, self.threads, self.bytes = tidx, tile_m // 2, 8 * tile_m
        self.tile_bytes = Int64(stats.stride[0]) * 4
        self.source = stats.iterator.toint() + Int64(first_tile) * self.tile_bytes + tidx * 16
        self.target = smem.toint() + tidx * 16

    @cute.jit
    def load(self, block: Int32, stage: Int32, offset: Int64):
        if self.tidx < self.threads:
            copy_async(self.target + stage * self.bytes, 0, self.source + self.tile_bytes * block + offset, 0, None)


class HeadStrides(NamedTuple):
    """Bytes from one query head to the next."""

    q: Int64
    dout: Int64
    stats: Int64


def head_strides(q: cute.Tensor, dout: cute.Tensor, stats: cute.Tensor) -> HeadStrides:
    """Of the kernel's own arguments: the heads are the last dimension but one, of the stats the second."""
    return HeadStrides(
        Int64(q.stride[-2]) * ELEMENT_BYTES, Int64(dout.stride[-2]) * ELEMENT_BYTES, Int64(stats.stride[1]) * 4
    )


class QueryPipeline:
    """One cp.async group a step: Q, dO and the statistics of one query block of one head. Step ``iteration`` of head
    ``head`` is number head · total + iteration; the next step is issued as soon as its stage is free."""

    def __init__(
        self,
        stages: int,
        load_q: TileLoader,
        load_dout: TileLoader,
        load_stats: StatsLoader,
        strides: HeadStrides,
        blocks: QueryRange,
        heads: Int32,
        seqlen_q: Int32,
        tile_m: int,
    ):
        """``heads``: query heads of the kv head; the loaders begin at the first of them."""
        self.stages, self.tile_m = stages, tile_m
        self.load_q, self.load_dout, self.load_stats = load_q.load, load_dout.load, load_stats.load
        self.strides, self.blocks, self.heads, self.seqlen_q = strides, blocks, heads, seqlen_q

    def stage(self, step: Int32):
        return 0 if const_expr(self.stages == 1) else step % self.stages

    @cute.jit
    def prologue(self):
        """The first step's copies."""
        if self.blocks.total > 0:
            self._load(Int32(0), Int32(0), self.stage(Int32(0)), True)
        cute.arch.cp_async_commit_group()

    @cute.jit
    def wait(self, head: Int32, iteration: Int32):
        """This step's tiles are in shared memory and the previous step is over for all warps; with more than one stage
        the next step's copies are issued."""
        cute.arch.cp_async_wait_group(0)
        cute.arch.sync_threads()
        if const_expr(self.stages > 1):
            self._issue_next(head, iteration)

    @cute.jit
    def release(self, head: Int32, iteration: Int32):
        """With one stage: once all warps are done with the tiles, the next step's take their place."""
        if const_expr(self.stages == 1):
            cute.arch.sync_threads()
            self._issue_next(head, iteration)

    @cute.jit
    def _issue_next(self, head: Int32, iteration: Int32):
        load = self._load
        stage = self.stage(head * self.blocks.total + iteration + 1)
        if iteration + 1 < self.blocks.total:
            load(head, iteration + 1, stage, False)
        elif head + 1 < self.heads:
            load(head + 1, Int32(0), stage, True)
        cute.arch.cp_async_commit_group()

    @cute.jit
    def _load(self, head: Int32, iteration: Int32, stage, may_be_last: cutlass.Constexpr[bool]):
        """Only a head's first step, the last block of its range, can reach beyond the queries."""
        block = self.blocks.block(iteration)
        rows_left = self.seqlen_q - block * self.tile_m if const_expr(may_be_last) else None
        self.load_q(block, stage, rows_left, self.strides.q * head)
        self.load_dout(block, stage, rows_left, self.strides.dout * head)
        self.load_stats(block, stage, self.strides.stats * head)
