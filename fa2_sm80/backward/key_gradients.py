"""The main kernel of the FA2 backward (arXiv 2307.08691, algorithm 2): one CTA a tile of keys of one kv head.

It walks over the query blocks of all query heads of the kv head, so that dK and dV of a GQA group are summed in
registers. S is computed transposed, K·Qᵀ: see :func:`fa2_sm80.backward.config.backward_config`.
"""

from functools import partial

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, const_expr
from cutlass.memory import SmemAllocator

from cute_fa.device.backward_arguments import BackwardArguments, scratch_address
from cute_fa.device.dtypes import CUTE_DTYPE
from cute_fa.device.heads import head_matrix
from cute_fa.device.query_range import QueryRange, query_range
from cute_fa.device.range_walk import BlockList, RangeWalk, poisoned
from cute_fa.device.score import Score
from cute_fa.device.seqlen import SeqlenInfo, key_rows
from fa2_sm80.backward.config import Fa2BackwardConfig
from fa2_sm80.backward.key_tile import BackwardTiles, KeyTile
from fa2_sm80.backward.list_pipeline import ListPipeline
from fa2_sm80.backward.query_pipeline import QueryPipeline, StatsLoader, head_strides
from fa2_sm80.common.copies import SMEM_ALIGNMENT, SmemTile, TileLoader, block_offset, store_tile
from fa2_sm80.common.walk import walk


class KeyGradientKernel:
    """Device code of the main kernel: dK, dV, the sums of dQ unless deterministic, parts of the slopes' gradient."""

    def __init__(self, config: Fa2BackwardConfig):
        self.config = config
        self.dtype = CUTE_DTYPE[config.dtype]

    @cute.kernel
    def kernel(self, args: BackwardArguments):
        c = self.config
        tidx, _, _ = cute.arch.thread_idx()
        n_block, head_kv, batch = self.tile(args)
        info = args.common.info(batch)
        n_start = n_block * c.tile_n
        gqa_ratio = args.common.q.shape[-2] // args.common.k.shape[-2]
        if n_start < key_rows(args.common.lengths, batch, args.common.dense[1]):
            head = head_kv * gqa_ratio
            blocks = self.blocks(args, info, n_block)
            q = head_matrix(args.common.q, head, batch, info.offset_q, c.cu_seqlens_q)
            dout = head_matrix(args.dout, head, batch, info.offset_q, c.cu_seqlens_q)
            k = head_matrix(args.common.k, head_kv, batch, info.offset_k, c.cu_seqlens_k)
            v = head_matrix(args.common.v, head_kv, batch, info.offset_k, c.cu_seqlens_k)

            smem = self.smem_tiles()
            first_tile = args.first_tile(info, batch, c.tile_m)
            stats = args.scratch.stats
            pipeline = (ListPipeline if c.ranges else QueryPipeline)(
                c.stages,
                TileLoader(q, smem.q, c.head_dim, tidx, c.num_threads),
                TileLoader(dout, smem.dout, c.head_dim_v, tidx, c.num_threads),
                StatsLoader(stats, first_tile, head, smem.stats, c.tile_m, tidx),
                head_strides(args.common.q, args.dout, stats),
                blocks,
                gqa_ratio,
                info.seqlen_q,
                c.tile_m,
            )
            keys_left = info.seqlen_k - n_start
            load_k = TileLoader(k, smem.k, c.head_dim, tidx, c.num_threads).load
            load_v = TileLoader(v, smem.v, c.head_dim_v, tidx, c.num_threads).load

            def load_keys():
                load_k(n_block, 0, keys_left)
                load_v(n_block, 0, keys_left)

            pipeline.prologue(load_keys)
            score = Score.of(args.common.softmax_scale, args.common.softcap)
            tile = KeyTile(c, smem, info, n_start, args.common)
            if const_expr(c.ranges):
                tile.acc_dk.fill(poisoned(blocks))
                tile.acc_dv.fill(poisoned(blocks))
            for index in cutlass.range(gqa_ratio, unroll=1):
                self.head(args, tile, pipeline, blocks, score, index, head + index, batch, first_tile, n_block)

            n_block, head_kv, batch = self.tile(args)
            info = args.common.info(batch)
            rows_left = key_rows(args.common.lengths, batch, args.common.dense[1]) - n_block * c.tile_n
            # dQ is the last to read the K of other warps; with one stage the pipeline has waited for all of them
            if const_expr(not c.deterministic and c.stages > 1):
                cute.arch.sync_threads()
            tile.to_smem(score.gradient_scale)
            cute.arch.sync_threads()
            dk = head_matrix(args.dk, head_kv, batch, info.offset_k, c.cu_seqlens_k)
            dv = head_matrix(args.dv, head_kv, batch, info.offset_k, c.cu_seqlens_k)
            store_tile(smem.k, dk, n_block, rows_left, c.head_dim, tidx, c.num_threads)
            store_tile(smem.v, dv, n_block, rows_left, c.head_dim_v, tidx, c.num_threads)
        elif const_expr(c.slopes_gradient):
            for head in cutlass.range(head_kv * gqa_ratio, (head_kv + 1) * gqa_ratio, unroll=1):
                self.store_dslope(args, Float32(0.0), batch, head, n_block)

    @cute.jit
    def head(
        self,
        args: BackwardArguments,
        tile: KeyTile,
        pipeline: QueryPipeline,
        blocks: QueryRange | BlockList,
        score: Score,
        index: Int32,
        head: Int32,
        batch: Int32,
        first_tile: Int32,
        n_block: Int32,
    ):
        """The query blocks of one head, ``index`` of its group."""
        c = self.config
        if const_expr(c.alibi):
            score = score.with_slopes((args.common.alibi_slopes[batch, head],) * tile.register_rows)
        if const_expr(not c.deterministic):
            start = first_tile if const_expr(c.ranges) else first_tile + blocks.last_block
            tile.dq_address[0] = scratch_address(args.scratch.dq, start, head)
            tile.dq_block_bytes = Int32(args.scratch.dq.stride[0]) * 4
        walk(blocks.ranges(c.window_left), partial(self.step, args, tile, pipeline, blocks, index, score))
        if const_expr(c.slopes_gradient):
            dslope = cute.arch.warp_reduction_sum(tile.dslope[0])
            if const_expr(c.ranges):
                dslope += poisoned(blocks)
            self.store_dslope(args, dslope, batch, head, n_block)
            tile.dslope[0] = Float32(0.0)

    @cute.jit
    def store_dslope(self, args: BackwardArguments, value: Float32, batch: Int32, head: Int32, n_block: Int32):
        """This warp's part of the gradient of a head's slope."""
        parts, tidx = args.scratch.dslopes, cute.arch.thread_idx()[0]
        if tidx % 32 == 0:
            parts[batch, head, n_block * self.config.num_warps + tidx // 32] = value

    @cute.jit
    def step(
        self,
        args: BackwardArguments,
        tile: KeyTile,
        pipeline: QueryPipeline,
        blocks: QueryRange | BlockList,
        index: Int32,
        score: Score,
        iteration: Int32,
        masked: cutlass.Constexpr[bool],
        left_edge: cutlass.Constexpr[bool],
    ):
        """Wait for one query block, and add what it gives."""
        c = self.config
        stage = pipeline.wait(index, iteration)
        block = blocks.block(iteration)
        if const_expr(c.ranges):
            bits = tile.mask_rows(blocks, iteration) if const_expr(masked) else None
            offset = None
            if const_expr(not c.deterministic):
                offset = block_offset(block, tile.dq_block_bytes)
            tile.step(block * c.tile_m, stage, score, masked, left_edge, bits, offset)
        else:
            tile.step(block * c.tile_m, stage, score, masked, left_edge)
            if const_expr(not c.deterministic):
                tile.dq_address[0] = tile.dq_address[0] - Int64(args.scratch.dq.stride[0]) * 4
        pipeline.release(index, iteration)

    def blocks(self, args: BackwardArguments, info: SeqlenInfo, n_block: Int32) -> QueryRange | BlockList:
        """The query blocks of a tile of keys."""
        c = self.config
        if const_expr(c.ranges):
            return RangeWalk.of(args.key_walk, args.seqlen_k, c.tile_n).blocks(n_block)
        n_start = n_block * c.tile_n
        return query_range(args.common.window, info.seqlen_q, info.seqlen_k, n_start, c.tile_m, c.tile_n)

    def smem_tiles(self) -> BackwardTiles:
        """dK and dV leave over K and V."""
        c = self.config
        allocator = SmemAllocator()

        def allocate(rows: int, columns: int, stages: int, *shares: int) -> SmemTile:
            layout = cute.make_layout(stages * rows * columns)
            pointer = allocator.allocate_tensor(self.dtype, layout, SMEM_ALIGNMENT).iterator
            return SmemTile(pointer, rows, columns, *shares)

        p = None if c.p_in_registers else allocate(c.tile_n, c.tile_m, 1)
        ds = allocate(c.tile_n, c.tile_m, 1) if c.ds_in_smem else None
        shares = c.keys.columns
        return BackwardTiles(
            p=p,
            ds=ds,
            k=allocate(c.tile_n, c.head_dim_padded, 1, shares, c.queries.columns),
            v=allocate(c.tile_n, c.head_dim_v_padded, 1, shares),
            q=allocate(c.tile_m, c.head_dim_padded, c.stages, shares),
            dout=allocate(c.tile_m, c.head_dim_v_padded, c.stages, shares),
            stats=allocator.allocate_tensor(Float32, cute.make_layout(2 * c.tile_m * c.stages), 16).iterator,
        )

    @cute.jit
    def tile(self, args: BackwardArguments):
        """(n_block, head_kv, batch) of this CTA. The key tiles of a head are neighbours, for its Q and dO in L2;
        under a right bound the first one has the most queries and goes first, under a range plan the one with the most
        blocks."""
        index, _, _ = cute.arch.block_idx()
        n_blocks, heads_kv = cute.ceil_div(args.seqlen_k, self.config.tile_n), args.common.k.shape[-2]
        n_block = index % n_blocks
        if const_expr(self.config.ranges):
            n_block = RangeWalk.of(args.key_walk, args.seqlen_k, self.config.tile_n).tile(n_block)
        return n_block, index // n_blocks % heads_kv, index // n_blocks // heads_kv
