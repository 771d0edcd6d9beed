"""Which key blocks a CTA of a decoding kernel computes: an equal share of all of them, whatever the sequences' lengths.

A tile is some rows of one kv head of one sequence, a row being one query of one of its query heads. The key blocks of
all tiles stand in one line: sequence by sequence, kv head by kv head, tile by tile. The CTAs cut it into pieces of
equal length (stream-K: M. Osama et al., arXiv 2301.03598, of the blocks of a matrix product's sums), so that none has
more than one block above the others, with lengths that only the device knows and without a plan made before. A CTA's
share is the end of one tile, whole tiles, and the beginning of another one; of tiles that are cut every CTA leaves a
part in scratch memory, at most two, which :mod:`cute_fa.device.split_parts` merges.

Every warp finds its way alone: it adds up the blocks of 32 sequences at a time, one a lane.
"""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32, Uint32, const_expr

from cute_fa.device.arguments import CommonArguments
from cute_fa.device.block_range import BlockRange, block_range
from cute_fa.device.seqlen import SeqlenInfo
from cute_fa.device.tile_scheduler import WorkTile, inclusive_sum, quotient_and_rest
from cute_fa.device.tile_work import TileWork

PARTS = 2  # of tiles, at most, that a CTA leaves


class WalkState(NamedTuple):
    """``position``: of the CTA's next block in the line, ``stop`` where its share ends; ``batch``: the sequence there,
    whose blocks begin at ``start``."""

    position: Int32
    stop: Int32
    batch: Int32
    start: Int32


class Piece(NamedTuple):
    """Iterations [start, stop) of a tile's walk over its key blocks. ``first_row``: of the tile, among the rows of the
    kv head; row r is query r // gqa_ratio of the group's head r % gqa_ratio."""

    batch: Int32
    head: Int32
    tile: Int32
    first_row: Int32
    info: SeqlenInfo
    blocks: BlockRange
    start: Int32
    stop: Int32

    @property
    def whole(self) -> Boolean:
        """Whether these are all blocks of the tile."""
        return (self.start == 0) & (self.stop == self.blocks.total)

    def work(self) -> TileWork:
        """The tile, as what copies key blocks takes it."""
        return TileWork(WorkTile(self.tile, self.head, self.batch), self.info, self.first_row, self.blocks)


class SplitWalk:
    """The shares of a launch. All lanes of a warp call ``first``, ``next`` and ``at`` together.

    ``tile_m`` rows, ``tile_n`` keys of a block; ``ctas``: that there are, of which those that would have fewer than
    ``least_blocks`` have none.
    """

    def __init__(self, common: CommonArguments, tile_m: int, tile_n: int, ctas: Int32, least_blocks: int):
        self.common, self.tile_m, self.tile_n = common, tile_m, tile_n
        self.heads = cute.arch.make_warp_uniform(Int32(common.k.shape[-2]))
        self.gqa_ratio = cute.arch.make_warp_uniform(Int32(common.q.shape[-2]) // self.heads)
        self.total = self._total()
        self.ctas = cutlass.min(ctas, quotient_and_rest(self.total + (least_blocks - 1), least_blocks)[0])
        # no blocks, no CTAs: then nothing is divided by
        self.share, self.longer = quotient_and_rest(self.total, cutlass.max(self.ctas, 1))

    def cut(self, cta: Int32) -> Int32:
        """Where the share of a CTA begins: the first ``longer`` ones have one block more than the others."""
        cta = cutlass.min(cta, self.ctas)
        return cta * self.share + cutlass.min(cta, self.longer)

    def cta(self, position: Int32) -> Int32:
        """Which CTA's share a block belongs to."""
        of_longer, _ = quotient_and_rest(position, self.share + 1)
        behind, _ = quotient_and_rest(position - self.longer, self.share)
        return cutlass.select_(of_longer < self.longer, of_longer, behind)

    def first(self, cta: Int32) -> WalkState:
        """The beginning of a CTA's share."""
        state = self.at(self.cut(cta))
        return state._replace(stop=cute.arch.make_warp_uniform(self.cut(cta + 1)))

    def valid(self, state: WalkState) -> Boolean:
        """Whether there is a block left."""
        return state.position < state.stop

    def next(self, state: WalkState, piece: Piece) -> WalkState:
        """Behind a piece."""
        return self._find(state.position + piece.stop - piece.start, state.stop, state.batch, state.start)

    def at(self, position: Int32) -> WalkState:
        """At a block of the line, with nothing behind it."""
        return self._find(position, position, Int32(0), Int32(0))

    @cute.jit
    def piece(self, state: WalkState) -> Piece:
        """What a valid state is at, up to the end of the tile or of the share."""
        info, blocks_of, batch = self.common.info(state.batch), self.tile_blocks, state.batch
        head, rest = quotient_and_rest(state.position - state.start, self.head_blocks(batch))
        tile, blocks = Int32(0), blocks_of(info, Int32(0))
        if const_expr(self.uniform):
            tile, rest = quotient_and_rest(rest, blocks.total)
        else:
            while rest >= blocks.total:
                rest -= blocks.total
                tile += 1
                blocks = blocks_of(info, tile)
        stop = cutlass.min(blocks.total, rest + state.stop - state.position)
        numbers = (batch, head, tile, tile * self.tile_m)
        batch, head, tile, first_row = (cute.arch.make_warp_uniform(number) for number in numbers)
        return Piece(batch, head, tile, first_row, info, blocks, rest, stop)

    @property
    def uniform(self) -> bool:
        """Whether the tiles of a sequence have equally many blocks, known at compile time."""
        common = self.common
        return common.window.left is None and common.window.right is None and common.lengths.seqused_q is None

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

    @cute.jit
    def head_blocks(self, batch: Int32) -> Int32:
        """Key blocks of all tiles of one kv head of a sequence; 0 from the last sequence on."""
        blocks, tile_m, uniform, tile_blocks = Int32(0), self.tile_m, self.uniform, self.tile_blocks
        common, gqa_ratio = self.common, self.gqa_ratio
        if batch < common.batches:
            info = common.info(batch)
            tiles = (info.rows_q * gqa_ratio + (tile_m - 1)) // tile_m
            if const_expr(uniform):
                blocks = tiles * tile_blocks(info, Int32(0)).total
            else:
                for tile in cutlass.range(tiles, unroll=1):
                    blocks += tile_blocks(info, tile).total
        return blocks

    @cute.jit
    def _total(self) -> Int32:
        """Blocks of the line."""
        blocks, head_blocks, lane = Int32(0), self.head_blocks, cute.arch.lane_idx()
        for batch in cutlass.range(lane, self.common.batches, 32, unroll=4):
            blocks += head_blocks(batch)
        for step in cutlass.range_constexpr(5):
            blocks += cute.arch.shuffle_sync_bfly(blocks, 1 << step)
        return cute.arch.make_warp_uniform(blocks * self.heads)

    @cute.jit
    def _find(self, position: Int32, stop: Int32, batch: Int32, start: Int32) -> WalkState:
        """The state at ``position``, which is not in a sequence before ``batch``, whose blocks begin at ``start``."""
        heads, head_blocks, batches = self.heads, self.head_blocks, self.common.batches
        lane, searching = cute.arch.lane_idx(), Boolean(True)
        while searching:
            ends = inclusive_sum(head_blocks(batch + lane) * heads, lane) + start
            before = cute.arch.popc(cute.arch.vote_ballot_sync(Uint32(ends) <= Uint32(position)))
            # the sequences that end at or before the position are skipped: their last one's end is the next one's start
            if before > 0:
                start = cute.arch.shuffle_sync(ends, before - 1)
            batch += before
            searching = (before == 32) & (batch < batches)
        return WalkState(*(cute.arch.make_warp_uniform(number) for number in (position, stop, batch, start)))
