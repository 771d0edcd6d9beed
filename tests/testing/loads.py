"""What a simulated kernel reads asynchronously: boxes of TMA, rows of cp.async."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple
from unittest import mock

from ptxsim import Observer, Simulation
from ptxsim.arrays import full_width

if TYPE_CHECKING:
    from collections.abc import Iterator


class Load(NamedTuple):
    """One box: the CTA that asked for it, the extents of the tensor, and the box's first element, innermost first."""

    cta: int
    extents: tuple[int, ...]
    start: tuple[int, ...]


class _Loads(Observer):
    def __init__(self):
        self.found = []

    def copy_issued(self, copy):
        if copy.box is not None and not copy.is_store:
            tensor, start = copy.box
            self.found.append(Load(copy.targets[0][0], tensor.extents, tuple(start)))


class _Copies(Observer):
    def __init__(self):
        self.found = []

    def cp_async(self, w, index, source, size, source_size, mask):
        sizes = full_width(size if source_size is None else source_size, len(w))[mask]
        self.found.extend((int(a), int(s)) for a, s in zip(source[mask], sizes, strict=True) if s)


@contextmanager
def _observed(observer) -> Iterator[list]:
    """Every simulation inside has the observer, too; gives what it finds."""
    others = Simulation.observers_of_wave
    with mock.patch.object(Simulation, "observers_of_wave", lambda self: [*others(self), observer]):
        yield observer.found


def recorded_loads():
    """Every box that kernels load inside, in the order in which the loads are issued."""
    return _observed(_Loads())


def recorded_copies():
    """(global address, bytes) of every cp.async of a lane that reads anything inside."""
    return _observed(_Copies())
