"""The race detector: orders the memory accesses of a launch by its synchronisation, and checks proxies.

It is an observer of the machine, and hears of every access and every synchronisation. Two accesses to the same bytes,
one of them a write and not both atomic, must be ordered: RaceError. Shared memory written through the generic proxy
must be made visible to the async proxy before wgmma, tcgen05 or a bulk store reads it: ProxyError. An mbarrier's
initialisation must be visible to who uses it: BarrierInitError. What is ordered when: ``clocks``; registers of wgmma:
``wgmma_registers``.

Accesses of asynchronous operations count from the issue on; they are ordered after what the issuing warp knows then,
and before what comes after their completion has been waited for.
"""

from __future__ import annotations

import numpy as np

from ..arrays import active_threads, active_warps, full_width
from ..errors import ProxyError, RaceError
from ..frontend.locations import source_of
from ..machine.events import Observer
from ..machine.global_memory import GLOBAL, GLOBAL_BASE
from ..ops.scopes import CLUSTER, CTA, GPU
from . import wgmma_registers
from .clocks import GLOBAL_VISIBLE, INITIALISED, ORDERED, TENSOR, VISIBLE, Clocks
from .mbarrier_races import MbarrierRaces
from .release_acquire import ReleaseAcquire
from .shadow import DOMAIN_BITS, GlobalShadow, SharedShadow, Suspects
from .sites import BULK_READ, BULK_WRITE, CP_ASYNC, KIND_NAMES, TCGEN05, WGMMA, Sites
from .tensor_races import TensorRaces

_GROUPS = {"cp.async": CP_ASYNC, "bulk": BULK_READ, "wgmma": WGMMA}
# what a fence makes visible, as sections of ``Clocks``
_FENCED = {
    "mbarrier_init": (INITIALISED,),
    "async": (VISIBLE, GLOBAL_VISIBLE),
    "async.shared": (VISIBLE,),
    "async.global": (GLOBAL_VISIBLE,),
}


class LaunchHistory:
    """What the waves of one launch share: global memory's shadow, the numbers of PTX lines, names."""

    def __init__(self, program):
        self.sites = Sites.of(program)
        self.memory = GlobalShadow(self.sites.global_granule)
        self.names = {}  # home -> function from an agent to its name

    def detector(self, machine):
        """The detector of one wave."""
        return Detector(machine, self)


class Detector(Observer):
    """The race detector of one wave."""

    def __init__(self, machine, launch):
        wave = self.wave = machine.wave
        wgmma_registers.check(wave.program)
        self.launch, self.sites = launch, launch.sites
        self.clocks = clocks = Clocks(wave, launch.sites)
        self.memory = launch.memory
        self.memory.begin(clocks, [wave.launch.params, *machine.symbols.local_arrays])
        self.memory_of_ctas, self.stride = machine.shared, machine.shared.stride
        readers = [(clocks.reader, n) for n in range(wave.wpc)]
        for kind in (WGMMA, BULK_READ, TCGEN05):
            if kind in clocks.first:
                readers += [(kind, n) for n in range(0, wave.wpc, 4 if kind == WGMMA else 1)]
        self.shared = SharedShadow(clocks, machine.shared, launch.sites.shared_granule, readers)
        self.barriers = MbarrierRaces(self)
        self.tensor = TensorRaces(self) if clocks.sections > TENSOR else None
        self.named = {}  # (CTA, barrier) -> (limits of who arrived, warps that wait)
        self.cluster_limits, self.cluster_done = {}, {}
        self.atomics = ReleaseAcquire(clocks, machine.shared)
        self.tensormap_fences = {}  # (warp, address) -> what the warp knew
        self.issuers = {}  # (home, agent, stamp) of a bulk load -> warp
        names = _Names(wave, clocks, self.issuers)
        for domain in np.unique(self.memory.home).tolist():
            launch.names[domain] = names

    def end(self, machine, error):
        self.barriers = self.tensor = self.clocks.lanes = None  # cycles would keep the wave's memory

    # ---- reports ----------------------------------------------------------------------------------
    def _describe(self, start, end, shared):
        if shared:
            wave = self.wave
            cta, offset = divmod(start, self.stride)
            return f"shared memory 0x{offset:x} to 0x{offset + end - start - 1:x} of cta{wave.cta_name(cta)}"
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
        clocks, wave = self.clocks, self.wave
        scope = np.minimum(self.sites.strong[suspects.stamps & self.sites.mask], self.sites.strong[clocks.site])
        home = self.memory.home[suspects.warps]
        cta = clocks.domain_of[suspects.warps] * clocks.domain_ctas + clocks.cta_in_domain(suspects.agents)
        mine = wave.cta_of[suspects.warps]
        distance = self.atomics.distance(cta, mine)
        distance = np.where(suspects.agents >= clocks.fixed, CTA, distance)  # red.async
        if suspects.homes is not None:
            distance = np.where(suspects.homes == home, distance, GPU)
        return scope >= distance

    def report(self, error, message, warp, agent, stamp, home=-1, **places):
        """Raise an error of the warp's access; ``agent``, ``stamp``: the earlier one's, in its domain or ``home``."""
        if home < 0:
            home = int(self.memory.home[warp])
        wave = self.wave
        line = self.sites.lines[stamp & self.sites.mask]
        who = self.launch.names[home].of(home, agent, stamp)
        text = wave.text
        before = f"{who} at PTX line {line}: {wave.ptx_line(line)}{source_of(text, line)}"
        before += self._lanes_alone(warp, agent, home, text)
        raise error(message.format(before=before, **places) + source_of(text, wave.line), where=wave.warp_text(warp),
                    other=(line, wave.ptx_line(line), who))  # fmt: skip

    def _lanes_alone(self, warp, agent, home, text):
        """A word on an earlier access that lanes of the same warp made, or whose warp released by some lanes alone."""
        clocks, wave = self.clocks, self.wave
        number, domain = divmod(home, 1 << DOMAIN_BITS)
        if number != self.memory.wave or not clocks.is_generic(agent):
            return ""
        cta, earlier = domain * clocks.domain_ctas + clocks.cta_in_domain(agent), agent % wave.wpc
        if (cta, earlier) == (wave.cta_of[warp], wave.warp_in_cta[warp]):
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
        if self.wave.cluster_size > 1:
            remote = first // self.stride != self.wave.cta_of[warps]
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
            stored = values and (self.memory_of_ctas.views, first, size, values, M)
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
        """Reads of ``size`` bytes; ``index`` as ``GlobalMemory.index`` gives it."""
        self._global(w, index, size, M, agents, stamps, False)

    def write_global(self, w, index, size, M, values=None, agents=None, stamps=None):
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
        self.clocks.lanes.copy(w, mask)
        self._write(warps, first, size, agents[rows], stamps[rows])
        reading = mask if source_size is None else mask & (source_size > 0)
        if reading.any():
            found = source.view(np.int64) - GLOBAL_BASE if source.flags.c_contiguous else (
                source.astype(np.int64) - GLOBAL_BASE)  # fmt: skip
            self.read_global(w, found[reading] & -size, size, reading, agents, stamps)

    def cp_async_arrives(self, w, index, mask):
        """cp.async.mbarrier.arrive: the arrival happens after the copies."""
        self.barriers.arrive(w, index, mask, self.clocks.issued(CP_ASYNC, w))

    # ---- groups -----------------------------------------------------------------------------------
    def group_committed(self, kind, w):
        if _GROUPS[kind] in self.clocks.groups:
            self.clocks.commit(_GROUPS[kind], w)

    def group_awaited(self, kind, w, pending, read):
        """The warps have waited for all but ``pending`` groups of a kind; None: for everything. Of bulk stores with
        ``read`` only the reads of shared memory are done."""
        kind = _GROUPS[kind]
        if kind in self.clocks.groups:
            self.clocks.wait(kind, w, pending, (BULK_READ, BULK_WRITE) if kind == BULK_READ and not read else (kind,))

    # ---- wgmma and tcgen05 ------------------------------------------------------------------------
    def wgmma(self, w, spec, operands):
        for operand in operands:
            self._wgmma_operand(w, *operand)

    def _wgmma_operand(self, w, descriptors, chunks_of, parts):
        """wgmmas read an operand in shared memory, see ``machine.wgmma.SharedOperand``."""
        wave = self.wave
        quarter = wave.warp_in_cta[w] & 3
        descriptors = full_width(descriptors, len(w))[:, 0]
        stamps, slots = self.clocks.async_stamps(WGMMA, w), self.shared.slots(WGMMA, w - wave.nctas * quarter)
        for descriptor in np.unique(descriptors).tolist():
            rows = np.flatnonzero(descriptors == descriptor)
            part = quarter[rows] if parts == 4 else np.zeros_like(rows)
            chunks = chunks_of(descriptor)[part] * 16 + (wave.cta_of[w[rows]] * self.stride)[:, None]
            self._check_visible(w[rows][:, None], chunks, 16)
            if parts == 1:  # the warps of a warpgroup are one reader
                _, one = np.unique(slots[rows] + len(self.shared.readers) * wave.cta_of[w[rows]], return_index=True)
                rows, chunks = rows[one], chunks[one]
            self.shared.note_read(chunks, 16, slots[rows][:, None], stamps[rows][:, None])

    def tensor_core_reads(self, warp, cta, chunks):
        """A tcgen05 operation of a warp reads 16-byte chunks of a CTA's shared memory."""
        wave, w = self.wave, np.array([warp])
        first = chunks.reshape(1, -1) * 16 + cta * self.stride
        self._check_visible(w[:, None], first, 16)
        stamps = self.clocks.async_stamps(TCGEN05, w)[:, None]
        if cta == wave.cta_of[warp]:
            self.shared.note_read(first, 16, self.shared.slots(TCGEN05, w)[:, None], stamps)
        else:
            self.shared.note_remote_read(first, 16, self.clocks.agent(TCGEN05, w)[:, None], stamps)

    def tensor_matrix(self, warp, cta, lanes, first, count, writes):
        self.tensor.matrix(warp, cta, lanes, first, count, writes)

    def tensor_registers(self, w, lane, column, shape, writes):
        self.tensor.registers(w, lane, column, shape, writes)

    def tensor_freed(self, warp, cta, first, count):
        self.tensor.free(warp, cta, first, count)

    def tensor_wait(self, w, what):
        self.tensor.wait(w, what)

    def tensor_use(self, w, lines):
        self.tensor.use(w, lines)

    def tensor_fence(self, w, M, side):
        self.tensor.fence(active_warps(w, M), side)

    def tcgen05_commit(self, commit):
        self.tensor.commit(commit.warp, commit.signal)

    # ---- bulk copies ------------------------------------------------------------------------------
    def copy_issued(self, copy):
        """What it reads and writes, in shared and in global memory."""
        if copy.repeated or not copy.size or not (copy.is_store or copy.targets):
            return
        if copy.tensor_map is not None:
            self._tensor_map(copy.warp, copy.tensor_map)
        source = None if copy.shared_source is None else copy.shared_source()
        if copy.is_store:
            self._bulk_store(copy.warp, source, *copy.global_pieces(self.memory.granule), copy.reduces)
            return
        for cta, offset, signal in copy.targets:
            self._bulk_load(copy, cta, offset, signal, source)
        if copy.global_pieces is not None:
            self._bulk_read(copy.warp, copy.targets[0][2], *copy.global_pieces(self.memory.granule))

    def _bulk_load(self, copy, cta, offset, signal, source):
        """A load writes a region of a CTA's shared memory and signals the mbarrier at a flat index; ``source``: flat
        indices of the 16-byte chunks of shared memory that it reads, if any."""
        first = cta * self.stride + np.arange(offset, offset + copy.size, copy.step)[None]
        w = np.array([copy.warp])
        self._check_write(w[:, None], first, copy.step)
        agent, stamp = self.barriers.signal(copy.warp, signal)
        name = copy.name if copy.name in ("st.async", "red.async") else "the bulk load"
        self.issuers[int(self.memory.home[copy.warp]), agent, int(stamp)] = (
            f"{name} of {self.wave.warp_text(copy.warp)}"
        )
        self.shared.note_write(first, copy.step, np.array(agent), np.array(stamp))
        if source is not None:
            self._check_visible(w[:, None], source[None], 16)
            self.shared.note_remote_read(source[None], 16, np.array(agent), np.array(stamp))

    def _bulk_read(self, warp, signal, index, size):
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

    def _bulk_store(self, warp, chunks, index, size, reduces=False):
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
        self.write_global(w, index.reshape(1, -1), size, None, None, self.clocks.agent(BULK_WRITE, w), stamps)

    def _tensor_map(self, warp, address):
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

    def exited(self, w):
        """Warps end, and CTAs with their last ones: shared memory is given up."""
        if BULK_READ in self.clocks.first:
            self._stores_are_over(w)
        wave = self.wave
        if wave.cluster_size > 1 or self.issuers:
            for cta in np.unique(wave.cta_of[w]).tolist():
                if not wave.alive[wave.cta_of == cta].any():
                    self._others_are_over(cta, int(w[wave.cta_of[w] == cta][-1]))

    def _others_are_over(self, cta, warp):
        """A CTA ends: what bulk loads and other CTAs of the cluster did in its shared memory must be in the past of one
        of its warps. ``warp`` is the last one."""
        wave, clocks, shared = self.wave, self.clocks, self.shared
        limits = clocks.known[wave.cta_of == cta, ORDERED].max(0)
        start = cta * self.stride
        granules = slice(start // shared.granule, (start + self.stride) // shared.granule)
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
        wave = self.wave
        for warp in w.tolist():
            slot = self.shared.slot[BULK_READ, wave.warp_in_cta[warp]]
            if slot not in self.shared.active:
                continue
            unit = 16 // self.shared.granule
            start = wave.cta_of[warp] * self.stride
            stamps = self.shared.read[slot].reshape(-1, unit)[start >> 4 : start + self.stride >> 4]
            agent = int(self.clocks.agent(BULK_READ, np.array([warp]))[0])
            bad = stamps >= self.clocks.known[warp, ORDERED, agent]
            if bad.any():
                first = (start + 16 * np.arange(len(stamps)))[:, None]
                suspects = Suspects(bad, np.array(warp), first, np.array(agent), stamps, None, self.shared.granule)
                self._raise(suspects, "race: the warp ends without cp.async.bulk.wait_group, while {bytes} is still "
                                      "being read by {before}\n    the last instruction:", True)  # fmt: skip

    # ---- barriers of CTAs and clusters ------------------------------------------------------------
    def bar_arrived(self, warp, cta, barrier, waits):
        """A warp arrives at a named barrier; ``waits``: with bar.sync."""
        row = self.clocks.publish(np.array([warp]))[0]
        limits, waiting = self.named.setdefault((cta, barrier), (np.zeros_like(row), []))
        if limits.shape != row.shape:
            limits = self.clocks.widened(limits)
        self.named[cta, barrier] = np.maximum(limits, row), waiting
        if waits:
            self.clocks.lanes.meet(np.array([warp]))
            waiting.append(warp)

    def bar_completed(self, cta, barrier):
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

    def cluster_arrived(self, w, cluster, relaxed):
        """barrier.cluster.arrive; .relaxed publishes only what fences have."""
        before = self.atomics.fenced_rows(w, CLUSTER) if relaxed else None
        rows = self.clocks.publish(w)
        if relaxed:
            for section in (INITIALISED, TENSOR):
                before[:, section : section + 1] = rows[:, section : section + 1]
            rows = before
        for c in np.unique(cluster).tolist():
            mine = rows[cluster == c].max(0)
            old = self.cluster_limits.get(c)
            if old is not None:
                mine = np.maximum(mine, self.clocks.widened(old))
            self.cluster_limits[c] = mine

    def cluster_completed(self, c):
        """All warps of the cluster have arrived."""
        self.cluster_done[c] = self.cluster_limits.pop(c, None)

    def cluster_passed(self, w, cluster):
        """barrier.cluster.wait lets the warps go on."""
        self.clocks.lanes.meet(w)
        for c in np.unique(cluster).tolist():
            if self.cluster_done.get(c) is not None:
                self.clocks.acquire(w[cluster == c], self.cluster_done[c])

    def warp_barrier(self, w):
        """bar.warp.sync."""
        self.clocks.lanes.meet(w)

    # ---- mbarriers --------------------------------------------------------------------------------
    def mbarrier_initialised(self, w, index, mask):
        self.barriers.initialise(w, index, mask)

    def mbarrier_changed(self, w, operation, index, count, mask):
        if operation.startswith("arrive"):
            self.barriers.arrive(w, index, mask)

    def mbarrier_updated(self, index, arrivals, completed):
        if completed:
            self.barriers.flip(index)

    def mbarrier_passed(self, w, index, mask):
        self.barriers.wait(w, index, mask)

    # ---- fences and atomics -----------------------------------------------------------------------
    def fence(self, w, M, what):
        """fence.proxy.async of the memory that it names, or fence.mbarrier_init."""
        w = active_warps(w, M)
        for section in _FENCED[what]:
            self.clocks.fence(w, section)
        self.clocks.tick(w)

    def memory_fence(self, w, M, scope):
        self.atomics.fence(active_warps(w, M), scope)

    def ordered_access(self, w, address, space, order, M):
        self.atomics.access(w, address, space, order, M)

    def tensor_map_fence(self, w, address, M):
        address = full_width(address, len(w))
        for j, lane in active_threads(w, M):
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

    def __init__(self, wave, clocks, issuers):
        self.ctas = [wave.cta_name(c) for c in range(wave.nctas)]
        self.first, self.wpc, self.fixed = clocks.first, wave.wpc, clocks.fixed
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
