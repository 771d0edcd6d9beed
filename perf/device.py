"""The GPU that a sweep times on, behind the few operations that it needs: the tests have one with a fake clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import pynvml
import torch

from cute_fa.semantics.errors import DeviceError
from cute_fa.semantics.types import SmArch

Call = Callable[[], object]

# Reading this many times the L2's size evicts what an earlier call left there, its replacement being no strict LRU.
_FLUSHES = 3
# The host's head start before a timed call, over what it took to enqueue the calls of the round before.
_LEAD = 1.5
_MIN_LEAD_US, _MAX_LEAD_US = 50.0, 5000.0
# Cycles of torch.cuda._sleep that last a microsecond at least, on any GPU so far.
_CYCLES_PER_US = 2500


class Clocks(NamedTuple):
    """State of the GPU: clocks of its SMs and of its memory in MHz, power in W, temperature in °C; None where the
    driver does not tell."""

    sm_mhz: int | None = None
    mem_mhz: int | None = None
    watts: float | None = None
    celsius: int | None = None


class Device(Protocol):
    """What a sweep needs of the machine that it times on."""

    torch_device: str
    arch: SmArch
    l2_bytes: int
    notes: list[str]  # what the machine does not tell, for the user

    def columns(self) -> dict[str, Any]:
        """What names the machine in a table of results: gpu, arch, driver, cuda, torch."""

    def clocks(self) -> Clocks: ...

    def free_bytes(self) -> int:
        """Memory that can still be allocated."""

    def run(self, call: Call) -> None:
        """Run and wait; raises what the call raises, also later on the device."""

    def time(self, calls: Sequence[Call]) -> list[float]:
        """Milliseconds of each call on the device, one after the other in this order, each with a cold L2."""

    def alive(self) -> bool:
        """False once a kernel has broken the context: nothing can run in this process any more."""


class CudaDevice:
    """The current CUDA device, timed with CUDA events.

    Before each timed call the device sleeps, so that the host has enqueued the whole call before it starts and launch
    latency is not counted, and then reads a buffer several times as large as the L2: what it leaves there are clean
    lines, whose eviction costs the timed call no traffic.
    """

    torch_device = "cuda"

    def __init__(self):
        if not torch.cuda.is_available():
            raise DeviceError("no GPU: kernels are timed on one")
        # the reference is fp32, also where a container's environment asks for TF32
        torch.set_float32_matmul_precision("highest")
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        self.arch = SmArch.of_capability(properties.major, properties.minor)
        self.name = properties.name
        self.l2_bytes = properties.L2_cache_size
        self._nvml = _Nvml(str(properties.uuid))
        missing = self._nvml.missing
        self.notes = [] if missing is None else [f"clocks and driver are not recorded: {missing}"]
        self._flushed = torch.zeros(_FLUSHES * self.l2_bytes // 4, device=self.torch_device)
        self._lead_us = _MIN_LEAD_US

    def columns(self) -> dict[str, Any]:
        return {
            "gpu": self.name,
            "arch": self.arch.value,
            "driver": self._nvml.driver,
            "cuda": torch.version.cuda,
            "torch": torch.__version__,
        }

    def clocks(self) -> Clocks:
        return self._nvml.clocks()

    def free_bytes(self) -> int:
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]

    def run(self, call: Call) -> None:
        call()
        torch.cuda.synchronize()

    def time(self, calls: Sequence[Call]) -> list[float]:
        events, slowest_us = [], 0.0
        for call in calls:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(int(self._lead_us * _CYCLES_PER_US))
            self._flushed.sum()
            start = time.perf_counter()
            begin.record()
            call()
            end.record()
            slowest_us = max(slowest_us, (time.perf_counter() - start) * 1e6)
            events.append((begin, end))
        torch.cuda.synchronize()
        self._lead_us = min(max(_LEAD * slowest_us, _MIN_LEAD_US), _MAX_LEAD_US)
        return [begin.elapsed_time(end) for begin, end in events]

    def alive(self) -> bool:
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            return False
        return True


class _Nvml:
    """Clocks and driver through NVIDIA's management library, None where it or an answer is missing: containers often
    have only a part of it."""

    def __init__(self, uuid: str):
        self.driver: str | None = None
        self.missing: str | None = None
        self._handle = None
        try:
            pynvml.nvmlInit()
            self.driver = pynvml.nvmlSystemGetDriverVersion()
            # by UUID: CUDA_VISIBLE_DEVICES renumbers torch's devices and not NVML's
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid.removeprefix('GPU-')}")
        except pynvml.NVMLError as error:
            self.missing = str(error)

    def clocks(self) -> Clocks:
        if self._handle is None:
            return Clocks()
        milliwatts = _asked(pynvml.nvmlDeviceGetPowerUsage, self._handle)
        return Clocks(
            _asked(pynvml.nvmlDeviceGetClockInfo, self._handle, pynvml.NVML_CLOCK_SM),
            _asked(pynvml.nvmlDeviceGetClockInfo, self._handle, pynvml.NVML_CLOCK_MEM),
            None if milliwatts is None else milliwatts / 1e3,
            _asked(pynvml.nvmlDeviceGetTemperature, self._handle, pynvml.NVML_TEMPERATURE_GPU),
        )


def _asked(query: Callable, *arguments: Any) -> Any:
    try:
        return query(*arguments)
    except pynvml.NVMLError:
        return None
