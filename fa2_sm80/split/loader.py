"""cp.async of rows that do not follow each other at one stride: queries of several heads, keys of a paged cache."""

from typing import Optional

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, Uint32, const_expr

from cute_fa.device.async_copies import CHUNK_BYTES, copy_async
from cute_fa.device.block_range import BlockRange
from cute_fa.device.pages import page_place
from cute_fa.device.registers import opaque
from cute_fa.device.visibility import Window
from fa2_sm80.common.block_ring import BlockRing
from fa2_sm80.common.copies import CHUNK, SmemTile

DESCALE_BYTES = 4


class RowLoader:
    """Copies rows of ``head_dim`` elements of 16 bits into a :class:`SmemTile`, zeros outside."""

    def __init__(self, smem: SmemTile, head_dim: int, tidx: Int32, num_threads: int):
        self.smem, self.head_dim = smem, head_dim
        chunks_per_row = smem.panel // CHUNK
        self.row, self.chunk = tidx // chunks_per_row, tidx % chunks_per_row
        self.rows_per_pass = num_threads // chunks_per_row
        self.target = smem.pointer.toint() + smem.offset(self.row, self.chunk)

    def rows(self) -> list[Int32]:
        """The rows that this thread copies a part of, one a pass; of a small tile, rows beyond it too."""
        return [self.row + first_row for first_row in range(0, self.smem.rows, self.rows_per_pass)]

    def load(self, places: list, stage: Int32):
        """``places``: (byte address, whether the row counts) of each of :meth:`rows`; of others nothing is read."""
        for i, (start, inside) in enumerate(places):
            self._load_row(start, inside, i * self.rows_per_pass, stage)

    @cute.jit
    def _load_row(self, start: Int64, inside, first_row: cutlass.Constexpr[int], stage: Int32):
        smem = self.smem
        if const_expr(first_row + self.rows_per_pass > smem.rows):
            if self.row + first_row < smem.rows:
                self._load_panels(start, inside, first_row, stage)
        else:
            self._load_panels(start, inside, first_row, stage)

    def _load_panels(self, start: Int64, inside, first_row: int, stage: Int32):
        smem = self.smem
        start = start + self.chunk * CHUNK_BYTES
        for panel in range(smem.panels):
            copied = inside
            if (panel + 1) * smem.panel > self.head_dim:
                copied = inside & (self.chunk * CHUNK < self.head_dim - panel * smem.panel)
            offset = first_row * smem.row_bytes + panel * smem.panel_bytes
            copy_async(self.target + stage * smem.stage_bytes, offset, start, panel * smem.row_bytes, copied)


class KeyRows:
    """Where the rows of one kv head of one sequence lie in K or V."""

    def __init__(self, tensor: cute.Tensor, head: Int32, sequence: Int32, offset: Int32, packed: bool, paged: bool):
        """``tensor``: as the kernel takes it; ``sequence``: its place in a dense one; ``offset``: first row of the
        sequence, counted from there or in a packed one, but for pages."""
        row_stride = tensor.stride[0] if const_expr(packed) else tensor.stride[1]
        size = tensor.element_type.width // 8
        self.row_bytes = Int64(row_stride) * size
        self.page_bytes = Int64(tensor.stride[0]) * size if const_expr(paged) else None
        start = tensor.iterator.toint() + Int64(head) * (Int64(tensor.stride[-2]) * size)
        if const_expr(not paged):
            start = start + self.row_bytes * offset
            if const_expr(not packed):
                start = start + Int64(sequence) * (Int64(tensor.stride[0]) * size)
        self.start = start

    def address(self, page: Optional[Int32], row: Int32) -> Int64:
        """Byte address of a row, of a page where there are pages; of unsigned numbers in fewer instructions."""
        start = self.start
        if const_expr(page is not None):
            start = start + self.page_bytes * Int64(Uint32(page))
        return start + self.row_bytes * Int64(Uint32(row))


class DescaleLoader:
    """Copies a row's descale into a block's, fp32 (tile_n, stages), 0 outside: there NaN may lie."""

    def __init__(self, smem: cute.Tensor, rows: KeyRows, key: Int32):
        """``rows``: of the descales; ``key``: the thread's, of a block's."""
        self.rows, self.stage_bytes = rows, DESCALE_BYTES * smem.shape[0]
        self.target = smem.iterator.toint() + DESCALE_BYTES * key

    def load(self, page: Optional[Int32], row: Int32, inside, stage: Int32):
        """Arguments as :meth:`RowRing.slot` gives them."""
        start = self.rows.address(page, row)
        copy_async(self.target + stage * self.stage_bytes, 0, start, 0, inside, DESCALE_BYTES)


class RowRing(BlockRing):
    """K and V by rows, paged or not, and the descales of these rows."""

    def __init__(
        self,
        stages: int,
        loaders: tuple[RowLoader, RowLoader],
        rows: tuple[KeyRows, KeyRows],
        descales: list[DescaleLoader],
        pages: Optional[cute.Tensor],
        page_size: Optional[int],
        first_key: Int32,
        blocks: BlockRange,
        window: Window,
        seqlen_k: Int32,
        stop: Int32,
    ):
        """``loaders``, ``rows``: of K and V; ``descales``: of those of the two whose rows have some; ``pages``: the
        sequence's row of the page table, whose row ``first_key`` holds its first key."""
        super().__init__(stages, blocks, window, stop)
        self.loaders, self.rows, self.descales, self.seqlen_k = loaders, rows, descales, seqlen_k
        self.pages, self.page_size, self.first_key = pages, page_size, first_key
        self.tile_n = loaders[0].smem.rows

    def load(self, block: Int32, stage: Int32, first: bool):
        """Every block is checked against the sequence's end: decoding waits for memory. A thread copies the same rows
        of K and V if these are equally wide, and looks their pages up once."""
        # opaque: where blocks are only multiplied, NVVM counts them modulo 2^32 / tile_n, which looks like overflow
        slots, block = {}, opaque(Int32(block))
        for loader, rows in zip(self.loaders, self.rows, strict=True):
            if loader.rows_per_pass not in slots:
                slots[loader.rows_per_pass] = [self.slot(block * self.tile_n + row) for row in loader.rows()]
            places = [(rows.address(page, row), inside) for page, row, inside in slots[loader.rows_per_pass]]
            loader.load(places, stage)
        if self.descales:
            self.load_descales(block, stage)

    @cute.jit
    def load_descales(self, block: Int32, stage: Int32):
        """A thread brings those of one key."""
        key, load_descales_of = cute.arch.thread_idx()[0], self.load_descales_of
        if key < self.tile_n:
            load_descales_of(block * self.tile_n + key, stage)

    def load_descales_of(self, key: Int32, stage: Int32):
        place = self.slot(key)
        for loader in self.descales:
            loader.load(*place, stage)

    @cute.jit
    def slot(self, key: Int32):
        """(page or None, row, whether the key counts); pages are looked up only for keys inside the sequence."""
        inside = key < self.seqlen_k
        if const_expr(self.page_size is None):
            return None, key, inside
        page, pages = Int32(0), self.pages
        index, row = page_place(self.first_key + key, self.page_size)
        if inside:
            page = pages[index]
        # opaque: extended to 64 bits before the branches meet, its upper half would be multiplied, too
        return opaque(page), row, inside
