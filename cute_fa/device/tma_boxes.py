"""Swizzled tiles in shared memory, and the TMA copies that fill and drain them box by box.

A tile (rows, columns) is split into panels of 128, 64 or 32 bytes a row, whichever divides them; a panel holds the rows
one after the other with the swizzle of that many bytes that TMA and wgmma share. A box is what one TMA instruction
moves: a panel's columns of some rows, 8 or a multiple, so that it starts at a swizzle atom.
"""

from typing import NamedTuple, Optional

import cutlass
import cutlass.cute as cute
from cutlass import Int16, Int32, const_expr
from cutlass.cute.nvgpu import cpasync, warpgroup
from cutlass.memory import SmemAllocator

_ATOMS = {
    128: warpgroup.SmemLayoutAtomKind.K_SW128,
    64: warpgroup.SmemLayoutAtomKind.K_SW64,
    32: warpgroup.SmemLayoutAtomKind.K_SW32,
}

# A swizzle atom of 8 rows of 128 bytes, of which the pattern of TMA and wgmma is a function of the absolute address.
TILE_ALIGNMENT = 1024


def panel_bytes(row_bytes: int) -> int:
    """Bytes of a panel's rows, for a tile's rows of ``row_bytes``, a multiple of 32."""
    return next(width for width in _ATOMS if row_bytes % width == 0)


def swizzle_atom(dtype, columns: int) -> cute.ComposedLayout:
    """The swizzled layout of 8 rows of a panel with ``columns``."""
    return warpgroup.make_smem_layout_atom(_ATOMS[columns * dtype.width // 8], dtype)


def tile_layout(dtype, rows: int, columns: int, tiles: int) -> cute.ComposedLayout:
    """(rows, columns, tiles), the panels of a tile one after the other."""
    size = dtype.width // 8
    atom = swizzle_atom(dtype, panel_bytes(columns * size) // size)
    return cute.tile_to_shape(atom, (rows, columns, tiles), order=(0, 1, 2))


def tile_place(row: Int32, byte: Int32, width: int, rows: int) -> Int32:
    """Where byte ``byte`` of a row lies in a tile of so many ``rows``, whose panels are ``width`` bytes wide, from the
    tile's beginning: in each 1024, 512 or 256 bytes pieces of 16 change places with :func:`swizzle_bits`."""
    return byte // width * (rows * width) + row * width + (byte % width ^ swizzle_bits(row, width))


def swizzle_bits(row: Int32 | int, width: int) -> Int32 | int:
    """What a row's number changes in addresses within it; of rows without a bit in common it is the sum."""
    return row * width // 128 % (width // 16) * 16


def allocate_tiles(allocator: SmemAllocator, dtype, rows: int, columns: int, count: int) -> cute.Pointer:
    """Room for tiles as :func:`tile_layout` lays them out; the pointer is swizzled."""
    layout = tile_layout(dtype, rows, columns, count)
    raw = allocator.allocate_tensor(dtype, cute.make_layout(cute.cosize(layout.outer)), TILE_ALIGNMENT).iterator
    return cute.recast_ptr(raw, layout.inner, dtype=dtype)


class BoxShape(NamedTuple):
    """What one TMA instruction moves: ``columns`` of ``heads`` × ``rows`` rows, the heads of a row being neighbours in
    shared memory. ``ragged``: rows may end before the tensor does, see :func:`tma_tensor`."""

    heads: int
    rows: int
    columns: int
    ragged: bool

    def layout(self) -> cute.Layout:
        """((heads, rows), columns) of a panel."""
        shape = ((self.heads, self.rows), self.columns)
        return cute.make_layout(shape, stride=((self.columns, self.heads * self.columns), 1))

    @property
    def tiler(self):
        return (self.heads, self.rows), self.columns


class TmaTensor(NamedTuple):
    """Kernel argument: a global tensor as TMA addresses it. ``coordinates``: ((heads, rows), columns, outer …)."""

    atom: cute.CopyAtom
    coordinates: cute.Tensor


def tma_tensor(op, tensor: cute.Tensor, box: BoxShape, packed: bool) -> TmaTensor:
    """Descriptor, made on the host, of (batch, rows, heads, columns), or (rows, heads, columns) if ``packed``.

    TMA fills what lies outside of a tensor with zeros and does not write there, but it knows only the tensor's own
    extents. Ragged rows, which end with their sequence, get there with one more dimension (the trick of Triton's ragged
    descriptors): rows are counted from ``box.rows`` before the tensor, the dimension of that many rows ends where the
    valid ones do, and a second dimension with the same stride brings the box to its place.
    """
    rows = 0 if const_expr(packed) else 1
    shape, stride = tensor.shape, tensor.stride
    outer_shape = () if const_expr(packed) else (shape[0],)
    outer_stride = () if const_expr(packed) else (stride[0],)
    start, extent = tensor.iterator, shape[rows]
    if const_expr(box.ragged):
        before = (-box.rows, 0, 0) if const_expr(packed) else (0, -box.rows, 0, 0)
        start, extent = cute.domain_offset(before, tensor).iterator, box.rows
        outer_shape = (*outer_shape, shape[rows] + 1)
        outer_stride = (*outer_stride, stride[rows])
    layout = cute.make_layout(
        ((shape[rows + 1], extent), shape[rows + 2], *outer_shape),
        stride=((stride[rows + 1], stride[rows]), stride[rows + 2], *outer_stride),
    )
    smem_layout = cute.make_composed_layout(swizzle_atom(tensor.element_type, box.columns).inner, 0, box.layout())
    atom, coordinates = cpasync.make_tiled_tma_atom(op, cute.make_tensor(start, layout), smem_layout, box.tiler)
    return TmaTensor(atom, coordinates)


class BoxCopy:
    """TMA copies between one sequence, or one page, of a :class:`TmaTensor` and a tile."""

    def __init__(
        self,
        tma: TmaTensor,
        box: BoxShape,
        tile_rows: int,
        head: Int32,
        outer: tuple,
        panels: Optional[int] = None,
    ):
        """``head``: the first of the box; ``outer``: index of the batch or page, empty for packed tensors; ``panels``:
        of the tile, if it has not all columns of the tensor."""
        self.tma, self.box, self.tile_rows = tma, box, tile_rows
        self.head, self.outer = head, outer
        if panels is None:
            panels = cute.ceil_div(cute.size(tma.coordinates, mode=[1]), box.columns)
        self.panels = panels

    def load(
        self,
        tile: cute.Pointer,
        tile_row: int,
        row: Int32,
        rows_left: Int32,
        barrier: cute.Pointer,
        first_panel: int | Int32 = 0,
        ctas: int = 1,
    ):
        """Rows from ``row`` on into the tile from ``tile_row`` on, zeros beyond the ``rows_left`` valid ones; the bytes
        are counted on ``barrier``. ``first_panel``: where the tile begins in the tensor; ``ctas``: of the cluster, in
        each of which the rows and their bytes arrive at the same places, by a multicast operation. Called by all lanes
        of a warp, one of which issues."""
        everyone = {} if ctas == 1 else {"mcast_mask": Int16((1 << ctas) - 1)}
        for panel in range(self.panels):
            source, target = self._partition(tile, tile_row, panel, row, rows_left, first_panel)
            cute.copy(self.tma.atom, source, target, tma_bar_ptr=barrier, **everyone)

    def store(self, tile: cute.Pointer, row: Int32, rows_left: Int32, first_panel: int = 0):
        """The tile's first rows to those from ``row`` on, at most ``rows_left``. ``first_panel``: where the tile begins
        in the tensor."""
        for panel in range(self.panels):
            target, source = self._partition(tile, 0, panel, row, rows_left, first_panel)
            cute.copy(self.tma.atom, source, target)

    def _partition(
        self, tile: cute.Pointer, tile_row: int, panel: int, row: Int32, rows_left: Int32, first: int | Int32
    ):
        """(global box, shared box) as the TMA atom takes them."""
        box = self.box
        offset = (panel * self.tile_rows + tile_row) * box.columns
        shared = cute.make_tensor(tile + offset, box.layout())
        if const_expr(box.ragged):
            valid = cutlass.max(cutlass.min(rows_left, box.rows), 0)
            matrix = self.tma.coordinates[(None, None, *self.outer, row + valid)]
            matrix = cute.domain_offset(((self.head, box.rows - valid), 0), matrix)
        else:
            matrix = cute.domain_offset(((self.head, row), 0), self.tma.coordinates[(None, None, *self.outer)])
        place = cute.local_tile(matrix, box.tiler, ((0, 0), first + panel))
        shared, place = cpasync.tma_partition(
            self.tma.atom, 0, cute.make_layout(1), cute.group_modes(shared, 0, 2), cute.group_modes(place, 0, 2)
        )
        return place, shared
