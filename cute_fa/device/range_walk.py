"""Which blocks a tile of rows visits under a range plan: a list that the plan made, where a window gives ranges of
blocks.

A *walk* is of tiles of rows, queries (or, in a backward's tiles of keys, keys), over blocks of columns: keys (or
queries). ``fa2_sm80.ranges`` makes it, once for all layers and heads. It is one int32 tensor:

    header   HEADER words: entries and mask tiles in use, tiles of rows that have blocks, tiles of rows that found no
             room, and the word at which mask tiles begin
    order    a word for each tile of rows: their numbers, the one with the most blocks first, those without at the end
    table    four words for each tile of rows: its first entry, how many of its blocks have a mask, how many it has in
             all (NO_ROOM: it found none), its first mask tile
    entries  a word for each block to visit: those of a tile of rows that have a mask, the last block first, which alone
             may reach beyond the columns, then those that need none
    masks    tiles of bits, mask_words(columns) words a row: bit c % 32 of word c // 32 says that column c is seen

Mask tile 0 hides nothing, for kernels that take each tile's first block as masked. Sections begin at multiples of four
words.
"""

from collections.abc import Callable
from typing import NamedTuple, Optional

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32

from cute_fa.device.block_range import MaskedRange
from cute_fa.semantics.walk_layout import NO_ROOM, TABLE_WORDS, Header, mask_words, table_start


class BlockList(NamedTuple):
    """The blocks that a tile of rows visits, in the place of a ``BlockRange`` or ``QueryRange``: iterations 0 …
    ``total``, of which the first ``masked`` have a mask."""

    walk: cute.Tensor
    masked: Int32
    total: Int32
    first_entry: Int32
    first_mask: Int32

    def ranges(self, left_bound: bool = False) -> list[MaskedRange]:
        """The walk over all iterations."""
        return [
            MaskedRange(Int32(0), self.masked, True, False),
            MaskedRange(self.masked, self.total, False, False),
        ]

    def block(self, iteration: Int32, window=None) -> Int32:
        """Block of columns of an iteration."""
        return self.walk[self.first_entry + iteration]

    def mask_row(
        self,
        iteration: Int32,
        row: Int32,
        tile_rows: int,
        tile_columns: int,
        first_column: Optional[Int32] = None,
        columns: int = 0,
    ) -> cute.Tensor:
        """What the row of the tile sees of a masked iteration's block, registers of bits: of all columns, or of the
        words in which ``columns`` lie from ``first_column``, a multiple of them, on. The first iteration may be asked
        for where it has no mask, too."""
        words = mask_words(tile_columns)
        mask = cutlass.select_(self.masked > iteration, self.first_mask + iteration, Int32(0))
        start = self.walk[Header.MASKS] + (mask * tile_rows + row) * words
        if first_column is not None:
            words, start = mask_words(columns), start + first_column // 32
        bits = cute.make_rmem_tensor(words, Int32)
        copy = cute.make_copy_atom(cute.nvgpu.CopyUniversalOp(), Int32, num_bits_per_copy=min(128, 32 * words))
        pointer = (self.walk.iterator + start).align(min(16, 4 * words))
        cute.copy(copy, cute.make_tensor(pointer, cute.make_layout(words)), bits)
        return bits


class RangeWalk(NamedTuple):
    """A walk's tensor, of ``tiles`` tiles of rows."""

    walk: cute.Tensor
    tiles: Int32

    @classmethod
    def of(cls, walk: cute.Tensor, rows: Int32, tile_rows: int) -> "RangeWalk":
        """The walk of ``rows`` rows in tiles of ``tile_rows``."""
        return cls(walk, cute.ceil_div(rows, tile_rows))

    @property
    def filled(self) -> Int32:
        """Tiles of rows that have blocks."""
        return self.walk[Header.FILLED]

    @property
    def poison(self) -> Float32:
        """What sums over all tiles of rows begin with: 0, NaN if one found no room."""
        return cutlass.select_(self.walk[Header.NO_ROOM] > 0, Float32(float("nan")), Float32(0.0))

    def tile(self, rank: Int32) -> Int32:
        """The tile of rows that is computed as the ``rank``-th."""
        return self.walk[Header.WORDS + rank]

    def blocks(self, tile: Int32) -> BlockList:
        """The blocks of a tile of rows."""
        at = table_start(self.tiles) + TABLE_WORDS * tile
        first_entry, masked, total, first_mask = (self.walk[at + i] for i in range(TABLE_WORDS))
        return BlockList(self.walk, masked, total, first_entry, first_mask)


def poisoned(blocks: BlockList) -> Float32:
    """What sums of a tile begin with: 0, NaN if the plan had no room for its blocks."""
    return cutlass.select_(blocks.total == NO_ROOM, Float32(float("nan")), Float32(0.0))


def hidden_columns(bits: cute.Tensor, first_column: Int32) -> Callable[[int], Boolean]:
    """Which columns a row does not see, by its mask's bits; columns count from ``first_column``, below 32, at which the
    thread's own begin."""
    shifted = [bits[i] >> first_column for i in range(cute.size(bits))]

    def hidden(column: int) -> Boolean:
        return (shifted[column // 32] & _bit(column % 32)) == 0

    return hidden


def _bit(index: int) -> int:
    """The word with one bit, as int32."""
    return 1 << index if index < 31 else -(1 << 31)


def hide(scores: cute.Tensor, columns: cute.Tensor, hidden_in_row: list[Callable[[int], Boolean]]):
    """Scores of hidden columns become −inf, on the (rows, columns) view of an accumulator; ``columns``: thread 0's
    static ones."""
    for r in range(cute.size(scores, mode=[0])):
        for c in range(cute.size(scores, mode=[1])):
            hidden = hidden_in_row[r](columns[0, c][1])
            scores[r, c] = cutlass.select_(hidden, Float32(-Float32.inf), scores[r, c])
