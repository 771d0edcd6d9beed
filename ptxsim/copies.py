"""Asynchronous copies at run time: PTX ISA 9.7.9.25 (cp.async, cp.async.bulk and their completion mechanisms).

By default a copy happens where it is issued. In the late mode it happens as late as it legally may: cp.async at its
wait_group, bulk loads when the scheduler has nothing else to do (their destination counts as in flight until then),
bulk stores read shared memory at their wait_group.
"""

from __future__ import annotations

import numpy as np

from .errors import MemoryFault, SimError, SyncError
from .memory import GLOBAL, GLOBAL_BASE, GLOBAL_BYTES, GLOBAL_ROWS, IN_FLIGHT, WRITTEN
from .numerics import EXTREMES, bf16_to_f32, f32_to_bf16
from .sites import BULK_READ, CP_ASYNC
from .warps import full_width

_ALL_WRITTEN_ROW = np.uint64(0x0101010101010101 * WRITTEN)
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


def _pieces(start, size):
    """Indices of the 16-byte pieces of a region of global memory."""
    return np.arange(start - GLOBAL_BASE, start - GLOBAL_BASE + size, 16)


class Repeated:
    """Whether the same operation has been asked about before: lanes of a warp may issue one together."""

    def __init__(self):
        self.seen = set()

    def __call__(self, *operation):
        key = tuple(tuple(x) if isinstance(x, list) else x for x in operation)
        if key in self.seen:
            return True
        self.seen.add(key)
        return False


class _CpAsync:
    """One cp.async of a group of warps that has not been performed yet (late mode)."""

    __slots__ = ("group", "index", "line", "mask", "pending", "size", "source", "source_size", "w")


class _Queue:
    """Bulk stores of one thread: the open group and the committed ones."""

    __slots__ = ("committed", "open")

    def __init__(self):
        self.open, self.committed = [], []


class CopyMixin:
    """Copies of ``Machine``.

    Needs memory, mbarriers, ranges, lazy and ``defer``; owns cp_async_pending, cp_async_group and bulk_queues.
    """

    def init_copies(self):
        self.cp_async_pending = []  # _CpAsync records, oldest first (late mode)
        self.cp_async_group = np.zeros(self.nwarps, np.int64)  # groups committed so far
        self.bulk_queues = {}  # (warp, lane) -> _Queue (late mode)

    def mark_rows(self, index, size, state):
        """Set the shadow of pieces of ``size`` bytes at flat byte indices."""
        if size == 16:
            rows = index >> 4
            if state == IN_FLIGHT and (self.shadow_rows[rows] == _ALL_WRITTEN_ROW * np.uint64(IN_FLIGHT)).any():
                raise SyncError("a second asynchronous copy to bytes that one is still writing")
            self.shadow_rows[rows] = _ALL_WRITTEN_ROW * np.uint64(state)
            self.ready_rows[rows] = state == WRITTEN
        else:
            pattern = int.from_bytes(bytes([state] * size), "little")
            self.shadow[size][index // size] = pattern
            self.ready_rows[index >> 4] = False

    # ---- cp.async ---------------------------------------------------------------------------------
    def cp_async(self, w, destination, source, size, source_size, M):
        """Copy ``source_size`` bytes (None: all) of ``size`` from global to shared memory; the rest becomes zero."""
        mask = np.ones((len(w), 32), bool) if M is None else M
        record = _CpAsync()
        record.w, record.size, record.mask, record.line = w, size, mask, self.line
        record.index = self.shared_index(w, destination, size, M)
        record.source = full_width(np.asarray(source, np.uint64), len(w))
        record.source_size = None if source_size is None else full_width(source_size, len(w))
        if source_size is not None and (record.source_size[mask] > size).any():
            raise MemoryFault(f"cp.async with a source size beyond its {size} bytes")
        if self.races is not None:
            self.races.cp_async(w, record.index, record.source, size, record.source_size, mask)
        if not self.lazy:
            self._perform_cp_async(record, slice(None))
            return
        record.source = record.source.copy()
        record.source_size = None if source_size is None else record.source_size.copy()
        record.group = self.cp_async_group[w]
        record.pending = np.ones(len(w), bool)
        self.mark_rows(record.index[mask], size, IN_FLIGHT)
        self.cp_async_pending.append(record)

    def _perform_cp_async(self, record, rows):
        size, mask, index, source = record.size, record.mask[rows], record.index[rows], record.source[rows]
        w = record.w[rows]
        if record.source_size is None:
            self._copy_whole(w, index, source, size, mask)
        else:
            wanted = record.source_size[rows]
            whole, empty = mask & (wanted == size), mask & (wanted == 0)
            self._copy_whole(w, index, source, size, whole)
            self._fill_zero(index[empty], size)
            partial = mask & ~whole & ~empty
            if partial.any():
                self._fill_zero(index[partial], size)
                addresses = source[partial]
                for at, address, count in zip(index[partial], addresses, wanted[partial], strict=False):
                    self.ranges.check(np.array([address]), int(count))
                    start = int(address) - GLOBAL_BASE
                    self.S1[at : at + int(count)] = GLOBAL_BYTES[start : start + int(count)]
        self.mark_rows(index[mask], size, WRITTEN)
        self.last_activity = self.steps

    def _copy_whole(self, w, index, source, size, mask):
        if mask.all():
            found, at = self.global_index(w, source, size).ravel(), index.ravel()
        else:
            found, at = self.global_index(w, source, size, mask), index[mask]
        if size == 16:
            self.shared_rows[at >> 4] = GLOBAL_ROWS[found >> 4]
        else:
            kind = np.dtype(np.uint32 if size == 4 else np.uint64)
            self.S[kind][at // size] = GLOBAL[kind][found // size]

    def _fill_zero(self, index, size):
        if size == 16:
            self.shared_rows[index >> 4] = 0
        else:
            self.S[np.dtype(np.uint32 if size == 4 else np.uint64)][index // size] = 0

    def _retire_cp_async(self, limit):
        """Perform the pending copies whose group number is below ``limit`` (an array over all warps)."""
        still = []
        line = self.line
        for record in self.cp_async_pending:
            rows = record.pending & (record.group < limit[record.w])
            if rows.any():
                self.line = record.line
                self._perform_cp_async(record, slice(None) if rows.all() else rows)
                record.pending &= ~rows
            if record.pending.any():
                still.append(record)
        self.cp_async_pending = still
        self.line = line

    def h_cp_async_commit(self, i, block, group):
        """cp.async.commit_group."""
        self.cp_async_group[group.w] += 1
        if self.races is not None:
            self.races.commit(CP_ASYNC, group.w)
        self.groups.append(group)

    def h_cp_async_wait(self, i, block, group):
        """cp.async.wait_group N leaves the N latest groups pending; wait_all also takes what is not committed."""
        if self.races is not None:
            self.races.wait(CP_ASYNC, group.w, None if i.parts[2] == "wait_all" else int(i.args[0], 0))
        if self.cp_async_pending:
            limit = np.zeros(self.nwarps, np.int64)
            everything = i.parts[2] == "wait_all"
            limit[group.w] = self.cp_async_group[group.w] + (1 if everything else -int(i.args[0], 0))
            self._retire_cp_async(limit)
        self.groups.append(group)

    def cp_async_arrive(self, w, address, noinc, M):
        """Arrive at an mbarrier when all earlier cp.async of the thread are done; without .noinc the arrival adds
        itself to the pending count first."""
        index, mask = self._barrier_lanes(w, address, M)
        barriers, counts = np.unique(index[mask], return_counts=True)
        if self.races is not None:
            self.races.cp_async_arrive(w, index, mask)
        if not self.lazy:
            if noinc:
                for at, count in zip(barriers, counts, strict=False):
                    self.mbar_update(at, arrive=int(count))
            return
        if not noinc:
            for at, count in zip(barriers, counts, strict=False):
                self.mbar_add_pending(at, int(count))
        limit = np.zeros(self.nwarps, np.int64)
        limit[w] = self.cp_async_group[w] + 1
        mine = []
        for record in self.cp_async_pending:  # these copies now complete with the arrival
            rows = record.pending & (record.group < limit[record.w])
            if rows.any():
                mine.append((record, rows))

        def complete():
            for record, rows in mine:
                rows = rows & record.pending  # a wait_group may have been first
                if rows.any():
                    self._perform_cp_async(record, rows)
                    record.pending &= ~rows
            for at, count in zip(barriers, counts, strict=False):
                self.mbar_update(at, arrive=int(count))

        self.defer(w[0], complete)

    # ---- cp.async.bulk ----------------------------------------------------------------------------
    def active_threads(self, w, M):
        """(row in w, lane) of the threads that execute."""
        if M is None:
            return [(j, lane) for j in range(len(w)) for lane in range(32)]
        return [(int(j), int(lane)) for j, lane in np.argwhere(M)]

    def cta_and_offset(self, warp, address):
        """Shared address as a CTA of the wave and a byte offset."""
        address = int(address)
        if self.cluster_size == 1:
            return int(self.cta_of[warp]), address
        if address >> 24 >= self.cluster_size:
            raise MemoryFault(f"shared address 0x{address:x}: the cluster has {self.cluster_size} CTAs")
        return int(self.cluster_first[warp]) + (address >> 24), address & 0xFFFFFF

    def multicast_targets(self, warp, mask):
        """CTAs of the wave that a 16-bit multicast mask names; MemoryFault for ranks outside of the cluster."""
        if mask >> self.cluster_size:
            raise MemoryFault(f"multicast mask 0x{mask:x}: the cluster has {self.cluster_size} CTAs")
        return [int(self.cluster_first[warp]) + r for r in range(self.cluster_size) if mask >> r & 1]

    def _bulk_size(self, size, *addresses):
        if size % 16 or any(a % 16 for a in addresses):
            raise MemoryFault(f"bulk copy of {size} bytes at {', '.join(hex(a) for a in addresses)}: size and "
                              f"addresses must "
                              "be multiples of 16")  # fmt: skip

    def _check_global(self, address, size):
        if size:
            self.ranges.check(np.array([address], np.uint64), size)

    def bulk_load(self, w, destination, source, size, barrier, multicast, M):
        """cp.async.bulk, global to shared memory (PTX ISA 9.7.9.25): ``size`` bytes for each active thread.

        Operands are [n, 32] or scalars; ``multicast`` is a CTA mask or None. The bytes count on ``barrier``.
        Raises MemoryFault unless size and addresses are multiples of 16 and inside legal memory.
        """
        operands = [full_width(x, len(w)) for x in (destination, source, size, barrier)]
        for j, lane in self.active_threads(w, M):
            to, start, count, signal = (int(x[j, lane]) for x in operands)
            cta, offset = self.cta_and_offset(w[j], to)
            self._bulk_size(count, start, offset)
            self._check_global(start, count)
            signal_cta, signal_offset = self.cta_and_offset(w[j], signal)
            targets = [(cta, signal_cta)]
            if multicast is not None:
                mask = int(full_width(multicast, len(w))[j, lane])
                targets = [(c, c) for c in self.multicast_targets(w[j], mask)]
            self.region(offset, count, "bulk copy")
            if self.races is not None and count:
                for c, signal_cta in targets:
                    self.races.bulk_load(w[j], c, offset, count, signal_cta * self.smem_stride + signal_offset)
                self.races.bulk_read(w[j], targets[0][1] * self.smem_stride + signal_offset, _pieces(start, count), 16)
            if self.lazy:
                for c, _ in targets:
                    self.set_in_flight(c, offset, count)

            def perform(targets=targets, offset=offset, start=start, count=count, signal_offset=signal_offset):
                data = GLOBAL_BYTES[start - GLOBAL_BASE : start - GLOBAL_BASE + count]
                for c, signal_cta in targets:
                    self.shared_of[c][offset : offset + count] = data
                    self.shadow_of[c][offset : offset + count] = WRITTEN
                    self.mbar_update(signal_cta * self.smem_stride + signal_offset, tx=-count)

            self.defer(w[j], perform)

    def _read_region(self, cta, offset, size):
        self.region(offset, size, "bulk copy")
        state = self.shadow_of[cta][offset : offset + size]
        if (state != WRITTEN).any():
            self.raise_unwritten(cta * self.smem_stride + offset + int((state != WRITTEN).argmax()))
        return self.shared_of[cta][offset : offset + size]

    def bulk_store(self, w, destination, source, size, reduction, M):
        """cp.async.bulk and cp.reduce.async.bulk, shared to global memory: ``size`` bytes for each active thread.

        ``reduction`` is (operation, type) or None. Raises MemoryFault as ``bulk_load``, and for source bytes that were
        not written UninitializedRead or SyncError.
        """
        operands = [full_width(x, len(w)) for x in (destination, source, size)]
        repeated = Repeated()
        for j, lane in self.active_threads(w, M):
            start, where, count = (int(x[j, lane]) for x in operands)
            cta, offset = self.cta_and_offset(w[j], where)
            self._bulk_size(count, start, offset)
            self._check_global(start, count)
            if self.races is not None and count and not repeated(j, start, offset, count):
                self.races.bulk_store(w[j], cta * self.smem_stride + np.arange(offset, offset + count, 16),
                                      _pieces(start, count), 16, reduction is not None)  # fmt: skip

            def perform(cta=cta, offset=offset, start=start, count=count):
                data = self._read_region(cta, offset, count)
                target = GLOBAL_BYTES[start - GLOBAL_BASE : start - GLOBAL_BASE + count]
                if self.suspect is not None:
                    self.check_global_values(data)
                if reduction:
                    data = reduce_bytes(target, data, reduction[0], _REDUCTION_TYPES[reduction[1]])
                target[...] = data
                self.note_global_write()

            self.bulk_add(w[j], lane, perform)

    def bulk_shared(self, w, destination, source, size, barrier, M):
        """Shared memory of this CTA to that of another one of the cluster."""
        operands = [full_width(x, len(w)) for x in (destination, source, size, barrier)]
        for j, lane in self.active_threads(w, M):
            to, where, count, signal = (int(x[j, lane]) for x in operands)
            cta, offset = self.cta_and_offset(w[j], to)
            source_cta, source_offset = self.cta_and_offset(w[j], where)
            self._bulk_size(count, source_offset, offset)
            signal_cta, signal_offset = self.cta_and_offset(w[j], signal)
            self.region(offset, count, "bulk copy")
            if self.races is not None and count:
                source_rows = source_cta * self.smem_stride + np.arange(source_offset, source_offset + count, 16)
                self.races.bulk_load(w[j], cta, offset, count, signal_cta * self.smem_stride + signal_offset,
                                     source_rows)  # fmt: skip
            if self.lazy:
                self.set_in_flight(cta, offset, count)

            def perform(cta=cta, offset=offset, source_cta=source_cta, source_offset=source_offset, count=count,
                        at=signal_cta * self.smem_stride + signal_offset):  # fmt: skip
                self.shared_of[cta][offset : offset + count] = self._read_region(source_cta, source_offset, count)
                self.shadow_of[cta][offset : offset + count] = WRITTEN
                self.mbar_update(at, tx=-count)

            self.defer(w[j], perform)

    # ---- bulk groups ------------------------------------------------------------------------------
    def bulk_add(self, warp, lane, action):
        """A copy from shared memory: performed at once, or (late mode) when its group is waited for."""
        if not self.lazy:
            action()
            return
        line, warp = self.line, int(warp)

        def later():
            self.line = line
            try:
                action()
            except SimError as error:
                raise error.located(line, self.ptx_line(line), self.thread_text(warp, lane)) from None

        self.bulk_queues.setdefault((warp, lane), _Queue()).open.append(later)

    def _queues(self, group):
        for j, warp in enumerate(group.w):
            for lane in range(32):
                queue = self.bulk_queues.get((int(warp), lane))
                if queue is not None and (group.M is None or group.M[j, lane]):
                    yield queue

    def h_bulk_commit(self, i, block, group):
        """cp.async.bulk.commit_group, for each active thread."""
        if self.races is not None:
            self.races.commit(BULK_READ, group.w)
        for queue in self._queues(group) if self.bulk_queues else ():
            queue.committed.append(queue.open)
            queue.open = []
        self.groups.append(group)

    def h_bulk_wait(self, i, block, group):
        """cp.async.bulk.wait_group N: all but the N latest groups of each active thread are performed."""
        keep = int(i.args[0], 0)
        if self.races is not None:
            self.races.bulk_wait(group.w, keep, "read" in i.parts)
        for queue in self._queues(group) if self.bulk_queues else ():
            while len(queue.committed) > keep:
                for action in queue.committed.pop(0):
                    action()
        self.groups.append(group)

    def bulk_drain(self):
        """The end of the kernel: everything still pending happens."""
        for queue in self.bulk_queues.values():
            for actions in queue.committed + [queue.open]:
                for action in actions:
                    action()
        self.bulk_queues.clear()
