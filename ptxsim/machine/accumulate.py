"""Sums of fp8 products with the few bits that Hopper's tensor cores keep.

What is reported. DeepSeek-V3 technical report, 3.3.2 and 3.5.2 (arXiv 2412.19437): fp8 products of an instruction are
aligned by shifting right to the largest exponent, only the highest 14 bits of each are used, bits beyond are
truncated. SageAttention2 (arXiv 2411.10958): with A = B = 0 the result is the accumulator with its 10 lowest mantissa
bits zero, so that 13 of 23 are kept. FlashAttention pull request 2250: what that does to long contexts.

What is modelled, for each element of D and each wgmma: the 32 products and the accumulator are one sum. Every term is
cut (towards zero) to a multiple of 2^(e - bits + 1), where e is the exponent of the largest term; the terms are added
exactly; the sum is cut to ``bits`` significant bits. NVIDIA documents none of this.
"""

from __future__ import annotations

import numpy as np

_f4 = np.float32
_TERMS = 1 << 17  # products held at once: what fits in a core's cache


def limited_sum(left, right, start, bits):
    """start + left · rightᵀ with ``bits`` significant bits kept of each term and of the sum.

    ``left`` [n, 16, K], ``right`` [N, K] and ``start`` [n, 16, N] are float32; the result is as ``start``. Sums with
    infinities and NaNs are the plain ones.
    """
    out = np.empty_like(start)
    step = max(1, _TERMS // (right.size * left.shape[1]))
    left = left.transpose(2, 0, 1)[..., None]  # K first: sums and maxima over it are of whole vectors
    right = np.ascontiguousarray(right.T)[:, None, None]
    for first in range(0, len(start), step):
        part = slice(first, first + step)
        products = left[:, part] * right  # exact: at most 8 bits of 24
        largest = np.maximum(np.abs(products).max(0), np.abs(start[part]))
        quantum = np.ldexp(_f4(1), np.frexp(largest)[1] - bits)  # frexp's exponent is one more than e
        total = np.trunc(products / quantum).sum(0) + np.trunc(start[part] / quantum)  # whole numbers < 2^20
        total = _cut(total, bits) * quantum
        finite = np.isfinite(largest)
        out[part] = total if finite.all() else np.where(finite, total, products.sum(0) + start[part])
    return out


def _cut(x, bits):
    """The ``bits`` highest significant bits of float32 numbers."""
    mask = np.uint32(0xFFFFFFFF << (24 - bits) & 0xFFFFFFFF)
    return (x.astype(_f4).view(np.uint32) & mask).view(_f4)
