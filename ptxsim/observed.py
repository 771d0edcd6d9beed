"""A machine that remembers what its warps did: synchronisation, copies and matrix instructions.

``ObservedMachine`` overrides the methods of ``Machine`` at which such things happen, so that a plain ``Machine`` pays
nothing. It keeps the latest events of each warp, and gives every SimError an account of them: ``ptxsim.account``.
"""

from __future__ import annotations

import numpy as np

from .account import account
from .errors import Deadlock, SimError
from .machine import Machine
from .sync import mbarrier_fields
from .warps import full_width

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


class History:
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


def _first_lane(M, j):
    return 0 if M is None else int(M[j].argmax())


class ObservedMachine(Machine):
    """``Machine`` with a history of its warps. ``history`` is a ``History``."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.history = History(self.nwarps)
        self.open_products = np.full(self.nwarps, -1)  # event of the wgmma group that a warp has not committed

    def run(self):
        try:
            super().run()
        except SimError as error:
            error.account = account(self, error)
            raise

    def _deadlock(self, reason):
        """The waiting warps are in the account."""
        first = self.blocked[0] if self.blocked else self.groups[0]
        line = self.prog.blocks[first.blk].line
        waiting, live = sum(len(b.w) for b in self.blocked), int(self.alive.any(1).sum())
        raise Deadlock(f"{reason}: {waiting} of {live} live warps wait", line=line, text=self.ptx_line(line),
                       where=self.warps_text(first.w))  # fmt: skip

    def note(self, w, text):
        """Remember that the warps ``w`` did something."""
        self.history.add(Event(self.steps, self.line, w, text))

    def _note_threads(self, w, M, text):
        """The same for the warps with an active lane; ``text`` takes a row of w and its first active lane."""
        if M is None:
            self.note(w, lambda j: text(j, 0))
        elif (rows := np.flatnonzero(M.any(1))).size:
            self.note(w[rows], lambda j: text(rows[j], _first_lane(M, rows[j])))

    # ---- waits ------------------------------------------------------------------------------------
    def block_or_go(self, b):
        line = self.prog.blocks[b.blk].line
        event = Event(self.steps, line, b.w, lambda j: self.wait_text(b, j), waits=True)
        if b.may_fail:
            self.history.wait_again(event)
        b.info["event"] = np.full(len(b.w), self.history.add(event))
        super().block_or_go(b)

    def _resume(self, b, select, failed=False):
        event = self.history.events.get(int(b.info["event"][0]))
        if event is not None:
            rows = np.searchsorted(event.w, b.w[select])
            event.until[rows], event.gave_up[rows] = self.steps, failed
        super()._resume(b, select, failed)

    def signal_of(self, b, j):
        """Flat index of the mbarrier that a blocked warp, row ``j`` of the record, waits for."""
        lane = _first_lane(b.M, j)
        cta, offset = self.cta_and_offset(b.w[j], b.info["address"][j, lane])
        return cta * self.smem_stride + offset

    def wait_text(self, b, j):
        """What row ``j`` of a record of blocked warps waits for."""
        if b.why == "mbarrier.try_wait":
            wanted = int(b.info["wanted"][j, _first_lane(b.M, j)])
            parity = wanted & 1 if "parity" in self.prog.blocks[b.blk].handler.parts else wanted >> 63
            return f"waits for mbarrier {self.barrier_text(b.w[j], self.signal_of(b, j))}, parity {parity}"
        if b.why in ("bar.sync", "bar.red"):
            return f"waits at barrier {int(b.info['barrier'][j])} ({b.why})"
        return f"waits in {b.why}"

    def state_text(self, b, j):
        """How far what row ``j`` of a record of blocked warps waits for is."""
        if b.why == "mbarrier.try_wait":
            phase, expected, pending, tx = mbarrier_fields(self.words[self.signal_of(b, j) >> 3])
            return f"it is in phase {phase}, {pending} of {expected} arrivals pending, tx-count {tx}"
        rows = np.arange(len(b.w)) == j
        return "; ".join(line.strip() for line in self.describe_wait(b.without(~rows)))

    def barrier_text(self, warp, index):
        """Address of an mbarrier as a warp sees it: with the CTA where that is another one."""
        cta, offset = divmod(int(index), self.smem_stride)
        return f"0x{offset:x}" + ("" if cta == self.cta_of[warp] else f" of cta{self.cta_name(cta)}")

    # ---- arrivals ---------------------------------------------------------------------------------
    def mbar_op(self, w, operation, address, count, M):
        address, count = np.array(full_width(address, len(w))), np.array(full_width(count, len(w)))
        name = {"arrive_tx": "arrive.expect_tx", "arrive_drop_tx": "arrive_drop.expect_tx"}.get(operation, operation)

        def text(j, lane):
            cta, offset = self.cta_and_offset(w[j], address[j, lane])
            more = f" {int(count[j, lane])} bytes" if "tx" in operation else ""
            return f"{name}{more} at mbarrier {self.barrier_text(w[j], cta * self.smem_stride + offset)}"

        self._note_threads(w, M, text)
        return super().mbar_op(w, operation, address, count, M)

    def h_bar(self, i, block, group):
        if i.mods.mode == "arrive":
            barrier = np.array(full_width(self.operand(i.args[0], group.w), len(group.w)))
            self.note(group.w, lambda j: f"bar.arrive at barrier {int(barrier[j, 0])}")
        super().h_bar(i, block, group)

    def h_cluster(self, i, block, group):
        if i.mods.mode == "arrive":
            self.note(group.w, lambda j: "barrier.cluster.arrive")
        super().h_cluster(i, block, group)

    # ---- copies -----------------------------------------------------------------------------------
    def _note_load(self, name, w, destination, barrier, M):
        destination, barrier = (np.array(full_width(x, len(w))) for x in (destination, barrier))

        def text(j, lane):
            cta, offset = self.cta_and_offset(w[j], barrier[j, lane])
            signal = self.barrier_text(w[j], cta * self.smem_stride + offset)
            return f"{name} to 0x{int(destination[j, lane]):x}, mbarrier {signal}"

        self._note_threads(w, M, text)

    def tensor_load(self, w, destination, address, coordinates, barrier, multicast, M, pair):
        self._note_load("TMA load", w, destination, barrier, M)
        super().tensor_load(w, destination, address, coordinates, barrier, multicast, M, pair)

    def bulk_load(self, w, destination, source, size, barrier, multicast, M):
        self._note_load("bulk load", w, destination, barrier, M)
        super().bulk_load(w, destination, source, size, barrier, multicast, M)

    def bulk_shared(self, w, destination, source, size, barrier, M):
        self._note_load("bulk copy", w, destination, barrier, M)
        super().bulk_shared(w, destination, source, size, barrier, M)

    def _note_store(self, name, w, source, M):
        source = np.array(full_width(source, len(w)))
        self._note_threads(w, M, lambda j, lane: f"{name} from 0x{int(source[j, lane]):x}")

    def tensor_store(self, w, address, coordinates, source, reduction, M):
        self._note_store("TMA store" if reduction is None else "TMA reduce", w, source, M)
        super().tensor_store(w, address, coordinates, source, reduction, M)

    def bulk_store(self, w, destination, source, size, reduction, M):
        self._note_store("bulk store" if reduction is None else "bulk reduce", w, source, M)
        super().bulk_store(w, destination, source, size, reduction, M)

    def _note_group(self, name, group):
        self.note(group.w, lambda j: name)

    def h_cp_async_commit(self, i, block, group):
        self._note_group("cp.async.commit_group", group)
        super().h_cp_async_commit(i, block, group)

    def h_cp_async_wait(self, i, block, group):
        self._note_group(" ".join([i.op, *i.args]), group)
        super().h_cp_async_wait(i, block, group)

    def h_bulk_commit(self, i, block, group):
        self._note_group("bulk.commit_group", group)
        super().h_bulk_commit(i, block, group)

    def h_bulk_wait(self, i, block, group):
        self._note_group(" ".join([i.op.replace("cp.async.", ""), *i.args]), group)
        super().h_bulk_wait(i, block, group)

    # ---- matrix instructions ----------------------------------------------------------------------
    def wgmma(self, w, spec, a, b, c, scale_d, *metadata):
        numbers = self.open_products[w]
        if numbers.min() >= 0 and numbers[0] in self.history.events:
            for number in {*numbers.tolist()}:
                if number in self.history.events:
                    self.history.events[number].text.count += 1
        else:
            text = _Products(f"wgmma m64n{spec.n}k{spec.k}")
            self.open_products[w] = self.history.add(Event(self.steps, self.line, w, text))
        return super().wgmma(w, spec, a, b, c, scale_d, *metadata)

    def wgmma_commit(self, w):
        self.open_products[w] = -1
        super().wgmma_commit(w)

    def h_wgmma_wait(self, i, block, group):
        self._note_group(f"wgmma.wait_group {i.args[0]}", group)
        super().h_wgmma_wait(i, block, group)

    def tc_mma(self, w, form, d, a, b, instruction, enable, others, M):
        self._note_threads(w, M, lambda j, lane: f"tcgen05.mma kind::{form.kind}")
        super().tc_mma(w, form, d, a, b, instruction, enable, others, M)

    def tc_commit(self, w, barrier, multicast, M):
        barrier = np.array(full_width(barrier, len(w)))
        self._note_threads(w, M, lambda j, lane: f"tcgen05.commit to mbarrier 0x{int(barrier[j, lane]) & 0xFFFFFF:x}")
        super().tc_commit(w, barrier, multicast, M)


class _Products:
    """Text of the event of one wgmma group, whose instructions are counted."""

    def __init__(self, name):
        self.name, self.count = name, 1

    def __call__(self, j):
        return self.name if self.count == 1 else f"{self.count} × {self.name}"
