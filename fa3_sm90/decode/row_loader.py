"""Producer warps that bring K and V into shared memory row by row, by cp.async: from pages that TMA cannot cut blocks
from, those of fewer than 8 rows, and those of sequences that start anywhere in a page."""

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, const_expr

from cute_fa.device.async_copies import CHUNK_BYTES, copy_async
from cute_fa.device.chunk_walk import make_walk
from cute_fa.device.pages import page_place
from cute_fa.device.registers import opaque
from cute_fa.device.ring import Ring, RingState, ring_next, ring_start
from cute_fa.device.split_arguments import SplitArguments
from cute_fa.device.split_walk import Piece
from cute_fa.device.tma_boxes import panel_bytes, swizzle_bits, tile_place
from fa3_sm90.decode.config import TMA_ROWS, Fa3DecodeConfig
from fa3_sm90.decode.descales import DescaleCopies
from fa3_sm90.decode.storage import Storage

_MOST_LAG = 3  # blocks, of K and of V, whose copies a warp lets run


class RowCopies:
    """Copies of a block's rows of K or V; the warps have groups of rows by turns, a row a power of two of lanes."""

    def __init__(
        self, config: Fa3DecodeConfig, tensor: cute.Tensor, memory: cute.Pointer, ring: Ring, columns: int, index: int
    ):
        """``tensor`` in pages; ``columns`` of its tiles, the first of which is at ``memory``; ``index``: which warp."""
        c, size = config, tensor.element_type.width // 8
        self.config, self.tensor, self.ring, self.index = c, tensor, ring, index
        self.row_bytes, self.filled = columns * size, tensor.shape[-1] * size
        self.width, chunks = panel_bytes(self.row_bytes), self.row_bytes // CHUNK_BYTES
        lanes = 1 << (chunks - 1).bit_length()
        self.rows, self.whole = 32 // lanes, lanes == chunks  # rows at a time
        self.group = max(self.rows, TMA_ROWS)
        lane = cute.arch.lane_idx()
        self.row, self.chunk = lane // lanes, lane % lanes
        self.target = opaque(memory.toint() + tile_place(self.row, self.chunk * CHUNK_BYTES, self.width, c.tile_n))
        self.used = self.chunk * CHUNK_BYTES < self.filled
        self.inside = self.chunk < chunks

    @cute.jit
    def start(self, piece: Piece, pages: cute.Tensor, first_key: Int32, state: RingState):
        """All rows of the warp, zeros where there is no key."""
        c, copy = self.config, self.copy
        self.ring.wait_free(state)
        stage = self.target + state.stage * (c.tile_n * self.row_bytes)
        head = self.tensor.iterator.toint() + self.bytes(2) * piece.head + self.chunk * CHUNK_BYTES
        # not unrolled: with all of a block's addresses at hand 32 accesses spilled where one warp has all rows of codes
        for group in cutlass.range(self.index * self.group, c.tile_n, c.row_loaders * self.group, unroll=1):
            of_group = stage + group * self.width
            for row in cutlass.range_constexpr(0, self.group, self.rows):
                place = of_group ^ swizzle_bits(row % TMA_ROWS, self.width)
                if const_expr(self.whole):
                    copy(piece, pages, head, first_key + group + row, place, row * self.width)
                else:
                    if self.inside:
                        copy(piece, pages, head, first_key + group + row, place, row * self.width)

    @cute.jit
    def copy(self, piece: Piece, pages: cute.Tensor, head: Int64, first_key: Int32, place: Int32, offset: int):
        """The lane's 16 bytes of its row behind ``first_key``."""
        key = first_key + self.row
        counts, page = key < piece.info.seqlen_k, Int32(0)
        index, slot = page_place(piece.info.offset_k + key, self.config.page_size)
        if counts:
            page = pages[index]
        source = head + self.bytes(0) * page + self.bytes(1) * slot
        copy_async(place, offset, source, 0, counts & self.used)

    def bytes(self, dimension: int) -> Int64:
        """From one page, row or head to the next."""
        return Int64(self.tensor.stride[dimension]) * (self.tensor.element_type.width // 8)


class RowLoader:
    """One warp. What it has started it hands to the consumers some blocks later, when it is there: wgmma reads shared
    memory behind a fence of who has waited for the copies (PTX ISA, "Async proxy")."""

    def __init__(
        self, config: Fa3DecodeConfig, args: SplitArguments, storage: Storage, rings: dict[str, Ring], index: int
    ):
        """``index``: which of the warps."""
        c, common = config, args.common
        names, columns, self.stages = ("k", "v"), (c.head_dim_padded, c.value_columns), c.stages
        if const_expr(c.widens):
            names, columns, self.stages = ("k_codes", "v_codes"), c.code_columns, c.code_stages
        self.config, self.args, self.lag = c, args, min(self.stages - 1, _MOST_LAG)
        self.tensors = [
            RowCopies(c, tensor, getattr(storage, name), rings[name], width, index)
            for tensor, name, width in zip((common.k, common.v), names, columns, strict=True)
        ]
        self.descales = None
        if const_expr(c.row_descales):
            self.descales = DescaleCopies(c, common, storage)

    @cute.jit
    def run(self):
        """Walk over the CTA's share."""
        common, lag, start, publish = self.args.common, self.lag, self.start, self.publish
        walk = make_walk(self.config, common, self.args.grid)
        valid, piece_at, advance, stages = walk.valid, walk.piece, walk.next, self.stages
        started, published, behind = ring_start(), ring_start(), Int32(0)
        state = walk.first(cute.arch.block_idx()[0])
        while valid(state):
            piece = piece_at(state)
            for iteration in cutlass.range(piece.start, piece.stop, unroll=1):
                start(piece, iteration, started)
                started, behind = ring_next(started, stages), behind + 1
                if behind > lag:
                    cute.arch.cp_async_wait_group(lag)
                    publish(published)
                    published, behind = ring_next(published, stages), behind - 1
            state = advance(state, piece)
        cute.arch.cp_async_wait_group(0)
        for _ in cutlass.range(behind, unroll=1):
            publish(published)
            published = ring_next(published, stages)

    @cute.jit
    def start(self, piece: Piece, iteration: Int32, state: RingState):
        """Copies of a block of K and V, and of the descales of their rows."""
        common = self.args.common
        pages = common.page_table[common.key_batch(piece.batch), None]
        first_key = piece.blocks.block(iteration, common.window) * self.config.tile_n
        for tensor in self.tensors:
            tensor.start(piece, pages, first_key, state)
        if const_expr(self.descales is not None):
            self.descales.start(piece, first_key, state.stage)
        cute.arch.cp_async_commit_group()

    def publish(self, state: RingState):
        """A block that is there: V has come with K, and whoever reads V has waited for K."""
        self.tensors[0].ring.publish(state.stage)
