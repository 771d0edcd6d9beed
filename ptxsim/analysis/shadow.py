"""Shadow memory of the race detector: who read and wrote each granule of shared and global memory last.

A granule is as small as the smallest access of the program, so that every access covers whole granules and neighbours
are never confused. Shared memory keeps the last write and the last read of *every* agent of its CTA (exact). Of reads
by other CTAs of a cluster it keeps one: a write that is ordered after that and races with another goes unnoticed.
Global memory keeps the last write and every read that no later one supersedes, but only four where CTAs synchronise
through it.

Arrays are broadcast together: ``warps`` (whose limits decide), ``first`` (first byte of each access) and ``stamps``;
the granules of an access become a last axis.
"""

from __future__ import annotations

import bisect
import mmap
from dataclasses import dataclass

import numpy as np

from ..machine.global_memory import GLOBAL_BASE
from .clocks import GLOBAL_VISIBLE, ORDERED

_PAGE = 1 << 20  # bytes of a segment where any mapped memory is legal
_ALIGNMENT = 128  # of segments; a multiple of the largest access
AGENT_BITS = 20  # of an agent in its domain; above them the domain, above that the wave
DOMAIN_BITS = 20
_SMALL = 1 << 16  # bytes that cost less to clear than to map
_WIDE_READS = 4  # of a granule that are remembered where CTAs synchronise through global memory


def blank(shape, dtype):
    """Zeros, of which only the pages that are touched cost time: NumPy's are cleared where memory is used again."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    if size < _SMALL:
        return np.zeros(shape, dtype)
    return np.frombuffer(mmap.mmap(-1, size), dtype).reshape(shape)


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
    earlier: str = "write"  # or read
    together: bool = False  # both are one instruction

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

    ``memory`` is the ``SharedMemory``; ``readers`` lists (kind of agent, warp of the CTA) for every agent of a CTA that
    may read shared memory.
    """

    def __init__(self, clocks, memory, granule, readers):
        self.clocks, self.granule, self.wave, self.stride = clocks, granule, clocks.wave, memory.stride
        count = len(memory.bytes) // granule
        self.writer, self.written = blank(count, np.int32), blank(count, np.uint32)
        self.readers = readers
        self.slot = {reader: n for n, reader in enumerate(readers)}
        self.read = blank((len(readers), count), np.uint32)  # stamps
        self.active = []  # slots in use
        self.remote = None  # (agents, stamps) of reads by other CTAs

    def slots(self, kind, w):
        """Slots of the warps' agents of a kind."""
        numbers = self.wave.warp_in_cta[w]
        slots = np.array([self.slot.get((kind, n), -1) for n in range(self.wave.wpc)])[numbers]
        self.active += [s for s in np.unique(slots).tolist() if s not in self.active]
        return slots

    def _known(self, section, warps, agents):
        return self.clocks.known.reshape(-1)[(warps * self.clocks.sections + section) * self.clocks.columns + agents]

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
        wave, clocks = self.wave, self.clocks
        rank = np.int64(0) if clocks.domain_ctas == 1 else first // self.stride % clocks.domain_ctas
        warps, first = warps[..., None], first[..., None]
        for s in self.active:
            kind, number = self.readers[s]
            agents = (clocks.first[kind] + rank * wave.wpc + number)[..., None]
            stamps = self.read[s].reshape(-1, unit)[rows]
            bad = self._known(ORDERED, warps, agents) <= stamps
            if bad.any():
                yield Suspects(bad, warps, first, agents, stamps, None, self.granule, "read")
        if self.remote is not None:
            agents, stamps = (x.reshape(-1, unit)[rows] for x in self.remote)
            bad = self._known(ORDERED, warps, agents) <= stamps
            if bad.any():
                yield Suspects(bad, warps, first, agents, stamps, None, self.granule, "read")

    def note_read(self, first, size, slots, stamps):
        """Reads by agents of the CTA whose memory it is."""
        unit = size // self.granule
        self.read.reshape(len(self.readers), -1, unit)[slots, first // size] = stamps[..., None]

    def note_remote_read(self, first, size, agents, stamps):
        """Reads by agents of another CTA of the cluster, or by bulk loads."""
        if self.remote is None:
            self.remote = blank(self.writer.shape, np.int32), blank(self.written.shape, np.uint32)
        for table, value in zip(self.remote, (agents, stamps), strict=True):
            table.reshape(-1, size // self.granule)[first // size] = np.asarray(value)[..., None]

    def note_write(self, first, size, agents, stamps):
        """Writes by agents of the domain."""
        rows, unit = first // size, size // self.granule
        self.writer.reshape(-1, unit)[rows] = np.asarray(agents)[..., None]
        self.written.reshape(-1, unit)[rows] = np.asarray(stamps)[..., None]

    def overwritten(self, warps, first, size, agents):
        """After noting the writes of one instruction: Suspects if agents wrote the same bytes, else None."""
        rows, unit = first // size, size // self.granule
        found = self.writer.reshape(-1, unit)[rows]
        bad = found != agents[..., None]
        if not bad.any():
            return None
        stamps = self.written.reshape(-1, unit)[rows]
        return Suspects(bad, warps[..., None], first[..., None], found, stamps, None, self.granule, together=True)


class _Segment:
    """Shadow of a legal range of global memory: agents (with wave and domain) and stamps of the last write and of
    reads."""

    def __init__(self, start, size, granule):
        self.start = start
        self.count = -(-size // granule)
        self.tables = {}

    def __contains__(self, name):
        return name in self.tables

    def __getitem__(self, name):
        """(agents, stamps) of "write", of reads 0, 1, … or of reads "elsewhere"; empty at first."""
        if name not in self.tables:
            self.tables[name] = blank(self.count, np.int64), blank(self.count, np.uint32)
        return self.tables[name]


class GlobalShadow:
    """Shadow of global memory during one launch, whose waves come one after the other.

    Bytes are indices from ``memory.GLOBAL_BASE``. CTAs of different waves are as unordered as others; where the program
    synchronises through global memory (``clocks.wide``), what earlier waves did counts as ordered. Parameters and local
    memory are not followed.
    """

    def __init__(self, granule):
        self.granule = granule
        self.segments = {}  # start -> _Segment
        self.wave = -1

    def begin(self, clocks, unfollowed):
        """A new wave; ``unfollowed`` are arrays of parameters and local memory."""
        self.wave += 1
        self.clocks, self.unfollowed = clocks, unfollowed
        self.home = (self.wave << DOMAIN_BITS | clocks.domain_of).astype(np.int64)  # of each warp
        self.ranges = None

    def _ranges(self):
        """(starts, ends) of what is followed, sorted; of a whole mapped process in pages."""
        if self.ranges is None:
            legal = self.clocks.wave.launch.ranges
            found = list(zip(legal.starts, legal.ends, strict=True))
            for array in self.unfollowed:
                low, high = array.ctypes.data, array.ctypes.data + array.nbytes
                found = [part for a, b in found for part in ((a, min(b, low)), (max(a, high), b)) if part[0] < part[1]]
            found = [(a - GLOBAL_BASE, b - GLOBAL_BASE) for a, b in found]
            if not legal.user:
                found = [(page, min(page + _PAGE, b)) for a, b in found for page in range(a, b, _PAGE)]
            self.ranges = [a for a, _ in found], [b for _, b in found]
        return self.ranges

    def parts(self, warps, first, size, *more):
        """(segment, rows, arrays): the accesses and what belongs to them, split by segments."""
        low, high = int(first.min()), int(first.max())
        starts, ends = self._ranges()
        begin, end = bisect.bisect_right(starts, low) - 1, bisect.bisect_right(starts, high)
        for n in range(max(begin, 0), end):
            arrays = (warps, first, *more)
            if end - begin > 1 or high >= ends[n]:
                mine = (first >= starts[n]) & (first < ends[n])
                if not mine.any():
                    continue
                arrays = [np.broadcast_to(x, first.shape)[mine] for x in arrays]
            segment = self.segments.get(starts[n])
            if segment is None:
                aligned = starts[n] & -_ALIGNMENT
                length = -(-(ends[n] - aligned) // _ALIGNMENT) * _ALIGNMENT
                segment = self.segments[starts[n]] = _Segment(aligned, length, self.granule)
            yield segment, (arrays[1] - segment.start) // size, arrays

    def ordered(self, warps, where, rows, unit):
        """(bool array, agents, stamps) of the accesses that a pair of tables holds."""
        agents, stamps = (x.reshape(-1, unit)[rows] for x in where)
        home, local = agents >> AGENT_BITS, agents & (1 << AGENT_BITS) - 1
        same = home == self.home[warps][..., None]
        clocks = self.clocks
        limits = clocks.known.reshape(-1)[
            warps[..., None] * (clocks.sections * clocks.columns) + np.where(same, local, 0)
        ]
        ordered = (stamps == 0) | (same & (stamps < limits))
        if clocks.wide:
            ordered |= ~same
        return ordered, home, local, stamps

    def suspects(self, warps, first, found, earlier="write", together=False):
        """Suspects for what ``ordered`` found, or None."""
        ordered, home, local, stamps = found
        if ordered.all():
            return None
        return Suspects(
            ~ordered, warps[..., None], first[..., None], local, stamps, home, self.granule, earlier, together
        )

    def hidden(self, warps, first, size):
        """Suspects where the last write, ordered and by the generic proxy, is not visible to the async proxy."""
        unit, clocks = size // self.granule, self.clocks
        for segment, rows, (w, at) in self.parts(warps, first, size):
            if "write" not in segment:
                continue
            agents, stamps = (x.reshape(-1, unit)[rows] for x in segment["write"])
            home, local = agents >> AGENT_BITS, agents & (1 << AGENT_BITS) - 1
            place = np.where((stamps != 0) & (home == self.home[w][..., None]), local, -1)
            known = clocks.known[w[..., None], :, place]
            hidden = (place >= 0) & (known[..., ORDERED] > stamps) & (known[..., GLOBAL_VISIBLE] <= stamps)
            if hidden.any():
                yield self.suspects(w, at, (~hidden, home, local, stamps))

    def read(self, warps, first, size, agents, stamps):
        """Note reads; gives Suspects."""
        unit = size // self.granule
        for segment, rows, (w, at, agent, stamp) in self.parts(warps, first, size, agents, stamps):
            if "write" in segment:
                suspects = self.suspects(w, at, self.ordered(w, segment["write"], rows, unit))
                if suspects is not None:
                    yield suspects
            agent = (agent | self.home[w] << AGENT_BITS)[..., None]
            whole = 0
            if 0 in segment:  # the two common cases, then the general one
                ordered, home, *_ = self.ordered(w, segment[0], rows, unit)
                fits = ordered | (segment[0][0].reshape(-1, unit)[rows] == agent)
                if not fits.all():
                    foreign = ~fits & (home != self.home[w][..., None]) & (not self.clocks.wide)
                    whole = "elsewhere" if foreign.all() else None
            if whole is not None:
                for table, value in zip(segment[whole], (agent, stamp[..., None]), strict=True):
                    table.reshape(-1, unit)[rows] = value
                if whole == "elsewhere":
                    continue
                fits = segment[0][0].reshape(-1, unit)[rows] == agent  # several agents may read in one instruction
            if not fits.all():
                places = rows[..., None] * unit + np.arange(unit)
                each = (np.broadcast_to(x, places.shape)[~fits] for x in (w[..., None], agent, stamp[..., None]))
                self._first_fit(segment, places[~fits], *each)

    def _first_fit(self, segment, places, warps, agents, stamps):
        """Note reads [n] of granules, each in the first table whose entry it supersedes: ordered before, or its own.

        Reads by another domain than that of the first table's entry are kept apart, and the last one is enough: whoever
        writes races with one of the two.
        """
        n = 0
        while len(places):
            held, when = segment[n]
            ordered, home, *_ = (x[..., 0] for x in self.ordered(warps, segment[n], places, 1))
            fits = ordered | (held[places] == agents) | (self.clocks.wide and n + 1 == _WIDE_READS)
            foreign = ~fits & (home != self.home[warps]) & (not self.clocks.wide)
            held[places[fits]], when[places[fits]] = agents[fits], stamps[fits]
            if foreign.any():
                other = segment["elsewhere"]
                other[0][places[foreign]], other[1][places[foreign]] = agents[foreign], stamps[foreign]
            left = ~fits & ~foreign | fits & (held[places] != agents)
            places, warps, agents, stamps = places[left], warps[left], agents[left], stamps[left]
            n += 1
            if self.clocks.wide and n == _WIDE_READS:
                return

    def write(self, warps, first, size, agents, stamps):
        """Note writes; gives Suspects."""
        unit = size // self.granule
        for segment, rows, (w, at, agent, stamp) in self.parts(warps, first, size, agents, stamps):
            for name in list(segment.tables):
                found = self.ordered(w, segment[name], rows, unit)
                suspects = self.suspects(w, at, found, "write" if name == "write" else "read")
                if suspects is not None:
                    yield suspects
            agent = (agent | self.home[w] << AGENT_BITS)[..., None]
            agents, stamps = (table.reshape(-1, unit) for table in segment["write"])
            agents[rows], stamps[rows] = agent, stamp[..., None]
            found = agents[rows]
            if (found != agent).any():  # several agents write in one instruction
                home, local = found >> AGENT_BITS, found & (1 << AGENT_BITS) - 1
                yield self.suspects(w, at, (found == agent, home, local, stamps[rows]), together=True)
