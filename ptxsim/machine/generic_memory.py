"""Generic addresses: PTX ISA 5.1, 9.7.9. Those of shared memory have a window bit, others are the host's."""

from __future__ import annotations

import numpy as np

from ..arrays import full_width
from ..ops.data import SHARED_WINDOW


class GenericMemory:
    """Accesses to generic addresses; ``local_arrays`` are the host arrays that hold local memory."""

    def __init__(self, shared, global_memory, local_arrays):
        self.shared, self.global_memory, self.local_arrays = shared, global_memory, local_arrays

    def in_shared(self, w, address):
        """Which generic addresses are of shared memory, as a bool array [n, 32]."""
        return full_width(np.asarray(address, np.uint64), len(w)) >= SHARED_WINDOW

    def load(self, w, address, dtype, count, M):
        """ld of generic addresses: each lane from shared or global memory, as the two do."""
        shared = self.in_shared(w, address)
        if shared.all():
            return self.shared.load(w, address & np.uint64(0xFFFFFFFF), dtype, count, M)
        if not shared.any():
            return self.global_memory.load(w, address, dtype, count, M)
        active = np.ones_like(shared) if M is None else M
        inside = self.shared.load(w, address & np.uint64(0xFFFFFFFF), dtype, count, active & shared)
        outside = self.global_memory.load(w, address, dtype, count, active & ~shared)
        return [np.where(shared, p, q) for p, q in zip(inside, outside, strict=False)]

    def store(self, w, address, dtype, values, M):
        """st to generic addresses: each lane to shared or global memory, as the two do."""
        shared = self.in_shared(w, address)
        active = np.ones_like(shared) if M is None else M
        if (active & shared).any():
            self.shared.store(w, address & np.uint64(0xFFFFFFFF), dtype, values, active & shared)
        if (active & ~shared).any():
            self.global_memory.store(w, address, dtype, values, active & ~shared)

    def is_space(self, w, space, address):
        """isspacep: everything that is neither shared nor local is global."""
        address = full_width(np.asarray(address, np.uint64), len(w))
        shared = address >= SHARED_WINDOW
        if space.startswith("shared"):
            return shared
        local = np.zeros(address.shape, bool)
        for array in self.local_arrays:
            start = np.uint64(array.ctypes.data)
            local |= (address >= start) & (address < start + np.uint64(len(array)))
        return local if space == "local" else ~shared & ~local
