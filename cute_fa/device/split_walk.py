"""Which key blocks a CTA of a decoding kernel computes.

A tile is some rows of one kv head of one sequence, a row being one query of one of its query heads. The units of work
of all tiles stand in one line: sequence by sequence, kv head by kv head, tile by tile. The CTAs cut it into shares of
equal length, with lengths that only the device knows and without a plan made before.

Evenly: a unit is a block of keys (stream-K: M. Osama et al., arXiv 2301.03598, of the blocks of a matrix product's
sums), so that no CTA has more than one block above the others, whatever the sequences' lengths. A share is the end of
one tile, whole tiles, and the beginning of another one; of tiles that are cut every CTA leaves a part in scratch
memory, at most two.

In parts: where the caller says how many, a unit is one of as many equal parts of each tile's blocks.

:mod:`cute_fa.device.split_parts` merges the parts of a tile. Every warp finds its way alone: it adds up the units of 32
sequences at a time, one a lane.
"""

from typing import NamedTuple, Optional

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32, Uint32, const_expr

from cute_fa.device.arguments import CommonArguments
from cute_fa.device.block_range import BlockRange, block_range
from cute_fa.device.seqlen import SeqlenInfo
from cute_fa.device.tile_scheduler import WorkTile, quotient_and_rest, sequence_at
from cute_fa.device.tile_work import TileWork

EVEN_SLOTS = 2  # for parts of tiles that a CTA leaves, at most, of an even cut


class SplitGrid(NamedTuple):
    """Run-time numbers of a launch: ``ctas``, of which the shares are; ``merges``: CTAs, for each 16 rows of a tile, of
    the kernel that merges, at the cuts between shares, or for each tile there may be; ``parts`` of each tile, None
    where it is cut evenly. Of a walk in chunks (:mod:`cute_fa.device.chunk_walk`), else None: ``tiles`` of a kv head,
    ``chunk_blocks`` of a chunk."""

    ctas: Int32
    merges: Int32
    parts: Optional[Int32]
    tiles: Optional[Int32]
    chunk_blocks: Optional[Int32]


class WalkState(NamedTuple):
    """``position``: of the CTA's next unit in the line, ``stop`` where its share ends; ``batch``: the sequence there,
    whose units begin at ``start``."""

    position: Int32
    stop: Int32
    batch: Int32
    start: Int32


class Piece(NamedTuple):
    """Iterations [start, stop) of a tile's walk over its key blocks, none where there are more parts than blocks.
    ``first_row``: of the tile, among the rows of the kv head; row r is query r // gqa_ratio of the group's head
    r % gqa_ratio. ``units`` of the line that it is; ``whole``: whether it is all of the tile, or what is left of it,
    else ``slot`` is its place in scratch memory."""

    batch: Int32
    head: Int32
    tile: Int32
    first_row: Int32
    info: SeqlenInfo
    blocks: BlockRange
    start: Int32
    stop: Int32
    units: Int32
    whole: Boolean
    slot: Int32

    def work(self) -> TileWork:
        """The tile, as what copies key blocks takes it."""
        return TileWork(WorkTile(self.tile, self.head, self.batch), self.info, self.first_row, self.blocks)


class RowTiles:
    """The tiles of a launch. ``config``: of the kernel, with ``tile_m`` rows and ``tile_n`` keys of a block."""

    def __init__(self, config, common: CommonArguments):
        self.common, self.tile_m, self.tile_n = common, config.tile_m, config.tile_n
        self.heads = cute.arch.make_warp_uniform(Int32(common.k.shape[-2]))
        self.gqa_ratio = cute.arch.make_warp_uniform(Int32(common.q.shape[-2]) // self.heads)

    def tile_blocks(self, info: SeqlenInfo, tile: Int32) -> BlockRange:
        """Key blocks of a tile: one at least, hidden where there is no visible key, so that its rows are written."""
        first_row = tile * self.tile_m
        # unsigned, and without a shuffle of the divisor: lanes are at different sequences here
        first, last = (
            Int32(Uint32(row) // Uint32(self.gqa_ratio)) for row in (first_row, first_row + (self.tile_m - 1))
        )
        window = self.common.window
        blocks = block_range(window, info.seqlen_q, info.seqlen_k, first, last - first + 1, self.tile_n)
        one = Int32(blocks.total == 0)
        ends = (blocks.right_end, blocks.full_end, blocks.window_end, blocks.total)
        return BlockRange(cutlass.max(blocks.last_block, 0), *(end + one for end in ends))


class SplitWalk(RowTiles):
    """The shares of a launch. All lanes of a warp call its methods together. ``config`` has ``least_blocks``, too: CTAs
    that would have fewer of an even cut have none."""

    def __init__(self, config, common: CommonArguments, grid: SplitGrid):
        super().__init__(config, common)
        self.parts = grid.parts
        self.total = self._total()
        least = config.least_blocks if const_expr(self.parts is None) else 1
        self.ctas = cutlass.min(grid.ctas, quotient_and_rest(self.total + (least - 1), least)[0])
        # no units, no CTAs: then nothing is divided by
        self.share, self.longer = quotient_and_rest(self.total, cutlass.max(self.ctas, 1))

    def cut(self, cta: Int32) -> Int32:
        """Where the share of a CTA begins: the first ``longer`` ones have one unit more than the others."""
        cta = cutlass.min(cta, self.ctas)
        return cta * self.share + cutlass.min(cta, self.longer)

    def cta(self, position: Int32) -> Int32:
        """Which CTA's share a unit belongs to."""
        of_longer, _ = quotient_and_rest(position, self.share + 1)
        behind, _ = quotient_and_rest(position - self.longer, self.share)
        return cutlass.select_(of_longer < self.longer, of_longer, behind)

    def first(self, cta: Int32) -> WalkState:
        """The beginning of a CTA's share."""
        state = self.at(self.cut(cta))
        return state._replace(stop=cute.arch.make_warp_uniform(self.cut(cta + 1)))

    def valid(self, state: WalkState) -> Boolean:
        """Whether there is a unit left."""
        return state.position < state.stop

    def next(self, state: WalkState, piece: Piece) -> WalkState:
        """Behind a piece."""
        return self._find(state.position + piece.units, state.stop, state.batch, state.start)

    def found_again(self, state: WalkState) -> WalkState:
        """The same, from a number that went through a shuffle: what follows from it is computed anew."""
        return state._replace(batch=cute.arch.make_warp_uniform(state.batch))

    def at(self, position: Int32) -> WalkState:
        """At a unit of the line, with nothing behind it."""
        return self._find(position, position, Int32(0), Int32(0))

    @cute.jit
    def piece(self, state: WalkState) -> Piece:
        """What a valid state is at, up to the end of the tile or of the share, or one part."""
        info, blocks_of, batch, parts = self.common.info(state.batch), self.tile_blocks, state.batch, self.parts
        head, rest = quotient_and_rest(state.position - state.start, self.head_units(batch))
        tile, blocks = Int32(0), blocks_of(info, Int32(0))
        if const_expr(parts is not None):
            tile, part = quotient_and_rest(rest, parts)
            blocks = blocks_of(info, tile)
            steps = quotient_and_rest(blocks.total + parts - 1, parts)[0]
            start, stop = (cutlass.min(blocks.total, end * steps) for end in (part, part + 1))
            units, whole, slot = Int32(1), parts == 1, state.position
        else:
            if const_expr(self.uniform):
                tile, rest = quotient_and_rest(rest, blocks.total)
            else:
                while rest >= blocks.total:
                    rest -= blocks.total
                    tile += 1
                    blocks = blocks_of(info, tile)
            start, stop = rest, cutlass.min(blocks.total, rest + state.stop - state.position)
            units, whole = stop - start, (start == 0) & (stop == blocks.total)
            # the end of a tile in the first slot, the beginning of one in the second
            slot = EVEN_SLOTS * cute.arch.block_idx()[0] + cutlass.select_(start > 0, Int32(0), Int32(1))
        numbers = (batch, head, tile, tile * self.tile_m)
        batch, head, tile, first_row = (cute.arch.make_warp_uniform(number) for number in numbers)
        return Piece(batch, head, tile, first_row, info, blocks, start, stop, units, whole, slot)

    @property
    def uniform(self) -> bool:
        """Whether the tiles of a sequence have equally many units, known at compile time."""
        common = self.common
        unbounded = common.window.left is None and common.window.right is None
        return self.parts is not None or (unbounded and common.lengths.seqused_q is None)

    def tile_units(self, info: SeqlenInfo, tile: Int32) -> Int32:
        """Units of a tile."""
        return self.tile_blocks(info, tile).total if const_expr(self.parts is None) else self.parts

    @cute.jit
    def head_units(self, batch: Int32) -> Int32:
        """Units of all tiles of one kv head of a sequence; 0 from the last sequence on."""
        units, tile_m, uniform, tile_units = Int32(0), self.tile_m, self.uniform, self.tile_units
        common, gqa_ratio = self.common, self.gqa_ratio
        if batch < common.batches:
            info = common.info(batch)
            tiles = (info.rows_q * gqa_ratio + (tile_m - 1)) // tile_m
            if const_expr(uniform):
                units = tiles * tile_units(info, Int32(0))
            else:
                for tile in cutlass.range(tiles, unroll=1):
                    units += tile_units(info, tile)
        return units

    @cute.jit
    def _total(self) -> Int32:
        """Units of the line."""
        units, head_units, lane = Int32(0), self.head_units, cute.arch.lane_idx()
        for batch in cutlass.range(lane, self.common.batches, 32, unroll=4):
            units += head_units(batch)
        for step in cutlass.range_constexpr(5):
            units += cute.arch.shuffle_sync_bfly(units, 1 << step)
        return cute.arch.make_warp_uniform(units * self.heads)

    @cute.jit
    def _find(self, position: Int32, stop: Int32, batch: Int32, start: Int32) -> WalkState:
        """The state at ``position``, which is not in a sequence before ``batch``, whose units begin at ``start``."""
        batch, start = sequence_at(position, batch, start, self.head_units, self.heads, self.common.batches)
        return WalkState(*(cute.arch.make_warp_uniform(number) for number in (position, stop, batch, start)))
