"""ALiBi's distances between positions that the caller gives, int32, with whole tiles of rows behind the last one.

They become fp32, which holds integers up to 2^24, relative to the position of a thread's first row: exact within 2^24
of it, wherever that is.
"""

from typing import NamedTuple

import cutlass.cute as cute
from cutlass import Float32, Int32

from cute_fa.device.score import Distance


class RowPositions(NamedTuple):
    """Of a thread's rows, relative to ``base``."""

    base: Int32
    relative: list[Float32]


def row_positions(positions: cute.Tensor, first_row: Int32, rows: list) -> RowPositions:
    """Those of a thread's rows, which count from ``first_row``."""
    own = [positions[first_row + row] for row in rows]
    return RowPositions(own[0], [Float32(position - own[0]) for position in own])


def distances_between(rows: RowPositions, positions: cute.Tensor, first_column: Int32, columns: list[int]) -> Distance:
    """|row − column| of registers (r, c): ``columns`` are static, pairs of neighbours, and count from ``first_column``,
    which is even."""
    pairs = cute.make_rmem_tensor((2, len(columns) // 2), Int32)
    copy = cute.make_copy_atom(cute.nvgpu.CopyUniversalOp(), Int32, num_bits_per_copy=64)
    start = positions.iterator + first_column
    for i in range(len(columns) // 2):
        source = cute.make_tensor((start + columns[2 * i]).align(8), cute.make_layout(2))
        cute.copy(copy, source, pairs[None, i])
    values = [Float32(pairs[i] - rows.base) for i in range(len(columns))]

    def distance(r: int, c: int) -> Float32:
        return cute.math.absf(rows.relative[r] - values[c])

    return distance
