"""The cp.async pipeline that brings Q, dO and their statistics to a tile of keys, over all heads of its group."""

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, const_expr
from cutlass.cute.arch import inline_ptx

from cute_fa.device.query_range import QueryRange
from fa2_sm80.common.copies import CHUNK_BYTES, ELEMENT_BYTES, TileLoader


class StatsLoader:
    """cp.async of the (LSE, D) pairs of one tile of queries: 8 bytes a query."""

    def __init__(
        self, stats: cute.Tensor, first_tile: Int32, head: Int32, smem: cute.Pointer, tile_m: int, tidx: Int32
    ):
        """``stats`` (tiles, heads, 2 · tile_m); ``source`` is where ``head`` of the sequence's first tile lies."""
        self.stage_bytes = 8 * tile_m
        self.copies = tidx < self.stage_bytes // CHUNK_BYTES
        self.block_bytes = Int64(stats.stride[0]) * 4
        place = Int64(first_tile) * self.block_bytes + Int64(head) * (stats.stride[1] * 4)
        self.source = stats.iterator.toint() + place
        self.place = tidx * CHUNK_BYTES
        self.target = smem.toint()

    def load_from(self, source: Int64, stage: Int32):
        inline_ptx(
            f"cp.async.cg.shared.global [{{$r0}}], [{{$r1}}], {CHUNK_BYTES};",
            read_only_args=[self.target + self.place + stage * self.stage_bytes, source + self.place],
            predicate=self.copies,
        )


class QueryPipeline:
    """One cp.async group a step: Q, dO and the statistics of one query block of one head; the next step is issued as
    soon as its stage is free. Steps go down the blocks of a head, then on to the next head.

    Where a thread's copies of the latest step began is kept and moved on: computed from block and head it took 90
    instructions a step.
    """

    def __init__(
        self,
        stages: int,
        load_q: TileLoader,
        load_dout: TileLoader,
        load_stats: StatsLoader,
        head_strides: tuple,
        blocks: QueryRange,
        heads: Int32,
        seqlen_q: Int32,
        tile_m: int,
    ):
        """``heads``: query heads of the kv head, the loaders begin at the first; ``head_strides``: bytes from one to
        the next in Q, dO and the statistics."""
        self.stages, self.tile_m = stages, tile_m
        self.load_q, self.load_dout, self.load_stats = load_q.load_from, load_dout.load_from, load_stats.load_from
        self.head_strides = head_strides
        self.block_strides = tuple(loader.block_bytes for loader in (load_q, load_dout, load_stats))
        self.starts = tuple(loader.source for loader in (load_q, load_dout, load_stats))
        self.blocks, self.heads, self.seqlen_q = blocks, heads, seqlen_q
        self.sources = cute.make_rmem_tensor(3, Int64)
        self.next_stage = cute.make_rmem_tensor(1, Int32)

    @cute.jit
    def prologue(self, load_keys):
        """The first step's copies, and the tile's keys with them; none of a tile without queries."""
        self.next_stage[0] = Int32(0)
        for i in cutlass.range_constexpr(3):
            self.sources[i] = self.starts[i] + self.block_strides[i] * self.blocks.last_block
        if self.blocks.total > 0:
            load_keys()
            self._load(True)
        cute.arch.cp_async_commit_group()

    @cute.jit
    def wait(self, head: Int32, iteration: Int32):
        """This step's tiles are in shared memory, in the stage given back, and the previous step is over for all warps;
        with more than one stage the next step's copies are issued."""
        cute.arch.cp_async_wait_group(0)
        cute.arch.sync_threads()
        stage = self.next_stage[0]
        if const_expr(self.stages > 1):
            self.next_stage[0] = stage ^ 1
            self._issue_next(head, iteration)
        return stage

    @cute.jit
    def release(self, head: Int32, iteration: Int32):
        """With one stage: once all warps are done with the tiles, the next step's take their place."""
        if const_expr(self.stages == 1):
            cute.arch.sync_threads()
            self._issue_next(head, iteration)

    @cute.jit
    def _issue_next(self, head: Int32, iteration: Int32):
        load, sources, blocks = self._load, self.sources, self.blocks
        if iteration + 1 < blocks.total:
            for i in cutlass.range_constexpr(3):
                sources[i] = sources[i] - self.block_strides[i]
            load(False)
        elif head + 1 < self.heads:
            for i in cutlass.range_constexpr(3):
                sources[i] = sources[i] + self.head_strides[i] + self.block_strides[i] * (blocks.total - 1)
            load(True)
        cute.arch.cp_async_commit_group()

    @cute.jit
    def _load(self, may_be_last: cutlass.Constexpr[bool]):
        """Only a head's first step, the last block of its range, can reach beyond the queries."""
        rows_left = None
        if const_expr(may_be_last):
            rows_left = self.seqlen_q - self.blocks.last_block * self.tile_m
        stage = 0 if const_expr(self.stages == 1) else self.next_stage[0]
        self.load_q(self.sources[0], stage, rows_left)
        self.load_dout(self.sources[1], stage, rows_left)
        self.load_stats(self.sources[2], stage)


def head_strides(q: cute.Tensor, dout: cute.Tensor, stats: cute.Tensor) -> tuple:
    """Bytes from one query head to the next in the kernel's own arguments, of which heads are the last dimension but
    one, and the second of the statistics."""
    return (
        Int64(q.stride[-2]) * ELEMENT_BYTES,
        Int64(dout.stride[-2]) * ELEMENT_BYTES,
        Int64(stats.stride[1]) * 4,
    )
