"""The FA2 forward on sm_80 (arXiv 2307.08691, algorithm 1): one CTA a tile of queries of one head.

Each warp owns 16 or 32 queries for the whole kernel, Q·Kᵀ and P·V run on mma.sync m16n8k16, P stays in registers. K and
V blocks flow through shared memory by cp.async in a ring of ``stages`` blocks each.
"""

from functools import partial

import cutlass.cute as cute
from cutlass import Int32, const_expr
from cutlass.memory import SmemAllocator

from cute_fa.device.arguments import CommonArguments
from cute_fa.device.block_range import BlockRange, block_range
from cute_fa.device.dtypes import CUTE_DTYPE
from cute_fa.device.heads import head_matrix, head_row
from cute_fa.device.range_walk import BlockList, RangeWalk, poisoned
from cute_fa.device.score import Score
from cute_fa.device.seqlen import SeqlenInfo
from fa2_sm80.common.copies import SMEM_ALIGNMENT, SmemTile, SmemTiles, TileLoader, store_tile
from fa2_sm80.common.walk import walk
from fa2_sm80.forward.arguments import ForwardArguments, forward_fakes
from fa2_sm80.forward.config import Fa2ForwardConfig
from fa2_sm80.forward.key_value_pipeline import KeyValuePipeline
from fa2_sm80.forward.query_tile import QueryTile


class Fa2ForwardKernel:
    """Device code of one :class:`Fa2ForwardConfig`."""

    def __init__(self, config: Fa2ForwardConfig):
        self.config = config
        self.dtype = CUTE_DTYPE[config.dtype]

    @cute.jit
    def __call__(self, args: ForwardArguments, stream):
        c = self.config
        heads, batches = args.common.q.shape[-2], args.common.batches
        m_blocks = cute.ceil_div(args.seqlen_q, c.tile_m)
        # one-dimensional: grid.y and grid.z end at 65535, and a batch of short sequences does not
        self.kernel(args).launch(
            grid=(m_blocks * heads * batches, 1, 1), block=(c.num_threads, 1, 1), smem=c.smem_bytes, stream=stream
        )

    @cute.kernel
    def kernel(self, args: ForwardArguments):
        """One CTA: load the queries, walk over the key blocks, write O and LSE."""
        c = self.config
        tidx, _, _ = cute.arch.thread_idx()
        m_block, head, batch = self.tile(args)
        heads, heads_kv = args.common.q.shape[-2], args.common.k.shape[-2]
        head_kv = head // (heads // heads_kv)
        info = args.common.info(batch)
        m_start = m_block * c.tile_m

        if m_start < info.rows_q:
            blocks = self.blocks(args.common, info, m_block)
            q = head_matrix(args.common.q, head, batch, info.offset_q, c.cu_seqlens_q)
            key_batch = args.common.key_batch(batch)
            k, v = (
                head_matrix(tensor, head_kv, key_batch, info.offset_k, c.cu_seqlens_k, c.cache_leftpad)
                for tensor in (args.common.k, args.common.v)
            )

            smem = self.smem_tiles()
            load_q = TileLoader(q, smem.q, c.head_dim, tidx, c.num_threads)
            load_k = TileLoader(k, smem.k, c.head_dim, tidx, c.num_threads, c.ranges)
            load_v = TileLoader(v, smem.v, c.head_dim_v, tidx, c.num_threads, c.ranges)
            slopes = (args.common.alibi_slopes[batch, head],) * c.rows_per_thread if const_expr(c.alibi) else None
            score = Score.of(args.common.softmax_scale, args.common.softcap, slopes)

            tile = QueryTile(c, tidx, smem, info, m_start, args.common, score)
            if const_expr(c.ranges):
                tile.acc.fill(poisoned(blocks))
            pipeline = KeyValuePipeline(c.stages, load_k, load_v, blocks, args.common.window, info.seqlen_k, c.tile_n)
            load_queries = load_q.load
            if blocks.total > 0:
                load_queries(m_block, 0, info.seqlen_q - m_start)
            pipeline.prologue()
            walk(blocks.ranges(c.window_left), partial(tile.step, pipeline))

            # Where the tile lies is read again: kept over the main loop it would cost it 8 registers.
            m_block, head, batch = self.tile(args)
            info = args.common.info(batch)
            sink_logits = (
                (args.common.learnable_sink[head],) * c.rows_per_thread if const_expr(c.learnable_sink) else None
            )
            lse = tile.softmax.finalize(tile.acc_rows, score.offset_log2, sink_logits)
            if const_expr(c.ranges):
                lse.store(lse.load() + poisoned(self.blocks(args.common, info, m_block)))
            out = head_matrix(args.common.out, head, batch, info.offset_q, c.cu_seqlens_q)
            lse_row = head_row(args.common.lse, head, batch, info.offset_q, c.cu_seqlens_q)
            tile.store_lse(lse, lse_row, info, m_block * c.tile_m)
            # With panels of one width a warp's rows of O take the place of the rows of Q that it alone has read.
            if const_expr(smem.q.panel != smem.out.panel):
                cute.arch.sync_threads()
            tile.acc_to_smem(smem.out, info, m_block * c.tile_m)
            cute.arch.sync_threads()
            store_tile(smem.out, out, m_block, info.rows_q - m_block * c.tile_m, c.head_dim_v, tidx, c.num_threads)

    def blocks(self, common: CommonArguments, info: SeqlenInfo, m_block: Int32) -> BlockRange | BlockList:
        """The key blocks of a tile of queries."""
        c = self.config
        if const_expr(c.ranges):
            return RangeWalk.of(common.query_walk, info.seqlen_q, c.tile_m).blocks(m_block)
        return block_range(common.window, info.seqlen_q, info.seqlen_k, m_block * c.tile_m, c.tile_m, c.tile_n)

    def smem_tiles(self) -> SmemTiles:
        """Q and O share their memory: O is written when no warp needs Q any more."""
        c = self.config
        allocator = SmemAllocator()

        def allocate(elements: int) -> cute.Pointer:
            return allocator.allocate_tensor(self.dtype, cute.make_layout(elements), SMEM_ALIGNMENT).iterator

        q_or_o = allocate(c.tile_m * max(c.head_dim_padded, c.head_dim_v_padded))
        k = allocate(c.stages * c.tile_n * c.head_dim_padded)
        v = allocate(c.stages * c.tile_n * c.head_dim_v_padded)
        return SmemTiles(
            q=SmemTile(q_or_o, c.tile_m, c.head_dim_padded),
            k=SmemTile(k, c.tile_n, c.head_dim_padded),
            v=SmemTile(v, c.tile_n, c.head_dim_v_padded),
            out=SmemTile(q_or_o, c.tile_m, c.head_dim_v_padded),
        )

    @cute.jit
    def tile(self, args: ForwardArguments):
        """(m_block, head, batch) of this CTA. The query tiles of a head are neighbours, for its K and V in L2; under a
        right bound the last tile has the most keys and goes first, under a range plan the one with the most blocks."""
        c = self.config
        index, _, _ = cute.arch.block_idx()
        m_blocks = cute.ceil_div(args.seqlen_q, c.tile_m)
        heads = args.common.q.shape[-2]
        m_block = index % m_blocks
        if const_expr(c.window_right):
            m_block = m_blocks - 1 - m_block
        if const_expr(c.ranges):
            m_block = RangeWalk.of(args.common.query_walk, args.seqlen_q, c.tile_m).tile(m_block)
            return m_block, index // m_blocks, Int32(0)
        return m_block, index // m_blocks % heads, index // m_blocks // heads


def build(config: Fa2ForwardConfig):
    """The callable and its fake arguments for ``cute.compile``."""
    stream = cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True)
    return Fa2ForwardKernel(config), (forward_fakes(config), stream)
