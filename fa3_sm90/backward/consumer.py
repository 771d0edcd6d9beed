"""A consumer warpgroup: 64 keys of the tile, all steps over the queries."""

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, const_expr
from cutlass.cute.arch import inline_ptx
from cutlass.cute.nvgpu import warp, warpgroup

from cute_fa.device.backward_arguments import BackwardArguments
from cute_fa.device.dtypes import CUTE_DTYPE
from cute_fa.device.fragments import as_warpgroup_operand_a, warpgroup_rows_and_columns
from cute_fa.device.registers import narrow
from cute_fa.device.ring import Ring, RingState, previous_stage, ring_next, ring_start
from cute_fa.device.score import Score, probabilities, score_gradients
from cute_fa.device.tma_boxes import tile_layout
from cute_fa.device.visibility import hidden_queries
from fa3_sm90.backward.config import CONSUMERS, SCORE_STAGES, WARPGROUP, WGMMA_M, Fa3BackwardConfig
from fa3_sm90.backward.products import Products
from fa3_sm90.backward.query_sums import QuerySumsWriter
from fa3_sm90.backward.storage import Storage
from fa3_sm90.backward.work import KeyWork

CONSUMER_BARRIER = 1


class Consumer:
    """Products are issued ahead of what they are needed for, so that the tensor cores have work while a warpgroup is at
    its exponentials and gradients. In flight, one step a column:

        step i   P of S(i) | dQ(i−1) out | dP(i) dV(i) issued | dS(i) | S(i+1) dQ(i) dK(i) issued

    where S(i), dQ(i−1) and dK(i−1) are in flight at the beginning. dSᵀ, which all warpgroups' dQ needs, is the one
    thing that they exchange: a barrier a step.
    """

    def __init__(
        self,
        config: Fa3BackwardConfig,
        args: BackwardArguments,
        storage: Storage,
        rings: dict[str, Ring],
        sums: QuerySumsWriter,
        index: Int32,
        thread: Int32,
    ):
        """``index``: of the warpgroup; ``thread``: within it."""
        c, self.config, self.args, self.rings, self.sums = config, config, args, rings, sums
        self.index, self.thread = index, thread
        self.products = Products(c, storage, index)
        self.dtype = CUTE_DTYPE[c.dtype]
        self.first_row = index * WGMMA_M + thread // 32 * 16 + thread % 32 // 4
        self.first_column = thread % 4 * 2
        self.statistics = (storage.lse.toint() + thread % 4 * 16, storage.delta.toint() + thread % 4 * 16)
        self.p, self.ds = (cute.make_rmem_tensor_like(self.products.acc_s, self.dtype) for _ in range(2))
        self.dslope = cute.make_rmem_tensor(1, Float32)
        layout = tile_layout(self.dtype, c.tile_n, c.tile_m, SCORE_STAGES)
        ds = cute.local_tile(
            cute.make_tensor(storage.ds, layout.outer), (WGMMA_M, c.tile_m, SCORE_STAGES), (index, 0, 0)
        )
        atom = cute.make_copy_atom(warp.StMatrix8x8x16bOp(False, 4), self.dtype)
        self.copy = cute.make_tiled_copy_C(atom, self.products.mma_s).get_slice(thread)
        self.ds_target = self.copy.partition_D(ds)

    @cute.jit
    def run(self, work: KeyWork):
        """dK and dV of the tile in the accumulators, not scaled; dQ of all steps handed on, and the slopes' gradients
        stored."""
        products, rings, args = self.products, self.rings, self.args
        products.acc_dk.fill(0.0)
        products.acc_dv.fill(0.0)
        products.acc_dq.fill(0.0)
        self.dslope.fill(0.0)
        state = ring_start()
        rings["k"].wait(state)
        rings["v"].wait(state)
        rings["q"].wait(state)
        warpgroup.fence()
        products.start_scores(state.stage)
        for _ in cutlass.range_constexpr(2):  # in place of dQ and dK of a step before the first
            warpgroup.commit_group()
        score = Score.of(args.common.softmax_scale, args.common.softcap)
        head = self.head
        for index in cutlass.range(work.heads, unroll=1):
            state = head(work, score, work.first_head + index, index > 0, state)
        warpgroup.wait_group(0)
        self.sums.put(products.acc_dq)

    @cute.jit
    def head(self, work: KeyWork, score: Score, head: Int32, further: Boolean, state: RingState) -> RingState:
        """The steps of one head; ``further``: it is not the first."""
        c, steps = self.config, self.steps
        if const_expr(c.alibi):
            score = score.with_slopes((self.args.common.alibi_slopes[work.batch, head],) * 2)
        for masked in work.blocks.ranges(c.window_left):
            state = steps(work, score, further, state, *masked)
        if const_expr(c.slopes_gradient):
            dslope = cute.arch.warp_reduction_sum(self.dslope[0])
            part = work.n_block * c.slope_parts + self.index * 4 + self.thread // 32
            if self.thread % 32 == 0:
                self.args.scratch.dslopes[work.batch, head, part] = dslope
            self.dslope[0] = Float32(0.0)
        return state

    @cute.jit
    def steps(
        self,
        work: KeyWork,
        score: Score,
        further: Boolean,
        state: RingState,
        start: Int32,
        stop: Int32,
        masked: cutlass.Constexpr[bool],
        left_edge: cutlass.Constexpr[bool],
    ) -> RingState:
        """The blocks of one range. What the loop runs by goes through shuffles, see
        :meth:`fa3_sm90.forward.consumer.Consumer.steps`."""
        step = self.step
        start, stop = cute.arch.make_warp_uniform(start), cute.arch.make_warp_uniform(stop)
        state = RingState(*(cute.arch.make_warp_uniform(number) for number in state))
        for iteration in cutlass.range(start, stop, unroll=1):
            state = step(work, score, iteration, further | (iteration > 0), state, masked, left_edge)
        return state

    @cute.jit
    def step(
        self,
        work: KeyWork,
        score: Score,
        iteration: Int32,
        further: Boolean,
        state: RingState,
        masked: cutlass.Constexpr[bool],
        left_edge: cutlass.Constexpr[bool],
    ) -> RingState:
        """One block of queries of one head; ``further``: it is not the first of all."""
        c, products, rings = self.config, self.products, self.rings
        before, following = previous_stage(state, c.stages), ring_next(state, c.stages)
        s, dp = products.acc_s, products.acc_dp
        lse = self.lse(state.stage)
        warpgroup.wait_group(2)  # S, and all before it
        rings["dout"].release(before, further)
        distance, hidden = self.positions(work, work.blocks.block(iteration) * c.tile_m, masked, left_edge)
        matrix = warpgroup_rows_and_columns(s)
        derivatives = probabilities(score, matrix, lse, distance, hidden)
        narrow(s, self.p)
        if const_expr(not c.overlap):
            warpgroup.wait_group(0)
            rings["q"].release(before, further)
        else:
            warpgroup.wait_group(1)  # dQ of the step before
        self.sums.put(products.acc_dq)
        rings["dout"].wait(state)
        self.fill_delta(state.stage)
        warpgroup.fence()
        products.start_dp(state.stage)
        products.start_dv(as_warpgroup_operand_a(self.p), state.stage)
        if const_expr(c.overlap):
            warpgroup.wait_group(2)  # dK of the step before
            rings["q"].release(before, further)
        warpgroup.wait_group(1)
        dslope = self.dslope if const_expr(c.slopes_gradient) else None
        score_gradients(matrix, warpgroup_rows_and_columns(dp), None, derivatives, distance, dslope)
        narrow(dp, self.ds)
        cute.copy(self.copy, self.copy.retile(self.ds), self.ds_target[None, None, None, state.stage])
        cute.arch.fence_proxy("async.shared", space="cta")
        rings["q"].wait(following)
        cute.arch.barrier(barrier_id=CONSUMER_BARRIER, number_of_threads=WARPGROUP * CONSUMERS)
        warpgroup.fence()
        products.start_scores(following.stage)
        products.start_dq(state.stage)
        products.start_dk(as_warpgroup_operand_a(self.ds), state.stage)
        return following

    def lse(self, stage: Int32):
        """LSE of the query of register column c."""
        address, values = self.statistics[0] + stage * (4 * self.config.tile_m), []
        for pair in range(self.config.tile_m // 16):
            values += inline_ptx(
                "ld.shared.v4.f32 {{$w0}, {$w1}, {$w2}, {$w3}}, [{$r0}+" + str(64 * pair) + "];",
                write_only_types=[Float32] * 4,
                read_only_args=[address],
            )
        return lambda r, c: values[c]

    def fill_delta(self, stage: Int32):
        """dP starts from −D: one addition per score less."""
        acc, address = self.products.acc_dp, self.statistics[1] + stage * (8 * self.config.tile_m)
        for block in range(self.config.tile_m // 8):
            values = inline_ptx(
                "ld.shared.v4.f32 {{$w0}, {$w1}, {$w2}, {$w3}}, [{$r0}+" + str(64 * block) + "];",
                write_only_types=[Float32] * 4,
                read_only_args=[address],
            )
            for e in range(4):
                acc[4 * block + e] = values[e]

    def positions(self, work: KeyWork, m_start: Int32, masked: bool, left_edge: bool):
        """|i + D − j| of a register (r, c) of Sᵀ, for ALiBi, and whether it is masked; None where not needed."""
        # i + D − j is diagonal + column − row
        info, window, columns = work.info, self.args.common.window, self.config.tile_m
        distance, hidden = None, None
        if const_expr(self.config.alibi or masked):
            first_key = work.first_key(self.config) + self.first_row
            diagonal = info.seqlen_k - info.seqlen_q + m_start + self.first_column - first_key
        if const_expr(self.config.alibi):
            position = Float32(diagonal)

            def distance(r: int, c: int):
                return cute.math.absf(position + float(_column(c) - 8 * r))

        if const_expr(masked):
            hidden_in_row = [
                hidden_queries(window, row - diagonal, first_key + row, info.seqlen_k, columns, left_edge)
                for row in (0, 8)
            ]

            def hidden(r: int, c: int):
                return hidden_in_row[r](_column(c))

        return distance, hidden


def _column(c: int) -> int:
    """Column of register column c of a wgmma accumulator, from the thread's first."""
    return c // 2 * 8 + c % 2
