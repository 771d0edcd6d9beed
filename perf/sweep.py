"""The sweep: every provider against the reference, then all that agree with it timed against each other."""

from __future__ import annotations

import importlib.metadata
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cached_property
from typing import Any, NamedTuple

import torch

from cute_fa.semantics import reference
from cute_fa.semantics.errors import DeviceError
from cute_fa.semantics.reference import Error, Gradients
from cute_fa.semantics.tensors import TORCH_DTYPES
from cute_fa.semantics.types import Direction
from cute_fa.tools.inputs import Inputs, output_gradients
from perf.device import Device
from perf.providers import Attention, Provider, Unavailable
from perf.results import ResultFile
from perf.timing import Ceilings, Effort, Timing, measure_ceilings, time_interleaved
from perf.workload import Workload

# Buffer sets that calls rotate over, at least and at most; as many as hold the L2 in between.
_LEAST_SETS, _MOST_SETS = 2, 8
_REASON_LENGTH = 400
NO_REFERENCE = "the reference is "  # so begins the reason of rows for which there is no room on the device

Row = dict[str, Any]


class Tensors(NamedTuple):
    """What one call works on, in our layout; ``dout`` backward only."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    dout: torch.Tensor | None


class Check(NamedTuple):
    """The output whose error is largest against what is allowed."""

    name: str
    error: Error


@dataclass
class Sweep:
    """Measures workloads on a device and appends their rows to a file; what the file has already is not done again."""

    device: Device
    providers: Mapping[str, Provider]
    results: ResultFile
    effort: Effort = field(default_factory=Effort)
    seed: int = 0

    def __post_init__(self):
        self.versions: dict[str, str | Unavailable] = {}
        for name, provider in self.providers.items():
            try:
                self.versions[name] = provider.version()
            except Unavailable as reason:
                self.versions[name] = reason
        self.dtypes: set[torch.dtype] = set()
        try:
            self.dsl = importlib.metadata.version("nvidia-cutlass-dsl")
        except importlib.metadata.PackageNotFoundError:
            self.dsl = "absent, bundled kernels"

    @cached_property
    def ceilings(self) -> Ceilings:
        """Measured when they are first needed."""
        return measure_ceilings(self.device, sorted(self.dtypes, key=str), self.effort)

    def run(self, workloads: Sequence[Workload]) -> Iterator[tuple[Workload, list[Row]]]:
        """Measure; gives each workload with its new rows, which are in the file by then. Raises DeviceError when a
        kernel has broken the context: a new process goes on behind it."""
        self.dtypes = {TORCH_DTYPES[workload.dtype] for workload in workloads}
        for workload in workloads:
            names = [name for name in self.providers if self._row(workload, name) not in self.results]
            rows = self._measured(workload, names) if names else []
            self.results.append(rows)
            skipped = [row["provider"] for row in rows if row["status"] == "skipped"]
            if skipped and not self.device.alive():
                raise DeviceError(f"{workload}: {skipped[-1]} broke the CUDA context; run again to go on behind it")
            yield workload, rows

    def _measured(self, workload: Workload, names: Sequence[str]) -> list[Row]:
        """Rows of the providers in their order. Where one breaks the device, only what is settled by then."""
        rows = {name: self._row(workload, name) for name in names}
        try:
            peaked, check = self._expected(workload)
        except torch.OutOfMemoryError as error:
            return [row | _skipped(f"{NO_REFERENCE}{error}") for row in rows.values()]
        trusted = {}
        for name, row in rows.items():
            try:
                attention, found = self._verified(workload, name, peaked, check)
            except Unavailable as reason:
                row |= _skipped(str(reason))
            except Exception as error:
                row |= _skipped(f"{type(error).__name__}: {error}")
                if not self.device.alive():
                    return [row for row in rows.values() if "status" in row]
            else:
                row |= {"error": found.error.error, "error_allowed": found.error.allowed}
                if found.error.ok:
                    trusted[name] = attention
                else:
                    row |= {"status": "wrong", "reason": f"{found.name} disagrees with the reference"}
        del check
        try:
            timed = self._timed(workload, trusted, peaked) if trusted else {}
        except RuntimeError as error:
            timed = {name: _skipped(f"timing: {type(error).__name__}: {error}") for name in trusted}
        return [row | timed.get(name, {}) for name, row in rows.items()]

    def _row(self, workload: Workload, name: str) -> Row:
        """What is known before anything ran."""
        version = self.versions[name]
        return {
            "provider": name,
            "version": None if isinstance(version, Unavailable) else version,
            **workload.columns(),
            **self.device.columns(),
            "flops": workload.work.flops,
            "bytes": workload.work.bytes,
            "dsl": self.dsl,
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }

    def _expected(self, workload: Workload) -> tuple[Inputs, Callable[[Sequence[torch.Tensor]], Check]]:
        """Inputs that show every wrong key, and what compares a provider's outputs with the reference's."""
        peaked = workload.inputs("peaked", self.seed, self.device.torch_device)
        tensors, options = (peaked.q, peaked.k, peaked.v), peaked.options()
        if workload.direction is Direction.FORWARD:
            expected = reference.expected(*tensors, **options)

            def check(outputs: Sequence[torch.Tensor]) -> Check:
                comparison = expected.check(outputs[0])
                return Check("out", Error(comparison.out_error, comparison.out_allowed))

        else:
            dout, _ = output_gradients(peaked, self.seed, poison=False)
            gradients = reference.expected_gradients(*tensors, dout, **options)

            def check(outputs: Sequence[torch.Tensor]) -> Check:
                errors = gradients.check(Gradients(*outputs, None, None))
                return Check(*max(errors.items(), key=lambda item: item[1].error - item[1].allowed))

        return peaked, check

    def _verified(
        self, workload: Workload, name: str, peaked: Inputs, check: Callable[[Sequence[torch.Tensor]], Check]
    ) -> tuple[Attention, Check]:
        version = self.versions[name]
        if isinstance(version, Unavailable):
            raise version
        if workload.plan is not None and not self.providers[name].takes_ranges:
            raise Unavailable(f"{name} takes no ranges")
        if workload.dtype_kv is not None and not self.providers[name].takes_codes:
            raise Unavailable(f"{name} takes no cache in {workload.dtype_kv.value} beside q in {workload.dtype.value}")
        dout = None
        if workload.direction is Direction.BACKWARD:
            dout, _ = output_gradients(peaked, self.seed, poison=False)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                attention = self.providers[name].prepare(peaked)
                _poison(peaked)
                outputs = call_of(attention, Tensors(peaked.q, peaked.k, peaked.v, dout))()
                found = check([attention.layout.restore(output) for output in outputs])
            except RuntimeError as error:
                # torch's scaled_dot_product_attention says in warnings why a backend refuses
                said = " ".join(str(warning.message).split(" (Triggered")[0] for warning in caught)
                raise RuntimeError(f"{error} {said}") from error
        return attention, found

    def _timed(self, workload: Workload, trusted: Mapping[str, Attention], inputs: Inputs) -> dict[str, Row]:
        ceilings = self.ceilings
        needed = sum(t.nbytes for t in (inputs.q, inputs.k, inputs.v))
        count = min(max(1 + self.device.l2_bytes // needed, _LEAST_SETS), _MOST_SETS)
        torch.manual_seed(self.seed)
        sets = [_random(workload, inputs) for _ in range(count)]
        calls = {name: [call_of(attention, tensors) for tensors in sets] for name, attention in trusted.items()}
        before = self.device.clocks()
        timings = time_interleaved(self.device, calls, self.effort)
        after = self.device.clocks()
        builds = {name: [attention.build] for name, attention in trusted.items() if attention.build}
        built = {name: {"plan_ms": t.median} for name, t in time_interleaved(self.device, builds, self.effort).items()}
        clocks = {
            "sm_mhz_before": before.sm_mhz,
            "mem_mhz_before": before.mem_mhz,
            "sm_mhz_after": after.sm_mhz,
            "mem_mhz_after": after.mem_mhz,
            "watts_after": after.watts,
            "celsius_after": after.celsius,
        }
        return {
            name: clocks | figures(workload, timing, ceilings) | built.get(name, {}) for name, timing in timings.items()
        }


def figures(workload: Workload, timing: Timing, ceilings: Ceilings) -> Row:
    """The columns of a measured row that follow from its times."""
    dtype, work, median = TORCH_DTYPES[workload.dtype], workload.work, timing.median
    roofline = ceilings.roofline(work, dtype)
    return {
        "status": "ok",
        "ms_p20": timing.quantile(20),
        "ms_p50": median,
        "ms_p80": timing.quantile(80),
        "samples": len(timing.samples),
        "tflops": work.flops / median / 1e9,
        "gbps": work.bytes / median / 1e6,
        "percent": 100 * roofline.ms / median,
        "bound": roofline.limit,
        "ceiling_ms": roofline.ms,
        "matmul_tflops": ceilings.tflops[dtype],
        "copy_gbps": ceilings.gbps,
    }


def call_of(attention: Attention, tensors: Tensors) -> Callable[[], Sequence[torch.Tensor]]:
    """A call of a provider on these tensors: (out,), or (dq, dk, dv) of an output that is computed here; all in the
    provider's layout."""
    leaves = [attention.layout.adapt(t) for t in tensors[:3]]
    if tensors.dout is None:

        def forward() -> Sequence[torch.Tensor]:
            with torch.no_grad():
                return (attention.forward(*leaves),)

        return forward
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    out, dout = attention.forward(*leaves), attention.layout.adapt(tensors.dout)
    return lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)


def _poison(inputs: Inputs) -> None:
    """NaN in the memory that torch's allocator hands out next for outputs of these sizes: what a kernel does not write
    must not be what a right one has left there."""
    shapes = [(*inputs.q.shape[:-1], inputs.v.shape[-1]), inputs.q.shape, inputs.k.shape, inputs.v.shape]
    held = [torch.full(shape, math.nan, dtype=torch.bfloat16, device=inputs.q.device) for shape in 2 * shapes]
    held.clear()


def _random(workload: Workload, inputs: Inputs) -> Tensors:
    """Standard normal tensors like the inputs: times of peaked ones would not be those of real data."""

    def normal(like: torch.Tensor, size: int) -> torch.Tensor:
        return torch.randn(*like.shape[:-1], size, device=like.device, dtype=torch.bfloat16).to(like.dtype)

    q, k, v = (normal(t, t.shape[-1]) for t in (inputs.q, inputs.k, inputs.v))
    backward = workload.direction is Direction.BACKWARD
    return Tensors(q, k, v, normal(q, workload.head_dim_v) if backward else None)


def _skipped(reason: str) -> Row:
    reason = " ".join(reason.split())
    return {
        "status": "skipped",
        "reason": reason if len(reason) <= _REASON_LENGTH else reason[: _REASON_LENGTH - 1] + "…",
    }
