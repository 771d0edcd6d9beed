"""What the backward needs of every query before it meets the keys: its LSE in log2 units, and D = rowsum(dO∘O) − dLSE
(FlashAttention-2, arXiv 2307.08691, algorithm 2, line 4; dLSE enters since ∂LSE/∂S = P)."""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr
from cutlass.cute.arch import inline_ptx
from cutlass.memory import SmemAllocator

from cute_fa.device.backward_arguments import BackwardArguments, scratch_address
from cute_fa.device.dtypes import CUTE_DTYPE
from cute_fa.device.heads import head_matrix, head_row
from cute_fa.device.score import LOG2_E

WARPS = 4
_CHUNK = 8  # elements that a thread loads at a time, 16 bytes


class PreprocessKernel:
    """One CTA a tile of queries of one head; a power of two of neighbouring lanes shares a row."""

    num_threads = 32 * WARPS

    def __init__(self, config):
        """``config``: of a backward."""
        self.config = config
        self.dtype = CUTE_DTYPE[config.dtype]
        self.chunks = config.head_dim_v // _CHUNK
        self.lanes = min(32, 1 << (self.chunks - 1).bit_length())

    @cute.kernel
    def kernel(self, args: BackwardArguments):
        c = self.config
        tidx, _, _ = cute.arch.thread_idx()
        index, _, _ = cute.arch.block_idx()
        m_blocks, heads = args.m_blocks(c.tile_m), args.common.q.shape[-2]
        m_block, head, batch = index % m_blocks, index // m_blocks % heads, index // m_blocks // heads
        info = args.common.info(batch)
        dsink = Float32(0.0)
        if m_block * c.tile_m < info.rows_q:
            tile = args.first_tile(info, batch, c.tile_m) + m_block
            dsink = self.rows(args, info, tile, m_block, head, batch, tidx)
            if const_expr(c.turns):
                if tidx == 0:
                    args.scratch.turns[tile * heads + head] = Int32(0)
            if const_expr(c.dq_sums):
                zero(scratch_address(args.scratch.dq, tile, head), c.tile_m * c.head_dim_padded, tidx, self.num_threads)
        if const_expr(c.turns):
            if index + tidx == 0:
                args.scratch.turns[cute.size(args.scratch.turns) - 1] = Int32(0)
        if const_expr(c.learnable_sink):
            total = self.sum_of_cta(dsink, tidx)
            if tidx == 0:
                args.scratch.dsink[batch, head, m_block] = total

    @cute.jit
    def rows(self, args: BackwardArguments, info, tile, m_block, head, batch, tidx):
        """Write the tile's stats; this thread's part of the sink's gradient."""
        c = self.config
        packed = c.cu_seqlens_q
        out = head_matrix(args.common.out, head, batch, info.offset_q, packed)
        dout = head_matrix(args.dout, head, batch, info.offset_q, packed)
        lse = head_row(args.common.lse, head, batch, info.offset_q, packed)
        stats = args.scratch.stats[tile, head, None]
        offset = args.common.softcap * LOG2_E if const_expr(c.softcap) else Float32(0.0)
        dsink = Float32(0.0)
        rows_per_pass = self.num_threads // self.lanes
        for first in cutlass.range(0, c.tile_m, rows_per_pass, unroll=1):
            place = first + tidx // self.lanes
            row = m_block * c.tile_m + place
            row_lse, delta = -Float32.inf, Float32(0.0)
            if row < info.seqlen_q:
                row_lse = lse[row]
            if row_lse != -Float32.inf:  # without keys: all that follows from the row is 0, whatever dLSE and finite dO
                for chunk in cutlass.range(tidx % self.lanes, self.chunks, self.lanes, unroll=1):
                    delta = delta + self.dot(out, dout, row, chunk)
            for distance in cutlass.range_constexpr(self.lanes.bit_length() - 1):
                delta = delta + cute.arch.shuffle_sync_bfly(delta, offset=1 << distance)
            if const_expr(c.lse_gradient):
                if row_lse != -Float32.inf:
                    delta = delta - head_row(args.dlse, head, batch, info.offset_q, packed)[row]
            if tidx % self.lanes == 0 and place < c.tile_m:
                at = statistics_place(c, place)
                stats[at] = Float32.inf if row_lse == -Float32.inf else row_lse * LOG2_E - offset
                stats[c.tile_m + at] = (
                    delta if const_expr(c.probability_shift == 0) else delta * 2.0**-c.probability_shift
                )
                if const_expr(c.learnable_sink):
                    if row_lse != -Float32.inf:  # which it is beside a sink of −inf, whose gradient is 0
                        weight = cute.math.exp2((args.common.learnable_sink[head] - row_lse) * LOG2_E, fastmath=True)
                        dsink = dsink - weight * delta
        return dsink

    @cute.jit
    def dot(self, out: cute.Tensor, dout: cute.Tensor, row: Int32, chunk: Int32) -> Float32:
        """Product of 8 elements of a row of O and of dO."""
        copy = cute.make_copy_atom(cute.nvgpu.CopyUniversalOp(), self.dtype, num_bits_per_copy=128)
        values = []
        for matrix in (out, dout):
            source = cute.local_tile(matrix[row, None], (_CHUNK,), (chunk,))
            fragment = cute.make_rmem_tensor(_CHUNK, self.dtype)
            cute.copy(copy, source, fragment)
            values.append(fragment.load().to(Float32))
        return (values[0] * values[1]).reduce(cute.ReductionOp.ADD, Float32(0.0), 0)

    @cute.jit
    def sum_of_cta(self, value: Float32, tidx: Int32) -> Float32:
        """The sum over all threads, the same order each time; what thread 0 gets."""
        value = cute.arch.warp_reduction_sum(value)
        smem = SmemAllocator().allocate_tensor(Float32, cute.make_layout(WARPS))
        if tidx % 32 == 0:
            smem[tidx // 32] = value
        cute.arch.sync_threads()
        total = Float32(0.0)
        for warp in cutlass.range_constexpr(WARPS):
            total = total + smem[warp]
        return total


def statistics_place(config, place: Int32) -> Int32:
    """Where the LSE of a tile's query lies in its statistics; its D lies ``tile_m`` numbers further on.

    "rows": one query after the other. "wgmma": as a thread of wgmma's transposed accumulator reads them, 16 bytes at a
    time: of 8 queries it has two neighbouring ones, and two such blocks lie together."""
    if config.statistics == "rows":
        return place
    return place // 16 * 16 + place % 8 // 2 * 4 + place // 8 % 2 * 2 + place % 2


def zero(address, elements: int, tidx: Int32, num_threads: int):
    """Zero ``elements`` floats, a multiple of 4, at a byte address."""
    passes, rest = divmod(elements // 4, num_threads)
    address = address + tidx * 16
    for i in range(passes + (rest > 0)):
        inside = None if i < passes else tidx < rest
        inline_ptx(
            f"st.global.v4.f32 [{{$r0}}+{16 * num_threads * i}], {{{{$r1}}, {{$r1}}, {{$r1}}, {{$r1}}}};",
            read_only_args=[address, Float32(0.0)],
            predicate=inside,
        )
