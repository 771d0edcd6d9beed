"""A consumer warpgroup: S = Q·Kᵀ, the online softmax and O += P·V, one block of keys after the other."""

from typing import Optional

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, const_expr
from cutlass.cute.nvgpu import warpgroup

from cute_fa.device.block_range import MaskedRange
from cute_fa.device.chunk_walk import make_walk
from cute_fa.device.dtypes import CUTE_DTYPE
from cute_fa.device.fragments import as_warpgroup_operand_a, warpgroup_rows_and_columns
from cute_fa.device.registers import narrow
from cute_fa.device.ring import Ring, RingState, ring_next, ring_start
from cute_fa.device.row_descales import ValueUnits, scale_columns
from cute_fa.device.score import Score, apply_score, distances
from cute_fa.device.softmax import HALF, MOST_IN_A_LOOP, WIDE, OnlineSoftmax, scale_row
from cute_fa.device.split_arguments import SplitArguments
from cute_fa.device.split_walk import Piece
from cute_fa.device.tree_mask import DraftWords, hide_drafts
from cute_fa.device.visibility import mask_scores
from fa3_sm90.common.products import RegisterScoreProduct, ScoreProduct, SumProduct, tiles
from fa3_sm90.common.wgmma import WGMMA_M
from fa3_sm90.decode.config import Fa3DecodeConfig
from fa3_sm90.decode.descales import ColumnDescales
from fa3_sm90.decode.epilogue import Epilogue
from fa3_sm90.decode.exchange import Exchange
from fa3_sm90.decode.storage import Storage

ROWS = 2  # of the warpgroup's 64 that a thread has


class Consumer:
    """A warp has 16 rows; one without any (one token of few heads fills one warp) takes part in the products, which
    are the whole warpgroup's, and skips the rest. Within a warpgroup nothing overlaps: the other one computes while
    this waits, and both wait for memory."""

    def __init__(
        self,
        config: Fa3DecodeConfig,
        args: SplitArguments,
        storage: Storage,
        rings: dict[str, Ring],
        index: Int32,
        thread: Int32,
    ):
        """``index``: which consumer, ``thread``: which of its 128 threads."""
        c, dtype = config, CUTE_DTYPE[config.product_dtype]
        self.config, self.args, self.dtype, self.index = config, args, dtype, index
        self.queries, self.keys, self.values = rings["q"], rings["k"], rings["v"]
        group = index if const_expr(c.row_groups > 1) else 0
        q = tiles(storage.q, dtype, WGMMA_M, c.head_dim_padded, c.row_groups)[None, None, group]
        k = tiles(storage.k, dtype, c.tile_n, c.head_dim_padded, c.stages)
        if const_expr(c.queries_in_registers):
            self.scores = RegisterScoreProduct(dtype, q, k, thread)
        else:
            self.scores = ScoreProduct(dtype, q, k)
        self.sums = SumProduct(dtype, tiles(storage.v, dtype, c.tile_n, c.value_columns, c.stages))
        self.acc = warpgroup_rows_and_columns(self.sums.acc)
        self.probabilities = cute.make_rmem_tensor(self.scores.shape, dtype)
        # coordinates of thread 0, every other thread's lie one constant offset away
        coordinates = cute.make_tiled_mma(self.scores.operation).get_slice(0)
        identity = coordinates.partition_C(cute.make_identity_tensor((WGMMA_M, c.tile_n)))
        self.columns = warpgroup_rows_and_columns(identity)
        self.first_row = group * WGMMA_M + cute.arch.make_warp_uniform(thread // 32) * 16  # of the warp
        self.rows = [self.first_row + thread % 32 // 4 + 8 * r for r in range(ROWS)]
        self.column = thread % 4 * 2
        self.epilogue = Epilogue(config, args, self.rows, self.column)
        self.factors = None
        if const_expr(c.scales_rows):
            self.factors = cute.make_tensor(storage.row_factors, cute.make_layout(c.tile_m))
        self.descales, self.units = None, None
        if const_expr(c.row_descales):
            self.descales = ColumnDescales(c, storage, self.columns, self.column)
        if const_expr(c.v_row_descale):
            self.units = ValueUnits(ROWS)
        self.exchange = None if const_expr(c.key_groups == 1) else Exchange(config, storage.exchange, thread)

    @cute.jit
    def run(self):
        """Walk over the CTA's share."""
        c, walk = self.config, make_walk(self.config, self.args.common, self.args.grid)
        valid, piece_at, advance, gqa_ratio = walk.valid, walk.piece, walk.next, walk.gqa_ratio
        compute, first = self.compute, self.index == 0
        if const_expr(c.key_groups > 1):
            start = self.exchange.start
            if first:
                start()
        self.probabilities.fill(0.0)
        queries, keys, turn = ring_start(), ring_start(), Int32(0)
        if const_expr(c.key_groups > 1):
            if not first:
                keys = ring_next(keys, c.stages)
        state = walk.first(cute.arch.block_idx()[0])
        while valid(state):
            piece = piece_at(state)
            keys = compute(piece, gqa_ratio, queries, keys, turn)
            queries, turn = ring_next(queries, 1), turn + piece.stop - piece.start
            state = advance(state, piece)

    @cute.jit
    def compute(self, piece: Piece, gqa_ratio: Int32, queries: RingState, keys: RingState, turn: Int32) -> RingState:
        """A piece, ``turn`` blocks of the CTA being behind; returns the next state of the warpgroup in the ring."""
        c = self.config
        score = self.score(piece, gqa_ratio)
        exponents = HALF if const_expr(c.keeps_small_probabilities) else WIDE
        branches = c.head_dim_v_padded > MOST_IN_A_LOOP
        softmax = OnlineSoftmax(ROWS, score.scale_log2, exponents, row_wise=c.batch_invariant, branches=branches)
        self.sums.acc.fill(0.0)
        if const_expr(c.v_row_descale):
            self.units.reset()
        rows_left = piece.info.rows_q * gqa_ratio - piece.first_row - self.first_row
        busy = cute.arch.make_warp_uniform(rows_left) > 0
        self.queries.wait(queries)
        factors = self.take_queries(busy)
        if const_expr(c.queries_in_registers):
            self.queries.release(queries.stage)
        ranges = piece.blocks.ranges(c.window_left)
        for i in cutlass.range_constexpr(len(ranges)):
            keys = self.steps(piece, gqa_ratio, score, factors, softmax, busy, keys, turn, ranges[i])
        if const_expr(not c.queries_in_registers):
            self.queries.release(queries.stage)
        self.finish(piece, gqa_ratio, score, softmax, busy)
        return keys

    @cute.jit
    def take_queries(self, busy: Boolean) -> Optional[cute.Tensor]:
        """What a warp with rows keeps of them in registers; returns what they were divided by, or None."""
        c, factors, of_tile, rows = self.config, None, self.factors, self.rows
        if const_expr(c.scales_rows):
            factors = cute.make_rmem_tensor(ROWS, Float32)
        load = self.scores.load if const_expr(c.queries_in_registers) else None
        if busy:
            if const_expr(c.queries_in_registers):
                load()
            if const_expr(c.scales_rows):
                for r in cutlass.range_constexpr(ROWS):
                    factors[r] = of_tile[rows[r]]
        return factors

    @cute.jit
    def finish(self, piece: Piece, gqa_ratio: Int32, score: Score, softmax: OnlineSoftmax, busy: Boolean):
        """All sums of the piece's rows on their way out."""
        acc, store, keeps = self.sums.acc, self.store, Boolean(True)
        if const_expr(self.config.v_row_descale):
            leave, rows = self.units.leave, self.acc
            if busy:
                leave(rows)
        if const_expr(self.config.key_groups > 1):
            give, take, keeps = self.exchange.give, self.exchange.take, self.index == 0
            if keeps:
                take(acc, softmax, busy)
            else:
                give(acc, softmax, busy)
        if keeps & busy:
            store(piece, gqa_ratio, score, softmax)

    @cute.jit
    def store(self, piece: Piece, gqa_ratio: Int32, score: Score, softmax: OnlineSoftmax):
        """Normalised O; the learnable sink is added once, where parts are merged if there are any."""
        sinks, value_scale = None, self.args.common.descales.of_values(piece.batch, piece.head)
        if const_expr(self.config.learnable_sink and not self.config.batch_invariant):
            sinks = tuple(
                cutlass.select_(piece.whole, self.args.common.learnable_sink[head], -Float32.inf)
                for head in self.heads(piece, gqa_ratio)
            )
        lse = softmax.finalize(self.acc, score.offset_log2, sinks, value_scale)
        self.epilogue.store(self.acc, lse, piece, gqa_ratio)

    def heads(self, piece: Piece, gqa_ratio: Int32) -> list[Int32]:
        """Query heads of the thread's rows."""
        return [piece.head * gqa_ratio + (piece.first_row + row) % gqa_ratio for row in self.rows]

    def score(self, piece: Piece, gqa_ratio: Int32) -> Score:
        """Constants of the piece's score formula."""
        common, slopes = self.args.common, None
        if const_expr(self.config.alibi):
            slopes = tuple(common.alibi_slopes[piece.batch, head] for head in self.heads(piece, gqa_ratio))
        scale, descale = common.softmax_scale, common.descales.of_scores(piece.batch, piece.head)
        if const_expr(descale is not None):
            scale = scale * descale
        return Score.of(scale, common.softcap, slopes)

    @cute.jit
    def steps(
        self,
        piece: Piece,
        gqa_ratio: Int32,
        score: Score,
        factors: Optional[cute.Tensor],
        softmax: OnlineSoftmax,
        busy: Boolean,
        keys: RingState,
        turn: Int32,
        masked: cutlass.Constexpr[MaskedRange],
    ) -> RingState:
        """The warpgroup's blocks of one range of the tile's walk, as far as it is in the piece."""
        c, step = self.config, self.step
        start, stop = cutlass.max(masked.start, piece.start), cutlass.min(masked.stop, piece.stop)
        if const_expr(c.key_groups > 1):
            start += (self.index + turn + start - piece.start) & 1
        # through shuffles, see fa3_sm90.forward.consumer.Consumer.steps
        start, stop, stage, phase = (cute.arch.make_warp_uniform(number) for number in (start, stop, *keys))
        keys = RingState(stage, phase)
        for iteration in cutlass.range(start, stop, c.key_groups, unroll=1):
            step(piece, gqa_ratio, score, factors, softmax, busy, iteration, keys, masked.right_edge, masked.left_edge)
            for _ in cutlass.range_constexpr(c.key_groups):
                keys = ring_next(keys, c.stages)
        return keys

    @cute.jit
    def step(
        self,
        piece: Piece,
        gqa_ratio: Int32,
        score: Score,
        factors: Optional[list[Float32]],
        softmax: OnlineSoftmax,
        busy: Boolean,
        iteration: Int32,
        state: RingState,
        right_edge: cutlass.Constexpr[bool],
        left_edge: cutlass.Constexpr[bool],
    ):
        """One block of keys."""
        acc, probability = self.scores.accumulator(), self.probability
        take_descales = self.descales.load if const_expr(self.config.row_descales) else None
        self.keys.wait(state)
        warpgroup.fence()
        self.scores.start(acc, state.stage)
        warpgroup.wait_group(0)
        if const_expr(self.config.row_descales):
            if busy:
                take_descales(state.stage)
            cute.arch.sync_warp()  # all of its lanes have read them
        self.keys.release(state.stage)
        if busy:
            probability(piece, gqa_ratio, score, factors, softmax, acc, iteration, right_edge, left_edge)
        if const_expr(not self.config.values_with_keys or self.config.widens):
            self.values.wait(state)
        warpgroup.fence()
        self.sums.start(as_warpgroup_operand_a(self.probabilities), state.stage)
        warpgroup.wait_group(0)
        self.values.release(state.stage)

    @cute.jit
    def probability(
        self,
        piece: Piece,
        gqa_ratio: Int32,
        score: Score,
        factors: Optional[list[Float32]],
        softmax: OnlineSoftmax,
        acc: cute.Tensor,
        iteration: Int32,
        right_edge: cutlass.Constexpr[bool],
        left_edge: cutlass.Constexpr[bool],
    ):
        """S of a block becomes P; O follows the rows' references."""
        c, info, window = self.config, piece.info, self.args.common.window
        scores, diagonals = warpgroup_rows_and_columns(acc), None
        masked, distance = right_edge or left_edge, None
        first_key = piece.blocks.block(iteration, window) * c.tile_n + self.column
        if const_expr(masked or c.alibi or c.tree_mask):
            queries = [(piece.first_row + row) // gqa_ratio for row in self.rows]
            diagonals = [info.seqlen_k - info.seqlen_q + query - first_key for query in queries]
        if const_expr(factors is not None):
            for r in cutlass.range_constexpr(ROWS):
                scale_row(scores, r, factors[r])
        if const_expr(c.k_row_descale):
            scale_columns(scores, self.descales.k)
        if const_expr(c.alibi):
            distance = distances(diagonals, self.columns)
        apply_score(score, scores, distance, c.batch_invariant)
        if const_expr(masked):
            keys_left = info.seqlen_k - first_key
            mask_scores(scores, self.columns, diagonals, keys_left, window, first_key, right_edge, left_edge)
        if const_expr(c.tree_mask):
            drafts = [DraftWords.of(self.args.common.tree_mask, info, piece.batch, query) for query in queries]
            hide_drafts(scores, self.columns, info.seqlen_k - first_key - info.seqlen_q, drafts)
        if const_expr(c.v_row_descale):
            self.units.grow(scores, self.acc, self.descales.v, masked or c.tree_mask)
        softmax.update(scores, self.acc, True)
        if const_expr(c.v_row_descale):
            self.units.scale(scores, self.descales.v)
        narrow(acc, self.probabilities)
