"""Choosing the simulator: inside ``with simulate("sm_90a"):`` CPU tensors run that architecture's kernels."""

from __future__ import annotations

from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING

import torch

import ptxsim
from cute_fa.errors import DeviceError, NoDeviceError
from cute_fa.types import SmArch

if TYPE_CHECKING:
    from collections.abc import Iterator

_simulated: SmArch | None = None


@contextmanager
def simulate(
    arch: str | SmArch, *, schedule_seed: int | None = None, late: bool = False
) -> Iterator[ptxsim.Simulation]:
    """Run kernels for ``arch`` on CPU tensors through ``ptxsim``, and check values as with ``CUTE_FA_CHECK=1``.

    ``schedule_seed`` runs warps in an adversarial order drawn from it; ``late`` completes asynchronous work as late as
    the PTX ISA allows. Gives the simulation, whose ``launches`` tell what ran. Leaving it restores everything.
    """
    global _simulated
    target = SmArch.named(arch)
    with ptxsim.simulate(target.value, schedule_seed=schedule_seed, late=late) as simulation:
        _simulated = target
        try:
            yield simulation
        finally:
            _simulated = None


def simulated_arch() -> SmArch | None:
    """The architecture being simulated, or None."""
    return _simulated


def arch_of(device: torch.device) -> SmArch:
    """The architecture that kernels for tensors on ``device`` are built for."""
    if device.type == "cpu":
        if _simulated is None:
            raise NoDeviceError(
                "CPU tensors: move them to a CUDA device, or call inside cute_fa.simulate(arch), "
                "or ask for the reference, cute_fa.reference.attention, by name"
            )
        return _simulated
    if device.type != "cuda":
        raise DeviceError(f"tensors on {device}: kernels run on CUDA devices")
    if _simulated is not None:
        raise DeviceError(f"tensors on {device} while {_simulated.value} is simulated: the simulator takes CPU tensors")
    return _gpu_arch(device.index)


@cache
def _gpu_arch(index: int) -> SmArch:
    return SmArch.of_capability(*torch.cuda.get_device_capability(index))
