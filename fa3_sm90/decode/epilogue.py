"""O and LSE of a warpgroup on their way out, from registers: to the caller, or to scratch memory where other CTAs have
parts of the tile. There are few of them beside the keys that were read."""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Uint32, const_expr

from cute_fa.device.dtypes import CUTE_DTYPE
from cute_fa.device.registers import narrow_pair
from cute_fa.device.split_arguments import SplitArguments
from cute_fa.device.split_parts import RowPlace, fold_chunk, lse_row, out_row, row_place
from cute_fa.device.split_walk import Piece
from fa3_sm90.decode.config import Fa3DecodeConfig


class Epilogue:
    """Of one thread: two rows, and of every eight columns the pair from ``column`` on."""

    def __init__(self, config: Fa3DecodeConfig, args: SplitArguments, rows: list[Int32], column: Int32):
        """``rows``: of the tile."""
        self.config, self.args, self.rows, self.column = config, args, rows, column
        self.dtype = CUTE_DTYPE[config.out_dtype]

    @cute.jit
    def store(self, acc: cute.Tensor, lse: cute.Tensor, piece: Piece, gqa_ratio: Int32):
        """``acc`` (rows, columns), normalised."""
        store_out, store_part, fold = self.store_out, self.store_part, self.fold
        for r in cutlass.range_constexpr(len(self.rows)):
            place = row_place(piece, gqa_ratio, self.rows[r])
            if place.exists:
                if const_expr(self.config.batch_invariant):
                    if (self.args.grid.parts == 1) & place.counts:
                        lse[r] = fold(acc[r, None], lse[r], piece, place, self.rows[r])
                if piece.whole:
                    store_out(acc[r, None], lse[r], piece, place)
                elif place.counts:
                    store_part(acc[r, None], lse[r], piece.slot, self.rows[r])
        if const_expr(self.config.batch_invariant):
            cute.arch.sync_warp()  # the next chunk reads what four threads' first one has stored of a row

    @cute.jit
    def fold(self, row: cute.Tensor, lse: Float32, piece: Piece, place: RowPlace, index: Int32) -> Float32:
        """A row of a chunk becomes that of all chunks so far; returns the LSE."""
        blocks, sink = self.config.head_dim_v // 8, None
        columns = [8 * block + self.column + i for block in range(blocks) for i in range(2)]
        if const_expr(self.config.learnable_sink):
            sink = self.args.common.learnable_sink[place.head]
        return fold_chunk(self.args.parts, piece, index, columns, row, lse, sink)

    @cute.jit
    def store_out(self, row: cute.Tensor, lse: Float32, piece: Piece, place):
        """A row of O and its LSE; of one that does not count 0 and −inf."""
        common = self.args.common
        if not place.counts:
            row.fill(0.0)
        if self.column == 0:
            lse_row(common, piece, place)[place.query] = lse if place.counts else -Float32.inf
        target = cute.recast_tensor(out_row(common, piece, place), Uint32)
        for block in cutlass.range_constexpr(self.config.head_dim_v // 8):
            target[4 * block + self.column // 2] = narrow_pair(row[2 * block], row[2 * block + 1], self.dtype)

    @cute.jit
    def store_part(self, row: cute.Tensor, lse: Float32, slot: Int32, index: Int32):
        """A row of the CTA's part of a tile."""
        parts = self.args.parts
        if self.column == 0:
            parts.lse[slot, index] = lse
        for block in cutlass.range_constexpr(self.config.head_dim_v // 8):
            for i in cutlass.range_constexpr(2):
                parts.out[slot, index, 8 * block + self.column + i] = row[2 * block + i]
