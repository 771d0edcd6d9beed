"""From a kernel config to a function that runs: memory, disk (:mod:`cute_fa.engine.cache`), then the DSL's compiler.

A kernel is always compiled without the DSL's own JIT engine, exported to an object file under a name of its own, and
run from that object. So a fresh compile and a cached entry take one path; compiling needs no GPU, no C compiler and
does not load the CUDA runtime library; and kernels whose mangled names collide do not meet (the DSL cuts its names at
180 characters).

The kernel callable of ``KernelConfig.build()`` takes one tuple of arguments and the environment stream, which TVM-FFI
sets to torch's current stream.
"""

from __future__ import annotations

import os
import tempfile
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cute_fa.engine import cache, worlds
from cute_fa.engine.cache import Artifacts
from cute_fa.semantics.errors import NoDeviceError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cute_fa.engine.contract import KernelConfig
    from cute_fa.semantics.types import SmArch


@dataclass(frozen=True, eq=False)
class CompiledKernel:
    """A kernel loaded into one world: ``simulated`` or real. ``function`` is the ``tvm_ffi.Function``."""

    name: str
    artifacts: Artifacts
    function: Any
    simulated: bool

    @property
    def ptx(self) -> str:
        return self.artifacts.ptx

    @property
    def cubin(self) -> bytes:
        return self.artifacts.cubin

    def launch(self, args: tuple) -> None:
        """Run with the argument tuple of ``AttentionKernel.arguments``: asynchronously on the tensors' device and
        torch's current stream there, or inside a simulation at once and on CPU tensors.

        Raises NoDeviceError for CPU tensors outside a simulation, RuntimeError in the world that the kernel was not
        loaded into, and whatever the launch raises.
        """
        simulation = worlds.simulation()
        if (simulation is not None) is not self.simulated:
            loaded, wanted = ("simulated", "real") if self.simulated else ("real", "simulated")
            raise RuntimeError(
                f"{self.name} was loaded for {loaded} launches, not {wanted} ones: call compiled() again"
            )
        if simulation is not None:
            simulation.call(self.function, args)
            return
        device = _device_index(args)
        if device < 0:
            raise NoDeviceError(f"{self.name} needs CUDA tensors: CPU tensors run inside cute_fa.simulate() only")
        if device == torch.cuda.current_device():
            self.function(args)
            return
        # The DSL switches devices for tensors that are arguments themselves, not for those in a tuple.
        with torch.cuda.device(device):
            self.function(args)


def compiled(config: KernelConfig) -> CompiledKernel:
    """The kernel of a config, loaded into the present world; safe to call from several threads."""
    world = worlds.simulation() is not None, _line_info()
    kernel = _kernels.get((config, *world))
    return kernel if kernel is not None else _prepare(config, *world)


def compile_artifacts(config: KernelConfig) -> tuple[str, bytes]:
    """PTX and cubin of a config, from the disk cache or compiled; loads nothing and needs no GPU."""
    artifacts = _artifacts(config, _line_info())
    return artifacts.ptx, artifacts.cubin


def _line_info() -> bool:
    """Whether the DSL compiles with line information now: what a simulation was asked for."""
    simulation = worlds.simulation()
    return simulation is not None and simulation.line_info


_kernels: dict[tuple[KernelConfig, bool, bool], CompiledKernel] = {}  # config, simulated, with line information
_guard = threading.Lock()  # of _config_locks
_config_locks: dict[KernelConfig, threading.Lock] = {}
_compiling = threading.Lock()  # the DSL keeps the state of a compile in process-wide objects
_loading = threading.Lock()


def _prepare(config: KernelConfig, simulated: bool, line_info: bool) -> CompiledKernel:
    with _guard:
        lock = _config_locks.setdefault(config, threading.Lock())
    with lock:
        kernel = _kernels.get((config, simulated, line_info))
        if kernel is None:
            artifacts = _artifacts(config, line_info)
            if simulated:
                from cute_fa.engine.worlds import simulated as simulator

                simulator.register_ptx(artifacts.cubin, artifacts.ptx)
            function = _load(artifacts, cache.key_of(config, line_info))
            kernel = CompiledKernel(config.compile_name, artifacts, function, simulated)
            _kernels[config, simulated, line_info] = kernel
    return kernel


def _artifacts(config: KernelConfig, line_info: bool) -> Artifacts:
    loaded = _kernels.get((config, True, line_info)) or _kernels.get((config, False, line_info))
    if loaded:
        return loaded.artifacts
    key = cache.key_of(config, line_info)
    return cache.fetch(key, lambda: _compile(config, key))


def _export_name(key: cache.Key) -> str:
    return f"cute_fa_{key.digest}"


def _compile(config: KernelConfig, key: cache.Key) -> Artifacts:
    from cutlass import cute
    from cutlass.base_dsl.compiler import DumpDir

    cache.stats.count("compiled")
    with _compiling, _target(config.arch), tempfile.TemporaryDirectory(prefix="cute_fa_") as scratch:
        options = (cute.EnableTVMFFI, cute.KeepPTX, cute.KeepCUBIN, DumpDir(scratch))
        function, arguments = config.build()
        result = cute.compile[options](function, *arguments, no_jit_engine=True)
        path = Path(scratch, "kernel.o")
        result.export_to_c(str(path), function_name=_export_name(key))
        return Artifacts(path.read_bytes(), result.artifacts.PTX, result.artifacts.CUBIN)


@contextmanager
def _target(arch: SmArch) -> Iterator[None]:
    """Make ``arch`` what the DSL builds for, inside ``build()`` too, where copy and MMA atoms ask for it.

    The compile option GPUArch would not do: it takes effect only when the compile starts, and stays behind in the
    DSL afterwards, where it wins over the environment's setting. One left there is put aside for the same reason.
    """
    from cutlass.base_dsl.compiler import CompileOptions
    from cutlass.cutlass_dsl import CuTeDSL

    dsl = CuTeDSL._get_dsl()
    saved = dsl.envar._arch, dsl.compile_options  # _arch: reading `arch` would ask the driver
    dsl.envar.arch, dsl.compile_options = arch.value, CompileOptions()
    try:
        yield
    finally:
        dsl.envar.arch, dsl.compile_options = saved


def _load(artifacts: Artifacts, key: cache.Key) -> Any:
    """Link the object in this process. It comes from memory, not from the cache folder: these bytes were verified."""
    from cutlass import cute

    file = os.memfd_create("kernel.o")
    try:
        with open(file, "wb", closefd=False) as stream:
            stream.write(artifacts.object)
        with _loading:
            module = cute.runtime.load_module(f"/proc/self/fd/{file}", enable_tvm_ffi=True)
            return module[_export_name(key)]
    finally:
        os.close(file)


def _device_index(args: tuple) -> int:
    """CUDA device of the first tensor among the arguments, −1 if that is a CPU tensor or there is none."""
    for value in args:
        if isinstance(value, tuple):  # asked first: what is no tensor takes isinstance(…, torch.Tensor) long
            if (index := _device_index(value)) >= 0:
                return index
        elif isinstance(value, torch.Tensor):
            return value.get_device()
    return -1
