"""Copies to tensor memory and shifts in it at run time: PTX ISA 9.7.16.9 (tcgen05.cp, tcgen05.shift).

Which lanes the rows of each shape go to follows CUTLASS (include/cute/atom/copy_traits_sm100.hpp, SM100_UTCCP_*).
"""

from __future__ import annotations

import numpy as np

from ..arrays import active_threads, full_width
from ..errors import PtxError
from ..ops.numerics import unpadded
from ..ops.tensor5 import SHAPES
from .operands import tcgen05_descriptor


class Tcgen05Copy:
    """tcgen05.cp and tcgen05.shift."""

    def __init__(self, wave, operands, tensor_memory):
        self.wave, self.events, self.operands, self.tensor_memory = wave, wave.events, operands, tensor_memory

    def copy(self, w, shape, pair, bits, address, descriptor, M):
        """tcgen05.cp of each active thread; ``shape`` is a key of SHAPES, ``bits`` 4 or 6 for elements that become
        bytes, otherwise 8. PtxError for descriptors that are not simulated, MemoryFault for what lies outside."""
        address, descriptor = full_width(address, len(w)), full_width(descriptor, len(w))
        width, lanes = SHAPES[shape]
        for j, lane in active_threads(w, M):
            cta, to = int(self.wave.cta_of[w[j]]), int(address[j, lane])
            layout = tcgen05_descriptor(int(descriptor[j, lane]))
            if layout.absolute or layout.atom != 16:
                raise PtxError("tcgen05.cp with an absolute leading address or 32-byte atoms is not simulated")
            ctas = [cta & ~1, cta | 1] if pair else [cta]
            if (to >> 16) + int(lanes.max()) > 127:
                raise PtxError(f"tcgen05.cp.{shape} to lane {to >> 16} goes beyond lane 127")
            if self.events.tensor_core_reads or self.events.tensor_matrix:
                for c in ctas:
                    chunks = self.operands.chunks(layout, False, len(lanes), width, "u8")
                    if self.events.tensor_core_reads:
                        self.events.tensor_core_reads(int(w[j]), c, chunks)
                    if self.events.tensor_matrix:
                        self.events.tensor_matrix(int(w[j]), c, (to >> 16) + lanes, to & 0xFFFF, width // 4, True)
            self.tensor_memory.defer(w[j], lambda x=(ctas, layout, width, lanes, bits, to): self._copy(*x))

    def _copy(self, ctas, layout, width, lanes, bits, to):
        first = to & 0xFFFF
        for c in ctas:
            self.tensor_memory.require_allocated(c, first, first + width // 4)
            raw = self.operands.bytes(c, layout, False, len(lanes), width, 1)
            if bits == 4:  # in the middle of a byte
                raw = unpadded(raw, 4) << np.uint8(2)
            elif bits == 6:
                raw = unpadded(raw, 6) << np.uint8(1)
            words = np.ascontiguousarray(raw).view(np.uint32)
            for copy in lanes.T:
                self.tensor_memory.words[c, (to >> 16) + copy, first : first + width // 4] = words
        self.wave.active()

    def shift(self, w, pair, address, M):
        """tcgen05.shift.down of each active thread: 32 bytes of each lane. PtxError unless the address is at lane 0."""
        address = full_width(address, len(w))
        for j, lane in active_threads(w, M):
            cta, at = int(self.wave.cta_of[w[j]]), int(address[j, lane])
            if at >> 16:
                raise PtxError(f"tcgen05.shift at lane {at >> 16}: only lane 0 is simulated")
            for c in [cta & ~1, cta | 1] if pair else [cta]:
                if self.events.tensor_matrix:
                    self.events.tensor_matrix(int(w[j]), c, np.arange(128), at, 8, True)
                self.tensor_memory.defer(w[j], lambda c=c, at=at: self.shift_lanes(c, at))

    def shift_lanes(self, cta, column):
        """Every lane of 8 columns takes the contents of the next one, but for the last of each quarter."""
        self.tensor_memory.require_allocated(cta, column, column + 8)
        quarters = self.tensor_memory.words[cta].reshape(4, 32, -1)[:, :, column : column + 8]
        quarters[:, :-1] = quarters[:, 1:].copy()
        self.wave.active()
