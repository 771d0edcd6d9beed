"""From a kernel config to a function that runs: memory, bundles (:mod:`cute_fa.engine.bundles`), the disk cache
(:mod:`cute_fa.engine.cache`), then the DSL's compiler.

A kernel is always compiled without the DSL's own JIT engine, exported to an object file under a name of its own, and
run from that object. So a fresh compile and a cached entry take one path; compiling needs no GPU, no C compiler and
does not load the CUDA runtime library; and kernels whose mangled names collide do not meet (the DSL cuts its names at
180 characters).

Host code is compiled for x86-64-v2, so that a kernel compiled here runs on any such machine.

The kernel callable of ``KernelConfig.build()`` takes one tuple of arguments and the environment stream, which TVM-FFI
sets to torch's current stream.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import platform
import tempfile
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cute_fa.engine import bundles, cache, keys, worlds
from cute_fa.engine.cache import Artifacts
from cute_fa.semantics.errors import CompilerMissingError, NoDeviceError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cute_fa.engine.bundles import BundledKernel
    from cute_fa.engine.contract import KernelConfig
    from cute_fa.semantics.types import SmArch


@dataclass(frozen=True, eq=False)
class CompiledKernel:
    """A kernel loaded into one world: ``simulated`` or real. ``function`` is the ``tvm_ffi.Function``; ``artifacts``
    tell where it comes from: a bundle, or the cache and the compiler."""

    name: str
    artifacts: Artifacts | BundledKernel
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


def exported(config: KernelConfig) -> Artifacts:
    """The object of a config, with its PTX and cubin, from the disk cache or compiled: what bundles are linked from."""
    return _artifacts(config, line_info=False)


def export_name(config: KernelConfig, line_info: bool = False) -> str:
    """The function that an object exports; its symbol is ``__tvm_ffi_`` and this."""
    return f"cute_fa_{cache.key_of(config, line_info).digest}"


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
            kernel = _kernels[config, simulated, line_info] = _loaded(config, simulated, line_info)
    return kernel


def _loaded(config: KernelConfig, simulated: bool, line_info: bool) -> CompiledKernel:
    bundled = bundles.find(keys.key_of(config, line_info))
    artifacts = bundled or _artifacts(config, line_info)
    if simulated:
        from cute_fa.engine.worlds import simulated as simulator

        simulator.register_ptx(artifacts.cubin, artifacts.ptx)
        if bundled:
            simulator.attach(bundles.host_runtime(bundled.bundle))
    function = bundled.load(simulated) if bundled else _load(artifacts, export_name(config, line_info))
    return CompiledKernel(config.compile_name, artifacts, function, simulated)


def _artifacts(config: KernelConfig, line_info: bool) -> Artifacts:
    for simulated in (True, False):
        loaded = _kernels.get((config, simulated, line_info))
        if loaded and isinstance(loaded.artifacts, Artifacts):
            return loaded.artifacts
    key = cache.key_of(config, line_info)
    if not dsl_installed():
        raise CompilerMissingError(config.compile_name, bundles.looked_into(keys.key_of(config, line_info)))
    return cache.fetch(key, lambda: _compile(config, export_name(config, line_info)))


@functools.cache
def dsl_installed() -> bool:
    """Whether kernels can be compiled, and loaded from the disk cache: what a bundle needs no DSL for."""
    return importlib.util.find_spec("nvidia_cutlass_dsl") is not None


def _compile(config: KernelConfig, name: str) -> Artifacts:
    from cutlass import cute
    from cutlass.base_dsl.compiler import DumpDir

    cache.stats.count("compiled")
    with _compiling, _target(config.arch), tempfile.TemporaryDirectory(prefix="cute_fa_") as scratch:
        options = (cute.EnableTVMFFI, cute.KeepPTX, cute.KeepCUBIN, DumpDir(scratch))
        function, arguments = config.build()
        result = cute.compile[options](function, *arguments, no_jit_engine=True)
        _compile_host_code_for_all(result.ir_module)
        path = Path(scratch, "kernel.o")
        result.export_to_c(str(path), function_name=name)
        return Artifacts(path.read_bytes(), result.artifacts.PTX, result.artifacts.CUBIN)


def _compile_host_code_for_all(module: Any) -> None:
    """Set the processor that a module's functions are compiled for: LLVM takes the one at hand with all its extensions
    otherwise. (The DSL's own option for it, HostTarget, is refused together with TVM-FFI.)"""
    from cutlass._mlir import ir

    if platform.machine() != "x86_64":
        return
    listed = ", ".join(f'"{feature}"' for feature in keys.HOST_FEATURES)
    with module.context:
        processor = ir.StringAttr.get(keys.HOST_CPU)
        features = ir.Attribute.parse(f"#llvm.target_features<[{listed}]>")

        def visit(operation: Any) -> Any:
            if operation.name == "llvm.func" and operation.regions[0].blocks:  # not a declaration
                operation.attributes["target_cpu"] = processor
                operation.attributes["target_features"] = features
            return ir.WalkResult.ADVANCE

        module.operation.walk(visit)


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


def _load(artifacts: Artifacts, name: str) -> Any:
    """Link the object in this process. It comes from memory, not from the cache folder: these bytes were verified."""
    from cutlass import cute

    file = os.memfd_create("kernel.o")
    try:
        with open(file, "wb", closefd=False) as stream:
            stream.write(artifacts.object)
        with _loading:
            module = cute.runtime.load_module(f"/proc/self/fd/{file}", enable_tvm_ffi=True)
            return module[name]
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
