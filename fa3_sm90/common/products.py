"""Matrix products on wgmma of a warpgroup that has 64 rows: of two tiles in shared memory, and of scores in registers
(PTX ISA, "Asynchronous warpgroup level matrix instructions")."""

import cutlass.cute as cute
from cutlass import Float32, Int32
from cutlass.cute.nvgpu import OperandMajorMode, warp, warpgroup

from cute_fa.device.tma_boxes import TILE_ALIGNMENT, tile_layout
from fa3_sm90.common.wgmma import WGMMA_K, WGMMA_M


class ScoreProduct:
    """Rows of one tile by rows of others."""

    def __init__(self, dtype, own: cute.Tensor, others: cute.Tensor):
        """``own`` (64, columns), ``others`` (rows, columns, stages), in shared memory."""
        smem, major = warpgroup.OperandSource.SMEM, OperandMajorMode.K
        shape = (WGMMA_M, cute.size(others, mode=[0]), WGMMA_K)
        self.operation = warpgroup.MmaF16BF16Op(dtype, Float32, shape, smem, major, major)
        part = cute.make_tiled_mma(self.operation).get_slice(0)
        self.own = part.make_fragment_A(part.partition_A(own))[None, 0, None]
        self.others = part.make_fragment_B(part.partition_B(others))
        self.shape = part.partition_shape_C(shape[:2])

    def accumulator(self) -> cute.Tensor:
        """Of one step: kept from step to step its registers would count as used in between."""
        return cute.make_rmem_tensor(self.shape, Float32)

    @cute.jit
    def start(self, acc: cute.Tensor, stage: Int32):
        """Issue it as a group, with the others of a stage."""
        multiply(self.operation, acc, self.own, self.others[None, 0, None, stage], True)
        warpgroup.commit_group()


class RegisterScoreProduct:
    """As :class:`ScoreProduct`, with the warpgroup's own rows in registers: half as many bytes out of shared memory."""

    def __init__(self, dtype, own: cute.Tensor, others: cute.Tensor, thread: Int32):
        """``own`` (64, columns), ``others`` (rows, columns, stages), in shared memory; ``thread`` of the warpgroup."""
        columns, major = cute.size(own, mode=[1]), OperandMajorMode.K
        shape, registers = (WGMMA_M, cute.size(others, mode=[0]), WGMMA_K), warpgroup.OperandSource.RMEM
        self.operation = warpgroup.MmaF16BF16Op(dtype, Float32, shape, registers, major, major)
        mma = cute.make_tiled_mma(self.operation)
        part = mma.get_slice(0)
        self.others = part.make_fragment_B(part.partition_B(others))
        self.shape = part.partition_shape_C(shape[:2])
        self.own = cute.make_rmem_tensor(part.partition_shape_A((WGMMA_M, columns)), dtype)
        self.own.fill(0)
        matrices = cute.make_copy_atom(warp.LdMatrix8x8x16bOp(False, 4), dtype)
        copy = cute.make_tiled_copy_A(matrices, mma).get_slice(thread)
        self.copy, self.source, self.target = copy, copy.partition_S(own), copy.retile(self.own)

    def load(self):
        """The own rows out of shared memory, by a warp."""
        cute.copy(self.copy, self.source, self.target)

    def accumulator(self) -> cute.Tensor:
        """As :meth:`ScoreProduct.accumulator`."""
        return cute.make_rmem_tensor(self.shape, Float32)

    @cute.jit
    def start(self, acc: cute.Tensor, stage: Int32):
        """Issue it as a group, with the others of a stage."""
        multiply(self.operation, acc, self.own[None, 0, None], self.others[None, 0, None, stage], True)
        warpgroup.commit_group()


class SumProduct:
    """What scores (64, rows of others) in registers add to sums of their 64 rows."""

    def __init__(self, dtype, others: cute.Tensor):
        """``others`` (rows, columns, stages), in shared memory."""
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


def transposed(tile: cute.Tensor) -> cute.Tensor:
    """(columns, rows, …) of a tile."""
    modes = [1, 0, *range(2, cute.rank(tile))]
    return cute.make_tensor(tile.iterator, cute.select(tile.layout, mode=modes))


def tiles(pointer: cute.Pointer, dtype, rows: int, columns: int, count: int) -> cute.Tensor:
    """(rows, columns, count) at an address that comes out of a shuffle: what ptxas can compute it computes in every
    iteration (see :func:`fa3_sm90.forward.products._tiles`)."""
    layout = tile_layout(dtype, rows, columns, count)
    address = cute.arch.make_warp_uniform(pointer.toint())
    plain = cute.make_ptr(dtype, address, cute.AddressSpace.smem, assumed_align=TILE_ALIGNMENT)
    return cute.make_tensor(cute.recast_ptr(plain, layout.inner, dtype=dtype), layout.outer)


def multiply(operation, acc: cute.Tensor, a: cute.Tensor, b: cute.Tensor, from_zero: bool):
    """Issue wgmma for all steps of the dot products; ``a`` and ``b``: (element, steps)."""
    atom = cute.make_mma_atom(operation)
    for k in range(cute.size(a, mode=[1])):
        atom.set(warpgroup.Field.ACCUMULATE, not (from_zero and k == 0))
        step_a, step_b = (cute.append_ones(operand[None, k], up_to_rank=2) for operand in (a, b))
        cute.gemm(atom, acc, step_a, step_b, acc)
