"""ptxsim: runs the PTX of CuTe DSL kernels on a CPU, with the DSL's own host code; no GPU, no CUDA driver.

    with ptxsim.simulate("sm_90a") as sim:
        compiled = cute.compile(function, …)
        sim.call(compiled, a, b)          # CPU tensors
        print(sim.launches[-1])

See docs/ptxsim.md.
"""

from ptxsim.errors import Deadlock, MemoryFault, PtxError, SimError, SyncError, Trap, UninitializedRead
from ptxsim.runtime import Launch, Simulation, current, device_view, register_ptx, simulate
from ptxsim.standin import CompilerMissing, RuntimeAlreadyLoaded, install
from ptxsim.views import DeviceView

__all__ = [
    "CompilerMissing",
    "Deadlock",
    "DeviceView",
    "Launch",
    "MemoryFault",
    "PtxError",
    "RuntimeAlreadyLoaded",
    "SimError",
    "Simulation",
    "SyncError",
    "Trap",
    "UninitializedRead",
    "current",
    "device_view",
    "install",
    "register_ptx",
    "simulate",
]
