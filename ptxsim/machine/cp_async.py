"""cp.async at run time: PTX ISA 9.7.9.25.3 (copies of 4 to 16 bytes a lane, their groups and arrivals).

By default a copy happens where it is issued. In the late mode it happens at its wait_group, or with its arrival.
"""

from __future__ import annotations

import numpy as np

from ..arrays import full_width
from ..errors import MemoryFault
from .global_memory import GLOBAL, GLOBAL_BASE, GLOBAL_BYTES, GLOBAL_ROWS
from .shared_memory import IN_FLIGHT, WRITTEN


class _Pending:
    """One cp.async of a group of warps that has not been performed yet (late mode)."""

    __slots__ = ("group", "index", "line", "mask", "pending", "size", "source", "source_size", "w")


class CpAsync:
    """The cp.async of every warp; ``group`` counts the groups that each has committed."""

    def __init__(self, wave, shared, global_memory, mbarriers, deferred):
        self.wave, self.events, self.shared, self.global_memory = wave, wave.events, shared, global_memory
        self.mbarriers, self.deferred = mbarriers, deferred
        self.pending = []  # _Pending records, oldest first (late mode)
        self.group = np.zeros(wave.nwarps, np.int64)

    def copy(self, w, destination, source, size, source_size, M):
        """Copy ``source_size`` bytes (None: all) of ``size`` from global to shared memory; the rest becomes zero."""
        mask = np.ones((len(w), 32), bool) if M is None else M
        record = _Pending()
        record.w, record.size, record.mask, record.line = w, size, mask, self.wave.line
        record.index = self.shared.index(w, destination, size, M)
        record.source = full_width(np.asarray(source, np.uint64), len(w))
        record.source_size = None if source_size is None else full_width(source_size, len(w))
        if source_size is not None and (record.source_size[mask] > size).any():
            raise MemoryFault(f"cp.async with a source size beyond its {size} bytes")
        if self.events.cp_async:
            self.events.cp_async(w, record.index, record.source, size, record.source_size, mask)
        if not self.wave.late:
            self._perform(record, slice(None))
            return
        record.source = record.source.copy()
        record.source_size = None if source_size is None else record.source_size.copy()
        record.group = self.group[w]
        record.pending = np.ones(len(w), bool)
        self.shared.mark_rows(record.index[mask], size, IN_FLIGHT)
        self.pending.append(record)

    def _perform(self, record, rows):
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
                    self.global_memory.ranges.check(np.array([address]), int(count))
                    start = int(address) - GLOBAL_BASE
                    self.shared.bytes[at : at + int(count)] = GLOBAL_BYTES[start : start + int(count)]
        self.shared.mark_rows(index[mask], size, WRITTEN)
        self.wave.active()

    def _copy_whole(self, w, index, source, size, mask):
        if mask.all():
            found, at = self.global_memory.index(w, source, size).ravel(), index.ravel()
        else:
            found, at = self.global_memory.index(w, source, size, mask), index[mask]
        if size == 16:
            self.shared.rows[at >> 4] = GLOBAL_ROWS[found >> 4]
        else:
            kind = np.dtype(np.uint32 if size == 4 else np.uint64)
            self.shared.views[kind][at // size] = GLOBAL[kind][found // size]

    def _fill_zero(self, index, size):
        if size == 16:
            self.shared.rows[index >> 4] = 0
        else:
            self.shared.views[np.dtype(np.uint32 if size == 4 else np.uint64)][index // size] = 0

    def _retire(self, limit):
        """Perform the pending copies whose group number is below ``limit`` (an array over all warps)."""
        still = []
        line = self.wave.line
        for record in self.pending:
            rows = record.pending & (record.group < limit[record.w])
            if rows.any():
                self.wave.line = record.line
                self._perform(record, slice(None) if rows.all() else rows)
                record.pending &= ~rows
            if record.pending.any():
                still.append(record)
        self.pending = still
        self.wave.line = line

    def commit(self, i, group):
        """cp.async.commit_group."""
        self.group[group.w] += 1
        if self.events.group_committed:
            self.events.group_committed("cp.async", group.w)

    def wait(self, i, group):
        """cp.async.wait_group N leaves the N latest groups pending; wait_all also takes what is not committed."""
        left = None if i.parts[2] == "wait_all" else int(i.args[0], 0)
        if self.events.group_awaited:
            self.events.group_awaited("cp.async", group.w, left, False)
        if self.pending:
            limit = np.zeros(self.wave.nwarps, np.int64)
            limit[group.w] = self.group[group.w] + (1 if left is None else -left)
            self._retire(limit)

    def arrive(self, w, address, noinc, M):
        """Arrive at an mbarrier when all earlier cp.async of the thread are done; without .noinc the arrival adds
        itself to the pending count first."""
        index, mask = self.mbarriers.lanes(w, address, M)
        barriers, counts = np.unique(index[mask], return_counts=True)
        if self.events.cp_async_arrives:
            self.events.cp_async_arrives(w, index, mask)
        if not self.wave.late:
            if noinc:
                for at, count in zip(barriers, counts, strict=False):
                    self.mbarriers.update(at, arrive=int(count))
            return
        if not noinc:
            for at, count in zip(barriers, counts, strict=False):
                self.mbarriers.add_pending(at, int(count))
        limit = np.zeros(self.wave.nwarps, np.int64)
        limit[w] = self.group[w] + 1
        mine = []
        for record in self.pending:  # these copies now complete with the arrival
            rows = record.pending & (record.group < limit[record.w])
            if rows.any():
                mine.append((record, rows))

        def complete():
            for record, rows in mine:
                rows = rows & record.pending  # a wait_group may have been first
                if rows.any():
                    self._perform(record, rows)
                    record.pending &= ~rows
            for at, count in zip(barriers, counts, strict=False):
                self.mbarriers.update(at, arrive=int(count))

        self.deferred.add(w[0], complete)
