"""What a simulated kernel reads asynchronously: boxes of TMA, rows of cp.async."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ptxsim.copies import CopyMixin
from ptxsim.tma import TensorCopyMixin
from ptxsim.warps import full_width

if TYPE_CHECKING:
    from collections.abc import Iterator


class Load(NamedTuple):
    """One box: the CTA that asked for it, the extents of the tensor, and the box's first element, innermost first."""

    cta: int
    extents: tuple[int, ...]
    start: tuple[int, ...]


@contextmanager
def recorded_loads() -> Iterator[list[Load]]:
    """Every box that kernels load inside, in the order in which the loads are issued."""
    loads = []
    issue = TensorCopyMixin.tensor_load

    def record(self, w, destination, address, coordinates, barrier, multicast, M, pair):
        to, tensor_map, *start = (full_width(x, len(w)) for x in (destination, address, *coordinates))
        for j, lane in self.active_threads(w, M):
            cta, _ = self.cta_and_offset(w[j], to[j, lane])
            extents = self.tensor_map(tensor_map[j, lane], len(coordinates)).extents
            loads.append(Load(int(cta), extents, tuple(int(c[j, lane]) for c in start)))
        issue(self, w, destination, address, coordinates, barrier, multicast, M, pair)

    TensorCopyMixin.tensor_load = record
    try:
        yield loads
    finally:
        TensorCopyMixin.tensor_load = issue


@contextmanager
def recorded_copies() -> Iterator[list[tuple[int, int]]]:
    """(global address, bytes) of every cp.async of a lane that reads anything inside."""
    copies = []
    issue = CopyMixin.cp_async

    def record(self, w, destination, source, size, source_size, M):
        lanes = np.ones((len(w), 32), bool) if M is None else M
        addresses = full_width(source, len(w))[lanes]
        sizes = full_width(size if source_size is None else source_size, len(w))[lanes]
        copies.extend((int(a), int(s)) for a, s in zip(addresses, sizes, strict=True) if s)
        issue(self, w, destination, source, size, source_size, M)

    CopyMixin.cp_async = record
    try:
        yield copies
    finally:
        CopyMixin.cp_async = issue
