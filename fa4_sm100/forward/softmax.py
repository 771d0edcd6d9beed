"""A softmax warpgroup: scores of a tile from tensor memory, P back into it, a row a thread.

Online softmax as in FlashAttention-2 (arXiv 2307.08691, section 3.1), but without looking for a row's maximum in most
blocks. What is subtracted in the exponents, the row's reference, only has to keep P within its type's range: bf16 and
fp16 hold 2^15 as well as 1, to the same relative precision. So a block without a mask computes P with the reference
that it finds, and asks afterwards whether its sum, which is needed anyway, is below 2^15 in all of the warp's rows.
Only if not, it looks for the maxima, moves the references to them, rescales O and computes P anew. P starts from the
scores' arrival, and half an instruction per score is saved. The first block of a tile and masked ones look for their
maxima first; fp8, whose P has hardly any headroom, always does, and moves a reference when a maximum has outgrown it
(FlashAttention-4's conditional rescaling).
"""

from collections.abc import Callable
from typing import Optional

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Uint32, const_expr

from cute_fa.device import tensor_memory
from cute_fa.device.dtypes import CUTE_DTYPE
from cute_fa.device.exponentials import emulated_exp2, max_with_nan
from cute_fa.device.positions import distances_between, row_positions
from cute_fa.device.range_walk import hidden_columns
from cute_fa.device.registers import e4m3_word, narrow_pair, opaque, product_rounded_up, sum_rounded_up
from cute_fa.device.ring import RingState, ring_next, ring_start
from cute_fa.device.score import Distance, Score
from cute_fa.device.softmax import E4M3, WIDE, finite
from cute_fa.device.tile_work import TileWork, kv_head
from cute_fa.device.visibility import hidden_keys
from cute_fa.semantics.types import SmArch
from fa4_sm100.forward.config import SCORE_CHUNK, TILE_M
from fa4_sm100.forward.cta import Cta
from fa4_sm100.forward.descales import BlockDescales, Unit
from fa4_sm100.forward.row import Row

# Largest P, and sum of a part of a block's, that is taken as it comes.
HEADROOM_LOG2 = 15.0


class Softmax:
    """One warpgroup with its tile."""

    def __init__(self, cta: Cta, index: Int32, thread: Int32):
        """``index``: which of the CTA's tiles; ``thread``: which of the 128."""
        c = cta.config
        self.cta, self.config, self.common = cta, c, cta.common
        self.storage, self.rings, self.index, self.thread = cta.storage, cta.rings, index, thread
        self.tensor = tensor_memory.own_lanes(cta.tensor, cute.arch.make_warp_uniform(thread // 32))
        self.row = Row(c, thread)
        self.descales = BlockDescales(c, cta.common)
        self.chunks = c.tile_n // SCORE_CHUNK
        self.words_per_chunk = SCORE_CHUNK * (1 if c.dtype.is_fp8 else 2) // 4
        self.reduces = c.arch is SmArch.SM_103A  # its loads give the largest of what they load
        self.exponents = E4M3 if c.dtype.is_fp8 else WIDE
        self.reference = cute.make_rmem_tensor(1, Float32)
        self.total = cute.make_rmem_tensor(1, Float32)
        self.bias = cute.make_rmem_tensor(1, Float32)
        self.sums = cute.make_rmem_tensor(2, Float32)
        self.peak = cute.make_rmem_tensor(1, Float32)
        self.last = cute.make_rmem_tensor(SCORE_CHUNK, Float32)
        self.words = cute.make_rmem_tensor((self.chunks - 1) * self.words_per_chunk, Uint32)

    @cute.jit
    def run(self):
        """Walk over the CTA's tiles."""
        make_work, compute_tile, scheduler = self.cta.work, self.compute_tile, self.cta.scheduler()
        valid, tile, advance, hand_on = scheduler.valid, scheduler.tile, scheduler.next, self.hand_on
        stats, done = ring_start(), Int32(0)
        state = scheduler.first()
        while valid(state):
            work = make_work(tile(state))
            compute_tile(work, done)
            hand_on(stats)
            done += work.blocks.total
            stats = ring_next(stats, 1)
            state = advance(state)

    def hand_on(self, stats: RingState):
        """The rows' sums and references to the epilogue."""
        ring, place = self.rings["stats"], RingState(self.index, stats.phase)
        ring.wait_free(place)
        at = self.storage.stats + (self.index * (2 * TILE_M) + self.thread)
        slots = cute.make_tensor(at, cute.make_layout(2, stride=TILE_M))
        slots[0], slots[1] = self.total[0], self.reference[0]
        ring.signal(place.stage)

    @cute.jit
    def compute_tile(self, work: TileWork, done: Int32):
        """The key blocks of a tile, range by range, each with just the mask it needs. ``done``: blocks before."""
        c, blocks, step = self.config, work.blocks, self.step
        self.reference.fill(-Float32.inf)
        self.total.fill(0.0)
        score = self.formula(work)
        step(work, score, Int32(0), done, True, True, c.window_left)
        ranges = blocks.ranges(c.window_left)
        if const_expr(not (c.window_right or c.ranges)):
            ranges = ranges[1:]  # the sequence's end is in the first block
        for i in cutlass.range_constexpr(len(ranges)):
            start, stop, right_edge, left_edge = ranges[i]
            for iteration in cutlass.range(cutlass.max(start, 1), stop, unroll=1):
                step(work, score, iteration, done, False, right_edge, left_edge)

    @cute.jit
    def formula(self, work: TileWork):
        """Constants of the tile's score formula."""
        common, pack = self.common, self.config.pack_gqa
        slopes = None
        if const_expr(self.config.alibi):
            slopes = (self.row.per_head(common.alibi_slopes[work.tile.batch, None], work.tile.head * pack),)
        scale = common.softmax_scale
        descale = common.descales.of_scores(work.tile.batch, kv_head(common, pack, work.tile.head))
        if const_expr(descale is not None):
            scale = scale * descale
        return Score.of(scale, common.softcap, slopes)

    @cute.jit
    def step(
        self,
        work: TileWork,
        score: Score,
        iteration: Int32,
        done: Int32,
        first: cutlass.Constexpr[bool],
        right_edge: cutlass.Constexpr[bool],
        left_edge: cutlass.Constexpr[bool],
    ):
        """One block: waits for its scores, hands over P."""
        c, rings, reference, bias = self.config, self.rings, self.reference, self.bias
        advance, exponentiate = self.advance, self.exponentiate
        score, unit = self.descales.of_block(work, iteration, score)
        bits = None
        if const_expr(c.ranges and right_edge):  # on their way while the scores are computed
            bits = work.blocks.mask_row(iteration, self.index * TILE_M + self.thread, *c.walk_shape)
        buffer = self.buffer(done + iteration)
        rings["s"].wait(buffer)
        tensor_memory.after_sync()
        at = self.tensor + buffer.stage * c.score_columns
        modify = self.modifier(work, score, iteration, right_edge, left_edge, bits)
        masked = right_edge or left_edge
        if const_expr(first or masked or c.dtype.is_fp8):
            advance(score, unit, at, modify, done + iteration, not first)
            self.set_bias(finite(reference[0]), unit)
            exponentiate(score, at, None, not masked, False)
        else:
            self.set_bias(reference[0], unit)
            exponentiate(score, at, modify, True, True)
            outside = self.outside(score)
            while cute.arch.vote_any_sync(outside):  # runs once, see cute_fa.device.softmax.OnlineSoftmax.update
                advance(score, unit, at, modify, done + iteration, True)
                bias[0] = -finite(reference[0])
                exponentiate(score, at, None, False, False)
                outside = Boolean(False)
        self.hand_over(score, unit, at, buffer.stage, not masked)

    def buffer(self, block: Int32) -> RingState:
        """Where the scores of the CTA's ``block`` are."""
        if self.config.q_tiles == 2:
            return RingState(self.index, block & 1)
        return RingState(block & 1, (block >> 1) & 1)

    def set_bias(self, reference: Float32, unit: Optional[Unit]):
        """What exponents add to scores in log2 units: +inf where a row has no reference yet, so that its sum tells."""
        self.bias[0] = -reference if unit is None else unit.log2 - reference

    def modifier(
        self,
        work: TileWork,
        score: Score,
        iteration: Int32,
        right_edge: bool,
        left_edge: bool,
        bits: Optional[cute.Tensor],
    ) -> Optional[Callable]:
        """What turns raw scores, of columns from one on, into those of the formula: softcap, ALiBi and the mask, under
        a range plan the row's ``bits``. None where they are the same."""
        c, info = self.config, work.info
        masked = right_edge or left_edge
        if not (masked or c.alibi or c.softcap):
            return None
        window, distances, hidden = self.common.window, None, None
        if masked or c.alibi:
            first_key = work.blocks.block(iteration, window) * c.tile_n
            token = self.cta.first_token(work, self.index) + self.row.token
            diagonal = token - first_key if c.ranges else info.seqlen_k - info.seqlen_q + token - first_key
        if c.q_positions:
            distances = self.distances_between(token, first_key)
        elif c.alibi:
            distances = self.distances(Float32(diagonal))
        if bits is not None:
            hidden = hidden_columns(bits, Int32(0))
        elif masked:
            hidden = hidden_keys(window, diagonal, first_key, info.seqlen_k - first_key, left_edge, right_edge)

        def modify(values: list[Float32], first: int) -> list[Float32]:
            distance = None if distances is None else distances(range(first, first + len(values)))
            values = [score.apply(value, 0, i, distance) for i, value in enumerate(values)]
            if hidden is None:
                return values
            lowest = Float32(-Float32.inf)
            return [cutlass.select_(hidden(first + i), lowest, value) for i, value in enumerate(values)]

        return modify

    def distances(self, diagonal: Float32) -> Callable[[range], Distance]:
        """ALiBi's distances along columns, of a row at ``diagonal`` from the first of a block."""
        ranges = self.config.ranges

        def along(columns: range) -> Distance:
            # opaque, so that they are not kept from the first look at the scores to the second: 150 spilled accesses
            position = opaque(diagonal) if ranges else diagonal
            return lambda r, c: cute.math.absf(position - Float32(columns[c]))

        return along

    def distances_between(self, token: Int32, first_key: Int32) -> Callable[[range], Distance]:
        """The same between positions that the caller gives."""
        own, keys = row_positions(self.common.q_positions, token, [0]), self.common.k_positions
        return lambda columns: distances_between(own, keys, first_key, list(columns))

    @cute.jit
    def advance(
        self,
        score: Score,
        unit: Optional[Unit],
        at: Int32,
        modify: cutlass.Constexpr,
        block: Int32,
        rescale: cutlass.Constexpr[bool],
    ):
        """Move the rows' references on where their maxima have outgrown them; leaves the modified scores where the raw
        ones were. ``rescale``: O holds something already."""
        exponents, reference, total = self.exponents, self.reference, self.total
        # rounded up, so that no exponent is above the one meant, be the score so large that 8 is no digit of it
        top = product_rounded_up(self.maximum(at, modify), score.scale_log2)
        if const_expr(unit is not None):
            top = top + unit.log2
        outgrown = self.counts(~(top <= reference[0] + exponents.limit))
        rescale_output = self.rescale_output
        while cute.arch.vote_any_sync(outgrown):
            lowered = sum_rounded_up(top, Float32(-exponents.top))
            moved = max_with_nan(reference[0], lowered, lowered)
            factor = cute.math.exp2(reference[0] - finite(moved), fastmath=True)
            reference[0] = moved
            total[0] = total[0] * factor
            if const_expr(rescale):
                rescale_output(factor, block)
            outgrown = Boolean(False)

    def maximum(self, at: Int32, modify: Optional[Callable]) -> Float32:
        """Of the row's scores, which are left modified."""
        if modify is None and self.reduces:
            parts = [tensor_memory.load_with_maximum(at + i * SCORE_CHUNK, SCORE_CHUNK)[1] for i in range(self.chunks)]
            tensor_memory.wait_loads()
            return _largest(parts)
        parts = [Float32(-Float32.inf)] * 4
        values = tensor_memory.load(at, SCORE_CHUNK)
        for chunk in range(self.chunks):
            tensor_memory.wait_loads()
            following = None
            if chunk + 1 < self.chunks:
                following = tensor_memory.load(at + (chunk + 1) * SCORE_CHUNK, SCORE_CHUNK)
            if modify is not None:
                values = modify(values, chunk * SCORE_CHUNK)
                tensor_memory.store(at + chunk * SCORE_CHUNK, values)
            for i in range(SCORE_CHUNK // 2):
                parts[i % 4] = max_with_nan(parts[i % 4], values[2 * i], values[2 * i + 1])
            values = following
        if modify is not None:
            tensor_memory.wait_stores()
        return _largest(parts)

    def rescale_output(self, factor: Float32, block: Int32):
        """O times a row's factor. It is complete up to the block before: the scores of ``block`` were computed after
        it, or, with two buffers of scores by turns, there is a barrier for it."""
        c = self.config
        if c.q_tiles == 1:
            self.rings["p"].wait_released(RingState(Int32(0), (block - 1) & 1))
            tensor_memory.after_sync()
        output = self.tensor + c.output_column + self.index * c.head_dim_v_padded
        step = 32 if c.head_dim_v_padded % 32 == 0 else 16
        for column in range(0, c.head_dim_v_padded, step):
            values = tensor_memory.load(output + column, step)
            tensor_memory.wait_loads()
            tensor_memory.store(output + column, [value * factor for value in values])

    def counts(self, condition: Boolean) -> Boolean:
        """A condition of the thread's row; rows that are no queries hold anything, and have none."""
        whole = TILE_M % self.config.pack_gqa == 0
        return condition if whole else condition & self.row.exists()

    def exponentiate(self, score: Score, at: Int32, modify: Optional[Callable], emulate: bool, watch: bool):
        """P of all chunks of scores but the last, into registers, and their sum; the last chunk's scores. ``modify``:
        raw scores first; ``watch``: also the largest of the scores that no sum tells of, for :meth:`outside`."""
        self.sums.fill(0.0)
        peaks, reduces = [Float32(-Float32.inf)] * 2, self.reduces and modify is None
        values = self.scores(at)
        for chunk in range(self.chunks):
            tensor_memory.wait_loads()
            following = None
            if chunk + 1 < self.chunks:
                place = at + (chunk + 1) * SCORE_CHUNK
                if watch and reduces and chunk + 2 == self.chunks:
                    following, last_peak = tensor_memory.load_with_maximum(place, SCORE_CHUNK)
                else:
                    following = self.scores(place)
            if modify is not None:
                values = modify(values, chunk * SCORE_CHUNK)
            if watch and following is None and reduces:
                peaks.append(last_peak)
            elif watch:
                unseen = range(SCORE_CHUNK // 2) if following is None else self.emulated_pairs(emulate)
                for i in unseen:
                    peaks[i % 2] = max_with_nan(peaks[i % 2], values[2 * i], values[2 * i + 1])
            if following is None:
                for i in range(SCORE_CHUNK):
                    self.last[i] = values[i]
            else:
                for i, word in enumerate(self.probabilities(score, values, emulate)):
                    self.words[chunk * self.words_per_chunk + i] = word
                values = following
        if watch:
            self.peak[0] = _largest(peaks)

    def scores(self, at: Int32) -> tuple[Float32, ...]:
        """A chunk of the row's scores, there after ``tensor_memory.wait_loads``. Each load takes a block of registers:
        beside P of 16 bits, with softcap or ALiBi, 13 to 30 words of the loop spilled with one instead of two."""
        if self.config.dtype.is_fp8:
            return tensor_memory.load(at, SCORE_CHUNK)
        half = SCORE_CHUNK // 2
        return (*tensor_memory.load(at, half), *tensor_memory.load(at + half, half))

    def emulated_pairs(self, emulate: bool) -> list[int]:
        """Pairs of a chunk's scores whose exponentials are computed on the FMA pipe, evenly spread."""
        pairs, wanted = SCORE_CHUNK // 2, self.config.emulated // 2 if emulate else 0
        return [i for i in range(pairs) if (i + 1) * wanted // pairs > i * wanted // pairs]

    def probabilities(self, score: Score, values, emulate: bool) -> list[Uint32]:
        """P of a chunk of scores, in words; adds it to the sums."""
        scale, bias, sums = score.scale_log2, self.bias[0], (self.sums[0], self.sums[1])
        emulated, numbers = self.emulated_pairs(emulate), []
        for i in range(SCORE_CHUNK // 2):
            pair = cute.arch.fma_packed_f32x2((values[2 * i], values[2 * i + 1]), (scale, scale), (bias, bias))
            if i in emulated:
                pair = emulated_exp2(pair)
            else:
                pair = tuple(cute.math.exp2(x, fastmath=True) for x in pair)
            sums = cute.arch.add_packed_f32x2(sums, pair)
            numbers += pair
        self.sums[0], self.sums[1] = sums
        if self.config.dtype.is_fp8:
            return [e4m3_word(numbers[i : i + 4]) for i in range(0, SCORE_CHUNK, 4)]
        dtype = CUTE_DTYPE[self.config.dtype]
        return [narrow_pair(numbers[i], numbers[i + 1], dtype) for i in range(0, SCORE_CHUNK, 2)]

    def outside(self, score: Score) -> Boolean:
        """Whether P was computed with a reference that is too low for it, or with none."""
        peak = self.peak[0] * score.scale_log2 + self.bias[0]
        within = (self.sums[0] + self.sums[1] <= 2.0**HEADROOM_LOG2) & (peak <= HEADROOM_LOG2)
        return self.counts(~within)

    def hand_over(self, score: Score, unit: Optional[Unit], at: Int32, buffer: Int32, emulate: bool):
        """P to tensor memory and on to the products, the last chunk of it apart."""
        c, size, rings = self.config, self.words_per_chunk, self.rings
        target = at + c.probability_column
        for chunk in range(self.chunks - 1):
            words = [self.words[chunk * size + i] for i in range(size)]
            tensor_memory.store(target + chunk * size, words)
        tensor_memory.wait_stores()
        tensor_memory.before_sync()
        cute.arch.sync_warp()
        rings["s"].release(buffer)
        last = self.probabilities(score, [self.last[i] for i in range(SCORE_CHUNK)], emulate)
        tensor_memory.store(target + (self.chunks - 1) * size, last)
        tensor_memory.wait_stores()
        tensor_memory.before_sync()
        rings["p"].signal(buffer)
        total = self.sums[0] + self.sums[1]
        self.total[0] = self.total[0] + (total if unit is None else total * unit.inverse)


def _largest(values: list[Float32]) -> Float32:
    """NaN if one is."""
    top = values[0]
    for i in range(1, len(values), 2):
        top = max_with_nan(top, values[i], values[min(i + 1, len(values) - 1)])
    return top
