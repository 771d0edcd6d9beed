"""Which chunks of keys a CTA of a decoding kernel computes in batch-invariant mode.

A chunk is a fixed number of keys of a sequence, counted from its first key. What a chunk adds to a row depends on the
row and on those keys alone, and the chunks of a row are added in one order, from its last to its first: so the bits of
a row are the same whatever else is in its tile, in the batch, or on the GPU (H. He, "Defeating Nondeterminism in LLM
Inference", 2025: fixed split sizes; FlashAttention-4's ``seqlen_k_per_split``).

A piece is a chunk of a tile. Two ways over them, which give the same bits:

* tiles enough for all SMs (``parts`` 1): a CTA takes tile after tile and adds up each one's chunks;
* few tiles: a CTA has one chunk of one tile, and a second kernel adds them up.

Tiles are counted by the longest sequence's, the last ones first, which see most keys under a causal mask; those that a
sequence does not have are skipped.
"""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32, Uint32

from cute_fa.device.arguments import CommonArguments
from cute_fa.device.block_range import BlockRange
from cute_fa.device.split_walk import EVEN_SLOTS, Piece, RowTiles, SplitGrid, SplitWalk
from cute_fa.device.tile_scheduler import quotient_and_rest


class ChunkState(NamedTuple):
    """``tile``: the CTA's, of all; ``start``: the iteration of its walk where the next chunk begins; ``turn``: 0 or 1,
    the other one for each chunk."""

    tile: Int32
    start: Int32
    turn: Int32


class ChunkWalk(RowTiles):
    """The pieces of a CTA. All lanes of a warp call its methods together."""

    def __init__(self, config, common: CommonArguments, grid: SplitGrid):
        super().__init__(config, common)
        self.grid, self.sequences = grid, common.batches * self.heads
        self.total = grid.tiles * self.sequences

    @cute.jit
    def first(self, cta: Int32) -> ChunkState:
        """The CTA's first tile, or its only chunk."""
        tile, chunk = quotient_and_rest(cta, self.grid.parts)
        start, exists, blocks_of, above, next_tile = Int32(0), self.exists, self.blocks, self.above, self.next_tile
        chunk_blocks, total = self.grid.chunk_blocks, self.total
        if self.grid.parts == 1:
            tile = next_tile(tile)
        elif exists(tile):
            blocks = blocks_of(tile)
            start = above(blocks, (chunk + 1) * chunk_blocks)
            if start == above(blocks, chunk * chunk_blocks):
                tile = total
        else:
            tile = total
        return ChunkState(*(cute.arch.make_warp_uniform(number) for number in (tile, start, Int32(0))))

    def valid(self, state: ChunkState) -> Boolean:
        """Whether there is a piece left."""
        return state.tile < self.total

    def piece(self, state: ChunkState) -> Piece:
        """The chunk that a valid state is at."""
        batch, head, block = self.place(state.tile)
        blocks, grid, alone = self.blocks(state.tile), self.grid, self.grid.parts == 1
        chunk, stop = self.chunk(blocks, state.start)
        in_turn, own = EVEN_SLOTS * cute.arch.block_idx()[0] + state.turn, state.tile * grid.parts + chunk
        return Piece(
            *(batch, head, block, block * self.tile_m, self.common.info(batch), blocks),
            start=state.start,
            stop=stop,
            units=Int32(1),
            whole=alone & (stop == blocks.total),
            slot=cutlass.select_(alone, in_turn, own),
        )

    @cute.jit
    def next(self, state: ChunkState, piece: Piece) -> ChunkState:
        """Behind a piece."""
        tile, start, next_tile = state.tile, piece.stop, self.next_tile
        if (piece.stop == piece.blocks.total) | (self.grid.parts > 1):
            tile, start = next_tile(tile + self.grid.ctas), Int32(0)
        return ChunkState(*(cute.arch.make_warp_uniform(number) for number in (tile, start, state.turn ^ 1)))

    def found_again(self, state: ChunkState) -> ChunkState:
        """The same, from a number that went through a shuffle: what follows from it is computed anew."""
        return state._replace(tile=cute.arch.make_warp_uniform(state.tile))

    def place(self, tile: Int32) -> tuple[Int32, Int32, Int32]:
        """(sequence, kv head, tile of that head)."""
        behind, sequence = quotient_and_rest(tile, self.sequences)
        return *quotient_and_rest(sequence, self.heads), self.grid.tiles - 1 - behind

    @cute.jit
    def exists(self, tile: Int32) -> Boolean:
        """Whether the sequence is so long."""
        found = Boolean(False)
        if tile < self.total:
            batch, _, block = self.place(tile)
            found = block * self.tile_m < self.common.info(batch).rows_q * self.gqa_ratio
        return found

    @cute.jit
    def next_tile(self, tile: Int32) -> Int32:
        """This tile, or the CTA's next one that exists."""
        exists, ctas = self.exists, self.grid.ctas
        while (tile < self.total) & (not exists(tile)):
            tile += ctas
        return tile

    def blocks(self, tile: Int32) -> BlockRange:
        """Key blocks of a tile that exists."""
        batch, _, block = self.place(tile)
        return self.tile_blocks(self.common.info(batch), block)

    def chunk(self, blocks: BlockRange, iteration: Int32) -> tuple[Int32, Int32]:
        """The chunk that an iteration of a tile's walk is in, and the iteration behind it."""
        block, chunk_blocks = blocks.block(iteration, self.common.window), self.grid.chunk_blocks
        chunk = Int32(Uint32(block) // Uint32(chunk_blocks))
        return chunk, self.above(blocks, chunk * chunk_blocks)

    def above(self, blocks: BlockRange, block: Int32) -> Int32:
        """Iterations of a tile's walk down to a block and with it, which are its first ones."""
        of_window = cutlass.max(cutlass.min(blocks.last_block + 1 - block, blocks.window_end), 0)
        of_sink = cutlass.max(blocks.total - blocks.window_end - block, 0)
        return of_window + of_sink


def make_walk(config, common: CommonArguments, grid: SplitGrid) -> SplitWalk | ChunkWalk:
    """How a CTA of a kernel with this config finds its pieces."""
    return ChunkWalk(config, common, grid) if config.batch_invariant else SplitWalk(config, common, grid)
