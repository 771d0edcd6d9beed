"""Global memory, which is memory of the host process: PTX ISA 5.1 (state spaces), 9.7.9 (ld, st) at run time."""

from __future__ import annotations

import bisect
import ctypes
import re

import numpy as np

from ..arrays import full_width
from ..errors import MemoryFault

GLOBAL_BASE = 0x10000
_GLOBAL_BYTES = (1 << 47) - 0x20000


class _Views(dict):
    """NumPy type -> view of memory. Printing one must not touch the memory, most of which is not mapped."""

    def __repr__(self):
        return f"<views of memory as {', '.join(map(str, self))}>"


DTYPES = [np.dtype(t) for t in (np.uint8, np.int8, np.uint16, np.int16, np.uint32, np.int32, np.uint64, np.int64,
                                np.float16, np.float32, np.float64)]  # fmt: skip
# The whole address space of the process as one array; index = address - GLOBAL_BASE. Only checked indices are used.
# Never print it, and never give it to ``ufunc.at``: NumPy copies it because the operands lie inside.
GLOBAL_BYTES = np.ctypeslib.as_array((ctypes.c_uint8 * _GLOBAL_BYTES).from_address(GLOBAL_BASE))
GLOBAL = _Views((t, GLOBAL_BYTES.view(t)) for t in DTYPES)
GLOBAL_ROWS = GLOBAL_BYTES.view(np.uint64).reshape(-1, 2)  # rows of 16 bytes


class Ranges:
    """Legal global address ranges; without a registered one, whatever is mapped in the process."""

    def __init__(self):
        self.user = {}
        self.starts = self.ends = None

    def register(self, start, size):
        """Make ``size`` bytes from address ``start`` legal."""
        self.user[start] = start + size
        self.starts = None

    def prepare(self, extra):
        """Build the sorted table of a launch; ``extra`` is a list of (start, end)."""
        found = []
        if self.user:
            found = list(self.user.items()) + list(extra)
        else:
            with open("/proc/self/maps") as maps:
                for line in maps:
                    span, permissions = line.split()[:2]
                    if "r" not in permissions:
                        continue
                    start, end = (int(x, 16) for x in span.split("-"))
                    if found and found[-1][1] == start:
                        found[-1] = (found[-1][0], end)
                    elif start < _GLOBAL_BYTES:
                        found.append((start, end))
        found.sort()
        self.starts = [start for start, _ in found]
        self.ends = [end for _, end in found]
        self._starts, self._ends = np.array(self.starts, np.uint64), np.array(self.ends, np.uint64)

    def check(self, addresses, size):
        """MemoryFault unless [address, address + size) lies in one legal range, for each address."""
        low, high = int(addresses.min()), int(addresses.max())
        j = bisect.bisect_right(self.starts, low) - 1
        if j >= 0 and high + size <= self.ends[j]:
            return
        flat = addresses.ravel()
        ends = np.append(self._ends, np.uint64(0))  # index -1: before the first range
        j = np.searchsorted(self._starts, flat, side="right").astype(np.int64) - 1
        bad = flat + np.uint64(size) > ends[j]
        if bad.any():
            address = int(flat[bad.argmax()])
            near = self._near(address)
            raise MemoryFault(f"global access out of bounds: {size} bytes at address 0x{address:x}{near}")

    def _near(self, address):
        """Where an address lies from the nearest registered range, for messages."""
        if not self.user:
            return ""
        start, end = min(self.user.items(), key=lambda found: max(found[0] - address, address - found[1], 0))
        if address < start:
            place = f"{start - address} bytes before"
        elif address < end:
            place = f"{end - address} bytes before the end of"
        else:
            place = f"{address - end} bytes after the end of" if address > end else "right after"
        return f", {place} {end - start} bytes of memory at 0x{start:x}"


class GlobalMemory:
    """Loads and stores in the legal ranges. ``w`` are warps, addresses and values arrays [n, 32] or scalars."""

    def __init__(self, wave, suspicion):
        self.wave, self.events, self.suspicion = wave, wave.events, suspicion
        self.ranges = wave.launch.ranges

    def index(self, w, address, size, M=None):
        """Indices from GLOBAL_BASE of the active lanes ([n, 32], or flat with a mask); checks ranges and alignment."""
        address = full_width(np.asarray(address, np.uint64), len(w))
        active = address if M is None else address[M]
        if active.size == 0:
            return active.astype(np.int64)
        try:
            self.ranges.check(active, size)
            if (active & np.uint64(size - 1)).any():
                bad = active[(active & np.uint64(size - 1)) != 0][0]
                raise MemoryFault(f"global access misaligned: {size} bytes at address 0x{int(bad):x}")
        except MemoryFault as error:
            lanes = np.ones((len(w), 32), bool) if M is None else M
            at = re.search(r"address 0x\w+", error.message).group()
            for j, lane in np.argwhere(lanes):
                if f"address 0x{int(address[j, lane]):x}" == at:
                    error.where = self.wave.thread_text(w[j], lane)
                    break
            raise
        return (
            active.view(np.int64) - GLOBAL_BASE if active.flags.c_contiguous else active.astype(np.int64) - GLOBAL_BASE
        )

    def load(self, w, address, dtype, count, M):
        """ld.global (PTX ISA 9.7.9): ``count`` consecutive elements a lane, as a list of arrays [n, 32] (zero in
        inactive lanes with a mask). Raises MemoryFault.
        """
        dtype = np.dtype(dtype)
        index = self.index(w, address, dtype.itemsize * count, M)
        if self.events.read_global:
            self.events.read_global(w, index, dtype.itemsize * count, M)
        first, memory = index // dtype.itemsize, GLOBAL[dtype]
        if M is None:
            return [memory[first + j] for j in range(count)]
        out = []
        for j in range(count):
            value = np.zeros(M.shape, dtype)
            value[M] = memory[first + j]
            out.append(value)
        return out

    def store(self, w, address, dtype, values, M):
        """st.global (PTX ISA 9.7.9): store a list of ``values`` ([n, 32] or scalars) as consecutive elements a lane.

        Raises MemoryFault, and UninitializedRead where a NaN follows a suspicious operand read.
        """
        dtype = np.dtype(dtype)
        index = self.index(w, address, dtype.itemsize * len(values), M)
        if self.events.write_global:
            self.events.write_global(w, index, dtype.itemsize * len(values), M, values)
        first, memory = index // dtype.itemsize, GLOBAL[dtype]
        for j, value in enumerate(values):
            if self.suspicion.found and dtype.itemsize > 1:
                self.suspicion.check(value if M is None else np.broadcast_to(value, M.shape)[M])
            memory[first + j] = value if M is None else np.broadcast_to(value, M.shape)[M]
        self.wave.global_write()

    def check(self, address, size):
        """MemoryFault unless a region of global memory is legal."""
        if size:
            self.ranges.check(np.array([address], np.uint64), size)
