"""mbarriers in the race detector: what arrivals publish and waits acquire, and who knows of the initialisation."""

from __future__ import annotations

import numpy as np

from ..errors import BarrierInitError
from ..frontend.locations import source_of
from .clocks import ORDERED
from .lanes import packed
from .sites import GENERIC


class MbarrierRaces:
    """What phases of mbarriers publish; part of ``races.Detector``. Barriers are numbered from 1 on, as they are
    initialised."""

    def __init__(self, detector):
        self.detector, self.clocks, self.wave = detector, detector.clocks, detector.wave
        self.number = np.zeros(len(detector.memory_of_ctas.bytes) >> 3, np.int32)  # by flat index / 8
        self.agents = [None]  # column of each barrier
        self.phase = [0]
        self.arrived, self.done = [None], [None]  # limits published in this phase, and by all completed ones
        self.init = [None]  # (agent, stamp) of the initialisation
        self.verified = [None]  # warps for which the initialisation is known, and for their asynchronous operations
        self.count = {}  # domain -> barriers

    def initialise(self, w, index, mask):
        """mbarrier.init of the active lanes."""
        clocks = self.clocks
        rows = np.nonzero(mask)[0]
        stamps = clocks.stamps(w)
        for j, at in zip(rows.tolist(), index[mask].tolist(), strict=True):
            number = int(self.number[at >> 3])
            if not number:
                domain = int(clocks.domain_of[w[j]])
                agent = clocks.fixed + self.count.get(domain, 0)
                self.count[domain] = self.count.get(domain, 0) + 1
                clocks.add_agent(agent + 1)
                number = self.number[at >> 3] = len(self.agents)
                for table in (self.agents, self.phase, self.arrived, self.done, self.init, self.verified):
                    table.append(None)
                self.agents[number], self.phase[number] = agent, 1
            self.arrived[number], self.done[number] = None, None
            self.init[number] = int(clocks.agent(GENERIC, w[j])), int(stamps[j])
            self.verified[number] = np.zeros((2, self.wave.nwarps), bool)
        clocks.tick(w)

    def agent_and_stamp(self, at):
        """(agent, stamp) of a bulk load that signals the barrier at a flat index now."""
        number = self.number[at >> 3]
        if not number:
            return 0, 0  # the machine will refuse the barrier
        return self.agents[number], self.phase[number] << self.clocks.sites.bits | self.clocks.site

    def _known_init(self, number, w, asynchronous):
        """The initialisation must have happened before the warps use a barrier, or its asynchronous user does."""
        seen = self.verified[number][int(asynchronous)]
        if seen[w].all():
            return
        agent, stamp = self.init[number]
        ordered, visible, fenced = (self.clocks.known[w, section, agent] > stamp for section in range(3))
        good = ((visible & ordered) | fenced) if asynchronous else (ordered | fenced)
        if not good.all():
            warp = int(w[int((~good).argmax())])
            line = self.clocks.sites.lines[stamp & self.clocks.sites.mask]
            wave = self.wave
            at = int(np.flatnonzero(self.number == number)[0]) << 3
            text = wave.text
            home = int(self.detector.memory.home[warp])
            who = self.detector.launch.names[home].of(home, agent, stamp)
            ready = ordered[int((~good).argmax())]
            what = "it is not ordered after"
            if asynchronous and ready:
                what = "no fence.mbarrier_init (or fence.proxy.async) between its use by the async proxy and"
            place = self.detector.memory_of_ctas.describe(at)
            raise BarrierInitError(
                f"mbarrier at {place}: {what} the initialisation by {who} at PTX line {line}: "
                f"{wave.ptx_line(line)}{source_of(text, line)}\n    this use:{source_of(text, wave.line)}",
                where=wave.warp_text(warp), other=(line, wave.ptx_line(line), who))  # fmt: skip
        seen[w] = True

    def _by_barrier(self, index, mask):
        """(number, rows) of the barriers at flat indices [n, 32] for the active lanes."""
        rows = np.nonzero(mask)[0]
        numbers = self.number[index[mask] >> 3]
        for number in np.unique(numbers).tolist():
            if number:
                yield number, np.unique(rows[numbers == number])

    def _publish(self, number, rows):
        old = self.arrived[number]
        self.arrived[number] = rows if old is None else np.maximum(self.clocks.widened(old), rows)

    def arrive(self, w, index, mask, limits=None):
        """Arrivals (release) of the active lanes, which publish what the warps know, or these limits of theirs."""
        if limits is None:
            limits = self.clocks.publish(w, packed(mask))
        for number, rows in self._by_barrier(index, mask):
            self._known_init(number, w[rows], False)
            self._publish(number, limits[rows].max(0))

    def signal(self, warp, at, limits=None):
        """An asynchronous operation of the warp will signal the barrier at a flat index: (agent, stamp)."""
        number = int(self.number[at >> 3])
        if number:
            w = np.array([warp])
            self._known_init(number, w, True)
            if limits is None:
                limits = self.clocks.publish(w, self.clocks.lanes.one(w))[0]
            self._publish(number, limits)
        return self.agent_and_stamp(at)

    def flip(self, at):
        """The phase of the barrier at a flat index completes."""
        number = int(self.number[at >> 3])
        if not number:
            return
        clocks = self.clocks
        row = self.arrived[number]
        row = np.zeros(clocks.known.shape[1:], np.uint32) if row is None else clocks.widened(row).copy()
        if self.done[number] is not None:
            row = np.maximum(row, clocks.widened(self.done[number]))
        row[ORDERED, self.agents[number]] = clocks.limit(self.phase[number])
        self.done[number], self.arrived[number] = row, None
        self.phase[number] += 1

    def wait(self, w, index, mask):
        """The active lanes have seen their phase complete (acquire)."""
        for number, rows in self._by_barrier(index, mask):
            self._known_init(number, w[rows], False)
            if self.done[number] is not None:
                self.clocks.acquire(w[rows], self.done[number])
