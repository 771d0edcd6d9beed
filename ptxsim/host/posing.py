"""CPU tensors pose as CUDA tensors, so that scripts written for a GPU run in a simulation as they are.

Inside ``posing()`` torch answers that there is one CUDA device of the simulated architecture, tensors that are asked
for on it are made in host memory and say that they are on it, and the DSL's ways to take a tensor (from_dlpack,
arguments of compiled functions) hand it on as CUDA memory. Memory that torch.empty gives holds NaNs. Every stream is
the default one. What CuTe DSL scripts ask the driver (cuInit, the number of devices, ``cutlass.utils.HardwareInfo``) is
answered, and the DSL's ``benchmark`` runs once. Leaving restores everything. What else needs a driver (graphs, random
generators on the device) still raises torch's own error.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import wraps
from typing import Any

import numpy as np
import torch
from torch import library
from torch.overrides import TorchFunctionMode

from ptxsim.host.simulation import Simulation, current, device_view

_CUDA = torch.device("cuda", 0)
_ALIGNMENT = 512  # of a new tensor, in bytes
_PLAIN = (torch.Tensor, torch.nn.Parameter)
# What a tensor in host memory answers. Attributes of C types are new objects at each access: compared by value.
_ANSWERS = {
    torch.Tensor.device.__get__: _CUDA,
    torch.Tensor.is_cuda.__get__: True,
    torch.Tensor.is_cpu.__get__: False,
    torch.Tensor.get_device: 0,
}
# Dispatch keys under which operators are registered that compute something.
_COMPUTING = ("CPU", "CUDA", "CompositeExplicitAutograd", "CompositeImplicitAutograd")
_SAME = (torch.Tensor.cuda, torch.Tensor.pin_memory)
# What they give has arbitrary contents: bytes 0xff, which are a NaN of every floating-point type and -1.
_UNWRITTEN = {
    torch.empty,
    torch.empty_like,
    torch.empty_strided,
    torch.empty_permuted,
    torch.Tensor.new_empty,
    torch.Tensor.new_empty_strided,
}
_L2_BYTES = 50 << 20  # of an H100; no figure depends on it


class _HostMemory(TorchFunctionMode):
    """Tensors on CUDA are made in host memory, and tensors in host memory say that they are on CUDA."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in _ANSWERS:
            return _ANSWERS[func]
        if func in _SAME:
            return args[0]
        if func is torch.Tensor.data_ptr and current() is not None:
            _without_posing(device_view)(args[0])  # the script may hand on the bare address
        kwargs = kwargs or {}
        result = func(*map(_on_host, args), **{name: _on_host(value) for name, value in kwargs.items()})
        if type(result) in _PLAIN and getattr(func, "__name__", "") != "__get__":
            _align(result, [*_flat(args), *_flat(tuple(kwargs.values()))])
            if func in _UNWRITTEN and result.device.type == "cpu":
                result.untyped_storage().fill_(0xFF)
        return result


def _align(tensor: torch.Tensor, args: list[Any]) -> None:
    """Move a new tensor to where CUDA might have put it: its allocations begin at multiples of 512 bytes, the host's at
    multiples of 64, and scripts tell the DSL (``assumed_align``). Views of arguments and of foreign memory stay."""
    storage = tensor.untyped_storage()
    start, size = storage.data_ptr(), storage.nbytes()
    if start % _ALIGNMENT == 0 or not storage.resizable():
        return
    if any(type(value) in _PLAIN and value.untyped_storage().data_ptr() == start for value in args):
        return
    roomy = np.empty(size + _ALIGNMENT, np.uint8)
    aligned = torch.from_numpy(roomy[-roomy.ctypes.data % _ALIGNMENT :][:size]).untyped_storage()
    aligned.copy_(storage)
    place = tensor.storage_offset(), tensor.shape, tensor.stride()
    tensor.data = torch.empty(0, dtype=tensor.dtype).set_(aligned, *place)


class _Stream:
    """The default stream, whichever is asked for: launches run where they are made, and are over then."""

    cuda_stream = 0

    def __init__(self, *args: Any, **options: Any):
        pass

    def synchronize(self) -> None:
        pass

    def wait_stream(self, stream: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass


class _Event:
    """An event of such a stream; what lies between two of them takes no time that could be told."""

    cuda_event = 0

    def __init__(self, *args: Any, **options: Any):
        pass

    def record(self, stream: Any = None) -> None:
        pass

    def wait(self, stream: Any = None) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Any) -> float:
        return float("nan")


def _of_driver(driver: Any) -> dict[str, Any]:
    """Functions of ``cuda.bindings.driver`` that scripts begin with."""
    done = driver.CUresult.CUDA_SUCCESS
    return {"cuInit": lambda flags: (done,), "cuDeviceGetCount": lambda: (done, 1)}


def _hardware_info(simulation: Simulation) -> dict[str, Any]:
    """Methods of ``cutlass.utils.HardwareInfo``; a CTA of a cluster takes an SM."""
    return {
        "__init__": lambda self, device_id=0: None,
        "get_max_active_clusters": lambda self, cluster_size, stream=None: max(simulation.sm_count // cluster_size, 1),
        "get_device_multiprocessor_count": lambda self: simulation.sm_count,
        "get_l2_cache_size_in_bytes": lambda self: _L2_BYTES,
    }


def _benchmark(
    callable: Any, *, kernel_arguments: Any = None, workspace_generator: Any = None, **options: Any
) -> float:
    """``cutlass.testing.benchmark``: one call, which takes no time that could be told."""
    arguments = kernel_arguments if workspace_generator is None else workspace_generator()
    callable(*arguments.args, **arguments.kwargs)
    return float("nan")


def _on_host(value: Any) -> Any:
    """A device argument that names CUDA, as the CPU."""
    if isinstance(value, torch.device):
        return torch.device("cpu") if value.type == "cuda" else value
    return "cpu" if isinstance(value, str) and value.split(":")[0] == "cuda" else value


@contextmanager
def posing(simulation: Simulation) -> Iterator[None]:
    """Make torch and the DSL take CPU tensors for CUDA tensors; to be entered inside of ``simulation``."""
    import cutlass.cute.runtime
    import cutlass.cute.testing
    import cutlass.testing
    import cutlass.utils
    import tvm_ffi
    from cuda.bindings import driver
    from cutlass.cutlass_dsl.tvm_ffi_provider import TVMFFIJitCompiledFunction, TVMFFIJitCompiledFunctionWithKwargs

    number = int(simulation.arch.strip("sm_af"))
    properties = types.SimpleNamespace(
        name=f"simulated {simulation.arch}", major=number // 10, minor=number % 10,
        multi_processor_count=simulation.sm_count,
    )  # fmt: skip
    stream = _Stream()
    answers = {
        "is_available": lambda: True,
        "is_current_stream_capturing": lambda: False,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "get_device_name": lambda device=None: properties.name,
        "get_device_capability": lambda device=None: (properties.major, properties.minor),
        "get_device_properties": lambda device=None: properties,
        "current_stream": lambda device=None: stream,
        "default_stream": lambda device=None: stream,
        "Stream": _Stream,
        "Event": _Event,
        "stream": lambda stream: nullcontext(),
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
    }
    with ExitStack() as stack:

        def replace(owner: Any, name: str, value: Any) -> None:
            stack.callback(setattr, owner, name, vars(owner)[name])
            setattr(owner, name, value)

        for owner, known in (
            (torch.cuda, answers),
            (driver, _of_driver(driver)),
            (cutlass.utils.HardwareInfo, _hardware_info(simulation)),
            (cutlass.cuda, {"initialize_cuda_context": lambda device_id=0, flags=0: None}),
            (cutlass.testing, {"benchmark": _benchmark}),
            (cutlass.cute.testing, {"benchmark": _benchmark}),
        ):
            for name, answer in known.items():
                replace(owner, name, answer)
        replace(library, "custom_op", _also_on_cpu(library.custom_op))
        replace(library.Library, "impl", _of_posing_operators(library.Library.impl))
        replace(torch.autograd, "_engine_run_backward", _posing_inside(torch.autograd._engine_run_backward))
        replace(tvm_ffi, "from_dlpack", _of_view(tvm_ffi.from_dlpack))
        replace(cutlass.cute.runtime, "from_dlpack", _of_view(cutlass.cute.runtime.from_dlpack))
        for compiled in (TVMFFIJitCompiledFunction, TVMFFIJitCompiledFunctionWithKwargs):
            replace(compiled, "__call__", _of_tensors(compiled.__call__))
        replace(Simulation, "call", _without_posing(Simulation.call))
        stack.enter_context(_HostMemory())
        yield


def _without_posing(function: Any) -> Any:
    """The function, in which tensors say that they are on the CPU."""

    def call(*args: Any, **options: Any) -> Any:
        with torch._C.DisableTorchFunction():
            return function(*args, **options)

    return call


def _also_on_cpu(custom_op: Any) -> Any:
    """``custom_op`` of torch that registers for the CPU what is meant for CUDA: that is where tensors are."""

    def register(*args: Any, device_types: Any = None, **options: Any) -> Any:
        listed = [device_types] if isinstance(device_types, str) else device_types
        if listed is not None and "cuda" in listed:
            device_types = [*listed, "cpu"]
        return custom_op(*args, device_types=device_types, **options)

    return register


def _posing_inside(function: Any) -> Any:
    """The function, in which tensors pose while there is a simulation: for Python that torch calls, since it leaves a
    mode before it runs what the mode was asked about: operators, and ``backward`` of a torch.autograd.Function, on
    whichever thread, and hooks, which find what was there when the engine started."""

    @wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        with _HostMemory() if current() is not None else nullcontext():
            return function(*args, **options)

    return call


def _of_posing_operators(impl: Any) -> Any:
    """``Library.impl`` whose operators see tensors that pose, too.

    They stay registered, so that outside of a simulation they do what they always did."""

    def register(self: Any, name: Any, function: Any, key: str = "", **options: Any) -> Any:
        return impl(self, name, _posing_inside(function) if key in _COMPUTING else function, key, **options)

    return register


def _of_view(from_dlpack: Any) -> Any:
    """``from_dlpack`` that takes a CPU tensor for device memory; modules may keep it beyond the simulation."""

    def convert(tensor: Any, *args: Any, **options: Any) -> Any:
        if current() is None or not isinstance(tensor, torch.Tensor):
            return from_dlpack(tensor, *args, **options)
        return _without_posing(from_dlpack)(_without_posing(device_view)(tensor), *args, **options)

    return convert


def _of_tensors(plain: Any) -> Any:
    """The call of a compiled function, through ``Simulation.call`` when there are tensors among its arguments."""

    def call(function: Any, *args: Any, **options: Any) -> Any:
        if not options and any(isinstance(value, torch.Tensor) for value in _flat(args)):
            return current().call(function, *args)
        return plain(function, *args, **options)

    return call


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from _flat(item)
    else:
        yield value
