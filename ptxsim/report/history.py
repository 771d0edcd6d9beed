"""What the warps of a wave did last, for the account of a failure: ``report.account``."""

from __future__ import annotations

import numpy as np

from ..errors import SimError
from .account import account
from .narrator import Narrator

DEPTH = 16  # events kept for each warp
_KEPT = 1 << 14  # events kept in all, before those that no warp refers to are dropped


class Event:
    """Something that the warps ``w`` did at the steps ``since`` (an array, one for each) and a PTX line; ``text(j)``
    says what warp ``w[j]`` did.

    ``until`` holds for a wait the steps at which the warps went on (-1: they have not), and is None otherwise;
    ``gave_up`` says for which warps the wait returned false.
    """

    __slots__ = ("gave_up", "line", "since", "text", "until", "w")

    def __init__(self, step, line, w, text, waits=False):
        self.since, self.line, self.w, self.text = np.full(len(w), step), line, w, text
        self.until, self.gave_up = (np.full(len(w), -1), np.zeros(len(w), bool)) if waits else (None, None)

    def row(self, warp):
        """Index of a warp in ``w``."""
        return int(np.searchsorted(self.w, warp))


class Latest:
    """The latest ``DEPTH`` events of each warp."""

    def __init__(self, warps):
        self.events, self.next = {}, 0  # number -> event
        self.numbers = np.full((warps, DEPTH), -1)
        self.count = np.zeros(warps, np.int64)

    def add(self, event):
        """Append an event to those of its warps; returns its number."""
        number = self.next
        self.next += 1
        self.events[number] = event
        at = self.count[event.w]
        self.numbers[event.w, at % DEPTH] = number
        self.count[event.w] = at + 1
        if len(self.events) > _KEPT:
            kept = np.unique(self.numbers)
            self.events = {n: self.events[n] for n in kept[kept >= 0].tolist()}
        return number

    def wait_again(self, event):
        """Where warps gave up this wait and begin it again, it goes on since then: take their latest event back."""
        latest = self.numbers[event.w, (self.count[event.w] - 1) % DEPTH]
        for number in np.unique(latest).tolist():
            before = self.events.get(number)
            rows = np.flatnonzero(latest == number)
            if before is None or before.until is None or before.line != event.line:
                continue
            old = np.searchsorted(before.w, event.w[rows])
            if before.gave_up[old].all() and before.text(int(old[0])) == event.text(int(rows[0])):
                event.since[rows] = before.since[old]
                self.count[event.w[rows]] -= 1

    def of(self, warp):
        """Events of a warp, oldest first."""
        return [self.events[n] for n in np.sort(self.numbers[warp]).tolist() if n >= 0]


class History(Narrator):
    """Keeps the latest events of each warp of a wave, and gives every SimError an account of them.

    Single ``mma.sync`` and accesses to memory are not among them.
    """

    def begin(self, machine):
        super().begin(machine)
        self.latest = Latest(self.wave.nwarps)
        self.open_products = np.full(self.wave.nwarps, -1)  # event of the wgmma group that a warp has not committed

    def end(self, machine, error):
        if isinstance(error, SimError):
            error.account = account(self, error)
        super().end(machine, error)
        self.latest = None  # its texts hold the history

    def note(self, w, text):
        self.latest.add(Event(self.wave.step, self.wave.line, w, text))

    def wait_begins(self, wait):
        event = Event(self.wave.step, wait.block.line, wait.w, lambda j: self.wait_text(wait, j), waits=True)
        if wait.may_fail:
            self.latest.wait_again(event)
        wait.info["event"] = np.full(len(wait.w), self.latest.add(event))

    def wait_ends(self, wait, selected, failed):
        event = self.latest.events.get(int(wait.info["event"][0]))
        if event is not None:
            rows = np.searchsorted(event.w, wait.w[selected])
            event.until[rows], event.gave_up[rows] = self.wave.step, failed

    def copy_issued(self, copy):
        self._note_once(copy.warp, self.copy_text(copy))

    def wgmma(self, w, spec, operands):
        numbers = self.open_products[w]
        if numbers.min() >= 0 and numbers[0] in self.latest.events:
            for number in {*numbers.tolist()}:
                if number in self.latest.events:
                    self.latest.events[number].text.count += 1
        else:
            text = _Products(f"wgmma m64n{spec.n}k{spec.k}")
            self.open_products[w] = self.latest.add(Event(self.wave.step, self.wave.line, w, text))

    def group_committed(self, kind, w):
        super().group_committed(kind, w)
        if kind == "wgmma":
            self.open_products[w] = -1


class _Products:
    """Text of the event of one wgmma group, whose instructions are counted."""

    def __init__(self, name):
        self.name, self.count = name, 1

    def __call__(self, j):
        return self.name if self.count == 1 else f"{self.count} × {self.name}"
