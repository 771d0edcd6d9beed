"""mbarriers at run time: PTX ISA 9.7.13.15.

An mbarrier is one 64-bit word of shared memory, laid out here as: bit 63 phase, bit 62 valid, bits 42-61 expected
arrivals, bits 22-41 pending arrivals, bits 0-21 transaction count (two's complement). A phase completes when pending
arrivals and transaction count are both zero.
"""

from __future__ import annotations

import numpy as np

from ..arrays import full_width
from ..errors import MemoryFault, SyncError
from .waiting import Wait

_TX_MASK = (1 << 22) - 1
_COUNT_MASK = (1 << 20) - 1
_VALID = 1 << 62
_MAX_COUNT = (1 << 20) - 1


def mbarrier_fields(word):
    """(phase, expected, pending, transaction count) of an mbarrier word."""
    word = int(word)
    tx = word & _TX_MASK
    if tx >> 21:
        tx -= 1 << 22
    return word >> 63, (word >> 42) & _COUNT_MASK, (word >> 22) & _COUNT_MASK, tx


def _pack(phase, expected, pending, tx):
    return (phase << 63) | _VALID | (expected << 42) | (pending << 22) | (tx & _TX_MASK)


class Mbarriers:
    """The mbarriers in shared memory. ``index`` are flat indices, ``words`` is shared memory as uint64."""

    def __init__(self, wave, shared, registers):
        self.wave, self.events, self.shared, self.registers = wave, wave.events, shared, registers
        self.words = shared.views[np.dtype(np.uint64)]

    def lanes(self, w, address, M):
        index = self.shared.index(w, address, 8, M)
        return index, np.ones((len(w), 32), bool) if M is None else M

    def initialise(self, w, address, count, M):
        """mbarrier.init with ``count`` arrivals a phase, for each active lane; SyncError for counts out of range."""
        index, mask = self.lanes(w, address, M)
        self.shared.mark_written(index, 8, mask)
        for i, c in zip(index[mask], full_width(count, len(w))[mask], strict=False):
            if not 1 <= int(c) <= _MAX_COUNT:
                raise SyncError(f"mbarrier count {int(c)} is not in 1..{_MAX_COUNT}")
            self.words[i >> 3] = _pack(0, int(c), int(c), 0)
        if self.events.mbarrier_initialised:
            self.events.mbarrier_initialised(w, index, mask)
        self.wave.progress += 1

    def invalidate(self, w, address, M):
        """mbarrier.inval: later uses raise until the barrier is initialised again."""
        index, mask = self.lanes(w, address, M)
        self.words[index[mask] >> 3] = 0

    def valid_word(self, index):
        if index & 7:
            raise MemoryFault(f"mbarrier misaligned: {self.shared.describe(index)}")
        word = int(self.words[index >> 3])
        if not word & _VALID or word == 0xFFFFFFFFFFFFFFFF:
            raise SyncError(f"uninitialised mbarrier at {self.shared.describe(index)}")
        return word

    def update(self, index, arrive=0, tx=0, drop=0):
        """Apply arrivals, a change of the transaction count and dropped participants; returns the word before."""
        index = int(index)
        self.shared.check_alive(index // self.shared.stride)
        old = self.valid_word(index)
        phase, expected, pending, count = mbarrier_fields(old)
        expected -= drop
        count += tx
        if not -(1 << 20) < count < (1 << 20):
            raise SyncError(f"the tx-count {count} of the mbarrier at {self.shared.describe(index)} overflows")
        arrivals, completed = arrive, 0
        while True:
            taken = min(arrive, pending)
            pending -= taken
            arrive -= taken
            if pending or count:
                break
            phase, pending, completed = phase ^ 1, expected, completed + 1
            if not arrive or not expected:
                break
        if arrive:
            raise SyncError(f"more arrivals than expected on the mbarrier at {self.shared.describe(index)} "
                            f"(phase {phase}, expected {expected}, tx-count {count})")  # fmt: skip
        self.words[index >> 3] = _pack(phase, expected, pending, count)
        self.wave.active()
        self.wave.progress += completed > 0
        if self.events.mbarrier_updated:
            self.events.mbarrier_updated(index, arrivals, completed)
        return old

    def add_pending(self, index, count):
        """Raise the pending count of the current phase (cp.async.mbarrier.arrive without .noinc)."""
        phase, expected, pending, tx = mbarrier_fields(self.valid_word(int(index)))
        if pending + count > _MAX_COUNT:
            raise SyncError(f"the pending count of the mbarrier at {self.shared.describe(index)} overflows")
        self.words[int(index) >> 3] = _pack(phase, expected, pending + count, tx)

    def change(self, w, operation, address, count, M):
        """arrive, arrive_tx (count is the tx-count), arrive_drop, arrive_drop_tx, expect_tx, complete_tx."""
        index, mask = self.lanes(w, address, M)
        out = np.zeros(mask.shape, np.uint64)
        where, counts = index[mask], full_width(count, len(w))[mask]
        if (
            operation in ("arrive", "arrive_drop")
            and len(counts)
            and not 1 <= counts.min() <= counts.max() <= _MAX_COUNT
        ):
            raise SyncError(f"{operation} of {counts.min()} to {counts.max()} at an mbarrier: not in 1..{_MAX_COUNT}")
        if self.events.mbarrier_changed:
            self.events.mbarrier_changed(w, operation, index, full_width(count, len(w)), mask)
        if operation == "arrive" and len(where) > 1:  # many lanes at a few barriers
            barriers, inverse = np.unique(where, return_inverse=True)
            totals = np.zeros(len(barriers), np.int64)
            np.add.at(totals, inverse, counts)
            self._check_arrivals(barriers, totals, np.nonzero(mask)[0], inverse, counts)
            words = [self.update(i, arrive=int(c)) for i, c in zip(barriers, totals, strict=False)]
            out[mask] = np.array(words, np.uint64)[inverse]
            return out
        change = {
            "arrive": lambda c: dict(arrive=c),
            "arrive_tx": lambda c: dict(arrive=1, tx=c),
            "arrive_drop": lambda c: dict(arrive=c, drop=c),
            "arrive_drop_tx": lambda c: dict(arrive=1, drop=1, tx=c),
            "expect_tx": lambda c: dict(tx=c),
            "complete_tx": lambda c: dict(tx=-c),
        }[operation]
        out[mask] = np.array([self.update(i, **change(int(c))) for i, c in zip(where, counts, strict=False)], np.uint64)
        return out

    def _check_arrivals(self, barriers, totals, rows, inverse, counts):
        """Arrivals of one instruction: those of a warp (``rows``) at one barrier belong to one phase."""
        expected = (self.words[barriers >> 3] >> np.uint64(42)).astype(np.int64) & _COUNT_MASK
        for n in np.flatnonzero(totals > expected).tolist():
            mine = inverse == n
            most = int(np.bincount(rows[mine], counts[mine]).max())
            if most > expected[n] > 0:
                raise SyncError(
                    f"{most} arrivals of one warp's lanes on the mbarrier at {self.shared.describe(barriers[n])}, "
                    f"where a phase expects {expected[n]}"
                )

    def test(self, w, address, wanted, parity, M):
        """Whether the phase that ``wanted`` (a parity, or a state) names has completed, for each lane."""
        index, mask = self.lanes(w, address, M)
        words = self.words[index >> 3]
        bad = mask & (((words & np.uint64(_VALID)) == 0) | (words == np.uint64(0xFFFFFFFFFFFFFFFF)))
        if bad.any():
            raise SyncError(f"wait on an uninitialised mbarrier at {self.shared.describe(index[bad][0])}")
        phase = words >> np.uint64(63)
        if parity:
            passed = phase != (np.asarray(wanted).astype(np.uint64) & np.uint64(1))
        else:
            passed = phase != (np.asarray(wanted, np.uint64) >> np.uint64(63))
        if self.events.mbarrier_passed and (passed & mask).any():
            self.events.mbarrier_passed(w, index, passed & mask)
        return passed

    def try_wait(self, i, group):
        """mbarrier.try_wait: suspends; false only if nothing else can run, or at random with a schedule seed."""
        w = group.w
        address = full_width(self.registers.address(i.args[1], w), len(w))
        parity, line = "parity" in i.parts, i.line
        wanted = np.ascontiguousarray(full_width(self.registers.value(i.args[2], w, "u4" if parity else "u8"), len(w)))

        def check(wait):
            self.wave.line = line
            ready = self.test(wait.w, wait.info["address"], wait.info["wanted"], parity, wait.M)
            return ready.all(1) if wait.M is None else (ready | ~wait.M).all(1)

        return Wait(group, "mbarrier.try_wait", check, dict(address=address, wanted=wanted), i.args[0].split("|")[0],
                    may_fail=True, describe=self.describe_wait)  # fmt: skip

    def describe_wait(self, wait):
        """Lines about what a blocked try_wait waits for."""
        lines = []
        for j in range(min(len(wait.w), 4)):
            lane = 0 if wait.M is None else int(wait.M[j].argmax())
            lanes = np.zeros((1, 32), bool)
            lanes[0, lane] = True
            index = int(self.shared.index(wait.w[j : j + 1], wait.info["address"][j : j + 1], 8, lanes)[0, lane])
            phase, expected, pending, tx = mbarrier_fields(self.words[index >> 3])
            lines.append(
                f"mbarrier at {self.shared.describe(index)}: warp {self.wave.warp_text(wait.w[j])} waits for the phase "
                f"of parity {int(wait.info['wanted'][j, lane]) & 1}; it is in phase {phase}, {pending} of {expected} "
                f"arrivals pending, tx-count {tx}"
            )
        return lines
