"""The worlds that kernels run in: the real one, and inside ``with simulate("sm_90a"):`` the simulator's, where CPU
tensors run that architecture's kernels.

Serving code loads no line of the simulator: ``worlds.simulated`` alone imports it, and is imported when a simulation
begins, or where someone else has begun one (``python -m ptxsim run``).
"""

from __future__ import annotations

import sys
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from cute_fa.engine.environment import switch
from cute_fa.semantics.errors import ArgumentError, DeviceError, NoDeviceError
from cute_fa.semantics.types import SmArch

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import ptxsim

# Whether to check values that live on the device, at the price of host synchronisations.
CHECK_VALUES = switch("CUTE_FA_CHECK", default=False)
# SMs of one GPU of each architecture: A100, A40, L40S, H100 SXM, B200, B300, RTX PRO 6000 Blackwell (NVIDIA's data
# sheets and architecture white papers).
_PUBLISHED_SMS = {80: 108, 86: 84, 89: 142, 90: 132, 100: 148, 103: 148, 120: 188}

ARITHMETICS = ("float32", "hardware", "distinct")  # what ``simulate`` takes


class Target(NamedTuple):
    """What kernels run on: the architecture that they are built for, how many SMs there are, and whether their PTX has
    line information."""

    arch: SmArch
    num_sms: int
    line_info: bool = False


_simulated: Target | None = None
_assumed: SmArch | None = None


@contextmanager
def simulate(
    arch: str | SmArch,
    *,
    num_sms: int | None = None,
    schedule_seed: int | None = None,
    late: bool = False,
    race: bool = False,
    fp8_bits: int | None = None,
    arithmetic: str = "float32",
    trace: str | Path | None = None,
    line_info: bool = False,
) -> Iterator[ptxsim.Simulation]:
    """Run kernels for ``arch`` on CPU tensors through ``ptxsim``, and check values as with ``CUTE_FA_CHECK=1``.

    ``num_sms``: how many SMs kernels find, by default as many as a published GPU has (132 for sm_90a); a persistent
    kernel launches no more CTAs than that. ``schedule_seed`` runs warps in an adversarial order drawn from it; ``late``
    completes asynchronous work as late as the PTX ISA allows; ``race`` reports missing synchronisation under any
    schedule (``ptxsim.analysis.races``). ``fp8_bits`` (8 to 24) is how many significant bits wgmma keeps of sums of fp8
    products, None for float32 (``ptxsim.machine.accumulate``). ``arithmetic`` is how tensor instructions add products:
    "float32", "hardware" (as tensor cores were found to), or "distinct" (a rounding of its own for each kind of
    instruction, ``ptxsim.machine.tensor_sums``). ``trace`` names a file to which leaving writes what the
    warps did (``ptxsim.report.trace``); ``line_info`` compiles with line information, so that reports name Python
    lines. Gives the simulation: its ``launches`` tell what ran, and who is appended to its ``observers``
    (``ptxsim.Observer``) hears it. Leaving it restores everything. Raises ArgumentError for an unknown architecture,
    fewer than 1 SM, other ``fp8_bits`` or ``arithmetic``, or ``fp8_bits`` where ``arithmetic`` rounds sums itself.
    """
    from cute_fa.engine.worlds import simulated

    global _simulated
    arch = SmArch.named(arch)
    if num_sms is None:
        num_sms = _PUBLISHED_SMS[arch.number]
    if isinstance(num_sms, bool) or not isinstance(num_sms, int) or num_sms < 1:
        raise ArgumentError(f"num_sms={num_sms!r}: a GPU has at least 1 SM")
    if fp8_bits is not None and not (type(fp8_bits) is int and 8 <= fp8_bits <= 24):
        raise ArgumentError(f"fp8_bits={fp8_bits!r}: 8 to 24 significant bits, or None for sums in float32")
    if arithmetic not in ARITHMETICS:
        raise ArgumentError(f"arithmetic={arithmetic!r}: there are {', '.join(ARITHMETICS)}")
    if fp8_bits is not None and arithmetic != "float32":
        raise ArgumentError(f"fp8_bits={fp8_bits} with arithmetic={arithmetic!r}, which rounds sums of fp8 itself")
    options = {"schedule_seed": schedule_seed, "late": late, "race": race}
    reports = {"fp8_bits": fp8_bits, "arithmetic": arithmetic, "trace": trace, "line_info": line_info}
    with simulated.simulate(arch.value, num_sms, **options, **reports) as simulation:
        _simulated = Target(arch, num_sms, line_info)
        try:
            yield simulation
        finally:
            _simulated = None


@contextmanager
def assume(arch: SmArch) -> Iterator[None]:
    """Requests made of CPU tensors are described as those of a GPU of ``arch``, outside simulations; nothing runs."""
    global _assumed
    before, _assumed = _assumed, arch
    try:
        yield
    finally:
        _assumed = before


def simulation() -> Any | None:
    """The ``ptxsim.Simulation`` that is on, whoever began it, or None. The simulator is not imported to be asked."""
    if "ptxsim" not in sys.modules:
        return None
    from cute_fa.engine.worlds import simulated

    return simulated.current()


def checks_values() -> bool:
    """Whether numbers on the device are checked: where the environment asks for it, and in simulations."""
    return CHECK_VALUES or _simulated is not None


def simulated_arch() -> SmArch | None:
    """The architecture being simulated, or None."""
    return None if _simulated is None else _simulated.arch


def simulated_target() -> Target | None:
    """What is being simulated, or None."""
    return _simulated


def arch_of(device: torch.device) -> SmArch:
    """The architecture that kernels for tensors on ``device`` are built for."""
    return target_of(device).arch


def described_arch(device: torch.device) -> SmArch:
    """:func:`arch_of`, or for the CPU what is assumed where nothing is simulated."""
    if _assumed is not None and _simulated is None and device.type == "cpu":
        return _assumed
    return arch_of(device)


def num_sms(device: torch.device) -> int:
    """SMs of the GPU that ``device`` names, or of the simulated one for the CPU."""
    return target_of(device).num_sms


def target_of(device: torch.device) -> Target:
    """What kernels for tensors on ``device`` run on. Raises NoDeviceError or DeviceError if that is nothing."""
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
        raise DeviceError(
            f"tensors on {device} while {_simulated.arch.value} is simulated: the simulator takes CPU tensors"
        )
    return _gpu(torch.cuda.current_device() if device.index is None else device.index)


def described(arch: SmArch, device: torch.device) -> Target:
    """What kernels for ``arch`` run on: whatever ``device`` names if that is one, else a published GPU."""
    try:
        target = target_of(device)
    except (NoDeviceError, DeviceError):
        target = None
    return target if target is not None and target.arch is arch else Target(arch, _PUBLISHED_SMS[arch.number])


@cache
def _gpu(index: int) -> Target:
    properties = torch.cuda.get_device_properties(index)
    return Target(SmArch.of_capability(properties.major, properties.minor), properties.multi_processor_count)
