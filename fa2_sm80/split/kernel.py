"""The split-KV forward (flash decoding): few queries, many keys, paged or not.

The query heads of one kv head share a tile of rows, so that each key is read once for all of them; the keys of a step
are shared by the warps, and those of a sequence by ``num_splits`` CTAs. All of these give normalised parts of O with
their LSE, which are merged by log-sum-exp: the warps' in shared memory, the CTAs' by a second kernel.
"""

from functools import partial

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, const_expr
from cutlass.memory import SmemAllocator

from cute_fa.device.block_range import MaskedRange, block_range
from cute_fa.device.dtypes import CUTE_DTYPE
from cute_fa.device.heads import head_row
from cute_fa.device.score import Score
from cute_fa.device.tree_mask import DraftWords
from fa2_sm80.common.copies import ELEMENT_BYTES, SMEM_ALIGNMENT, SmemTile
from fa2_sm80.common.walk import walk
from fa2_sm80.split.arguments import SplitArguments, split_fakes
from fa2_sm80.split.combine import COLUMNS, CombineKernel, merge_parts, merged_lse, store_chunk
from fa2_sm80.split.config import Fa2SplitConfig
from fa2_sm80.split.loader import KeyRows, RowLoader, RowRing
from fa2_sm80.split.row_tile import RowTile, SplitTiles, merged_parts


class Fa2SplitKernel:
    """Device code of one :class:`Fa2SplitConfig`."""

    def __init__(self, config: Fa2SplitConfig):
        self.config = config
        self.dtype = CUTE_DTYPE[config.dtype]

    @cute.jit
    def __call__(self, args: SplitArguments, stream):
        c = self.config
        heads_kv, batches = args.common.k.shape[-2], args.common.batches
        tiles = cute.ceil_div(args.seqlen_q * (args.common.q.shape[-2] // heads_kv), c.tile_m)
        self.kernel(args).launch(
            grid=(tiles * heads_kv * batches * args.num_splits, 1, 1),
            block=(c.num_threads, 1, 1),
            smem=c.smem_bytes,
            stream=stream,
        )
        if const_expr(c.split):
            combine = CombineKernel(c)
            rows = args.parts.lse.shape[1]
            combine.kernel(args.parts, args.common.out, args.common.lse, args.common.learnable_sink).launch(
                grid=(cute.ceil_div(rows, combine.rows), 1, 1), block=(combine.num_threads, 1, 1), stream=stream
            )

    @cute.kernel
    def kernel(self, args: SplitArguments):
        """One CTA: a tile of rows of one kv head, and one split of its key blocks."""
        c = self.config
        tidx, _, _ = cute.arch.thread_idx()
        index, _, _ = cute.arch.block_idx()
        heads_kv = args.common.k.shape[-2]
        gqa_ratio = args.common.q.shape[-2] // heads_kv
        split, index = index % args.num_splits, index // args.num_splits
        head_kv, index = index % heads_kv, index // heads_kv
        tiles = cute.ceil_div(args.seqlen_q * gqa_ratio, c.tile_m)
        first_row, batch = index % tiles * c.tile_m, index // tiles
        info = args.common.info(batch)
        if first_row < info.rows_q * gqa_ratio:
            smem = self.smem_tiles()
            first_query, last_query = first_row // gqa_ratio, (first_row + c.tile_m - 1) // gqa_ratio
            queries = last_query - first_query + 1
            blocks = block_range(args.common.window, info.seqlen_q, info.seqlen_k, first_query, queries, c.tile_n)
            steps = cute.ceil_div(blocks.total, args.num_splits)
            start = cutlass.min(split * steps, blocks.total)
            stop = cutlass.min(start + steps, blocks.total)

            place = self.query_places(args, info, batch, head_kv, gqa_ratio, first_row)
            load_q = RowLoader(smem.q, c.head_dim, tidx, c.num_threads)
            load_queries, rows = load_q.load, load_q.rows()
            if start < stop:
                load_queries([place(row) for row in rows], 0)
            paged = c.page_size is not None
            sequence = args.common.key_batch(batch)
            keys = tuple(
                KeyRows(tensor, head_kv, sequence, info.offset_k, c.cu_seqlens_k, paged)
                for tensor in (args.common.k, args.common.v)
            )
            ring = RowRing(
                c.stages,
                (
                    RowLoader(smem.k, c.head_dim, tidx, c.num_threads),
                    RowLoader(smem.v, c.head_dim_v, tidx, c.num_threads),
                ),
                keys,
                args.common.page_table[sequence, None] if const_expr(paged) else None,
                c.page_size,
                info.offset_k,
                blocks,
                args.common.window,
                info.seqlen_k,
                stop,
            )
            ring.prologue(start)
            tile = self.row_tile(args, smem, info, batch, head_kv, gqa_ratio, first_row)
            # every block is masked: decoding waits for memory
            walk([MaskedRange(start, stop, True, c.window_left)], partial(tile.step, ring))
            cute.arch.sync_threads()
            tile.to_smem(smem.merge, tile.score.offset_log2)
            cute.arch.sync_threads()
            self.store(args, smem, info, batch, head_kv, gqa_ratio, first_row, split, tidx)

    def row_tile(self, args: SplitArguments, smem: SplitTiles, info, batch, head_kv, gqa_ratio, first_row) -> RowTile:
        """The registers of this warp, with the slopes of its rows' heads and the drafts that its queries
        see."""
        c = self.config
        score = Score.of(args.common.softmax_scale, args.common.softcap)
        tile = RowTile(c, smem, info, first_row, gqa_ratio, args.common.window, score)
        if const_expr(c.alibi):
            heads = [head_kv * gqa_ratio + row % gqa_ratio for row in tile.rows]
            slopes = tuple(args.common.alibi_slopes[batch, head] for head in heads)
            tile.score = Score.of(args.common.softmax_scale, args.common.softcap, slopes)
        if const_expr(c.tree_mask):
            tile.drafts = tuple(DraftWords.of(args.common.tree_mask, info, batch, query) for query in tile.queries)
        return tile

    def query_places(self, args: SplitArguments, info, batch, head_kv, gqa_ratio, first_row):
        """A function that says where a row of Q lies, for :meth:`RowLoader.load`."""
        q, packed = args.common.q, self.config.cu_seqlens_q
        token_bytes = Int64(q.stride[0] if const_expr(packed) else q.stride[1]) * ELEMENT_BYTES
        head_bytes = Int64(q.stride[-2]) * ELEMENT_BYTES
        start = q.iterator.toint() + head_bytes * (head_kv * gqa_ratio)
        if const_expr(packed):
            start = start + token_bytes * info.offset_q
        else:
            start = start + Int64(batch) * (Int64(q.stride[0]) * ELEMENT_BYTES)

        def address(row):
            query, head = (first_row + row) // gqa_ratio, (first_row + row) % gqa_ratio
            return start + token_bytes * query + head_bytes * head, query < info.seqlen_q

        return address

    @cute.jit
    def store(
        self,
        args: SplitArguments,
        smem: SplitTiles,
        info,
        batch: Int32,
        head_kv: Int32,
        gqa_ratio: Int32,
        first_row: Int32,
        split: Int32,
        tidx: Int32,
    ):
        """Merge the warps' parts and write them: to O and LSE, or where splits are merged later. Rows that do not count
        get 0 and −inf."""
        c = self.config
        out, lses = merged_parts(c, smem.merge)
        chunks = c.head_dim_v_padded // COLUMNS
        for i in cutlass.range(tidx, c.tile_m * chunks, c.num_threads, unroll=1):
            row, column = i // chunks, i % chunks * COLUMNS
            query, head = (first_row + row) // gqa_ratio, head_kv * gqa_ratio + (first_row + row) % gqa_ratio
            if query < info.rows_q:
                sink = args.common.learnable_sink[head] if const_expr(c.learnable_sink and not c.split) else None
                lse = merged_lse(lses, row, c.tile_m, c.key_warps, sink)
                merged = merge_parts(out, lses, row, c.tile_m, c.key_warps, lse, column)
                if query >= info.seqlen_q:
                    lse = -Float32.inf
                    merged.fill(0.0)
                if const_expr(c.split):
                    self.store_part(args, info, merged, lse, split, batch, head, query, column)
                else:
                    self.store_out(args, info, merged, lse, batch, head, query, column)

    @cute.jit
    def store_part(self, args: SplitArguments, info, merged, lse, split, batch, head, query, column):
        """One row's chunk of this CTA's part; O only where there is any."""
        c, parts = self.config, args.parts
        row = (batch * args.common.q.shape[-2] + head) * args.common.q.shape[1] + query
        if const_expr(c.cu_seqlens_q):
            row = head * args.common.q.shape[0] + info.offset_q + query
        if column == 0:
            parts.lse[split, row] = lse if query < info.seqlen_q else Float32.inf
        if lse != -Float32.inf and column < c.head_dim_v:
            for i in cutlass.range_constexpr(COLUMNS):
                parts.out[split, row, column + i] = merged[i]

    @cute.jit
    def store_out(self, args: SplitArguments, info, merged, lse, batch, head, query, column):
        """One row's chunk of O, and its LSE."""
        c = self.config
        lse_row = head_row(args.common.lse, head, batch, info.offset_q, c.cu_seqlens_q)
        if column == 0:
            lse_row[query] = lse
        target = args.common.out[batch, query, head, None] if const_expr(not c.cu_seqlens_q) else None
        if const_expr(c.cu_seqlens_q):
            target = args.common.out[info.offset_q + query, head, None]
        if column < c.head_dim_v:
            store_chunk(merged, target, column, self.dtype)

    def smem_tiles(self) -> SplitTiles:
        c, allocator = self.config, SmemAllocator()

        def allocate(elements: int) -> cute.Pointer:
            return allocator.allocate_tensor(self.dtype, cute.make_layout(elements), SMEM_ALIGNMENT).iterator

        q = allocate(c.tile_m * c.head_dim_padded)
        keys = c.stages * c.tile_n * c.head_dim_padded
        values = c.stages * c.tile_n * c.head_dim_v_padded
        k = allocate(max(keys + values, c.merge_bytes // c.dtype.bytes))
        return SplitTiles(
            q=SmemTile(q, c.tile_m, c.head_dim_padded),
            k=SmemTile(k, c.tile_n, c.head_dim_padded),
            v=SmemTile(k + keys, c.tile_n, c.head_dim_v_padded),
            merge=cute.recast_ptr(k, dtype=Float32),
        )


def build(config: Fa2SplitConfig):
    """The callable and its fake arguments for ``cute.compile``."""
    stream = cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True)
    return Fa2SplitKernel(config), (split_fakes(config), stream)
