"""The FA2 forward on sm_80 (arXiv 2307.08691, algorithm 1): one CTA a tile of queries of one head.

Each warp owns 16 or 32 queries for the whole kernel, Q·Kᵀ and P·V run on mma.sync m16n8k16, P stays in registers. K and
V blocks flow through shared memory by cp.async in a ring of ``stages`` blocks each.
"""

from typing import NamedTuple, Optional

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Uint32, const_expr
from cutlass.cute.nvgpu import warp

from cute_fa.device.block_range import BlockRange, Window, block_range
from cute_fa.device.fragments import as_operand_a, rows_and_columns
from cute_fa.device.scores import ScoreParams, mask_scores, modify_scores, remaining_scale, score_params
from cute_fa.device.seqlen import LengthTensors, SeqlenInfo, seqlen_info
from cute_fa.device.softmax import OnlineSoftmax
from cute_fa.types import DType
from fa2_sm80.config import Fa2ForwardConfig
from fa2_sm80.copies import FragmentLoader, SmemTile, TileLoader, store_tile

CUTE_DTYPE = {DType.FP16: cutlass.Float16, DType.BF16: cutlass.BFloat16}


class ForwardArguments(NamedTuple):
    """What the compiled kernel takes. Dense q, out (batch, seqlen_q, heads, d), k, v (batch, seqlen_k, heads_kv, d),
    lse fp32 (batch, heads, seqlen_q); packed without the batch dimension, lse (heads, total_q). alibi_slopes fp32
    (batch or stride 0, heads), learnable_sink fp32 (heads). ``seqlen_q``: the longest, which sizes the grid."""

    q: cute.Tensor
    k: cute.Tensor
    v: cute.Tensor
    out: cute.Tensor
    lse: cute.Tensor
    lengths: LengthTensors
    window: Window
    alibi_slopes: Optional[cute.Tensor]
    learnable_sink: Optional[cute.Tensor]
    softmax_scale: Float32
    softcap: Optional[Float32]
    seqlen_q: Int32


class Fa2ForwardKernel:
    """Device code of one :class:`Fa2ForwardConfig`."""

    def __init__(self, config: Fa2ForwardConfig):
        self.config = config
        self.dtype = CUTE_DTYPE[config.dtype]

    @cute.jit
    def __call__(self, args: ForwardArguments, stream):
        c = self.config
        heads = args.q.shape[-2]
        batches = args.q.shape[0]
        if const_expr(c.cu_seqlens_q):
            batches = args.lengths.cu_seqlens_q.shape[0] - 1
        m_blocks = cute.ceil_div(args.seqlen_q, c.tile_m)
        # one-dimensional: grid.y and grid.z end at 65535, and a batch of short sequences does not
        self.kernel(args).launch(
            grid=(m_blocks * heads * batches, 1, 1), block=(c.num_threads, 1, 1), smem=c.smem_bytes, stream=stream
        )

    @cute.kernel
    def kernel(self, args: ForwardArguments):
        c = self.config
        tidx, _, _ = cute.arch.thread_idx()
        m_block, head, batch = self.tile(args)
        heads, heads_kv = args.q.shape[-2], args.k.shape[-2]
        head_kv = head // (heads // heads_kv)
        dense_q = args.q.shape[1] if const_expr(not c.cu_seqlens_q) else 0
        dense_k = args.k.shape[1] if const_expr(not c.cu_seqlens_k) else 0
        info = seqlen_info(args.lengths, batch, dense_q, dense_k)
        m_start = m_block * c.tile_m

        if m_start < info.rows_q:
            blocks = block_range(args.window, info.seqlen_q, info.seqlen_k, m_start, c.tile_m, c.tile_n)
            q = head_matrix(args.q, head, batch, info.offset_q, c.cu_seqlens_q)
            k = head_matrix(args.k, head_kv, batch, info.offset_k, c.cu_seqlens_k)
            v = head_matrix(args.v, head_kv, batch, info.offset_k, c.cu_seqlens_k)

            sQ, sO, sK, sV = self.smem_tiles()
            load_q = TileLoader(q, sQ, c.head_dim, tidx, c.num_threads)
            load_k = TileLoader(k, sK, c.head_dim, tidx, c.num_threads)
            load_v = TileLoader(v, sV, c.head_dim_v, tidx, c.num_threads)
            slope, sink_logit = None, None
            if const_expr(c.alibi):
                slope = args.alibi_slopes[batch, head]
            if const_expr(c.learnable_sink):
                sink_logit = args.learnable_sink[head]
            scores = score_params(args.softmax_scale, args.softcap, slope)

            tile = QueryTile(c, self.dtype, tidx, sQ, sK, sV, info, m_start, args.window, scores)
            pipeline = KeyValuePipeline(c.stages, load_k, load_v, blocks, args.window, info.seqlen_k, c.tile_n)
            load_q.load(m_block, 0, info.seqlen_q - m_start)
            pipeline.prologue()
            self.main_loop(tile, pipeline, blocks)
            cute.arch.cp_async_wait_group(0)

            lse = tile.softmax.finalize(tile.acc_rows, sink_logit)
            out = head_matrix(args.out, head, batch, info.offset_q, c.cu_seqlens_q)
            lse_row = head_row(args.lse, head, batch, info.offset_q, c.cu_seqlens_q)
            tile.store_lse(lse, lse_row)
            cute.arch.sync_threads()
            tile.acc_to_smem(sO)
            cute.arch.sync_threads()
            store_tile(sO, out, m_block, info.rows_q - m_start, c.head_dim_v, tidx, c.num_threads)

    def smem_tiles(self):
        """Q and O share their memory: O is written when no warp needs Q any more."""
        c = self.config
        smem = cutlass.utils.SmemAllocator()

        def allocate(elements: int) -> cute.Pointer:
            return smem.allocate_tensor(self.dtype, cute.make_layout(elements), 1024).iterator

        q_or_o = allocate(c.tile_m * max(c.head_dim_padded, c.head_dim_v_padded))
        k = allocate(c.stages * c.tile_n * c.head_dim_padded)
        v = allocate(c.stages * c.tile_n * c.head_dim_v_padded)
        return (
            SmemTile(q_or_o, c.tile_m, c.head_dim_padded),
            SmemTile(q_or_o, c.tile_m, c.head_dim_v_padded),
            SmemTile(k, c.tile_n, c.head_dim_padded, c.stages),
            SmemTile(v, c.tile_n, c.head_dim_v_padded, c.stages),
        )

    @cute.jit
    def main_loop(self, tile, pipeline, blocks: BlockRange):
        """The ranges of the tile in turn, each with just the mask it needs."""
        c = self.config
        step = tile.step  # by name: an object whose method is called in a dynamic loop counts as carried by it
        for iteration in cutlass.range(blocks.right_end, unroll=1):
            step(pipeline, iteration, True, c.window_left)
        for iteration in cutlass.range(blocks.right_end, blocks.full_end, unroll=1):
            step(pipeline, iteration, False, False)
        if const_expr(c.window_left):
            for iteration in cutlass.range(blocks.full_end, blocks.total, unroll=1):
                step(pipeline, iteration, False, True)

    @cute.jit
    def tile(self, args: ForwardArguments):
        """(m_block, head, batch) of this CTA. The query tiles of a head are neighbours, for its K and V in L2; under a
        right bound the last tile has the most keys and goes first."""
        c = self.config
        index, _, _ = cute.arch.block_idx()
        m_blocks = cute.ceil_div(args.seqlen_q, c.tile_m)
        heads = args.q.shape[-2]
        m_block = index % m_blocks
        if const_expr(c.window_right):
            m_block = m_blocks - 1 - m_block
        return m_block, index // m_blocks % heads, index // m_blocks // heads


class KeyValuePipeline:
    """cp.async groups in the order K0, V0, K1, V1 …: one group a tile, empty beyond the last block, so that waiting
    for all but the newest 2·(stages − 1) groups always means the tile in question.

    V of iteration i − 1 + stages is issued once all warps are past P·V of i − 1, K of i + stages once they are past
    Q·Kᵀ of i: with one stage V loads behind Q·Kᵀ and the next K behind the softmax and P·V.
    """

    def __init__(self, stages, load_k, load_v, blocks: BlockRange, window: Window, seqlen_k: Int32, tile_n: int):
        self.stages = stages
        self.load_k, self.load_v = load_k.load, load_v.load
        self.blocks, self.window = blocks, window
        self.seqlen_k, self.tile_n = seqlen_k, tile_n

    def stage(self, iteration: Int32):
        return 0 if const_expr(self.stages == 1) else iteration % self.stages

    @cute.jit
    def prologue(self):
        """Q's copies join the first group."""
        for i in cutlass.range_constexpr(self.stages):
            self._issue(self.load_k, Int32(i), i == 0)
            if const_expr(i < self.stages - 1):
                self._issue(self.load_v, Int32(i), i == 0)

    @cute.jit
    def wait_k(self, iteration: Int32, first: cutlass.Constexpr[bool]):
        """K of this iteration is in shared memory; start the V that takes the place of the previous one."""
        self._wait()
        self._issue(self.load_v, iteration + self.stages - 1, first and self.stages == 1)

    @cute.jit
    def wait_v(self, iteration: Int32):
        """V of this iteration is in shared memory; start the K that takes the place of this one."""
        self._wait()
        self._issue(self.load_k, iteration + self.stages, False)

    def _wait(self):
        cute.arch.cp_async_wait_group(2 * (self.stages - 1))
        cute.arch.sync_threads()

    @cute.jit
    def _issue(self, load, iteration: Int32, may_be_first: cutlass.Constexpr[bool]):
        """Only block 0 of the order can reach beyond seqlen_k: the other copies need no bound check."""
        block, stage = self.blocks.block(iteration, self.window), self.stage(iteration)
        rows_left = self.seqlen_k - block * self.tile_n if const_expr(may_be_first) else None
        if iteration < self.blocks.total:
            load(block, stage, rows_left)
        cute.arch.cp_async_commit_group()


class QueryTile:
    """The registers of one tile of queries and what is done to them: scores, softmax, output."""

    def __init__(self, config, dtype, tidx, sQ, sK, sV, info: SeqlenInfo, m_start, window: Window, params: ScoreParams):
        self.config, self.dtype = config, dtype
        self.info, self.window, self.params = info, window, params
        warps, tile_m, tile_n = config.num_warps, config.tile_m, config.tile_n
        mma = cute.make_tiled_mma(warp.MmaF16BF16Op(dtype, Float32, (16, 8, 16)), (warps, 1, 1))
        thread = mma.get_slice(tidx)
        self.mma = mma
        self.load_q = FragmentLoader(sQ, tidx // 32 * 16, rows_first=True)
        self.load_k = FragmentLoader(sK, Int32(0), rows_first=False)
        self.load_v = FragmentLoader(sV, Int32(0), rows_first=True, transpose=True)
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
        self.softmax = OnlineSoftmax(len(self.rows), remaining_scale(params))

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
        pipeline.wait_k(iteration, right_edge)
        for k in cutlass.range_constexpr(0, self.config.head_dim_padded, 16):
            rQ = self.mma.make_fragment_A(self.shape_q)
            for m in cutlass.range_constexpr(self.config.tile_m // (16 * self.config.num_warps)):
                self.load_q.load(cute.recast_tensor(rQ, Uint32), 4 * m, 16 * self.config.num_warps * m, k, 0)
            for n in cutlass.range_constexpr(self.config.tile_n // 16):
                rK = self.mma.make_fragment_B(self.shape_b)
                self.load_k.load(cute.recast_tensor(rK, Uint32), 0, 16 * n, k, stage)
                self.multiply(acc_s, rQ[None, None, 0], rK, n)
        pipeline.wait_v(iteration)

        scores = rows_and_columns(acc_s)
        self.modify_and_mask(scores, pipeline.blocks.block(iteration, self.window), right_edge, left_edge)
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
        masked = right_edge or left_edge
        if const_expr(masked or self.config.alibi):
            first_key = block * self.config.tile_n + self.column_offset
            diagonal = self.info.seqlen_k - self.info.seqlen_q + self.m_start - first_key
            diagonals = [diagonal + row for row in self.rows]
        if const_expr(self.config.alibi or self.config.softcap):
            positions = [Float32(d) for d in diagonals] if const_expr(self.config.alibi) else None
            modify_scores(scores, self.columns, positions, self.params)
        if const_expr(masked):
            keys_left = self.info.seqlen_k - first_key
            mask_scores(
                scores, self.columns, diagonals, keys_left, self.window, first_key, right_edge, left_edge
            )

    @cute.jit
    def store_lse(self, lse: cute.Tensor, target: cute.Tensor):
        """Write the LSE of the tile's rows; rows that do not count get −inf."""
        if self.column_offset == 0:
            for r in cutlass.range_constexpr(len(self.rows)):
                row = self.m_start + self.rows[r]
                if row < self.info.rows_q:
                    target[row] = lse[r] if row < self.info.seqlen_q else -Float32.inf

    @cute.jit
    def acc_to_smem(self, sO: SmemTile):
        """O in the input's dtype, through shared memory so that the store to global memory is coalesced; rows that do
        not count become 0."""
        for r in cutlass.range_constexpr(len(self.rows)):
            row = self.acc_rows[r, None]
            if self.m_start + self.rows[r] >= self.info.seqlen_q:
                row.fill(0.0)
        rO = cute.make_rmem_tensor_like(self.acc, self.dtype)
        rO.store(self.acc.load().to(self.dtype))
        copy = cute.make_tiled_copy_C(cute.make_copy_atom(cute.nvgpu.CopyUniversalOp(), self.dtype), self.mma)
        thread = copy.get_slice(cute.arch.thread_idx()[0])
        cute.copy(copy, thread.retile(rO), thread.partition_D(cute.make_tensor(sO.pointer, sO.layout())))


def head_matrix(tensor: cute.Tensor, head: Int32, batch: Int32, offset: Int32, packed: bool) -> cute.Tensor:
    """(rows, head_dim) of one head of one sequence."""
    if const_expr(packed):
        return cute.domain_offset((offset, 0), tensor[None, head, None])
    return tensor[batch, None, head, None]


def head_row(lse: cute.Tensor, head: Int32, batch: Int32, offset: Int32, packed: bool) -> cute.Tensor:
    """LSE (rows) of one head of one sequence."""
    if const_expr(packed):
        return cute.domain_offset((offset,), lse[head, None])
    return lse[batch, head, None]


def build(config: Fa2ForwardConfig):
    """The callable and its fake arguments for ``cute.compile``."""
    c = config
    dtype = CUTE_DTYPE[c.dtype]

    def fake(element, *shape, aligned=1):
        strides = [cute.sym_int64(divisibility=aligned) for _ in shape[:-1]]
        alignment = element.width // 8 * aligned
        return cute.runtime.make_fake_tensor(element, shape, stride=(*strides, 1), assumed_align=alignment)

    def activations(packed: bool, head_dim: int):
        leading = 1 if packed else 2
        shape = [cute.sym_int() for _ in range(leading + 1)]
        return fake(dtype, *shape, head_dim, aligned=8)

    def optional(wanted: bool, make):
        return make() if wanted else None

    def lengths():
        return fake(Int32, cute.sym_int())

    lse_shape = [cute.sym_int() for _ in range(2 if c.cu_seqlens_q else 3)]
    arguments = ForwardArguments(
        q=activations(c.cu_seqlens_q, c.head_dim),
        k=activations(c.cu_seqlens_k, c.head_dim),
        v=activations(c.cu_seqlens_k, c.head_dim_v),
        out=activations(c.cu_seqlens_q, c.head_dim_v),
        lse=fake(Float32, *lse_shape),
        lengths=LengthTensors(
            optional(c.cu_seqlens_q, lengths),
            optional(c.cu_seqlens_k, lengths),
            optional(c.seqused_q, lengths),
            optional(c.seqused_k, lengths),
        ),
        window=Window(
            optional(c.window_left, lambda: Int32(0)),
            optional(c.window_right, lambda: Int32(0)),
            optional(c.sink_tokens, lambda: Int32(0)),
        ),
        alibi_slopes=optional(c.alibi, lambda: fake(Float32, cute.sym_int(), cute.sym_int())),
        learnable_sink=optional(c.learnable_sink, lambda: fake(Float32, cute.sym_int())),
        softmax_scale=Float32(0.0),
        softcap=optional(c.softcap, lambda: Float32(0.0)),
        seqlen_q=Int32(0),
    )
    stream = cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True)
    return Fa2ForwardKernel(config), (arguments, stream)
