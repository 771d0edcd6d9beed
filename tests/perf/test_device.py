"""The CUDA device: what it enqueues, against stand-ins for the calls of torch and NVML; with a GPU the real ones."""

from __future__ import annotations

import types

import pynvml
import pytest
import torch

from cute_fa.semantics.errors import DeviceError
from cute_fa.semantics.types import SmArch
from perf import device as device_module
from perf.device import Clocks, CudaDevice
from perf.providers import PROVIDERS
from perf.results import ResultFile
from perf.sweep import Sweep
from perf.timing import Effort, measure_ceilings, time_interleaved
from perf.workload import Workload


def refusing(code: int):
    def refuse(*arguments):
        raise pynvml.NVMLError(code)

    return refuse


@pytest.fixture
def cuda(monkeypatch):
    """A device made of stand-ins; gives the log of what was enqueued, in order."""
    log = []
    now = [0.0]

    class Event:
        def __init__(self, enable_timing: bool):
            assert enable_timing

        def record(self):
            log.append("record")
            self.at = len(log)

        def elapsed_time(self, end) -> float:
            assert log[-1] == "synchronize"
            return float(end.at - self.at)

    properties = types.SimpleNamespace(name="NVIDIA H200", major=9, minor=0, L2_cache_size=4000, uuid="1-2-3")
    stand_ins = {
        "is_available": lambda: True,
        "current_device": lambda: 0,
        "get_device_properties": lambda index: properties,
        "Event": Event,
        "_sleep": lambda cycles: log.append(("sleep", cycles)),
        "synchronize": lambda: log.append("synchronize"),
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(pynvml, "nvmlInit", refusing(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND))
    monkeypatch.setattr(CudaDevice, "torch_device", "cpu")
    monkeypatch.setattr(device_module.time, "perf_counter", lambda: now[0])
    device = CudaDevice()
    device.log, device.now = log, now
    return device


def test_the_host_runs_ahead_and_the_l2_is_read_before_each_call(cuda, monkeypatch):
    flushed = types.SimpleNamespace(sum=lambda: cuda.log.append("flush"))
    monkeypatch.setattr(cuda, "_flushed", flushed)

    def call(name: str, microseconds: float):
        def run():
            cuda.now[0] += microseconds / 1e6
            cuda.log.append(name)

        return run

    assert cuda.time([call("a", 400), call("b", 10)]) == [2.0, 2.0]
    around = ["flush", "record", None, "record"]
    first = ("sleep", 50 * 2500)
    assert cuda.log == [first, *(x or "a" for x in around), first, *(x or "b" for x in around), "synchronize"]
    # half as long again as the slower of the calls took to enqueue, but no longer than 5 ms: that was a compile
    cuda.log.clear()
    cuda.time([call("c", 10**6)])
    assert cuda.log[0] == ("sleep", pytest.approx(600 * 2500, abs=1))
    cuda.log.clear()
    cuda.time([call("d", 1)])
    assert cuda.log[0] == ("sleep", 5000 * 2500)
    cuda.log.clear()
    cuda.time([])
    cuda.time([call("e", 1)])
    assert ("sleep", 50 * 2500) in cuda.log


def test_the_buffer_that_evicts_is_three_times_the_l2(cuda):
    assert cuda._flushed.nbytes == 3 * cuda.l2_bytes == 12_000


def test_machine_without_nvml_says_so(cuda):
    assert cuda.clocks() == Clocks(None, None, None, None)
    (note,) = cuda.notes
    assert note.startswith("clocks and driver are not recorded: ")
    assert cuda.columns()["driver"] is None
    assert (cuda.columns()["gpu"], cuda.columns()["arch"]) == ("NVIDIA H200", "sm_90a")


def test_clocks_come_from_the_device_of_torch(monkeypatch):
    asked = []

    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlSystemGetDriverVersion", lambda: "580.1")
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", lambda uuid: asked.append(uuid) or "handle")
    clocks = {pynvml.NVML_CLOCK_SM: 1980, pynvml.NVML_CLOCK_MEM: 2619}
    monkeypatch.setattr(pynvml, "nvmlDeviceGetClockInfo", lambda handle, kind: clocks[kind])
    monkeypatch.setattr(pynvml, "nvmlDeviceGetPowerUsage", lambda handle: 700_500)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetTemperature", refusing(pynvml.NVML_ERROR_NOT_SUPPORTED))
    nvml = device_module._Nvml("ab-12")
    assert nvml.clocks() == (1980, 2619, 700.5, None)
    assert (asked, nvml.driver, nvml.missing) == (["GPU-ab-12"], "580.1", None)


def test_a_broken_context_is_noticed(cuda, monkeypatch):
    assert cuda.alive()

    def broken():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    assert not cuda.alive()


def test_without_a_gpu_there_is_no_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match="no GPU"):
        CudaDevice()


@pytest.mark.gpu
def test_cuda_events_time_a_copy_within_what_memory_allows():
    device = CudaDevice()
    big, small = (torch.ones(size, device="cuda") for size in (2**28, 2**20))
    twice = torch.empty_like(big)
    calls = {"big": [lambda: twice.copy_(big)], "small": [lambda: small.mul_(1.0)]}
    timings = time_interleaved(device, calls, Effort())
    gbps = 2 * big.nbytes / timings["big"].median / 1e6
    assert 100 < gbps < 20_000
    # launch latency, some 10 µs on the host, is not in it
    assert timings["small"].median < 0.02
    spread = timings["big"].quantile(80) - timings["big"].quantile(20)
    assert spread < 0.2 * timings["big"].median
    assert device.alive()
    assert device.columns()["gpu"] == torch.cuda.get_device_name()


@pytest.mark.gpu
def test_ceilings_of_a_gpu_are_plausible():
    ceilings = measure_ceilings(CudaDevice(), [torch.bfloat16], Effort())
    assert 20 < ceilings.tflops[torch.bfloat16] < 5000
    assert 200 < ceilings.gbps < 20_000


@pytest.mark.gpu
@pytest.mark.parametrize("workload", [Workload(heads=4, heads_kv=2, seqlen=512, tokens=1024, causal=True)], ids=str)
def test_sweep_on_a_gpu(workload, tmp_path):
    """Ours and torch's FlashAttention 2 agree with the reference and get times; nothing is wrong."""
    results = ResultFile(tmp_path / "a.csv")
    list(Sweep(CudaDevice(), PROVIDERS, results, Effort(budget_ms=5)).run([workload]))
    table = results.rows().set_index("provider")
    assert (table.loc["cute-fa"].status, table.loc["FA2"].status) == ("ok", "ok"), table.reason.to_dict()
    assert (table.status != "wrong").all()
    ours = table.loc["cute-fa"]
    assert 0 < ours.ms_p20 <= ours.ms_p50 <= ours.ms_p80
    assert 0 < ours.percent < 110
    assert ours.arch == SmArch.of_capability(*torch.cuda.get_device_capability()).value
