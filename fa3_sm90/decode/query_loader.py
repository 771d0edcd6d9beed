"""The producer warp that brings rows of Q into shared memory: they lie anywhere, a few for each kv head."""

import cutlass
import cutlass.cute as cute
from cutlass import Int32, const_expr

from cute_fa.device.chunk_walk import make_walk
from cute_fa.device.dtypes import CUTE_DTYPE
from cute_fa.device.query_rows import QUERY_CHUNK, lanes_of_row, query_chunk, scaled_row, widened_chunk
from cute_fa.device.ring import Ring, ring_next, ring_start
from cute_fa.device.split_arguments import SplitArguments
from cute_fa.device.split_parts import row_place
from cute_fa.device.split_walk import Piece
from fa3_sm90.common.products import tiles
from fa3_sm90.common.wgmma import WGMMA_M
from fa3_sm90.decode.config import Fa3DecodeConfig
from fa3_sm90.decode.storage import Storage


class QueryLoader:
    """One warp: the rows of a tile's queries, of all query heads of the kv head. A row has a power of two of lanes,
    each of which brings QUERY_CHUNK elements."""

    def __init__(self, config: Fa3DecodeConfig, args: SplitArguments, storage: Storage, ring: Ring):
        c = config
        self.config, self.args, self.ring = c, args, ring
        self.product_dtype = CUTE_DTYPE[c.product_dtype]
        self.tiles = tiles(storage.q, self.product_dtype, WGMMA_M, c.head_dim_padded, c.row_groups)
        self.factors = None
        if const_expr(c.scales_rows):
            self.factors = cute.make_tensor(storage.row_factors, cute.make_layout(c.tile_m))
        self.lanes = lanes_of_row(c.head_dim_padded)

    @cute.jit
    def run(self):
        """Walk over the CTA's share."""
        walk = make_walk(self.config, self.args.common, self.args.grid)
        valid, piece_at, advance = walk.valid, walk.piece, walk.next
        load_rows, gqa_ratio = self.load_rows, walk.gqa_ratio
        # wgmma reads them behind a fence, ldmatrix needs none
        hand_on = self.ring.signal if const_expr(self.config.queries_in_registers) else self.ring.publish
        wait_free = self.ring.wait_free
        queries = ring_start()
        state = walk.first(cute.arch.block_idx()[0])
        while valid(state):
            piece = piece_at(state)
            wait_free(queries)
            load_rows(piece, gqa_ratio)
            hand_on(queries.stage)
            queries = ring_next(queries, 1)
            state = advance(state, piece)

    @cute.jit
    def load_rows(self, piece: Piece, gqa_ratio: Int32):
        """Rows of those warps that have any, zeros where there is no query that counts. What the other rows hold is not
        looked at."""
        c, load_row, at_a_time = self.config, self.load_row, 32 // self.lanes
        rows = cutlass.min(c.tile_m, (piece.info.rows_q * gqa_ratio - piece.first_row + 15) // 16 * 16)
        for first in cutlass.range(0, rows, at_a_time, unroll=4):
            load_row(piece, gqa_ratio, first + cute.arch.lane_idx() // self.lanes, cute.arch.lane_idx() % self.lanes)

    @cute.jit
    def load_row(self, piece: Piece, gqa_ratio: Int32, row: Int32, chunk: Int32):
        """The lane's chunk of a row."""
        c, factors = self.config, self.factors
        values = query_chunk(self.args.common, piece, row_place(piece, gqa_ratio, row), chunk, c.head_dim)
        if const_expr(c.dtype.is_fp8):
            values = widened_chunk(values, self.product_dtype)
        if const_expr(c.scales_rows):
            values, factor = scaled_row(values, self.lanes, self.product_dtype)
            if chunk == 0:
                factors[row] = factor
        copy = cute.make_copy_atom(cute.nvgpu.CopyUniversalOp(), self.product_dtype, num_bits_per_copy=128)
        if chunk * QUERY_CHUNK < c.head_dim_padded:
            target = self.tiles[row % WGMMA_M, None, row // WGMMA_M]
            cute.copy(copy, values, cute.local_tile(target, (QUERY_CHUNK,), (chunk,)))
