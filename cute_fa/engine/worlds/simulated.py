"""The simulated world: all that the package asks of ``ptxsim``. Nothing else of it imports the simulator."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ptxsim

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

current = ptxsim.current
attach = ptxsim.attach
register_ptx = ptxsim.register_ptx
SimError = ptxsim.SimError


def simulate(arch: str, num_sms: int, **options: Any) -> AbstractContextManager[ptxsim.Simulation]:
    """``ptxsim.simulate`` in this package's terms."""
    return ptxsim.simulate(arch, sm_count=num_sms, **options)
