"""Programmatic dependent launch in the race detector (PTX ISA, griddepcontrol; CUDA programming guide).

A launch with the attribute "programmatic stream serialization" (``use_pdl`` in the DSL) may start while the launch
before it, its *prerequisite*, runs: once all CTAs of that have executed griddepcontrol.launch_dependents or ended.
griddepcontrol.wait waits until the prerequisite is over and its memory operations are visible. What a warp does in
global memory before it, or before it synchronises with a warp that has executed it, is unordered with all that the
prerequisite did.

The simulator runs launches one after the other. The detector keeps the shadow of global memory of a prerequisite that
has launch_dependents, and looks there. Only the launch just before is a prerequisite, as if there were one stream and
nothing else in it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..arrays import active_warps
from ..errors import RaceError
from ..frontend.locations import source_of
from ..machine.global_memory import GLOBAL_BASE
from ..names import readable
from ..ops.scopes import GPU
from .clocks import ORDERED
from .races import Detector, LaunchHistory
from .shadow import AGENT_BITS, GlobalShadow
from .sites import Sites

_OVER = 2  # in the column of the prerequisite: a limit above that of an agent of which nothing is known


@dataclass(frozen=True)
class Prerequisite:
    """A launch that may still run while the next one does."""

    kernel: str
    text: str  # of the PTX module
    memory: GlobalShadow
    sites: Sites
    names: dict  # as in ``LaunchHistory``

    @classmethod
    def of(cls, program, history: LaunchHistory | None) -> Prerequisite | None:
        """A launch that is over; None if the next one cannot have started before, or nothing is known."""
        if history is None or all(i.op != "griddepcontrol.launch_dependents" for i in program.body):
            return None
        return cls(program.k.name, program.k.module.text, history.memory, history.sites, history.names)

    def access(self, agent, stamp):
        """(who, PTX line) of an entry of the tables of ``memory``."""
        home, local = agent >> AGENT_BITS, agent & (1 << AGENT_BITS) - 1
        return self.names[home].of(home, local, stamp), self.sites.lines[stamp & self.sites.mask]


class DependentHistory(LaunchHistory):
    """Of a launch with a prerequisite."""

    def __init__(self, program, prerequisite: Prerequisite):
        super().__init__(program)
        self.prerequisite = prerequisite

    def detector(self, machine):
        return DependentDetector(machine, self)


def history_of(program, prerequisite: Prerequisite | None) -> LaunchHistory:
    """What the race detector keeps of a launch that is about to run."""
    return LaunchHistory(program) if prerequisite is None else DependentHistory(program, prerequisite)


class DependentDetector(Detector):
    """The race detector of a wave of such a launch. That the prerequisite is over spreads with the warps' limits, in a
    column like that of an mbarrier."""

    def __init__(self, machine, launch: DependentHistory):
        super().__init__(machine, launch)
        self.column = self.clocks.fixed
        self.barriers.count = dict.fromkeys(np.unique(self.clocks.domain_of).tolist(), 1)
        self.clocks.add_agent(self.column + 1)

    def grid_wait(self, w, M):
        self.clocks.known[active_warps(w, M), ORDERED, self.column] = _OVER

    def _global(self, w, index, size, M, agents, stamps, writes, values=None):
        _, warps, first = self._lanes(w, index, M)
        if first.size:
            early = np.broadcast_to(self.clocks.known[warps, ORDERED, self.column] < _OVER, first.shape)
            if early.any():
                self._look(np.broadcast_to(warps, first.shape)[early], first[early], size, writes)
        super()._global(w, index, size, M, agents, stamps, writes, values)

    def _look(self, warps, first, size, writes):
        """Accesses [n] that may come before the prerequisite is over: what did that do there?"""
        before = self.launch.prerequisite
        granule, sites = before.memory.granule, before.sites
        for segment, _, (mine, at) in before.memory.parts(warps, first, size):
            places = (at[:, None] - segment.start + np.arange(0, size, granule)) // granule
            for name in [name for name in segment.tables if writes or name == "write"]:
                agents, stamps = (table[places] for table in segment[name])
                found = stamps != 0
                if self.sites.strong[self.clocks.site] == GPU:
                    found &= sites.strong[stamps & sites.mask] != GPU  # two atomic accesses do not race
                if found.any():
                    row, column = (int(x[0]) for x in np.nonzero(found))
                    who, line = before.access(int(agents[row, column]), int(stamps[row, column]))
                    start = int(at[row]) + column * granule + GLOBAL_BASE
                    text, now = before.text, self.wave.text
                    earlier, later = "write" if name == "write" else "read", "write" if writes else "read"
                    raise RaceError(
                        f"race: this {later} of global memory 0x{start:x} to 0x{start + min(size, granule) - 1:x} "
                        "comes before griddepcontrol.wait, and the launch before may not be over: there is the "
                        f"{earlier} by {who} of {readable(before.kernel, 40)} at PTX line {line}: "
                        f"{text.splitlines()[line - 1].strip()[:200]}{source_of(text, line)}"
                        f"\n    this access:{source_of(now, self.wave.line)}",
                        where=self.wave.warp_text(int(mine[row])),
                    )
