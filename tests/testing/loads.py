"""What TMA loads a simulated kernel issues."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

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
