"""Mutants that no kernel could miss: what a run of the undamaged kernel shows about its synchronisation.

A mutant that goes unnoticed is *equivalent* only for one of these reasons, each decided by what the undamaged kernel
does in every launch and schedule:

* ``first acquire``: a wait that answers yes at once, where every wait at that place is for the phase before the
  barrier's first one, which counts as complete: a stage that nobody has used yet.
* ``last release``: an arrival that is deleted or counts for two, or announces other bytes, where nobody waits for the
  phases that arrivals at that place contribute to, or for later ones: a stage that is not filled again.
* ``peek``: a peek that says no at once: the wait behind it does what the peek would have saved.
* ``registers``: a tcgen05.wait::ld that is deleted. Instructions that read the registers wait for the load themselves
  (PTX ISA 9.7.16.6.4.5), and whether memory accesses keep their order without it the race detector has seen.
* ``order for speed``: a bar.sync or bar.arrive that is deleted, of a set of named barriers that some warps only arrive
  at (bar.arrive), where the kernel without *any* instruction at these barriers runs clean and right in every
  schedule, with the race detector: they decide who goes first, not what anybody may read or write. A set holds the
  barriers that the same instructions name.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np

from ..machine.events import Observer
from .mutants import PEEK_FAILS, Mutant

FIRST_ACQUIRE, LAST_RELEASE, PEEK, REGISTERS = "first acquire", "last release", "peek", "registers"
FOR_SPEED = "order for speed"
CLASSES = (FIRST_ACQUIRE, LAST_RELEASE, PEEK, REGISTERS, FOR_SPEED)


@dataclass
class Facts:
    """What runs of a kernel showed, by PTX line."""

    steps: int = 0  # of the longest launch
    executed: set[int] = field(default_factory=set)
    fresh: dict[int, bool] = field(default_factory=dict)  # of a wait: always for the phase before the first
    awaited: dict[int, bool] = field(default_factory=dict)  # of an arrival: somebody waited for its phase or later ones
    barriers: dict[int, set[int]] = field(default_factory=lambda: defaultdict(set))  # numbers that a bar.* named

    def add(self, other: Facts) -> None:
        """Join what other launches or another schedule showed."""
        self.steps = max(self.steps, other.steps)
        self.executed |= other.executed
        for line, fresh in other.fresh.items():
            self.fresh[line] = fresh and self.fresh.get(line, True)
        for line, awaited in other.awaited.items():
            self.awaited[line] = awaited or self.awaited.get(line, False)
        for line, numbers in other.barriers.items():
            self.barriers[line] |= numbers

    def reason(self, mutant: Mutant) -> str | None:
        """Why a mutant is equivalent by what one instruction does; None if it is not, or is part of an order."""
        if mutant.change == PEEK_FAILS:
            return PEEK
        waits = (mutant.line, mutant.peek)
        if mutant.change == "yes at once" and all(self.fresh.get(line, True) for line in waits):
            return FIRST_ACQUIRE
        if mutant.kind in ("arrive", "expect_tx") and self.awaited.get(mutant.line) is False:
            return LAST_RELEASE
        return REGISTERS if mutant.op.startswith("tcgen05.wait::ld") else None

    def ran(self, mutant: Mutant) -> bool:
        """Whether some warp came to what is damaged, or to the peek before it; an arrival must also have been made."""
        if mutant.op.startswith("mbarrier.arrive") and mutant.kind == "arrive":
            return mutant.line in self.awaited
        return mutant.line in self.executed or mutant.peek in self.executed

    def order(self, mutant: Mutant, mutants: list[Mutant]) -> list[Mutant]:
        """The mutants that delete all instructions at a set of named barriers, the one of ``mutant`` among them; empty
        if none of them is a bar.arrive."""
        mine, size = set(self.barriers.get(mutant.line, ())), 0
        while len(mine) > size:
            size = len(mine)
            for numbers in self.barriers.values():
                mine |= numbers if numbers & mine else set()
        chosen = [m for m in mutants if m.kind == "barrier" and self.barriers.get(m.line, set()) & mine]
        return chosen if any("arrive" in m.op for m in chosen) else []


class Recorder(Observer):
    """Gathers ``Facts`` in ``found``, of every wave that ends well."""

    def __init__(self):
        self.found = Facts()

    def begin(self, machine):
        self.wave, self.words = machine.wave, len(machine.mbarriers.words)
        self.facts = Facts()
        self.blocks_run = set()
        self.phases = np.zeros(self.words, np.int64)  # completed, of the barrier at each word
        self.life = np.zeros(self.words, np.int64)  # how often it was initialised
        self.waited, self.arrivals = set(), defaultdict(set)  # phases: (word, life, number)

    def end(self, machine, error):
        if error is not None:
            return
        facts = self.facts
        facts.steps = self.wave.step
        facts.executed = {i.line for b in self.blocks_run for i in self.wave.program.blocks[b].instrs}
        last = {}  # phase of a barrier that somebody waited for
        for word, life, phase in sorted(self.waited):
            last[word, life] = phase
        for line, arrivals in self.arrivals.items():
            facts.awaited[line] = any(last.get((word, life), -1) >= phase for word, life, phase in arrivals)
        self.found.add(facts)

    def issue(self, block, w, M):
        self.blocks_run.add(block.idx)

    def mbarrier_initialised(self, w, index, mask):
        self.phases[index[mask] >> 3] = 0
        self.life[index[mask] >> 3] += 1

    def mbarrier_updated(self, index, arrivals, completed):
        word = index >> 3
        if arrivals:
            self.arrivals[self.wave.line].add((word, int(self.life[word]), int(self.phases[word])))
        self.phases[word] += completed

    def mbarrier_passed(self, w, index, mask):
        words = np.unique(index[mask] >> 3)
        phases, line = self.phases[words] - 1, self.wave.line
        self.facts.fresh[line] = self.facts.fresh.get(line, True) and bool((phases < 0).all())
        self.waited |= set(zip(words.tolist(), self.life[words].tolist(), phases.tolist(), strict=True))

    def bar_reached(self, w, cta, barrier, waits):
        self.facts.barriers[self.wave.line] |= set(barrier.tolist())
