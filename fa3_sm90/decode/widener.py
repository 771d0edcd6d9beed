"""Producer warps that widen codes of keys and values to fp16, from TMA's tiles into those of wgmma.

wgmma takes both operands in one type, and of 16 bits V as it lies. Every code of e4m3, e5m2 and int8 is one of fp16:
descales are factors of the sums, in fp32; those of rows go along as they are. Half of the bytes cross from memory.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Uint32, const_expr
from cutlass.cute.arch import inline_ptx

from cute_fa.device.chunk_walk import make_walk
from cute_fa.device.dtypes import CUTE_DTYPE
from cute_fa.device.registers import opaque, widen_codes
from cute_fa.device.ring import Ring, RingState, ring_next, ring_start
from cute_fa.device.split_arguments import SplitArguments
from cute_fa.device.tma_boxes import panel_bytes, tile_place
from fa3_sm90.decode.config import WIDENERS, Fa3DecodeConfig
from fa3_sm90.decode.descales import DescaleMoves
from fa3_sm90.decode.storage import Storage

_CHUNK = 16  # bytes: codes that a lane widens at a time
_ROW_LANES = 4  # neighbours in a row: with the next row's four, their stores meet all banks once
_LOADS = 4  # of a lane, on their way at a time
_ROWS = 32 // _ROW_LANES  # a warp's at a time: as many as the swizzle's pattern has


class Widening:
    """Codes of K or V in one tile to numbers in another; the warps have eight rows each by turns. Eight rows further
    and four chunks further lie a constant away, but for one bit, which is why addresses need hardly a register."""

    def __init__(self, config: Fa3DecodeConfig, storage: Storage, rings: dict[str, Ring], name: str, index: int):
        """``name``: "k" or "v"; ``index``: which of the warps."""
        c, of_values = config, name == "v"
        self.config, self.index, self.of_values = c, index, of_values
        self.codes, self.numbers = rings[f"{name}_codes"], rings[name]
        self.dtype = CUTE_DTYPE[c.dtype_v if of_values else c.dtype_k]
        self.columns = c.value_columns if of_values else c.head_dim_padded
        self.code_columns = c.code_columns[of_values]
        self.code_width, self.width = panel_bytes(self.code_columns), panel_bytes(2 * self.columns)
        row, self.chunk = cute.arch.lane_idx() // _ROW_LANES, cute.arch.lane_idx() % _ROW_LANES
        codes, numbers = getattr(storage, f"{name}_codes").toint(), getattr(storage, name).toint()
        self.source = opaque(codes + tile_place(row, self.chunk * _CHUNK, self.code_width, c.tile_n))
        self.target = opaque(numbers + tile_place(row, self.chunk * (2 * _CHUNK), self.width, c.tile_n))
        self.descales = None
        if const_expr(c.row_descales and not of_values):
            self.descales = DescaleMoves(c, storage, index)

    @cute.jit
    def widen(self, before: RingState, behind: RingState):
        """The block at ``before`` of the codes' ring, to ``behind`` of the numbers'."""
        tile_n = self.config.tile_n
        if const_expr(not (self.of_values and self.config.values_with_keys)):
            self.codes.wait(before)
        self.numbers.wait_free(behind)
        if const_expr(self.descales is not None):
            self.descales.move(before, behind)
        source = self.source + before.stage * (tile_n * self.code_columns)
        target = self.target + behind.stage * (tile_n * self.columns * 2)
        widen_chunks, chunks = self.widen_chunks, self.columns // _CHUNK
        rows, whole = range(self.index * _ROWS, tile_n, WIDENERS * _ROWS), chunks // _ROW_LANES * _ROW_LANES
        widen_chunks(source, target, [(row, first) for row in rows for first in range(0, whole, _ROW_LANES)])
        if const_expr(whole < chunks):
            if self.chunk < chunks - whole:
                widen_chunks(source, target, [(row, whole) for row in rows])
        self.numbers.publish(behind.stage)
        self.codes.release(before.stage)

    def widen_chunks(self, source: Int32, target: Int32, places: list[tuple[int, int]]):
        """The lane's 16 codes so many rows and chunks further, for each of the ``places``; some are on their way while
        others are converted."""
        for i in range(0, len(places), _LOADS):
            loaded = [(self.load(source, *place), place) for place in places[i : i + _LOADS]]
            for words, (row, first) in loaded:
                pairs = [pair for word in words for pair in widen_codes(word, self.dtype)]
                panel = first * 2 * _CHUNK // self.width
                offset = (panel * self.config.tile_n + row) * self.width
                _store(target, offset, pairs[:4])
                _store(target ^ _CHUNK, offset, pairs[4:])

    def load(self, source: Int32, row: int, first: int) -> tuple[Uint32, ...]:
        """The codes of a place."""
        panel, byte = divmod(first * _CHUNK, self.code_width)
        return _load(source ^ byte, (panel * self.config.tile_n + row) * self.code_width)


def _load(address: Int32, offset: int) -> tuple[Uint32, ...]:
    return inline_ptx(
        "ld.shared.v4.b32 {{$w0}, {$w1}, {$w2}, {$w3}}, [{$r0}+" + str(offset) + "];",
        write_only_types=[Uint32] * 4,
        read_only_args=[address],
    )


def _store(address: Int32, offset: int, words: list[Uint32]):
    inline_ptx(
        "st.shared.v4.b32 [{$r0}+" + str(offset) + "], {{$r1}, {$r2}, {$r3}, {$r4}};", read_only_args=[address, *words]
    )


class Widener:
    """One warp."""

    def __init__(
        self, config: Fa3DecodeConfig, args: SplitArguments, storage: Storage, rings: dict[str, Ring], index: int
    ):
        """``index``: which of the widening warps."""
        self.config, self.args = config, args
        self.tensors = [Widening(config, storage, rings, name, index) for name in "kv"]

    @cute.jit
    def run(self):
        """Walk over the CTA's share."""
        c, walk = self.config, make_walk(self.config, self.args.common, self.args.grid)
        valid, piece_at, advance = walk.valid, walk.piece, walk.next
        widen = [tensor.widen for tensor in self.tensors]
        before, behind = ring_start(), ring_start()
        state = walk.first(cute.arch.block_idx()[0])
        while valid(state):
            piece = piece_at(state)
            for _ in cutlass.range(piece.start, piece.stop, unroll=1):
                for of_tensor in widen:
                    of_tensor(before, behind)
                before, behind = ring_next(before, c.code_stages), ring_next(behind, c.stages)
            state = advance(state, piece)
