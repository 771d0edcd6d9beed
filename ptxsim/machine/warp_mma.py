"""Matrix products of a warp at run time: PTX ISA 9.7.14.3 (block scaling), 9.7.14.5 (mma.sync), 9.7.14.6 (mma.sp)."""

from __future__ import annotations

import numpy as np

from ..arrays import full_width
from ..errors import PtxError
from ..ops.numerics import DECODE, ELEMENT_BYTES, f16_to_f32, ue4m3_to_f64, ue8m0_to_f64
from ..ops.sparsity import expand, metadata_codes, metadata_threads
from .products import double_products, from_fragments, in_fragments, products, sum_of_blocks

_u4, _f4, _f8 = np.uint32, np.float32, np.float64
_RAW = {1: np.uint8, 2: np.uint16, 4: np.uint32}
_LANE = np.arange(32)


def a_fragment(registers, n, element):
    """A registers of mma and wgmma (4: 16 x 32 bytes, 2: 16 x 16 bytes) -> float32 [n, 16, K].

    Registers are ordered (half of K, half of the rows), lane = 4 * row + t: permute words, then split them.
    """
    halves = len(registers) // 2
    words = np.stack([full_width(r, n) for r in registers]).reshape(halves, 2, n, 8, 4)
    words = np.ascontiguousarray(words.transpose(2, 1, 3, 0, 4))  # n, row half, row, k half, t
    return DECODE[element](words.view(_RAW[ELEMENT_BYTES[element]]).reshape(n, 16, -1))


def b_fragment(registers, n, element):
    """B registers of mma, and A's of 8 rows -> float32 [n, 8, K]: columns of B, rows of A."""
    words = np.stack([full_width(r, n) for r in registers]).reshape(len(registers), n, 8, 4)
    words = np.ascontiguousarray(words.transpose(1, 2, 0, 3))  # n, column, k half, t
    return DECODE[element](words.view(_RAW[ELEMENT_BYTES[element]]).reshape(n, 8, -1))


def pack_f16(low, high):
    """Two arrays as f16 pairs in uint32; ``low`` in the lower halves."""
    low = low.astype(np.float16).view(np.uint16).astype(_u4)
    high = high.astype(np.float16).view(np.uint16).astype(_u4)
    return low | (high << _u4(16))


def accumulators(registers, n, rows, kind):
    """Registers of C, "f32" or pairs of "f16" -> float32 [n, rows, columns]."""
    words = np.stack([full_width(r, n) for r in registers])
    if kind == "f16":
        values = np.stack([f16_to_f32(words & _u4(0xFFFF)), f16_to_f32(words >> _u4(16))], 1)
    else:
        values = words.view(_f4)
    return from_fragments(values.reshape(-1, n, 32), rows)


def sparse_metadata(element, words, selector, k):
    """Sparsity metadata of 16 rows, 4 bits a chunk [n, 16, chunks of K], from one register [n, 32].

    As many threads of four as are needed, from ``selector`` times their number on (PTX ISA 9.7.14.6.1). 16-bit types
    and tf32: each holds 4 chunks of K, of row g in the lower and of row g + 8 in the upper half of its register. 8-bit
    and 4-bit types: an even thread holds 8 chunks of row g, the odd one after it those of row g + 8. That is what
    CUTLASS's reorder_meta and ELayouts say (mma_traits_sm90_gmma_sparse, mma_traits_sm120_sparse; for the smaller K
    the atoms SM80_SPARSE_16x8x{8,16,32,64} of NVIDIA's mma_traits_sm80_sparse, which CUTLASS itself does not contain),
    and for m16n8k16 of f16 TVM's test_tir_ptx_mma_sp.
    """
    threads = metadata_threads(element, k)
    words = np.ascontiguousarray(words.reshape(-1, 8, 4)[:, :, threads * selector : threads * (selector + 1)])
    if ELEMENT_BYTES[element] > 1:
        words = words.view(np.uint16)
    rows = words.reshape(-1, 8, words.shape[-1] // 2, 2).transpose(0, 3, 1, 2)  # n, row half, g, part of K
    return metadata_codes(np.ascontiguousarray(rows.reshape(-1, 16, rows.shape[-1])))


def block_scaled(left, right, a_scale, b_scale):
    """(A * scale_A) (B * scale_B) as float32; a block is summed in float32, the scaled blocks in float64.

    ``left`` [n, M, K], ``right`` [n, N, K]; ``a_scale`` [n, M, blocks] and ``b_scale`` [n, N, blocks] are float64.
    """
    blocks = a_scale.shape[-1]
    a_blocks, b_blocks = (
        x.reshape(*x.shape[:2], blocks, -1).transpose(2, 0, 1, 3).reshape(-1, x.shape[1], x.shape[2] // blocks)
        for x in (left, right)
    )
    partial = products(a_blocks, b_blocks).reshape(blocks, len(left), left.shape[1], right.shape[1])
    return sum_of_blocks(partial, a_scale.transpose(2, 0, 1), b_scale.transpose(2, 0, 1))


class _FragmentCache:
    """The latest fragments by the identity of their registers: an operand of one mma is often one of the next, too.

    Values in generated code are never changed in place, so that the same arrays have the same contents.
    """

    def __init__(self, size):
        self.size, self.entries = size, {}

    def get(self, make, registers, n, element):
        key = (*map(id, registers), element)
        entry = self.entries.get(key)
        if entry is None:
            if len(self.entries) >= self.size:
                del self.entries[next(iter(self.entries))]
            # the entry keeps the registers alive, so that no other array gets their identities
            entry = self.entries[key] = (registers, make(registers, n, element))
        return entry[1]


# m8n8k4 of f16: four products, each by the lanes 4 q to 4 q + 3 and 16 + 4 q to 19 + 4 q; places in PTX ISA 9.7.14.5.1
_PRODUCT = (_LANE // 4 % 4)[:, None]
_HIGH, _T = (_LANE // 16 * 4)[:, None], (_LANE % 4)[:, None]
_FOUR, _EIGHT = np.arange(4)[None], np.arange(8)[None]
_A_PLACES = {"row": (_T + _HIGH, _FOUR), "col": (_FOUR + _HIGH, _T)}
_B_PLACES = {"row": (_T, _FOUR + _HIGH), "col": (_FOUR, _T + _HIGH)}
_C_PLACES = {
    "f16": (_T + _HIGH, _EIGHT),
    "f32": ((_T & 1) + (_EIGHT & 2) + _HIGH, (_EIGHT & 4) + (_T & 2) + (_EIGHT & 1)),
}


class WarpMma:
    """mma.sync and mma.sp."""

    def __init__(self, wave):
        self.sums = wave.launch.tensor_sums
        self.a_fragments, self.b_fragments = _FragmentCache(16), _FragmentCache(32)

    def multiply(self, w, spec, a, b, c, *more):
        """Registers of D in PTX's order; ``more`` are metadata and selector of sparse A, then the scale factors and
        their selectors for A and for B. PtxError for metadata and selectors that mean nothing."""
        n, more = len(w), list(more)
        if spec.m == 16:
            left = self.a_fragments.get(a_fragment, a, n, spec.a)
        else:
            left = self.b_fragments.get(b_fragment, a, n, spec.a)
        right = self.b_fragments.get(b_fragment, b, n, spec.b)
        if spec.sparse:
            words, selector = more.pop(0), more.pop(0)
            codes = sparse_metadata(spec.a, full_width(words, n), selector, spec.k)
            left = expand(left, codes, spec.a, spec.ordered)
        scales = None
        if spec.vector:
            scales = self._row_scales(n, spec, *more[:3]), self._column_scales(n, spec, *more[3:])
        if self.sums and spec.result != "s32":
            start = accumulators(c, n, spec.m, spec.result)
            given = (*scales, spec.scale) if scales else None
            total = self.sums.add("mma", (spec.a, spec.b), spec.result, left, right, start, given, spec.sparse)
            total = in_fragments(total)
            return list(total.view(_u4)) if spec.result == "f32" else list(pack_f16(total[::2], total[1::2]))
        if spec.vector:
            product = in_fragments(block_scaled(left, right, *scales))
        else:
            product = products(left, right, fragments=True)  # (row half, e), n, lane
        if spec.operation == "xor":  # bits that one has, and not both
            product = in_fragments(left.sum(2)[:, :, None] + right.sum(2)[:, None]) - 2 * product
        if spec.result == "f32":
            return [(p + np.asarray(x).view(_f4)).view(_u4) for p, x in zip(product, c, strict=True)]
        if spec.result == "s32":
            sums = [p.astype(np.int64) + np.asarray(x).view(np.int32) for p, x in zip(product, c, strict=True)]
            if spec.clamp:
                sums = [np.clip(s, -0x80000000, 0x7FFFFFFF) for s in sums]
            return [s.astype(np.int32).view(_u4) for s in sums]
        out = []
        for half, x in enumerate(c):
            word = np.asarray(x)
            out.append(pack_f16(product[2 * half] + f16_to_f32(word & _u4(0xFFFF)),
                                product[2 * half + 1] + f16_to_f32(word >> _u4(16))))  # fmt: skip
        return out

    # ---- scale factors ----------------------------------------------------------------------------
    def _scale_bytes(self, n, spec, words, byte, thread, threads):
        """(codes [n, 8, 4, vector] of the lanes (g, t), selected thread or pair [n])."""
        byte, thread = (full_width(x, n)[:, 0].astype(np.int64) for x in (byte, thread))
        wrong = (byte % spec.vector != 0) | (byte > 3) | (thread >= threads)
        if wrong.any():
            j = int(wrong.argmax())
            raise PtxError(f"selectors of scale factors: byte {byte[j]}, thread {thread[j]}; with {spec.vector} a row, "
                           f"bytes are multiples of {spec.vector} below 4 and threads below {threads}")  # fmt: skip
        codes = np.ascontiguousarray(full_width(words, n)).view(np.uint8).reshape(n, 8, 4, 4)
        return np.take_along_axis(codes, (byte[:, None] + np.arange(spec.vector))[:, None, None], 3), thread

    def _row_scales(self, n, spec, words, byte, thread):
        """A pair of threads of four holds rows g and g + 8 [n, 16, vector]."""
        codes, pair = self._scale_bytes(n, spec, words, byte, thread, 2)
        mine = codes.reshape(n, 8, 2, 2, spec.vector)[np.arange(n), :, pair]  # n, g, row half, block
        return self._decoded(spec, mine.swapaxes(1, 2).reshape(n, 16, spec.vector))

    def _column_scales(self, n, spec, words, byte, thread):
        """One thread of four holds column g [n, 8, vector]."""
        codes, one = self._scale_bytes(n, spec, words, byte, thread, 4)
        return self._decoded(spec, codes[np.arange(n), :, one])

    def _decoded(self, spec, codes):
        return (ue8m0_to_f64 if spec.scale == "ue8m0" else ue4m3_to_f64)(codes)

    # ---- shapes of their own ----------------------------------------------------------------------
    def quad(self, w, layouts, d_type, c_type, a, b, c):
        """mma.m8n8k4 of f16: four products, each of eight lanes; ``layouts``: row or col of A and B. Registers of D."""
        n = len(w)

        def halves(registers):
            words = np.stack([full_width(x, n) for x in registers], axis=-1)
            return f16_to_f32(np.ascontiguousarray(words).view(np.uint16))  # n, lane, element

        left, right, total = np.zeros((n, 4, 8, 4), _f4), np.zeros((n, 4, 4, 8), _f4), np.zeros((n, 4, 8, 8), _f4)
        left[(slice(None), _PRODUCT, *_A_PLACES[layouts[0]])] = halves(a)
        right[(slice(None), _PRODUCT, *_B_PLACES[layouts[1]])] = halves(b)
        values = halves(c) if c_type == "f16" else np.stack([full_width(x, n) for x in c], axis=-1).view(_f4)
        total[(slice(None), _PRODUCT, *_C_PLACES[c_type])] = values
        left, right = left.reshape(-1, 8, 4), right.reshape(-1, 4, 8).swapaxes(1, 2)
        if self.sums:
            start, shape = total.reshape(-1, 8, 8), total.shape
            total = self.sums.add("mma", ("f16", "f16"), d_type, left, right, start).reshape(shape)
        else:
            total += products(left, right).reshape(total.shape)
        mine = total[(slice(None), _PRODUCT, *_C_PLACES[d_type])]  # n, lane, element
        if d_type == "f32":
            return list(np.ascontiguousarray(mine.transpose(2, 0, 1)).view(_u4))
        return [pack_f16(mine[..., 2 * j], mine[..., 2 * j + 1]) for j in range(4)]

    def double(self, w, a, b, c):
        """D = A B + C in binary64 of m8n8 or m16n8; one element a register, lane = 4 * row + t. Registers of D."""
        n, halves, quarters = len(w), len(c) // 2, len(b)

        def stack(registers):
            return np.stack([full_width(x, n) for x in registers])

        left = stack(a).reshape(quarters, halves, n, 8, 4).transpose(2, 1, 3, 0, 4).reshape(n, 8 * halves, 4 * quarters)
        right = stack(b).reshape(quarters, n, 8, 4).transpose(1, 2, 0, 3).reshape(n, 8, 4 * quarters)
        return in_fragments(double_products(left, right)) + stack(c)
