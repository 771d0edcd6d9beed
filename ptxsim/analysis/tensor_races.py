"""Tensor memory in the race detector: PTX ISA 9.7.16.6, memory consistency model of tcgen05.

tcgen05.ld, st, mma, cp and shift are asynchronous. In one thread, mma, cp and shift execute in the order of issue; any
other pair needs the earlier one's completion: tcgen05.wait::ld, tcgen05.wait::st, or tcgen05.commit and a wait at its
mbarrier. Between threads, tcgen05.fence::before_thread_sync must come before what synchronises (commit implies it) and
tcgen05.fence::after_thread_sync after it, also in a thread that waits for its own commit; mma, cp and shift of two
threads need the fences but no completion. An instruction that reads a register of a tcgen05.ld waits for it.

More is accepted than the ISA promises. It orders two mma only if shape, kind and accumulator are the same, and cp after
mma not at all: FlashAttention-4 lets S overwrite P that the mma before still reads, CUTLASS copies the next scale
factors under an mma. And it asks for tcgen05.wait::ld although the registers have been read: FlashAttention-4 computes
P of them, stores it over S and hands it on. Here that is a wait for this load and for those before it.

A program that lacks either of the fences altogether is checked as if it had both around everything that synchronises:
FlashAttention-4 and quack leave them out, and are right on hardware. Completion is asked of every program.

A cell is 16 lanes of a column, as much as the narrowest access. The last write and the last read of every agent are
kept.
"""

from __future__ import annotations

import numpy as np

from ..errors import RaceError, TensorFenceError
from .clocks import ORDERED, TENSOR
from .shadow import blank
from .sites import ISSUED, TCGEN05, TENSOR_LD, TENSOR_ST

LANES, COLUMNS = 16, 512  # of a cell; of tensor memory
_CELLS = 128 // LANES * COLUMNS  # of a CTA


class TensorRaces:
    """What ``races.Detector`` hears of tensor memory."""

    def __init__(self, detector):
        self.detector, self.clocks, self.wave = detector, detector.clocks, detector.wave
        wave = self.wave
        count = wave.nctas * _CELLS
        self.writer, self.written = blank(count, np.int32), blank(count, np.uint32)
        # readers of a CTA's cells: tcgen05.ld of its warps, then the mma of the warps of its cluster
        self.read = blank((wave.wpc * (1 + wave.cluster_size), count), np.uint32)
        self.active = []
        self.fenced = self.clocks.sites.tensor_fences
        self.loaded = np.zeros(
            (wave.nwarps, len(self.clocks.sites.lines)), np.int64
        )  # clock of a warp's latest, by site
        self.patterns = {}  # of loads and stores of registers, see ``registers``

    # ---- accesses ---------------------------------------------------------------------------------
    def registers(self, w, lane, column, shape, writes):
        """tcgen05.ld or st: lanes and columns [warps, …] that each warp touches; equal ``shape``, equal differences."""
        cells = lane // LANES * COLUMNS + column
        cells = cells.reshape(len(w), -1)
        pattern = self.patterns.get(shape)
        if pattern is None:
            pattern = self.patterns[shape] = np.unique(cells[0] - cells[0, 0])
        cells = self.wave.cta_of[w][:, None] * _CELLS + cells[:, :1] + pattern
        self._access(w, cells, TENSOR_ST if writes else TENSOR_LD, writes)
        if not writes:
            clock = self.clocks.groups[TENSOR_LD].clock
            self.loaded[w, self.clocks.site] = clock[w]
            clock[w] += 1

    def matrix(self, warp, cta, lanes, first, count, writes):
        """tcgen05.mma, cp or shift of a warp: ``count`` columns from ``first`` on of some lanes of a CTA."""
        self._access(np.array([warp]), self._cells(cta, lanes, first, count), TCGEN05, writes)

    def free(self, warp, cta, first, count):
        """tcgen05.dealloc: nobody may still access the columns."""
        cells, w = self._cells(cta, np.arange(128), first, count), np.array([warp])
        for agents, table, earlier in self._earlier(cells, True):
            bad = table[cells] >= self.clocks.known[w[:, None], ORDERED, agents]
            if bad.any():
                self._raise(w, cells, agents, table[cells], bad, earlier, "deallocation", TCGEN05)
            table[cells] = 0

    @staticmethod
    def _cells(cta, lanes, first, count):
        """Numbers of the cells of lanes and columns of a CTA [1, cells]."""
        groups = np.unique(np.asarray(lanes) // LANES)[:, None]
        return (cta * _CELLS + groups * COLUMNS + np.arange(first, first + count)).reshape(1, -1)

    def _earlier(self, cells, writes):
        """(agents of the earlier accesses, the table of their stamps, what they are) to compare an access with."""
        yield self.writer[cells], self.written, "write"
        clocks, wave = self.clocks, self.wave
        for slot in self.active if writes else ():
            rank, number = divmod(slot, wave.wpc)
            cta = cells // _CELLS
            kind = TENSOR_LD
            if rank:
                kind, cta = TCGEN05, cta // wave.cluster_size * wave.cluster_size + rank - 1
            yield clocks.first[kind] + cta % clocks.domain_ctas * wave.wpc + number, self.read[slot], "read"

    def _access(self, w, cells, kind, writes):
        clocks, wave = self.clocks, self.wave
        for agents, table, earlier in self._earlier(cells, writes):
            stamps = table[cells]
            columns = self._columns(agents, kind)
            bad = stamps >= (clocks.tensor[w[:, None], columns] if self.fenced else
                             clocks.known[w[:, None], ORDERED, columns])  # fmt: skip
            if kind == TCGEN05:
                bad &= agents != clocks.agent(TCGEN05, w)[:, None]  # in the order of issue
            if bad.any():
                self._raise(w, cells, agents, stamps, bad, earlier, "write" if writes else "read", kind)
        stamps = clocks.async_stamps(kind, w)[:, None]
        if kind == TCGEN05:
            clocks.tensor_issued(w)
        if writes:
            self.writer[cells], self.written[cells] = clocks.agent(kind, w)[:, None], stamps
            return
        slots = wave.warp_in_cta[w]
        if kind == TCGEN05:
            slots = slots + wave.wpc * (1 + wave.cta_of[w] % wave.cluster_size)
        self.active += [s for s in np.unique(slots).tolist() if s not in self.active]
        self.read[slots[:, None], cells] = stamps

    def _columns(self, agents, kind):
        """Columns of the limits: mma after mma need not wait for it."""
        if kind != TCGEN05:
            return agents
        first, warps = self.clocks.first[TCGEN05], self.clocks.domain_warps
        matrix = (agents >= first) & (agents < first + warps)
        return np.where(matrix, agents - first + self.clocks.first[ISSUED], agents)

    def _raise(self, w, cells, agents, stamps, bad, earlier, now, kind):
        agents, columns = (np.broadcast_to(x, bad.shape) for x in (agents, self._columns(agents, kind)))
        row, at = (int(x[0]) for x in np.nonzero(bad))
        warp, agent, stamp, column = int(w[row]), int(agents[row, at]), int(stamps[row, at]), int(columns[row, at])
        same = bad[row] & (agents[row] == agent) & (stamps[row] == stamp)
        cta, places = int(cells[row, at]) // _CELLS, cells[row][same] % _CELLS
        lanes, columns = places // COLUMNS * LANES, places % COLUMNS
        where = (f"tensor memory lanes {lanes.min()} to {lanes.max() + LANES - 1}, columns {columns.min()} to "
                 f"{columns.max()} of cta{self.wave.cta_name(cta)}")  # fmt: skip
        known, error = self.clocks.known[warp], TensorFenceError
        if known[ORDERED, column] <= stamp:
            error, message = RaceError, f"race: this {now} of {where} is not ordered after the {earlier}"
        else:
            side = "before" if known[TENSOR, column] <= stamp else "after"
            message = (
                f"no tcgen05.fence::{side}_thread_sync around what orders this {now} of {where} after the {earlier}"
            )
        self.detector.report(error, message + " by {before}\n    this access:", warp, agent, stamp)

    # ---- what orders ------------------------------------------------------------------------------
    def wait(self, w, what):
        """tcgen05.wait::ld or ::st of the warps."""
        self.clocks.tensor_wait(TENSOR_LD if what == "ld" else TENSOR_ST, w)

    def use(self, w, lines):
        """The warps read registers of tcgen05.ld at these PTX lines."""
        if self.fenced:
            return
        sites = [self.clocks.sites.number[line] for line in lines]
        self.clocks.tensor_done(TENSOR_LD, w, self.loaded[w][:, sites].max(1))

    def fence(self, w, side):
        """tcgen05.fence::before_thread_sync or ::after_thread_sync of the warps."""
        if side == "before_thread_sync":
            self.clocks.tensor_before(w)
        else:
            self.clocks.tensor_after(w)

    def commit(self, warp, index):
        """tcgen05.commit: what the warp issued happens before the phase of the mbarrier at a flat index completes."""
        self.detector.barriers.signal(warp, int(index), self.clocks.tensor_committed(np.array([warp]))[0])
