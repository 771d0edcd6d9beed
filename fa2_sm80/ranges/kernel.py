"""A range plan becomes a walk (``cute_fa.device.range_walk``): which blocks of columns each tile of rows sees, and bit
masks for those that it sees in part.

A CTA makes the list of one tile of rows. It marks the blocks that a range touches, and those that one alone covers, in
two bit sets; what is touched and not covered gets a mask, unless that turns out to hide nothing. A range's rows are as
``cute_fa.engine.range_plans`` has clipped them, each with a visible column, so that what lies between the first and the
last block that it touches is touched.

To find the ranges of a tile of rows without looking at all: they are sorted by class, the power of two not above their
number of rows, and then by their first row. Of a class of 2^c those that meet rows [first, stop) begin behind
first − 2^(c+1) and before stop: neighbours, at most three times as many as meet them. A lane looks each class up, in
log n steps: O(n log n) for the sort, O(log n) a tile of rows, and what the ranges then name.
"""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32, Uint32, range_constexpr
from cutlass.memory import SmemAllocator

from cute_fa.device.fake_arguments import fake_tensor, fake_vector
from cute_fa.semantics.walk_layout import NO_ROOM, TABLE_WORDS, Header, entries_start, masks_start, table_start
from fa2_sm80.ranges.config import CLASSES, MAX_BLOCKS, NUM_THREADS, RangeWalkConfig


class WalkArguments(NamedTuple):
    """``ranges`` int32 (n, 8), sorted: first and last row, first and last column, both ends exclusive behind, least and
    largest column − row. ``classes`` int32 (CLASSES + 1): where a class begins. ``walk``: written, its header 0 but for
    one mask tile, with room for so many entries and mask tiles. ``counted_rows``: only what all of these see of a block
    needs no mask; ``rows``, or those of whole tiles."""

    ranges: cute.Tensor
    classes: cute.Tensor
    walk: cute.Tensor
    rows: Int32
    columns: Int32
    counted_rows: Int32
    entry_capacity: Int32
    mask_capacity: Int32

    @property
    def masks(self) -> Int32:
        """Where mask tiles begin."""
        return masks_start(cute.arch.grid_dim()[0], self.entry_capacity)


class Piece(NamedTuple):
    """What a range names of a tile of rows: rows [start, stop), of which row i sees columns [first_column, stop_column)
    from i + ``least`` to i + ``most``."""

    start: Int32
    stop: Int32
    first_column: Int32
    stop_column: Int32
    least: Int32
    most: Int32

    def seen(self, row: Int32):
        """[first, stop) of the columns that a row sees, if it is one of these."""
        first = cutlass.max(self.first_column, row + self.least)
        return first, cutlass.min(self.stop_column, row + self.most + 1)

    def touched(self):
        """[first, stop) of the columns that one of the rows sees."""
        return self.seen(self.start)[0], self.seen(self.stop - 1)[1]

    def covered(self):
        """[first, stop) of the columns that all of the rows see; empty if first ≥ stop."""
        return self.seen(self.stop - 1)[0], self.seen(self.start)[1]


class Shared(NamedTuple):
    """In shared memory: bit sets of blocks, ``first`` and ``stop`` of each class's ranges, ``hits`` of a tile among
    NUM_THREADS ranges, and ``numbers``, see :class:`Number`."""

    touched: cute.Tensor
    covered: cute.Tensor
    first: cute.Tensor
    stop: cute.Tensor
    hits: cute.Tensor
    numbers: cute.Tensor


class Number:
    """Places in :class:`Shared`'s ``numbers``."""

    TOTAL, MASKED, HITS, HIDES, FIRST_ENTRY, FIRST_MASK, COUNT = range(7)


class RangeWalkKernel:
    """Device code of one :class:`RangeWalkConfig`."""

    def __init__(self, config: RangeWalkConfig):
        self.config = config

    @cute.jit
    def __call__(self, args: WalkArguments, stream):
        tiles = cute.ceil_div(args.rows, self.config.tile_rows)
        self.kernel(args).launch(grid=(tiles, 1, 1), block=(NUM_THREADS, 1, 1), stream=stream)

    @cute.kernel
    def kernel(self, args: WalkArguments):
        """The list of one tile of rows."""
        tidx, _, _ = cute.arch.thread_idx()
        tile, _, _ = cute.arch.block_idx()
        shared = self.allocate()
        words = cute.ceil_div(args.columns, 32 * self.config.tile_columns)
        self.clear(shared, words, tidx)
        self.find(args, shared, tile, tidx)
        cute.arch.sync_threads()
        self.mark(args, shared, tile, tidx)
        cute.arch.sync_threads()
        self.count(shared, words, tidx)
        cute.arch.sync_threads()
        if tidx == 0:
            self.reserve(args, shared)
        cute.arch.sync_threads()
        total, masked = shared.numbers[Number.TOTAL], Int32(0)
        first_entry, first_mask = shared.numbers[Number.FIRST_ENTRY], shared.numbers[Number.FIRST_MASK]
        if total > 0:
            masked = self.write_masks(args, shared, words, tile, first_entry, first_mask, tidx)
            cute.arch.sync_threads()
            if tidx < 32:
                self.write_covered(args, shared, words, first_entry + masked, tidx)
        if tidx == 0:
            at = table_start(cute.arch.grid_dim()[0]) + TABLE_WORDS * tile
            args.walk[at] = first_entry
            args.walk[at + 1] = masked
            args.walk[at + 2] = total
            args.walk[at + 3] = first_mask
            if tile == 0:
                args.walk[Header.MASKS] = args.masks
        if tile == 0:
            for i in cutlass.range(tidx, self.config.tile_rows * self.config.words, NUM_THREADS, unroll=1):
                args.walk[args.masks + i] = Int32(-1)

    def allocate(self) -> Shared:
        """Shared memory."""
        allocator = SmemAllocator()
        sizes = (MAX_BLOCKS // 32, MAX_BLOCKS // 32, CLASSES, CLASSES, NUM_THREADS, Number.COUNT)
        return Shared(*(allocator.allocate_tensor(Int32, cute.make_layout(size)) for size in sizes))

    @cute.jit
    def clear(self, shared: Shared, words: Int32, tidx: Int32):
        """Nothing is marked or counted."""
        for word in cutlass.range(tidx, words, NUM_THREADS, unroll=1):
            shared.touched[word] = Int32(0)
            shared.covered[word] = Int32(0)
        if tidx < Number.COUNT:
            shared.numbers[tidx] = Int32(0)

    @cute.jit
    def find(self, args: WalkArguments, shared: Shared, tile: Int32, tidx: Int32):
        """Which ranges of each class may meet the tile's rows: a lane a class."""
        ranges = args.ranges
        if tidx < CLASSES:
            begin, end = args.classes[tidx], args.classes[tidx + 1]
            first_row = tile * self.config.tile_rows
            reach = Int32(1) << cutlass.min(tidx, 30)  # twice that is what they are shorter than; rows are below 2^30
            low, high = begin, end
            while low < high:
                middle = (low + high) // 2
                behind = ranges[middle, 0] + reach <= first_row - reach
                low = cutlass.select_(behind, middle + 1, low)
                high = cutlass.select_(behind, high, middle)
            shared.first[tidx] = low
            high = end
            while low < high:
                middle = (low + high) // 2
                before = ranges[middle, 0] < first_row + self.config.tile_rows
                low = cutlass.select_(before, middle + 1, low)
                high = cutlass.select_(before, high, middle)
            shared.stop[tidx] = low

    @cute.jit
    def piece(self, args: WalkArguments, tile: Int32, index: Int32) -> Piece:
        """A range's part in the tile's rows; start ≥ stop if there is none."""
        first_row = tile * self.config.tile_rows
        start, stop, first_column, stop_column, least, most = (args.ranges[index, i] for i in range(len(Piece._fields)))
        start = cutlass.max(start, first_row)
        stop = cutlass.min(stop, first_row + self.config.tile_rows)
        return Piece(start, stop, first_column, stop_column, least, most)

    @cute.jit
    def mark(self, args: WalkArguments, shared: Shared, tile: Int32, tidx: Int32):
        """Blocks that are touched, and those that a range covers: a thread a range."""
        piece_of, mark_blocks = self.piece, self.mark_blocks
        columns, rows = self.config.tile_columns, self.config.tile_rows
        first_row = tile * rows
        last_row = cutlass.min(first_row + rows, args.counted_rows)
        for c in cutlass.range(0, CLASSES, unroll=1):
            for index in cutlass.range(shared.first[c] + tidx, shared.stop[c], NUM_THREADS, unroll=1):
                piece = piece_of(args, tile, index)
                if piece.start < piece.stop:
                    first, stop = piece.touched()
                    mark_blocks(shared.touched, first // columns, (stop - 1) // columns + 1)
                    if piece.start == first_row and piece.stop == last_row:
                        first, stop = piece.covered()
                        if first < stop:
                            mark_blocks(shared.covered, (first + columns - 1) // columns, stop // columns)

    @cute.jit
    def mark_blocks(self, blocks: cute.Tensor, first: Int32, stop: Int32):
        """Add blocks [first, stop) to a bit set."""
        if first < stop:
            for word in cutlass.range(first // 32, (stop - 1) // 32 + 1, unroll=1):
                bits = bits_between(first - 32 * word, stop - 32 * word)
                cute.arch.atomic_or(blocks.iterator + word, bits, scope="cta")

    @cute.jit
    def count(self, shared: Shared, words: Int32, tidx: Int32):
        """How many blocks are touched, and how many of them not covered."""
        total, masked = Int32(0), Int32(0)
        for word in cutlass.range(tidx, words, NUM_THREADS, unroll=1):
            touched = shared.touched[word]
            total += cute.arch.popc(touched)
            masked += cute.arch.popc(touched & ~shared.covered[word])
        if total > 0:
            cute.arch.atomic_add(shared.numbers.iterator + Number.TOTAL, total, scope="cta")
        if masked > 0:
            cute.arch.atomic_add(shared.numbers.iterator + Number.MASKED, masked, scope="cta")

    @cute.jit
    def reserve(self, args: WalkArguments, shared: Shared):
        """Places for entries and mask tiles; without room there is no list."""
        total, masked = shared.numbers[Number.TOTAL], shared.numbers[Number.MASKED]
        first_entry = cute.arch.atomic_add(args.walk.iterator + Header.ENTRIES, total, scope="gpu")
        first_mask = cute.arch.atomic_add(args.walk.iterator + Header.MASK_TILES, masked, scope="gpu")
        if first_entry + total > args.entry_capacity or first_mask + masked > args.mask_capacity:
            total, first_entry = Int32(NO_ROOM), Int32(0)
            cute.arch.atomic_add(args.walk.iterator + Header.NO_ROOM, Int32(1), scope="gpu")
        if total > 0:
            cute.arch.atomic_add(args.walk.iterator + Header.FILLED, Int32(1), scope="gpu")
        shared.numbers[Number.TOTAL] = total
        shared.numbers[Number.FIRST_ENTRY] = entries_start(cute.arch.grid_dim()[0]) + first_entry
        shared.numbers[Number.FIRST_MASK] = first_mask

    @cute.jit
    def write_masks(
        self,
        args: WalkArguments,
        shared: Shared,
        words: Int32,
        tile: Int32,
        first_entry: Int32,
        first_mask: Int32,
        tidx: Int32,
    ) -> Int32:
        """Entries and masks of the blocks that are touched and not covered, from the last on, since kernels take none
        but a tile's first block to reach beyond the columns; those whose mask hides nothing become covered ones.
        Returns how many have a mask."""
        write_mask = self.write_mask
        written = Int32(0)
        for behind in cutlass.range(0, words, unroll=1):
            word = words - 1 - behind
            left = Uint32(shared.touched[word] & ~shared.covered[word])
            cute.arch.sync_threads()  # all have read the word before it changes
            while left != 0:
                place = last_set(left)
                left = left ^ (Uint32(1) << place)
                block = 32 * word + place
                hides = write_mask(args, shared, tile, block, first_mask + written, tidx)
                if tidx == 0:
                    if hides:
                        args.walk[first_entry + written] = block
                    else:
                        shared.covered[word] = shared.covered[word] | (Int32(1) << place)
                written = cutlass.select_(hides, written + 1, written)
        return written

    @cute.jit
    def write_mask(
        self, args: WalkArguments, shared: Shared, tile: Int32, block: Int32, mask: Int32, tidx: Int32
    ) -> Boolean:
        """The bits of a tile of rows and a block: a thread a row. Returns whether it hides a column of a row."""
        c, piece_of, numbers = self.config, self.piece, shared.numbers
        first_row, first_column = tile * c.tile_rows, block * c.tile_columns
        bits = cute.make_rmem_tensor((c.rows_per_thread, c.words), Int32)
        bits.fill(0)
        for cls in cutlass.range(0, CLASSES, unroll=1):
            for start in cutlass.range(shared.first[cls], shared.stop[cls], NUM_THREADS, unroll=1):
                index = start + tidx
                if index < shared.stop[cls]:
                    piece = piece_of(args, tile, index)
                    if piece.start < piece.stop:
                        first, stop = piece.touched()
                        if first < first_column + c.tile_columns and stop > first_column:
                            place = cute.arch.atomic_add(numbers.iterator + Number.HITS, Int32(1), scope="cta")
                            shared.hits[place] = index
                cute.arch.sync_threads()
                for hit in cutlass.range(0, numbers[Number.HITS], unroll=1):
                    piece = piece_of(args, tile, shared.hits[hit])
                    for r in range_constexpr(c.rows_per_thread):
                        row = first_row + tidx + r * NUM_THREADS
                        if row >= piece.start and row < piece.stop:
                            first, stop = piece.seen(row)
                            for word in range_constexpr(c.words):
                                column = first_column + 32 * word
                                bits[r, word] = bits[r, word] | bits_between(first - column, stop - column)
                cute.arch.sync_threads()
                if tidx == 0:
                    numbers[Number.HITS] = Int32(0)
                cute.arch.sync_threads()
        hides = Boolean(False)
        for r in range_constexpr(c.rows_per_thread):
            row = tidx + r * NUM_THREADS
            if row < c.tile_rows:
                at = args.masks + (mask * c.tile_rows + row) * c.words
                for word in range_constexpr(c.words):
                    args.walk[at + word] = bits[r, word]
                    if first_row + row < args.counted_rows:
                        shown = all_of(c.tile_columns - 32 * word)
                        hides = hides | ((bits[r, word] & shown) != shown)
        if hides:
            numbers[Number.HIDES] = Int32(1)
        cute.arch.sync_threads()
        hides = numbers[Number.HIDES] != 0
        cute.arch.sync_threads()
        if tidx == 0:
            numbers[Number.HIDES] = Int32(0)
        return hides

    @cute.jit
    def write_covered(self, args: WalkArguments, shared: Shared, words: Int32, first_entry: Int32, lane: Int32):
        """Entries of the covered blocks: by a warp, a lane a word."""
        for start in cutlass.range(0, words, 32, unroll=1):
            word, left = start + lane, Uint32(0)
            if word < words:
                left = Uint32(shared.touched[word] & shared.covered[word])
            count = Int32(cute.arch.popc(left))
            behind = count
            for step in range_constexpr(5):
                below = cute.arch.shuffle_sync_up(behind, 1 << step)
                behind += cutlass.select_(lane >= 1 << step, below, Int32(0))
            at = first_entry + behind - count
            while left != 0:
                args.walk[at] = 32 * word + first_set(left)
                left = left & (left - 1)
                at += 1
            first_entry += cute.arch.shuffle_sync(behind, 31)


def bits_between(first: Int32, stop: Int32) -> Int32:
    """The word whose bits [first, stop) are set, of any ints."""
    return _bits_below(stop) & ~_bits_below(first)


def _bits_below(stop: Int32) -> Int32:
    stop = cutlass.min(cutlass.max(stop, 0), 32)
    return cutlass.select_(stop == 32, Int32(-1), (Int32(1) << (stop & 31)) - 1)


def first_set(bits: Uint32) -> Int32:
    """Place of the lowest bit that is set."""
    return Int32(cute.arch.popc(~bits & (bits - 1)))


def last_set(bits: Uint32) -> Int32:
    """Place of the highest bit that is set."""
    for distance in (1, 2, 4, 8, 16):
        bits = bits | (bits >> distance)
    return Int32(cute.arch.popc(bits)) - 1


def all_of(columns: int) -> int:
    """The word, as an int32, whose bits stand for so many columns."""
    columns = min(max(columns, 0), 32)
    return -1 if columns == 32 else (1 << columns) - 1


def build(config: RangeWalkConfig):
    """The callable and its fake arguments for ``cute.compile``."""
    ranges = fake_tensor(Int32, cute.sym_int(), 8, aligned=4)
    numbers = (Int32(0) for _ in range(5))
    fakes = WalkArguments(ranges, fake_vector(Int32), fake_tensor(Int32, cute.sym_int(), aligned=4), *numbers)
    return RangeWalkKernel(config), (fakes, cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True))
