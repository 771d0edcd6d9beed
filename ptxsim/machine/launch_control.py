"""Cluster launch control at run time (PTX ISA 9.7.13.17): running CTAs take over clusters that wait to be launched."""

from __future__ import annotations

import numpy as np

from ..arrays import active_threads, full_width
from .bulk_copies import check_bulk_size
from .copies import Copy
from .wave import cta_place


class LaunchControl:
    """clusterlaunchcontrol; ``pending`` is a deque of the first CTAs of the clusters that are not launched yet."""

    def __init__(self, wave, shared, copy_unit, pending):
        self.wave, self.shared, self.copy_unit, self.pending = wave, shared, copy_unit, pending

    def try_cancel(self, w, address, barrier, multicast, M):
        """Take the next cluster that waits, if there is one, and write the answer.

        The 16 bytes go, and count on the mbarrier, to this CTA; with ``multicast`` to the same places in all CTAs of
        the cluster.
        """
        address, barrier = full_width(address, len(w)), full_width(barrier, len(w))
        for j, lane in active_threads(w, M):
            warp = int(w[j])
            cta, offset = self.shared.locate(warp, address[j, lane])
            _, signal = self.shared.locate(warp, barrier[j, lane])
            check_bulk_size(16, offset)
            self.shared.check_region(offset, 16, "clusterlaunchcontrol")
            ctas = [cta]
            if multicast:
                ctas = [int(self.wave.cluster_first[warp]) + r for r in range(self.wave.cluster_size)]
            targets = [(c, offset, c * self.shared.stride + signal) for c in ctas]
            copy = Copy("clusterlaunchcontrol", warp, lane, int(address[j, lane]), 16, targets)
            self.copy_unit.load(copy, self._answer)

    def _answer(self):
        answer = np.zeros(4, np.uint32)
        if self.pending:
            launch = self.wave.launch
            outer, inner, _ = cta_place(self.pending.popleft(), launch.grid, launch.cluster)
            answer[:] = 1, *(o * c + i for o, c, i in zip(outer, launch.cluster, inner, strict=True))
        return answer.view(np.uint8)
