"""The MMA warp: S = Q·Kᵀ from shared memory, O += P·V with P in tensor memory."""

import cutlass
import cutlass.cute as cute
from cutlass import Int32, const_expr

from cute_fa.device.ring import RingState, ring_next, ring_start
from cute_fa.device.tensor_memory import after_sync
from cute_fa.device.tensor_products import Product, column_operand, commit, row_operand
from cute_fa.semantics.types import DType
from fa4_sm100.forward.config import TILE_M
from fa4_sm100.forward.cta import Cta


class Products:
    """One warp, which issues all products of the CTA, or of a pair in its first.

    Two tiles take turns: while one's softmax runs, the tensor cores compute the other's P·V and its next scores. With
    one tile, the next block's scores are computed before P·V of this one, in another buffer.
    """

    def __init__(self, cta: Cta):
        c, storage = cta.config, cta.storage
        self.cta, self.config, self.rings, self.tensor = cta, c, cta.rings, cta.tensor
        dtype_p = DType.E4M3 if c.dtype.is_fp8 else c.dtype
        self.scores = Product.of(c.dtype, c.dtype_k, c.tile_n, False, c.ctas)
        self.output = Product.of(dtype_p, c.dtype_v, c.head_dim_v_padded, not c.key_major_v, c.ctas)
        row_bytes = c.head_dim_padded * c.dtype.bytes
        self.q = tuple(row_operand(q.toint(), TILE_M, row_bytes) for q in storage.q)
        self.k = row_operand(storage.k.toint(), c.tile_keys, row_bytes)
        if c.key_major_v:
            self.v = row_operand(storage.v.toint(), c.head_dim_v_padded, c.tile_n * c.dtype_v.bytes)
        else:
            self.v = column_operand(storage.v.toint(), c.tile_n, c.value_columns * c.dtype_v.bytes, c.dtype_v.bytes)
        steps = c.tile_n // c.mma_k
        self.early = range(steps * c.early_columns // c.tile_n)
        self.late = range(self.early.stop, steps)

    @cute.jit
    def run(self):
        """Walk over the CTA's tiles."""
        config, work, scheduler = self.config, self.cta.work, self.cta.scheduler()
        valid, tile, advance = scheduler.valid, scheduler.tile, scheduler.next
        multiply = self.two_tiles if const_expr(config.q_tiles == 2) else self.one_tile
        queries, keys, done = ring_start(), ring_start(), Int32(0)
        state = scheduler.first()
        while valid(state):
            total = work(tile(state)).blocks.total
            keys = multiply(total, queries, keys, done)
            done += total
            queries = ring_next(queries, 1)
            state = advance(state)
        for q_tile in cutlass.range_constexpr(config.q_tiles):  # before tensor memory is given back
            self.rings["o"].wait_free(RingState(Int32(q_tile), queries.phase))

    @cute.jit
    def two_tiles(self, total: Int32, queries: RingState, keys: RingState, done: Int32) -> RingState:
        """Both tiles through ``total`` key blocks, from these states of the rings on; returns the next one of K and V.
        ``done``: blocks before, of which each tile has had as many in its buffer of scores."""
        stages, arrived, release = self.config.stages, self.rings["kv"].wait, self.release
        start_scores, start_output, release_q = self.start_scores, self.start_output, self.release_q
        arrived(keys)
        for q_tile in cutlass.range_constexpr(2):
            self.rings[f"q{q_tile}"].wait(queries)
            start_scores(q_tile, Int32(q_tile), keys, done)
        release("kv", keys.stage)
        values = ring_next(keys, stages)
        for i in cutlass.range(1, total, unroll=1):
            keys = ring_next(values, stages)
            arrived(values)
            for q_tile in cutlass.range_constexpr(2):
                buffer = RingState(Int32(q_tile), (done + i - 1) & 1)
                start_output(q_tile, buffer, values, i, queries)
                if const_expr(q_tile == 0):
                    arrived(keys)
                else:
                    release("kv", values.stage)
                start_scores(q_tile, Int32(q_tile), keys, done + i)
            release("kv", keys.stage)
            values = ring_next(keys, stages)
        release_q()
        arrived(values)
        for q_tile in cutlass.range_constexpr(2):
            start_output(q_tile, RingState(Int32(q_tile), (done + total - 1) & 1), values, total, queries)
            if const_expr(q_tile == 1):
                release("kv", values.stage)
            commit(self.rings["o"].full + q_tile, self.config.ctas)
        return ring_next(values, stages)

    @cute.jit
    def one_tile(self, total: Int32, queries: RingState, keys: RingState, done: Int32) -> RingState:
        """The tile through ``total`` key blocks, as :meth:`two_tiles`. ``done``: blocks before, by turns in the two
        buffers of scores."""
        stages, arrived, release = self.config.stages, self.rings["kv"].wait, self.release
        start_scores, start_output, release_q = self.start_scores, self.start_output, self.release_q
        arrived(keys)
        self.rings["q0"].wait(queries)
        start_scores(0, done & 1, keys, done)
        release("kv", keys.stage)
        values = ring_next(keys, stages)
        for i in cutlass.range(1, total, unroll=1):
            keys = ring_next(values, stages)
            arrived(keys)
            start_scores(0, (done + i) & 1, keys, done + i)
            release("kv", keys.stage)
            arrived(values)
            before = done + i - 1
            start_output(0, RingState(before & 1, (before >> 1) & 1), values, i, queries)
            release("p", 0)
            release("kv", values.stage)
            values = ring_next(keys, stages)
        release_q()
        arrived(values)
        last = done + total - 1
        start_output(0, RingState(last & 1, (last >> 1) & 1), values, total, queries)
        release("p", 0)
        release("kv", values.stage)
        commit(self.rings["o"].full, self.config.ctas)
        return ring_next(values, stages)

    def start_scores(self, q_tile: int, buffer: Int32, keys: RingState, block: Int32):
        """Q·Kᵀ of a tile into a buffer of scores; ``block``: how many there were before."""
        c = self.config
        q, k = self.q[q_tile], self.k.at(keys.stage * c.stage_bytes)
        q = q._replace(first=q.first + _nothing(block))
        self.scores.multiply(self.tensor + buffer * c.score_columns, q, k, Int32(0))
        commit(self.rings["s"].full + buffer, c.ctas)

    def start_output(self, q_tile: int, buffer: RingState, values: RingState, iteration: Int32, queries: RingState):
        """P·V of a tile, of the block before an iteration, once P is there: first the part of it that is stored first.
        Before the first block of a tile, O of the tile before has been read."""
        c = self.config
        p = self.tensor + buffer.stage * c.score_columns + c.probability_column
        o = self.tensor + c.output_column + q_tile * c.head_dim_v_padded
        v = self.v.at(values.stage * c.stage_bytes)
        self.rings["o"].wait_free(RingState(Int32(q_tile), queries.phase))
        self.rings["s"].wait_released(buffer)
        after_sync()
        self.output.multiply_tensor(o, p, v, Int32(iteration > 1), self.early)
        self.rings["p"].wait(buffer)
        after_sync()
        self.output.multiply_tensor(o, p, v, Int32(1), self.late)

    def release(self, ring: str, stage: Int32 | int):
        """Once the products issued so far are done."""
        commit(self.rings[ring].empty + stage, self.config.ctas)

    def release_q(self):
        """As :meth:`release`; where O takes Q's place, the epilogue does it."""
        if self.config.own_output:
            for q_tile in range(self.config.q_tiles):
                self.release(f"q{q_tile}", 0)


def _nothing(block: Int32) -> Int32:
    """0, which ptxas does not know. Of operands that are the same in all iterations it keeps every step's address in
    registers over the loop, 8 to 16 for each: 18 spilled words at head_dim (192, 128), none if they seem to change."""
    return block >> 30
