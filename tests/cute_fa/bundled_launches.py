"""Programs for test_host_runtime.py: bundled kernels launched for real, which reaches the made-up driver of
tests/testing/fake_driver.py. ``main`` runs the parts that are named, one after the other in one process, and prints
what each tells as JSON.

The arguments are CPU tensors that pose as CUDA ones: nothing reads them.
"""

import ctypes
import functools
import json
import struct
import sys
import threading

import torch
import tvm_ffi
from cache_kernels import ScaleConfig

import cute_fa
from cute_fa.engine import compiler
from cute_fa.semantics.types import SmArch
from ptxsim.host.views import DeviceView, map_tensors
from tests.testing.fake_driver import Driver

STREAM = 0xABC0
HEAD_DIMS = {"sm_80": 64, "sm_90a": 128, "sm_100a": 128}
FORWARDS = {"sm_80": "fa2_fwd_sm80", "sm_90a": "fa3_fwd_sm90a", "sm_100a": "fa4_fwd_sm100a"}


@functools.cache
def driver() -> Driver:
    return Driver()


def scale(factor: float) -> compiler.CompiledKernel:
    """The kernel, loaded into the present world."""
    return compiler.compiled(ScaleConfig(SmArch.SM_80, factor))


def launch(kernel: compiler.CompiledKernel, arguments: tuple | None = None, stream: int = 0) -> None:
    arguments = arguments or (torch.zeros(300), torch.zeros(300), 0.5, 300)
    with tvm_ffi.use_raw_stream(tvm_ffi.device("cuda:0"), stream):
        kernel.function(map_tensors(lambda tensor: tvm_ffi.from_dlpack(DeviceView(tensor)), arguments))


def error_of(function, *arguments) -> str | None:
    try:
        function(*arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def simulated() -> list[float]:
    with cute_fa.simulate("sm_80", race=True):
        out = torch.zeros(300)
        scale(2.0).launch((torch.arange(300.0), out, 0.5, 300))
    return out.tolist()


def worlds():
    """Simulated, real, simulated, real."""
    told = {"simulated": [simulated()], "real": []}
    for _ in range(2):
        driver().calls()
        launch(scale(2.0))
        told["real"].append(driver().calls())
        told["simulated"].append(simulated())
    told["image"] = scale(2.0).cubin in driver().last_code()
    real = scale(2.0)
    with cute_fa.simulate("sm_80") as simulation:
        other = scale(2.0)
        told["real one simulated"] = error_of(
            simulation.call, real.function, (torch.zeros(300), torch.zeros(300), 0.5, 300)
        )
    told["simulated one real"] = error_of(launch, other)
    told["calls"] = driver().calls()
    return told


def devices():
    """The kernel of ``worlds`` on another device, twice, and on the first again."""
    told = []
    for device in (2, 2, 0):
        driver().make_current(device)
        driver().calls()
        launch(scale(2.0))
        told.append(driver().calls())
    return told


def attention():
    """Of each architecture's forward: launch configuration and attributes, simulated and real."""
    told = {}
    for arch, head_dim in HEAD_DIMS.items():
        launched = []
        with cute_fa.simulate(arch) as simulation:
            call, on_launch = simulation.call, simulation._on_launch

            def keep_arguments(function, *arguments, call=call, launched=launched):
                launched.extend(arguments)
                return call(function, *arguments)

            def keep_config(a, on_launch=on_launch, launched=launched):
                launched.append(raw_config(a[0]))
                on_launch(a)

            simulation.call, simulation._on_launch = keep_arguments, keep_config
            q = torch.randn(1, 150, 2, head_dim, dtype=torch.bfloat16)
            cute_fa.flash_attn_func(q, q, q, causal=True)
        arguments, config = launched
        (serving,) = {config for config, *_ in compiler._kernels if config.compile_name.startswith(FORWARDS[arch])}
        driver().calls()
        kernel = compiler.compiled(serving)
        launch(kernel, arguments, STREAM)
        image = kernel.cubin in driver().last_code()
        told[arch] = {"simulated": config, "real": driver().calls(), "image": image}
    return told


def raw_config(address: int) -> list[int]:
    """Grid, block, dynamic shared memory and the attributes of a cudaLaunchConfig_t, as fake_libcuda.c writes them."""
    *geometry, smem, _, attributes, n = struct.unpack("<6IQQQI", ctypes.string_at(address, 52))
    words = [struct.unpack_from("<I4x3I", ctypes.string_at(attributes + 72 * i, 72)) for i in range(n)]
    return [*geometry, smem, *(word for kind, *value in words for word in (kind, *value[: 3 if kind == 4 else 1]))]


def threads():
    """Eight threads launch a kernel for the first time, all at once, half of them on device 1."""
    driver().cuda.fake_set_load_time(100_000)
    kernel, errors, start = scale(3.0), [], threading.Barrier(8)

    def run(device):
        if device:
            driver().make_current(device)
        start.wait()
        errors.append(error_of(launch, kernel))

    driver().calls()
    running = [threading.Thread(target=run, args=(i % 2,)) for i in range(8)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    driver().cuda.fake_set_load_time(0)
    return {"errors": errors, "calls": driver().calls()}


def errors():
    """What a failing driver function makes of a launch, and the launch after it."""
    told = []
    for factor, name, code in (
        (4.0, "cuLibraryLoadData", 209),
        (4.0, "cuLibraryGetKernel", 2),
        (4.0, "cuKernelSetAttribute", 2),
        (4.0, "cuLaunchKernelEx", 2),
        (4.0, "cuLaunchKernelEx", 999),
    ):
        kernel = scale(factor)
        driver().fail(name, code)
        first, second = error_of(launch, kernel), None
        if name == "cuLaunchKernelEx":
            second = error_of(launch, kernel)
        told.append([first, second])
    driver().calls()
    told.append([error_of(launch, scale(4.0)), driver().calls()])
    return told


def captured():
    """The first launch of a kernel while its stream is being captured, and the mode of capture behind it."""
    kernel = scale(2.0)
    driver().calls()
    driver().cuda.fake_set_capturing(1)
    return {"error": error_of(launch, kernel), "mode": driver().cuda.fake_capture_mode(), "calls": driver().calls()}


def without_clusters():
    """A launch on a device that has no clusters, and refuses to be asked for large ones."""
    driver().cuda.fake_set_no_clusters(1)
    return {"error": error_of(launch, scale(2.0)), "calls": driver().calls()}


def refused():
    """The errors of two launches."""
    return [error_of(lambda: launch(scale(2.0))) for _ in range(2)]


def beside_the_dsls():
    """A kernel that the DSL compiles and loads with its own runtime library, between two of the bundle's."""
    launch(scale(2.0))
    kinds = [type(scale(factor).artifacts).__name__ for factor in (2.0, 5.0, 3.0)]
    launch(scale(2.0))
    launch(scale(3.0))
    with open("/proc/self/maps") as maps:
        return {"kinds": kinds, "calls": driver().calls(), "dsl": "libcute_dsl_runtime.so" in maps.read()}


def main() -> None:
    print(json.dumps({name: globals()[name]() for name in sys.argv[1:]}))


if __name__ == "__main__":
    main()
