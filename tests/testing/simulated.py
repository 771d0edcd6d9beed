"""One simulated call of the public functions, with what it leaves unwritten made visible."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

import cute_fa
from ptxsim.host.simulation import Simulation

if TYPE_CHECKING:
    from collections.abc import Iterator

    import ptxsim
    from cute_fa.tools.inputs import Inputs


@contextmanager
def unwritten_is_nan() -> Iterator[None]:
    """New tensors hold NaN, or the largest int, until something is written, not what an earlier call left there."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def ctas_at_a_time(count: int) -> Iterator[None]:
    """The simulator begins so many CTAs of a launch together, and others when all of these have ended: on that many
    SMs, one that waits for a CTA that is yet to begin waits for ever."""
    usual, Simulation.together = Simulation.together, count
    try:
        yield
    finally:
        Simulation.together = usual


def call(
    given: Inputs, arch: str, simulation: dict[str, Any] | None = None, **choices: Any
) -> tuple[torch.Tensor, torch.Tensor, ptxsim.Simulation]:
    """(out, lse, simulation); ``simulation``: options of ``cute_fa.simulate``; ``choices``: of the public function."""
    with cute_fa.simulate(arch, **simulation or {}) as simulated, unwritten_is_nan():
        out, lse = given.run(return_lse=True, **choices)
    return out, lse, simulated
