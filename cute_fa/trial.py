"""One attention problem run and compared with the reference: what ``python -m cute_fa run`` and its tour do."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch

from cute_fa import reference
from cute_fa.compiler import compiled
from cute_fa.dispatch import TABLE
from cute_fa.errors import DeviceError
from cute_fa.inputs import Inputs, InputSpec
from cute_fa.names import canonical_name
from cute_fa.problem import AttentionProblem, default_scale, normalize_window
from cute_fa.simulation import simulate
from cute_fa.types import Direction, SmArch

_TIMED_RUNS = 10


@dataclass(frozen=True)
class Machine:
    """Where kernels run: on the GPU, or simulated on the CPU. ``schedule_seed`` picks a random order of warps."""

    arch: SmArch
    simulated: bool
    schedule_seed: int | None = None

    @property
    def device(self) -> str:
        return "cpu" if self.simulated else "cuda"

    def __str__(self) -> str:
        return f"{self.arch.value} simulated" if self.simulated else f"{self.arch.value} GPU"


def gpu_arch() -> SmArch | None:
    """The current GPU's architecture, None without a GPU that kernels are built for."""
    if not torch.cuda.is_available():
        return None
    try:
        return SmArch.of_capability(*torch.cuda.get_device_capability())
    except DeviceError:
        return None


def choose_machine(arch: SmArch | None, schedule_seed: int | None) -> Machine:
    """The GPU if there is one, unless another architecture or a schedule is asked for; else simulated, by default as
    sm_80."""
    present = gpu_arch()
    if present is not None and arch in (None, present) and schedule_seed is None:
        return Machine(present, simulated=False)
    return Machine(arch or present or SmArch.SM_80, simulated=True, schedule_seed=schedule_seed)


@dataclass(frozen=True)
class TrialResult:
    """What one problem gave. ``seconds``: the call itself; simulated that is the simulator's time, on a GPU the mean of
    several launches. ``compile_seconds``: until the kernel was there, compiled or from the cache."""

    canonical_name: str
    compile_name: str
    machine: Machine
    comparison: reference.Comparison
    compile_seconds: float
    seconds: float
    out: torch.Tensor
    lse: torch.Tensor

    @property
    def ok(self) -> bool:
        return self.comparison.ok

    def summary(self) -> dict[str, Any]:
        """For JSON: errors are None where they are not finite."""
        comparison = {key: value if math.isfinite(value) else None for key, value in self.comparison._asdict().items()}
        return {
            "ok": self.ok,
            "canonical_name": self.canonical_name,
            "compile_name": self.compile_name,
            "arch": self.machine.arch.value,
            "simulated": self.machine.simulated,
            "schedule_seed": self.machine.schedule_seed,
            **comparison,
            "seconds": self.seconds,
            "compile_seconds": self.compile_seconds,
        }


def problem_of_spec(spec: InputSpec, arch: SmArch, direction: Direction = Direction.FORWARD) -> AttentionProblem:
    """The problem that a spec describes, without making its tensors."""
    left, right = normalize_window(spec.window, spec.causal)
    return AttentionProblem(
        arch=arch,
        dtype=spec.dtype,
        batch=spec.batch,
        seqlen_q=spec.seqlen_q,
        seqlen_k=spec.seqlen_k,
        num_heads=spec.heads,
        num_heads_kv=spec.heads_kv,
        head_dim=spec.head_dim,
        head_dim_v=spec.head_dim_v,
        softmax_scale=default_scale(spec.head_dim) if spec.softmax_scale is None else spec.softmax_scale,
        window_left=left,
        window_right=right,
        sink_tokens=spec.sink_tokens,
        softcap=spec.softcap,
        alibi=spec.alibi or spec.alibi_per_batch,
        learnable_sink=spec.learnable_sink,
        varlen_q=spec.varlen_q,
        varlen_k=spec.varlen_k,
        seqused_q=spec.seqused_q,
        seqused_k=spec.seqused_k or spec.page_size is not None,
        page_size=spec.page_size,
        direction=direction,
    )


def run_trial(inputs: Inputs, machine: Machine) -> TrialResult:
    """Run the inputs, which lie on the machine's device, through the public API and compare out and lse."""
    problem = problem_of_spec(inputs.spec, machine.arch)
    kernel = TABLE.lookup(problem)
    config = kernel.configure(problem)
    if machine.simulated:
        with simulate(machine.arch.value, schedule_seed=machine.schedule_seed):
            compile_seconds, _ = _timed(lambda: compiled(config))
            seconds, (out, lse) = _timed(lambda: inputs.run(return_lse=True))
    else:
        compile_seconds, _ = _timed(lambda: compiled(config))
        out, lse = inputs.run(return_lse=True)
        seconds = _gpu_seconds(lambda: inputs.run(return_lse=True))
    options = inputs.options()
    return TrialResult(
        canonical_name(kernel, problem),
        config.compile_name,
        machine,
        reference.check(out, lse, inputs.q, inputs.k, inputs.v, **options),
        compile_seconds,
        seconds,
        out,
        lse,
    )


def _timed(function) -> tuple[float, Any]:
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def _gpu_seconds(function) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(_TIMED_RUNS):
        function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / _TIMED_RUNS
