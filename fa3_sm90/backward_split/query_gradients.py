"""The consumers of the kernel for dQ: a warpgroup has 64 queries, and meets all blocks of keys."""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr
from cutlass.cute.nvgpu import warp, warpgroup

from cute_fa.device.backward_arguments import BackwardArguments
from cute_fa.device.backward_preprocess import statistics_place
from cute_fa.device.dtypes import CUTE_DTYPE
from cute_fa.device.fragments import as_warpgroup_operand_a, share_of_columns
from cute_fa.device.registers import narrow
from cute_fa.device.ring import Ring, RingState, ring_next, ring_start
from cute_fa.device.score import Score, probabilities, score_gradients
from cute_fa.device.tma_boxes import BoxCopy, tile_layout
from cute_fa.device.visibility import hidden_keys
from fa3_sm90.backward.config import CONSUMERS
from fa3_sm90.backward.walk import register_column, shifted
from fa3_sm90.backward_split.arguments import Boxes, TmaTensors
from fa3_sm90.backward_split.config import TILE, Fa3SplitBackwardConfig
from fa3_sm90.backward_split.storage import QueryStorage
from fa3_sm90.common.products import ScoreProduct, SumProduct, tiles
from fa3_sm90.common.wgmma import WARPGROUP

_ROWS = 2  # of a thread, eight apart
_OWN = 1  # named barrier of the first warpgroup


class QueryGradients:
    """One warpgroup; S, dP and dQ have queries in rows, of which a thread has two."""

    def __init__(
        self,
        config: Fa3SplitBackwardConfig,
        args: BackwardArguments,
        storage: QueryStorage,
        rings: dict[str, Ring],
        index: Int32,
        thread: Int32,
    ):
        """``index``: of the warpgroup; ``thread``: within it."""
        c, self.config, self.args, self.rings = config, config, args, rings
        self.index, self.thread, self.storage = index, thread, storage
        self.row, self.column = thread // 32 * 16 + thread % 32 // 4, thread % 4 * 2
        dtype = self.dtype = CUTE_DTYPE[c.dtype]
        q = tiles(storage.q, dtype, TILE, c.head_dim_padded, CONSUMERS)[None, None, index]
        dout = tiles(storage.dout, dtype, TILE, c.head_dim_v_padded, CONSUMERS)[None, None, index]
        k = tiles(storage.k, dtype, TILE, c.head_dim_padded, c.k_stages)
        v = tiles(storage.v, dtype, TILE, c.head_dim_v_padded, c.v_stages)
        self.scores, self.dprobabilities = ScoreProduct(dtype, q, k), ScoreProduct(dtype, dout, v)
        self.sums = SumProduct(dtype, k)
        self.lse, self.delta = (cute.make_rmem_tensor(_ROWS, Float32) for _ in range(2))
        self.dslope = cute.make_rmem_tensor(1, Float32)

    @cute.jit
    def run(self, work):
        """dQ of the warpgroup's queries in its accumulator, not scaled; the slopes' gradients stored."""
        c, args, steps = self.config, self.args, self.steps
        self.sums.acc.fill(0.0)
        self.dslope.fill(0.0)
        self.load_statistics(work)
        score = Score.of(args.common.softmax_scale, args.common.softcap)
        if const_expr(c.alibi):
            score = score.with_slopes((args.common.alibi_slopes[work.batch, work.head],) * _ROWS)
        own = RingState(self.index, Int32(0))
        self.rings["q"].wait(own)
        self.rings["dout"].wait(own)
        keys, values = ring_start(), ring_start()
        for masked in work.blocks.ranges(c.window_left):
            keys, values = steps(work, score, keys, values, *masked)
        if const_expr(c.slopes_gradient):
            self.store_dslope(work)

    @cute.jit
    def load_statistics(self, work):
        """LSE and D of the thread's rows, D as it is for P itself."""
        c, stats, shift = self.config, self.args.scratch.stats, self.config.probability_shift
        tile = work.tile + self.index
        first_tile = self.args.first_tile(work.info, work.batch, TILE)
        for r in cutlass.range_constexpr(_ROWS):
            row = self.row + 8 * r
            lse, delta = Float32.inf, Float32(0.0)
            if tile * TILE + row < work.info.seqlen_q:
                place = statistics_place(c, row)
                lse = stats[first_tile + tile, work.head, place]
                delta = stats[first_tile + tile, work.head, TILE + place]
            self.lse[r], self.delta[r] = lse, delta * 2.0**shift

    @cute.jit
    def steps(
        self,
        work,
        score: Score,
        keys: RingState,
        values: RingState,
        start: Int32,
        stop: Int32,
        right_edge: cutlass.Constexpr[bool],
        left_edge: cutlass.Constexpr[bool],
    ) -> tuple[RingState, RingState]:
        """The blocks of one range. What the loop runs by goes through shuffles, see
        :meth:`fa3_sm90.forward.consumer.Consumer.steps`."""
        c, step = self.config, self.step
        start, stop = cute.arch.make_warp_uniform(start), cute.arch.make_warp_uniform(stop)
        keys, values = (RingState(*map(cute.arch.make_warp_uniform, state)) for state in (keys, values))
        for iteration in cutlass.range(start, stop, unroll=1):
            step(work, score, iteration, keys, values, right_edge, left_edge)
            keys, values = ring_next(keys, c.k_stages), ring_next(values, c.v_stages)
        return keys, values

    @cute.jit
    def step(
        self,
        work,
        score: Score,
        iteration: Int32,
        keys: RingState,
        values: RingState,
        right_edge: cutlass.Constexpr[bool],
        left_edge: cutlass.Constexpr[bool],
    ):
        """One block of keys."""
        rings, s, dp = self.rings, self.scores.accumulator(), self.dprobabilities.accumulator()
        rings["k"].wait(keys)
        warpgroup.fence()
        self.scores.start(s, keys.stage)
        rings["v"].wait(values)
        self.dprobabilities.start(dp, values.stage)
        block = work.blocks.block(iteration, self.args.common.window)
        distance, hidden = self.positions(work, block * TILE, right_edge, left_edge)
        warpgroup.wait_group(1)
        dslope = self.dslope if self.config.slopes_gradient else None
        # With a softcap by shares, of whose derivatives no more than one's are alive: 8 to 50 accesses spilled.
        shares = 8 if self.config.softcap else 1
        for share in cutlass.range_constexpr(shares):
            first = share * TILE // 4 // shares
            p, of_dp = (share_of_columns(acc, share, shares) for acc in (s, dp))
            of_distance, of_hidden = shifted(distance, first), shifted(hidden, first)
            derivatives = probabilities(score, p, lambda r, c: self.lse[r], of_distance, of_hidden)
            if const_expr(share == 0):
                warpgroup.wait_group(0)
                rings["v"].release(values.stage)
            score_gradients(p, of_dp, lambda r, c: self.delta[r], derivatives, of_distance, dslope)
        ds = cute.make_rmem_tensor_like(dp, self.dtype)
        narrow(dp, ds)
        warpgroup.fence()
        self.sums.start(as_warpgroup_operand_a(ds), keys.stage)
        warpgroup.wait_group(0)
        rings["k"].release(keys.stage)

    def positions(self, work, n_start: Int32, right_edge: bool, left_edge: bool):
        """|i + D − j| of a register (r, c) of S, for ALiBi, and whether it is masked; None where not needed."""
        # i + D − j is diagonal + row − column
        info, window = work.info, self.args.common.window
        first_key = n_start + self.column
        diagonal = info.seqlen_k - info.seqlen_q + (work.tile + self.index) * TILE + self.row - first_key
        distance, hidden = None, None
        if const_expr(self.config.alibi):
            position = Float32(diagonal)

            def distance(r: int, c: int):
                return cute.math.absf(position + float(8 * r - register_column(c)))

        if const_expr(right_edge or left_edge):
            hidden_in_row = [
                hidden_keys(window, diagonal + 8 * r, first_key, info.seqlen_k - first_key, left_edge, right_edge)
                for r in range(_ROWS)
            ]

            def hidden(r: int, c: int):
                return hidden_in_row[r](register_column(c))

        return distance, hidden

    @cute.jit
    def store_dslope(self, work):
        """A warp's part of the gradient of the head's slope."""
        dslope = cute.arch.warp_reduction_sum(self.dslope[0])
        part = (work.tile + self.index) * self.config.slope_parts + self.thread // 32
        parts = self.args.scratch.dslopes
        if self.thread % 32 == 0 and part < parts.shape[2]:
            parts[work.batch, work.head, part] = dslope

    @cute.jit
    def store(self, tma: TmaTensors, work):
        """dQ, scaled, over the warpgroup's Q, which it alone has read, and by TMA. Rows behind the sequence's are not
        written."""
        c, sums = self.config, self.sums
        sums.acc.store(
            sums.acc.load() * Score.of(self.args.common.softmax_scale, self.args.common.softcap).gradient_scale
        )
        narrowed = cute.make_rmem_tensor_like(sums.acc, self.dtype)
        narrow(sums.acc, narrowed)
        layout = tile_layout(self.dtype, TILE, c.head_dim_padded, CONSUMERS)
        tile = cute.make_tensor(self.storage.q, layout.outer)[None, None, self.index]
        atom = cute.make_copy_atom(warp.StMatrix8x8x16bOp(False, 4), self.dtype)
        copy = cute.make_tiled_copy_C(atom, sums.mma).get_slice(self.thread)
        cute.arch.barrier(barrier_id=_OWN + self.index, number_of_threads=WARPGROUP)  # no warp's products read Q
        cute.copy(copy, copy.retile(narrowed), copy.partition_D(tile))
        cute.arch.fence_proxy("async.shared", space="cta")
        cute.arch.barrier(barrier_id=_OWN + self.index, number_of_threads=WARPGROUP)
        if self.thread < 32:
            self.to_global(tma, work)

    def to_global(self, tma: TmaTensors, work):
        """Store the tile, by one warp."""
        c, box = self.config, Boxes.of(self.config, 1).dq
        outer = () if const_expr(c.cu_seqlens_q) else (work.batch,)
        row = (work.tile + self.index) * TILE
        copy = BoxCopy(tma.dq, box, TILE, work.head, outer)
        with cute.arch.elect_one():
            tile = self.storage.q + self.index * (TILE * c.head_dim_padded)
            copy.store(tile, work.info.offset_q + row, work.info.rows_q - row)
            cute.arch.cp_async_bulk_commit_group()
            cute.arch.cp_async_bulk_wait_group(0, read=True)
