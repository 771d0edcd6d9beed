"""Cluster launch control at run time (PTX ISA 9.7.13.17): running CTAs take over clusters that wait to be launched."""

from __future__ import annotations

from collections import deque

import numpy as np

from .memory import WRITTEN
from .warps import full_width


class LaunchControlMixin:
    """clusterlaunchcontrol of ``Machine``. Needs memory, mbarriers, the copies' addressing and ``defer``; owns
    pending_clusters: the first CTAs of the clusters that are not launched yet, in order."""

    def init_launches(self):
        self.pending_clusters = deque()

    def cta_coordinates(self, number):
        """(x, y, z) of a CTA of the grid by its number: clusters x fastest, and CTAs inside of a cluster too."""
        which, rank = divmod(number, self.cluster_size)
        clusters = [g // c for g, c in zip(self.grid, self.cluster, strict=True)]
        outer = (which % clusters[0], which // clusters[0] % clusters[1], which // (clusters[0] * clusters[1]))
        inner = (rank % self.cluster[0], rank // self.cluster[0] % self.cluster[1],
                 rank // (self.cluster[0] * self.cluster[1]))  # fmt: skip
        return [o * c + i for o, c, i in zip(outer, self.cluster, inner, strict=True)]

    def try_cancel(self, w, address, barrier, multicast, M):
        """Take the next cluster that waits, if there is one, and write the answer.

        The 16 bytes go, and count on the mbarrier, to this CTA; with ``multicast`` to the same places in all CTAs of
        the cluster.
        """
        address, barrier = full_width(address, len(w)), full_width(barrier, len(w))
        for j, lane in self.active_threads(w, M):
            cta, offset = self.cta_and_offset(w[j], address[j, lane])
            _, signal = self.cta_and_offset(w[j], barrier[j, lane])
            self._bulk_size(16, offset)
            self.region(offset, 16, "clusterlaunchcontrol")
            targets = [cta]
            if multicast:
                targets = [int(self.cluster_first[w[j]]) + r for r in range(self.cluster_size)]
            for c in targets:
                if self.races is not None:
                    self.races.bulk_load(w[j], c, offset, 16, c * self.smem_stride + signal)
                if self.lazy:
                    self.set_in_flight(c, offset, 16)

            def perform(targets=targets, offset=offset, signal=signal):
                answer = np.zeros(4, np.uint32)
                if self.pending_clusters:
                    answer[:] = 1, *self.cta_coordinates(self.pending_clusters.popleft())
                for c in targets:
                    self.shared_of[c][offset : offset + 16] = answer.view(np.uint8)
                    self.shadow_of[c][offset : offset + 16] = WRITTEN
                    self.mbar_update(c * self.smem_stride + signal, tx=-16)

            self.defer(w[j], perform)
