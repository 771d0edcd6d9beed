"""One tile of queries in registers: scores, softmax, P·V, and the way out."""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Uint32, const_expr
from cutlass.cute.nvgpu import warp

from cute_fa.device.arguments import CommonArguments
from cute_fa.device.dtypes import CUTE_DTYPE
from cute_fa.device.fragments import as_operand_a, rows_and_columns
from cute_fa.device.positions import distances_between, row_positions
from cute_fa.device.range_walk import BlockList, hidden_columns, hide
from cute_fa.device.score import Score, apply_score, distances
from cute_fa.device.seqlen import SeqlenInfo
from cute_fa.device.softmax import MOST_IN_A_LOOP, OnlineSoftmax
from cute_fa.device.visibility import mask_scores
from fa2_sm80.common.copies import FragmentLoader, SmemTile, SmemTiles, lane_offset
from fa2_sm80.forward.config import Fa2ForwardConfig
from fa2_sm80.forward.key_value_pipeline import KeyValuePipeline


class QueryTile:
    """The registers of one tile of queries and what is done to them: scores, softmax, output."""

    def __init__(
        self,
        config: Fa2ForwardConfig,
        tidx: Int32,
        smem: SmemTiles,
        info: SeqlenInfo,
        m_start: Int32,
        common: CommonArguments,
        score: Score,
    ):
        self.config, self.dtype = config, CUTE_DTYPE[config.dtype]
        self.info, self.window, self.score = info, common.window, score
        warps, tile_m, tile_n = config.num_warps, config.tile_m, config.tile_n
        mma = cute.make_tiled_mma(warp.MmaF16BF16Op(self.dtype, Float32, (16, 8, 16)), (warps, 1, 1))
        thread = mma.get_slice(tidx)
        self.mma = mma
        rows_first = lane_offset(smem.q, rows_first=True)
        same_panel = smem.v.panel == smem.q.panel
        warp_row = cute.arch.make_warp_uniform(tidx // 32 * 16)
        self.load_q = FragmentLoader(smem.q, rows_first, warp_row)
        self.load_k = FragmentLoader(smem.k, lane_offset(smem.k, rows_first=False), Int32(0))
        lanes_v = rows_first if const_expr(same_panel) else lane_offset(smem.v, rows_first=True)
        self.load_v = FragmentLoader(smem.v, lanes_v, Int32(0), transpose=True)
        self.shape_q = thread.partition_shape_A((tile_m, 16))
        self.shape_b = thread.partition_shape_B((16, 16))
        self.acc = cute.make_rmem_tensor(thread.partition_shape_C((tile_m, config.head_dim_v_padded)), Float32)
        self.acc.fill(0.0)
        self.acc_rows = rows_and_columns(self.acc)
        self.score_shape = thread.partition_shape_C((tile_m, tile_n))
        identity = cute.make_identity_tensor((tile_m, tile_n))
        # coordinates: thread 0's are static, and every thread's lie one constant offset away
        self.columns = rows_and_columns(mma.get_slice(0).partition_C(identity))
        own = rows_and_columns(thread.partition_C(identity))
        self.column_offset = own[0, 0][1]
        self.rows = [own[r, 0][0] for r in range(cute.size(own, mode=[0]))]
        self.m_start = m_start
        self.positions = None
        if config.q_positions:
            self.positions = row_positions(common.q_positions, m_start, self.rows)
            self.key_positions = common.k_positions
        branches = config.head_dim_v_padded > MOST_IN_A_LOOP
        self.softmax = OnlineSoftmax(len(self.rows), score.scale_log2, branches=branches)

    @cute.jit
    def step(
        self,
        pipeline: KeyValuePipeline,
        iteration: Int32,
        right_edge: cutlass.Constexpr[bool],
        left_edge: cutlass.Constexpr[bool],
    ):
        """One key block: S = Q·Kᵀ, mask, softmax, O += P·V."""
        acc_s = cute.make_rmem_tensor(self.score_shape, Float32)
        acc_s.fill(0.0)
        stage = pipeline.stage(iteration)
        bits = None
        if const_expr(self.config.ranges and right_edge):  # on their way while the scores are computed
            bits = self.mask_rows(pipeline.blocks, iteration)
        pipeline.wait_k(iteration, right_edge)
        for k in cutlass.range_constexpr(0, self.config.head_dim_padded, 16):
            rQ = self.mma.make_fragment_A(self.shape_q)
            for m in cutlass.range_constexpr(self.config.tile_m // (16 * self.config.num_warps)):
                self.load_q.load(cute.recast_tensor(rQ, Uint32), 4 * m, 16 * self.config.num_warps * m, k, 0)
            for n in cutlass.range_constexpr(self.config.tile_n // 16):
                rK = self.mma.make_fragment_B(self.shape_b)
                self.load_k.load(cute.recast_tensor(rK, Uint32), 0, 16 * n, k, stage)
                self.multiply(acc_s, rQ[None, None, 0], rK, n)
        scores = rows_and_columns(acc_s)
        block = pipeline.blocks.block(iteration, self.window)
        if const_expr(self.config.ranges):
            self.modify_and_hide(scores, block, bits)
        else:
            self.modify_and_mask(scores, block, right_edge, left_edge)
        pipeline.wait_v(iteration)
        self.softmax.update(scores, self.acc_rows, right_edge or left_edge)
        probabilities = cute.make_rmem_tensor_like(acc_s, self.dtype)
        probabilities.store(acc_s.load().to(self.dtype))
        rP = as_operand_a(probabilities)
        for k in cutlass.range_constexpr(self.config.tile_n // 16):
            for n in cutlass.range_constexpr(self.config.head_dim_v_padded // 16):
                rV = self.mma.make_fragment_B(self.shape_b)
                self.load_v.load(cute.recast_tensor(rV, Uint32), 0, 16 * k, 16 * n, stage)
                self.multiply(self.acc, rP[None, None, k], rV, n)

    def multiply(self, acc: cute.Tensor, rA: cute.Tensor, rB: cute.Tensor, n: int):
        """acc[:, 16n : 16n + 16] += A·B for one k16 step, B being one 16×16 block."""
        target = cute.logical_divide(acc, (None, None, 2))[None, None, (None, n)]
        cute.gemm(self.mma, target, rA, rB[None, None, 0], target)

    @cute.jit
    def modify_and_mask(
        self,
        scores: cute.Tensor,
        block: Int32,
        right_edge: cutlass.Constexpr[bool],
        left_edge: cutlass.Constexpr[bool],
    ):
        """Softcap, ALiBi and the mask of one block of keys, in place; ``scores`` is the (rows, columns) view."""
        masked, diagonals = right_edge or left_edge, None
        if const_expr(masked or self.config.alibi):
            first_key = block * self.config.tile_n + self.column_offset
            diagonal = self.info.seqlen_k - self.info.seqlen_q + self.m_start - first_key
            diagonals = [diagonal + row for row in self.rows]
        apply_score(self.score, scores, distances(diagonals, self.columns) if const_expr(self.config.alibi) else None)
        if const_expr(masked):
            keys_left = self.info.seqlen_k - first_key
            mask_scores(scores, self.columns, diagonals, keys_left, self.window, first_key, right_edge, left_edge)

    def mask_rows(self, blocks: BlockList, iteration: Int32) -> list[cute.Tensor]:
        """The bits of a masked block for the thread's rows."""
        c = self.config
        return [blocks.mask_row(iteration, row, c.tile_m, c.tile_n) for row in self.rows]

    @cute.jit
    def modify_and_hide(self, scores: cute.Tensor, block: Int32, bits: cutlass.Constexpr):
        """The same under a range plan; ``bits`` of :meth:`mask_rows`, None where all is seen."""
        distance = None
        if const_expr(self.config.alibi):
            first_key = block * self.config.tile_n + self.column_offset
            if const_expr(self.positions is not None):
                columns = [self.columns[0, c][1] for c in range(cute.size(scores, mode=[1]))]
                distance = distances_between(self.positions, self.key_positions, first_key, columns)
            else:
                distance = distances([self.m_start + row - first_key for row in self.rows], self.columns)
        apply_score(self.score, scores, distance)
        if const_expr(bits is not None):
            hide(scores, self.columns, [hidden_columns(of_row, self.column_offset) for of_row in bits])

    @cute.jit
    def store_lse(self, lse: cute.Tensor, target: cute.Tensor, info: SeqlenInfo, m_start: Int32):
        """Write the LSE of the tile's rows; rows that do not count get −inf."""
        if self.column_offset == 0:
            for r in cutlass.range_constexpr(len(self.rows)):
                row = m_start + self.rows[r]
                if row < info.rows_q:
                    target[row] = lse[r] if row < info.seqlen_q else -Float32.inf

    @cute.jit
    def acc_to_smem(self, sO: SmemTile, info: SeqlenInfo, m_start: Int32):
        """O in the input's dtype, through shared memory so that the store to global memory is coalesced; rows that do
        not count become 0."""
        for r in cutlass.range_constexpr(len(self.rows)):
            row = self.acc_rows[r, None]
            if m_start + self.rows[r] >= info.seqlen_q:
                row.fill(0.0)
        rO = cute.make_rmem_tensor_like(self.acc, self.dtype)
        rO.store(self.acc.load().to(self.dtype))
        copy = cute.make_tiled_copy_C(cute.make_copy_atom(cute.nvgpu.CopyUniversalOp(), self.dtype), self.mma)
        thread = copy.get_slice(cute.arch.thread_idx()[0])
        cute.copy(copy, thread.retile(rO), thread.partition_D(cute.make_tensor(sO.pointer, sO.layout())))
