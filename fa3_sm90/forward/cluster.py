"""Two CTAs that share their blocks of K and V: each loads half of a block's keys and sends it to both."""

import cutlass.cute as cute
from cutlass import Int32

from fa3_sm90.forward.config import Fa3ForwardConfig


def cluster_rank(config: Fa3ForwardConfig) -> Int32 | int:
    """Which CTA of its cluster this is."""
    return 0 if config.cluster == 1 else cute.arch.block_idx_in_cluster()


def meet(config: Fa3ForwardConfig):
    """All threads of the cluster."""
    if config.cluster == 1:
        cute.arch.sync_threads()
    else:
        cute.arch.cluster_arrive()
        cute.arch.cluster_wait()


def place_of(config: Fa3ForwardConfig, index: Int32 | int) -> Int32 | int:
    """Which warpgroup of the cluster's tile consumer ``index`` of this CTA is."""
    return index if config.cluster == 1 else cluster_rank(config) * config.warpgroups + index
