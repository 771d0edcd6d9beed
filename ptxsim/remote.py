"""Asynchronous stores and reductions to the shared memory of a cluster: PTX ISA 9.7.9.13 (st.async), 9.7.13.8
(red.async). They complete as transactions on an mbarrier, like bulk copies; in the late mode as late as is legal.
"""

from __future__ import annotations

import numpy as np

from .atomics import scalar_atomic
from .errors import MemoryFault
from .memory import IN_FLIGHT, WRITTEN
from .warps import full_width


class RemoteMixin:
    """st.async and red.async of ``Machine``. Needs memory, mbarriers, the copies' addressing and ``defer``."""

    def store_async(self, w, address, values, barrier, reduction, M):
        """Store ``values`` (a list of [n, 32], uint32 or uint64) for each active lane, counting bytes on ``barrier``.

        ``reduction``: (operation, type) of red.async, or None. MemoryFault for misaligned or illegal addresses,
        UninitializedRead for a reduction into bytes that nothing wrote.
        """
        n = len(w)
        kind = np.asarray(values[0]).dtype
        words = np.stack([full_width(x, n) for x in values], axis=-1)
        size = words.shape[-1] * kind.itemsize
        address, barrier = full_width(address, n), full_width(barrier, n)
        name = "red.async" if reduction else "st.async"
        for j, lane in self.active_threads(w, M):
            cta, offset = self.cta_and_offset(w[j], address[j, lane])
            signal_cta, signal_offset = self.cta_and_offset(w[j], barrier[j, lane])
            self.region(offset, size, "asynchronous store")
            if offset % size:
                raise MemoryFault(f"asynchronous store of {size} bytes at 0x{offset:x}: misaligned")
            signal = signal_cta * self.smem_stride + signal_offset
            if self.races is not None:
                self.races.bulk_load(w[j], cta, offset, size, signal, step=size, name=name)
            if self.lazy and not reduction:
                self.shadow_of[cta][offset : offset + size] = IN_FLIGHT
                self.ready_rows[(cta * self.smem_stride + offset) >> 4] = False

            def perform(cta=cta, offset=offset, data=words[j, lane], signal=signal):
                target = self.shared_of[cta][offset : offset + size].view(kind)
                if reduction:
                    self._read_region(cta, offset, size)
                    target[0] = scalar_atomic(*reduction)(target[0], data[0])
                else:
                    target[...] = data
                    self.shadow_of[cta][offset : offset + size] = WRITTEN
                self.mbar_update(signal, tx=-size)

            self.defer(w[j], perform)
