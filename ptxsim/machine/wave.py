"""The CTAs of a launch that run together: how they are numbered and named, how far they are, and who observes them.

Warp index = warp in CTA * number of CTAs + CTA, so that one role (say the consumer warps of all CTAs) is a contiguous
slice. Every part of the machine holds the wave.
"""

from __future__ import annotations

import random

import numpy as np

from ..errors import MemoryFault
from .events import Events
from .launch import LaunchConfig


def cta_place(number, grid, cluster):
    """(coordinates of the cluster, coordinates in it, rank in it) of a CTA by its number: clusters are numbered x
    fastest, and CTAs inside of a cluster too."""
    which, rank = divmod(number, cluster[0] * cluster[1] * cluster[2])
    clusters = [g // c for g, c in zip(grid, cluster, strict=True)]
    outer = (which % clusters[0], which // clusters[0] % clusters[1], which // (clusters[0] * clusters[1]))
    inner = (rank % cluster[0], rank // cluster[0] % cluster[1], rank // (cluster[0] * cluster[1]))
    return outer, inner, rank


class Wave:
    """Numbers of warps and CTAs, which lanes are alive, and the counters that tell of progress.

    ``ctas`` are the linear numbers of the CTAs (whole clusters, in order).
    """

    def __init__(self, launch: LaunchConfig, ctas: list[int]):
        self.launch, self.program = launch, launch.program
        self.late = launch.late
        self.rng = random.Random(launch.seed) if launch.seed is not None else None
        self.events = Events()
        self._number(launch, ctas)
        self.line = 0  # PTX line of the latest instruction with side effects
        self.step = 0  # of the scheduler: blocks executed
        self.progress = 0  # counts completed phases and the like: waiting warps look again when it changes
        self.last_activity = 0  # step of the last store, arrival or completed barrier
        self.global_writes = 0
        self.running = None  # the warps that execute

    def _number(self, launch, ctas):
        block, cluster = launch.block, launch.cluster
        self.nctas = len(ctas)
        threads = block[0] * block[1] * block[2]
        self.wpc = (threads + 31) // 32  # warps of a CTA
        self.nwarps = self.wpc * self.nctas
        self.cluster_size = cluster[0] * cluster[1] * cluster[2]
        numbers = np.arange(self.nwarps)
        self.cta_of = numbers % self.nctas
        self.warp_in_cta = numbers // self.nctas
        places = [cta_place(number, launch.grid, cluster) for number in ctas]
        self.cluster_coord = [outer for outer, _, _ in places]
        self.cta_in_cluster = [inner for _, inner, _ in places]
        self.cta_coord = [[outer[d] * cluster[d] + inner[d] for d in range(3)] for outer, inner, _ in places]
        self.rank_of_cta = np.array([rank for _, _, rank in places])
        self.cta_rank = self.rank_of_cta[self.cta_of]
        self.cluster_first = (np.arange(self.nctas) - self.rank_of_cta)[self.cta_of]
        self.thread = self.warp_in_cta[:, None] * 32 + np.arange(32)
        self.alive = self.thread < threads
        self.live_threads = np.full(self.nctas, 32 * self.wpc)  # of whole warps that have not exited

    # ---- progress -------------------------------------------------------------------------------------------------
    def active(self):
        """Something happened: warps do not spin in vain."""
        self.last_activity = self.step

    def advance(self):
        """Something happened that warps may wait for."""
        self.progress += 1
        self.last_activity = self.step

    def global_write(self):
        """Global memory was written."""
        self.global_writes += 1
        self.last_activity = self.step

    def exit(self, w, M):
        """Lanes end."""
        if M is None:
            self.alive[w] = False
        else:
            self.alive[w] &= ~M
        gone = w[~self.alive[w].any(1)]
        if self.events.exited and gone.size:
            self.events.exited(gone)
        for cta in np.unique(self.cta_of[w]):
            self.live_threads[cta] = 32 * self.alive[self.cta_of == cta].any(1).sum()

    # ---- clusters -------------------------------------------------------------------------------------------------
    def multicast_targets(self, warp, mask):
        """CTAs of the wave that a 16-bit multicast mask names; MemoryFault for ranks outside of the cluster."""
        if mask >> self.cluster_size:
            raise MemoryFault(f"multicast mask 0x{mask:x}: the cluster has {self.cluster_size} CTAs")
        return [int(self.cluster_first[warp]) + r for r in range(self.cluster_size) if mask >> r & 1]

    # ---- names for messages ---------------------------------------------------------------------------------------
    @property
    def text(self):
        """Text of the PTX module."""
        return self.program.k.module.text

    def ptx_line(self, number):
        """Text of a PTX line (1-based); empty if there is none."""
        lines = self.text.split("\n")
        return lines[number - 1].strip()[:200] if 0 < number <= len(lines) else ""

    def cta_name(self, cta):
        """Coordinates of a CTA of the wave."""
        return "({},{},{})".format(*self.cta_coord[cta])

    def warp_text(self, warp):
        return f"cta{self.cta_name(self.cta_of[warp])}.w{self.warp_in_cta[warp]}"

    def thread_text(self, warp, lane):
        return f"{self.warp_text(warp)} lane {lane}"

    def lane_text(self, warp, lanes):
        bits = sum(1 << int(lane) for lane in np.flatnonzero(lanes))
        return f"{self.warp_text(warp)} lanes 0x{bits:08x}"

    def warps_text(self, warps):
        more = f" and {len(warps) - 8} more" if len(warps) > 8 else ""
        return ", ".join(self.warp_text(x) for x in warps[:8]) + more

    def running_text(self):
        return None if self.running is None else self.warps_text(self.running)
