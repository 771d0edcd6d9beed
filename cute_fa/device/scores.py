"""From raw Q·Kᵀ to masked scores: softcap, ALiBi, and the mask, on the registers of one thread."""

import math
from typing import NamedTuple, Optional

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr

from cute_fa.device.block_range import Window

LOG2_E = math.log2(math.e)


class ScoreParams(NamedTuple):
    """Run-time constants of the score formula. ``scale_log2``: softmax_scale·log2(e). ``softcap``: the cap c or None.
    ``slope``: ALiBi slope of the tile's head in the units of :func:`modify_scores`' result, or None."""

    scale_log2: Float32
    softcap: Optional[Float32]
    slope: Optional[Float32]


def score_params(softmax_scale: Float32, softcap: Optional[Float32], slope: Optional[Float32]) -> ScoreParams:
    """Without softcap scores stay raw, the softmax multiplies them by scale·log2(e) in the exponential's fma, and the
    slope is divided by the scale instead. With it they are in log2 units already."""
    if const_expr(slope is not None):
        slope = slope * LOG2_E if const_expr(softcap is not None) else slope / softmax_scale
    return ScoreParams(softmax_scale * LOG2_E, softcap, slope)


def remaining_scale(params: ScoreParams) -> Optional[Float32]:
    """Factor from the result of :func:`modify_scores` to log2 units; None for 1."""
    return None if const_expr(params.softcap is not None) else params.scale_log2


@cute.jit
def modify_scores(scores: cute.Tensor, columns: cute.Tensor, positions: cute.Tensor, params: ScoreParams):
    """Softcap and ALiBi in place, on the (rows, columns) view of an accumulator.

    ``columns``: static column of each register of thread 0; ``positions``: i + D − j0 of each row, j0 the first key
    of the block plus the thread's own column offset, so that i + D − j = position − column.
    """
    if const_expr(params.softcap is not None):
        # tanh(x) = 1 − 2/(1 + e^2x): tanh.approx is off by 2^-11, 0.02 at a cap of 50, and would show in the LSE
        exponent = 2.0 * params.scale_log2 / params.softcap
        cap_log2 = params.softcap * LOG2_E
    for r in cutlass.range_constexpr(cute.size(scores, mode=[0])):
        for c in cutlass.range_constexpr(cute.size(scores, mode=[1])):
            score = scores[r, c]
            if const_expr(params.softcap is not None):
                grown = cute.math.exp2(score * exponent, fastmath=True)
                score = cap_log2 - 2.0 * cap_log2 * cute.arch.rcp_approx(1.0 + grown)
            if const_expr(params.slope is not None):
                distance = positions[r] - Float32(columns[0, c][1])
                score = score - params.slope * cute.math.absf(distance)
            scores[r, c] = score


@cute.jit
def mask_scores(
    scores: cute.Tensor,
    columns: cute.Tensor,
    diagonals: cute.Tensor,
    keys_left: Int32,
    window: Window,
    first_key: Int32,
    right_edge: cutlass.Constexpr[bool],
    left_edge: cutlass.Constexpr[bool],
):
    """Set hidden scores to −inf, on the (rows, columns) view of an accumulator.

    Everything is relative to ``first_key``, the block's first key plus the thread's column offset: ``diagonals`` is
    i + D − first_key of each row, ``keys_left`` is seqlen_k − first_key, ``columns`` are thread 0's static columns.
    """
    for r in cutlass.range_constexpr(cute.size(scores, mode=[0])):
        stop = keys_left
        if const_expr(right_edge and window.right is not None):
            stop = cutlass.min(stop, diagonals[r] + window.right + 1)
        if const_expr(left_edge and window.left is not None):
            start = diagonals[r] - window.left
            if const_expr(window.sink_tokens is not None):
                sink_stop = window.sink_tokens - first_key
        for c in cutlass.range_constexpr(cute.size(scores, mode=[1])):
            column = columns[0, c][1]
            if const_expr(right_edge):
                scores[r, c] = -Float32.inf if column >= stop else scores[r, c]
            if const_expr(left_edge and window.left is not None):
                if const_expr(window.sink_tokens is not None):
                    hidden = column < start and column >= sink_stop
                else:
                    hidden = column < start
                scores[r, c] = -Float32.inf if hidden else scores[r, c]
