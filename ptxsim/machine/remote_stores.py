"""Asynchronous stores and reductions to the shared memory of a cluster: PTX ISA 9.7.9.13 (st.async), 9.7.13.8
(red.async). They complete as transactions on an mbarrier, like bulk copies; in the late mode as late as is legal.
"""

from __future__ import annotations

import numpy as np

from ..arrays import active_threads, full_width
from ..errors import MemoryFault
from .atomics import scalar_atomic
from .copies import Copy


class RemoteStores:
    """st.async and red.async."""

    def __init__(self, shared, copy_unit):
        self.shared, self.copy_unit = shared, copy_unit

    def store(self, w, address, values, barrier, reduction, M):
        """Store ``values`` (a list of [n, 32], uint32 or uint64) for each active lane, counting bytes on ``barrier``.

        ``reduction``: (operation, type) of red.async, or None. MemoryFault for misaligned or illegal addresses,
        UninitializedRead for a reduction into bytes that nothing wrote.
        """
        n = len(w)
        kind = np.asarray(values[0]).dtype
        words = np.stack([full_width(x, n) for x in values], axis=-1)
        size = words.shape[-1] * kind.itemsize
        address, barrier = full_width(address, n), full_width(barrier, n)

        def reduce(cta, offset, data):
            target = self.shared.read_region(cta, offset, size).view(kind)
            target[0] = scalar_atomic(*reduction)(target[0], data.view(kind)[0])

        for j, lane in active_threads(w, M):
            warp = int(w[j])
            cta, offset = self.shared.locate(warp, address[j, lane])
            targets = [(cta, offset, self.shared.flat(warp, barrier[j, lane]))]
            self.shared.check_region(offset, size, "asynchronous store")
            if offset % size:
                raise MemoryFault(f"asynchronous store of {size} bytes at 0x{offset:x}: misaligned")
            name = "red.async" if reduction else "st.async"
            copy = Copy(name, warp, lane, int(address[j, lane]), size, targets, step=size)
            data = np.ascontiguousarray(words[j, lane]).view(np.uint8)
            self.copy_unit.load(copy, lambda data=data: data, reduce if reduction else None, reserves=not reduction)
