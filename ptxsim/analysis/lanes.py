"""Lanes of a warp in the race detector: what some of them know of what all of them wrote.

To the detector the lanes of a warp are one thread, but for this: a release by some lanes (an arrival of an elected
lane, what a copy that one lane issued signals) publishes what they wrote, and what others wrote up to where the lanes
last met; and a bulk store that one lane issued reads no more than that. Lanes meet at bar.warp.sync, which orders
memory among them (elect.sync, shfl.sync and the like do not promise it), and at barriers of the CTA and the cluster.
cp.async is as a write: a lane's wait is for its own copies.

Reads are left out, and are of an agent of their own: CUTLASS's and FlashAttention-4's consumers release a stage by one
lane as soon as the values are in registers. What a warp has stored in tensor memory is only withheld in programs that
have both of the tcgen05 fences: in FlashAttention-4's backward one lane arrives for all after tcgen05.wait::st.
"""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np

from .sites import CP_ASYNC, GENERIC, LANE, TENSOR_ST

_u4 = np.uint32
_ALL = _u4(0xFFFFFFFF)


def packed(M):
    """Masks of lanes [n, 32] as words [n]; None: all lanes."""
    return _ALL if M is None else np.packbits(M, axis=1, bitorder="little").view("<u4")[:, 0]


def _several(lanes):
    """Whether words have more than one lane."""
    return lanes & (lanes - _u4(1)) != 0


class Lanes:
    """Which lanes of each warp have written since they last met; part of ``clocks.Clocks``.

    What one lane writes is of an agent of its own, LANE, and can be released without what several wrote. Finer than
    that nothing is kept: lanes that release what they wrote in one instruction with others release none of it.
    """

    def __init__(self, clocks, warps, followed):
        """``followed``: whether the program has releases that lanes make alone."""
        self.clocks, self.followed = clocks, followed
        self.wrote = {kind: np.zeros(warps, _u4) for kind in (GENERIC, LANE)}
        self.copies = followed and CP_ASYNC in clocks.first
        self.copied = np.zeros(warps, _u4)  # lanes that have issued cp.async
        self.arrived = np.ones(warps, _u4)  # limit of the cp.async that all lanes know to be done
        self.met = np.zeros(warps, np.int64)  # clock of the writes that all lanes know of each other
        self.tensor = TENSOR_ST in clocks.first and clocks.sites.tensor_fences
        self.stored = np.ones(warps, _u4)  # limit of what has been stored in tensor memory that all lanes know of
        self.withheld = {}  # (CTA, warp in it) -> site of the latest release that left something out

    def write(self, w, M):
        """Lanes write; gives the agents of that."""
        agents = self.clocks.agent(GENERIC, w)
        if not self.followed:
            return agents
        if M is None:
            self.wrote[GENERIC][w] = _ALL
            return agents
        lanes = packed(M)
        several = _several(lanes)
        self.wrote[GENERIC][w] |= np.where(several, lanes, _u4(0))
        self.wrote[LANE][w] |= np.where(several, _u4(0), lanes)
        return np.where(several, agents, self.clocks.agent(LANE, w))

    def copy(self, w, M):
        """Lanes issue cp.async."""
        if self.copies:
            self.copied[w] |= packed(M)

    def meet(self, w):
        """All lanes of the warps have met."""
        if self.copies:
            self.arrived[w] = self.clocks.known[w, 0, self.clocks.agent(CP_ASYNC, w)]
        if self.tensor:
            self.stored[w] = self.clocks.known[w, 0, self.clocks.agent(TENSOR_ST, w)]
        w = w[self.wrote[GENERIC][w] | self.wrote[LANE][w] != 0]
        if len(w):
            self.wrote[GENERIC][w] = self.wrote[LANE][w] = 0
            self.met[w] = self.clocks.clock[w]
            self.clocks.tick(w)

    def one(self, w):
        """The one lane of each warp that has written alone, as words; 0 if several have."""
        lanes = self.wrote[LANE][w]
        return np.where(_several(lanes), _u4(0), lanes)

    def _short(self, w, lanes):
        """(rows, agents, limits) of the writes and copies that the lanes of warps do not know."""
        clocks = self.clocks
        for kind, wrote in self.wrote.items():
            short = np.flatnonzero(wrote[w] & ~lanes)
            if len(short):
                yield short, clocks.agent(kind, w[short]), clocks.limit(self.met[w[short]])
        if self.copies:
            short = np.flatnonzero(self.copied[w] & ~lanes)
            if len(short):
                yield short, clocks.agent(CP_ASYNC, w[short]), self.arrived[w[short]]

    def withhold(self, rows, w, lanes):
        """Take out of limits [n, sections, agents] what the lanes that release them do not know."""
        clocks = self.clocks
        for short, agents, limits in self._short(w, lanes):
            rows[short, 0, agents] = limits
            warps = w[short]
            places = clocks.wave.cta_of[warps].tolist(), clocks.wave.warp_in_cta[warps].tolist()
            self.withheld.update(dict.fromkeys(zip(*places, strict=True), clocks.site))
        if self.tensor:
            at = np.arange(len(w)), slice(None), clocks.agent(TENSOR_ST, w)
            rows[at] = np.minimum(rows[at], self.stored[w][:, None])

    @contextmanager
    def alone(self, w):
        """Inside, a warp [1] knows what one lane knows."""
        known, before = self.clocks.known, []
        for _, agent, limit in self._short(w, self.one(w)):
            before.append((agent, known[w, 0, agent]))
            known[w, 0, agent] = limit
        yield
        for agent, limit in before:
            known[w, 0, agent] = limit
