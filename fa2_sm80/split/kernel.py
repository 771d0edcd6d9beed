"""The split-KV forward (flash decoding): few queries, many keys, paged or not.

The query heads of one kv head share a tile of rows, so that each key is read once for all of them; every CTA has a
share of all key blocks (``cute_fa.device.split_walk``), and its warps share the rows of a tile, or the keys of a step.
All of these give normalised parts of O with their LSE, which are merged by log-sum-exp: the warps' in shared memory,
those of a tile that was cut by a second kernel.
"""

from functools import partial

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, const_expr
from cutlass.memory import SmemAllocator

from cute_fa.device.block_range import MaskedRange
from cute_fa.device.chunk_walk import make_walk
from cute_fa.device.dtypes import CUTE_DTYPE
from cute_fa.device.score import Score
from cute_fa.device.split_arguments import SplitArguments
from cute_fa.device.split_parts import (
    COLUMNS,
    ROWS,
    THREADS,
    CombineKernel,
    RowPlace,
    fold_chunk,
    lse_row,
    out_row,
    row_place,
    store_chunk,
)
from cute_fa.device.split_walk import Piece
from cute_fa.device.tree_mask import DraftWords
from fa2_sm80.common.copies import ELEMENT_BYTES, SMEM_ALIGNMENT, SmemTile
from fa2_sm80.common.walk import walk
from fa2_sm80.split.codes import QueryRows, sum_factor
from fa2_sm80.split.combine import merge_parts, merged_lse
from fa2_sm80.split.config import Fa2SplitConfig
from fa2_sm80.split.loader import DescaleLoader, KeyRows, RowLoader, RowRing
from fa2_sm80.split.row_tile import RowTile, SplitTiles, merged_parts


class Fa2SplitKernel:
    """Device code of one :class:`Fa2SplitConfig`."""

    def __init__(self, config: Fa2SplitConfig):
        self.config = config
        self.dtype = CUTE_DTYPE[config.out_dtype]

    @cute.jit
    def __call__(self, args: SplitArguments, stream):
        c = self.config
        self.kernel(args).launch(
            grid=(args.grid.ctas, 1, 1), block=(c.num_threads, 1, 1), smem=c.smem_bytes, stream=stream
        )
        if args.grid.merges > 0:
            CombineKernel(c).kernel(args.common, args.parts, args.grid).launch(
                grid=(args.grid.merges, c.tile_m // ROWS, 1), block=(THREADS, 1, 1), stream=stream
            )

    @cute.kernel
    def kernel(self, args: SplitArguments):
        """A CTA walks over its share."""
        shares, smem = make_walk(self.config, args.common, args.grid), self.smem_tiles()
        valid, piece_at, advance, gqa_ratio = shares.valid, shares.piece, shares.next, shares.gqa_ratio
        compute, store, found_again = self.compute, self.store, shares.found_again
        state = shares.first(cute.arch.block_idx()[0])
        while valid(state):
            compute(args, smem, piece_at(state), gqa_ratio)
            # found again rather than kept in registers over the loop over keys
            state = found_again(state)
            piece = piece_at(state)
            store(args, smem, piece, gqa_ratio)
            state = advance(state, piece)

    @cute.jit
    def compute(self, args: SplitArguments, smem: SplitTiles, piece: Piece, gqa_ratio: Int32):
        """A piece: its rows' queries, its key blocks, and what came out into shared memory."""
        c, tidx = self.config, cute.arch.thread_idx()[0]
        # through shuffles, see fa3_sm90.forward.consumer.Consumer.steps
        start, stop = (cute.arch.make_warp_uniform(number) for number in (piece.start, piece.stop))
        place = self.query_places(args, piece, gqa_ratio)
        if const_expr(not c.widens):
            load_q = RowLoader(smem.q, c.head_dim, tidx, c.num_threads)
            load_queries, rows = load_q.load, load_q.rows()
            if start < stop:
                load_queries([place(row) for row in rows], 0)
        ring = self.key_ring(args, smem, piece, stop, tidx)
        ring.prologue(start)
        if const_expr(c.widens):
            QueryRows(c, smem.q, smem.factors, tidx).load(args.common, piece, gqa_ratio)
            cute.arch.sync_threads()
        tile = self.row_tile(args, smem, piece, gqa_ratio)
        # every block is masked: decoding waits for memory
        walk([MaskedRange(start, stop, True, c.window_left)], partial(tile.step, ring))
        cute.arch.sync_threads()
        value_scale = sum_factor(args.common.descales.of_values(piece.batch, piece.head), c.shifted[1])
        tile.to_smem(smem.merge, tile.score.offset_log2, value_scale)
        cute.arch.sync_threads()

    def key_ring(self, args: SplitArguments, smem: SplitTiles, piece: Piece, stop: Int32, tidx: Int32) -> RowRing:
        """K and V of the piece on their way, up to the iteration ``stop``."""
        c, common, info = self.config, args.common, piece.info
        sequence, paged = common.key_batch(piece.batch), c.page_size is not None
        loaders = tuple(
            RowLoader(tile, head_dim * dtype.bytes // ELEMENT_BYTES, tidx, c.num_threads)
            for tile, head_dim, dtype in ((smem.k, c.head_dim, c.dtype_k), (smem.v, c.head_dim_v, c.dtype_v))
        )

        def rows_of(tensor: cute.Tensor) -> KeyRows:
            return KeyRows(tensor, piece.head, sequence, info.offset_k, c.cu_seqlens_k, paged)

        rows = rows_of(common.k), rows_of(common.v)
        descales = [
            DescaleLoader(target, rows_of(tensor), tidx)
            for target, tensor in zip(smem.descales, (common.descales.k, common.descales.v), strict=True)
            if target is not None
        ]
        pages = common.page_table[sequence, None] if const_expr(paged) else None
        return RowRing(
            c.stages,
            loaders,
            rows,
            descales,
            pages,
            c.page_size,
            info.offset_k,
            piece.blocks,
            common.window,
            info.seqlen_k,
            stop,
        )

    def row_tile(self, args: SplitArguments, smem: SplitTiles, piece: Piece, gqa_ratio: Int32) -> RowTile:
        """The registers of this warp, with the slopes of its rows' heads and the drafts that its queries see."""
        c, common = self.config, args.common
        scale = common.softmax_scale
        factor = sum_factor(common.descales.of_scores(piece.batch, piece.head), c.shifted[0] + c.shifts_queries)
        if const_expr(factor is not None):
            scale = scale * factor
        score = Score.of(scale, common.softcap)
        tile = RowTile(c, smem, piece.info, piece.first_row, gqa_ratio, common.window, score)
        if const_expr(c.alibi):
            heads = [piece.head * gqa_ratio + row % gqa_ratio for row in tile.rows]
            slopes = tuple(common.alibi_slopes[piece.batch, head] for head in heads)
            tile.score = Score.of(scale, common.softcap, slopes)
        if const_expr(c.tree_mask):
            tile.drafts = tuple(
                DraftWords.of(common.tree_mask, piece.info, piece.batch, query) for query in tile.queries
            )
        return tile

    def query_places(self, args: SplitArguments, piece: Piece, gqa_ratio: Int32):
        """A function that says where a row of Q lies, for :meth:`RowLoader.load`."""
        q, packed, info = args.common.q, self.config.cu_seqlens_q, piece.info
        token_bytes = Int64(q.stride[0] if const_expr(packed) else q.stride[1]) * ELEMENT_BYTES
        head_bytes = Int64(q.stride[-2]) * ELEMENT_BYTES
        start = q.iterator.toint()
        if const_expr(packed):
            start = start + token_bytes * info.offset_q
        else:
            start = start + Int64(piece.batch) * (Int64(q.stride[0]) * ELEMENT_BYTES)

        def address(row):
            place = row_place(piece, gqa_ratio, row)
            return start + token_bytes * place.query + head_bytes * place.head, place.counts

        return address

    @cute.jit
    def store(self, args: SplitArguments, smem: SplitTiles, piece: Piece, gqa_ratio: Int32):
        """Merge the warps' parts and write them: to O and LSE, or to scratch memory where other CTAs have parts of the
        tile."""
        c, store_row, tidx = self.config, self.store_row, cute.arch.thread_idx()[0]
        chunks = c.head_dim_v // COLUMNS
        for i in cutlass.range(tidx, c.tile_m * chunks, c.num_threads, unroll=1):
            store_row(args, smem, piece, gqa_ratio, i // chunks, i % chunks)
        cute.arch.sync_threads()  # the next piece's queries and keys take the place of the parts

    @cute.jit
    def store_row(
        self, args: SplitArguments, smem: SplitTiles, piece: Piece, gqa_ratio: Int32, row: Int32, chunk: Int32
    ):
        """A chunk of a row of the tile."""
        c, store_out, store_part = self.config, self.store_out, self.store_part
        out, lses = merged_parts(c, smem.merge)
        place = row_place(piece, gqa_ratio, row)
        if place.exists:
            sink, column = None, chunk * COLUMNS
            if const_expr(c.learnable_sink):
                sink = args.common.learnable_sink[place.head]
            sink_of_warps = None
            if const_expr(c.learnable_sink and not c.batch_invariant):  # added once, where parts are merged if any
                sink_of_warps = cutlass.select_(piece.whole, sink, -Float32.inf)
            lse = merged_lse(lses, row, c.tile_m, c.key_warps, sink_of_warps)
            values = merge_parts(out, lses, row, c.tile_m, c.key_warps, lse, column)
            if const_expr(c.batch_invariant):
                if (args.grid.parts == 1) & place.counts:
                    columns = [column + i for i in range(COLUMNS)]
                    lse = fold_chunk(args.parts, piece, row, columns, values, lse, sink)
            if piece.whole:
                store_out(args, piece, place, values, lse, chunk)
            elif place.counts:
                store_part(args, piece.slot, row, values, lse, chunk)

    @cute.jit
    def store_out(self, args: SplitArguments, piece: Piece, place: RowPlace, values, lse: Float32, chunk: Int32):
        """A chunk of a row of O, and its LSE; of one that does not count 0 and −inf."""
        if not place.counts:
            values.fill(0.0)
        if chunk == 0:
            lse_row(args.common, piece, place)[place.query] = lse if place.counts else -Float32.inf
        store_chunk(values, out_row(args.common, piece, place), chunk, self.dtype)

    @cute.jit
    def store_part(self, args: SplitArguments, slot: Int32, row: Int32, values, lse: Float32, chunk: Int32):
        """A chunk of a row of the CTA's part of a tile, and its LSE."""
        if chunk == 0:
            args.parts.lse[slot, row] = lse
        # of chunks one after the other the next one reads all; rows without keys so far are 0
        if (lse != -Float32.inf) | self.config.batch_invariant:
            for i in cutlass.range_constexpr(COLUMNS):
                args.parts.out[slot, row, chunk * COLUMNS + i] = values[i]

    def smem_tiles(self) -> SplitTiles:
        c = self.config
        layout = cute.make_layout(c.smem_bytes // ELEMENT_BYTES)
        memory = SmemAllocator().allocate_tensor(self.dtype, layout, SMEM_ALIGNMENT).iterator
        columns, columns_v = (
            columns * c.dtype_k.bytes // ELEMENT_BYTES for columns in (c.head_dim_padded, c.head_dim_v_padded)
        )
        k = memory + c.tile_m * c.head_dim_padded
        v = k + c.stages * c.tile_n * columns
        factors = None
        if const_expr(c.scales_rows):
            start = memory + (c.smem_bytes - c.factor_bytes) // ELEMENT_BYTES
            factors = cute.make_tensor(cute.recast_ptr(start, dtype=Float32), cute.make_layout(c.tile_m))
        blocks = cute.make_layout((c.tile_n, c.stages))
        of_rows, descales = cute.recast_ptr(v + c.stages * c.tile_n * columns_v, dtype=Float32), []
        for used in (c.k_row_descale, c.v_row_descale):
            descales.append(cute.make_tensor(of_rows, blocks) if const_expr(used) else None)
            of_rows = of_rows + used * cute.size(blocks)
        return SplitTiles(
            q=SmemTile(memory, c.tile_m, c.head_dim_padded),
            k=SmemTile(k, c.tile_n, columns),
            v=SmemTile(v, c.tile_n, columns_v),
            merge=cute.recast_ptr(memory, dtype=Float32),
            factors=factors,
            descales=tuple(descales),
        )


def build(config: Fa2SplitConfig):
    """The callable and its fake arguments for ``cute.compile``."""
    stream = cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True)
    return Fa2SplitKernel(config), (SplitArguments.fakes(config), stream)
