"""Tensor copies at run time: PTX ISA 9.7.9.27 (cp.async.bulk.tensor, cp.reduce.async.bulk.tensor)."""

from __future__ import annotations

import functools

import numpy as np

from ..arrays import active_threads, full_width
from ..errors import MemoryFault, PtxError
from .bulk_copies import reduce_bytes
from .copies import Copy, Repeated
from .global_memory import GLOBAL_BASE, GLOBAL_BYTES
from .operands import swizzle
from .shared_memory import WRITTEN
from .tensor_maps import decode


@functools.lru_cache(maxsize=2048)
def _chunks(base, size, span, atom):
    """16-byte chunk numbers of a swizzled box that starts ``base`` bytes after a multiple of 1024."""
    return swizzle(base + np.arange(0, size, 16), span, atom) >> 4


class TensorCopies:
    """Copies of boxes of tensors. Operands are [n, 32] or scalars, and each active thread copies a box.

    ``coordinates`` are elements, innermost first; ``address`` is that of the tensor map. What lies outside of the
    tensor reads as zero and is not written. MemoryFault, UninitializedRead, SyncError or PtxError.
    """

    def __init__(self, wave, shared, global_memory, suspicion, copy_unit, bulk_groups):
        self.wave, self.shared, self.global_memory, self.suspicion = wave, shared, global_memory, suspicion
        self.copy_unit, self.bulk_groups = copy_unit, bulk_groups

    def tensor_map(self, address, rank):
        """The ``TensorMap`` at a global address."""
        address = int(address)
        self.global_memory.check(address, 128)
        if address % 64:
            raise MemoryFault(f"tensor map at 0x{address:x} is not aligned to 64 bytes")
        found = decode(GLOBAL_BYTES[address - GLOBAL_BASE : address - GLOBAL_BASE + 128].tobytes())
        if found.rank != rank:
            raise PtxError(f"{rank} coordinates for a tensor map of rank {found.rank}")
        return found

    def load(self, w, destination, address, coordinates, barrier, multicast, M, pair):
        """Global to shared memory; ``multicast`` is a CTA mask or None. The bytes count on ``barrier``. ``pair``:
        .cta_group::2, the barrier may be in the other CTA of the pair."""
        n = len(w)
        destination, address, barrier = (full_width(x, n) for x in (destination, address, barrier))
        coordinates = [full_width(c, n) for c in coordinates]
        stride = self.shared.stride
        for j, lane in active_threads(w, M):
            warp = int(w[j])
            t = self.tensor_map(address[j, lane], len(coordinates))
            start = t.start([int(x[j, lane]) for x in coordinates])
            cta, offset = self.shared.locate(warp, destination[j, lane])
            signal_cta, signal_offset = self.shared.locate(warp, barrier[j, lane])
            self._check_box(t, offset)
            targets = [(cta, offset, signal_cta * stride + signal_offset)]
            if multicast is not None:
                # the barrier at the same offset of each destination; for a pair, in the CTA of the destination's
                # pair that has the parity of the barrier's
                first, parity = int(self.wave.cluster_first[warp]), int(barrier[j, lane]) >> 24 & 1
                targets = [
                    (c, offset, (first + (c - first & ~1 | parity) if pair else c) * stride + signal_offset)
                    for c in self.wave.multicast_targets(warp, int(full_width(multicast, n)[j, lane]))
                ]
            size = int(np.prod(t.box_shape))
            copy = Copy("TMA load", warp, lane, int(destination[j, lane]), size, targets,
                        counted=size * t.element_bytes // (t.element_bytes + t.padding),
                        tensor_map=int(address[j, lane]), box=(t, start),
                        global_pieces=functools.partial(self._box_pieces, t, start))  # fmt: skip
            self.copy_unit.load(copy, functools.partial(self._read_box, t, start),
                                functools.partial(self._fill_box, t))  # fmt: skip

    def store(self, w, address, coordinates, source, reduction, M):
        """Shared to global memory; ``reduction`` is an operation or None."""
        n = len(w)
        source, address = full_width(source, n), full_width(address, n)
        coordinates = [full_width(c, n) for c in coordinates]
        repeated, name = Repeated(), "TMA store" if reduction is None else "TMA reduce"
        for j, lane in active_threads(w, M):
            warp = int(w[j])
            t = self.tensor_map(address[j, lane], len(coordinates))
            start = t.start([int(x[j, lane]) for x in coordinates])
            cta, offset = self.shared.locate(warp, source[j, lane])
            self._check_box(t, offset)
            if t.padding:
                raise PtxError("a tensor store from elements with padding is not simulated")
            # FlashAttention-4 lets all lanes of a warp issue the same store
            copy = Copy(name, warp, lane, int(source[j, lane]), int(np.prod(t.box_shape)),
                        is_store=True, repeated=repeated(j, t, start, offset), reduces=reduction is not None,
                        tensor_map=int(address[j, lane]), box=(t, start),
                        shared_source=functools.partial(self._inner_chunks, t, start, cta, offset),
                        global_pieces=functools.partial(self._box_pieces, t, start))  # fmt: skip
            self.bulk_groups.store(copy, functools.partial(self._store_box, t, start, cta, offset, reduction))

    # ---- boxes ----------------------------------------------------------------------------------------------------
    def _box_pieces(self, t, start, granule):
        """(indices, bytes) of the aligned pieces of global memory that hold the part of a box inside of the tensor."""
        low = [max(s, 0) for s in start]
        high = [min(s + b, e) for s, b, e in zip(start, t.box, t.extents, strict=True)]
        if any(a >= b for a, b in zip(low, high, strict=True)):
            return np.zeros(0, np.int64), 16
        first = t.address - GLOBAL_BASE + low[0] * t.element_bytes
        last = t.address - GLOBAL_BASE + high[0] * t.element_bytes
        size = 16 if first % 16 == 0 and (last - first) % 16 == 0 and not any(s % 16 for s in t.strides) else (
            granule)  # fmt: skip
        index = np.arange(first // size * size, last, size)
        for stride, a, b in zip(t.strides, low[1:], high[1:], strict=True):
            index = (np.arange(a, b)[:, None] * stride + index).ravel()
        return index, size

    def _inside(self, t, start):
        """(byte view of the part of a box that lies in the tensor, slices of that part in the box without padding);
        (None, None) if there is none."""
        slices, shape, strides, offset = [], [], [], 0
        for d, stride in enumerate((t.element_bytes,) + t.strides):
            low, high = max(start[d], 0), min(start[d] + t.box[d], t.extents[d])
            if high <= low:
                return None, None
            slices.append(slice(low - start[d], high - start[d]))
            shape.append(high - low)
            strides.append(stride)
            offset += low * stride
        shape[0] *= t.element_bytes
        strides[0] = 1
        slices[0] = slice(slices[0].start * t.element_bytes, slices[0].stop * t.element_bytes)
        first = t.address + offset
        last = first + sum((n - 1) * s for n, s in zip(shape, strides, strict=False))
        self.global_memory.ranges.check(np.array([first, last], np.uint64), 1)
        view = np.lib.stride_tricks.as_strided(GLOBAL_BYTES[first - GLOBAL_BASE :], shape=shape[::-1],
                                               strides=strides[::-1])  # fmt: skip
        return view, tuple(slices[::-1])

    def _box_rows(self, t, cta, offset, table):
        """(rows of 16 bytes of ``table``, row numbers) of a box in a CTA's shared memory."""
        size = int(np.prod(t.box_shape))
        base = offset & ~1023
        return table[cta].reshape(-1, 16), _chunks(offset - base, size, t.span, t.atom) + (base >> 4)

    def _inner_chunks(self, t, start, cta, offset):
        """Flat indices of the 16-byte chunks of shared memory that hold the part of a box inside of the tensor."""
        _, numbers = self._box_rows(t, cta, offset, self.shared.of_cta)
        inside = np.zeros(t.box_shape, bool)
        inside[tuple(slice(max(-s, 0) * n, max(min(b, e - s), 0) * n) for s, b, e, n in reversed(list(zip(
            start, t.box, t.extents, (t.element_bytes,) + (1,) * (t.rank - 1), strict=True))))] = True  # fmt: skip
        return numbers[inside.reshape(-1, 16).any(1)] * 16 + cta * self.shared.stride

    def _check_box(self, t, offset):
        size = int(np.prod(t.box_shape))
        self.shared.check_region(offset, size, "tensor copy")
        if offset % 128:
            raise MemoryFault(f"tensor copy at shared address 0x{offset:x}, which is not aligned to 128 bytes")
        if size % 16:
            raise MemoryFault(f"tensor copy of a box of {size} bytes, not a multiple of 16")

    def _read_box(self, t, start):
        """A box as rows of 16 bytes, with its padding."""
        box = np.zeros((*t.box_shape[:-1], t.box[0], t.element_bytes + t.padding), np.uint8)
        view, slices = self._inside(t, start)
        if view is not None:
            bare = np.zeros((*t.box_shape[:-1], t.box[0] * t.element_bytes), np.uint8)
            bare[slices] = view
            box[..., : t.element_bytes] = bare.reshape(*box.shape[:-1], t.element_bytes)
        return box.reshape(-1, 16)

    def _fill_box(self, t, cta, offset, data):
        rows, numbers = self._box_rows(t, cta, offset, self.shared.of_cta)
        rows[numbers] = data
        self._box_rows(t, cta, offset, self.shared.states_of)[0][numbers] = WRITTEN

    def _store_box(self, t, start, cta, offset, reduction):
        view, slices = self._inside(t, start)
        if view is None:
            return
        state, numbers = self._box_rows(t, cta, offset, self.shared.states_of)
        if (state[numbers].reshape(t.box_shape)[slices] != WRITTEN).any():  # only the part inside of the tensor counts
            bad = np.zeros(t.box_shape, bool)
            bad[slices] = state[numbers].reshape(t.box_shape)[slices] != WRITTEN
            at = int(bad.argmax())
            self.shared.raise_unwritten(cta * self.shared.stride + int(numbers[at // 16]) * 16 + at % 16)
        rows, numbers = self._box_rows(t, cta, offset, self.shared.of_cta)
        data = rows[numbers].reshape(t.box_shape)[slices]
        if self.suspicion.found and t.element_bytes > 1:
            self.suspicion.check(data.copy().view(np.uint16 if t.element_bytes == 2 else np.uint32))
        view[...] = data if reduction is None else reduce_bytes(view, data, reduction, t.element)
        self.wave.global_write()
