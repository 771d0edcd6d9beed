"""The FA4 forward with one line of its device code wrong, under a config class of its own for each such fault."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NamedTuple
from unittest import mock

from cutlass import Boolean

from cute_fa.device import exponentials
from fa4_sm100.forward import kernel, softmax
from fa4_sm100.forward.config import Fa4ForwardConfig
from fa4_sm100.forward.products import Products
from fa4_sm100.forward.softmax import HEADROOM_LOG2, Softmax


class Fault(NamedTuple):
    """``wrong`` takes the place of an attribute of a module or class."""

    of: Any
    name: str
    wrong: Any


def wrapped(of: Any, name: str, wrong: Callable) -> Fault:
    """A function in the place of another, which it is given as its first argument."""
    right = getattr(of, name)
    return Fault(of, name, lambda *arguments: wrong(right, *arguments))


def _hidden(left: int = 0, right: int = 0, end: int = 0) -> Fault:
    """Edges of the mask so many keys further on."""

    def hidden_keys(right_one, window, diagonal, first_key, keys_left, left_edge, right_edge):
        gap = right_one(window, diagonal + left, first_key, keys_left, True, False) if left_edge else None
        beyond = right_one(window, diagonal + right, first_key, keys_left + end, False) if right_edge else None

        def hidden(column: int) -> Boolean:
            if gap is None or beyond is None:
                return (beyond if gap is None else gap)(column)
            return gap(column) | beyond(column)

        return hidden

    return wrapped(softmax, "hidden_keys", hidden_keys)


def _without_last(right: Callable, self: Softmax, *arguments) -> None:
    before = self.total[0] + self.sums[0] + self.sums[1]
    right(self, *arguments)
    self.total[0] = before


class _Unwatched(list):
    """Pairs of scores that are emulated and not looked at."""

    def __iter__(self):
        return iter(())


FAULTS = {
    "O keeps its scale": Fault(Softmax, "rescale_output", lambda self, factor, block: None),
    "no row is outside": Fault(Softmax, "outside", lambda self, score: Boolean(False)),
    "sums alone are asked": Fault(
        Softmax, "outside", lambda self, score: self.counts(~(self.sums[0] + self.sums[1] <= 2.0**HEADROOM_LOG2))
    ),
    "sums are not asked": Fault(
        Softmax,
        "outside",
        lambda self, score: self.counts(~(self.peak[0] * score.scale_log2 + self.bias[0] <= HEADROOM_LOG2)),
    ),
    "emulated scores are not looked at": wrapped(
        Softmax, "emulated_pairs", lambda right, self, emulate: _Unwatched(right(self, emulate))
    ),
    "a limit beyond fp16": Fault(softmax, "HEADROOM_LOG2", 16.25),
    "a reference of 0 before the first key": wrapped(
        Softmax, "set_bias", lambda right, self, reference, unit: right(self, softmax.finite(reference), unit)
    ),
    "emulated beyond its range": Fault(exponentials, "_LOWEST", -1e30),
    "a key more at the right edge": _hidden(right=1),
    "a key less at the left edge": _hidden(left=1),
    "a key less at the end": _hidden(end=-1),
    "O of the tile before": wrapped(
        Products,
        "start_output",
        lambda right, self, q_tile, buffer, values, accumulate, queries: right(
            self, q_tile, buffer, values, Boolean(True), queries
        ),
    ),
    "sums without the last columns": wrapped(Softmax, "hand_over", _without_last),
}


@dataclass(frozen=True)
class DamagedConfig(Fa4ForwardConfig):
    """``fault``: one of FAULTS."""

    kernel_module: ClassVar[str] = "tests.testing.damaged_fa4"

    fault: str = ""

    @classmethod
    def like(cls, config: Fa4ForwardConfig, fault: str) -> "DamagedConfig":
        """The same with a fault."""
        return cls(**{field.name: getattr(config, field.name) for field in fields(config)}, fault=fault)


class DamagedKernel(kernel.Fa4ForwardKernel):
    """Its roles are traced with the fault in place."""

    def normalise(self, *arguments):
        with self.damaged():
            super().normalise(*arguments)

    def multiply(self, *arguments):
        with self.damaged():
            super().multiply(*arguments)

    def damaged(self) -> AbstractContextManager:
        return mock.patch.object(*FAULTS[self.config.fault])


def build(config: DamagedConfig):
    right, arguments = kernel.build(config)
    return DamagedKernel(right.config), arguments
