"""The kernel for dQ: one CTA a tile of queries of one head, over the blocks of keys, as a forward walks."""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr

from cute_fa.device.backward_arguments import BackwardArguments
from cute_fa.device.block_range import BlockRange, block_range
from cute_fa.device.ring import Ring, RingState, ring_next, ring_start, rings
from cute_fa.device.seqlen import SeqlenInfo
from cute_fa.device.tile_scheduler import tile_longest_first
from cute_fa.device.tma_boxes import BoxCopy
from fa3_sm90.backward.config import CONSUMERS, REGISTERS
from fa3_sm90.backward_split.arguments import Boxes, TmaTensors
from fa3_sm90.backward_split.config import TILE, Fa3SplitBackwardConfig
from fa3_sm90.backward_split.key_kernel import prepare
from fa3_sm90.backward_split.query_gradients import QueryGradients
from fa3_sm90.backward_split.storage import QueryStorage
from fa3_sm90.common.wgmma import WARPGROUP


class QueryWork(NamedTuple):
    """``tile``: of 64 queries, the CTA's first; its other warpgroups have the next ones."""

    tile: Int32
    head: Int32
    batch: Int32
    info: SeqlenInfo
    blocks: BlockRange


def query_work(config: Fa3SplitBackwardConfig, args: BackwardArguments, index: Int32) -> QueryWork:
    """All of a CTA's tile: those of a head are neighbours, for its K and V in L2; the longest first, where they differ,
    of as many heads as the key tiles take at a time (``fa3_sm90.backward.work.key_tile``)."""
    c = config
    m_blocks, heads = args.m_blocks(c.query_rows), args.common.q.shape[-2]
    m_block, row = index % m_blocks, index // m_blocks
    if const_expr(c.longest_first):
        head_group = args.head_group * (heads // args.common.k.shape[-2])
        m_block, row = tile_longest_first(index, m_blocks, heads * args.common.batches, head_group)
    head, batch = row % heads, row // heads
    info = args.common.info(batch)
    m_start = m_block * c.query_rows
    blocks = block_range(args.common.window, info.seqlen_q, info.seqlen_k, m_start, c.query_rows, TILE)
    return QueryWork(m_block * CONSUMERS, head, batch, info, blocks)


class QueryGradientKernel:
    """Device code. The first warpgroup produces, with few registers; the others have 64 queries each."""

    def __init__(self, config: Fa3SplitBackwardConfig):
        self.config = config

    @cute.kernel
    def kernel(self, args: BackwardArguments, tma: TmaTensors):
        c = self.config
        index, _, _ = cute.arch.block_idx()
        storage = QueryStorage.allocate(c)
        pipelines = rings(c.query_pipelines, storage.barriers)
        load, consume, skip = self.load, self.consume, self.skip
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        if warp == 0:
            prepare(tma, pipelines)
        cute.arch.sync_threads()
        work = query_work(c, args, index)
        if work.tile * TILE < work.info.rows_q:
            if warp < 4:
                cute.arch.setmaxregister_decrease(REGISTERS[0])
                if warp == 0:
                    load(args, tma, storage, pipelines, work)
            else:
                cute.arch.setmaxregister_increase(REGISTERS[1])
                consume(args, tma, storage, pipelines, work)
        elif const_expr(c.slopes_gradient):
            skip(args, work)

    @cute.jit
    def skip(self, args: BackwardArguments, work: QueryWork):
        """A tile behind its sequence: its parts of the slopes' gradients are added up like all others."""
        parts, first = args.scratch.dslopes, work.tile * self.config.slope_parts
        tidx, _, _ = cute.arch.thread_idx()
        if tidx < CONSUMERS * self.config.slope_parts and first + tidx < parts.shape[2]:
            parts[work.batch, work.head, first + tidx] = Float32(0.0)

    def load(self, args, tma: TmaTensors, storage: QueryStorage, pipelines: dict[str, Ring], work: QueryWork):
        """The loading warp."""
        QueryLoader(self.config, args, tma, storage, pipelines).run(work)

    def consume(self, args, tma: TmaTensors, storage: QueryStorage, pipelines: dict[str, Ring], work: QueryWork):
        """A consumer warpgroup."""
        tidx, _, _ = cute.arch.thread_idx()
        index, thread = cute.arch.make_warp_uniform(tidx // WARPGROUP) - 1, tidx % WARPGROUP
        consumer = QueryGradients(self.config, args, storage, pipelines, index, thread)
        consumer.run(work)
        consumer.store(tma, work)


class QueryLoader:
    """One warp: Q and the first K, dO and the first V, then K and V of every step, each needed about when it comes."""

    def __init__(
        self,
        config: Fa3SplitBackwardConfig,
        args: BackwardArguments,
        tma: TmaTensors,
        storage: QueryStorage,
        pipelines: dict[str, Ring],
    ):
        self.config, self.args, self.tma, self.storage, self.rings = config, args, tma, storage, pipelines
        self.boxes = Boxes.of(config, 1)

    @cute.jit
    def run(self, work: QueryWork):
        """All loads of a tile of queries."""
        c, load_queries, load_keys = self.config, self.load_queries, self.load_keys
        load_queries(work, "q", c.head_dim_padded)
        load_queries(work, "dout", c.head_dim_v_padded)
        keys, values = ring_start(), ring_start()
        for iteration in cutlass.range(work.blocks.total, unroll=1):
            block = work.blocks.block(iteration, self.args.common.window)
            load_keys(work, "k", c.head_dim_padded, block, keys)
            load_keys(work, "v", c.head_dim_v_padded, block, values)
            keys, values = ring_next(keys, c.k_stages), ring_next(values, c.v_stages)

    def load_queries(self, work: QueryWork, name: str, columns: int):
        """Q or dO, on a barrier for each warpgroup."""
        copy = self.copy(work, name, columns, work.head, self.config.cu_seqlens_q)
        for wg in range(CONSUMERS):
            barrier = self.rings[name].acquire(RingState(Int32(wg), Int32(0)))
            row = (work.tile + wg) * TILE
            target = getattr(self.storage, name) + wg * (TILE * columns)
            copy.load(target, 0, work.info.offset_q + row, work.info.seqlen_q - row, barrier)

    def load_keys(self, work: QueryWork, name: str, columns: int, block: Int32, state: RingState):
        """K or V of a block."""
        heads_per_kv = self.args.common.q.shape[-2] // self.args.common.k.shape[-2]
        copy = self.copy(work, name, columns, work.head // heads_per_kv, self.config.cu_seqlens_k)
        barrier = self.rings[name].acquire(state)
        row = block * TILE
        target = getattr(self.storage, name) + state.stage * (TILE * columns)
        copy.load(target, 0, work.info.offset_k + row, work.info.seqlen_k - row, barrier)

    def copy(self, work: QueryWork, name: str, columns: int, head: Int32, packed: bool) -> BoxCopy:
        """Copies of a head of a tensor."""
        box, outer = getattr(self.boxes, name), () if packed else (work.batch,)
        return BoxCopy(getattr(self.tma, name), box, TILE, head, outer, columns // box.columns)
