"""The host runtime of bundled kernels, cute_fa/engine/host_runtime.c, over a made-up driver."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from cute_fa.engine import bundles, compiler
from cute_fa.semantics.types import SmArch
from cute_fa.tools.bundle import write_bundle
from cute_fa.tools.cli import _configs_of
from tests.testing import fake_driver
from tests.testing.bundled import Processes, result

sys.path.append(str(Path(__file__).parent))  # by this name, as the programs import it
from cache_kernels import ScaleConfig

LAUNCHES = "import bundled_launches; bundled_launches.main()"
N_SCALE = [3, 1, 1, 128, 1, 1]  # CTAs and threads for 300 elements
HEAD_DIMS = {"sm_80": 64, "sm_90a": 128, "sm_100a": 128}
FORWARDS = [f"--arch {arch} --head-dim {head_dim} --causal" for arch, head_dim in HEAD_DIMS.items()]


@pytest.fixture(scope="module")
def processes(tmp_path_factory) -> Processes:
    return Processes(tmp_path_factory.mktemp("packages"))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    configs = [ScaleConfig(SmArch.SM_80, factor) for factor in (2.0, 3.0, 4.0)]
    configs += [config for line in FORWARDS for config in _configs_of(line.split())]
    folder = tmp_path_factory.mktemp("bundle") / "kernels"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "_kernels", {})
        list(write_bundle(configs, folder))
    return folder


@pytest.fixture(scope="module")
def told(bundle, processes, tmp_path_factory) -> dict[str, Any]:
    """By part of bundled_launches.py, one process for all."""
    environment = fake_driver.build(tmp_path_factory.mktemp("driver")) | {bundles.VARIABLE: str(bundle)}
    return processes.run(LAUNCHES, "worlds", "devices", "attention", "threads", "errors", **environment)


def named(calls: list[list], *names: str) -> list[list]:
    return [call for call in calls if call[0] in names]


def names(calls: list[list]) -> list[str]:
    return [call[0] for call in calls]


PREPARED = ["cuDeviceGetAttribute", "cuLibraryGetKernel", "cuKernelGetAttribute"] + ["cuKernelSetAttribute"] * 2


def test_the_first_launch_loads_and_prepares_and_later_ones_only_launch(told):
    first, later = told["worlds"]["real"]
    context = ["cuInit", "cuDevicePrimaryCtxRetain", "cuCtxSetCurrent"]
    assert names(first) == [*context, "cuLibraryLoadData", *PREPARED, "cuLaunchKernelEx"]
    assert names(later) == ["cuLaunchKernelEx"]
    assert first[1:4] == [["cuDevicePrimaryCtxRetain", 0], ["cuCtxSetCurrent", 0], ["cuLibraryLoadData", 0, 0]]
    assert told["worlds"]["image"]  # the cubin of the manifest
    # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES; kernel 1 on device 0
    assert ["cuKernelSetAttribute", 8, fake_driver.OPT_IN - fake_driver.STATIC, 1, 0] in first
    assert first[-1][:10] == later[0][:10] == ["cuLaunchKernelEx", 1, 0, *N_SCALE, 0]


def test_worlds_alternate(told):
    """Simulated, real, simulated, real: right values whenever simulated, and no kernel in the wrong world."""
    worlds = told["worlds"]
    assert worlds["simulated"] == [[float(i) for i in range(300)]] * 3
    assert [len(named(calls, "cuLaunchKernelEx")) for calls in worlds["real"]] == [1, 1]
    assert "was loaded in the real world" in worlds["real one simulated"]
    wrong = "RuntimeError: the kernel was loaded into a simulation and is launched outside it"
    assert worlds["simulated one real"] == wrong
    assert worlds["calls"] == []


def test_another_device_is_prepared_when_it_is_used(told):
    """No context appears anywhere: the calling thread's is used."""
    first, again, back = told["devices"]
    assert names(first) == [*PREPARED, "cuLaunchKernelEx"]
    assert ["cuKernelSetAttribute", 8, fake_driver.OPT_IN - fake_driver.STATIC, 1, 2] in first
    assert {call[-1] for call in named(first, "cuDeviceGetAttribute", "cuKernelGetAttribute")} == {2}
    assert [call[1:3] for call in (first[-1], again[0], back[0])] == [[1, 2], [1, 2], [1, 0]]
    assert len(again) == len(back) == 1


@pytest.mark.parametrize("arch", HEAD_DIMS)
def test_launches_are_those_that_the_simulator_sees(told, arch):
    """Grid, block, dynamic shared memory and attributes; on TVM-FFI's stream."""
    of = told["attention"][arch]
    grid_block_smem, attributes = of["simulated"][:7], of["simulated"][7:]
    (launch,) = named(of["real"], "cuLaunchKernelEx")
    assert launch[2:10] == [0, *grid_block_smem]
    assert launch[10] == 0xABC0 and launch[11:] == attributes
    assert grid_block_smem[6] >= 48 * 1024 and len(attributes) >= 4
    assert len(named(of["real"], "cuLibraryLoadData")) == 1 and of["image"]


def test_threads_that_launch_first_together_load_once(told):
    calls = told["threads"]["calls"]
    assert told["threads"]["errors"] == [None] * 8
    assert len(named(calls, "cuLibraryLoadData")) == 1
    assert sorted(call[-1] for call in named(calls, "cuKernelSetAttribute") if call[1] == 8) == [0, 1]
    assert sorted(call[2] for call in named(calls, "cuLaunchKernelEx")) == [0] * 4 + [1] * 4
    assert {call[1] for call in named(calls, "cuDevicePrimaryCtxRetain")} == {0}  # of threads without a context


def test_errors_of_the_driver_have_their_names_and_pass(told):
    """A launch that fails raises what the driver says; the next one works."""
    no_binary = "CUDA error 209, CUDA_ERROR_NO_BINARY_FOR_GPU: no kernel image is available for execution on the device"
    no_memory = "CUDA error 2, CUDA_ERROR_OUT_OF_MEMORY: out of memory"
    expected = [no_binary, no_memory, no_memory, no_memory, "CUDA error 999, unknown: unknown"]
    *failed, (last, calls) = told["errors"]
    assert failed == [[f"RuntimeError: {text}", None] for text in expected]
    assert last is None and names(calls) == ["cuLaunchKernelEx"]


@pytest.mark.sampled
@pytest.mark.parametrize("part", ["captured", "without_clusters"])
def test_the_first_launch_of_a_process(part, bundle, processes, tmp_path):
    """Inside the capture of a CUDA graph, where a thread may load code only if it says so, for as long as it does; and
    where the driver refuses an attribute that the kernel has no need of."""
    environment = fake_driver.build(tmp_path) | {bundles.VARIABLE: str(bundle)}
    told = processes.run(LAUNCHES, part, **environment)[part]
    assert told["error"] is None and names(told["calls"])[-1] == "cuLaunchKernelEx"
    assert told.get("mode", 0) == 0
    assert [call[1] for call in named(told["calls"], "cuKernelSetAttribute")] == [8, 14]


def test_what_no_kernel_can_run_on_is_told(bundle, processes, tmp_path):
    """The error says why, also the second time."""
    cases: dict[str, tuple[dict[str, str], str]] = {}
    for name in ("broken", "old", "none", "before"):
        (tmp_path / name).mkdir()
    (tmp_path / "broken" / "libcuda.so.1").write_text("no library")
    cases["broken"] = {"LD_LIBRARY_PATH": str(tmp_path / "broken")}, "RuntimeError: .*libcuda.so.1: "
    cases["old"] = (
        fake_driver.build(tmp_path / "old", without="cuKernelSetAttribute"),
        "RuntimeError: libcuda.so.1 has no cuKernelSetAttribute: the driver is older than CUDA 12",
    )
    cases["none"] = (
        fake_driver.build(tmp_path / "none") | {"FAKE_CUDA_FAIL": "cuInit:100"},
        "RuntimeError: CUDA error 100, CUDA_ERROR_NO_DEVICE: no CUDA-capable device is detected",
    )
    cases["before"] = (
        fake_driver.build(tmp_path / "before") | {"FAKE_CUDA_VERSION": "11080"},
        f"BundleError: scale_sm80 of {bundle} needs a driver for CUDA 12.0, this one is for CUDA 11.8: ",
    )
    running = {
        name: processes.start(LAUNCHES, "refused", **environment, **{bundles.VARIABLE: str(bundle)})
        for name, (environment, _) in cases.items()
    }
    for name, process in running.items():
        first, second = result(process)["refused"]
        assert first == second, name
        start, _, end = cases[name][1].partition(".*")
        assert first.startswith(start) and end in first, first


def test_the_dsls_runtime_may_be_there_too(bundle, processes, tmp_path):
    """Its functions have the names of ours: a bundled kernel calls ours, loaded before or after it."""
    environment = fake_driver.build(tmp_path) | {bundles.VARIABLE: str(bundle)}
    told = processes.run(LAUNCHES, "beside_the_dsls", dsl=True, **environment)["beside_the_dsls"]
    assert told["kinds"] == ["BundledKernel", "Artifacts", "BundledKernel"] and told["dsl"]
    launches = named(told["calls"], "cuLaunchKernelEx")
    assert len(launches) == 3 and {json.dumps(call[2:10]) for call in launches} == {json.dumps([0, *N_SCALE, 0])}
