"""Bulk copies, tensor copies and remote stores have this in common: PTX ISA 9.7.9.25 (completion mechanisms).

By default a copy happens where it is issued. In the late mode it happens as late as it legally may: loads when the
scheduler has nothing else to do (their destination counts as in flight until then), stores read shared memory at the
wait_group of their bulk group.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .tensor_maps import TensorMap


@dataclass(eq=False, slots=True)
class Copy:
    """A bulk copy, tensor copy or remote store that one thread issues.

    A *load* writes shared memory and signals an mbarrier for each target (a multicast may name none); a *store*
    (``is_store``) reads shared memory, writes global memory, and belongs to a bulk group. What only some observers want
    to know is computed when they ask.
    """

    name: str  # "TMA load", "bulk store", "st.async" …
    warp: int
    lane: int
    address: int  # in shared memory, as the instruction names it
    size: int  # bytes in shared memory, of each target
    targets: list[tuple[int, int, int]] = ()  # of a load: (CTA, offset, flat index of the mbarrier)
    is_store: bool = False
    step: int = 16  # bytes of one access to a target
    repeated: bool = False  # another lane of the warp issued the same store in the same instruction
    reduces: bool = False  # a store that reads what it writes
    counted: int | None = None  # bytes that the mbarrier is told of, where padding is not counted
    tensor_map: int | None = None  # its address
    box: tuple[TensorMap, list[int]] | None = None  # of a tensor copy: the map, the first element, innermost first
    shared_source: Callable[[], Any] | None = None  # flat indices of the 16-byte chunks that are read
    global_pieces: Callable[[int], tuple[Any, int]] | None = None  # granule -> (indices, bytes of a piece)


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


class CopyUnit:
    """Loads that complete on mbarriers: they are issued, and later land at their targets."""

    def __init__(self, wave, shared, mbarriers, deferred):
        self.wave, self.events, self.shared = wave, wave.events, shared
        self.mbarriers, self.deferred = mbarriers, deferred

    def load(self, copy, read, write=None, reserves=True):
        """Issue a load. When it lands, ``read()`` gives what ``write(cta, offset, data)`` puts into each target
        (without it, bytes). ``reserves``: nobody may touch the targets until then."""
        if self.events.copy_issued:
            self.events.copy_issued(copy)
        if self.wave.late and reserves:
            for cta, offset, _ in copy.targets:
                self.shared.set_in_flight(cta, offset, copy.size)
        self.deferred.add(copy.warp, lambda: self._land(copy, read, write or self.shared.write_region))

    def _land(self, copy, read, write):
        if self.events.copy_lands:
            self.events.copy_lands(copy)
        data = read()
        counted = copy.size if copy.counted is None else copy.counted
        for cta, offset, signal in copy.targets:
            write(cta, offset, data)
            self.mbarriers.update(signal, tx=-counted)
        if self.events.copy_landed:
            self.events.copy_landed(copy)


class _Queue:
    """Bulk stores of one thread: the open group and the committed ones."""

    __slots__ = ("committed", "open")

    def __init__(self):
        self.open, self.committed = [], []


class BulkGroups:
    """Stores of bulk groups: performed at once, or (late mode) when their group is waited for."""

    def __init__(self, wave, deferred):
        self.wave, self.events, self.deferred = wave, wave.events, deferred
        self.queues = {}  # (warp, lane) -> _Queue (late mode)

    def store(self, copy, perform):
        """Issue a store; ``perform()`` reads shared memory and writes global memory."""
        if self.events.copy_issued:
            self.events.copy_issued(copy)
        if not self.wave.late:
            perform()
            return
        thread = copy.warp, copy.lane
        action = self.deferred.located(perform, self.wave.thread_text, *thread)
        self.queues.setdefault(thread, _Queue()).open.append(action)

    def _queues_of(self, group):
        for j, warp in enumerate(group.w):
            for lane in range(32):
                queue = self.queues.get((int(warp), lane))
                if queue is not None and (group.M is None or group.M[j, lane]):
                    yield queue

    def commit(self, i, group):
        """cp.async.bulk.commit_group, for each active thread."""
        if self.events.group_committed:
            self.events.group_committed("bulk", group.w)
        for queue in self._queues_of(group) if self.queues else ():
            queue.committed.append(queue.open)
            queue.open = []

    def wait(self, i, group):
        """cp.async.bulk.wait_group N: all but the N latest groups of each active thread are performed."""
        left = int(i.args[0], 0)
        if self.events.group_awaited:
            self.events.group_awaited("bulk", group.w, left, "read" in i.parts)
        for queue in self._queues_of(group) if self.queues else ():
            while len(queue.committed) > left:
                for action in queue.committed.pop(0):
                    action()

    def drain(self):
        """The end of the kernel: everything still pending happens."""
        for queue in self.queues.values():
            for actions in queue.committed + [queue.open]:
                for action in actions:
                    action()
        self.queues.clear()
