"""cp.async of rows that do not follow each other at one stride: queries of several heads, keys of a paged cache."""

from typing import Optional

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, const_expr

from cute_fa.device.block_range import BlockRange, Window
from fa2_sm80.block_ring import BlockRing
from fa2_sm80.copies import CHUNK, CHUNK_BYTES, ELEMENT_BYTES, SmemTile, copy_async


class RowLoader:
    """Copies rows of ``head_dim`` elements into a :class:`SmemTile`, zeros outside."""

    def __init__(self, smem: SmemTile, head_dim: int, tidx: Int32, num_threads: int):
        self.smem, self.head_dim = smem, head_dim
        chunks_per_row = smem.panel // CHUNK
        self.row, self.chunk = tidx // chunks_per_row, tidx % chunks_per_row
        self.rows_per_pass = num_threads // chunks_per_row
        self.target = smem.pointer.toint() + smem.offset(self.row, self.chunk)

    def load(self, address, stage: Int32):
        """``address(row)``: (byte address of a row of the tile, whether it counts); outside nothing is read."""
        for first_row in range(0, self.smem.rows, self.rows_per_pass):
            self._load_row(address, first_row, stage)

    @cute.jit
    def _load_row(self, address: cutlass.Constexpr, first_row: cutlass.Constexpr[int], stage: Int32):
        smem = self.smem
        row = self.row + first_row
        if const_expr(first_row + self.rows_per_pass > smem.rows):
            if row < smem.rows:
                self._load_panels(address, first_row, stage)
        else:
            self._load_panels(address, first_row, stage)

    def _load_panels(self, address, first_row: int, stage: Int32):
        smem = self.smem
        start, inside = address(self.row + first_row)
        start = start + self.chunk * CHUNK_BYTES
        for panel in range(smem.panels):
            copied = inside
            if (panel + 1) * smem.panel > self.head_dim:
                copied = inside & (self.chunk * CHUNK < self.head_dim - panel * smem.panel)
            offset = first_row * smem.row_bytes + panel * smem.panel_bytes
            copy_async(self.target + stage * smem.stage_bytes, offset, start, panel * smem.row_bytes, copied)


class KeyRows:
    """Where the rows of one kv head of one sequence lie in K or V, paged or not."""

    def __init__(self, tensor: cute.Tensor, head: Int32, batch: Int32, offset: Int32, packed: bool, page_table):
        """``tensor``, ``page_table``: as the kernel takes them; ``batch``: the row of the table, or the place
        in K and V; ``offset``: first row of the sequence, if packed."""
        self.page_size = None if page_table is None else tensor.shape[1]
        self.pages = None if page_table is None else page_table[batch, None]
        row_stride = tensor.stride[0] if const_expr(packed) else tensor.stride[1]
        self.row_bytes = Int64(row_stride) * ELEMENT_BYTES
        start = tensor.iterator.toint() + Int64(head) * (Int64(tensor.stride[-2]) * ELEMENT_BYTES)
        if const_expr(packed):
            start = start + self.row_bytes * offset
        elif const_expr(page_table is None):
            start = start + Int64(batch) * (Int64(tensor.stride[0]) * ELEMENT_BYTES)
        else:
            self.page_bytes = Int64(tensor.stride[0]) * ELEMENT_BYTES
        self.start = start

    @cute.jit
    def address(self, key: Int32, inside, page_size: cutlass.Constexpr):
        """Byte address of a key's row; a page is looked up only for keys ``inside`` the sequence."""
        if const_expr(page_size is None):
            return self.start + self.row_bytes * key
        page, pages = Int32(0), self.pages
        if inside:
            page = pages[key // page_size]
        return self.start + self.page_bytes * page + self.row_bytes * (key % page_size)


class RowRing(BlockRing):
    """K and V by rows, paged or not."""

    def __init__(
        self,
        stages: int,
        loaders: tuple[RowLoader, RowLoader],
        rows: tuple[KeyRows, KeyRows],
        page_size: Optional[int],
        blocks: BlockRange,
        window: Window,
        seqlen_k: Int32,
        stop: Int32,
    ):
        """``loaders``, ``rows``: of K and V."""
        super().__init__(stages, blocks, window, stop)
        self.loaders, self.rows, self.page_size, self.seqlen_k = loaders, rows, page_size, seqlen_k
        self.tile_n = loaders[0].smem.rows

    def load(self, block: Int32, stage: Int32, first: bool):
        """Every block is checked against the sequence's end: decoding waits for memory."""
        for loader, rows in zip(self.loaders, self.rows, strict=True):

            def address(row, rows=rows):
                key = block * self.tile_n + row
                inside = key < self.seqlen_k
                return rows.address(key, inside, self.page_size), inside

            loader.load(address, stage)
