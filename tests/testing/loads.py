"""What a simulated kernel reads asynchronously: boxes of TMA, rows of cp.async."""

from __future__ import annotations

import math
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple
from unittest import mock

import numpy as np

from ptxsim import Observer, Simulation
from ptxsim.arrays import full_width

if TYPE_CHECKING:
    from collections.abc import Iterator


class Load(NamedTuple):
    """One box: the CTA that asked for it, the extents of the tensor, the box's first element, innermost first, and how
    many of its bytes lie in the tensor."""

    cta: int
    extents: tuple[int, ...]
    start: tuple[int, ...]
    bytes: int


class Copy(NamedTuple):
    """A lane's cp.async: the CTA, the global address, and how many bytes are read."""

    cta: int
    address: int
    bytes: int


class _Loads(Observer):
    def __init__(self):
        self.found = []

    def copy_issued(self, copy):
        if copy.box is not None and not copy.is_store:
            tensor, start = copy.box
            shape = zip(start, tensor.box, tensor.extents, strict=True)
            sizes = (max(min(first + size, extent) - max(first, 0), 0) for first, size, extent in shape)
            inside = tensor.element_bytes * math.prod(sizes)
            self.found.append(Load(copy.targets[0][0], tensor.extents, tuple(start), inside))


class _Copies(Observer):
    def __init__(self):
        self.found = []

    def begin(self, machine):
        self.wave = machine.wave

    def cp_async(self, w, index, source, size, source_size, mask):
        sizes = full_width(size if source_size is None else source_size, len(w))[mask]
        ctas = np.broadcast_to(self.wave.cta_of[w][:, None], mask.shape)[mask]
        lanes = zip(ctas.tolist(), source[mask].tolist(), sizes.tolist(), strict=True)
        self.found.extend(Copy(*lane) for lane in lanes if lane[2])


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
    """Every cp.async of a lane that reads anything inside."""
    return _observed(_Copies())
