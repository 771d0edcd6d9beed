"""Producer warps that turn a block of V, (keys, columns) as TMA brings it, into (columns, keys) for fp8 wgmma."""

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Uint32
from cutlass.cute.arch import inline_ptx

from cute_fa.device.forward_arguments import ForwardArguments
from cute_fa.device.registers import opaque, permute
from cute_fa.device.ring import Ring, ring_next, ring_start
from cute_fa.device.tile_work import Extents, scheduler_of, tile_work
from cute_fa.device.tma_boxes import panel_bytes
from fa3_sm90.forward.config import Fa3ForwardConfig
from fa3_sm90.forward.storage import Storage

# Bytes of a row of an 8×8 matrix of 16 bits: 16 columns of V, or 16 keys of V transposed.
CHUNK = 16
# Keys that one ldmatrix.x4 brings: of one wgmma's dot product.
KEYS = 32


class Transposer:
    """One warp. A block is dealt out to the warps in units of a chunk of columns and the keys of one ldmatrix.

    ldmatrix.trans takes pairs of bytes: lane 4g + t gets columns 2g and 2g + 1 of keys 2t and 2t + 1. Two such
    registers, of keys 0 … 7 and 8 … 15, hold for each of the two columns what is at 4t … 4t + 3 of the order of keys
    that P's registers have (``cute_fa.device.fragments.e4m3_operand_a``), and one byte permutation each puts it
    together. Lanes with g < 4 store the even column first and the others the odd one, so that the eight rows of a
    matrix lie in different banks.
    """

    def __init__(
        self,
        config: Fa3ForwardConfig,
        args: ForwardArguments,
        extents: Extents,
        storage: Storage,
        rings: dict[str, Ring],
        index: int,
    ):
        """``index``: which of the transposing warps."""
        c = config
        self.config, self.args, self.extents = c, args, extents
        self.loaded, self.transposed = rings["v"], rings["vt"]
        self.width, self.width_t = panel_bytes(c.value_columns), panel_bytes(c.tile_n)
        self.index = index
        lane = cute.arch.lane_idx()
        matrix, row = lane // 8, lane % 8
        self.source = opaque(storage.v.toint() + (8 * matrix + row) * self.width + _swizzle(row, self.width))
        upper = row // 4
        column = 2 * row + ((matrix % 2) ^ upper)
        place = column * self.width_t + ((matrix // 2 * CHUNK) ^ _swizzle(column, self.width_t))
        self.target = opaque(storage.vt.toint() + place)
        odd = Uint32(lane // 16)  # lanes 4g + t with g of 4 … 7
        self.selectors = opaque(Uint32(0x6420) + odd * 0x1111), opaque(Uint32(0x7531) - odd * 0x1111)

    @cute.jit
    def run(self):
        """Walk over the blocks of the CTA's tiles."""
        args, config, extents = self.args, self.config, self.extents
        scheduler = scheduler_of(args.common, args.grid, config, ctas=config.cluster)
        valid, tile, advance, transpose = scheduler.valid, scheduler.tile, scheduler.next, self.transpose
        values = ring_start()
        state = scheduler.first()
        while valid(state):
            work = tile_work(args.common, config, extents, tile(state))
            for _ in cutlass.range(work.blocks.total, unroll=1):
                transpose(values)
                values = ring_next(values, config.stages)
            state = advance(state)

    @cute.jit
    def transpose(self, state):
        """One block."""
        c = self.config
        self.loaded.wait(state)
        self.transposed.wait_free(state)
        source = self.source + state.stage * (c.tile_n * c.value_columns)
        target = self.target + state.stage * (c.tile_n * c.head_dim_v_padded)
        self.transpose_units(source, target)
        self.transposed.publish(state.stage)
        self.loaded.release(state.stage)

    def transpose_units(self, source: Int32, target: Int32):
        """The warp's share of the units. Which ones is known at compile time: addresses then need hardly an instruction
        of their own."""
        c = self.config
        chunks, steps = c.head_dim_v_padded // CHUNK, c.tile_n // KEYS
        first, last = (share * chunks * steps // c.transposers for share in (self.index, self.index + 1))
        for unit in range(first, last):
            chunk, step = divmod(unit, steps)
            panel, byte = divmod(chunk * CHUNK, self.width)
            panel_t, byte_t = divmod(step * KEYS, self.width_t)
            matrices = _load_transposed(source ^ byte, (panel * c.tile_n + step * KEYS) * self.width)
            words = [permute(*pair, selector) for pair in (matrices[:2], matrices[2:]) for selector in self.selectors]
            place = panel_t * c.head_dim_v_padded * self.width_t + chunk * CHUNK * self.width_t
            _store(target ^ byte_t, place, words)


def _swizzle(row: Int32, width: int) -> Int32:
    """What the swizzle of a panel with rows of ``width`` bytes does to addresses in a row."""
    return (row * width // 128) % (width // CHUNK) * CHUNK


def _load_transposed(address: Int32, offset: int) -> tuple[Uint32, ...]:
    """ldmatrix.x4.trans."""
    return inline_ptx(
        "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {{$w0}, {$w1}, {$w2}, {$w3}}, [{$r0}+" + str(offset) + "];",
        write_only_types=[Uint32] * 4,
        read_only_args=[address],
    )


def _store(address: Int32, offset: int, words: list[Uint32]):
    """stmatrix.x4."""
    inline_ptx(
        "stmatrix.sync.aligned.m8n8.x4.shared.b16 [{$r0}+" + str(offset) + "], {{$r1}, {$r2}, {$r3}, {$r4}};",
        read_only_args=[address, *words],
    )
