"""Where a row of a paged sequence lies."""

from cutlass import Int32


def page_place(row: Int32, page_size: int) -> tuple[Int32, Int32]:
    """(which page of the sequence, which row of that page), of a row that is not negative: a shift and a mask, where
    ``//`` rounds towards minus infinity with five instructions more."""
    return row >> (page_size.bit_length() - 1), row & (page_size - 1)
