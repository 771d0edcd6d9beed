"""Atomic operations at run time: PTX ISA 9.7.13 (atom, red). Lanes are served in ascending order."""

from __future__ import annotations

import numpy as np

from ..arrays import full_width
from ..ops.numerics import bf16_to_f32, f16_to_f32, round_to_bf16, round_to_f16
from .global_memory import GLOBAL

_TYPES = {"s32": np.int32, "u32": np.uint32, "b32": np.uint32, "f32": np.float32, "s64": np.int64, "u64": np.uint64,
          "b64": np.uint64, "f64": np.float64, "f16": np.float16, "b16": np.uint16}  # fmt: skip
_BYTES = {"f16": 2, "bf16": 2, "b16": 2}
_BITS = {2: np.uint16, 4: np.uint32, 8: np.uint64}
_FUNCTIONS = {"add": np.add, "max": np.maximum, "min": np.minimum, "and": np.bitwise_and, "or": np.bitwise_or,
              "xor": np.bitwise_xor}  # fmt: skip


def scalar_atomic(operation, type_name):
    """The new bits from the old bits and the operands, for operations that NumPy has no scatter for."""
    if operation == "exch":
        return lambda old, value: value
    if operation == "cas":
        return lambda old, compare, value: value if old == compare else old
    if operation == "inc":
        return lambda old, limit: np.uint32(0) if old >= limit else old + np.uint32(1)
    if operation == "dec":
        return lambda old, limit: limit if old == 0 or old > limit else old - np.uint32(1)
    function = _FUNCTIONS[operation]
    if type_name.startswith(("f16", "bf16")):
        decode, encode = (f16_to_f32, round_to_f16) if type_name.startswith("f16") else (bf16_to_f32, round_to_bf16)

        def halves(old, value):
            a, b = (np.atleast_1d(x).view(np.uint16) for x in (old, value))
            return encode(function(decode(a), decode(b))).view(np.asarray(old).dtype)[0]

        return halves
    kind = _TYPES[type_name]

    def plain(old, value):
        a, b = np.asarray(old).view(kind), np.asarray(value).view(kind)
        return np.asarray(function(a, b)).astype(kind).view(old.dtype)

    return plain


class Atomics:
    """Atomic updates of shared and global memory."""

    def __init__(self, wave, shared, global_memory, generic, suspicion):
        self.wave, self.events, self.shared, self.global_memory = wave, wave.events, shared, global_memory
        self.generic, self.suspicion = generic, suspicion

    def update(self, w, address, space, operation, type_name, values, M, wanted):
        """Perform an atomic for the active lanes; ``values`` are groups of vector elements (two groups for cas).

        Returns the old bits of each element ([n, 32], zero in inactive lanes), or Nones where not wanted.
        """
        mask = np.ones((len(w), 32), bool) if M is None else M
        if space == "generic":
            shared = self.generic.in_shared(w, address)
            if (mask & shared).any() and (mask & ~shared).any():
                parts = [self.update(w, address, space, operation, type_name, values, mask & part, wanted)
                         for part in (shared, ~shared)]  # fmt: skip
                return [a | b if wanted else None for a, b in zip(*parts, strict=True)]
            space = "shared" if (mask & shared).any() else "global_memory"
            if space == "shared":
                address = address & np.uint64(0xFFFFFFFF)
        size = _BYTES.get(type_name, 8 if type_name.endswith("64") else 4)
        count = len(values[0])
        if space == "shared":
            index = self.shared.index(w, address, size * count, mask)
            self.shared.require_written(w, index, size * count, mask)
            if self.events.write_shared:
                self.events.write_shared(w, index, size * count, mask)
            index, pool = index[mask], self.shared.views
        else:
            index, pool = self.global_memory.index(w, address, size * count, mask), GLOBAL
            if self.events.write_global:
                self.events.write_global(w, index, size * count, mask)
        if space == "global_memory" and self.suspicion.found:
            for value in values[-1]:
                self.suspicion.check(full_width(value, len(w))[mask])
        self.wave.global_write()
        operands = [[full_width(v, len(w))[mask] for v in group] for group in values]
        return [self._element(pool, index // size + j, operation, type_name, _BITS[size],
                              [group[j] for group in operands], mask, wanted) for j in range(count)]  # fmt: skip

    def _element(self, pool, index, operation, type_name, bits, operands, mask, wanted):
        kind, function = _TYPES.get(type_name), _FUNCTIONS.get(operation)
        if kind is not None and function is not None:
            table = pool[np.dtype(kind)]
            places, inverse = np.unique(index, return_inverse=True)
            if len(places) == len(index):
                old = table[index]
                table[index] = function(old, operands[0].view(kind))
                return self._spread(old.view(bits), mask, bits) if wanted else None
            if not wanted:
                # not function.at(table, ...): NumPy would copy the address space, in which the operands lie
                current = table[places]
                function.at(current, inverse, operands[0].view(kind))
                table[places] = current
                return None
        table = pool[np.dtype(bits)]
        update = scalar_atomic(operation, type_name)
        old = np.zeros(len(index), bits)
        for t in range(len(index)):
            old[t] = table[index[t]]
            table[index[t]] = update(old[t], *[group[t] for group in operands])
        return self._spread(old, mask, bits)

    @staticmethod
    def _spread(values, mask, bits):
        out = np.zeros(mask.shape, bits)
        out[mask] = values
        return out
