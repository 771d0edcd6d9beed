"""Online softmax on the accumulators of mma.sync and wgmma (FlashAttention-2, arXiv 2307.08691, section 3.1).

Two departures, both exact: the running reference of a row follows its maximum only when that has grown by more than
2^8 (FlashAttention-4's conditional rescaling), so that O is almost never rescaled after the first blocks; and row sums
stay per thread until the end.
"""

import copy
from typing import NamedTuple, Optional

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, const_expr

from cute_fa.device.registers import placed_fma, rounded_product, sum_rounded_up
from cute_fa.device.score import LOG2_E


class ExponentRange(NamedTuple):
    """Exponents of P in log2. ``top``: of a row's maximum when the reference is moved; ``limit``: at which it is."""

    top: float
    limit: float


# Columns of O around whose rescaling a loop costs less than a branch. With 256 ptxas copies O there: 113 spills and
# 1355 instructions a block for FA2's forward on sm_120a, with a branch none and 1007.
MOST_IN_A_LOOP = 192

# Harmless in bf16, whose relative error does not depend on the magnitude, and in fp16 beside inputs of that type.
WIDE = ExponentRange(0.0, 8.0)
# fp16 ends at 2^16 and loses bits below 2^-14: for values that come from bf16, whose small probabilities keep theirs.
HALF = ExponentRange(6.0, 14.0)
# e4m3 ends at 448 = 2^8.8 and loses bits below 2^-6: P starts high up, and moves on before it saturates.
E4M3 = ExponentRange(8.0, 8.75)


class OnlineSoftmax:
    """State of the rows that one thread holds. ``reference``: what is subtracted in the exponent, in log2 units,
    −inf before the first visible key; ``total``: this thread's part of the sum of exponentials; ``factors``: what the
    accumulator has still to be multiplied by."""

    def __init__(
        self,
        num_rows: int,
        scale_log2: Float32,
        exponents: ExponentRange = WIDE,
        max_chains: int = 1,
        row_wise: bool = False,
        branches: bool = False,
    ):
        """``scale_log2``: factor from scores to log2 units; ``exponents``: of P; ``max_chains``: of comparisons, in
        which :meth:`advance` looks for a row's largest score; ``row_wise``: a row's bits are to depend on nothing but
        its own scores, while by default the references of all rows of a warp move if one of them has to, and ptxas
        says what is rounded twice; ``branches``: :meth:`update` rescales behind a branch, not in a loop that runs
        once."""
        self.num_rows, self.exponents, self.max_chains, self.row_wise = num_rows, exponents, max_chains, row_wise
        self.branches = branches
        self.scale_log2 = scale_log2
        self.reference = cute.make_rmem_tensor(num_rows, Float32)
        self.total = cute.make_rmem_tensor(num_rows, Float32)
        self.reference.fill(-Float32.inf)
        self.total.fill(0.0)
        self.factors = cute.make_rmem_tensor(num_rows, Float32)
        self.factors.fill(1.0)

    def scaled(self, scale_log2: Float32) -> "OnlineSoftmax":
        """The same state, for scores with another factor to log2 units."""
        scaled = copy.copy(self)
        scaled.scale_log2 = scale_log2
        return scaled

    @cute.jit
    def update(self, scores: cute.Tensor, acc: cute.Tensor, may_be_hidden: cutlass.Constexpr[bool]):
        """Turn the scores of one block into exponentials, in place, and rescale ``acc`` and the sums where needed.

        ``scores`` and ``acc`` are (rows, columns) views. ``may_be_hidden``: a row can have no visible key so far.
        """
        maximum, follow = row_maxima(scores), self.follow
        scale, running, exponents, row_wise = self.scale_log2, self.reference, self.exponents, self.row_wise
        if const_expr(self.branches):
            if cute.arch.vote_any_sync(outgrown(maximum, scale, running, exponents, row_wise)):
                follow(maximum, acc)
        else:
            # A loop that runs once, not an "if": ptxas turns the branch into 130 predicated instructions, which cost
            # as much as executing them (11.7 against 8.5 instructions per score at head_dim 128).
            while cute.arch.vote_any_sync(outgrown(maximum, scale, running, exponents, row_wise)):
                follow(maximum, acc)
        self.exponentiate(scores, may_be_hidden)

    @cute.jit
    def follow(self, maximum: cute.Tensor, acc: cute.Tensor):
        """References, sums and ``acc`` follow the rows' largest scores, of which ``maximum`` has one thread's."""
        scale, running, total, exponents = self.scale_log2, self.reference, self.total, self.exponents
        row_wise = self.row_wise
        for r in cutlass.range_constexpr(self.num_rows):
            of_row = quad_max(maximum[r])
            reference = cute.arch.fmax(running[r], reference_of(of_row, scale, exponents))
            if const_expr(row_wise):
                moves = _beyond(of_row, scale, running[r], exponents, row_wise)
                reference = cutlass.select_(moves, reference, running[r])
            factor = cute.math.exp2(running[r] - finite(reference), fastmath=True)
            running[r] = reference
            total[r] = rounded_product(total[r], factor) if const_expr(row_wise) else total[r] * factor
            scale_row(acc, r, factor)
        if const_expr(not exponents.top):
            maximum.fill(-Float32.inf)  # once, see _beyond()

    @cute.jit
    def advance(self, scores: cute.Tensor):
        """First part of an update whose accumulator is still being written: the references of the rows that have
        outgrown theirs, and the sums, move on. :meth:`exponentiate` is the second part, and :meth:`rescale` the third,
        once the accumulator is there."""
        scale, running, total, factors = self.scale_log2, self.reference, self.total, self.factors
        exponents = self.exponents
        maximum = row_maxima(scores, self.max_chains)
        while cute.arch.vote_any_sync(outgrown(maximum, scale, running, exponents)):  # runs once, see update()
            for r in cutlass.range_constexpr(self.num_rows):
                reference = cute.arch.fmax(running[r], reference_of(quad_max(maximum[r]), scale, exponents))
                factors[r] = cute.math.exp2(running[r] - finite(reference), fastmath=True)
                running[r] = reference
                total[r] = total[r] * factors[r]
            if const_expr(not exponents.top):
                maximum.fill(-Float32.inf)  # once, see _beyond()

    def take_factors(self, factors: cute.Tensor):
        """The rows' factors since the last time, for an accumulator that is multiplied by them in any case."""
        factors.store(self.factors.load())
        self.factors.fill(1.0)

    @cute.jit
    def rescale(self, acc: cute.Tensor):
        """``acc`` (rows, columns) times what the references have moved on by, if that is not 1 for all of the warp."""
        factors = self.factors
        while cute.arch.vote_any_sync(any_below_one(factors)):  # a loop that runs once, see update()
            for r in cutlass.range_constexpr(self.num_rows):
                scale_row(acc, r, factors[r])
                factors[r] = Float32(1.0)

    @cute.jit
    def exponentiate(self, scores: cute.Tensor, may_be_hidden: cutlass.Constexpr[bool]):
        """Scores to exponentials, in place, relative to the rows' references; adds them to the sums."""
        scale, running, total = self.scale_log2, self.reference, self.total
        for r in cutlass.range_constexpr(self.num_rows):
            reference = running[r]
            if const_expr(may_be_hidden):
                reference = finite(reference)
            row = scores[r, None]
            if const_expr(self.row_wise):
                for c in cutlass.range_constexpr(cute.size(row)):
                    row[c] = placed_fma(row[c], scale, -reference)
                exponentials = cute.math.exp2(row.load(), fastmath=True)
            else:
                exponentials = cute.math.exp2(row.load() * scale - reference, fastmath=True)
            row.store(exponentials)
            total[r] = exponentials.reduce(cute.ReductionOp.ADD, total[r], 0)

    @cute.jit
    def finalize(
        self,
        acc: cute.Tensor,
        offset_log2: Optional[Float32],
        sink_logits: Optional[tuple[Float32, ...]],
        value_scale: Optional[Float32] = None,
    ) -> cute.Tensor:
        """Normalise ``acc`` in place and return the rows' natural-log LSE; a row without keys gives 0 and −inf.

        ``offset_log2``: what all scores lack, in log2 units, or None; ``sink_logits``: an extra logit for each row,
        without a value row, or None; ``value_scale``: factor of all values, or None.
        """
        offset = offset_log2 if const_expr(offset_log2 is not None) else Float32(0.0)
        lse = cute.make_rmem_tensor(self.num_rows, Float32)
        for r in cutlass.range_constexpr(self.num_rows):
            sink = sink_logits[r] if const_expr(sink_logits is not None) else None
            factor, lse[r] = normalisation(quad_sum(self.total[r]), self.reference[r], offset, sink, value_scale)
            scale_row(acc, r, factor)
        return lse


@cute.jit
def normalisation(
    total: Float32,
    reference: Float32,
    offset: Float32,
    sink_logit: Optional[Float32],
    value_scale: Optional[Float32],
) -> tuple[Float32, Float32]:
    """What a row of P·V is to be multiplied by, and its natural-log LSE, from the sum of its exponentials and what was
    subtracted in them; see :meth:`OnlineSoftmax.finalize`."""
    relative = reference
    factor = Float32(1.0)
    if const_expr(sink_logit is not None):
        sink_log2 = sink_logit * LOG2_E - offset
        reference = cute.arch.fmax(reference, sink_log2)
        factor = cute.math.exp2(relative - finite(reference), fastmath=True)
        total = total * factor + cute.math.exp2(sink_log2 - finite(reference), fastmath=True)
    empty = total == 0.0  # not "visible = total > 0", so that NaN in the input stays NaN
    factor = Float32(0.0) if empty else factor / total
    lse = -Float32.inf if empty else (reference + offset + cute.math.log2(total, fastmath=True)) / LOG2_E
    if const_expr(value_scale is not None):
        factor = factor * value_scale
    return factor, lse


def scale_row(acc: cute.Tensor, r: int, factor: Float32):
    """acc[r] *= factor."""
    row = acc[r, None]
    row.store(row.load() * factor)


def row_maxima(scores: cute.Tensor, chains: int = 1) -> cute.Tensor:
    """Largest of one thread's scores of each row; what the other threads of the row hold is not looked at. ``chains``
    of comparisons that do not wait for each other are joined at the end."""
    maxima = cute.make_rmem_tensor(cute.size(scores, mode=[0]), Float32)
    for r in range(cute.size(scores, mode=[0])):
        partial = [scores[r, chain] for chain in range(chains)]
        for c in range(chains, cute.size(scores, mode=[1])):
            partial[c % chains] = cute.arch.fmax(partial[c % chains], scores[r, c])
        maximum = partial[0]
        for other in partial[1:]:
            maximum = cute.arch.fmax(maximum, other)
        maxima[r] = maximum
    return maxima


def reference_of(maximum: Float32, scale: Float32, exponents: ExponentRange) -> Float32:
    """The reference by which a row's maximum, a raw score, gets the exponent ``exponents.top``."""
    if not exponents.top:
        return maximum * scale
    # an fma would round the score to another number than its exponent has, from 2^27 on, where 8 is no digit of it
    return rounded_product(maximum, scale) - exponents.top


def outgrown(
    maximum: cute.Tensor, scale: Float32, running: cute.Tensor, exponents: ExponentRange, row_wise: bool = False
) -> Boolean:
    """Whether one of this thread's scores lies so far beyond its row's reference that the row must be rescaled;
    ``maximum`` are raw scores, ``scale`` takes them to log2 units.

    Asked of every thread, this bounds all exponentials, so that the maximum over the threads of a row is needed only
    where the answer is yes: 4 shuffles and 4 maxima less on the way from the scores to their exponentials.
    """
    grown = _beyond(maximum[0], scale, running[0], exponents, row_wise)
    for r in range(1, cute.size(maximum)):
        grown = grown | _beyond(maximum[r], scale, running[r], exponents, row_wise)
    return grown


def _beyond(
    maximum: Float32, scale: Float32, running: Float32, exponents: ExponentRange, row_wise: bool = False
) -> Boolean:
    """Whether a row's maximum has outgrown its reference.

    The difference is an fma in ptxas's hands: beside the reference, which is rounded, it is off by half a digit of the
    score. From 2^24 on that is more than the 0.75 between top and limit of e4m3, whose sum, rounded up, is never below
    the maximum that the reference is of; from 2^28 on it is more than 8. Without a top, who has moved a reference must
    forget the maximum, or may move it for ever.
    """
    if exponents.top:
        return maximum * scale > sum_rounded_up(running, Float32(exponents.limit))
    if row_wise:
        return placed_fma(maximum, scale, -running) > exponents.limit
    return maximum * scale - running > exponents.limit


def any_below_one(factors: cute.Tensor) -> Boolean:
    """Whether a row's factor is not 1."""
    below = factors[0] < 1.0
    for r in range(1, cute.size(factors)):
        below = below | (factors[r] < 1.0)
    return below


def quad_max(value: Float32) -> Float32:
    """Maximum over the four threads that hold one row."""
    for offset in (1, 2):
        value = cute.arch.fmax(value, cute.arch.shuffle_sync_bfly(value, offset=offset))
    return value


def quad_sum(value: Float32) -> Float32:
    """Sum over the four threads that hold one row."""
    for offset in (1, 2):
        value = value + cute.arch.shuffle_sync_bfly(value, offset=offset)
    return value


@cute.jit
def finite(reference: Float32) -> Float32:
    """0 in place of −inf: a row that has seen no key gets exponentials of −inf, not of −inf + inf."""
    return Float32(0.0) if reference == -Float32.inf else reference
