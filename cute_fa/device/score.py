"""The score's stage, between Q·Kᵀ and the softmax: scale, softcap and ALiBi, on the registers of one thread.

Forward, and backward (FlashAttention-2, arXiv 2307.08691) in registers that are rows of queries and columns of keys or
the other way round, with x what :meth:`Score.apply` gives:

    P = exp2(scale_log2 · x − LSE),   dS = P · (dP − D),   through the softcap dX = dS · derivative
"""

import math
from collections.abc import Callable
from typing import NamedTuple, Optional

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32

from cute_fa.device.registers import placed_fma, rounded_product

# |i + D − j| of a register (r, c)
Distance = Callable[[int, int], Float32]
LOG2_E = math.log2(math.e)


class Score(NamedTuple):
    """Run-time constants of the score formula. A score in log2 units is ``scale_log2``·x + ``offset_log2``, x being
    what :meth:`apply` leaves, so that the exponential's fma does the scaling; the offset, None for 0, matters to the
    LSE alone. ``softcap_exponent``: factor from Q·Kᵀ to 2·log2(e)·score/c, or None. ``slopes``: ALiBi slope of each
    row's head in the units of x, or None."""

    softmax_scale: Float32
    scale_log2: Float32
    offset_log2: Optional[Float32]
    softcap_exponent: Optional[Float32]
    slopes: Optional[tuple[Float32, ...]]

    @classmethod
    def of(
        cls, softmax_scale: Float32, softcap: Optional[Float32], slopes: Optional[tuple[Float32, ...]] = None
    ) -> "Score":
        """For softmax_scale, the cap c and the ALiBi slopes of a thread's rows."""
        scale_log2, offset_log2, exponent = softmax_scale * LOG2_E, None, None
        if softcap is not None:
            exponent = 2.0 * LOG2_E * softmax_scale / softcap
            scale_log2, offset_log2 = 2.0 * LOG2_E * softcap, rounded_product(Float32(LOG2_E), softcap)
        score = cls(softmax_scale, scale_log2, offset_log2, exponent, None)
        return score if slopes is None else score.with_slopes(slopes)

    def with_slopes(self, slopes: tuple[Float32, ...]) -> "Score":
        """The same with these ALiBi slopes."""
        return self._replace(slopes=tuple(slope * LOG2_E / self.scale_log2 for slope in slopes))

    def scaled(self, factor: Float32) -> "Score":
        """For a Q·Kᵀ that lacks this factor."""
        if self.softcap_exponent is not None:
            return self._replace(softcap_exponent=self.softcap_exponent * factor)
        slopes = self.slopes
        if slopes is not None:
            per_unit = cute.arch.rcp_approx(factor)
            slopes = tuple(slope * per_unit for slope in slopes)
        return self._replace(scale_log2=self.scale_log2 * factor, slopes=slopes)

    def apply(self, x: Float32, r: int, c: int, distance: Optional[Distance], placed: bool = False) -> Float32:
        """Softcap and ALiBi of the Q·Kᵀ in register (r, c); ``distance`` is needed for ALiBi. ``placed``: with an fma
        in every kernel alike, which else is the compiler's choice."""
        capped = self.cap(x)
        if placed and self.slopes is not None:
            return placed_fma(-self.slopes[r], distance(r, c), capped)
        return self.bias(capped, r, c, distance)

    def cap(self, x: Float32) -> Float32:
        """c·tanh(s/c) = c + 2c·x with x = −1/(1 + e^(2s/c)), which is what stays in the registers. Not tanh.approx: it
        is off by 2^-11, 0.02 at a cap of 50, and would show in the LSE."""
        if self.softcap_exponent is None:
            return x
        return cute.arch.rcp_approx(-1.0 - cute.math.exp2(x * self.softcap_exponent, fastmath=True))

    def bias(self, x: Float32, r: int, c: int, distance: Optional[Distance]) -> Float32:
        """ALiBi of a capped score."""
        return x if self.slopes is None else x - self.slopes[r] * distance(r, c)

    def derivative(self, capped: Float32) -> Float32:
        """Of the cap, at what :meth:`cap` gave, but for what :attr:`gradient_scale` holds: since tanh = 1 + 2x,
        1 − tanh² = −4 · (x + x²)."""
        return capped * capped + capped

    @property
    def gradient_scale(self) -> Float32:
        """What sums of dX·K and dX·Q still lack."""
        return self.softmax_scale if self.softcap_exponent is None else self.softmax_scale * -4.0


def distances(diagonals: list[Int32], columns: cute.Tensor) -> Distance:
    """Along a block of keys: ``diagonals`` are i + D − j0 of each row, j0 the first key of the block plus the thread's
    own column offset, so that i + D − j = diagonal − column; ``columns``: static column of each register of thread
    0."""
    positions = [Float32(diagonal) for diagonal in diagonals]

    def distance(r: int, c: int) -> Float32:
        return cute.math.absf(positions[r] - Float32(columns[0, c][1]))

    return distance


def apply_score(score: Score, scores: cute.Tensor, distance: Optional[Distance], placed: bool = False):
    """Softcap and ALiBi, for which ``distance`` is needed, in place, on the (rows, columns) view of an accumulator; see
    :meth:`Score.apply`."""
    if score.softcap_exponent is None and score.slopes is None:
        return
    for r in range(cute.size(scores, mode=[0])):
        for c in range(cute.size(scores, mode=[1])):
            scores[r, c] = score.apply(scores[r, c], r, c, distance, placed)


def probabilities(
    score: Score,
    scores: cute.Tensor,
    lse_log2: Callable[[int, int], Float32],
    distance: Optional[Distance],
    hidden: Optional[Callable[[int, int], Boolean]],
) -> Optional[cute.Tensor]:
    """Q·Kᵀ becomes P, in place, on a (rows, columns) view. What comes back is the cap's derivative, None without a cap.

    ``lse_log2(r, c)``: LSE of a register's query in log2 units, less the score's offset, +inf for P = 0;
    ``distance(r, c)`` = |i + D − j|, needed for ALiBi; ``hidden(r, c)``: whether the score is masked; None
    where absent.
    """
    derivatives = None if score.softcap_exponent is None else cute.make_rmem_tensor_like(scores)
    for r in range(cute.size(scores, mode=[0])):
        for c in range(cute.size(scores, mode=[1])):
            capped = score.cap(scores[r, c])
            if derivatives is not None:
                derivatives[r, c] = score.derivative(capped)
            exponent = score.bias(capped, r, c, distance) * score.scale_log2 - lse_log2(r, c)
            if hidden is not None:
                exponent = cutlass.select_(hidden(r, c), Float32(-Float32.inf), exponent)
            scores[r, c] = cute.math.exp2(exponent, fastmath=True)
    return derivatives


def score_gradients(
    p: cute.Tensor,
    dp: cute.Tensor,
    delta: Callable[[int, int], Float32],
    derivatives: Optional[cute.Tensor],
    distance: Optional[Distance],
    dslope: Optional[cute.Tensor],
):
    """dO·Vᵀ becomes dX, in place, on (rows, columns) views.

    ``delta(r, c)``: D = rowsum(dO∘O) − dLSE of a register's query; ``derivatives`` from :func:`probabilities`;
    ``dslope``: one register, to which −Σ dS·|i + D − j| is added, or None.
    """
    for r in range(cute.size(p, mode=[0])):
        for c in range(cute.size(p, mode=[1])):
            gradient = p[r, c] * (dp[r, c] - delta(r, c))
            if dslope is not None:
                dslope[0] = dslope[0] - gradient * distance(r, c)
            if derivatives is not None:
                gradient = gradient * derivatives[r, c]
            dp[r, c] = gradient
