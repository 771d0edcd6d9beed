"""Parts of tiles whose key blocks several CTAs share (:mod:`cute_fa.device.split_walk`), and the kernel that merges
them: LSE = log Σ exp(LSE_p), O = Σ exp(LSE_p − LSE)·O_p.

A CTA leaves the end of its first tile in its first slot, the beginning of its last one in its second. Each cut between
two CTAs that lies in a tile, and is the first in it, is some CTAs' to merge; they find the tile as the others did.
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
from cute_fa.device.split_walk import PARTS, Piece, SplitWalk

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


def part_slot(piece: Piece, cta: Int32) -> Int32:
    """Where a CTA leaves its part of a tile that is not wholly its own."""
    return PARTS * cta + cutlass.select_(piece.start > 0, Int32(0), Int32(1))


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


class CombineKernel:
    """A grid of (CTAs − 1 of the first kernel, tile_m / ROWS)."""

    def __init__(self, config):
        """``config``: of the first kernel, with tile_m, tile_n, least_blocks, head_dim_v and out_dtype."""
        self.config = config
        self.dtype = CUTE_DTYPE[config.out_dtype]

    @cute.kernel
    def kernel(self, common: CommonArguments, parts: Parts, ctas: Int32):
        """A cut, and ROWS rows of the tile that it is in."""
        c, merge = self.config, self.merge
        cut, row_block, _ = cute.arch.block_idx()
        walk = SplitWalk(common, c.tile_m, c.tile_n, ctas, c.least_blocks)
        cutting = walk.ctas
        if cut + 1 < cutting:
            merge(common, parts, walk, cut, row_block * ROWS)

    @cute.jit
    def merge(self, common: CommonArguments, parts: Parts, walk: SplitWalk, cut: Int32, first_row: Int32):
        """The tile that the share of CTA ``cut`` ends in, if that is where it is cut first."""
        store, gqa_ratio, chunks = self.store, walk.gqa_ratio, self.config.head_dim_v // COLUMNS
        position, tidx = walk.cut(cut + 1), cute.arch.thread_idx()[0]
        piece = walk.piece(walk.at(position)._replace(stop=walk.total))
        start = position - piece.start
        first, last = walk.cta(start), walk.cta(start + piece.blocks.total - 1)
        if (piece.start > 0) & (first == cut):
            for i in cutlass.range(tidx, ROWS * chunks, THREADS, unroll=1):
                store(common, parts, piece, gqa_ratio, first, last, first_row + i // chunks, i % chunks)

    @cute.jit
    def store(self, common: CommonArguments, parts: Parts, piece: Piece, gqa_ratio, first, last, row, chunk):
        """Merge a chunk of a row of the tile, parts of which the CTAs from ``first`` to ``last`` have."""
        place = row_place(piece, gqa_ratio, row)
        if place.exists:
            count = cutlass.select_(place.counts, last - first + 1, Int32(0))
            sink = None
            if const_expr(common.learnable_sink is not None):
                sink = common.learnable_sink[place.head]
            values, lse = self.merged(parts, first, count, row, chunk * COLUMNS, sink)
            if chunk == 0:
                lse_row(common, piece, place)[place.query] = lse if place.counts else -Float32.inf
            narrowed = cute.make_rmem_tensor(COLUMNS, self.dtype)
            narrowed.store(values.load().to(self.dtype))
            copy = cute.make_copy_atom(cute.nvgpu.CopyUniversalOp(), self.dtype, num_bits_per_copy=128)
            cute.copy(copy, narrowed, cute.local_tile(out_row(common, piece, place), (COLUMNS,), (chunk,)))

    @cute.jit
    def merged(
        self, parts: Parts, first: Int32, count: Int32, row: Int32, column: Int32, sink: Optional[Float32]
    ) -> tuple[cute.Tensor, Float32]:
        """COLUMNS columns of a row of O, and its LSE, from ``count`` parts in their order: one pass, in which the sums
        follow the largest LSE so far. The learnable sink is one more term without a value row, added once."""
        values = cute.make_rmem_tensor(COLUMNS, Float32)
        values.fill(0.0)
        reference, total = -Float32.inf, Float32(0.0)
        if const_expr(sink is not None):
            reference = sink * LOG2_E
            total = Float32(0.0) if sink == -Float32.inf else Float32(1.0)
        for part in cutlass.range(count, unroll=4):
            slot = PARTS * (first + part) + cutlass.select_(part == 0, Int32(1), Int32(0))
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
