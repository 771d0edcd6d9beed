"""Named barriers of a CTA at run time: PTX ISA 9.7.13.1 (bar, barrier, bar.red)."""

from __future__ import annotations

import numpy as np

from ..arrays import full_width
from ..errors import PtxError, SyncError
from .waiting import Wait

NAMED_BARRIERS = 16
_EVERYBODY = -1  # without a thread count: all live warps of the CTA


class NamedBarriers:
    """Arrivals (threads) and completed generations of the barriers of each CTA."""

    def __init__(self, wave, registers):
        self.wave, self.events, self.registers = wave, wave.events, registers
        shape = wave.nctas, NAMED_BARRIERS
        self.arrived, self.needed = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        self.generation = np.zeros(shape, np.int64)
        self.votes = np.zeros(shape, np.int64)  # true predicates of bar.red
        self.results = {}  # (cta, barrier, generation) -> (true predicates, threads)

    def _arrive(self, cta, barrier, needed, votes):
        """One warp arrives; completes the barrier when all threads are there."""
        if not 0 <= barrier < NAMED_BARRIERS:
            raise SyncError(f"barrier {barrier} is not in 0..{NAMED_BARRIERS - 1}")
        if needed != _EVERYBODY and (needed <= 0 or needed % 32):
            raise SyncError(f"barrier {barrier}: the thread count {needed} is not a positive multiple of 32")
        if self.arrived[cta, barrier] and self.needed[cta, barrier] != needed:
            raise SyncError(
                f"barrier {barrier} of cta{self.wave.cta_name(cta)}: arrivals with different thread counts "
                f"({self.needed[cta, barrier]} and {needed})"
            )
        self.needed[cta, barrier] = needed
        self.arrived[cta, barrier] += 32
        self.votes[cta, barrier] += votes
        self._complete(cta, barrier)

    def _complete(self, cta, barrier):
        needed = self.needed[cta, barrier]
        arrived, votes = self.arrived[cta, barrier], self.votes[cta, barrier]
        if arrived == (self.wave.live_threads[cta] if needed == _EVERYBODY else needed):
            if self.wave.program.has_bar_reductions:
                self.results[cta, barrier, int(self.generation[cta, barrier])] = int(votes), int(arrived)
            if self.events.bar_completed:
                self.events.bar_completed(cta, barrier)
            self.arrived[cta, barrier] = self.votes[cta, barrier] = 0
            self.generation[cta, barrier] += 1
            self.wave.advance()

    def _arrive_together(self, cta, barrier, needed):
        """All warps of whole CTAs arrive at one barrier that nobody is at: the common __syncthreads. False if it is
        something else."""
        if needed is not None or (barrier != barrier[0]).any() or not 0 <= barrier[0] < NAMED_BARRIERS:
            return False
        ctas, counts = np.unique(cta, return_counts=True)
        at = (ctas, int(barrier[0]))
        if self.arrived[at].any() or (32 * counts != self.wave.live_threads[ctas]).any():
            return False
        self.generation[at] += 1
        self.wave.advance()
        return True

    def _arrivals(self, w, tokens, votes=None, waits=True):
        """Arrival of a group of warps; returns what they wait for (if they do): barrier and generation of each."""
        values = [np.asarray(self.registers.value(t, w, "u4")).astype(np.int64) for t in tokens]
        barrier, *rest = (full_width(v, len(w))[:, 0] for v in values)
        needed = rest[0] if rest else None
        if needed is None and not waits:
            raise SyncError("bar.arrive without a thread count")
        cta = self.wave.cta_of[w]
        if self.events.bar_reached:
            self.events.bar_reached(w, cta, barrier, waits)
        if votes is None:
            generation = self.generation[cta, barrier & (NAMED_BARRIERS - 1)]
            if self._arrive_together(cta, barrier, needed):
                if self.events.bar_together:
                    self.events.bar_together(w, cta, waits)
                return dict(cta=cta, barrier=barrier, generation=generation)
        generation = np.empty(len(w), np.int64)
        for j in range(len(w)):
            generation[j] = self.generation[cta[j], barrier[j] & (NAMED_BARRIERS - 1)]
            count = _EVERYBODY if needed is None else int(needed[j])
            if self.events.bar_arrived:
                self.events.bar_arrived(int(w[j]), int(cta[j]), int(barrier[j]), waits)
            self._arrive(int(cta[j]), int(barrier[j]), count, 0 if votes is None else int(votes[j]))
        return dict(cta=cta, barrier=barrier, generation=generation)

    def bar(self, i, group):
        """bar.sync, bar.arrive, barrier.sync, barrier.arrive."""
        info = self._arrivals(group.w, i.args, waits=i.mods.mode == "sync")
        if i.mods.mode == "arrive":
            return None
        return Wait(group, "bar.sync", self._passed, info, describe=self.describe_wait)

    def _passed(self, wait):
        return self.generation[wait.info["cta"], wait.info["barrier"]] > wait.info["generation"]

    def reduce(self, i, group):
        """bar.red: d = popc, and, or over the predicates of all threads that take part."""
        destination, *tokens, predicate = i.args
        w = group.w
        truth = self.registers.files[self.wave.program.reg(predicate.lstrip("!"))][w] ^ predicate.startswith("!")
        active = self.wave.alive[w] if group.M is None else group.M
        info = self._arrivals(w, tokens, (truth & active).sum(1))
        operation = i.mods.op

        def value(wait, select):
            results = []
            for key in zip(
                wait.info["cta"][select], wait.info["barrier"][select], wait.info["generation"][select], strict=False
            ):
                votes, threads = self.results[key]
                results.append(votes if operation == "popc" else votes == threads if operation == "and" else votes > 0)
            return np.array(results)[:, None]

        if operation == "and" and not active.all():
            raise PtxError("bar.red.and by incomplete warps is not simulated")
        return Wait(group, "bar.red", self._passed, info, destination, value=value, describe=self.describe_wait)

    def describe_wait(self, wait):
        """Lines about the named barriers that blocked warps wait for."""
        lines = []
        places = sorted({*zip(wait.info["cta"].tolist(), wait.info["barrier"].tolist(), strict=True)})
        for cta, barrier in places[:4]:
            needed = self.needed[cta, barrier]
            needed = self.wave.live_threads[cta] if needed == _EVERYBODY else needed
            lines.append(f"barrier {barrier} of cta{self.wave.cta_name(cta)}: {self.arrived[cta, barrier]} of {needed} "
                         f"threads arrived (phase {self.generation[cta, barrier]})")  # fmt: skip
        return lines

    def after_exit(self, w):
        """Exited warps no longer count: barriers that waited for everybody may complete."""
        for cta in np.unique(self.wave.cta_of[w]):
            for barrier in np.flatnonzero((self.arrived[cta] > 0) & (self.needed[cta] == _EVERYBODY)):
                self._complete(int(cta), int(barrier))
