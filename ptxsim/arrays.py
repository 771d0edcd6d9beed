"""Operands as NumPy arrays: one row for each warp, one column for each lane."""

from __future__ import annotations

import numpy as np


def full_width(x, n):
    """An operand as an array [n, 32]."""
    x = np.asarray(x)
    return x if x.shape == (n, 32) else np.broadcast_to(x, (n, 32))


def active_threads(w, M):
    """(row in w, lane) of the threads that execute; ``M``: mask [n, 32] of active lanes, None for all."""
    if M is None:
        return [(j, lane) for j in range(len(w)) for lane in range(32)]
    return [(int(j), int(lane)) for j, lane in np.argwhere(M)]


def active_warps(w, M):
    """The warps with an active lane."""
    return w if M is None else w[M.any(1)]
