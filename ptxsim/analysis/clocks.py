"""Vector clocks of the warps of a wave: what has happened before what (PTX ISA 8, memory consistency model).

A warp is one agent: its lanes execute in program order; where lanes release for all, what it reads, and what a single
lane writes, are of others (``lanes``). Asynchronous operations are agents of their own: the cp.async of a warp,
the wgmmas of a warpgroup, the bulk stores of a warp (what they read, what they write), a warp's tcgen05.mma (with cp
and shift), its tcgen05.ld and its tcgen05.st, and the bulk loads that signal one mbarrier. An access carries a *stamp*:
the clock of its agent in the upper bits, its PTX line (as the number of a site) in the lower ones.
``known[warp, section, agent]`` is a limit for stamps: below it everything that the agent did is in the warp's past.
Sections, of which a program has the first ``sections``:

ORDERED         the access has happened before
VISIBLE         a generic-proxy write has been made visible to the async proxy by a fence.proxy.async of shared memory
INITIALISED     an mbarrier.init has been made visible by a fence.mbarrier_init
GLOBAL_VISIBLE  as VISIBLE, for global memory
TENSOR          an access to tensor memory comes before what the warp executes next: a tcgen05.fence::before_thread_sync
                followed it, in the warp or in one that synchronised with it

``tensor[warp, agent]`` are limits for accesses to tensor memory that come before the warp's next tcgen05 operation:
what it waited for, and with tcgen05.fence::after_thread_sync what TENSOR has. For tcgen05.mma after tcgen05.mma, which
need not wait, the column ISSUED of a warp is what counts.

A release publishes the warp's limits in all sections and starts a new clock; an acquire takes the maximum. A *domain*
is the CTAs whose agents know each other: a cluster, or the whole wave if the program synchronises through global
memory.
"""

from __future__ import annotations

import numpy as np

from ..errors import SimError
from .lanes import Lanes
from .sites import BULK_WRITE, CP_ASYNC, GENERIC, ISSUED, LANE, READ, TCGEN05, WGMMA

_u4 = np.uint32
ORDERED, VISIBLE, INITIALISED, GLOBAL_VISIBLE, TENSOR = range(5)
_HISTORY = 64  # groups of one warp that are remembered
_FOREVER = np.uint32(0xFFFFFFFF)


class Clocks:
    """Limits, stamps and the operations that move them. ``w`` are arrays of warps."""

    def __init__(self, wave, sites):
        self.wave, self.sites = wave, sites
        used = sites.kinds
        self.max_clock = (1 << 32 - sites.bits) - 2
        self.wide = sites.global_sync and wave.nctas > wave.cluster_size
        ctas = wave.nctas if self.wide else wave.cluster_size
        self.domain_ctas, self.domain_warps = ctas, ctas * wave.wpc
        self.domain_of = wave.cta_of // ctas
        self.place = wave.cta_of % ctas * wave.wpc + wave.warp_in_cta  # of a warp in its domain
        self.first = {kind: n * self.domain_warps for n, kind in enumerate(used)}
        self.sections = 1 + TENSOR if TCGEN05 in used else TENSOR if sites.proxies else 1
        self.fixed = self.columns = len(used) * self.domain_warps
        self.generic_end = len({GENERIC, LANE, READ, CP_ASYNC}.intersection(used)) * self.domain_warps
        self.reader = READ if READ in used else GENERIC  # kind of the agent that a warp's reads are of
        self.clock = np.ones(wave.nwarps, np.int64)
        self.known = np.ones((wave.nwarps, self.sections, self.columns), _u4)  # stamp 0: never
        self.tensor = np.ones((wave.nwarps, self.fixed if TCGEN05 in used else 0), _u4)
        self.known[:, VISIBLE:TENSOR, self.generic_end :] = _FOREVER
        self.groups = {
            kind: _Groups(wave.nwarps) for kind in used if kind not in (GENERIC, LANE, READ, BULK_WRITE, ISSUED)
        }
        self.lanes = Lanes(self, wave.nwarps, LANE in used)
        self._renew(np.arange(wave.nwarps))

    # ---- stamps -----------------------------------------------------------------------------------
    @property
    def site(self):
        """Number of the present PTX line."""
        return self.sites.number[self.wave.line]

    def stamps(self, w):
        """Stamps of an access of the warps now."""
        return (self.clock[w] << self.sites.bits | self.site).astype(_u4)

    def async_stamps(self, kind, w):
        return (self.groups[kind].clock[w] << self.sites.bits | self.site).astype(_u4)

    def limit(self, clock):
        """The limit of stamps of clocks up to this one."""
        return (np.asarray(clock) + 1 << self.sites.bits).astype(_u4)

    def _check_clock(self, clock):
        if clock.max() >= self.max_clock:
            raise SimError(f"race detection: a warp synchronised more than {self.max_clock} times")

    # ---- agents -----------------------------------------------------------------------------------
    def agent(self, kind, w):
        """Columns of the agents of a kind that belong to the warps."""
        place = self.place[w]
        if kind == WGMMA:
            place = place - (self.wave.warp_in_cta[w] & 3)
        return self.first[kind] + place

    def cta_in_domain(self, agent):
        """Which CTA of its domain an agent below ``fixed`` belongs to."""
        return agent % self.domain_warps // self.wave.wpc

    def is_generic(self, agent):
        return agent < self.generic_end

    def add_agent(self, count):
        """Make room for agents up to number ``count``."""
        if count <= self.columns:
            return
        more = max(count, 2 * self.columns) - self.columns

        wider = np.pad(self.known, ((0, 0), (0, 0), (0, more)), constant_values=1)
        wider[:, VISIBLE:TENSOR, self.fixed :] = _FOREVER
        self.columns += more
        self.known = wider

    def widened(self, rows):
        """Published limits, as wide as the present ones."""
        if rows.shape[-1] == self.columns:
            return rows
        wider = np.zeros((*rows.shape[:-1], self.columns), rows.dtype)
        wider[..., : rows.shape[-1]] = rows
        return wider

    # ---- program order ----------------------------------------------------------------------------
    def _renew(self, w):
        limit, place = self.limit(self.clock[w]), self.place[w]
        self.known[w, ORDERED, place] = limit
        if LANE in self.first:
            self.known[w, ORDERED, self.first[LANE] + place] = self.known[w, ORDERED, self.first[READ] + place] = limit

    def tick(self, w):
        """Start a new clock: what follows is not part of what was published."""
        self.clock[w] += 1
        self._check_clock(self.clock[w])
        self._renew(w)

    def publish(self, w, lanes=None):
        """Limits of the warps for whoever acquires them [n, sections, agents]; a new clock begins. ``lanes``: words of
        those that release, None: all."""
        rows = self.known[w]
        if lanes is not None:
            self.lanes.withhold(rows, w, lanes)
        self.tick(w)
        return rows

    def acquire(self, w, rows):
        """Limits that were published (one row for all, or one each) become known to the warps."""
        if rows.shape[-1] < self.columns:
            rows = self.widened(rows)
        self.known[w] = np.maximum(self.known[w], rows)

    # ---- groups of asynchronous operations --------------------------------------------------------
    def commit(self, kind, w):
        self.groups[kind].commit(w)
        self._check_clock(self.groups[kind].clock[w])

    def issued(self, kind, w, lanes=None):
        """Limits of the warps, to be published when what they issued so far is done [n, sections, agents]."""
        rows = self.publish(w, lanes)
        if kind in self.groups:
            rows[np.arange(len(w)), ORDERED, self.agent(kind, w)] = self.limit(self.groups[kind].clock[w])
            self.groups[kind].clock[w] += 1
        return rows

    def wait(self, kind, w, keep, columns=None):
        """All but the ``keep`` latest groups of the warps are done (None: everything that was issued)."""
        clock = self.groups[kind].done(w, keep)
        for column in columns or (kind,):
            agent = self.agent(column, w)
            self.known[w, ORDERED, agent] = np.maximum(self.known[w, ORDERED, agent], self.limit(clock))

    # ---- tensor memory ----------------------------------------------------------------------------
    def tensor_wait(self, kind, w):
        """tcgen05.wait::ld or ::st: the warps' loads or stores of tensor memory so far are done."""
        self.tensor_done(kind, w, self.groups[kind].done(w, None))

    def tensor_done(self, kind, w, clock):
        """The warps' loads or stores of tensor memory up to a clock are done."""
        agent = self.agent(kind, w)
        self.tensor[w, agent] = self.known[w, ORDERED, agent] = np.maximum(self.tensor[w, agent], self.limit(clock))

    def tensor_issued(self, w):
        """The warps have issued a tcgen05.mma, cp or shift."""
        self.known[w, ORDERED, self.agent(ISSUED, w)] = self.limit(self.groups[TCGEN05].clock[w])
        self.groups[TCGEN05].clock[w] += 1

    def tensor_before(self, w):
        """tcgen05.fence::before_thread_sync."""
        fixed, issued = slice(self.fixed), self.agent(ISSUED, w)
        self.known[w, TENSOR, fixed] = np.maximum(self.known[w, TENSOR, fixed], self.tensor[w])
        self.known[w, TENSOR, issued] = self.known[w, ORDERED, issued]

    def tensor_after(self, w):
        """tcgen05.fence::after_thread_sync."""
        self.tensor[w] = np.maximum(self.tensor[w], self.known[w, TENSOR, : self.fixed])

    def tensor_committed(self, w):
        """Limits to be published when the tcgen05 operations of the warps are done; the fence before is part of it."""
        self.tensor_before(w)
        rows = self.issued(TCGEN05, w, self.lanes.one(w))
        agent = self.agent(TCGEN05, w)
        rows[np.arange(len(w)), TENSOR, agent] = rows[np.arange(len(w)), ORDERED, agent]
        return rows

    # ---- fences -----------------------------------------------------------------------------------
    def fence(self, w, section):
        """What the warps know becomes part of a section."""
        self.known[w, section] = np.maximum(self.known[w, section], self.known[w, ORDERED])


class _Groups:
    """Groups of asynchronous operations of each warp: clocks and what clock each committed group ended."""

    def __init__(self, warps):
        self.clock = np.ones(warps, np.int64)
        self.count = np.zeros(warps, np.int64)
        self.ended = np.zeros((warps, _HISTORY), np.int64)

    def commit(self, w):
        self.ended[w, self.count[w] % _HISTORY] = self.clock[w]
        self.count[w] += 1
        self.clock[w] += 1

    def done(self, w, keep):
        """Clock up to which everything is done when all but ``keep`` groups are."""
        if keep is None:
            done = self.clock[w].copy()
            self.clock[w] += 1
            return done
        number = self.count[w] - keep
        return np.where(number > 0, self.ended[w, (number - 1) % _HISTORY], 0)
