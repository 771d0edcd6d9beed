"""A consumer warpgroup: 64 rows of queries through the key blocks, then out."""

from typing import Optional

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32, const_expr
from cutlass.cute.nvgpu import warpgroup

from cute_fa.device.forward_arguments import ForwardArguments, TmaTensors
from cute_fa.device.fragments import share_of_columns, warpgroup_rows_and_columns
from cute_fa.device.positions import distances_between, row_positions
from cute_fa.device.range_walk import hidden_columns, hide
from cute_fa.device.registers import opaque
from cute_fa.device.ring import Ring, RingState, previous_stage, ring_next, ring_start
from cute_fa.device.score import Score, apply_score, distances
from cute_fa.device.softmax import OnlineSoftmax
from cute_fa.device.tile_work import Extents, TileWork, kv_head, scheduler_of, tile_work
from cute_fa.device.unseen_tiles import write_unseen_tiles
from cute_fa.device.visibility import mask_scores
from fa3_sm90.common.wgmma import WARPGROUP
from fa3_sm90.forward.accumulation import Direct, Promoted
from fa3_sm90.forward.cluster import place_of
from fa3_sm90.forward.config import Fa3ForwardConfig
from fa3_sm90.forward.descales import BlockDescales
from fa3_sm90.forward.epilogue import Epilogue
from fa3_sm90.forward.probabilities import EightBits, SixteenBits, probability_type
from fa3_sm90.forward.products import Products
from fa3_sm90.forward.rows import ROWS, Rows
from fa3_sm90.forward.storage import Storage
from fa3_sm90.forward.turns import Turns


class Consumer:
    """One warpgroup. Within it the softmax of a block overlaps P·V of the block before; between warpgroups
    :class:`Turns` hands the tensor cores on (FlashAttention-3, arXiv 2407.08608, section 3)."""

    def __init__(
        self,
        config: Fa3ForwardConfig,
        args: ForwardArguments,
        tma: TmaTensors,
        extents: Extents,
        storage: Storage,
        rings: dict[str, Ring],
        index: Int32,
        thread: Int32,
    ):
        """``index``: which consumer, ``thread``: which of its 128 threads."""
        self.config, self.args, self.extents, self.index, self.thread = config, args, extents, index, thread
        self.place = place_of(config, index)
        # the rings of Q come first in memory, one for each warpgroup
        self.queries = Ring(config.pipelines[0], storage.barriers + 2 * index)
        self.keys, self.values = rings["k"], rings[config.values]
        self.turns = Turns(config.warpgroups, index)
        self.products = Products(config, storage, index, thread)
        self.rows = Rows(config, warpgroup_rows_and_columns(self.products.own_coordinates))
        self.columns = warpgroup_rows_and_columns(self.products.static_coordinates)
        self.epilogue = Epilogue(config, args, tma, storage, self.products, self.rows, self.queries, index, thread)
        self.block_descales = BlockDescales(config, args, storage)
        self.scores = warpgroup_rows_and_columns(self.products.acc_s)
        if config.dtype.is_fp8:
            self.probabilities = EightBits(self.products.acc_s, config.key_major_v, config.output_parts)
            self.accumulation = Promoted(self.products, config.output_parts, config.v_block_descale)
        else:
            self.probabilities = SixteenBits(self.products.acc_s, probability_type(config.dtype))
            self.accumulation = Direct(self.products)

    @cute.jit
    def run(self):
        """Walk over the CTA's tiles."""
        scheduler = scheduler_of(self.args.common, self.args.grid, self.config, ctas=self.config.cluster)
        valid, advance, compute_tile = scheduler.valid, scheduler.next, self.compute_tile
        if const_expr(self.config.turns):
            self.turns.start()
        queries, keys = ring_start(), ring_start()
        state = scheduler.first()
        while valid(state):
            keys = compute_tile(scheduler, state, queries, keys)
            queries = ring_next(queries, 1)
            state = type(state)(*(cute.arch.make_warp_uniform(number) for number in advance(state)))  # see steps()
        self.epilogue.finish()
        if const_expr(self.config.ranges):  # not in the loop: a branch around its products serialises them
            threads = self.config.warpgroups * WARPGROUP
            write_unseen_tiles(self.args.common, self.config, self.index * WARPGROUP + self.thread, threads)

    @cute.jit
    def compute_tile(self, scheduler, state, queries: RingState, keys: RingState) -> RingState:
        """One tile, from these states of the rings on; returns the next one of K and V."""
        args, config = self.args, self.config
        work = tile_work(args.common, config, self.extents, scheduler.tile(state))
        score = self.score(work)
        softmax = OnlineSoftmax(ROWS, score.scale_log2, self.probabilities.exponents, config.max_chains)
        self.accumulation.clear()
        keys = self.walk(work, softmax, score, queries, keys)

        # Where the tile lies is read again instead of being kept in registers over the main loop.
        work = tile_work(args.common, config, self.extents, scheduler.tile(state))
        head = work.tile.head * config.pack_gqa
        sinks = self.rows.per_head(args.common.learnable_sink, head)
        output = self.accumulation.output
        lse = softmax.finalize(warpgroup_rows_and_columns(output), score.offset_log2, sinks, self.value_scale(work))
        self.epilogue.store(output, lse, work, queries)
        return keys

    @cute.jit
    def score(self, work: TileWork):
        """Constants of the tile's score formula."""
        slopes = None
        if const_expr(self.config.alibi):
            head = work.tile.head * self.config.pack_gqa
            slopes = self.rows.per_head(self.args.common.alibi_slopes[work.tile.batch, None], head)
        scale = self.args.common.softmax_scale
        head = kv_head(self.args.common, self.config.pack_gqa, work.tile.head)
        descale = self.args.common.descales.of_scores(work.tile.batch, head)
        if const_expr(descale is not None):
            scale = scale * descale
        if const_expr(self.config.k_block_descale):  # not computed again in every iteration
            scale = opaque(scale)
        return Score.of(scale, self.args.common.softcap, slopes)

    def value_scale(self, work: TileWork):
        """Factor of O, or None."""
        if const_expr(self.config.v_block_descale):
            return self.block_descales.last_unit(work)
        head = kv_head(self.args.common, self.config.pack_gqa, work.tile.head)
        return self.args.common.descales.of_values(work.tile.batch, head)

    @cute.jit
    def walk(
        self, work: TileWork, softmax: OnlineSoftmax, score: Score, queries: RingState, keys: RingState
    ) -> RingState:
        """The key blocks of a tile, range by range, each with just the mask it needs. P·V runs one block behind."""
        c, blocks = self.config, work.blocks
        self.queries.wait(queries)
        self.first_block(work, softmax, score, keys)
        ranges = blocks.ranges(c.window_left)
        if const_expr(not (c.window_right or c.ranges)):
            ranges = ranges[1:]  # the sequence's end is in the first block
        for i in cutlass.range_constexpr(len(ranges)):
            keys = self.steps(work, softmax, score, keys, *ranges[i])
        self.last_block(softmax, blocks.total, keys)
        if const_expr(c.own_output):
            self.queries.release(queries.stage)
        return ring_next(keys, c.stages)

    @cute.jit
    def steps(
        self,
        work: TileWork,
        softmax: OnlineSoftmax,
        score: Score,
        keys: RingState,
        start: Int32,
        stop: Int32,
        right_edge: cutlass.Constexpr[bool],
        left_edge: cutlass.Constexpr[bool],
    ) -> RingState:
        """The blocks of one range but the first of all, which :meth:`first_block` has done.

        Through shuffles, what the loop runs by is the same for the whole warp also in ptxas's eyes, even after a detour
        through a spilled register: else it keeps descriptors in vector registers and moves them, 32 instructions a step
        at head_dim 64 causal, and computes the bounds again from the lengths, 17 instructions.
        """
        step = self.step
        start, stop = cute.arch.make_warp_uniform(cutlass.max(start, 1)), cute.arch.make_warp_uniform(stop)
        keys = RingState(*(cute.arch.make_warp_uniform(number) for number in keys))
        for i in cutlass.range(start, stop, unroll=1):
            keys = step(work, softmax, score, i, keys, right_edge, left_edge)
        return keys

    @cute.jit
    def first_block(self, work: TileWork, softmax: OnlineSoftmax, score: Score, state: RingState):
        """Exponentials of the first block, which may be of any range."""
        bits = self.mask_rows(work, Int32(0), True)
        self.keys.wait(state)
        warpgroup.fence()
        self.products.start_scores(state.stage)
        score, softmax = self.descaled(score, softmax, state.stage)
        warpgroup.wait_group(0)
        self.keys.release(state.stage)
        self.modify_and_mask(work, score, Int32(0), True, self.config.window_left, bits)
        softmax.advance(self.scores)
        softmax.exponentiate(self.scores, True)

    @cute.jit
    def step(
        self,
        work: TileWork,
        softmax: OnlineSoftmax,
        score: Score,
        iteration: Int32,
        before: RingState,
        right_edge: cutlass.Constexpr[bool],
        left_edge: cutlass.Constexpr[bool],
    ) -> RingState:
        """Scores of the next block, and their exponentials beside P·V of the block at ``before``.

        What waits for P·V, :meth:`settle`, comes behind the next step's wait for K: ptxas moves a wait for wgmma up as
        far as it can, but not over that loop. In one basic block with the exponentials it stood before most of them.
        """
        keys, values, products, stages = self.keys, self.values, self.products, self.config.stages
        state = ring_next(before, stages)
        second = right_edge and self.config.single_edge_step  # then the only step of its range
        if const_expr(self.config.turns):
            bits = self.mask_rows(work, iteration, right_edge)
        keys.wait(state)
        self.settle(softmax, iteration > 1, previous_stage(before, stages), second)
        if const_expr(self.config.turns):
            self.turns.take()
        warpgroup.fence()  # for P·V, too, which follows without a wait
        products.start_scores(state.stage)
        values.wait(before)
        products.start_output(self.probabilities.operand, before.stage)
        if const_expr(self.config.turns):
            self.turns.pass_on()
        if const_expr(not self.config.turns):  # the products take long enough, and registers are scarce before
            bits = self.mask_rows(work, iteration, right_edge)
        score, softmax = self.descaled(score, softmax, state.stage)
        warpgroup.wait_group(1)
        keys.release(state.stage)
        self.modify_and_mask(work, score, iteration, right_edge, left_edge, bits)
        softmax.advance(self.scores)
        self.accumulation.go_on(
            lambda part: products.start_output(self.probabilities.operand, before.stage, part),
            lambda i, n: softmax.exponentiate(share_of_columns(products.acc_s, i, n), right_edge or left_edge),
        )
        return state

    def descaled(self, score: Score, softmax: OnlineSoftmax, stage: Int32) -> tuple[Score, OnlineSoftmax]:
        """Both for the block of K in a stage, where blocks have descales of their own."""
        if const_expr(not self.config.block_descales):
            return score, softmax
        factors = self.block_descales.take(stage)
        self.accumulation.change_unit(factors.ratio)
        if const_expr(self.config.k_block_descale):
            score = score.scaled(factors.key)
        return score, softmax.scaled(score.scale_log2)

    @cute.jit
    def settle(
        self, softmax: OnlineSoftmax, multiplied: Boolean, stage: Int32, second: cutlass.Constexpr[bool] = False
    ):
        """Finish a block: its exponentials become P, once P·V of the block before, with V in ``stage``, is done and O
        has been rescaled. ``multiplied``: there is a block before; ``second``: there is none, known at compile time."""
        warpgroup.wait_group(0)
        if const_expr(not second):
            self.values.release(stage, multiplied)
        self.accumulation.settle(softmax)
        self.probabilities.narrow()

    @cute.jit
    def last_block(self, softmax: OnlineSoftmax, total: Int32, state: RingState):
        """P·V of the last of ``total`` blocks."""
        self.values.wait(state)
        self.settle(softmax, total > 1, previous_stage(state, self.config.stages))
        warpgroup.fence()
        self.products.start_output(self.probabilities.operand, state.stage)
        self.accumulation.go_on(
            lambda part: self.products.start_output(self.probabilities.operand, state.stage, part), lambda i, n: None
        )
        warpgroup.wait_group(0)
        self.values.release(state.stage)
        self.accumulation.finish()

    def mask_rows(self, work: TileWork, iteration: Int32, masked: bool) -> Optional[list[cute.Tensor]]:
        """Under a range plan, the bits of a masked block for the thread's rows: on their way while its scores are
        computed."""
        c = self.config
        if not (c.ranges and masked):
            return None
        first_row = self.index * c.tokens
        return [work.blocks.mask_row(iteration, first_row + row, *c.walk_shape) for row in self.rows.tokens]

    @cute.jit
    def modify_and_mask(
        self,
        work: TileWork,
        score: Score,
        iteration: Int32,
        right_edge: cutlass.Constexpr[bool],
        left_edge: cutlass.Constexpr[bool],
        bits: cutlass.Constexpr,
    ):
        """Softcap, ALiBi and the mask of one block of keys, in place. ``bits``: of :meth:`mask_rows`."""
        c, rows, info = self.config, self.rows, work.info
        masked, diagonals, distance = right_edge or left_edge, None, None
        if const_expr(masked or c.alibi):
            first_key = work.blocks.block(iteration, self.args.common.window) * c.tile_n + rows.column
            first_token = work.first_token + self.place * c.tokens
            diagonal = first_token - first_key
            if const_expr(not c.ranges):
                diagonal = info.seqlen_k - info.seqlen_q + first_token - first_key
            diagonals = [diagonal + token for token in rows.tokens]
        if const_expr(c.q_positions):
            common, columns = self.args.common, range(cute.size(self.columns, mode=[1]))
            own = row_positions(common.q_positions, first_token, rows.tokens)
            columns = [self.columns[0, column][1] for column in columns]
            distance = distances_between(own, common.k_positions, first_key, columns)
        elif const_expr(c.alibi):
            distance = distances(diagonals, self.columns)
        apply_score(score, self.scores, distance)
        if const_expr(bits is not None):
            hide(self.scores, self.columns, [hidden_columns(of_row, rows.column) for of_row in bits])
        elif const_expr(masked):
            keys_left = info.seqlen_k - first_key
            mask_scores(
                self.scores,
                self.columns,
                diagonals,
                keys_left,
                self.args.common.window,
                first_key,
                right_edge,
                left_edge,
            )
