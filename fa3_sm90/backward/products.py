"""The five matrix products of a step on wgmma (PTX ISA, "Asynchronous warpgroup level matrix instructions").

    Sᵀ = K·Qᵀ    dPᵀ = V·dOᵀ    dV += Pᵀ·dO    dK += dSᵀ·Q    dQ = dS·K

A warpgroup has 64 of the tile's keys in all but the last. Of dQ it has 64 queries, or half the columns if there are no
more queries than that.
"""

import cutlass.cute as cute
from cutlass import Float32, Int32
from cutlass.cute.nvgpu import OperandMajorMode, warpgroup

from cute_fa.device.dtypes import CUTE_DTYPE
from fa3_sm90.backward.config import SCORE_STAGES, Fa3BackwardConfig
from fa3_sm90.backward.storage import Storage
from fa3_sm90.common.products import multiply, tiles, transposed
from fa3_sm90.common.wgmma import WGMMA_K, WGMMA_M

_SMEM, _REGISTERS = warpgroup.OperandSource.SMEM, warpgroup.OperandSource.RMEM
_ROWS, _COLUMNS = OperandMajorMode.K, OperandMajorMode.MN


class Products:
    """Operands and accumulators of one warpgroup. Products only issue, each as a group of its own but for dV, which
    joins the next one's; between what is done to their registers and the next of them the caller has a
    ``warpgroup.fence()``."""

    def __init__(self, config: Fa3BackwardConfig, storage: Storage, index: Int32):
        """``index``: of the consumer warpgroup."""
        c = config
        dtype = CUTE_DTYPE[c.dtype]

        def operation(columns: int, source, major_a, major_b):
            shape = (WGMMA_M, columns, WGMMA_K)
            return warpgroup.MmaF16BF16Op(dtype, Float32, shape, source, major_a, major_b)

        self.op_s = operation(c.tile_m, _SMEM, _ROWS, _ROWS)
        self.op_dv = operation(c.head_dim_v_padded, _REGISTERS, _ROWS, _COLUMNS)
        self.op_dk = operation(c.head_dim_padded, _REGISTERS, _ROWS, _COLUMNS)
        self.op_dq = operation(c.dq_columns, _SMEM, _COLUMNS, _COLUMNS)
        mma_s, mma_dv, mma_dk, mma_dq = map(cute.make_tiled_mma, (self.op_s, self.op_dv, self.op_dk, self.op_dq))
        self.mma_s, self.mma_dv, self.mma_dk = mma_s, mma_dv, mma_dk
        slice_s, slice_dv, slice_dk, slice_dq = (mma.get_slice(0) for mma in (mma_s, mma_dv, mma_dk, mma_dq))

        k = tiles(storage.k, dtype, c.tile_n, c.head_dim_padded, 1)[None, None, 0]
        v = tiles(storage.v, dtype, c.tile_n, c.head_dim_v_padded, 1)[None, None, 0]
        q = tiles(storage.q, dtype, c.tile_m, c.head_dim_padded, c.stages)
        dout = tiles(storage.dout, dtype, c.tile_m, c.head_dim_v_padded, c.stages)
        ds = tiles(storage.ds, dtype, c.tile_n, c.tile_m, SCORE_STAGES)
        self.k = mma_s.make_fragment_A(slice_s.partition_A(k))[None, index, None]
        self.v = mma_s.make_fragment_A(slice_s.partition_A(v))[None, index, None]
        self.q = mma_s.make_fragment_B(slice_s.partition_B(q))
        self.dout = mma_s.make_fragment_B(slice_s.partition_B(dout))
        self.dout_columns = mma_dv.make_fragment_B(slice_dv.partition_B(transposed(dout)))
        self.q_columns = mma_dk.make_fragment_B(slice_dk.partition_B(transposed(q)))
        k_columns = transposed(k)
        row_block = index
        if c.tile_m == WGMMA_M:
            k_columns, row_block = cute.local_tile(k_columns, (c.dq_columns, c.tile_n), (index, 0)), 0
        self.k_columns = mma_dq.make_fragment_B(slice_dq.partition_B(k_columns))
        self.ds = mma_dq.make_fragment_A(slice_dq.partition_A(transposed(ds)))[None, row_block, None, None]

        self.shape_s = slice_s.partition_shape_C((WGMMA_M, c.tile_m))
        self.shape_dq = slice_dq.partition_shape_C((WGMMA_M, c.dq_columns))
        self.acc_dv = cute.make_rmem_tensor(slice_dv.partition_shape_C((WGMMA_M, c.head_dim_v_padded)), Float32)
        self.acc_dk = cute.make_rmem_tensor(slice_dk.partition_shape_C((WGMMA_M, c.head_dim_padded)), Float32)

    def accumulators(self) -> tuple[cute.Tensor, cute.Tensor, cute.Tensor]:
        """Of S, dP and dQ, of one step: kept from step to step their registers would count as used in between."""
        return tuple(cute.make_rmem_tensor(shape, Float32) for shape in (self.shape_s, self.shape_s, self.shape_dq))

    @cute.jit
    def start_scores(self, acc: cute.Tensor, stage: Int32):
        """Sᵀ with Q of a stage."""
        multiply(self.op_s, acc, self.k, self.q[None, 0, None, stage], True)
        warpgroup.commit_group()

    @cute.jit
    def start_dp(self, acc: cute.Tensor, stage: Int32):
        """dPᵀ with dO of a stage."""
        multiply(self.op_s, acc, self.v, self.dout[None, 0, None, stage], True)
        warpgroup.commit_group()

    @cute.jit
    def start_dv(self, p: cute.Tensor, stage: Int32):
        """dV += Pᵀ·dO, Pᵀ in registers; not yet committed."""
        multiply(self.op_dv, self.acc_dv, p[None, 0, None], self.dout_columns[None, 0, None, stage], False)

    @cute.jit
    def start_dk(self, ds: cute.Tensor, stage: Int32):
        """dK += dSᵀ·Q, dSᵀ in registers."""
        multiply(self.op_dk, self.acc_dk, ds[None, 0, None], self.q_columns[None, 0, None, stage], False)
        warpgroup.commit_group()

    @cute.jit
    def start_dq(self, acc: cute.Tensor, stage: Int32):
        """dQ = dS·K with dSᵀ of a stage in shared memory."""
        multiply(self.op_dq, acc, self.ds[None, None, stage], self.k_columns[None, 0, None], True)
        warpgroup.commit_group()
