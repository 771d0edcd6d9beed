"""The producer warp that brings rows of Q into shared memory: they lie anywhere, a few for each kv head."""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Uint32, const_expr

from cute_fa.device.chunk_walk import make_walk
from cute_fa.device.dtypes import CUTE_DTYPE
from cute_fa.device.registers import narrow_pair
from cute_fa.device.ring import Ring, ring_next, ring_start
from cute_fa.device.split_arguments import SplitArguments
from cute_fa.device.split_parts import row_place
from cute_fa.device.split_walk import Piece
from fa3_sm90.common.products import tiles
from fa3_sm90.common.wgmma import WGMMA_M
from fa3_sm90.decode.config import Fa3DecodeConfig
from fa3_sm90.decode.storage import Storage

_CHUNK = 8  # elements, 16 bytes
# A scaled row's largest element is between 2^14 and 2^15: fp16 ends at 2^16, and holds multiples of 2^-24.
_TOP = 14
_BIAS = 127  # of the exponent of fp32


class QueryLoader:
    """One warp: the rows of a tile's queries, of all query heads of the kv head. A row has a power of two of lanes,
    each of which brings 16 bytes."""

    def __init__(self, config: Fa3DecodeConfig, args: SplitArguments, storage: Storage, ring: Ring):
        c = config
        self.config, self.args, self.ring = c, args, ring
        self.dtype, self.product_dtype = CUTE_DTYPE[c.dtype], CUTE_DTYPE[c.product_dtype]
        self.tiles = tiles(storage.q, self.product_dtype, WGMMA_M, c.head_dim_padded, c.row_groups)
        self.factors = None
        if const_expr(c.scales_rows):
            self.factors = cute.make_tensor(storage.row_factors, cute.make_layout(c.tile_m))
        self.lanes = 1 << (c.head_dim_padded // _CHUNK - 1).bit_length()  # of a row

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
        """The lane's 16 bytes of a row."""
        c, place = self.config, row_place(piece, gqa_ratio, row)
        copy = cute.make_copy_atom(cute.nvgpu.CopyUniversalOp(), self.dtype, num_bits_per_copy=128)
        values = cute.make_rmem_tensor(_CHUNK, self.dtype)
        values.fill(0)
        if place.counts & (chunk * _CHUNK < c.head_dim):
            q = self.args.common.q
            if const_expr(c.cu_seqlens_q):
                source = q[piece.info.offset_q + place.query, place.head, None]
            else:
                source = q[piece.batch, place.query, place.head, None]
            cute.copy(copy, cute.local_tile(source, (_CHUNK,), (chunk,)), values)
        if const_expr(c.scales_rows):
            values = self.scaled(values, row, chunk)
            copy = cute.make_copy_atom(cute.nvgpu.CopyUniversalOp(), self.product_dtype, num_bits_per_copy=128)
        if chunk * _CHUNK < c.head_dim_padded:
            target = self.tiles[row % WGMMA_M, None, row // WGMMA_M]
            cute.copy(copy, values, cute.local_tile(target, (_CHUNK,), (chunk,)))

    @cute.jit
    def scaled(self, values: cute.Tensor, row: Int32, chunk: Int32) -> cute.Tensor:
        """The same in fp16, but for a power of two of the row: elements down to 2^-28 of its largest keep all digits of
        bf16, and all are exact to 2^-38 of it."""
        largest, factors = Float32(0.0), self.factors
        for i in cutlass.range_constexpr(_CHUNK):
            largest = cute.arch.fmax(largest, cute.math.absf(Float32(values[i])))
        for step in cutlass.range_constexpr(self.lanes.bit_length() - 1):
            largest = cute.arch.fmax(largest, cute.arch.shuffle_sync_bfly(largest, offset=1 << step))
        # its exponent with the bias; at least what leaves room for the factor's own
        exponent = cutlass.max(_bits(largest) >> 23, _TOP + 1)
        scale = _float((2 * _BIAS + _TOP - exponent) << 23)
        if chunk == 0:
            factors[row] = _float((exponent - _TOP) << 23)
        narrowed = cute.make_rmem_tensor(_CHUNK, self.product_dtype)
        words = cute.recast_tensor(narrowed, Uint32)
        for i in cutlass.range_constexpr(_CHUNK // 2):
            pair = (Float32(values[2 * i + j]) * scale for j in range(2))
            words[i] = narrow_pair(*pair, self.product_dtype)
        return narrowed


def _bits(value: Float32) -> Int32:
    return value.bitcast(Int32)


def _float(bits: Int32) -> Float32:
    return bits.bitcast(Float32)
