"""Blocks of keys on their way into shared memory by TMA: dense, packed, from pages, and V with its keys contiguous."""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Int32, const_expr

from cute_fa.device.arguments import CommonArguments
from cute_fa.device.tile_work import TileWork
from cute_fa.device.tma_boxes import BoxCopy, BoxShape, TmaTensor


class KeyTensor(NamedTuple):
    """K or V. ``rows``, keys, and ``columns`` of its tile in shared memory; ``key_major``: rows of the tile are columns
    of V. Of a pair of CTAs each has a part of a block: keys from ``first_key``, or columns from ``first_panel`` on.
    ``ctas``: of a cluster, of which each brings a part to all."""

    tma: TmaTensor
    box: BoxShape
    rows: int
    columns: int
    key_major: bool = False
    first_key: int | Int32 = 0
    first_panel: int | Int32 = 0
    ctas: int = 1


class KeyCopies:
    """Copies of the blocks of a tile's walk, called by all lanes of a warp."""

    def __init__(self, config, common: CommonArguments):
        """``config``: of the kernel, with tile_n, key_rows, page_size and cu_seqlens_k."""
        self.config, self.common = config, common

    @cute.jit
    def load(
        self,
        tensor: KeyTensor,
        target: cute.Pointer,
        work: TileWork,
        head: Int32,
        iteration: Int32,
        barrier: cute.Pointer,
    ):
        """The block of an iteration of a kv head to ``target``. What lies beyond the sequence's last key arrives as
        zeros: hidden scores are replaced, but 0 · NaN of V would not be 0."""
        c, info = self.config, work.info
        block = work.blocks.block(iteration, self.common.window)
        if const_expr(tensor.key_major):
            panels = tensor.rows // tensor.box.columns
            copy = BoxCopy(tensor.tma, tensor.box, tensor.columns, head, (work.tile.batch,), panels)
            copy.load(target, 0, Int32(0), Int32(tensor.box.rows), barrier, block * panels)
        elif const_expr(c.page_size is None):
            first_key = block * c.tile_n + tensor.first_key
            outer = () if const_expr(c.cu_seqlens_k) else (self.common.key_batch(work.tile.batch),)
            copy = BoxCopy(tensor.tma, tensor.box, tensor.rows, head, outer, tensor.columns // tensor.box.columns)
            row, rows_left = info.offset_k + first_key, info.seqlen_k - first_key
            copy.load(target, 0, row, rows_left, barrier, tensor.first_panel, tensor.ctas)
        else:
            self.load_pages(tensor, target, head, block * c.tile_n + tensor.first_key, work, barrier)

    @cute.jit
    def load_pages(self, tensor: KeyTensor, target, head: Int32, first_key: Int32, work: TileWork, barrier):
        """A block from its pages, one box a piece. Each lane looks one page up; pages beyond the sequence are not: all
        of their rows are out of bounds, so that TMA reads nothing and writes zeros."""
        c = self.config
        lane = cute.arch.lane_idx()
        seqlen_k = work.info.seqlen_k
        pieces, panels = tensor.rows // c.key_rows, tensor.columns // tensor.box.columns
        sequence = self.common.key_batch(work.tile.batch)
        own = first_key + lane * c.key_rows
        page = Int32(0)
        if lane < pieces and own < seqlen_k:
            page = self.common.page_table[sequence, own // c.page_size]
        for piece in cutlass.range_constexpr(pieces):
            key = first_key + piece * c.key_rows
            listed = cute.arch.shuffle_sync(page, piece)
            copy = BoxCopy(tensor.tma, tensor.box, tensor.rows, head, (listed,), panels)
            row = piece * c.key_rows
            copy.load(target, row, key % c.page_size, seqlen_k - key, barrier, tensor.first_panel)
