"""Matrices between shared memory and registers at run time: PTX ISA 9.7.14.5 (ldmatrix, stmatrix, movmatrix)."""

from __future__ import annotations

import numpy as np

from ..arrays import full_width
from ..ops.numerics import unpadded
from .shared_memory import WRITTEN

_u4 = np.uint32
_WRITTEN_8 = np.uint64(0x0101010101010101 * WRITTEN)


class Matrices:
    """Rows of 16 bytes between shared memory and the registers of a warp."""

    def __init__(self, wave, shared):
        self.wave, self.events, self.shared = wave, wave.events, shared

    def _row_index(self, w, address, count):
        """Flat byte indices [n, 8 * count] of the rows whose addresses the first lanes carry."""
        address = full_width(address, len(w))
        lanes = 8 * count
        if lanes < 32:  # other lanes may hold anything
            address = np.concatenate([address[:, :lanes]] * (32 // lanes), axis=1)
        return self.shared.index(w, address, 16)[:, :lanes]

    def _load_rows(self, w, address, count):
        """The rows of 16 bytes [n, 8 * count, 2] (uint64) whose addresses the first 8 * count lanes carry.

        Raises MemoryFault, and SyncError for bytes in flight; the first read of unwritten bytes is remembered.
        """
        index = self._row_index(w, address, count)
        rows = index >> 4
        if not self.shared.rows_are_written(rows):
            self._unwritten_rows(w, index, (self.shared.state_rows[rows] != _WRITTEN_8).any(2))
        if self.events.read_shared:
            self.events.read_shared(w, index, 16, None)
        return self.shared.rows[rows]

    def load(self, w, address, count, transpose):
        """ldmatrix of 8 x 8 matrices of 16-bit elements (PTX ISA 9.7.14.5.15): ``count`` registers [n, 32] (uint32).
        Raises as ``_load_rows``."""
        n = len(w)
        matrices = self._load_rows(w, address, count).view(np.uint16).reshape(n, count, 8, 8)
        if transpose:
            matrices = np.ascontiguousarray(matrices.swapaxes(2, 3))
        words = matrices.view(_u4).reshape(n, count, 32)
        return [words[:, j] for j in range(count)]

    def load_bytes(self, w, address, count, transpose, bits):
        """ldmatrix of matrices of bytes, ``count`` registers in all: 8 x 16, or 16 x 16 transposed (two registers).

        ``bits``: 4 or 6 for elements that become bytes, in their low bits, otherwise 8. Raises as ``_load_rows``.
        """
        n = len(w)
        raw = self._load_rows(w, address, count).view(np.uint8).reshape(n, 8 * count, 16)
        if bits < 8:
            raw = unpadded(raw, bits)
        if transpose:  # byte p of lane 4 c + t is row 4 t + p of column c, and of column c + 8 in the second register
            raw = raw.reshape(n, count // 2, 4, 4, 2, 8).transpose(0, 1, 4, 5, 2, 3)
        words = np.ascontiguousarray(raw).view(_u4).reshape(n, count, 32)
        return [words[:, j] for j in range(count)]

    def _unwritten_rows(self, w, index, bad):
        j, row = np.argwhere(bad)[0]
        found = (index[bad][:, None] + np.arange(16)).ravel()
        self.shared.unwritten_operand(found[self.shared.states[found] != WRITTEN], self.wave.thread_text(w[j], row))

    def store(self, w, address, values, transpose):
        """stmatrix (PTX ISA 9.7.14): the inverse of ``load`` for a list of registers. MemoryFault or SyncError."""
        n, count = len(w), len(values)
        matrices = np.stack([full_width(v, n) for v in values], axis=1)
        matrices = np.ascontiguousarray(matrices).view(np.uint16).reshape(n, count, 8, 8)
        if transpose:
            matrices = np.ascontiguousarray(matrices.swapaxes(2, 3))
        self._store_rows(w, address, matrices.reshape(n, 8 * count, 8).view(np.uint64))

    def store_bytes(self, w, address, values):
        """stmatrix.m16n8.trans of a list of registers: each fills 8 rows of 16 bytes. MemoryFault or SyncError."""
        n, count = len(w), len(values)
        words = np.ascontiguousarray(np.stack([full_width(v, n) for v in values], axis=1))
        # byte a + 2 b of lane 4 c + t is column c + 8 b of row 2 t + a
        raw = words.view(np.uint8).reshape(n, count, 8, 4, 2, 2).transpose(0, 1, 3, 5, 4, 2)
        self._store_rows(w, address, np.ascontiguousarray(raw).reshape(n, 8 * count, 16).view(np.uint64))

    def _store_rows(self, w, address, rows):
        """Store rows of 16 bytes [n, 8 * count, 2] (uint64) at the addresses of the first lanes."""
        index = self._row_index(w, address, rows.shape[1] // 8)
        self.shared.mark_written(index, 16, None)
        if self.events.write_shared:
            self.events.write_shared(w, index, 16, None)
        self.shared.rows[index >> 4] = rows
        self.wave.active()

    def transpose(self, w, a):
        """movmatrix.trans (PTX ISA 9.7.14): transpose an 8 x 8 matrix of 16-bit elements, one register [n, 32]."""
        n = len(w)
        matrices = np.ascontiguousarray(full_width(a, n)).view(np.uint16).reshape(n, 8, 8)
        return np.ascontiguousarray(matrices.swapaxes(1, 2)).view(_u4).reshape(n, 32)
