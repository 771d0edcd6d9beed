"""Parts of tiles whose key blocks several CTAs share (:mod:`cute_fa.device.split_walk`), and the kernel that merges
them: LSE = log Σ exp(LSE_p), O = Σ exp(LSE_p − LSE)·O_p.

Of an even cut CTAs have each cut between two shares, and merge where it is the first in a tile; of tiles in parts they
have each tile. They find it as the others did.

In batch-invariant mode the parts are chunks, added one after the other (:class:`Fold`) by this kernel or by the CTA
that computes them.
"""

from typing import NamedTuple, Optional

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr

from cute_fa.device.arguments import CommonArguments
from cute_fa.device.chunk_walk import ChunkState, ChunkWalk, make_walk
from cute_fa.device.dtypes import CUTE_DTYPE
from cute_fa.device.heads import head_row
from cute_fa.device.registers import placed_fma, rounded_product
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


class Fold(NamedTuple):
    """Two parts of a row become one: LSE = log(e^before + e^part), O = weights · (O of before, O of part). Every
    operation is named, so that its bits are the same in every kernel; a part without keys, whose LSE is −inf, changes
    none."""

    lse: Float32
    weights: tuple[Float32, Float32]
    adds: cutlass.Boolean

    @classmethod
    def of(cls, before: Float32, part: Float32) -> "Fold":
        """Of two LSE, natural logarithms."""
        reference = finite(cute.arch.fmax(before, part))
        terms = [cute.math.exp2((lse - reference) * LOG2_E, fastmath=True) for lse in (before, part)]
        total = terms[0] + terms[1]
        inverse, adds = cute.arch.rcp_approx(total), part != -Float32.inf
        lse = reference + rounded_product(cute.math.log2(total, fastmath=True), Float32(1 / LOG2_E))
        return cls(cutlass.select_(adds, lse, before), tuple(term * inverse for term in terms), adds)

    def value(self, before: Float32, part: Float32) -> Float32:
        """An element of O."""
        folded = placed_fma(before, self.weights[0], rounded_product(part, self.weights[1]))
        return cutlass.select_(self.adds, folded, before)


@cute.jit
def fold_chunk(
    parts: Parts,
    piece: Piece,
    row: Int32,
    columns: list[Int32],
    values: cute.Tensor,
    lse: Float32,
    sink: Optional[Float32],
) -> Float32:
    """By a CTA that computes a tile's chunks one after the other: ``values``, a row's columns ``columns`` of a chunk,
    become those of all chunks so far, in place, with the ones before, which are in the other one of the CTA's slots;
    returns the LSE. The learnable sink comes first, a part without a value row."""
    earlier, slot = piece.start > 0, piece.slot ^ 1
    before = -Float32.inf
    if const_expr(sink is not None):
        before = sink
    if earlier:
        before = parts.lse[slot, row]
    fold = Fold.of(before, lse)
    lse, value = fold.lse, fold.value
    if earlier:
        for i in cutlass.range_constexpr(len(columns)):
            values[i] = value(parts.out[slot, row, columns[i]], values[i])
    else:
        for i in cutlass.range_constexpr(len(columns)):
            values[i] = value(Float32(0.0), values[i])
    return lse


def store_chunk(values: cute.Tensor, row: cute.Tensor, chunk: Int32, dtype):
    """COLUMNS columns of a row of O, 16 bytes."""
    narrowed = cute.make_rmem_tensor(COLUMNS, dtype)
    narrowed.store(values.load().to(dtype))
    copy = cute.make_copy_atom(cute.nvgpu.CopyUniversalOp(), dtype, num_bits_per_copy=128)
    cute.copy(copy, narrowed, cute.local_tile(row, (COLUMNS,), (chunk,)))


class CombineKernel:
    """A grid of (``merges``, tile_m / ROWS)."""

    def __init__(self, config):
        """``config``: of the first kernel, with tile_m, tile_n, least_blocks, head_dim_v, out_dtype and
        batch_invariant."""
        self.config = config
        self.dtype = CUTE_DTYPE[config.out_dtype]

    @cute.kernel
    def kernel(self, common: CommonArguments, parts: Parts, grid: SplitGrid):
        """ROWS rows of a tile, if there are so many tiles, or cuts."""
        index, row_block, _ = cute.arch.block_idx()
        walk = make_walk(self.config, common, grid)
        if const_expr(self.config.batch_invariant):
            merge, some = self.merge_chunks, walk.exists(index)
        elif const_expr(grid.parts is not None):
            merge, some = self.merge_tile, index < walk.total // grid.parts
        else:
            merge, some = self.merge_at_cut, index < walk.ctas - 1
        if some:
            merge(common, parts, walk, index, row_block * ROWS)

    @cute.jit
    def merge_chunks(self, common: CommonArguments, parts: Parts, walk: ChunkWalk, tile: Int32, first_row: Int32):
        """All chunks of a tile."""
        piece = walk.piece(ChunkState(tile, Int32(0), Int32(0)))
        self.merge(common, parts, walk, piece, tile * walk.grid.parts, Int32(0), first_row)

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
        for i in cutlass.range(tidx, ROWS * chunks, THREADS, unroll=1):
            store(common, parts, walk, piece, first, count, first_row + i // chunks, i % chunks)

    @cute.jit
    def store(
        self,
        common: CommonArguments,
        parts: Parts,
        walk: SplitWalk | ChunkWalk,
        piece: Piece,
        first: Int32,
        count: Int32,
        row: Int32,
        chunk: Int32,
    ):
        """A chunk of a row of the tile."""
        place = row_place(piece, walk.gqa_ratio, row)
        if place.exists:
            sink = None
            if const_expr(common.learnable_sink is not None):
                sink = common.learnable_sink[place.head]
            if const_expr(self.config.batch_invariant):
                values, lse = self.folded(parts, walk, piece, first, row, chunk * COLUMNS, sink, place.counts)
            else:
                count = cutlass.select_(place.counts, count, Int32(0))
                values, lse = self.merged(parts, first, count, row, chunk * COLUMNS, sink, walk.parts is None)
            if chunk == 0:
                lse_row(common, piece, place)[place.query] = lse if place.counts else -Float32.inf
            store_chunk(values, out_row(common, piece, place), chunk, self.dtype)

    @cute.jit
    def folded(
        self,
        parts: Parts,
        walk: ChunkWalk,
        piece: Piece,
        first: Int32,
        row: Int32,
        column: Int32,
        sink: Optional[Float32],
        counts: cutlass.Boolean,
    ) -> tuple[cute.Tensor, Float32]:
        """COLUMNS columns of a row of O, and its LSE, from all chunks of the tile, as :func:`fold_chunk`."""
        values = cute.make_rmem_tensor(COLUMNS, Float32)
        values.fill(0.0)
        lse, iteration, chunk_of = -Float32.inf, Int32(0), walk.chunk
        if const_expr(sink is not None):
            lse = sink
        blocks = piece.blocks
        total = cutlass.select_(counts, blocks.total, Int32(0))
        while iteration < total:
            chunk, iteration = chunk_of(blocks, iteration)
            fold = Fold.of(lse, parts.lse[first + chunk, row])
            lse, value = fold.lse, fold.value
            if fold.adds:
                for i in cutlass.range_constexpr(COLUMNS):
                    values[i] = value(values[i], parts.out[first + chunk, row, column + i])
        return values, lse

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
