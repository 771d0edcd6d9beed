"""ALiBi's distances between positions that the caller gives, int32, with whole tiles of rows behind the last one."""

import cutlass.cute as cute
from cutlass import Float32, Int32

from cute_fa.device.score import Distance


def row_positions(positions: cute.Tensor, first_row: Int32, rows: list) -> list[Float32]:
    """Those of a thread's rows, which count from ``first_row``."""
    return [Float32(positions[first_row + row]) for row in rows]


def distances_between(rows: list[Float32], positions: cute.Tensor, first_column: Int32, columns: list[int]) -> Distance:
    """|row − column| of registers (r, c): ``columns`` are static, pairs of neighbours, and count from ``first_column``,
    which is even."""
    pairs = cute.make_rmem_tensor((2, len(columns) // 2), Int32)
    copy = cute.make_copy_atom(cute.nvgpu.CopyUniversalOp(), Int32, num_bits_per_copy=64)
    start = positions.iterator + first_column
    for i in range(len(columns) // 2):
        source = cute.make_tensor((start + columns[2 * i]).align(8), cute.make_layout(2))
        cute.copy(copy, source, pairs[None, i])
    values = [Float32(pairs[i]) for i in range(len(columns))]

    def distance(r: int, c: int) -> Float32:
        return cute.math.absf(rows[r] - values[c])

    return distance
