"""Release and acquire by atomic accesses and fences in the race detector: PTX ISA 8.8 to 8.10.

A release and an acquire synchronise if each one's scope contains the other's thread (they are *morally strong*): .cta
the threads of the CTA, .cluster those of the cluster, .gpu and .sys everybody. So do a fence and a relaxed write with
a relaxed read and a fence, if that holds for the two fences and for the two accesses.
"""

from __future__ import annotations

import numpy as np

from ..arrays import full_width
from ..ops.scopes import CLUSTER, CTA, GPU
from .lanes import packed


class ReleaseAcquire:
    """What atomic accesses publish at which places; part of ``races.Detector``."""

    def __init__(self, clocks, shared):
        self.clocks, self.wave, self.shared = clocks, clocks.wave, shared
        self.published = {}  # (space, address) -> {(scope, CTA that released): limits}
        self.fenced = {}  # warp -> {scope: limits at its latest fence of that scope or more}
        self.pending = {}  # warp -> {distance: limits that relaxed reads saw}, which the next fence may acquire
        self.has_fences = clocks.sites.memory_fences

    def distance(self, ctas, other):
        """How far apart CTAs [n] and another one are, as scopes."""
        size = self.wave.cluster_size
        return np.where(ctas == other, CTA, np.where(ctas // size == other // size, CLUSTER, GPU))

    def fence(self, w, scope):
        """fence.acq_rel, fence.sc or membar of the warps."""
        known = self.clocks.known
        for warp in w.tolist():
            pending = self.pending.get(warp, {})
            for distance in [x for x in pending if x <= scope]:
                self.clocks.acquire(np.array([warp]), pending.pop(distance))
            row = known[warp].copy()
            self.fenced.setdefault(warp, {}).update(dict.fromkeys(range(scope + 1), row))
        self.clocks.tick(w)

    def fenced_rows(self, w, scope):
        """Limits at the latest fence of each warp of a scope or more [n, sections, agents]."""
        empty = np.zeros(self.clocks.known.shape[1:], self.clocks.known.dtype)
        return np.stack([self.clocks.widened(self.fenced.get(x, {}).get(scope, empty)) for x in w.tolist()])

    def access(self, w, address, space, order, M):
        """An access that is not weak; ``order`` is an ``AccessOrder``."""
        acquires, releases, reads, writes, scope = order
        if not (acquires or releases or self.has_fences):
            return
        index = full_width(address, len(w))
        if space == "shared":
            index = self.shared.index(w, address, 1, M)
        releasing = dict(zip(w.tolist(), np.broadcast_to(packed(M), len(w)), strict=True)) if releases else None
        rows, lanes = np.nonzero(np.ones(index.shape, bool) if M is None else M)
        threads = np.stack([index[rows, lanes].astype(np.int64), w[rows]], -1)
        changes = np.r_[True, (np.diff(threads, axis=0) != 0).any(1)]
        places = {}
        for place, warp in dict.fromkeys(map(tuple, threads[changes].tolist())):
            places.setdefault((space, place), []).append(warp)
        for place, warps in places.items():
            # reads and writes of one instruction come one after the other: a warp may see what the one before released
            for part in np.array(warps)[:, None] if reads and writes else [np.array(warps)]:
                if reads:
                    self._read(part, place, acquires, scope)
                if writes:
                    lanes = np.array([releasing[warp] for warp in part.tolist()]) if releases else None
                    self._write(part, place, lanes, scope)

    def _read(self, w, place, acquires, scope):
        for (reach, other), row in self.published.get(place, {}).items():
            distance = self.distance(self.wave.cta_of[w], other)
            seen = distance <= min(reach, scope)
            if acquires and seen.any():
                self.clocks.acquire(w[seen], row)
            elif not acquires:
                for warp, far in zip(w[seen].tolist(), distance[seen].tolist(), strict=True):
                    self._merge(self.pending.setdefault(warp, {}), far, row)

    def _write(self, w, place, lanes, scope):
        """``lanes``: of the warps, those that release; None if the access is relaxed."""
        cta = self.wave.cta_of[w]
        if lanes is not None:
            rows = self.clocks.publish(w, lanes)
            for one in np.unique(cta).tolist():
                self._merge(self.published.setdefault(place, {}), (scope, one), rows[cta == one].max(0))
        for warp, one in zip(w.tolist(), cta.tolist(), strict=True) if self.fenced else ():
            wider = None
            for reach in range(scope, -1, -1):  # with a fence before it, at each scope
                row = self.fenced.get(warp, {}).get(reach)
                if row is not None and row is not wider:
                    self._merge(self.published.setdefault(place, {}), (reach, one), row)
                wider = row

    def _merge(self, table, key, row):
        old = table.get(key)
        table[key] = row if old is None else np.maximum(self.clocks.widened(old), self.clocks.widened(row))
