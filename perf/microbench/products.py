"""wgmma of one tile that stays in shared memory, for the kernels that time it or keep the tensor cores busy."""

import cutlass
import cutlass.cute as cute
import torch
from cutlass import Float32, Int32
from cutlass.cute.nvgpu import OperandMajorMode, warpgroup
from cutlass.memory import SmemAllocator

from cute_fa.device.dtypes import CUTE_DTYPE
from cute_fa.device.tma_boxes import tile_layout
from cute_fa.semantics.tensors import TORCH_DTYPES
from cute_fa.semantics.types import DType
from perf.microbench.benchmark import device

M = 64
ROW_BYTES = 128  # of A and B: a swizzle atom's, which holds four steps of a dot product
STEP_BYTES = 32  # of a dot product that one wgmma takes
STEPS = ROW_BYTES // STEP_BYTES
_ALIGNMENT = 1024  # of a swizzle atom


def columns(dtype: DType) -> int:
    """Elements of a row of A and B."""
    return ROW_BYTES // dtype.bytes


def smem_bytes(n: int) -> int:
    """Shared memory of a tile of A and one of B, and some room."""
    return (M + n) * ROW_BYTES + 2 * _ALIGNMENT


def operands(dtype: DType, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random A and B."""
    return tuple(torch.randn(rows, columns(dtype), device=device()).to(TORCH_DTYPES[dtype]) for rows in (M, n))


class Product:
    """acc (64, n) += A · Bᵀ with A (64, columns) and B (n, columns), by one warpgroup."""

    def __init__(self, dtype: DType, n: int, from_registers: bool, allocator: SmemAllocator):
        self.n, self.columns, self.from_registers = n, columns(dtype), from_registers
        element = CUTE_DTYPE[dtype]
        source = warpgroup.OperandSource.RMEM if from_registers else warpgroup.OperandSource.SMEM
        shape, major = (M, n, STEP_BYTES // dtype.bytes), OperandMajorMode.K
        if dtype.is_fp8:
            self.op = warpgroup.MmaF8Op(element, element, Float32, shape, source, major, major)
        else:
            self.op = warpgroup.MmaF16BF16Op(element, Float32, shape, source, major, major)
        self.sA, self.sB = (self._tile(allocator, element, rows) for rows in (M, n))
        self.mma = cute.make_tiled_mma(self.op)

    def _tile(self, allocator: SmemAllocator, element, rows: int) -> cute.Tensor:
        """A tile at an address that comes out of a shuffle: what ptxas can compute it computes in every turn of a loop,
        see :mod:`fa3_sm90.forward.products`."""
        layout = tile_layout(element, rows, self.columns, 1)
        raw = allocator.allocate_tensor(element, cute.make_layout(cute.cosize(layout.outer)), _ALIGNMENT)
        address = cute.arch.make_warp_uniform(raw.iterator.toint())
        plain = cute.make_ptr(element, address, cute.AddressSpace.smem, assumed_align=_ALIGNMENT)
        tile = cute.make_tensor(cute.recast_ptr(plain, layout.inner, dtype=element), layout.outer)
        return tile[None, None, 0]

    @cute.jit
    def fill(self, a: cute.Tensor, b: cute.Tensor, thread: Int32, threads: cutlass.Constexpr[int]):
        """A and B from global memory, by threads of the CTA; a barrier of theirs is to follow."""
        for source, target, rows in ((a, self.sA, M), (b, self.sB, self.n)):
            for i in cutlass.range(thread, rows * self.columns, threads, unroll=1):
                target[i // self.columns, i % self.columns] = source[i // self.columns, i % self.columns]
        cute.arch.fence_proxy("async.shared", space="cta")

    def begin(self, thread: Int32):
        """Accumulator of zeros and operands; ``thread``: within the warpgroup. Behind the barrier."""
        slice_ = self.mma.get_slice(thread)
        own = slice_.partition_A(self.sA)
        self.rA = self.mma.make_fragment_A(own if self.from_registers else self.mma.get_slice(0).partition_A(self.sA))
        if self.from_registers:
            cute.autovec_copy(own, self.rA)
        self.rB = self.mma.make_fragment_B(self.mma.get_slice(0).partition_B(self.sB))
        self.acc = cute.make_rmem_tensor(slice_.partition_shape_C((M, self.n)), Float32)
        self.acc.fill(0.0)
        self.places = slice_.partition_C(cute.make_identity_tensor((M, self.n)))

    def issue(self, step: int):
        """One wgmma, of a step of the dot products."""
        atom = cute.make_mma_atom(self.op)
        atom.set(warpgroup.Field.ACCUMULATE, True)
        k = step % STEPS
        cute.gemm(atom, self.acc, self.rA[None, None, k], self.rB[None, None, k], self.acc)

    @cute.jit
    def store(self, out: cute.Tensor):
        """The accumulator to (64, n)."""
        acc, places = self.acc, self.places
        for i in cutlass.range(cute.size(acc), unroll_full=True):
            out[places[i]] = acc[i]
