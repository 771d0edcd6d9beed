"""Bulk copies at run time: PTX ISA 9.7.9.25.4 (cp.async.bulk, cp.reduce.async.bulk)."""

from __future__ import annotations

import numpy as np

from ..arrays import active_threads, full_width
from ..errors import MemoryFault
from ..ops.numerics import EXTREMES, bf16_to_f32, f32_to_bf16
from .copies import Copy, Repeated
from .global_memory import GLOBAL_BASE, GLOBAL_BYTES

_REDUCTIONS = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
               "xor": np.bitwise_xor}  # fmt: skip
_REDUCTION_TYPES = {
    "f32": np.float32,
    "f16": np.float16,
    "bf16": "bf16",
    "u32": np.uint32,
    "s32": np.int32,
    "u64": np.uint64,
    "s64": np.int64,
    "f64": np.float64,
    "b32": np.uint32,
    "b64": np.uint64,
}


def reduce_bytes(old, new, operation, dtype):
    """Elementwise reduction of two byte arrays that hold elements of ``dtype`` (NumPy's, or "bf16")."""
    function = _REDUCTIONS[operation]
    if operation in ("min", "max") and (dtype == "bf16" or np.dtype(dtype).kind == "f"):
        function = EXTREMES[operation + ".NaN"]
    old, new = np.ascontiguousarray(old), np.ascontiguousarray(new)
    if dtype == "bf16":
        a, b = bf16_to_f32(old.view(np.uint16)), bf16_to_f32(new.view(np.uint16))
        return f32_to_bf16(function(a, b)).astype(np.uint16).view(np.uint8)
    return function(old.view(dtype), new.view(dtype)).astype(dtype).view(np.uint8)


def global_bytes(start, size):
    """A region of global memory as a byte view."""
    return GLOBAL_BYTES[start - GLOBAL_BASE : start - GLOBAL_BASE + size]


def check_bulk_size(size, *addresses):
    """MemoryFault unless size and addresses of a bulk copy are multiples of 16."""
    if size % 16 or any(a % 16 for a in addresses):
        raise MemoryFault(
            f"bulk copy of {size} bytes at {', '.join(hex(a) for a in addresses)}: size and addresses must be "
            "multiples of 16"
        )


def _pieces(start, size):
    """For ``Copy.global_pieces``: the 16-byte pieces of a region of global memory."""
    return lambda granule: (np.arange(start - GLOBAL_BASE, start - GLOBAL_BASE + size, 16), 16)


class BulkCopies:
    """Copies of flat regions. Operands are [n, 32] or scalars, and each active thread copies.

    All raise MemoryFault unless sizes and addresses are multiples of 16 and inside of legal memory.
    """

    def __init__(self, wave, shared, global_memory, suspicion, copy_unit, bulk_groups):
        self.wave, self.shared, self.global_memory, self.suspicion = wave, shared, global_memory, suspicion
        self.copy_unit, self.bulk_groups = copy_unit, bulk_groups

    def load(self, w, destination, source, size, barrier, multicast, M):
        """cp.async.bulk, global to shared memory; ``multicast`` is a CTA mask or None. The bytes count on
        ``barrier``."""
        operands = [full_width(x, len(w)) for x in (destination, source, size, barrier)]
        for j, lane in active_threads(w, M):
            to, start, count, signal = (int(x[j, lane]) for x in operands)
            warp = int(w[j])
            cta, offset = self.shared.locate(warp, to)
            check_bulk_size(count, start, offset)
            self.global_memory.check(start, count)
            signal_cta, signal_offset = self.shared.locate(warp, signal)
            targets = [(cta, offset, signal_cta * self.shared.stride + signal_offset)]
            if multicast is not None:
                mask = int(full_width(multicast, len(w))[j, lane])
                targets = [
                    (c, offset, c * self.shared.stride + signal_offset) for c in self.wave.multicast_targets(warp, mask)
                ]
            self.shared.check_region(offset, count, "bulk copy")
            copy = Copy("bulk load", warp, lane, to, count, targets, global_pieces=_pieces(start, count))
            self.copy_unit.load(copy, lambda start=start, count=count: global_bytes(start, count))

    def between(self, w, destination, source, size, barrier, M):
        """cp.async.bulk from shared memory of this CTA to that of another one of the cluster."""
        operands = [full_width(x, len(w)) for x in (destination, source, size, barrier)]
        for j, lane in active_threads(w, M):
            to, where, count, signal = (int(x[j, lane]) for x in operands)
            warp = int(w[j])
            cta, offset = self.shared.locate(warp, to)
            source_cta, source_offset = self.shared.locate(warp, where)
            check_bulk_size(count, source_offset, offset)
            targets = [(cta, offset, self.shared.flat(warp, signal))]
            self.shared.check_region(offset, count, "bulk copy")
            chunks = self._chunks(source_cta, source_offset, count)
            copy = Copy("bulk copy", warp, lane, to, count, targets, shared_source=chunks)
            region = source_cta, source_offset, count
            self.copy_unit.load(copy, lambda region=region: self.shared.read_region(*region))

    def store(self, w, destination, source, size, reduction, M):
        """cp.async.bulk and cp.reduce.async.bulk, shared to global memory; ``reduction`` is (operation, type) or None.

        Raises for source bytes that were not written UninitializedRead or SyncError.
        """
        operands = [full_width(x, len(w)) for x in (destination, source, size)]
        repeated, name = Repeated(), "bulk store" if reduction is None else "bulk reduce"
        for j, lane in active_threads(w, M):
            start, where, count = (int(x[j, lane]) for x in operands)
            warp = int(w[j])
            cta, offset = self.shared.locate(warp, where)
            check_bulk_size(count, start, offset)
            self.global_memory.check(start, count)
            copy = Copy(name, warp, lane, where, count, is_store=True, repeated=repeated(j, start, offset, count),
                        reduces=reduction is not None, shared_source=self._chunks(cta, offset, count),
                        global_pieces=_pieces(start, count))  # fmt: skip
            region = cta, offset, count
            self.bulk_groups.store(copy, lambda region=region, start=start: self._store(region, start, reduction))

    def _chunks(self, cta, offset, size):
        """For ``Copy.shared_source``: the 16-byte chunks of a region of shared memory."""
        return lambda: cta * self.shared.stride + np.arange(offset, offset + size, 16)

    def _store(self, region, start, reduction):
        data = self.shared.read_region(*region)
        target = global_bytes(start, region[2])
        if self.suspicion.found:
            self.suspicion.check(data)
        if reduction:
            data = reduce_bytes(target, data, reduction[0], _REDUCTION_TYPES[reduction[1]])
        target[...] = data
        self.wave.global_write()
