"""dQ out of its fp32 sums."""

import cutlass
import cutlass.cute as cute
from cutlass import Float32
from cutlass.cute.arch import inline_ptx
from cutlass.cute.nvgpu import OperandMajorMode, warp, warpgroup
from cutlass.memory import SmemAllocator

from cute_fa.device.backward_arguments import BackwardArguments, scratch_address
from cute_fa.device.dtypes import CUTE_DTYPE
from cute_fa.device.heads import head_matrix
from cute_fa.device.registers import narrow
from cute_fa.device.score import Score
from cute_fa.device.tma_boxes import TILE_ALIGNMENT, tile_layout
from fa3_sm90.backward.config import CONSUMERS, Fa3BackwardConfig
from fa3_sm90.common.wgmma import WARPGROUP, WGMMA_K, WGMMA_M

_CHUNK = 8  # elements of 16 bytes


class QueryGradientConversion:
    """One CTA a tile of queries of one head; its warpgroups have of dQ what the main kernel's consumers had."""

    num_threads = WARPGROUP * CONSUMERS

    def __init__(self, config: Fa3BackwardConfig):
        self.config = config
        self.dtype = CUTE_DTYPE[config.dtype]

    @property
    def smem_bytes(self) -> int:
        return self.config.tile_m * self.config.head_dim_padded * self.config.dtype.bytes

    @cute.kernel
    def kernel(self, args: BackwardArguments):
        c = self.config
        tidx, _, _ = cute.arch.thread_idx()
        index, _, _ = cute.arch.block_idx()
        m_blocks, heads = args.m_blocks(c.tile_m), args.common.q.shape[-2]
        m_block, head, batch = index % m_blocks, index // m_blocks % heads, index // m_blocks // heads
        info = args.common.info(batch)
        to_smem, store = self.to_smem, self.store
        if m_block * c.tile_m < info.rows_q:
            layout = tile_layout(self.dtype, c.tile_m, c.head_dim_padded, 1)
            raw = SmemAllocator().allocate_tensor(
                self.dtype, cute.make_layout(cute.cosize(layout.outer)), TILE_ALIGNMENT
            )
            pointer = cute.recast_ptr(raw.iterator, layout.inner, dtype=self.dtype)
            tile = cute.make_tensor(pointer, layout.outer)[None, None, 0]
            place = args.first_tile(info, batch, c.tile_m) + m_block
            scale = Score.of(args.common.softmax_scale, args.common.softcap).gradient_scale
            to_smem(scratch_address(args.scratch.dq, place, head), tile, scale, tidx)
            cute.arch.sync_threads()
            dq = head_matrix(args.dq, head, batch, info.offset_q, c.cu_seqlens_q)
            store(tile, dq, m_block, info.rows_q - m_block * c.tile_m, tidx)

    def to_smem(self, address, tile: cute.Tensor, scale: Float32, tidx):
        """A warpgroup's part of dQ times ``scale``."""
        c = self.config
        wg, thread = cute.arch.make_warp_uniform(tidx // WARPGROUP), tidx % WARPGROUP
        operand, major = warpgroup.OperandSource.SMEM, OperandMajorMode.MN
        shape = (WGMMA_M, c.dq_columns, WGMMA_K)
        mma = cute.make_tiled_mma(warpgroup.MmaF16BF16Op(self.dtype, Float32, shape, operand, major, major))
        acc = cute.make_rmem_tensor(mma.get_slice(0).partition_shape_C(shape[:2]), Float32)
        address = address + wg * c.dq_bytes + thread * 16
        for quad in range(cute.size(acc) // 4):
            values = inline_ptx(
                "ld.global.v4.f32 {{$w0}, {$w1}, {$w2}, {$w3}}, [{$r0}+" + str(16 * WARPGROUP * quad) + "];",
                write_only_types=[Float32] * 4,
                read_only_args=[address],
            )
            for e in range(4):
                acc[4 * quad + e] = values[e]
        acc.store(acc.load() * scale)
        narrowed = cute.make_rmem_tensor_like(acc, self.dtype)
        narrow(acc, narrowed)
        atom = cute.make_copy_atom(warp.StMatrix8x8x16bOp(False, 4), self.dtype)
        copy = cute.make_tiled_copy_C(atom, mma).get_slice(thread)
        rows = c.tile_m > WGMMA_M
        part = cute.local_tile(tile, shape[:2], (wg, 0) if rows else (0, wg))
        cute.copy(copy, copy.retile(narrowed), copy.partition_D(part))

    @cute.jit
    def store(self, tile: cute.Tensor, dq: cute.Tensor, m_block, rows_left, tidx):
        """The tile's rows to global memory, 16 bytes a thread."""
        c = self.config
        chunks = c.head_dim // _CHUNK
        copy = cute.make_copy_atom(cute.nvgpu.CopyUniversalOp(), self.dtype, num_bits_per_copy=128)
        for piece in cutlass.range(tidx, c.tile_m * chunks, self.num_threads, unroll=1):
            row, chunk = piece // chunks, piece % chunks
            if row < rows_left:
                source = cute.local_tile(tile[row, None], (_CHUNK,), (chunk,))
                target = cute.local_tile(dq[m_block * c.tile_m + row, None], (_CHUNK,), (chunk,))
                fragment = cute.make_rmem_tensor(_CHUNK, self.dtype)
                cute.autovec_copy(source, fragment)
                cute.copy(copy, fragment, target)
