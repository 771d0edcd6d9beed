"""Where the parts of a range plan's walk lie in its tensor (``cute_fa.device.range_walk``): plain numbers, without the
DSL, for the host as well; numbers of tiles and entries are ints, or integers in device code."""

from __future__ import annotations

from typing import Any

HEADER = 8
TABLE_WORDS = 4
NO_ROOM = -1


class Header:
    """Places in the header."""

    ENTRIES = 0  # in use
    MASK_TILES = 1  # in use
    FILLED = 2  # tiles of rows that have blocks
    NO_ROOM = 3  # tiles of rows that found none
    MASKS = 4  # where mask tiles begin
    WORDS = HEADER


def tiles_of(rows: int, tile: int) -> int:
    """Tiles that so many rows, or columns, fill."""
    return -(-rows // tile)


def aligned(words: Any) -> Any:
    """The next multiple of four words; of ints or of integers in device code."""
    return (words + 3) // 4 * 4


def table_start(tiles: Any) -> Any:
    """Where the table begins, of so many tiles of rows."""
    return HEADER + aligned(tiles)


def entries_start(tiles: Any) -> Any:
    """Where the entries begin."""
    return table_start(tiles) + TABLE_WORDS * tiles


def masks_start(tiles: Any, entries: Any) -> Any:
    """Where mask tiles begin, behind room for so many entries."""
    return entries_start(tiles) + aligned(entries)


def mask_words(columns: int) -> int:
    """Words of a mask's row: a power of two, so that a thread loads its part at once."""
    return 1 << (-(-columns // 32) - 1).bit_length()
