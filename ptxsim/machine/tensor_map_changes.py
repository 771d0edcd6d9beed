"""Tensor maps changed on the device at run time: tensormap.replace and tensormap.cp_fenceproxy (PTX ISA 9.7.9.28,
9.7.13.16). The layout of a map is that of ``tensor_maps``; its rules are checked where the map is used.
"""

from __future__ import annotations

import numpy as np

from ..arrays import full_width
from ..errors import MemoryFault, PtxError
from .shared_memory import WRITTEN

_u4 = np.uint32
# field -> (its largest value, word and lowest bit for a dimension, what is subtracted from the value)
_FIELDS = {
    "rank": (4, lambda d: (2, 4), 0),  # PTX counts from 0, as the map does
    "elemtype": (10, lambda d: (2, 7), 0),
    "swizzle_mode": (3, lambda d: (2, 13), 0),
    "swizzle_atomicity": (3, lambda d: (2, 19), 0),
    "interleave_layout": (0, lambda d: (2, 11), 0),
    "fill_mode": (0, lambda d: (2, 15), 0),
    "element_stride": (8, lambda d: (13, 3 * d), 1),
    "box_dim": (256, lambda d: (13, 24) if d == 0 else (14, 8 * (d - 1)), 1),
    "global_dim": ((1 << 32) - 1, lambda d: (8 + d, 0), 1),
}
_WIDTH = {"rank": 3, "elemtype": 4, "swizzle_mode": 2, "swizzle_atomicity": 2, "interleave_layout": 2, "fill_mode": 1,
          "element_stride": 3, "box_dim": 8, "global_dim": 32}  # fmt: skip


def _changes(field, dimension, value):
    """[(word, mask, new bits)] that put ``value`` (an array) into a field of a map."""
    if field == "global_address":
        return [(0, 0xFFFFFFFF, value.astype(_u4)), (1, 0xFFFFFFFF, (value >> np.uint64(32)).astype(_u4))]
    if field == "global_stride":
        high = (value >> np.uint64(36)).astype(_u4) << _u4(4 * dimension)
        return [(3 + dimension, 0xFFFFFFFF, (value >> np.uint64(4)).astype(_u4)), (7, 15 << 4 * dimension, high)]
    _, place, less = _FIELDS[field]
    word, shift = place(dimension)
    mask = (1 << _WIDTH[field]) - 1
    return [(word, mask << shift, (value - _u4(less) & _u4(mask)) << _u4(shift))]


def _check(field, dimension, value):
    if field == "global_address":
        wrong, rule = value % np.uint64(16) != 0, "a multiple of 16"
    elif field == "global_stride":
        wrong, rule = (value % np.uint64(16) != 0) | (value >> np.uint64(40) != 0), "a multiple of 16 below 2^40"
    else:
        most, _, least = _FIELDS[field]
        wrong, rule = (value < least) | (value > most), f"in {least}..{most} (or not simulated)"
    if not 0 <= dimension < (4 if field == "global_stride" else 5):
        raise PtxError(f"tensormap.replace of dimension {dimension} of {field}")
    if wrong.any():
        raise PtxError(f"tensormap.replace: {field} {int(value[wrong][0])} is not {rule}")


class TensorMapChanges:
    """Changes of tensor maps in shared and in global memory."""

    def __init__(self, shared, global_memory):
        self.shared, self.global_memory = shared, global_memory

    def replace(self, w, address, shared, field, dimension, value, M):
        """tensormap.replace of a ``field`` of the map at an address, for each active lane.

        ``dimension``: 0 is the innermost one, for strides dimension 1. PtxError for values that no map may have.
        """
        address, value = (full_width(x, len(w)) for x in (address, value))
        active = np.ones(address.shape, bool) if M is None else M
        _check(field, dimension, value[active])
        if (address[active] % 64).any():
            raise MemoryFault(f"tensor map at 0x{int(address[active][0]):x} is not aligned to 64 bytes")
        memory = self.shared if shared else self.global_memory
        for word, mask, bits in _changes(field, dimension, value):
            at = address + address.dtype.type(4 * word & ~15)  # 16 bytes: the race detector's coarsest granule
            words = list(memory.load(w, at, _u4, 4, M))
            words[word % 4] = (words[word % 4] & _u4(~mask & 0xFFFFFFFF)) | bits
            memory.store(w, at, _u4, words, M)

    def copy(self, w, destination, source, M):
        """tensormap.cp_fenceproxy: the 128 bytes of a map from shared to global memory, once for each warp.

        The upper half, of which the hardware uses nothing, need not have been written: the DSL's grouped GEMMs do not.
        """
        first = np.zeros((len(w), 32), bool)
        first[:, 0] = True
        destination, source = (full_width(x, len(w)) for x in (destination, source))
        for at in range(0, 128, 16):
            index = self.shared.index(w, source + source.dtype.type(at), 16, first)[:, 0]
            if at >= 64 and (self.shared.states[index] != WRITTEN).any():
                continue
            words = self.shared.load(w, source + source.dtype.type(at), _u4, 4, first)
            self.global_memory.store(w, destination + destination.dtype.type(at), _u4, words, first)
