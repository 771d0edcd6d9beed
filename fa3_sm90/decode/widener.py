"""Producer warps that widen fp8 codes of keys and values to fp16, from TMA's tiles into those of wgmma.

wgmma takes both operands in one type, and of 16 bits V as it lies. Every code of e4m3 and of e5m2 is a number of fp16:
descales are factors of the sums, in fp32. Half of the bytes cross from memory.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Uint32

from cute_fa.device.dtypes import CUTE_DTYPE
from cute_fa.device.registers import widen_codes
from cute_fa.device.ring import Ring, RingState, ring_next, ring_start
from cute_fa.device.split_arguments import SplitArguments
from cute_fa.device.split_walk import SplitWalk
from fa3_sm90.common.products import tiles
from fa3_sm90.decode.config import WIDENERS, Fa3DecodeConfig
from fa3_sm90.decode.storage import Storage

_CODES = 16  # that a lane widens at a time, 16 bytes
_ROW_LANES = 4  # neighbours in a row: with the next row's four, their stores meet all banks once


class Widening:
    """Codes of K or V in one tile to numbers in another; each warp has every other pair of 8 rows."""

    def __init__(self, config: Fa3DecodeConfig, storage: Storage, rings: dict[str, Ring], name: str, index: int):
        """``name``: "k" or "v"; ``index``: which of the warps."""
        c = config
        self.config, self.index = c, index
        self.codes, self.numbers = rings[f"{name}_codes"], rings[name]
        column = "kv".index(name)
        dtype, self.columns = (c.dtype_k, c.dtype_v)[column], (c.head_dim_padded, c.value_columns)[column]
        self.dtype, self.product_dtype = CUTE_DTYPE[dtype], CUTE_DTYPE[c.product_dtype]
        codes = getattr(storage, f"{name}_codes")
        self.source = tiles(codes, self.dtype, c.tile_n, c.code_columns[column], c.code_stages)
        self.target = tiles(getattr(storage, name), self.product_dtype, c.tile_n, self.columns, c.stages)

    @cute.jit
    def widen(self, before: RingState, behind: RingState):
        """The block at ``before`` of the codes' ring, to ``behind`` of the numbers'."""
        lane = cute.arch.lane_idx()
        self.codes.wait(before)
        self.numbers.wait_free(behind)
        source, target = self.source[None, None, before.stage], self.target[None, None, behind.stage]
        rows = 32 // _ROW_LANES
        for first_row in cutlass.range_constexpr(self.index * rows, self.config.tile_n, WIDENERS * rows):
            for first in cutlass.range_constexpr(0, self.columns // _CODES, _ROW_LANES):
                self.widen_chunk(source, target, first_row + lane // _ROW_LANES, first + lane % _ROW_LANES)
        self.numbers.publish(behind.stage)
        self.codes.release(before.stage)

    @cute.jit
    def widen_chunk(self, source: cute.Tensor, target: cute.Tensor, row: Int32, chunk: Int32):
        """The lane's 16 codes of a row."""
        load = cute.make_copy_atom(cute.nvgpu.CopyUniversalOp(), self.dtype, num_bits_per_copy=128)
        store = cute.make_copy_atom(cute.nvgpu.CopyUniversalOp(), self.product_dtype, num_bits_per_copy=128)
        if chunk < self.columns // _CODES:
            codes = cute.make_rmem_tensor(_CODES, self.dtype)
            numbers = cute.make_rmem_tensor((_CODES // 2, 2), self.product_dtype)
            cute.copy(load, cute.local_tile(source[row, None], (_CODES,), (chunk,)), codes)
            words, pairs = cute.recast_tensor(codes, Uint32), cute.recast_tensor(numbers, Uint32)
            for i in cutlass.range_constexpr(_CODES // 4):
                pairs[2 * i], pairs[2 * i + 1] = widen_codes(words[i], self.dtype)
            for half in cutlass.range_constexpr(2):
                place = cute.local_tile(target[row, None], (_CODES // 2,), (2 * chunk + half,))
                cute.copy(store, numbers[None, half], place)


class Widener:
    """One warp."""

    def __init__(
        self, config: Fa3DecodeConfig, args: SplitArguments, storage: Storage, rings: dict[str, Ring], index: int
    ):
        """``index``: which of the widening warps."""
        self.config, self.args = config, args
        self.tensors = [Widening(config, storage, rings, name, index) for name in "kv"]

    @cute.jit
    def run(self):
        """Walk over the CTA's share."""
        c, walk = self.config, SplitWalk(self.config, self.args.common, self.args.grid)
        valid, piece_at, advance = walk.valid, walk.piece, walk.next
        widen = [tensor.widen for tensor in self.tensors]
        before, behind = ring_start(), ring_start()
        state = walk.first(cute.arch.block_idx()[0])
        while valid(state):
            piece = piece_at(state)
            for _ in cutlass.range(piece.start, piece.stop, unroll=1):
                for of_tensor in widen:
                    of_tensor(before, behind)
                before, behind = ring_next(before, c.code_stages), ring_next(behind, c.stages)
            state = advance(state, piece)
