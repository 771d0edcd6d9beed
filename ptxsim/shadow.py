"""Shadow memory of the race detector: who read and wrote each granule of shared and global memory last.

A granule is as small as the smallest access of the program, so that every access covers whole granules and neighbours
are never confused. Shared memory keeps the last write and the last read of *every* agent of its CTA (exact). Reads by
other CTAs of a cluster, and reads of global memory, are kept in one and two places: a write that is ordered after
those and races with a third goes unnoticed.

Arrays are broadcast together: ``warps`` (whose limits decide), ``first`` (first byte of each access) and ``stamps``;
the granules of an access become a last axis.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .clocks import ORDERED, SECTIONS

_PAGE_BITS = 24  # pages of global memory that have shadows
_AGENT_BITS = 20  # of an agent in its domain; above them the domain, above that the wave
_DOMAIN_BITS = 20


@dataclass
class Suspects:
    """Accesses that may conflict with earlier ones: bool array ``bad`` [..., granules of an access]."""

    bad: np.ndarray
    warps: np.ndarray
    first: np.ndarray
    agents: np.ndarray  # in their domain
    stamps: np.ndarray
    homes: np.ndarray | None  # wave and domain of the earlier agents; None: the domain of the warp
    granule: int

    def first_one(self):
        """(warp, first byte, end, earlier agent, its stamp, its home) of one conflict, over all bytes that the same
        warp and the same earlier access share."""
        shape = self.bad.shape
        warps, agents, stamps, homes = (
            np.broadcast_to(x, shape)[self.bad]
            for x in (self.warps, self.agents, self.stamps, -1 if self.homes is None else self.homes)
        )
        start = np.broadcast_to(self.first + np.arange(shape[-1]) * self.granule, shape)[self.bad]
        same = (warps == warps[0]) & (agents == agents[0]) & (stamps == stamps[0])
        span = start[same]
        return (*(int(x) for x in (warps[0], span.min(), span.max() + self.granule)),
                *(int(x[0]) for x in (agents, stamps, homes)))  # fmt: skip


class SharedShadow:
    """Shadow of the shared memory of all CTAs of a wave; bytes are flat indices.

    ``readers`` lists (kind of agent, warp of the CTA) for every agent of a CTA that may read shared memory.
    """

    def __init__(self, clocks, granule, readers):
        self.clocks, self.granule, self.machine = clocks, granule, clocks.machine
        count = len(self.machine.S1) // granule
        self.writer, self.written = np.zeros(count, np.int32), np.zeros(count, np.uint32)
        self.readers = readers
        self.slot = {reader: n for n, reader in enumerate(readers)}
        self.read = np.zeros((len(readers), count), np.uint32)  # stamps; pages that nobody touches cost nothing
        self.active = []  # slots in use
        self.remote = None  # (agents, stamps) of reads by other CTAs

    def slots(self, kind, w):
        """Slots of the warps' agents of a kind."""
        numbers = self.machine.warp_in_cta[w]
        slots = np.array([self.slot.get((kind, n), -1) for n in range(self.machine.wpc)])[numbers]
        self.active += [s for s in np.unique(slots).tolist() if s not in self.active]
        return slots

    def _known(self, section, warps, agents):
        return self.clocks.known.reshape(-1)[(warps * SECTIONS + section) * self.clocks.columns + agents]

    def after_writes(self, warps, first, size, section=ORDERED):
        """Suspects if the last write to some byte is not known to the warps in a section, else None."""
        unit = size // self.granule
        rows = first // size
        agents, stamps = self.writer.reshape(-1, unit)[rows], self.written.reshape(-1, unit)[rows]
        warps, first = warps[..., None], first[..., None]
        bad = self._known(section, warps, agents) <= stamps
        return Suspects(bad, warps, first, agents, stamps, None, self.granule) if bad.any() else None

    def after_reads(self, warps, first, size):
        """Suspects if a read of some byte is not known to the warps, for each agent with such reads."""
        unit = size // self.granule
        rows = first // size
        m, clocks = self.machine, self.clocks
        rank = np.int64(0) if clocks.domain_ctas == 1 else first // m.smem_stride % clocks.domain_ctas
        warps, first = warps[..., None], first[..., None]
        for s in self.active:
            kind, number = self.readers[s]
            agents = (clocks.first[kind] + rank * m.wpc + number)[..., None]
            stamps = self.read[s].reshape(-1, unit)[rows]
            bad = self._known(ORDERED, warps, agents) <= stamps
            if bad.any():
                yield Suspects(bad, warps, first, agents, stamps, None, self.granule)
        if self.remote is not None:
            agents, stamps = (x.reshape(-1, unit)[rows] for x in self.remote)
            bad = self._known(ORDERED, warps, agents) <= stamps
            if bad.any():
                yield Suspects(bad, warps, first, agents, stamps, None, self.granule)

    def note_read(self, first, size, slots, stamps):
        """Reads by agents of the CTA whose memory it is."""
        unit = size // self.granule
        self.read.reshape(len(self.readers), -1, unit)[slots, first // size] = stamps[..., None]

    def note_remote_read(self, first, size, agents, stamps):
        """Reads by agents of another CTA of the cluster, or by bulk loads."""
        if self.remote is None:
            self.remote = np.zeros_like(self.writer), np.zeros_like(self.written)
        for table, value in zip(self.remote, (agents, stamps), strict=True):
            table.reshape(-1, size // self.granule)[first // size] = np.asarray(value)[..., None]

    def note_write(self, first, size, agents, stamps):
        """Writes by agents of the domain."""
        rows = first // size
        self.writer.reshape(-1, size // self.granule)[rows] = np.asarray(agents)[..., None]
        self.written.reshape(-1, size // self.granule)[rows] = np.asarray(stamps)[..., None]


class _Page:
    """Shadow of one page of global memory: agents (with wave and domain) and stamps of the last write and two reads."""

    def __init__(self, granules):
        self.write, self.read, self.other_read = (
            (np.zeros(granules, np.int64), np.zeros(granules, np.uint32)) for _ in range(3)
        )
        self.is_written = self.is_read = False


class GlobalShadow:
    """Shadow of global memory during one launch, whose waves come one after the other. Bytes are addresses.

    CTAs of different waves are as unordered as others; where the program synchronises through global memory
    (``clocks.wide``), what earlier waves did counts as ordered.
    """

    def __init__(self, granule):
        self.granule = granule
        self.pages = {}
        self.wave = -1

    def begin(self, clocks):
        """A new wave."""
        self.wave += 1
        self.clocks = clocks
        self.home = (self.wave << _DOMAIN_BITS | clocks.domain_of).astype(np.int64)  # of each warp

    def ordered(self, warps, where, rows, unit):
        """(bool array, agents, stamps) of the accesses that a pair of tables holds."""
        agents, stamps = (x.reshape(-1, unit)[rows] for x in where)
        home, local = agents >> _AGENT_BITS, agents & (1 << _AGENT_BITS) - 1
        same = home == self.home[warps][..., None]
        clocks = self.clocks
        limits = clocks.known.reshape(-1)[warps[..., None] * (SECTIONS * clocks.columns) + np.where(same, local, 0)]
        ordered = (stamps == 0) | (same & (stamps < limits))
        if clocks.wide:
            ordered |= ~same
        return ordered, home, local, stamps

    def suspects(self, warps, first, found):
        ordered, home, local, stamps = found
        if ordered.all():
            return None
        return Suspects(~ordered, warps[..., None], first[..., None], local, stamps, home, self.granule)

    def pages_of(self, warps, first, size, *more):
        """(page, the arrays for it): the accesses, split by pages."""
        low, high = int(first.min()), int(first.max())
        for number in range(low >> _PAGE_BITS, (high >> _PAGE_BITS) + 1):
            arrays = (warps, first, *more)
            if low >> _PAGE_BITS != high >> _PAGE_BITS:
                mine = first >> _PAGE_BITS == number
                if not mine.any():
                    continue
                arrays = [np.broadcast_to(x, first.shape)[mine] for x in arrays]
            page = self.pages.get(number)
            if page is None:
                page = self.pages[number] = _Page((1 << _PAGE_BITS) // self.granule)
            rows = (arrays[1] & (1 << _PAGE_BITS) - 1) // size
            yield page, rows, arrays

    def read(self, warps, first, size, agents, stamps):
        """Note reads; gives Suspects."""
        unit = size // self.granule
        for page, rows, (w, at, agent, stamp) in self.pages_of(warps, first, size, agents, stamps):
            if page.is_written:
                suspects = self.suspects(w, at, self.ordered(w, page.write, rows, unit))
                if suspects is not None:
                    yield suspects
            agent = (agent | self.home[w] << _AGENT_BITS)[..., None]
            agent, stamp = (np.broadcast_to(x, (*rows.shape, unit)) for x in (agent, stamp[..., None]))
            if page.is_read:
                ordered, *_ = self.ordered(w, page.read, rows, unit)
                if not ordered.all():
                    late = ~ordered
                    places = (rows[..., None] * unit + np.arange(unit))[late]
                    page.other_read[0][places], page.other_read[1][places] = agent[late], stamp[late]
                    places = (rows[..., None] * unit + np.arange(unit))[ordered]
                    page.read[0][places], page.read[1][places] = agent[ordered], stamp[ordered]
                    continue
            page.is_read = True
            page.read[0].reshape(-1, unit)[rows], page.read[1].reshape(-1, unit)[rows] = agent, stamp

    def write(self, warps, first, size, agents, stamps):
        """Note writes; gives Suspects."""
        unit = size // self.granule
        for page, rows, (w, at, agent, stamp) in self.pages_of(warps, first, size, agents, stamps):
            tables = ([page.write] if page.is_written else []) + ([page.read, page.other_read] if page.is_read else [])
            for table in tables:
                suspects = self.suspects(w, at, self.ordered(w, table, rows, unit))
                if suspects is not None:
                    yield suspects
            page.is_written = True
            page.write[0].reshape(-1, unit)[rows] = (agent | self.home[w] << _AGENT_BITS)[..., None]
            page.write[1].reshape(-1, unit)[rows] = stamp[..., None]
