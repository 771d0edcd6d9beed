"""From Q·Kᵀ and dO·Vᵀ to P and dS on the registers of one thread (FlashAttention-2, arXiv 2307.08691, algorithm 2).

With x what :func:`~cute_fa.device.scores.modify_scores` would leave, in registers that are rows of queries and columns
of keys or the other way round:

    P = exp2(scale_log2 · x − LSE),   dS = P · (dP − D),   through the softcap dX = dS · (1 − tanh²)

Since tanh = 1 + 2x, 1 − tanh² = −4 · (x + x²); the factor −4 is left to who scales dQ and dK.
"""

from collections.abc import Callable
from typing import NamedTuple, Optional

import cutlass
import cutlass.cute as cute
from cutlass import Float32

from cute_fa.device.scores import ScoreParams

# What the scale of dQ and dK is multiplied by under a softcap.
SOFTCAP_FACTOR = -4.0


class Statistics(NamedTuple):
    """Of each register's query: its LSE in log2 units, less the softcap's offset, and D = rowsum(dO∘O) − dLSE."""

    lse_log2: Callable[[int, int], Float32]
    delta: Callable[[int, int], Float32]


def differentiate(
    scores: cute.Tensor,
    dprobabilities: cute.Tensor,
    statistics: Statistics,
    distance: Optional[Callable[[int, int], Float32]],
    hidden: Optional[Callable],
    params: ScoreParams,
    slope: Optional[Float32],
    dslope: Optional[cute.Tensor],
):
    """Scores become P and dO·Vᵀ becomes dX, in place, on (rows, columns) views.

    ``distance(r, c)``: |i + D − j|, for ALiBi; ``hidden(r, c)``: whether the register's score is masked; ``slope``: the
    head's, in the units of x; ``dslope``: one register, to which −Σ dS·|i + D − j| is added. None where absent.
    """
    for r in range(cute.size(scores, mode=[0])):
        for c in range(cute.size(scores, mode=[1])):
            x = scores[r, c]
            if params.softcap_exponent is not None:
                x = cute.arch.rcp_approx(-1.0 - cute.math.exp2(x * params.softcap_exponent, fastmath=True))
            biased = x
            if slope is not None:
                biased = x - slope * distance(r, c)
            exponent = biased * params.scale_log2 - statistics.lse_log2(r, c)
            if hidden is not None:
                exponent = cutlass.select_(hidden(r, c), Float32(-Float32.inf), exponent)
            probability = cute.math.exp2(exponent, fastmath=True)
            gradient = probability * (dprobabilities[r, c] - statistics.delta(r, c))
            if dslope is not None:
                dslope[0] = dslope[0] - gradient * distance(r, c)
            if params.softcap_exponent is not None:
                gradient = gradient * (x * x + x)
            scores[r, c] = probability
            dprobabilities[r, c] = gradient
