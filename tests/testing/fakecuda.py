"""Lets third-party code that asks torch for a GPU run on CPU tensors inside a simulation, unmodified.

Such code asks ``tensor.is_cuda`` and ``torch.cuda`` and hands its tensors to functions compiled by the DSL. ``pose``
answers these questions with the simulated device and passes the tensors on through ``Simulation.call``. It changes
torch for the rest of the process: only for processes that do nothing else.
"""

import types

import torch
import tvm_ffi
from cutlass.cutlass_dsl.tvm_ffi_provider import TVMFFIJitCompiledFunction, TVMFFIJitCompiledFunctionWithKwargs

import ptxsim


def pose() -> None:
    """Make CPU tensors pass as CUDA tensors; to be called inside the simulation."""
    simulation = ptxsim.current()
    number = int(simulation.arch.strip("sm_af"))
    properties = types.SimpleNamespace(
        major=number // 10, minor=number % 10, multi_processor_count=simulation.sm_count, name="simulated"
    )
    torch.cuda.is_available = lambda: True
    torch.cuda.current_device = lambda: 0
    torch.cuda.get_device_capability = lambda device=None: (properties.major, properties.minor)
    torch.cuda.get_device_properties = lambda device=None: properties
    torch.Tensor.is_cuda = property(lambda tensor: True)
    from_dlpack = tvm_ffi.from_dlpack
    tvm_ffi.from_dlpack = lambda tensor, **options: from_dlpack(
        ptxsim.DeviceView(tensor) if isinstance(tensor, torch.Tensor) else tensor, **options
    )
    for compiled in (TVMFFIJitCompiledFunction, TVMFFIJitCompiledFunctionWithKwargs):
        _convert_arguments(compiled)


def _convert_arguments(compiled: type) -> None:
    plain = compiled.__call__

    def call(function, *args):
        if any(isinstance(value, torch.Tensor) for value in _flat(args)):
            return ptxsim.current().call(function, *args)
        return plain(function, *args)

    compiled.__call__ = call


def _flat(value):
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from _flat(item)
    else:
        yield value
