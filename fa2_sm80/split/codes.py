"""Caches of codes: these lie in shared memory as they came, and widen to fp16 on their way from ldmatrix to products.

ldmatrix moves elements of 16 bits, here two codes: a tile of codes is one of half as many columns. What a lane gets of
a row are four codes next to each other where the operands of m16n8k16 want two and two, eight apart. For K that is
another order of head_dim, in which Q lies in shared memory, too; for V, whose codes are those of two columns and two
keys, another order of O's columns (:func:`output_columns`).
"""

from typing import Optional

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Uint32, const_expr
from cutlass.cute.arch import inline_ptx

from cute_fa.device.arguments import CommonArguments
from cute_fa.device.dtypes import CUTE_DTYPE
from cute_fa.device.query_rows import QUERY_CHUNK, lanes_of_row, query_chunk, scaled_row, widened_chunk
from cute_fa.device.registers import SHIFTED_FACTOR, widen_codes
from cute_fa.device.split_parts import row_place
from cute_fa.device.split_walk import Piece
from fa2_sm80.common.copies import CHUNK, FragmentLoader, SmemTile
from fa2_sm80.split.config import CODE_COLUMNS, Fa2SplitConfig


class CodeLoader:
    """In the place of a :class:`FragmentLoader` for a tile of codes: operands B in fp16 of K, or of V (``transpose``).

    Blocks of 16 columns are asked for in pairs, the one of the lower columns first: both come from one ldmatrix."""

    def __init__(self, loader: FragmentLoader, dtype, shifted: bool):
        """``loader``: of the tile; ``shifted``: how codes of e4m3 widen, see
        :func:`cute_fa.device.registers.widen_codes`."""
        self.loader, self.dtype, self.shifted = loader, dtype, shifted
        self.upper: dict[tuple[int, int], list[Uint32]] = {}  # words of upper columns, by row and pair of blocks

    def load(self, fragment: cute.Tensor, index: int, row: int, column: int, stage: Int32):
        """The block at static (row, column), multiples of 16, into 32-bit registers index … index + 3."""
        place = row, column // CODE_COLUMNS
        if column % CODE_COLUMNS:
            words = self.upper.pop(place)
        else:
            four = cute.make_rmem_tensor(4, Uint32)
            self.loader.load(four, 0, row, column // 2, stage)
            lower, upper = ((0, 1), (2, 3)) if self.loader.transpose else ((0, 2), (1, 3))
            words, self.upper[place] = [four[i] for i in lower], [four[i] for i in upper]
        first, second = (widen_codes(word, self.dtype, self.loader.transpose, self.shifted) for word in words)
        # of eight columns the two halves of the depth, then those of the next eight
        registers = zip(first, second, strict=True) if self.loader.transpose else (first, second)
        for i, register in enumerate(register for pair in registers for register in pair):
            fragment[index + i] = register


def sum_factor(descale: Optional[Float32], shifted: int) -> Optional[Float32]:
    """What sums of products are to be multiplied by, or None. ``shifted``: how many of a product's factors are codes
    that are 1 / SHIFTED_FACTOR of what they should be."""
    if not shifted:
        return descale
    factor = SHIFTED_FACTOR**shifted
    return Float32(factor) if descale is None else descale * factor


def output_columns(block: int, lane: Int32) -> list[Int32]:
    """Columns of O that a thread has in a block of 8 columns of the accumulator, where V are codes."""
    first = block // 2 * 16 + lane % 4 * 4 + block % 2
    return [first, first + 2]


class QueryRows:
    """Q of a tile into shared memory, in fp16 and the order of head_dim that keys in codes have: of 16 elements the
    pairs 0, 2, 4, 6, then 1, 3, 5, 7."""

    def __init__(self, config: Fa2SplitConfig, smem: SmemTile, factors: cute.Tensor, tidx: Int32):
        """``factors`` (tile_m): what rows are divided by, where they are (``scales_rows``)."""
        c = config
        self.config, self.smem, self.factors = c, smem, factors
        self.dtype, self.lanes = CUTE_DTYPE[c.product_dtype], lanes_of_row(c.head_dim_padded)
        self.row, self.chunk = tidx // self.lanes, tidx % self.lanes

    @cute.jit
    def load(self, common: CommonArguments, piece: Piece, gqa_ratio: Int32):
        """All rows; zeros where there is no query that counts."""
        c, load_row, step = self.config, self.load_row, self.config.num_threads // self.lanes
        for first in cutlass.range(0, c.tile_m, step, unroll=4):
            if const_expr(c.tile_m % step):
                if first + self.row < c.tile_m:
                    load_row(common, piece, gqa_ratio, first + self.row)
            else:
                load_row(common, piece, gqa_ratio, first + self.row)

    @cute.jit
    def load_row(self, common: CommonArguments, piece: Piece, gqa_ratio: Int32, row: Int32):
        """The lane's chunk of a row."""
        c, factors, store = self.config, self.factors, self.store
        values = query_chunk(common, piece, row_place(piece, gqa_ratio, row), self.chunk, c.head_dim)
        if const_expr(c.dtype.is_fp8):
            values = widened_chunk(values, self.dtype, c.shifts_queries)
        if const_expr(c.scales_rows):
            values, factor = scaled_row(values, self.lanes, self.dtype)
            if self.chunk == 0:
                factors[row] = factor
        if self.chunk * QUERY_CHUNK < c.head_dim_padded:
            store(values, row)

    def store(self, values: cute.Tensor, row: Int32):
        """Two pairs each to both halves of 16 elements."""
        smem, pairs = self.smem, cute.recast_tensor(values, Uint32)
        first, half = self.chunk // 2 * 2, self.chunk % 2
        panel, inside = first * CHUNK // smem.panel, first % (smem.panel // CHUNK)
        start = smem.pointer.toint() + panel * smem.panel_bytes + half * 8
        for i in range(2):
            inline_ptx(
                "st.shared.v2.b32 [{$r0}], {{$r1}, {$r2}};",
                read_only_args=[start + smem.offset(row, inside + i), pairs[i], pairs[2 + i]],
            )
