"""From Q·Kᵀ to P, and from dO·Vᵀ to dS, on the registers of one thread (FlashAttention-2, arXiv 2307.08691).

With x what :func:`~cute_fa.device.scores.modify_scores` would leave, in registers that are rows of queries and columns
of keys or the other way round:

    P = exp2(scale_log2 · x − LSE),   dS = P · (dP − D),   through the softcap dX = dS · (1 − tanh²)

Since tanh = 1 + 2x, 1 − tanh² = −4 · (x + x²); the factor −4 is left to who scales dQ and dK.
"""

from collections.abc import Callable
from typing import Optional

import cutlass
import cutlass.cute as cute
from cutlass import Float32

from cute_fa.device.scores import ScoreParams

# What the scale of dQ and dK is multiplied by under a softcap.
SOFTCAP_FACTOR = -4.0


def probabilities(
    scores: cute.Tensor,
    lse_log2: Callable[[int, int], Float32],
    params: ScoreParams,
    slope: Optional[Float32],
    distance: Optional[Callable[[int, int], Float32]],
    hidden: Optional[Callable],
) -> Optional[cute.Tensor]:
    """Q·Kᵀ becomes P, in place, on a (rows, columns) view. What comes back is x + x² under a softcap, else None.

    ``lse_log2(r, c)``: LSE of a register's query in log2 units, less the softcap's offset, +inf for P = 0; ``slope``:
    the head's, in the units of x, with ``distance(r, c)`` = |i + D − j|; ``hidden(r, c)``: whether the score is masked.
    None where absent.
    """
    slopes_of_cap = None
    if params.softcap_exponent is not None:
        slopes_of_cap = cute.make_rmem_tensor_like(scores)
    for r in range(cute.size(scores, mode=[0])):
        for c in range(cute.size(scores, mode=[1])):
            x = scores[r, c]
            if params.softcap_exponent is not None:
                x = cute.arch.rcp_approx(-1.0 - cute.math.exp2(x * params.softcap_exponent, fastmath=True))
                slopes_of_cap[r, c] = x * x + x
            if slope is not None:
                x = x - slope * distance(r, c)
            exponent = x * params.scale_log2 - lse_log2(r, c)
            if hidden is not None:
                exponent = cutlass.select_(hidden(r, c), Float32(-Float32.inf), exponent)
            scores[r, c] = cute.math.exp2(exponent, fastmath=True)
    return slopes_of_cap


def score_gradients(
    p: cute.Tensor,
    dp: cute.Tensor,
    delta: Callable[[int, int], Float32],
    slopes_of_cap: Optional[cute.Tensor],
    distance: Optional[Callable[[int, int], Float32]],
    dslope: Optional[cute.Tensor],
):
    """dO·Vᵀ becomes dX, in place, on (rows, columns) views.

    ``delta(r, c)``: D = rowsum(dO∘O) − dLSE of a register's query; ``slopes_of_cap`` from :func:`probabilities`;
    ``dslope``: one register, to which −Σ dS·|i + D − j| is added, or None.
    """
    for r in range(cute.size(p, mode=[0])):
        for c in range(cute.size(p, mode=[1])):
            gradient = p[r, c] * (dp[r, c] - delta(r, c))
            if dslope is not None:
                dslope[0] = dslope[0] - gradient * distance(r, c)
            if slopes_of_cap is not None:
                gradient = gradient * slopes_of_cap[r, c]
            dp[r, c] = gradient
