"""Products of one warp on mma.sync m16n8k16: operands from swizzled shared memory or from registers."""

from collections.abc import Callable

import cutlass.cute as cute
from cutlass import Float32, Uint32
from cutlass.cute.nvgpu import warp

from fa2_sm80.common.copies import ColumnPart, FragmentLoader

STEP = 16  # of rows, columns and depth: what one ldmatrix.x4 brings


class WarpProduct:
    """acc (rows, columns) += A (rows, depth) · B (depth, columns) of one warp, all multiples of 16."""

    def __init__(self, dtype, rows: int, columns: int, depth: int):
        self.rows, self.columns, self.depth = rows, columns, depth
        self.mma = cute.make_tiled_mma(warp.MmaF16BF16Op(dtype, Float32, (16, 8, 16)))
        thread = self.mma.get_slice(0)
        self.shape_a = thread.partition_shape_A((rows, STEP))
        self.shape_b = thread.partition_shape_B((STEP, STEP))
        self.shape_acc = thread.partition_shape_C((rows, columns))

    def accumulator(self) -> cute.Tensor:
        """Zeros: ((2, 2), rows / 16, columns / 8) of one thread."""
        acc = cute.make_rmem_tensor(self.shape_acc, Float32)
        acc.fill(0.0)
        return acc

    def add(self, acc: cute.Tensor, load_a: Callable, load_b: FragmentLoader, stage_b, transposed_b: bool):
        """``load_a(k)``: operand A of the depth's step k. B lies in shared memory, with its columns as rows, or with
        its depth as rows (``transposed_b``)."""
        for k in range(self.depth // STEP):
            rA = load_a(k)
            for n in range(self.columns // STEP):
                rB = self.mma.make_fragment_B(self.shape_b)
                row, column = (k * STEP, n * STEP) if transposed_b else (n * STEP, k * STEP)
                load_b.load(cute.recast_tensor(rB, Uint32), 0, row, column, stage_b)
                target = cute.logical_divide(acc, (None, None, 2))[None, None, (None, n)]
                cute.gemm(self.mma, target, rA, rB[None, None, 0], target)

    def from_smem(self, loader: FragmentLoader, stage, transposed: bool = False) -> Callable:
        """Operand A out of shared memory, (rows, depth) there, or (depth, rows) if ``transposed``."""

        def load(k: int) -> cute.Tensor:
            rA = self.mma.make_fragment_A(self.shape_a)
            registers = cute.recast_tensor(rA, Uint32)
            for m in range(self.rows // STEP):
                row, column = (k * STEP, m * STEP) if transposed else (m * STEP, k * STEP)
                loader.load(registers, 4 * m, row, column, stage)
            return rA[None, None, 0]

        return load

    @staticmethod
    def from_registers(fragment: cute.Tensor) -> Callable:
        """Operand A as ``as_operand_a`` shows it, ((2, 2, 2), rows / 16, depth / 16)."""
        return lambda k: fragment[None, None, k]


class WarpPlace:
    """Where a warp stands in a :class:`~fa2_sm80.common.warp_grid.WarpGrid`, and where a thread of it stands in the
    warp's part of an accumulator: ``row`` and ``column`` of its first register. ``part``: the warp's columns, None if
    it has them all."""

    def __init__(self, grid, rows: int, columns: int, depth: int = 0):
        """``rows``, ``columns``, ``depth``: what one warp has of each."""
        index = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        lane = cute.arch.lane_idx()
        self.index = index % (grid.rows * grid.columns)
        self.first_row = index % grid.rows * rows
        self.first_column = index // grid.rows % grid.columns * columns
        self.first_depth = index // (grid.rows * grid.columns) * depth
        self.part = ColumnPart(self.first_column, columns) if grid.columns > 1 else None
        self.row = self.first_row + lane // 4
        self.column = self.first_column + lane % 4 * 2


def register_row(r: int) -> int:
    """Row of register row ``r`` of ``rows_and_columns``, relative to the thread's first one."""
    return r % 2 * 8 + r // 2 * 16


def register_column(c: int) -> int:
    """Column of register column ``c`` of ``rows_and_columns``, relative to the thread's first one."""
    return c % 2 + c // 2 * 8
