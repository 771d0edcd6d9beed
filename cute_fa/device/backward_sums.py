"""Sums of the parts of per-head gradients: of the ALiBi slopes and of the learnable sink."""

import cutlass
import cutlass.cute as cute
from cutlass import Float32


class PartialSums:
    """target (1 or batch, heads) = sum of parts (batch, heads, n) over n, and over the batch if target has one row; one
    warp an element, always in the same order."""

    num_threads = 32

    @cute.kernel
    def kernel(self, parts: cute.Tensor, target: cute.Tensor):
        lane, _, _ = cute.arch.thread_idx()
        row, head, _ = cute.arch.block_idx()
        sequences = parts.shape[0] // target.shape[0]
        total = Float32(0.0)
        for sequence in cutlass.range(row * sequences, (row + 1) * sequences, unroll=1):
            for part in cutlass.range(lane, parts.shape[2], self.num_threads, unroll=1):
                total = total + parts[sequence, head, part]
        total = cute.arch.warp_reduction_sum(total)
        if lane == 0:
            target[row, head] = total
