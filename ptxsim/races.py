"""The race detector: orders the memory accesses of a launch by its synchronisation, and checks proxies.

``Machine`` calls it (``Machine.races``, None when it is off) at every access and at every synchronisation. Two accesses
to the same bytes, one of them a write and not both atomic, must be ordered: RaceError. Shared memory written through
the generic proxy must be made visible to the async proxy before wgmma, tcgen05 or a bulk store reads it: ProxyError.
An mbarrier's initialisation must be visible to who uses it: BarrierInitError. What is ordered when:
``ptxsim.clocks``; registers of wgmma: ``ptxsim.wgmma_registers``.

Accesses of asynchronous operations count from the issue on; they are ordered after what the issuing warp knows then,
and before what comes after their completion has been waited for.
"""

from __future__ import annotations

import numpy as np

from . import wgmma_registers
from .clocks import INITIALISED, ORDERED, TENSOR, VISIBLE, Clocks
from .errors import BarrierInitError, ProxyError, RaceError
from .lanes import packed
from .locations import source_of
from .memory import GLOBAL, GLOBAL_BASE
from .release_acquire import ReleaseAcquire
from .shadow import DOMAIN_BITS, GlobalShadow, SharedShadow, Suspects
from .sites import BULK_READ, BULK_WRITE, CLUSTER, CP_ASYNC, CTA, GENERIC, GPU, KIND_NAMES, TCGEN05, WGMMA, Sites
from .tensor_races import TensorRaces
from .warps import full_width


class LaunchHistory:
    """What the waves of one launch share: global memory's shadow, the numbers of PTX lines, names."""

    def __init__(self, program):
        self.sites = Sites.of(program)
        self.memory = GlobalShadow(self.sites.global_granule)
        self.names = {}  # home -> function from an agent to its name

    def detector(self, machine):
        """The detector of one wave."""
        return Detector(machine, self)


class Detector:
    """Hooks of ``Machine`` for one wave. ``w`` are warps, ``M`` masks of lanes or None, as everywhere."""

    def __init__(self, machine, launch):
        wgmma_registers.check(machine.prog)
        self.machine, self.launch, self.sites = machine, launch, launch.sites
        self.clocks = clocks = Clocks(machine, launch.sites)
        self.memory = launch.memory
        self.memory.begin(clocks)
        readers = [(clocks.reader, n) for n in range(machine.wpc)]
        for kind in (WGMMA, BULK_READ, TCGEN05):
            if kind in clocks.first:
                readers += [(kind, n) for n in range(0, machine.wpc, 4 if kind == WGMMA else 1)]
        self.shared = SharedShadow(clocks, launch.sites.shared_granule, readers)
        self.barriers = _Barriers(self)
        self.tensor = TensorRaces(self) if clocks.sections > TENSOR else None
        self.named = {}  # (CTA, barrier) -> (limits of who arrived, warps that wait)
        self.cluster_arrived, self.cluster_done = {}, {}
        self.atomics = ReleaseAcquire(clocks)
        self.tensormap_fences = {}  # (warp, address) -> what the warp knew
        self.issuers = {}  # (home, agent, stamp) of a bulk load -> warp
        wave, names = self.memory.wave, _Names(machine, clocks, self.issuers)
        for domain in np.unique(self.memory.home).tolist():
            launch.names[domain] = names
        self.wave = wave

    # ---- reports ----------------------------------------------------------------------------------
    def _describe(self, start, end, shared):
        if shared:
            m = self.machine
            cta, offset = divmod(start, m.smem_stride)
            return f"shared memory 0x{offset:x} to 0x{offset + end - start - 1:x} of cta{m.cta_name(cta)}"
        return f"global memory 0x{start + GLOBAL_BASE:x} to 0x{end - 1 + GLOBAL_BASE:x}"

    def _raise(self, suspects, message, shared, error=RaceError):
        """Raise unless both accesses are atomic; ``message`` has places for the bytes and the earlier access."""
        if error is RaceError and self.sites.strong[self.clocks.site] >= 0:
            suspects.bad = suspects.bad & ~self._both_atomic(suspects)
            if not suspects.bad.any():
                return
        warp, start, end, agent, stamp, home = suspects.first_one()
        self.report(error, message, warp, agent, stamp, home, bytes=self._describe(start, end, shared))

    def _both_atomic(self, suspects):
        """Whether both accesses are atomic and each one's scope contains the other's thread; bool array as ``bad``."""
        clocks, m = self.clocks, self.machine
        scope = np.minimum(self.sites.strong[suspects.stamps & self.sites.mask], self.sites.strong[clocks.site])
        home = self.memory.home[suspects.warps]
        cta = clocks.domain_of[suspects.warps] * clocks.domain_ctas + clocks.cta_in_domain(suspects.agents)
        mine = m.cta_of[suspects.warps]
        distance = np.where(cta == mine, CTA, np.where(cta // m.cluster_size == mine // m.cluster_size, CLUSTER, GPU))
        distance = np.where(suspects.agents >= clocks.fixed, CTA, distance)  # red.async
        if suspects.homes is not None:
            distance = np.where(suspects.homes == home, distance, GPU)
        return scope >= distance

    def report(self, error, message, warp, agent, stamp, home=-1, **places):
        """Raise an error of the warp's access; ``agent``, ``stamp``: the earlier one's, in its domain or ``home``."""
        if home < 0:
            home = int(self.memory.home[warp])
        m = self.machine
        line = self.sites.lines[stamp & self.sites.mask]
        who = self.launch.names[home].of(home, agent, stamp)
        text = m.prog.k.module.text
        before = f"{who} at PTX line {line}: {m.ptx_line(line)}{source_of(text, line)}"
        before += self._lanes_alone(warp, agent, home, text)
        raise error(message.format(before=before, **places) + source_of(text, m.line), where=m.warp_text(warp),
                    other=(line, m.ptx_line(line), who))  # fmt: skip

    def _lanes_alone(self, warp, agent, home, text):
        """A word on an earlier access that lanes of the same warp made, or whose warp released by some lanes alone."""
        clocks, m = self.clocks, self.machine
        wave, domain = divmod(home, 1 << DOMAIN_BITS)
        if wave != self.wave or not clocks.is_generic(agent):
            return ""
        cta, earlier = domain * clocks.domain_ctas + clocks.cta_in_domain(agent), agent % m.wpc
        if (cta, earlier) == (m.cta_of[warp], m.warp_in_cta[warp]):
            return "\n    (lanes of the same warp: bar.warp.sync orders them)"
        site = clocks.lanes.withheld.get((cta, earlier))
        if site is None:
            return ""
        line = self.sites.lines[site]
        place = f"PTX line {line}{source_of(text, line)}"
        return f"\n    (at {place} some lanes of that warp release alone: bar.warp.sync before it is missing)"

    def _not_ordered(self, suspects, now, shared, stored=None):
        """``stored``: what a plain store writes, see ``_same_bytes``; two writes of the same value do not count.

        FlashAttention-4's backward preprocess kernel has such: threads beyond the tile write the next one's LSE.
        """
        if suspects.earlier == now == "write" and stored is not None:
            suspects.bad = suspects.bad & ~np.isin(suspects.first, _same_bytes(*stored, suspects.together))
            if not suspects.bad.any():
                return
        self._raise(suspects, f"race: this {now} of {{bytes}} is not ordered after the {suspects.earlier} by {{before}}"
                              "\n    this access:", shared)  # fmt: skip

    # ---- accesses of the generic proxy ------------------------------------------------------------
    @staticmethod
    def _lanes(w, index, M):
        """(rows of w, warps, indices) of the active lanes, broadcast together."""
        if M is None:
            return np.arange(len(w))[:, None], w[:, None], index
        rows = np.nonzero(M)[0]
        return rows, w[rows], index[M] if index.shape == M.shape else index

    def read_shared(self, w, index, size, M):
        """Reads of ``size`` bytes at flat indices [n, lanes]."""
        rows, warps, first = self._lanes(w, index, M)
        if not first.size:
            return
        stamps = self.clocks.stamps(w)
        self._check_read(warps, first, size)
        if self.machine.cluster_size > 1:
            remote = first // self.machine.smem_stride != self.machine.cta_of[warps]
            if remote.any():
                warps, rows = (np.broadcast_to(x, first.shape) for x in (warps, rows))
                agents = self.clocks.agent(self.clocks.reader, warps[remote])
                self.shared.note_remote_read(first[remote], size, agents, stamps[rows[remote]])
                warps, rows, first = (x[~remote] for x in (warps, rows, first))
                if not first.size:
                    return
        self.shared.note_read(first, size, self.shared.slots(self.clocks.reader, w)[rows], stamps[rows])

    def write_shared(self, w, index, size, M, values=None):
        """Writes, and atomics, of ``size`` bytes at flat indices [n, lanes]; ``values`` as in ``write_global``."""
        rows, warps, first = self._lanes(w, index, M)
        if first.size:
            agents = self.clocks.lanes.write(w, M)[rows]
            stored = values and (self.machine.S, first, size, values, M)
            self._write(warps, first, size, agents, self.clocks.stamps(w)[rows], stored)

    def _write(self, warps, first, size, agents, stamps, stored=None):
        """Check and note the writes of one instruction."""
        self._check_write(warps, first, size, stored)
        self.shared.note_write(first, size, agents, stamps)
        suspects = self.shared.overwritten(warps, first, size, agents)
        if suspects is not None:
            self._not_ordered(suspects, "write", True, stored)

    def _check_read(self, warps, first, size):
        suspects = self.shared.after_writes(warps, first, size)
        if suspects is not None:
            self._not_ordered(suspects, "read", True)

    def _check_write(self, warps, first, size, stored=None):
        suspects = self.shared.after_writes(warps, first, size)
        if suspects is not None:
            self._not_ordered(suspects, "write", True, stored)
        for suspects in self.shared.after_reads(warps, first, size):
            self._not_ordered(suspects, "write", True)

    def _check_visible(self, warps, first, size):
        """Reads by the async proxy: also what the generic proxy wrote must be visible to it."""
        self._check_read(warps, first, size)
        suspects = self.shared.after_writes(warps, first, size, VISIBLE)
        if suspects is not None:
            self._raise(suspects, "no fence.proxy.async between the async proxy's read of {bytes} and the write by "
                                  "{before}\n    the read:", True, ProxyError)  # fmt: skip

    def read_global(self, w, index, size, M, agents=None, stamps=None):
        """Reads of ``size`` bytes; ``index`` as ``MemoryMixin.global_index`` gives it."""
        self._global(w, index, size, M, agents, stamps, False)

    def write_global(self, w, index, size, M, agents=None, stamps=None, values=None):
        """Writes; ``values`` are the elements that each lane of a plain store is about to write."""
        self._global(w, index, size, M, agents, stamps, True, values)

    def _global(self, w, index, size, M, agents, stamps, writes, values=None):
        rows, warps, first = self._lanes(w, index, M)
        if not first.size:
            return
        if agents is None:
            agents = self.clocks.lanes.write(w, M) if writes else self.clocks.agent(self.clocks.reader, w)
        if not writes and M is None and (first[:, 1:] == first[:, :1]).all():
            first = first[:, :1]  # all lanes read the same
        agents = agents[rows]
        stamps = (self.clocks.stamps(w) if stamps is None else stamps)[rows]
        now = "write" if writes else "read"
        for suspects in (self.memory.write if writes else self.memory.read)(warps, first, size, agents, stamps):
            self._not_ordered(suspects, now, False, values and (GLOBAL, first, size, values, M))

    # ---- cp.async ---------------------------------------------------------------------------------
    def cp_async(self, w, index, source, size, source_size, mask):
        """Issue of cp.async: flat indices of the destination, global addresses [n, 32] and bytes of them, or None."""
        agents, stamps = self.clocks.agent(CP_ASYNC, w), self.clocks.async_stamps(CP_ASYNC, w)
        rows, warps, first = self._lanes(w, index, mask)
        if not first.size:
            return
        self._write(warps, first, size, agents[rows], stamps[rows])
        reading = mask if source_size is None else mask & (source_size > 0)
        if reading.any():
            found = source.view(np.int64) - GLOBAL_BASE if source.flags.c_contiguous else (
                source.astype(np.int64) - GLOBAL_BASE)  # fmt: skip
            self.read_global(w, found[reading] & -size, size, reading, agents, stamps)

    def cp_async_arrive(self, w, index, mask):
        """cp.async.mbarrier.arrive: the arrival happens after the copies."""
        self.barriers.arrive(w, index, mask, self.clocks.issued(CP_ASYNC, w))

    def commit(self, kind, w):
        """The warps close a group of asynchronous operations of a kind."""
        if kind in self.clocks.groups:
            self.clocks.commit(kind, w)

    def wait(self, kind, w, keep):
        """The warps have waited for all but ``keep`` groups of a kind; None: for everything."""
        if kind in self.clocks.groups:
            self.clocks.wait(kind, w, keep)

    # ---- wgmma and tcgen05 ------------------------------------------------------------------------
    def wgmma(self, w, descriptors, chunks_of, parts):
        """wgmmas read an operand in shared memory: descriptors of the warps, and a function from a descriptor to the
        numbers of its 16-byte chunks in the CTA, [parts, chunks]: 1 if each warp reads all of it, 4 if the warps of a
        warpgroup read one part each.
        """
        m = self.machine
        quarter = m.warp_in_cta[w] & 3
        descriptors = full_width(descriptors, len(w))[:, 0]
        stamps, slots = self.clocks.async_stamps(WGMMA, w), self.shared.slots(WGMMA, w - m.nctas * quarter)
        for descriptor in np.unique(descriptors).tolist():
            rows = np.flatnonzero(descriptors == descriptor)
            part = quarter[rows] if parts == 4 else np.zeros_like(rows)
            chunks = chunks_of(descriptor)[part] * 16 + (m.cta_of[w[rows]] * m.smem_stride)[:, None]
            self._check_visible(w[rows][:, None], chunks, 16)
            if parts == 1:  # the warps of a warpgroup are one reader
                _, one = np.unique(slots[rows] + len(self.shared.readers) * m.cta_of[w[rows]], return_index=True)
                rows, chunks = rows[one], chunks[one]
            self.shared.note_read(chunks, 16, slots[rows][:, None], stamps[rows][:, None])

    def tensor_core(self, warp, cta, chunks):
        """A tcgen05 operation of a warp reads 16-byte chunks of a CTA's shared memory."""
        m, w = self.machine, np.array([warp])
        first = chunks.reshape(1, -1) * 16 + cta * m.smem_stride
        self._check_visible(w[:, None], first, 16)
        stamps = self.clocks.async_stamps(TCGEN05, w)[:, None]
        if cta == m.cta_of[warp]:
            self.shared.note_read(first, 16, self.shared.slots(TCGEN05, w)[:, None], stamps)
        else:
            self.shared.note_remote_read(first, 16, self.clocks.agent(TCGEN05, w)[:, None], stamps)

    # ---- bulk copies ------------------------------------------------------------------------------
    def bulk_load(self, warp, cta, offset, size, signal, source=None, step=16, name="the bulk load"):
        """A bulk load writes a region of a CTA's shared memory and signals the mbarrier at a flat index.

        ``source``: flat indices of the 16-byte chunks of shared memory that it reads, if any; ``step``: bytes of one
        access, 16 or, for what completes in the same way, ``size``; ``name``: what reports call it.
        """
        first = cta * self.machine.smem_stride + np.arange(offset, offset + size, step)[None]
        w = np.array([warp])
        self._check_write(w[:, None], first, step)
        agent, stamp = self.barriers.signal(warp, signal)
        self.issuers[int(self.memory.home[warp]), agent, int(stamp)] = f"{name} of {self.machine.warp_text(warp)}"
        self.shared.note_write(first, step, np.array(agent), np.array(stamp))
        if source is not None:
            self._check_visible(w[:, None], source[None], 16)
            self.shared.note_remote_read(source[None], 16, np.array(agent), np.array(stamp))

    def bulk_read(self, warp, signal, index, size):
        """A bulk load reads global memory: pieces of ``size`` bytes."""
        agent, stamp = self.barriers.agent_and_stamp(signal)
        one = np.array([agent]), np.array([stamp], np.uint32)
        self.read_global(np.array([warp]), index.reshape(1, -1), size, None, *one)
        self._check_global_visible(warp, index, size)

    def _check_global_visible(self, warp, index, size):
        """Reads of global memory by the async proxy: what the generic proxy wrote must be visible to it."""
        if not index.size:
            return
        for suspects in self.memory.hidden(np.array([[warp]]), index.reshape(1, -1), size):
            self._raise(suspects, "no fence.proxy.async between the async proxy's read of {bytes} and the write by "
                                  "{before}\n    the read:", False, ProxyError)  # fmt: skip

    def bulk_store(self, warp, chunks, index, size, reduces=False):
        """A bulk store: flat indices of the 16-byte chunks that it reads, and pieces of ``size`` bytes of global memory
        that it writes; ``reduces``: and reads."""
        w = np.array([warp])
        stamps = self.clocks.async_stamps(BULK_READ, w)
        first = chunks.reshape(1, -1)
        with self.clocks.lanes.alone(w):
            self._check_visible(w[:, None], first, 16)
        self.shared.note_read(first, 16, self.shared.slots(BULK_READ, w)[:, None], stamps[:, None])
        if reduces:
            self._check_global_visible(warp, index, size)
        self.write_global(w, index.reshape(1, -1), size, None, self.clocks.agent(BULK_WRITE, w), stamps)

    def bulk_wait(self, w, keep, read):
        """cp.async.bulk.wait_group; with .read only the reads of shared memory are done."""
        if BULK_READ in self.clocks.groups:
            self.clocks.wait(BULK_READ, w, keep, (BULK_READ,) if read else (BULK_READ, BULK_WRITE))

    def tensor_map(self, warp, address):
        """A tensor copy reads the tensor map at a global address: what wrote it must be ordered, and fenced."""
        index = np.array([[int(address) - GLOBAL_BASE]])
        w = np.array([warp])
        for segment, rows, _ in self.memory.parts(w[:, None], index, 64):
            for half in (0, 1) if "write" in segment else ():
                ordered, home, agents, stamps = self.memory.ordered(w[:, None], segment["write"], rows + half,
                                                                    64 // self.memory.granule)  # fmt: skip
                if not stamps.any():
                    continue
                suspects = self.memory.suspects(w[:, None], index + 64 * half, (ordered, home, agents, stamps))
                if suspects is not None:
                    self._not_ordered(suspects, "use of the tensor map", False)
                fenced = self.tensormap_fences.get((int(warp), int(address)))
                limits = 0 if fenced is None else np.pad(fenced, (0, self.clocks.columns - len(fenced)))[agents]
                hidden = (stamps != 0) & (limits <= stamps)
                if hidden.any():
                    found = (~hidden, home, agents, stamps)
                    self._raise(self.memory.suspects(w[:, None], index + 64 * half, found),
                                "no fence.proxy.tensormap between the use of the tensor map in {bytes} and the write "
                                "by {before}\n    the use:", False, ProxyError)  # fmt: skip

    def exit(self, w):
        """Warps end, and CTAs with their last ones: shared memory is given up."""
        if BULK_READ in self.clocks.first:
            self._stores_are_over(w)
        m = self.machine
        if m.cluster_size > 1 or self.issuers:
            for cta in np.unique(m.cta_of[w]).tolist():
                if not m.alive[m.cta_of == cta].any():
                    self._others_are_over(cta, int(w[m.cta_of[w] == cta][-1]))

    def _others_are_over(self, cta, warp):
        """A CTA ends: what bulk loads and other CTAs of the cluster did in its shared memory must be in the past of one
        of its warps. ``warp`` is the last one."""
        m, clocks, shared = self.machine, self.clocks, self.shared
        limits = clocks.known[m.cta_of == cta, ORDERED].max(0)
        start = cta * m.smem_stride
        granules = slice(start // shared.granule, (start + m.smem_stride) // shared.granule)
        tables = [("write", (shared.writer, shared.written))]
        if shared.remote is not None:
            tables.append(("read", shared.remote))
        for earlier, (agents, stamps) in tables:
            agents, stamps = agents[granules], stamps[granules]
            mine = clocks.cta_in_domain(agents) == cta % clocks.domain_ctas
            bad = (stamps != 0) & (limits[agents] <= stamps) & ((agents >= clocks.fixed) | ~mine)
            if bad.any():
                first = (start + shared.granule * np.arange(len(bad)))[:, None]
                suspects = Suspects(bad[:, None], np.array(warp), first, agents[:, None], stamps[:, None], None,
                                    shared.granule)  # fmt: skip
                self._raise(suspects, f"race: the CTA ends and gives up {{bytes}}, not ordered after the {earlier} by "
                                      "{before}\n    the last instruction:", True)  # fmt: skip

    def _stores_are_over(self, w):
        """Shared memory must not be given up while bulk stores of the warps read it."""
        m = self.machine
        for warp in w.tolist():
            slot = self.shared.slot[BULK_READ, m.warp_in_cta[warp]]
            if slot not in self.shared.active:
                continue
            unit = 16 // self.shared.granule
            start = m.cta_of[warp] * m.smem_stride
            stamps = self.shared.read[slot].reshape(-1, unit)[start >> 4 : start + m.smem_stride >> 4]
            agent = int(self.clocks.agent(BULK_READ, np.array([warp]))[0])
            bad = stamps >= self.clocks.known[warp, ORDERED, agent]
            if bad.any():
                first = (start + 16 * np.arange(len(stamps)))[:, None]
                suspects = Suspects(bad, np.array(warp), first, np.array(agent), stamps, None, self.shared.granule)
                self._raise(suspects, "race: the warp ends without cp.async.bulk.wait_group, while {bytes} is still "
                                      "being read by {before}\n    the last instruction:", True)  # fmt: skip

    # ---- barriers of CTAs and clusters ------------------------------------------------------------
    def bar_arrive(self, warp, cta, barrier, waits):
        """A warp arrives at a named barrier; ``waits``: with bar.sync."""
        row = self.clocks.publish(np.array([warp]))[0]
        limits, waiting = self.named.setdefault((cta, barrier), (np.zeros_like(row), []))
        if limits.shape != row.shape:
            limits = self.clocks.widened(limits)
        self.named[cta, barrier] = np.maximum(limits, row), waiting
        if waits:
            self.clocks.lanes.meet(np.array([warp]))
            waiting.append(warp)

    def bar_complete(self, cta, barrier):
        """Everybody has arrived."""
        limits, waiting = self.named.pop((cta, barrier), (None, ()))
        if len(waiting):
            self.clocks.acquire(np.array(waiting), limits)

    def bar_together(self, w, cta, waits):
        """All warps of whole CTAs arrive at a named barrier in one step."""
        rows = self.clocks.publish(w)
        if not waits:
            return
        self.clocks.lanes.meet(w)
        order = np.argsort(cta, kind="stable")
        first = np.flatnonzero(np.diff(cta[order], prepend=-1))
        limits = np.maximum.reduceat(rows[order], first)
        self.clocks.acquire(w[order], np.repeat(limits, np.diff(first, append=len(order)), axis=0))

    def cluster_arrive(self, w, cluster, relaxed):
        """barrier.cluster.arrive; .relaxed publishes only what fences have."""
        before = self.atomics.fenced_rows(w, CLUSTER) if relaxed else None
        rows = self.clocks.publish(w)
        if relaxed:
            for section in (INITIALISED, TENSOR):
                before[:, section : section + 1] = rows[:, section : section + 1]
            rows = before
        for c in np.unique(cluster).tolist():
            mine = rows[cluster == c].max(0)
            old = self.cluster_arrived.get(c)
            if old is not None:
                mine = np.maximum(mine, self.clocks.widened(old))
            self.cluster_arrived[c] = mine

    def cluster_complete(self, c):
        """All warps of the cluster have arrived."""
        self.cluster_done[c] = self.cluster_arrived.pop(c, None)

    def cluster_wait(self, w, cluster):
        """barrier.cluster.wait lets the warps go on."""
        self.clocks.lanes.meet(w)
        for c in np.unique(cluster).tolist():
            if self.cluster_done.get(c) is not None:
                self.clocks.acquire(w[cluster == c], self.cluster_done[c])

    def warp_barrier(self, w):
        """bar.warp.sync."""
        self.clocks.lanes.meet(w)

    # ---- fences and atomics -----------------------------------------------------------------------
    def fence(self, w, M, *sections):
        """fence.proxy.async, for the sections of ``Clocks`` of the memory that it names; fence.mbarrier_init."""
        if M is not None:
            w = w[M.any(1)]
        for section in sections:
            self.clocks.fence(w, section)
        self.clocks.tick(w)

    def fence_memory(self, w, M, scope):
        """fence.acq_rel, fence.sc or membar of a scope of ``ptxsim.sites``."""
        self.atomics.fence(w if M is None else w[M.any(1)], scope)

    def grid_wait(self, w, M):
        """griddepcontrol.wait: only where there may be something to wait for, see ``ptxsim.dependents``."""

    def fence_tensormap(self, w, address, M):
        """fence.proxy.tensormap::generic.acquire of the tensor map at a global address."""
        address = full_width(address, len(w))
        for j, lane in self.machine.active_threads(w, M):
            self.tensormap_fences[int(w[j]), int(address[j, lane])] = self.clocks.known[w[j], ORDERED].copy()


def _same_bytes(pool, first, size, values, M, together):
    """First bytes of the places where a store changes nothing, however its lanes and earlier writes are ordered.

    All lanes that write there agree, and unless only they count (``together``) the place already holds their value.
    """
    lanes = [np.broadcast_to(v, first.shape).ravel() if M is None else np.broadcast_to(v, M.shape)[M] for v in values]
    words, item = np.stack(lanes, -1), size // len(values)
    places, at, inverse = np.unique(first.ravel(), return_index=True, return_inverse=True)
    expected = words[at][inverse]
    if not together:
        expected = pool[words.dtype][first.ravel()[:, None] // item + np.arange(len(values))]
    differs = (words != words[at][inverse]).any(1) | (words != expected).any(1)
    return np.setdiff1d(places, first.ravel()[differs])


class _Names:
    """Names of a wave's agents, for messages."""

    def __init__(self, machine, clocks, issuers):
        self.ctas = [machine.cta_name(c) for c in range(machine.nctas)]
        self.first, self.wpc, self.fixed = clocks.first, machine.wpc, clocks.fixed
        self.domain_ctas, self.domain_warps = clocks.domain_ctas, clocks.domain_warps
        self.issuers = issuers

    def of(self, home, agent, stamp):
        """Name of an agent of a domain."""
        if agent >= self.fixed:
            return self.issuers.get((home, agent, stamp), "the bulk load of a warp")
        number, place = divmod(agent, self.domain_warps)
        cta, warp = divmod(place, self.wpc)
        kind = next(k for k, first in self.first.items() if first == number * self.domain_warps)
        cta += home % (1 << DOMAIN_BITS) * self.domain_ctas
        return f"{KIND_NAMES[kind]}cta{self.ctas[cta]}.w{warp}"


class _Barriers:
    """mbarriers: what their phases publish. They are numbered from 1 on as they are initialised."""

    def __init__(self, detector):
        self.detector, self.clocks, self.machine = detector, detector.clocks, detector.machine
        self.number = np.zeros(len(self.machine.S1) >> 3, np.int32)  # by flat index / 8
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
            self.verified[number] = np.zeros((2, self.machine.nwarps), bool)
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
            m = self.machine
            at = int(np.flatnonzero(self.number == number)[0]) << 3
            text = m.prog.k.module.text
            home = int(self.detector.memory.home[warp])
            who = self.detector.launch.names[home].of(home, agent, stamp)
            ready = ordered[int((~good).argmax())]
            what = "it is not ordered after"
            if asynchronous and ready:
                what = "no fence.mbarrier_init (or fence.proxy.async) between its use by the async proxy and"
            raise BarrierInitError(
                f"mbarrier at {m.describe_shared(at)}: {what} the initialisation by {who} at PTX line {line}: "
                f"{m.ptx_line(line)}{source_of(text, line)}\n    this use:{source_of(text, m.line)}",
                where=m.warp_text(warp), other=(line, m.ptx_line(line), who))  # fmt: skip
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
