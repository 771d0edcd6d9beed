"""The DSL set up for the simulated world: target architecture, PTX kept with compiled functions, no driver calls."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from ..errors import SimError
from .images import register_ptx


def prepare(stack: ExitStack, simulation: Any, line_info: bool) -> None:
    """Set the DSL up for the simulated world until ``stack`` closes."""
    import cutlass.cute as cute
    from cutlass.base_dsl.jit_executor import JitExecutor, JitFunctionArtifacts
    from cutlass.cutlass_dsl import CuTeDSL
    from cutlass.cutlass_dsl.cuda_jit_executor import CudaDialectJitCompiledFunction
    from cutlass.cutlass_dsl.tvm_ffi_provider import TVMFFIJitCompiledFunction, TVMFFIJitCompiledFunctionWithKwargs
    from cutlass.utils import HardwareInfo

    def replace(owner: Any, name: str, value: Any) -> None:
        stack.callback(setattr, owner, name, vars(owner)[name])
        setattr(owner, name, value)

    # Compile for the simulated architecture and keep the PTX; the DSL's own cache of compiled functions knows nothing
    # of worlds, so it is off.
    environment = CuTeDSL._get_dsl().envar
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="ptxsim-"))
    settings = {"_arch": simulation.arch, "keep_ptx": True, "keep_cubin": True, "no_cache": True, "dump_dir": folder}
    if line_info:
        settings["lineinfo"] = True
    for name, value in settings.items():
        replace(environment, name, value)
    # cute.compile without options writes the settings above into options that outlive it.
    replace(cute.compile, "_compile_options", copy.deepcopy(cute.compile._compile_options))

    read_artifacts = JitFunctionArtifacts.__post_init__

    def post_init(artifacts: Any) -> None:
        read_artifacts(artifacts)
        if artifacts.PTX and isinstance(artifacts.CUBIN, bytes):
            register_ptx(artifacts.CUBIN, artifacts.PTX)

    replace(JitFunctionArtifacts, "__post_init__", post_init)

    load_library = CudaDialectJitCompiledFunction._load_cuda_library

    def load_simulated(function: Any) -> list:
        function.num_devices = 1  # a cached property that asks the driver
        try:
            simulation.run(load_library, function)
        finally:
            del function.num_devices
        return []  # nothing that the driver could unload

    replace(CudaDialectJitCompiledFunction, "_load_cuda_library", load_simulated)

    def reraising(function: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            return simulation.run(function, *args, **kwargs)

        return call

    replace(JitExecutor, "run_compiled_program", reraising(JitExecutor.run_compiled_program))
    for owner in (TVMFFIJitCompiledFunction, TVMFFIJitCompiledFunctionWithKwargs):
        replace(owner, "__call__", reraising(owner.__call__))

    replace(HardwareInfo, "__init__", lambda self, device_id=0: None)
    replace(HardwareInfo, "get_device_multiprocessor_count", lambda self: simulation.sm_count)
    replace(
        HardwareInfo,
        "get_max_active_clusters",
        lambda self, cluster_size, stream=None: max(1, simulation.sm_count // cluster_size),
    )
    replace(HardwareInfo, "get_l2_cache_size_in_bytes", _no_l2_cache)


def _no_l2_cache(self: Any) -> int:
    raise SimError("the simulated device has no L2 cache")
