"""The walk of a consumer warpgroup over the query blocks of all heads of a group, and what it asks of one."""

from collections.abc import Callable
from typing import Optional

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr
from cutlass.cute.arch import inline_ptx

from cute_fa.device.backward_arguments import BackwardArguments
from cute_fa.device.block_range import MaskedRange
from cute_fa.device.fragments import share_of_columns
from cute_fa.device.ring import RingState
from cute_fa.device.score import Score, probabilities, score_gradients
from cute_fa.device.visibility import hidden_queries
from fa3_sm90.backward.work import KeyWork


class QueryWalk:
    """Base of the consumers, whose Sᵀ and dPᵀ have 64 keys in rows and ``tile_m`` queries in columns. Each has a method
    ``step(work, score, iteration, state, masked, left_edge)``, which returns the state of the rings behind it."""

    def __init__(self, config, args: BackwardArguments, storage, first_key: Int32, thread: Int32):
        """``first_key``: of the warpgroup, within the tile; ``thread``: within the warpgroup; ``storage``: of the CTA,
        with ``lse`` and ``delta`` of every stage."""
        self.config, self.args, self.thread = config, args, thread
        self.first_row = first_key + thread // 32 * 16 + thread % 32 // 4
        self.first_column = thread % 4 * 2
        self.shares = config.tile_m // 16
        self.statistics_addresses = (storage.lse.toint() + thread % 4 * 16, storage.delta.toint() + thread % 4 * 16)

    def ranges(self, work: KeyWork) -> list[MaskedRange]:
        """The walk over the blocks of a head."""
        return work.blocks.ranges(self.config.window_left)

    @cute.jit
    def head(self, work: KeyWork, score: Score, head: Int32, state: RingState) -> RingState:
        """The steps of one head."""
        steps, ranges = self.steps, self.ranges
        if const_expr(self.config.alibi):
            score = score.with_slopes((self.args.common.alibi_slopes[work.batch, head],) * 2)
        for masked in ranges(work):
            state = steps(work, score, state, *masked)
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

    def probabilities(
        self, s: cute.Tensor, share: int, score: Score, stage: Int32, distance, hidden
    ) -> Optional[cute.Tensor]:
        """P in place of S in a share of 16 queries; returns the softcap's derivatives, or None. LSE comes where it is
        needed: a thread's share of all takes a quarter of the scores' registers."""
        lse, first = self.statistics(0, stage, share), 4 * share  # a thread has 4 of 16 columns
        own = share_of_columns(s, share, self.shares)
        return probabilities(score, own, lambda r, c: lse[c], shifted(distance, first), shifted(hidden, first))

    def gradients(self, p: cute.Tensor, dp: cute.Tensor, share: int, stage: Int32, derivatives, distance, dslope):
        """dS in place of dP in a share; ``dslope``: one register that takes the slope's gradient, or None."""
        delta = self.statistics(1, stage, share)
        score_gradients(
            share_of_columns(p, share, self.shares),
            share_of_columns(dp, share, self.shares),
            lambda r, c: delta[c],
            derivatives,
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
                return cute.math.absf(position + float(register_column(c) - 8 * r))

        if const_expr(masked):
            hidden_in_row = [
                hidden_queries(window, row - diagonal, first_key + row, info.seqlen_k, columns, left_edge)
                for row in (0, 8)
            ]

            def hidden(r: int, c: int):
                return hidden_in_row[r](register_column(c))

        return distance, hidden


def part(fragment: cute.Tensor, share: int, shares: int) -> cute.Tensor:
    """The registers of a share of an accumulator's columns, one after the other."""
    count = cute.size(fragment) // shares
    return cute.make_tensor(fragment.iterator + share * count, cute.make_layout(count))


def shifted(of_column: Optional[Callable], first: int) -> Optional[Callable]:
    """What depends on a register's row and column, for columns counted from ``first``; None of None."""
    return of_column and (lambda r, c: of_column(r, first + c))


def register_column(c: int) -> int:
    """Column of register column c of a wgmma accumulator, from the thread's first."""
    return c // 2 * 8 + c % 2
