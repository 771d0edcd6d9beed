"""A consumer warpgroup: 64 rows of queries through the key blocks, then out."""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr
from cutlass.cute.nvgpu import warpgroup

from cute_fa.device.fragments import as_warpgroup_operand_a, warpgroup_rows_and_columns
from cute_fa.device.registers import narrow, opaque
from cute_fa.device.scores import ScoreParams, mask_scores, modify_scores, score_params
from cute_fa.device.softmax import OnlineSoftmax
from fa3_sm90.arguments import Extents, ForwardArguments, TileWork, TmaTensors, scheduler_of, tile_work
from fa3_sm90.config import Fa3ForwardConfig
from fa3_sm90.epilogue import Epilogue
from fa3_sm90.pipeline import Ring, RingState, ring_next, ring_start
from fa3_sm90.products import Products
from fa3_sm90.rows import ROWS, Rows
from fa3_sm90.storage import Storage
from fa3_sm90.tiles import CUTE_DTYPE
from fa3_sm90.turns import Turns


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
        self.config, self.args, self.extents, self.index = config, args, extents, index
        # the rings of Q come first in memory, one for each warpgroup
        self.queries = Ring(config.pipelines[0], storage.barriers + 2 * index)
        self.keys, self.values = rings["k"], rings["v"]
        self.turns = Turns(config.warpgroups, index)
        self.products = Products(config, storage, index, thread)
        self.rows = Rows(config, warpgroup_rows_and_columns(self.products.own_coordinates))
        self.columns = warpgroup_rows_and_columns(self.products.static_coordinates)
        self.epilogue = Epilogue(config, args, tma, storage, self.products, self.rows, self.queries, index, thread)
        self.scores = warpgroup_rows_and_columns(self.products.acc_s)
        self.output = warpgroup_rows_and_columns(self.products.acc_o)
        self.probabilities = cute.make_rmem_tensor_like(self.products.acc_s, CUTE_DTYPE[config.dtype])
        self.operand_p = as_warpgroup_operand_a(self.probabilities)

    @cute.jit
    def run(self):
        """Walk over the CTA's tiles."""
        scheduler = scheduler_of(self.args, self.config)
        valid, advance, compute_tile = scheduler.valid, scheduler.next, self.compute_tile
        if const_expr(self.config.pingpong):
            self.turns.start()
        queries, keys = ring_start(), ring_start()
        state = scheduler.first()
        while valid(state):
            keys = compute_tile(scheduler, state, queries, keys)
            queries = ring_next(queries, 1)
            state = advance(state)
        self.epilogue.finish()

    @cute.jit
    def compute_tile(self, scheduler, state, queries: RingState, keys: RingState) -> RingState:
        """One tile, from these states of the rings on; returns the next one of K and V."""
        args, config = self.args, self.config
        work = tile_work(args, config, self.extents, scheduler.tile(state))
        params = self.params(work)
        softmax = OnlineSoftmax(ROWS, params.scale_log2)
        self.products.acc_o.fill(0.0)
        keys = self.walk(work, softmax, params, queries, keys)

        # Where the tile lies is read again instead of being kept in registers over the main loop.
        work = tile_work(args, config, self.extents, scheduler.tile(state))
        head = work.tile.head * config.pack_gqa
        lse = softmax.finalize(self.output, params.offset_log2, self.rows.per_head(args.learnable_sink, head))
        self.epilogue.store(self.products.acc_o, lse, work, queries)
        return keys

    @cute.jit
    def params(self, work: TileWork):
        """Constants of the tile's score formula."""
        slopes = None
        if const_expr(self.config.alibi):
            head = work.tile.head * self.config.pack_gqa
            slopes = self.rows.per_head(self.args.alibi_slopes[work.tile.batch, None], head)
        return score_params(self.args.softmax_scale, self.args.softcap, slopes)

    @cute.jit
    def walk(
        self, work: TileWork, softmax: OnlineSoftmax, params: ScoreParams, queries: RingState, keys: RingState
    ) -> RingState:
        """The key blocks of a tile, range by range, each with just the mask it needs. P·V runs one block behind."""
        c, blocks = self.config, work.blocks
        step = self.step
        self.queries.wait(queries)
        self.first_block(work, softmax, params, keys)
        if const_expr(c.window_right):
            for i in cutlass.range(1, blocks.right_end, unroll=1):
                keys = step(work, softmax, params, i, keys, True, c.window_left)
        # opaque: the bound would be computed from the lengths again in each iteration, by 17 instructions
        full_end = opaque(blocks.full_end)
        for i in cutlass.range(cutlass.max(blocks.right_end, 1), full_end, unroll=1):
            keys = step(work, softmax, params, i, keys, False, False)
        if const_expr(c.window_left):
            for i in cutlass.range(cutlass.max(blocks.full_end, 1), blocks.total, unroll=1):
                keys = step(work, softmax, params, i, keys, False, True)
        if const_expr(c.own_output):
            self.queries.release(queries)
        self.last_block(keys)
        return ring_next(keys, c.stages)

    @cute.jit
    def first_block(self, work: TileWork, softmax: OnlineSoftmax, params: ScoreParams, state: RingState):
        """Scores and probabilities of the first block, which may be of any range."""
        self.keys.wait(state)
        self.products.start_scores(state.stage)
        warpgroup.wait_group(0)
        self.keys.release(state)
        self.modify_and_mask(work, params, Int32(0), True, self.config.window_left)
        softmax.advance(self.scores, True)
        softmax.exponentiate(self.scores, True)
        self.keep_probabilities()

    @cute.jit
    def step(
        self,
        work: TileWork,
        softmax: OnlineSoftmax,
        params: ScoreParams,
        iteration: Int32,
        before: RingState,
        right_edge: cutlass.Constexpr[bool],
        left_edge: cutlass.Constexpr[bool],
    ) -> RingState:
        """Scores of the next block beside P·V of the one at ``before``."""
        keys, values, products = self.keys, self.values, self.products
        state = ring_next(before, self.config.stages)
        keys.wait(state)
        if const_expr(self.config.pingpong):
            self.turns.take()
        products.start_scores(state.stage)
        values.wait(before)
        products.start_output(self.operand_p, before.stage)
        if const_expr(self.config.pingpong):
            self.turns.pass_on()
        warpgroup.wait_group(1)
        keys.release(state)
        self.modify_and_mask(work, params, iteration, right_edge, left_edge)
        hidden = right_edge or left_edge
        factors = softmax.advance(self.scores, hidden)
        softmax.exponentiate(self.scores, hidden)
        warpgroup.wait_group(0)
        values.release(before)
        softmax.rescale(self.output, factors)
        self.keep_probabilities()
        return state

    @cute.jit
    def last_block(self, state: RingState):
        """P·V of the last block."""
        self.values.wait(state)
        self.products.start_output(self.operand_p, state.stage)
        warpgroup.wait_group(0)
        self.values.release(state)

    def keep_probabilities(self):
        """P in the input's dtype, as operand A of P·V."""
        narrow(self.products.acc_s, self.probabilities)

    @cute.jit
    def modify_and_mask(
        self,
        work: TileWork,
        params: ScoreParams,
        iteration: Int32,
        right_edge: cutlass.Constexpr[bool],
        left_edge: cutlass.Constexpr[bool],
    ):
        """Softcap, ALiBi and the mask of one block of keys, in place."""
        c, rows, info = self.config, self.rows, work.info
        masked = right_edge or left_edge
        if const_expr(masked or c.alibi):
            first_key = work.blocks.block(iteration, self.args.window) * c.tile_n + rows.column
            first_token = work.first_token + self.index * c.tokens
            diagonal = info.seqlen_k - info.seqlen_q + first_token - first_key
            diagonals = [diagonal + token for token in rows.tokens]
        if const_expr(c.alibi or c.softcap):
            positions = [Float32(d) for d in diagonals] if const_expr(c.alibi) else None
            modify_scores(self.scores, self.columns, positions, params)
        if const_expr(masked):
            keys_left = info.seqlen_k - first_key
            mask_scores(
                self.scores, self.columns, diagonals, keys_left, self.args.window, first_key, right_edge, left_edge
            )
