"""Matrix instructions of a warp at run time: PTX ISA 9.7.14 (ldmatrix, stmatrix, movmatrix, mma.sync).

Products are accumulated in float32 by BLAS: the hardware has another order and less internal precision.
"""

from __future__ import annotations

import numpy as np

from .memory import WRITTEN
from .numerics import DECODE, ELEMENT_BYTES, f16_to_f32
from .operands import OperandMixin
from .warps import full_width

_u4, _f4 = np.uint32, np.float32
_RAW = {1: np.uint8, 2: np.uint16, 4: np.uint32}
_WRITTEN_8 = np.uint64(0x0101010101010101 * WRITTEN)


def a_fragment(registers, n, element):
    """A registers of mma and wgmma (4: 16 x 32 bytes, 2: 16 x 16 bytes) -> float32 [n, 16, K].

    Registers are ordered (half of K, half of the rows), lane = 4 * row + t: permute words, then split them.
    """
    halves = len(registers) // 2
    words = np.stack([full_width(r, n) for r in registers]).reshape(halves, 2, n, 8, 4)
    words = np.ascontiguousarray(words.transpose(2, 1, 3, 0, 4))  # n, row half, row, k half, t
    return DECODE[element](words.view(_RAW[ELEMENT_BYTES[element]]).reshape(n, 16, -1))


def b_fragment(registers, n, element):
    """B registers of mma -> float32 [n, K, 8] (a transposed view)."""
    words = np.stack([full_width(r, n) for r in registers]).reshape(len(registers), n, 8, 4)
    words = np.ascontiguousarray(words.transpose(1, 2, 0, 3))  # n, column, k half, t
    return DECODE[element](words.view(_RAW[ELEMENT_BYTES[element]]).reshape(n, 8, -1)).swapaxes(1, 2)


def pack_f16(low, high):
    """Two arrays as f16 pairs in uint32; ``low`` in the lower halves."""
    low = low.astype(np.float16).view(np.uint16).astype(_u4)
    high = high.astype(np.float16).view(np.uint16).astype(_u4)
    return low | (high << _u4(16))


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


class MatrixMixin(OperandMixin):
    """Matrix instructions of a warp. Needs ``MemoryMixin`` and the scheduler's steps; owns a_fragments, b_fragments."""

    def init_matrices(self):
        self.a_fragments, self.b_fragments = _FragmentCache(16), _FragmentCache(32)

    def _row_index(self, w, address, count):
        """Flat byte indices [n, 8 * count] of the rows whose addresses the first lanes carry."""
        address = full_width(address, len(w))
        lanes = 8 * count
        if lanes < 32:  # other lanes may hold anything
            address = np.concatenate([address[:, :lanes]] * (32 // lanes), axis=1)
        return self.shared_index(w, address, 16)[:, :lanes]

    def ldmatrix(self, w, address, count, transpose):
        """ldmatrix of 8 x 8 matrices of 16-bit elements (PTX ISA 9.7.14): ``count`` registers [n, 32] (uint32).

        The first 8 * count lanes carry the addresses of rows of 16 bytes. Raises MemoryFault, and SyncError for bytes
        in flight; the first read of unwritten bytes is remembered.
        """
        n = len(w)
        index = self._row_index(w, address, count)
        rows = index >> 4
        if not self.rows_are_written(rows):
            self._unwritten_rows(w, index, (self.shadow_rows[rows] != _WRITTEN_8).any(2))
        if self.races is not None:
            self.races.read_shared(w, index, 16, None)
        matrices = self.shared_rows[rows].view(np.uint16).reshape(n, count, 8, 8)
        if transpose:
            matrices = np.ascontiguousarray(matrices.swapaxes(2, 3))
        words = matrices.view(_u4).reshape(n, count, 32)
        return [words[:, j] for j in range(count)]

    def _unwritten_rows(self, w, index, bad):
        j, row = np.argwhere(bad)[0]
        found = (index[bad][:, None] + np.arange(16)).ravel()
        self.unwritten_operand(found[self.shadow1[found] != WRITTEN], self.thread_text(w[j], row))

    def stmatrix(self, w, address, values, transpose):
        """stmatrix (PTX ISA 9.7.14): the inverse of ``ldmatrix`` for a list of registers. MemoryFault or SyncError."""
        n, count = len(w), len(values)
        index = self._row_index(w, address, count)
        matrices = np.stack([full_width(v, n) for v in values], axis=1)
        matrices = np.ascontiguousarray(matrices).view(np.uint16).reshape(n, count, 8, 8)
        if transpose:
            matrices = np.ascontiguousarray(matrices.swapaxes(2, 3))
        self._mark_written(index, 16, None)
        if self.races is not None:
            self.races.write_shared(w, index, 16, None)
        self.shared_rows[index >> 4] = matrices.reshape(n, 8 * count, 8).view(np.uint64)
        self.last_activity = self.steps

    def movmatrix(self, w, a):
        """movmatrix.trans (PTX ISA 9.7.14): transpose an 8 x 8 matrix of 16-bit elements, one register [n, 32]."""
        n = len(w)
        matrices = np.ascontiguousarray(full_width(a, n)).view(np.uint16).reshape(n, 8, 8)
        return np.ascontiguousarray(matrices.swapaxes(1, 2)).view(_u4).reshape(n, 32)

    def mma(self, w, a_type, b_type, result, a, b, c, clamp):
        """D = A B + C of m16n8; registers of D in PTX's order."""
        n = len(w)
        left = self.a_fragments.get(a_fragment, a, n, a_type)
        product = np.matmul(left, self.b_fragments.get(b_fragment, b, n, b_type))  # n, 16, 8
        product = product.reshape(n, 2, 8, 4, 2).transpose(1, 4, 0, 2, 3).reshape(4, n, 32)  # (row half, e), n, lane
        if result == "f32":
            return [(product[j] + np.asarray(c[j]).view(_f4)).view(_u4) for j in range(4)]
        if result == "s32":
            sums = [product[j].astype(np.int64) + np.asarray(c[j]).view(np.int32) for j in range(4)]
            if clamp:
                sums = [np.clip(s, -0x80000000, 0x7FFFFFFF) for s in sums]
            return [s.astype(np.int32).view(_u4) for s in sums]
        out = []
        for half in range(2):
            word = np.asarray(c[half])
            out.append(pack_f16(product[2 * half] + f16_to_f32(word & _u4(0xFFFF)),
                                product[2 * half + 1] + f16_to_f32(word >> _u4(16))))  # fmt: skip
        return out

    def double_mma(self, w, a, b, c):
        """D = A B + C in binary64 of m8n8 or m16n8; one element a register, lane = 4 * row + t. Registers of D."""
        n, halves, quarters = len(w), len(c) // 2, len(b)

        def stack(registers):
            return np.stack([full_width(x, n) for x in registers])

        left = stack(a).reshape(quarters, halves, n, 8, 4).transpose(2, 1, 3, 0, 4).reshape(n, 8 * halves, 4 * quarters)
        right = stack(b).reshape(quarters, n, 8, 4).transpose(1, 0, 3, 2).reshape(n, 4 * quarters, 8)
        product = (left @ right).reshape(n, halves, 8, 4, 2).transpose(1, 4, 0, 2, 3).reshape(2 * halves, n, 32)
        return product + stack(c)
