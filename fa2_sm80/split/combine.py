"""Merging the normalised parts of O of the warps that share a tile's rows, by their LSE, in shared memory:
LSE = log Σ exp(LSE_w), O = Σ exp(LSE_w − LSE)·O_w.

The learnable sink is one more term of the sum, without a value row; it is added here where no other CTA has a part of
the tile.
"""

from typing import Optional

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr

from cute_fa.device.score import LOG2_E
from cute_fa.device.softmax import finite
from cute_fa.device.split_parts import COLUMNS


@cute.jit
def merged_lse(lses: cute.Tensor, first: Int32, step: Int32, parts: int, sink: Optional[Float32]) -> Float32:
    """LSE of ``parts`` parts that lie at first, first + step, …; −inf where no part has a key, nor there is a sink."""
    maximum = -Float32.inf if const_expr(sink is None) else sink
    for part in cutlass.range_constexpr(parts):
        maximum = cute.arch.fmax(maximum, lses[first + part * step])
    reference = finite(maximum)
    total = Float32(0.0) if const_expr(sink is None) else exponential(sink - reference)
    for part in cutlass.range_constexpr(parts):
        total = total + exponential(lses[first + part * step] - reference)
    return -Float32.inf if maximum == -Float32.inf else reference + cute.math.log2(total, fastmath=True) / LOG2_E


@cute.jit
def merge_parts(
    out: cute.Tensor, lses: cute.Tensor, first: Int32, step: Int32, parts: int, lse: Float32, column: Int32
) -> cute.Tensor:
    """COLUMNS columns of a row of O from its parts, rows first, first + step, … of ``out``; parts without keys are
    not read."""
    merged = cute.make_rmem_tensor(COLUMNS, Float32)
    merged.fill(0.0)
    for part in cutlass.range(parts, unroll=1):
        row = first + part * step
        if lses[row] != -Float32.inf:
            weight = exponential(lses[row] - lse)
            for i in cutlass.range_constexpr(COLUMNS):
                merged[i] = merged[i] + weight * out[row, column + i]
    return merged


def exponential(x: Float32) -> Float32:
    return cute.math.exp2(x * LOG2_E, fastmath=True)
