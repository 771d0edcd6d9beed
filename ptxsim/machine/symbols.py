"""Addresses of variables and parameters: PTX ISA 5.1 (.param, .shared, .local, .global), and mapa."""

from __future__ import annotations

import numpy as np

from ..ops.data import SHARED_WINDOW
from .shared_memory import SHARED_BASE

_u4 = np.uint32


class Symbols:
    """Where the variables of a kernel are; ``static`` is the bytes of its static shared variables, ``local_arrays``
    the host arrays that hold local memory."""

    def __init__(self, wave):
        self.wave = wave
        self.addresses = {}  # shared variable -> address
        self.static = self._place_symbols()
        self.locals, self.local_arrays = {}, []
        self._allocate_local()

    def _place_symbols(self):
        """Addresses of shared variables: static ones, then the dynamic block. Returns the static bytes."""
        offset, dynamic = 0, []
        for name, (align, size) in {**self.wave.program.k.module.shared, **self.wave.program.k.shared}.items():
            if not size:
                dynamic.append((name, align))
                continue
            offset = -(-offset // align) * align
            self.addresses[name] = SHARED_BASE + offset
            offset += size
        if dynamic:
            align = max([16] + [a for _, a in dynamic])
            offset = -(-offset // align) * align
            for name, _ in dynamic:
                self.addresses[name] = SHARED_BASE + offset
        return offset

    def _allocate_local(self):
        """Local memory: for each variable one host array with a slot for every thread of the wave."""
        threads = np.arange(self.wave.nwarps * 32, dtype=np.uint64)
        for name, (_, size) in self.wave.program.k.local.items():
            stride = -(-size // 16) * 16
            array = np.zeros(self.wave.nwarps * 32 * stride + 64, np.uint8)
            base = -(-array.ctypes.data // 64) * 64
            self.local_arrays.append(array)
            self.locals[name] = (np.uint64(base) + threads * np.uint64(stride)).reshape(self.wave.nwarps, 32)

    def param(self, offset, dtype):
        """The kernel parameter of type ``dtype`` at a byte offset."""
        return np.frombuffer(self.wave.launch.params[offset : offset + np.dtype(dtype).itemsize].tobytes(), dtype)[0]

    def param_address(self, offset):
        """Host address of the parameter bytes at an offset."""
        return np.uint64(self.wave.launch.params.ctypes.data + offset)

    def shared(self, name, s):
        """Shared address of a variable; in a cluster it carries the CTA's rank in bits 24 and up."""
        address = _u4(self.addresses[name])
        if self.wave.cluster_size == 1:
            return address
        ranks = self.wave.cta_rank[s].astype(_u4)
        return np.ascontiguousarray(np.broadcast_to((address + (ranks << _u4(24)))[:, None], (len(ranks), 32)))

    def local(self, name, s):
        """Generic address of a local variable for each thread of the warps ``s``."""
        return self.locals[name][s]

    def global_variable(self, name):
        """Address of a module variable."""
        return np.uint64(self.wave.launch.global_addresses[name])

    def mapa(self, address, rank, dtype):
        """The address of the same variable in the CTA of a rank (shared window or generic)."""
        offset = address & dtype(0xFFFFFF)
        window = address & dtype(int(SHARED_WINDOW)) if dtype is np.uint64 else dtype(0)
        return offset | (np.asarray(rank).astype(dtype) << dtype(24)) | window
