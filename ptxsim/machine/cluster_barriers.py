"""Barriers of a cluster at run time: PTX ISA 9.7.13.3 (barrier.cluster)."""

from __future__ import annotations

import numpy as np

from ..errors import SyncError
from .waiting import Wait


class ClusterBarriers:
    """Completed generations of each cluster's barrier, and which of them each warp arrived at."""

    def __init__(self, wave):
        self.wave, self.events = wave, wave.events
        self.generation = np.zeros(wave.nctas // wave.cluster_size, np.int64)
        self.ticket = np.full(wave.nwarps, -1, np.int64)  # generation that a warp arrived at
        self.unwaited = np.zeros(wave.nwarps, bool)  # arrived, and has not waited since

    def barrier(self, i, group):
        """barrier.cluster.arrive and .wait; all live warps of the cluster take part."""
        w = group.w
        cluster = self.wave.cta_of[w] // self.wave.cluster_size
        if i.mods.mode == "arrive":
            for warp, c in zip(w, cluster, strict=False):
                if self.unwaited[warp]:
                    raise SyncError("barrier.cluster.arrive twice without a wait", where=self.wave.warp_text(warp))
                self.ticket[warp] = self.generation[c]
            self.unwaited[w] = True
            if self.events.cluster_arrived:
                self.events.cluster_arrived(w, cluster, i.mods.sem == "relaxed")
            for c in np.unique(cluster):
                self._complete(int(c))
            return None
        if not self.unwaited[w].all():
            raise SyncError("barrier.cluster.wait without an arrive", where=self.wave.warp_text(w[0]))
        self.unwaited[w] = False

        def check(wait):
            passed = self.generation[wait.info["cluster"]] > self.ticket[wait.w]
            if self.events.cluster_passed and passed.any():
                self.events.cluster_passed(wait.w[passed], wait.info["cluster"][passed])
            return passed

        return Wait(group, "barrier.cluster.wait", check, dict(cluster=cluster), describe=self.describe_wait)

    def _missing(self, c):
        """Live warps of a cluster that have not arrived in the current phase, and all that are live."""
        live = self.wave.alive.any(1) & (self.wave.cta_of // self.wave.cluster_size == c)
        return live & (self.ticket != self.generation[c]), live

    def _complete(self, c):
        missing, _ = self._missing(c)
        inside = self.wave.cta_of // self.wave.cluster_size == c
        if not missing.any() and (self.ticket[inside] == self.generation[c]).any():
            if self.events.cluster_completed:
                self.events.cluster_completed(c)
            self.generation[c] += 1
            self.wave.advance()

    def describe_wait(self, wait):
        """Lines about the cluster barriers that blocked warps wait for."""
        lines = []
        for c in np.unique(wait.info["cluster"])[:4]:
            missing, live = self._missing(c)
            lines.append(f"cluster {c}: {live.sum() - missing.sum()} of {live.sum()} warps arrived (phase "
                         f"{self.generation[c]}); missing: "
                         f"{self.wave.warps_text(np.flatnonzero(missing))}")  # fmt: skip
        return lines

    def after_exit(self, w):
        """Exited warps no longer count."""
        if self.ticket.max() >= 0:
            for c in np.unique(self.wave.cta_of[w] // self.wave.cluster_size):
                self._complete(int(c))
