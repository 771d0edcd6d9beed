"""Moving tiles: cp.async from global to swizzled shared memory, ldmatrix from there to registers, O back to global.

Addresses are computed here rather than by CuTe's partitioned views. A thread's place in a tile is one register, all
else immediates and XORs: with the views the compiler rebuilt every address from the thread index in each iteration, and
at head_dim 128 with 64 keys the main loop took 8.5 instructions per score and 20 spills instead of 7.8 and 9.
"""

from typing import NamedTuple, Optional

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, Uint32, const_expr
from cutlass.cute.arch import inline_ptx

from cute_fa.device.async_copies import CHUNK_BYTES, copy_async
from cute_fa.device.registers import opaque

ELEMENT_BYTES = 2
# cp.async, ldmatrix rows and the vector stores all move 16 bytes: 8 elements of fp16 or bf16.
CHUNK = CHUNK_BYTES // ELEMENT_BYTES
# Swizzles are relative to the tile, so a tile need only start at a line of all banks; every tile's size is a multiple.
SMEM_ALIGNMENT = 128


def panel_width(columns: int, *shares: int) -> int:
    """Width of a tile's panels: the widest that divides the columns and, for each of ``shares`` warps that share them,
    a warp's part, or is divided by it."""
    parts = [columns // share for share in shares]
    return next(
        width
        for width in (64, 32, 16)
        if columns % width == 0 and not any(part % width and width % part for part in parts)
    )


class SmemTile:
    """Swizzled row-major tiles (rows, columns), one per stage.

    Columns are split into panels of 64, 32 or 16, whichever divides them; a panel holds the rows one after the other,
    and XORs the 16-byte chunks of a row with the row, so that the 8 rows of an ldmatrix matrix fall in different banks.
    """

    def __init__(self, pointer: cute.Pointer, rows: int, columns: int, *shares: int):
        """``pointer``: aligned to ``SMEM_ALIGNMENT``, with room for all stages; ``columns``: a multiple of 16.
        ``shares``: numbers of warps that share the columns, one for each product."""
        self.pointer, self.rows, self.columns = pointer, rows, columns
        self.panel = panel_width(columns, *shares)
        self.panels = columns // self.panel
        self.row_bytes = self.panel * ELEMENT_BYTES
        self.panel_bytes = rows * self.row_bytes
        self.stage_bytes = self.panels * self.panel_bytes

    def offset(self, row: Int32, chunk: Int32) -> Int32:
        """Byte offset of a 16-byte chunk of the first panel."""
        # 8 rows of 128, 64 or 32 bytes fill 8, 4 or 2 lines of 128: the XOR takes the line's number
        line = row % 8 // (128 // self.row_bytes)
        return row * self.row_bytes + (chunk ^ line) * CHUNK_BYTES

    def layout(self) -> cute.ComposedLayout:
        """The first stage as a CuTe layout, for copies outside the main loop."""
        bits = {64: 3, 32: 2, 16: 1}[self.panel]
        atom = cute.make_composed_layout(
            cute.make_swizzle(bits, 3, 3), 0, cute.make_ordered_layout((8, self.panel), order=(1, 0))
        )
        return cute.tile_to_shape(atom, (self.rows, self.columns), order=(0, 1))


class SmemTiles(NamedTuple):
    """All tiles of one CTA."""

    q: SmemTile
    k: SmemTile
    v: SmemTile
    out: SmemTile


class TileLoader:
    """cp.async of row tiles of one global (rows, head_dim) matrix into a :class:`SmemTile`, zeros outside."""

    def __init__(
        self, matrix: cute.Tensor, smem: SmemTile, head_dim: int, tidx: Int32, num_threads: int, listed: bool = False
    ):
        """``listed``: tiles come in any order; a tile spans less than 2^31 bytes. Tiles one after the other need no
        product for each, others one instruction instead of 7."""
        self.smem, self.head_dim = smem, head_dim
        chunks_per_row = smem.panel // CHUNK
        self.row, self.chunk = tidx // chunks_per_row, tidx % chunks_per_row
        self.rows_per_pass = num_threads // chunks_per_row
        row_bytes = Int64(matrix.stride[0]) * ELEMENT_BYTES
        self.block_bytes = row_bytes * smem.rows
        if listed:
            self.block_bytes = opaque(Int32(self.block_bytes))
        self.pass_bytes = row_bytes * self.rows_per_pass
        start = matrix.iterator.toint() + self.row * row_bytes + self.chunk * CHUNK_BYTES
        self.source = opaque(start)
        self.target = opaque(smem.pointer.toint() + smem.offset(self.row, self.chunk))

    @cute.jit
    def load(self, block: Int32, stage: Int32, rows_left: Optional[Int32]):
        """Issue the copies of tile ``block``. ``rows_left``: rows of the matrix from the tile's first one on; rows
        beyond are zero-filled, never read. None: all rows of the tile are inside."""
        self.load_from(self.source + block_offset(block, self.block_bytes), stage, rows_left)

    @cute.jit
    def load_from(self, source: Int64, stage: Int32, rows_left: Optional[Int32]):
        """The same for the tile whose copies by this thread begin at address ``source``."""
        for first_row in cutlass.range_constexpr(0, self.smem.rows, self.rows_per_pass):
            if const_expr(first_row + self.rows_per_pass > self.smem.rows):
                # a pass of all threads covers more rows than are left
                if self.row + first_row < self.smem.rows:
                    self._load_row(source, first_row, stage, rows_left)
            else:
                self._load_row(source, first_row, stage, rows_left)
            source = source + self.pass_bytes

    def _load_row(self, source: Int64, first_row: int, stage: Int32, rows_left: Optional[Int32]):
        smem = self.smem
        target = self.target + stage * smem.stage_bytes
        for panel in range(smem.panels):
            inside = None
            if rows_left is not None:
                inside = self.row + first_row < rows_left
            if (panel + 1) * smem.panel > self.head_dim:
                column_inside = self.chunk * CHUNK < self.head_dim - panel * smem.panel
                inside = column_inside if inside is None else inside & column_inside
            offset = first_row * smem.row_bytes + panel * smem.panel_bytes
            copy_async(target, offset, source, panel * smem.row_bytes, inside)


def block_offset(block: Int32, block_bytes: Int64 | Int32) -> Int64:
    """Where a block lies behind the first."""
    return Int64(block_bytes) * Int64(block)


class ColumnPart(NamedTuple):
    """One warp's part of the columns of a :class:`SmemTile`: where it begins, the same for all lanes of the warp, and
    how many there are."""

    start: Int32
    columns: int

    def place(self, smem: SmemTile, lanes: Int32) -> tuple[Int32, Int32]:
        """The lane's part of an address and the warp's, for the part of the columns."""
        if self.columns % smem.panel:
            lanes = lanes ^ (self.start % smem.panel * ELEMENT_BYTES)
        return lanes, self.start // smem.panel * smem.panel_bytes


class FragmentLoader:
    """ldmatrix.x4 of 16×16 blocks of a :class:`SmemTile`. The four matrices reach the registers in the order of the
    m16n8k16 operands: rows first (operand A, and V as operand B through .trans) or columns first (K as operand B).

    An address is a part of the lane, ``lanes``, which loaders of the same order and panel share, plus what all lanes of
    the warp agree on.
    """

    def __init__(
        self,
        smem: SmemTile,
        lanes: Int32,
        first_row: Int32,
        transpose: bool = False,
        part: Optional[ColumnPart] = None,
    ):
        """``lanes`` from :func:`lane_offset`; ``first_row``: a multiple of 16, the same for all lanes of a warp;
        ``part``: of the columns (None: all of them)."""
        self.smem, self.lanes, self.transpose = smem, lanes, transpose
        self.start = smem.pointer.toint() + first_row * smem.row_bytes
        if part is not None:
            self.lanes, offset = part.place(smem, lanes)
            self.start = self.start + offset

    def load(self, fragment: cute.Tensor, index: int, row: int, column: int, stage: Int32):
        """The block at static (row, column), multiples of 16, into 32-bit registers index … index + 3."""
        smem = self.smem
        panel, inside = column // smem.panel, column % smem.panel
        offset = row * smem.row_bytes + panel * smem.panel_bytes
        # a step of 16 columns flips chunk bits above the swizzled lowest one, so it is an XOR on the address
        address = (self.lanes ^ (inside * ELEMENT_BYTES)) + (self.start + stage * smem.stage_bytes)
        form = ".trans.shared.b16" if self.transpose else ".shared.b16"
        registers = inline_ptx(
            "ldmatrix.sync.aligned.m8n8.x4" + form + " {{$w0}, {$w1}, {$w2}, {$w3}}, [{$r0}+" + str(offset) + "];",
            write_only_types=[Uint32] * 4,
            read_only_args=[address],
        )
        for i, register in enumerate(registers):
            fragment[index + i] = register


class FragmentStore:
    """Stores accumulators, narrowed to 16 bits, to :class:`SmemTile` s: 4 bytes a lane, 8 rows of 16 bytes a warp."""

    def __init__(self, smem: SmemTile, first_row: Int32, part: Optional[ColumnPart] = None):
        """``first_row``: a multiple of 16, the same for all lanes of a warp; ``part``: of the columns. ``smem``: the
        tile stored to, or one of those that have its rows and columns."""
        lane = cute.arch.lane_idx()
        place, self.offset = smem.offset(lane // 4, 0) + lane % 4 * 4, first_row * smem.row_bytes
        if part is not None:
            place, offset = part.place(smem, place)
            self.offset = self.offset + offset
        self.lanes = opaque(place)

    def store(self, smem: SmemTile, fragment: cute.Tensor, anew: bool = False):
        """``fragment``: ((2, 2), MMA_M, MMA_N) of 16-bit elements, see ``cute_fa.device.fragments``. ``anew``: compute
        addresses here instead of keeping them in registers over a loop."""
        start = smem.pointer.toint() + self.offset
        lanes = opaque(self.lanes) if anew else self.lanes
        pairs = cute.recast_tensor(fragment, Uint32)
        rows, columns = fragment.shape[1], fragment.shape[2]
        for n in range(columns):
            panel, inside = 8 * n // smem.panel, 8 * n % smem.panel
            address = (lanes ^ (inside * ELEMENT_BYTES)) + start
            for m in range(rows):
                for half in range(2):
                    offset = (16 * m + 8 * half) * smem.row_bytes + panel * smem.panel_bytes
                    inline_ptx(
                        f"st.shared.b32 [{{$r0}}+{offset}], {{$r1}};",
                        read_only_args=[address, pairs[half + 2 * (m + rows * n)]],
                    )


def lane_offset(smem: SmemTile, rows_first: bool) -> Int32:
    """Where a lane's row of a 16×16 block lies, relative to the block, in the order of :class:`FragmentLoader`."""
    lane = cute.arch.lane_idx()
    if const_expr(rows_first):
        row, chunk = lane % 16, lane // 16
    else:
        row, chunk = lane % 8 + lane // 16 * 8, lane // 8 % 2
    return opaque(smem.offset(row, chunk))


@cute.jit
def store_tile(
    smem: SmemTile,
    matrix: cute.Tensor,
    block: Int32,
    rows_left: Int32,
    head_dim: cutlass.Constexpr[int],
    tidx: Int32,
    num_threads: cutlass.Constexpr[int],
):
    """Shared tile → rows of ``matrix`` (rows, head_dim), 16 bytes a thread; only ``rows_left`` rows are written."""
    chunks_per_row = smem.panel // CHUNK
    tile = (smem.rows, smem.columns)
    atom = cute.make_copy_atom(cute.nvgpu.CopyUniversalOp(), matrix.element_type, num_bits_per_copy=8 * CHUNK_BYTES)
    threads = cute.make_ordered_layout((num_threads // chunks_per_row, chunks_per_row), order=(1, 0))
    copy = cute.make_tiled_copy_tv(atom, threads, cute.make_layout((1, CHUNK)))
    thread = copy.get_slice(tidx)
    source = thread.partition_S(cute.make_tensor(smem.pointer, smem.layout()))
    target = thread.partition_D(cute.local_tile(matrix, tile, (block, 0)))
    coordinates = thread.partition_S(cute.make_identity_tensor(tile))
    for p in cutlass.range_constexpr(cute.size(source, mode=[1])):
        for c in cutlass.range_constexpr(cute.size(source, mode=[2])):
            row, column = coordinates[0, p, c]
            if row < cutlass.min(rows_left, smem.rows) and column < head_dim:
                cute.copy(copy, source[None, p, c], target[None, p, c])
