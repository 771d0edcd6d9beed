"""Matrices between shared memory and registers at run time: PTX ISA 9.7.14.5 (ldmatrix, stmatrix, movmatrix)."""

from __future__ import annotations

import numpy as np

from .memory import WRITTEN
from .operands import OperandMixin
from .warp_mma import WarpMmaMixin
from .warps import full_width

_u4 = np.uint32
_WRITTEN_8 = np.uint64(0x0101010101010101 * WRITTEN)


class MatrixMixin(OperandMixin, WarpMmaMixin):
    """Matrix instructions of a warp. Needs ``MemoryMixin`` and the scheduler's steps; owns nothing."""

    def init_matrices(self):
        self.init_warp_mma()

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
