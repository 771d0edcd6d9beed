"""ptxsim: runs the PTX of CuTe DSL kernels on a CPU, with the DSL's own host code; no GPU, no CUDA driver.

    with ptxsim.simulate("sm_90a") as sim:
        compiled = cute.compile(function, …)
        sim.call(compiled, a, b)          # CPU tensors
        print(sim.launches[-1])

See docs/ptxsim.md.
"""

from ptxsim.compiled import CompilerMissing
from ptxsim.errors import (
    BarrierInitError,
    Deadlock,
    MemoryFault,
    ProxyError,
    PtxError,
    RaceError,
    SimError,
    SyncError,
    TensorFenceError,
    Trap,
    UninitializedRead,
    WgmmaError,
)
from ptxsim.host.images import register_ptx
from ptxsim.host.launches import Launch
from ptxsim.host.simulation import Simulation, current, device_view, simulate
from ptxsim.host.standin import RuntimeAlreadyLoaded, attach, install
from ptxsim.host.views import DeviceView
from ptxsim.machine.events import Observer

__all__ = [
    "BarrierInitError",
    "CompilerMissing",
    "Deadlock",
    "DeviceView",
    "Launch",
    "MemoryFault",
    "Observer",
    "ProxyError",
    "PtxError",
    "RaceError",
    "RuntimeAlreadyLoaded",
    "SimError",
    "Simulation",
    "SyncError",
    "TensorFenceError",
    "Trap",
    "UninitializedRead",
    "WgmmaError",
    "attach",
    "current",
    "device_view",
    "install",
    "register_ptx",
    "simulate",
]
