"""Merging normalised parts of O by their LSE: LSE = log Σ exp(LSE_p), O = Σ exp(LSE_p − LSE)·O_p.

The learnable sink is one more term of the sum, without a value row; it is added here, once.
"""

from typing import Optional

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr

from cute_fa.device.dtypes import CUTE_DTYPE
from cute_fa.device.score import LOG2_E
from cute_fa.device.softmax import finite
from fa2_sm80.split.config import Fa2SplitConfig

COLUMNS = 8  # of O that a thread merges at a time: 16 bytes of fp16 or bf16


@cute.jit
def merged_lse(lses: cute.Tensor, first: Int32, step: Int32, parts: Int32, sink: Optional[Float32]) -> Float32:
    """LSE of ``parts`` parts that lie at first, first + step, …; −inf where no part has a key."""
    maximum = -Float32.inf if const_expr(sink is None) else sink
    for part in cutlass.range(parts, unroll=1):
        maximum = cute.arch.fmax(maximum, lses[first + part * step])
    reference = finite(maximum)
    total = Float32(0.0) if const_expr(sink is None) else exponential(sink - reference)
    for part in cutlass.range(parts, unroll=1):
        total = total + exponential(lses[first + part * step] - reference)
    return -Float32.inf if maximum == -Float32.inf else reference + cute.math.log2(total, fastmath=True) / LOG2_E


@cute.jit
def merge_parts(
    out: cute.Tensor, lses: cute.Tensor, first: Int32, step: Int32, parts: Int32, lse: Float32, column: Int32
) -> cute.Tensor:
    """COLUMNS columns of a row of O from its parts, rows first, first + step, … of ``out``; parts without keys are not
    read."""
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


def store_chunk(merged: cute.Tensor, target: cute.Tensor, column: Int32, dtype):
    """COLUMNS columns of a row of O, 16 bytes."""
    narrowed = cute.make_rmem_tensor(COLUMNS, dtype)
    narrowed.store(merged.load().to(dtype))
    copy = cute.make_copy_atom(cute.nvgpu.CopyUniversalOp(), dtype, num_bits_per_copy=128)
    cute.copy(copy, narrowed, cute.local_tile(target, (COLUMNS,), (column // COLUMNS,)))


class CombineKernel:
    """One warp a row: the splits' parts become O and LSE."""

    num_threads = 128

    def __init__(self, config: Fa2SplitConfig):
        self.config = config
        self.dtype = CUTE_DTYPE[config.dtype]
        self.rows = self.num_threads // 32

    @cute.kernel
    def kernel(self, parts, out: cute.Tensor, lse: cute.Tensor, learnable_sink: Optional[cute.Tensor]):
        c = self.config
        tidx, _, _ = cute.arch.thread_idx()
        index, _, _ = cute.arch.block_idx()
        lane, row = tidx % 32, index * self.rows + tidx // 32
        rows = parts.lse.shape[1]
        if row < rows:
            # rows are the elements of LSE: (batch, heads, seqlen_q), or (heads, total_q) packed
            queries = lse.shape[-1]
            query, head, batch = row % queries, row // queries % lse.shape[-2], row // queries // lse.shape[-2]
            lses = parts.lse[None, row]
            counts = lses[0] != Float32.inf
            splits = cutlass.select_(counts, Int32(parts.lse.shape[0]), Int32(0))
            sink = learnable_sink[head] if const_expr(c.learnable_sink) else None
            merged = merged_lse(lses, Int32(0), Int32(1), splits, sink)
            merged = merged if counts else -Float32.inf
            if lane == 0:
                if const_expr(c.cu_seqlens_q):
                    lse[head, query] = merged
                else:
                    lse[batch, head, query] = merged
            if const_expr(c.cu_seqlens_q):
                target = out[query, head, None]
            else:
                target = out[batch, query, head, None]
            for chunk in cutlass.range(lane, c.head_dim_v // COLUMNS, 32, unroll=1):
                values = merge_parts(
                    parts.out[None, row, None], lses, Int32(0), Int32(1), splits, merged, chunk * COLUMNS
                )
                store_chunk(values, target, chunk * COLUMNS, self.dtype)
