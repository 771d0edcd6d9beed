"""The matrix products on wgmma, all of 64 rows: of two tiles in shared memory, and of scores in registers.

Of keys: Sᵀ = K·Qᵀ and dV += Pᵀ·dO by one warpgroup, dPᵀ = V·dOᵀ and dK += dSᵀ·Q by the other.
Of queries: S = Q·Kᵀ, dP = dO·Vᵀ and dQ += dS·K by each.
"""

import cutlass.cute as cute
from cutlass import Float32, Int32
from cutlass.cute.nvgpu import OperandMajorMode, warpgroup

from fa3_sm90.backward.config import WGMMA_K, WGMMA_M
from fa3_sm90.backward.products import multiply, transposed
from fa3_sm90.backward_split.config import TILE


class ScoreProduct:
    """Rows of one tile by rows of others, (64, 64)."""

    def __init__(self, dtype, own: cute.Tensor, others: cute.Tensor):
        """``own`` (64, columns), ``others`` (64, columns, stages), in shared memory."""
        smem, major = warpgroup.OperandSource.SMEM, OperandMajorMode.K
        self.operation = warpgroup.MmaF16BF16Op(dtype, Float32, (WGMMA_M, TILE, WGMMA_K), smem, major, major)
        part = cute.make_tiled_mma(self.operation).get_slice(0)
        self.own = part.make_fragment_A(part.partition_A(own))[None, 0, None]
        self.others = part.make_fragment_B(part.partition_B(others))
        self.shape = part.partition_shape_C((WGMMA_M, TILE))

    def accumulator(self) -> cute.Tensor:
        """Of one step: kept from step to step its registers would count as used in between."""
        return cute.make_rmem_tensor(self.shape, Float32)

    @cute.jit
    def start(self, acc: cute.Tensor, stage: Int32):
        """Issue it as a group, with the others of a stage."""
        multiply(self.operation, acc, self.own, self.others[None, 0, None, stage], True)
        warpgroup.commit_group()


class SumProduct:
    """What scores (64, 64) in registers add to the gradients of their 64 rows."""

    def __init__(self, dtype, others: cute.Tensor):
        """``others`` (64, columns, stages), in shared memory."""
        columns, registers = cute.size(others, mode=[1]), warpgroup.OperandSource.RMEM
        shape = (WGMMA_M, columns, WGMMA_K)
        self.operation = warpgroup.MmaF16BF16Op(
            dtype, Float32, shape, registers, OperandMajorMode.K, OperandMajorMode.MN
        )
        self.mma = cute.make_tiled_mma(self.operation)
        part = self.mma.get_slice(0)
        self.others = part.make_fragment_B(part.partition_B(transposed(others)))
        self.acc = cute.make_rmem_tensor(part.partition_shape_C(shape[:2]), Float32)

    @cute.jit
    def start(self, scores: cute.Tensor, stage: Int32):
        """Issue it as a group, with the others of a stage; ``scores``: as operand A."""
        multiply(self.operation, self.acc, scores[None, 0, None], self.others[None, 0, None, stage], False)
        warpgroup.commit_group()
