"""From raw Q·Kᵀ to masked scores: softcap, ALiBi, and the mask, on the registers of one thread."""

import math
from typing import NamedTuple, Optional

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr

from cute_fa.device.block_range import Window

LOG2_E = math.log2(math.e)


class ScoreParams(NamedTuple):
    """Run-time constants of the score formula. A score in log2 units is ``scale_log2``·x + ``offset_log2``, x being
    what :func:`modify_scores` leaves, so that the exponential's fma does the scaling; the offset, None for 0, matters
    to the LSE alone. ``softcap_exponent``: factor from Q·Kᵀ to 2·log2(e)·score/c, or None. ``slopes``: ALiBi slope of
    each row's head in the units of x, or None."""

    scale_log2: Float32
    offset_log2: Optional[Float32]
    softcap_exponent: Optional[Float32]
    slopes: Optional[tuple[Float32, ...]]


def score_params(
    softmax_scale: Float32, softcap: Optional[Float32], slopes: Optional[tuple[Float32, ...]]
) -> ScoreParams:
    """Constants for softmax_scale, the cap c and the ALiBi slopes of a thread's rows; see :func:`modify_scores`."""
    scale_log2, offset_log2, exponent = softmax_scale * LOG2_E, None, None
    if const_expr(softcap is not None):
        exponent = 2.0 * LOG2_E * softmax_scale / softcap
        scale_log2, offset_log2 = 2.0 * LOG2_E * softcap, LOG2_E * softcap
    if const_expr(slopes is not None):
        slopes = tuple(slope * LOG2_E / scale_log2 for slope in slopes)
    return ScoreParams(scale_log2, offset_log2, exponent, slopes)


@cute.jit
def modify_scores(scores: cute.Tensor, columns: cute.Tensor, positions: cute.Tensor, params: ScoreParams):
    """Softcap and ALiBi in place, on the (rows, columns) view of an accumulator: c·tanh(s/c) = c + 2c·x with
    x = −1/(1 + e^(2s/c)), which is what stays in the registers.

    ``columns``: static column of each register of thread 0; ``positions``: i + D − j0 of each row, j0 the first key
    of the block plus the thread's own column offset, so that i + D − j = position − column.
    """
    for r in cutlass.range_constexpr(cute.size(scores, mode=[0])):
        for c in cutlass.range_constexpr(cute.size(scores, mode=[1])):
            score = scores[r, c]
            if const_expr(params.softcap_exponent is not None):
                # not tanh.approx: it is off by 2^-11, 0.02 at a cap of 50, and would show in the LSE
                grown = cute.math.exp2(score * params.softcap_exponent, fastmath=True)
                score = cute.arch.rcp_approx(-1.0 - grown)
            if const_expr(params.slopes is not None):
                distance = positions[r] - Float32(columns[0, c][1])
                score = score - params.slopes[r] * cute.math.absf(distance)
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
