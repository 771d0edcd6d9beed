"""What is left after the main kernel: dQ out of its fp32 sums."""

import cutlass.cute as cute
from cutlass import Float32, Int64, const_expr
from cutlass.cute.arch import inline_ptx
from cutlass.memory import SmemAllocator

from cute_fa.device.backward_arguments import BackwardArguments, scratch_address
from cute_fa.device.dtypes import CUTE_DTYPE
from cute_fa.device.heads import head_matrix
from cute_fa.device.range_walk import RangeWalk
from cute_fa.device.registers import narrow
from cute_fa.device.score import Score
from fa2_sm80.backward.config import Fa2BackwardConfig
from fa2_sm80.common.copies import SMEM_ALIGNMENT, FragmentStore, SmemTile, store_tile
from fa2_sm80.common.products import WarpPlace, WarpProduct


class QueryGradientConversion:
    """One CTA a tile of queries of one head; its warps lie over dQ as the main kernel's do."""

    def __init__(self, config: Fa2BackwardConfig):
        self.config = config
        self.dtype = CUTE_DTYPE[config.dtype]
        self.num_threads = 32 * config.queries.rows * config.queries.columns

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
        if m_block * c.tile_m < info.rows_q:
            elements = c.tile_m * c.head_dim_padded
            pointer = SmemAllocator().allocate_tensor(self.dtype, cute.make_layout(elements), SMEM_ALIGNMENT).iterator
            smem = SmemTile(pointer, c.tile_m, c.head_dim_padded, c.queries.columns)
            rows, columns = c.tile_m // c.queries.rows, c.head_dim_padded // c.queries.columns
            acc = WarpProduct(self.dtype, rows, columns, 0).accumulator()
            tile = args.first_tile(info, batch, c.tile_m) + m_block
            self.load(acc, scratch_address(args.scratch.dq, tile, head) + tidx * 4)
            if const_expr(c.ranges):
                acc.store(acc.load() + RangeWalk.of(args.key_walk, args.seqlen_k, c.tile_n).poison)
            acc.store(acc.load() * Score.of(args.common.softmax_scale, args.common.softcap).gradient_scale)
            narrowed = cute.make_rmem_tensor_like(acc, self.dtype)
            narrow(acc, narrowed)
            place = WarpPlace(c.queries, rows, columns)
            FragmentStore(smem, place.first_row, place.part).store(smem, narrowed)
            cute.arch.sync_threads()
            dq = head_matrix(args.dq, head, batch, info.offset_q, c.cu_seqlens_q)
            rows_left = info.rows_q - m_block * c.tile_m
            store_tile(smem, dq, m_block, rows_left, c.head_dim, tidx, self.num_threads)

    def load(self, acc: cute.Tensor, address: Int64):
        """Register e of thread t lies at e · threads + t."""
        for e in range(cute.size(acc)):
            acc[e] = inline_ptx(
                "ld.global.f32 {$w0}, [{$r0}+" + str(e * self.num_threads * 4) + "];",
                write_only_types=[Float32],
                read_only_args=[address],
            )
