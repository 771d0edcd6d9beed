"""Release and acquire by atomic accesses and fences in the race detector: PTX ISA 8.8 to 8.10.

A release and an acquire synchronise if each one's scope contains the other's thread (they are *morally strong*): .cta
the threads of the CTA, .cluster those of the cluster, .gpu and .sys everybody. So do a fence and a relaxed write with
a relaxed read and a fence, if that holds for the two fences and for the two accesses.
"""

from __future__ import annotations

import numpy as np

from .warps import full_width

CTA, CLUSTER, GPU = range(3)  # scopes; the same numbers say how far apart two threads are
_SCOPES = {"cta": CTA, "cluster": CLUSTER, "gpu": GPU, "sys": GPU, "gl": GPU}


def scope_of(opcode):
    """Scope that an opcode names; without one that of atom and red."""
    return next((_SCOPES[part] for part in opcode.split(".") if part in _SCOPES), GPU)


def has_memory_fences(program):
    """Whether relaxed accesses of a program may synchronise."""
    return any(i.root == "membar" or (i.root == "fence" and i.parts[1] not in ("proxy", "mbarrier_init"))
               for i in program.body)  # fmt: skip


class ReleaseAcquire:
    """What atomic accesses publish at which places; part of ``races.Detector``."""

    def __init__(self, clocks):
        self.clocks, self.machine = clocks, clocks.machine
        self.published = {}  # (space, address) -> {(scope, CTA that released): limits}
        self.fenced = {}  # warp -> {scope: limits at its latest fence of that scope or more}
        self.pending = {}  # warp -> {distance: limits that relaxed reads saw}, which the next fence may acquire
        self.has_fences = has_memory_fences(self.machine.prog)

    def distance(self, one, other):
        """How far apart two CTAs are, as a scope."""
        size = self.machine.cluster_size
        return CTA if one == other else CLUSTER if one // size == other // size else GPU

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

    def access(self, w, address, space, how, M):
        """An access that is not weak; ``how``: (acquires, releases, reads, writes, scope)."""
        acquires, releases, *_ = how
        if not (acquires or releases or self.has_fences):
            return
        index = full_width(address, len(w))
        if space == "shared":
            index = self.machine.shared_index(w, address, 1, M)
        places = {(int(w[j]), space, int(index[j, lane])): None for j, lane in self.machine.active_threads(w, M)}
        for warp, *place in places:
            self._one(warp, tuple(place), *how)

    def _one(self, warp, place, acquires, releases, reads, writes, scope):
        clocks, one, cta = self.clocks, np.array([warp]), int(self.machine.cta_of[warp])
        for (reach, other), row in self.published.get(place, {}).items() if reads else ():
            distance = self.distance(cta, other)
            if distance > min(reach, scope):
                continue
            if acquires:
                clocks.acquire(one, row)
            else:
                self._merge(self.pending.setdefault(warp, {}), distance, row)
        if not writes:
            return
        if releases:
            self._merge(self.published.setdefault(place, {}), (scope, cta), clocks.publish(one)[0])
        wider = None
        for reach in range(scope, -1, -1):  # with a fence before it, at each scope
            row = self.fenced.get(warp, {}).get(reach)
            if row is not None and row is not wider:
                self._merge(self.published.setdefault(place, {}), (reach, cta), row)
            wider = row

    def _merge(self, table, key, row):
        old = table.get(key)
        table[key] = row if old is None else np.maximum(self.clocks.widened(old), self.clocks.widened(row))
