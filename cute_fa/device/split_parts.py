"""Parts of tiles whose key blocks several CTAs share (:mod:`cute_fa.device.split_walk`), and the kernel that merges
them: LSE = log Σ exp(LSE_p), O = Σ exp(LSE_p − LSE)·O_p.

Of an even cut CTAs have each cut between two shares, and merge where it is the first in a tile; of tiles in parts they
have each tile. They find it as the others did.
"""

from typing import NamedTuple, Optional

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr

from cute_fa.device.arguments import CommonArguments
from cute_fa.device.dtypes import CUTE_DTYPE
from cute_fa.device.heads import head_row
from cute_fa.device.score import LOG2_E
from cute_fa.device.seqlen import SeqlenInfo
from cute_fa.device.softmax import finite
from cute_fa.device.split_walk import EVEN_SLOTS, Piece, SplitGrid, SplitWalk

COLUMNS = 8  # of O that a thread merges at a time: 16 bytes of fp16 or bf16
ROWS = 16  # of a tile that a CTA merges
THREADS = 128


class Parts(NamedTuple):
    """fp32, in scratch memory: ``out`` (slots, tile_m, head_dim_v) normalised, unwritten where ``lse`` (slots, tile_m)
    is −inf; of rows that are no queries, or none that count, both are unwritten."""

    out: cute.Tensor
    lse: cute.Tensor


class RowPlace(NamedTuple):
    """Where a row of a tile lies in O and LSE. ``exists``: whether it is a query of the sequence at all; ``counts``:
    whether it is one that counts, the others get 0 and −inf."""

    query: Int32
    head: Int32
    exists: cutlass.Boolean
    counts: cutlass.Boolean


def row_place(piece: Piece, gqa_ratio: Int32, row: Int32) -> RowPlace:
    """Of a row of the tile."""
    query, head = (piece.first_row + row) // gqa_ratio, (piece.first_row + row) % gqa_ratio
    info: SeqlenInfo = piece.info
    return RowPlace(query, piece.head * gqa_ratio + head, query < info.rows_q, query < info.seqlen_q)


def out_row(common: CommonArguments, piece: Piece, place: RowPlace) -> cute.Tensor:
    """O (head_dim_v) of a row."""
    if const_expr(common.lengths.cu_seqlens_q is not None):
        return common.out[piece.info.offset_q + place.query, place.head, None]
    return common.out[piece.batch, place.query, place.head, None]


def lse_row(common: CommonArguments, piece: Piece, place: RowPlace) -> cute.Tensor:
    """LSE (queries) of a row's head."""
    packed = common.lengths.cu_seqlens_q is not None
    return head_row(common.lse, place.head, piece.batch, piece.info.offset_q, packed)


def store_chunk(values: cute.Tensor, row: cute.Tensor, chunk: Int32, dtype):
    """COLUMNS columns of a row of O, 16 bytes."""
    narrowed = cute.make_rmem_tensor(COLUMNS, dtype)
    narrowed.store(values.load().to(dtype))
    copy = cute.make_copy_atom(cute.nvgpu.CopyUniversalOp(), dtype, num_bits_per_copy=128)
    cute.copy(copy, narrowed, cute.local_tile(row, (COLUMNS,), (chunk,)))


class CombineKernel:
    """A grid of (``merges``, tile_m / ROWS)."""

    def __init__(self, config):
        """``config``: of the first kernel, with tile_m, tile_n, least_blocks, head_dim_v and out_dtype."""
        self.config = config
        self.dtype = CUTE_DTYPE[config.out_dtype]

    @cute.kernel
    def kernel(self, common: CommonArguments, parts: Parts, grid: SplitGrid):
        """ROWS rows of a tile, if there are so many tiles, or cuts."""
        index, row_block, _ = cute.arch.block_idx()
        walk = SplitWalk(self.config, common, grid)
        if const_expr(grid.parts is not None):
            merge, last = self.merge_tile, walk.total // grid.parts
        else:
            merge, last = self.merge_at_cut, walk.ctas - 1
        if index < last:
            merge(common, parts, walk, index, row_block * ROWS)

    @cute.jit
    def merge_tile(self, common: CommonArguments, parts: Parts, walk: SplitWalk, tile: Int32, first_row: Int32):
        """All parts of a tile."""
        position = tile * walk.parts
        self.merge(common, parts, walk, walk.piece(walk.at(position)), position, walk.parts, first_row)

    @cute.jit
    def merge_at_cut(self, common: CommonArguments, parts: Parts, walk: SplitWalk, cta: Int32, first_row: Int32):
        """The tile that a CTA's share ends in, if that is where it is cut first."""
        position, merge = walk.cut(cta + 1), self.merge
        piece = walk.piece(walk.at(position)._replace(stop=walk.total))
        start = position - piece.start
        first, last = walk.cta(start), walk.cta(start + piece.blocks.total - 1)
        if (piece.start > 0) & (first == cta):
            merge(common, parts, walk, piece, first, last - first + 1, first_row)

    @cute.jit
    def merge(self, common: CommonArguments, parts: Parts, walk: SplitWalk, piece: Piece, first, count, first_row):
        """ROWS rows of a tile from ``count`` parts, the first of them in slot ``first``, or by CTA ``first``."""
        store, chunks, tidx = self.store, self.config.head_dim_v // COLUMNS, cute.arch.thread_idx()[0]
        gqa_ratio, even = walk.gqa_ratio, walk.parts is None
        for i in cutlass.range(tidx, ROWS * chunks, THREADS, unroll=1):
            store(common, parts, piece, gqa_ratio, first, count, first_row + i // chunks, i % chunks, even)

    @cute.jit
    def store(
        self,
        common: CommonArguments,
        parts: Parts,
        piece: Piece,
        gqa_ratio: Int32,
        first: Int32,
        count: Int32,
        row: Int32,
        chunk: Int32,
        even: cutlass.Constexpr[bool],
    ):
        """A chunk of a row of the tile."""
        place = row_place(piece, gqa_ratio, row)
        if place.exists:
            count = cutlass.select_(place.counts, count, Int32(0))
            sink = None
            if const_expr(common.learnable_sink is not None):
                sink = common.learnable_sink[place.head]
            values, lse = self.merged(parts, first, count, row, chunk * COLUMNS, sink, even)
            if chunk == 0:
                lse_row(common, piece, place)[place.query] = lse if place.counts else -Float32.inf
            store_chunk(values, out_row(common, piece, place), chunk, self.dtype)

    @cute.jit
    def merged(
        self,
        parts: Parts,
        first: Int32,
        count: Int32,
        row: Int32,
        column: Int32,
        sink: Optional[Float32],
        even: cutlass.Constexpr[bool],
    ) -> tuple[cute.Tensor, Float32]:
        """COLUMNS columns of a row of O, and its LSE, from ``count`` parts in their order: one pass, in which the sums
        follow the largest LSE so far. The learnable sink is one more term without a value row, added once."""
        values = cute.make_rmem_tensor(COLUMNS, Float32)
        values.fill(0.0)
        reference, total = -Float32.inf, Float32(0.0)
        if const_expr(sink is not None):
            reference = sink * LOG2_E
            total = Float32(0.0) if sink == -Float32.inf else Float32(1.0)
        for part in cutlass.range(count, unroll=2):
            slot = first + part
            if const_expr(even):  # the beginning of a tile lies in a CTA's second slot
                slot = EVEN_SLOTS * slot + cutlass.select_(part == 0, Int32(1), Int32(0))
            lse = parts.lse[slot, row] * LOG2_E
            if lse != -Float32.inf:
                moved = cute.arch.fmax(reference, lse)
                factor = cute.math.exp2(reference - moved, fastmath=True)
                weight = cute.math.exp2(lse - moved, fastmath=True)
                for i in cutlass.range_constexpr(COLUMNS):
                    values[i] = values[i] * factor + weight * parts.out[slot, row, column + i]
                total = total * factor + weight
                reference = moved
        scale = Float32(0.0) if total == 0.0 else cute.arch.rcp_approx(total)
        for i in cutlass.range_constexpr(COLUMNS):
            values[i] = values[i] * scale
        lse = -Float32.inf if total == 0.0 else finite(reference) + cute.math.log2(total, fastmath=True)
        return values, lse / LOG2_E
