"""A consumer warpgroup: 64 keys of the tile, all steps over the queries."""

import itertools
from collections.abc import Callable
from typing import Optional

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Uint32, const_expr
from cutlass.cute.arch import inline_ptx
from cutlass.cute.nvgpu import warpgroup

from cute_fa.device.backward_arguments import BackwardArguments
from cute_fa.device.dtypes import CUTE_DTYPE
from cute_fa.device.fragments import as_warpgroup_operand_a, share_of_columns
from cute_fa.device.registers import narrow
from cute_fa.device.ring import Ring, RingState, ring_next, ring_start
from cute_fa.device.score import Score, probabilities, score_gradients
from cute_fa.device.visibility import hidden_queries
from fa3_sm90.backward.config import CONSUMERS, WARPGROUP, WGMMA_M, Fa3BackwardConfig
from fa3_sm90.backward.products import Products
from fa3_sm90.backward.query_sums import QuerySumsWriter
from fa3_sm90.backward.storage import Storage
from fa3_sm90.backward.work import KeyWork

CONSUMER_BARRIER = 1
PANEL_BYTES = 128


class Consumer:
    """Products are issued as soon as their operands are there, so that the tensor cores have work while a warpgroup is
    at its exponentials and gradients: S and dP; behind P dV, beside which dS is computed; dQ and dK, beside which dQ is
    handed on. dSᵀ, which all warpgroups' dQ needs, is the one thing that they exchange: a barrier a step.
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
        self.statistics_addresses = (storage.lse.toint() + thread % 4 * 16, storage.delta.toint() + thread % 4 * 16)
        self.dslope = cute.make_rmem_tensor(1, Float32)
        self.shares = c.tile_m // 16
        # stmatrix: a lane's row and 16 bytes of it, in a panel of 64 queries with a swizzle of 128 bytes
        row, half = index * WGMMA_M + thread // 32 * 16 + thread % 16, thread % 32 // 16
        place = row * PANEL_BYTES + ((half ^ (row & 7)) << 4)
        self.ds_address = cute.arch.make_warp_uniform(storage.ds.toint()) + place

    @cute.jit
    def run(self, work: KeyWork):
        """dK and dV of the tile in the accumulators, not scaled; dQ of all steps handed on, and the slopes' gradients
        stored."""
        products, rings, args = self.products, self.rings, self.args
        products.acc_dk.fill(0.0)
        products.acc_dv.fill(0.0)
        self.dslope.fill(0.0)
        state = ring_start()
        rings["k"].wait(state)
        rings["v"].wait(state)
        score = Score.of(args.common.softmax_scale, args.common.softcap)
        head = self.head
        for index in cutlass.range(work.heads, unroll=1):
            state = head(work, score, work.first_head + index, state)

    @cute.jit
    def head(self, work: KeyWork, score: Score, head: Int32, state: RingState) -> RingState:
        """The steps of one head."""
        c, steps = self.config, self.steps
        if const_expr(c.alibi):
            score = score.with_slopes((self.args.common.alibi_slopes[work.batch, head],) * 2)
        for masked in work.blocks.ranges(c.window_left):
            state = steps(work, score, state, *masked)
        if const_expr(c.slopes_gradient):
            dslope = cute.arch.warp_reduction_sum(self.dslope[0])
            part = work.n_block * c.slope_parts + self.index * 4 + self.thread // 32
            parts, lane = self.args.scratch.dslopes, self.thread % 32
            if lane == 0:
                parts[work.batch, head, part] = dslope
            self.dslope[0] = Float32(0.0)
        return state

    @cute.jit
    def steps(
        self,
        work: KeyWork,
        score: Score,
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
            state = step(work, score, iteration, state, masked, left_edge)
        return state

    @cute.jit
    def step(
        self,
        work: KeyWork,
        score: Score,
        iteration: Int32,
        state: RingState,
        masked: cutlass.Constexpr[bool],
        left_edge: cutlass.Constexpr[bool],
    ) -> RingState:
        """One block of queries of one head."""
        c, products, rings = self.config, self.products, self.rings
        s, dp, dq = products.accumulators()
        p, ds = (cute.make_rmem_tensor_like(acc, self.dtype) for acc in (s, dp))
        rings["q"].wait(state)
        warpgroup.fence()
        products.start_scores(s, state.stage)
        rings["dout"].wait(state)
        warpgroup.fence()
        products.start_dp(dp, state.stage)
        distance, hidden = self.positions(work, work.blocks.block(iteration) * c.tile_m, masked, left_edge)
        warpgroup.wait_group(1)  # S
        derivatives = self.probabilities(s, score, state.stage, distance, hidden)
        if const_expr(c.overlap):
            narrow(s, p)
            if const_expr(not c.slopes_gradient):
                derivatives = self.fold(s, derivatives)
            warpgroup.fence()
            products.start_dv(as_warpgroup_operand_a(p), state.stage)
            warpgroup.wait_group(1)  # dP
        else:
            warpgroup.wait_group(0)
        self.gradients(s, dp, state.stage, derivatives, distance)
        narrow(dp, ds)
        self.store_ds(ds, state.stage)
        if const_expr(not c.overlap):
            narrow(s, p)
            warpgroup.fence()
            products.start_dv(as_warpgroup_operand_a(p), state.stage)
        cute.arch.fence_proxy("async.shared", space="cta")
        cute.arch.barrier(barrier_id=CONSUMER_BARRIER, number_of_threads=WARPGROUP * CONSUMERS)
        warpgroup.fence()
        products.start_dq(dq, state.stage)
        products.start_dk(as_warpgroup_operand_a(ds), state.stage)
        warpgroup.wait_group(1)  # dQ, and dV
        rings["dout"].release(state.stage)
        self.sums.put(dq)
        warpgroup.wait_group(0)
        rings["q"].release(state.stage)
        return ring_next(state, c.stages)

    def probabilities(self, s: cute.Tensor, score: Score, stage: Int32, distance, hidden) -> list:
        """P in place of S; returns the softcap's derivatives, or None, of each share. LSE comes 16 queries at a time,
        where it is needed: a thread's share of all takes a quarter of the scores' registers."""
        derivatives = []
        for share in range(self.shares):
            lse, first = self.statistics(0, stage, share), 4 * share  # a thread has 4 of 16 columns
            derivatives.append(
                probabilities(
                    score,
                    share_of_columns(s, share, self.shares),
                    lambda r, c, lse=lse: lse[c],
                    shifted(distance, first),
                    shifted(hidden, first),
                )
            )
        return derivatives

    def fold(self, p: cute.Tensor, derivatives: list) -> list:
        """P times the softcap's derivatives in place of P, which has been narrowed: half the registers. The slopes'
        gradients need P itself."""
        if derivatives[0] is None:
            return derivatives
        for share, of_share in enumerate(derivatives):
            own = share_of_columns(p, share, self.shares)
            for r, c in itertools.product(range(2), range(4)):
                own[r, c] = own[r, c] * of_share[r, c]
        return [None] * self.shares

    def gradients(self, p: cute.Tensor, dp: cute.Tensor, stage: Int32, derivatives: list, distance):
        """dS in place of dP."""
        dslope = self.dslope if self.config.slopes_gradient else None
        for share in range(self.shares):
            delta = self.statistics(1, stage, share)
            score_gradients(
                share_of_columns(p, share, self.shares),
                share_of_columns(dp, share, self.shares),
                lambda r, c, delta=delta: delta[c],
                derivatives[share],
                shifted(distance, 4 * share),
                dslope,
            )

    def statistics(self, which: int, stage: Int32, share: int) -> list[Float32]:
        """LSE (0) or D (1) of a thread's queries of 16."""
        address = self.statistics_addresses[which] + stage * (4 * self.config.tile_m)
        return inline_ptx(
            "ld.shared.v4.f32 {{$w0}, {$w1}, {$w2}, {$w3}}, [{$r0}+" + str(64 * share) + "];",
            write_only_types=[Float32] * 4,
            read_only_args=[address],
        )

    def store_ds(self, ds: cute.Tensor, stage: Int32):
        """dSᵀ to shared memory. Of 16 queries, number n of a panel, the 16 bytes are the first ones' with bits 5 and 6
        flipped as n has them: one address in a register, where computed ones took eight."""
        c, words = self.config, cute.recast_tensor(ds, Uint32)
        address = self.ds_address + stage * (c.tile_n * c.tile_m * c.dtype.bytes)
        for share in range(c.tile_m // 16):
            panel, column = divmod(share, PANEL_BYTES // 32)
            inline_ptx(
                f"stmatrix.sync.aligned.m8n8.x4.shared.b16 [{{$r0}}+{panel * c.tile_n * PANEL_BYTES}], "
                "{{$r1}, {$r2}, {$r3}, {$r4}};",
                read_only_args=[address ^ (32 * column), *(words[4 * share + e] for e in range(4))],
            )

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


def shifted(of_column: Optional[Callable], first: int) -> Optional[Callable]:
    """What depends on a register's row and column, for columns counted from ``first``; None of None."""
    return of_column and (lambda r, c: of_column(r, first + c))


def _column(c: int) -> int:
    """Column of register column c of a wgmma accumulator, from the thread's first."""
    return c // 2 * 8 + c % 2
