"""The two matrix products of a warpgroup on wgmma: S = Q·Kᵀ from shared memory, O += P·V with P in registers."""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32
from cutlass.cute.nvgpu import OperandMajorMode, warpgroup

from cute_fa.device.dtypes import CUTE_DTYPE
from cute_fa.device.tma_boxes import TILE_ALIGNMENT, tile_layout
from fa3_sm90.common.wgmma import WGMMA_M
from fa3_sm90.forward.config import Fa3ForwardConfig
from fa3_sm90.forward.probabilities import probability_type
from fa3_sm90.forward.storage import Storage


class Products:
    """Operands and accumulators of one warpgroup. Both products only issue: the caller waits, and has a
    ``warpgroup.fence()`` between what it does to their registers and the next product."""

    def __init__(self, config: Fa3ForwardConfig, storage: Storage, warpgroup_index: Int32, thread: Int32):
        """``thread``: index within the warpgroup."""
        c = config
        dtype_q, dtype_k, dtype_v = (CUTE_DTYPE[dtype] for dtype in (c.dtype, c.dtype_k, c.dtype_v))
        shape_s, shape_o = (WGMMA_M, c.tile_n, c.mma_k), (WGMMA_M, c.head_dim_v_padded // c.output_parts, c.mma_k)
        smem, registers = warpgroup.OperandSource.SMEM, warpgroup.OperandSource.RMEM
        self.op_s = _operation(dtype_q, dtype_k, shape_s, smem, OperandMajorMode.K)
        major = OperandMajorMode.K if c.dtype.is_fp8 else OperandMajorMode.MN
        self.op_o = _operation(probability_type(c.dtype), dtype_v, shape_o, registers, major)
        mma_s, mma_o = cute.make_tiled_mma(self.op_s), cute.make_tiled_mma(self.op_o)
        shape_output = (WGMMA_M, c.head_dim_v_padded, c.mma_k)
        self.mma_output = cute.make_tiled_mma(
            _operation(probability_type(c.dtype), dtype_v, shape_output, registers, major)
        )
        layout = tile_layout(dtype_q, WGMMA_M, c.head_dim_padded, 1).outer
        stride = (*layout.stride[:2], c.q_bytes // c.dtype.bytes)
        sQ = cute.make_tensor(storage.q[0], cute.make_layout((*layout.shape[:2], c.warpgroups), stride=stride))
        sK = _tiles(storage.k, dtype_k, c.tile_n, c.head_dim_padded, c.stages)
        if c.dtype.is_fp8:
            sVt = _tiles(storage.v if c.key_major_v else storage.vt, dtype_v, c.head_dim_v_padded, c.tile_n, c.stages)
        else:
            sV = _tiles(storage.v, dtype_v, c.tile_n, c.value_columns, c.stages)
            sVt = cute.make_tensor(sV.iterator, cute.select(sV.layout, mode=[1, 0, 2]))
        slice_s, slice_o = mma_s.get_slice(0), mma_o.get_slice(0)
        self.rQ = mma_s.make_fragment_A(slice_s.partition_A(sQ))[None, None, None, warpgroup_index]
        self.rK = mma_s.make_fragment_B(slice_s.partition_B(sK))
        if c.output_parts > 1:  # (columns of a part, keys, stages, parts)
            sVt = cute.local_tile(sVt, (shape_o[1], c.tile_n, c.stages), (None, 0, 0))
        self.rV = mma_o.make_fragment_B(slice_o.partition_B(sVt))
        self.parts = c.output_parts
        self.acc_s = cute.make_rmem_tensor(slice_s.partition_shape_C(shape_s[:2]), Float32)
        self.from_zero = c.dtype.is_fp8
        self.acc_o = cute.make_rmem_tensor(slice_o.partition_shape_C(shape_o[:2]), Float32)
        self.shape_output = self.mma_output.get_slice(0).partition_shape_C(shape_output[:2])
        identity = cute.make_identity_tensor(shape_s[:2])
        self.static_coordinates = slice_s.partition_C(identity)
        self.own_coordinates = mma_s.get_slice(thread).partition_C(identity)

    @cute.jit
    def start_scores(self, stage: Int32):
        """S = Q·Kᵀ with K of a stage."""
        atom = cute.make_mma_atom(self.op_s)
        _multiply(atom, self.acc_s, self.rQ, self.rK[None, None, None, stage], True)

    @cute.jit
    def start_output(self, rP: cute.Tensor, stage: Int32, part: cutlass.Constexpr[int] = 0):
        """O += P·V with V of a stage; in fp8 a part of P·V alone, see :mod:`fa3_sm90.forward.accumulation`."""
        atom = cute.make_mma_atom(self.op_o)
        place = (stage, part) if self.parts > 1 else (stage,)
        _multiply(atom, self.acc_o, rP, self.rV[(None, None, None, *place)], self.from_zero)


def _operation(a, b, shape: tuple[int, int, int], source: warpgroup.OperandSource, major: OperandMajorMode):
    """wgmma of a shape on elements of types ``a`` and ``b``, A from ``source``, B laid out as ``major``; fp8 has both
    with K contiguous."""
    if b.width == 8:
        return warpgroup.MmaF8Op(a, b, Float32, shape, source, OperandMajorMode.K, major)
    return warpgroup.MmaF16BF16Op(b, Float32, shape, source, OperandMajorMode.K, major)


def _tiles(pointer: cute.Pointer, dtype, rows: int, columns: int, count: int) -> cute.Tensor:
    """(rows, columns, count) at an address that comes out of a shuffle. ptxas keeps that in a register; what it can
    compute it computes in every iteration, 5 instructions a descriptor, and adds to its halves one by one: 7.97 → 7.25
    instructions per score at head_dim 256, 6.03 → 5.80 at 128, 5.89 → 5.64 at 64."""
    layout = tile_layout(dtype, rows, columns, count)
    address = cute.arch.make_warp_uniform(pointer.toint())
    plain = cute.make_ptr(dtype, address, cute.AddressSpace.smem, assumed_align=TILE_ALIGNMENT)
    return cute.make_tensor(cute.recast_ptr(plain, layout.inner, dtype=dtype), layout.outer)


def _multiply(atom: cute.MmaAtom, acc: cute.Tensor, rA: cute.Tensor, rB: cute.Tensor, from_zero: bool):
    """One group of wgmma over all steps of the dot products."""
    for k in range(cute.size(rA, mode=[2])):
        atom.set(warpgroup.Field.ACCUMULATE, not (from_zero and k == 0))
        cute.gemm(atom, acc, rA[None, None, k], rB[None, None, k], acc)
    warpgroup.commit_group()
