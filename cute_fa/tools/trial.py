"""One attention problem, with its backward if wanted, run and compared with the reference: what ``python -m cute_fa
run`` and its tour do."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, fields, is_dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING, Any

import torch

from cute_fa.engine.compiler import compiled
from cute_fa.engine.table import TABLE
from cute_fa.engine.worlds import described, simulate
from cute_fa.semantics import reference
from cute_fa.semantics.errors import DeviceError
from cute_fa.semantics.names import canonical_name
from cute_fa.semantics.problem import AttentionProblem, default_scale, normalize_window
from cute_fa.semantics.tensors import problem_of
from cute_fa.semantics.types import Direction, SmArch
from cute_fa.tools.inputs import Inputs, InputSpec

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from cute_fa.engine.contract import KernelConfig

_TIMED_RUNS = 10


@dataclass(frozen=True)
class Machine:
    """Where kernels run: on the GPU, or simulated on the CPU with the options of ``cute_fa.simulate``."""

    arch: SmArch
    simulated: bool
    schedule_seed: int | None = None
    late: bool = False
    race: bool = False
    num_sms: int | None = None
    fp8_bits: int | None = None
    arithmetic: str = "float32"

    @property
    def device(self) -> str:
        return "cpu" if self.simulated else "cuda"

    def simulate(self) -> AbstractContextManager:
        """A simulation of this machine."""
        names = ("schedule_seed", "late", "race", "num_sms", "fp8_bits", "arithmetic")
        return simulate(self.arch, **{name: getattr(self, name) for name in names})

    @property
    def sms(self) -> int:
        """How many SMs kernels find."""
        return self.num_sms or described(self.arch, torch.device(self.device)).num_sms

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


def choose_machine(arch: SmArch | None, **simulation: Any) -> Machine:
    """The GPU if there is one, unless another architecture or an option of the simulator, a further field of
    :class:`Machine`, is asked for; else simulated, by default as sm_80."""
    present = gpu_arch()
    plain = Machine(present, simulated=False)
    if present is not None and arch in (None, present) and replace(plain, **simulation) == plain:
        return plain
    return Machine(arch or present or SmArch.SM_80, simulated=True, **simulation)


@dataclass(frozen=True)
class TrialResult:
    """What one problem gave. ``config``: how the kernel is built. ``seconds``: the call itself; simulated that is the
    simulator's time, on a GPU the mean of several launches. ``compile_seconds``: until the kernel was there, compiled
    or from the cache."""

    canonical_name: str
    config: KernelConfig
    machine: Machine
    comparison: reference.Comparison
    compile_seconds: float
    seconds: float
    out: torch.Tensor
    lse: torch.Tensor

    @property
    def compile_name(self) -> str:
        return self.config.compile_name

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
            "config": config_fields(self.config),
            **config_fields(self.machine),
            **comparison,
            "seconds": self.seconds,
            "compile_seconds": self.compile_seconds,
        }


@dataclass(frozen=True)
class BackwardResult(TrialResult):
    """What one problem gave forward and backward. The name, the config and the times are the backward's. ``dout`` and
    ``dlse`` (None: zero) are the gradients that were given, ``errors`` those of ``gradients`` by name."""

    dout: torch.Tensor
    dlse: torch.Tensor | None
    gradients: reference.Gradients
    errors: dict[str, reference.Error]

    @property
    def ok(self) -> bool:
        return super().ok and all(error.ok for error in self.errors.values())

    def summary(self) -> dict[str, Any]:
        """As of a forward, and ``gradients``: by name ``error``, None if not finite, and ``allowed``."""
        errors = {
            name: {"error": error.error if math.isfinite(error.error) else None, "allowed": error.allowed}
            for name, error in self.errors.items()
        }
        return {**super().summary(), "gradients": errors}


def problem_of_spec(spec: InputSpec, arch: SmArch, **choices: Any) -> AttentionProblem:
    """The problem that a spec describes, without making its tensors; ``choices`` are further fields of the problem:
    direction, pack_gqa, persistent, deterministic, lse_gradient, slopes_gradient."""
    left, right = normalize_window(spec.window, spec.causal)
    alike = {field.name for field in fields(spec)} & {field.name for field in fields(AttentionProblem)}
    described = {name: getattr(spec, name) for name in alike}
    described |= {"num_heads": spec.heads, "num_heads_kv": spec.heads_kv, "window_left": left, "window_right": right}
    given = zip(("q_descale", "k_descale", "v_descale"), spec.dtypes, strict=True)
    described |= {name: spec.descales and dtype.is_codes for name, dtype in given}
    described |= {f"{name}_block_descale": spec.block_descales and described[f"{name}_descale"] for name in "kv"}
    of_rows = bool(spec.row_descales)
    described |= {f"{name}_row_descale": of_rows and described[f"{name}_descale"] for name in "kv"}
    described |= {
        "ranges": spec.ranges > 0,
        "tree_mask": spec.tree,
        "q_positions": spec.positions,
        "k_positions": spec.positions,
        "alibi": spec.alibi or spec.alibi_per_batch,
        "seqused_k": spec.seqused_k or spec.page_size is not None or spec.cache_leftpad,
    }
    if spec.softmax_scale is None:
        described["softmax_scale"] = default_scale(spec.head_dim)
    return AttentionProblem(arch=arch, **described | choices)


def config_fields(config: KernelConfig | Machine) -> dict[str, Any]:
    """The fields by name, and a kernel's properties that follow from them, in plain types; a field that has fields of
    its own is a dict."""
    names = [field.name for field in fields(config)] + list(getattr(config, "derived", ()))
    return {name: _plain(getattr(config, name)) for name in names}


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    return config_fields(value) if is_dataclass(value) else value


def run_trial(inputs: Inputs, machine: Machine, **choices: Any) -> TrialResult:
    """Run the inputs, which lie on the machine's device, through the public API and compare out and lse. ``choices``:
    pack_gqa, persistent, num_splits and family."""
    choices = {"num_splits": 1} | choices  # the function for caches has another default
    call = inputs.call(**choices)
    plan = {"ranges": inputs.spec.ranges > 0, **dict.fromkeys(("q_positions", "k_positions"), inputs.spec.positions)}
    problem = replace(problem_of(machine.arch, call), **plan)
    problem, kernel = TABLE.choose(problem, call.options.family, machine.sms, call.options.num_splits)
    config = kernel.configure(problem)

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        return inputs.run(**choices, return_lse=True)

    if machine.simulated:
        with machine.simulate():
            compile_seconds, _ = _timed(lambda: compiled(config))
            seconds, (out, lse) = _timed(run)
    else:
        compile_seconds, _ = _timed(lambda: compiled(config))
        out, lse = run()
        seconds = _gpu_seconds(run)
    comparison = reference.check(out, lse, inputs.q, inputs.k, inputs.v, **inputs.options())
    return TrialResult(canonical_name(kernel, problem), config, machine, comparison, compile_seconds, seconds, out, lse)


def run_backward_trial(
    inputs: Inputs,
    machine: Machine,
    dout: torch.Tensor,
    dlse: torch.Tensor | None = None,
    *,
    deterministic: bool = False,
    **choices: Any,
) -> BackwardResult:
    """Run the inputs forward and backward as :func:`run_trial` does and compare out, lse and all gradients; ``choices``
    are the forward's."""
    differentiated = inputs.requiring_gradients()
    variables = list(differentiated.variables().values())
    problem = problem_of_spec(
        inputs.spec,
        machine.arch,
        direction=Direction.BACKWARD,
        deterministic=deterministic,
        lse_gradient=dlse is not None,
        slopes_gradient=inputs.alibi_slopes is not None,
    )
    kernel = TABLE.lookup(problem, choices.get("family"))
    config = kernel.configure(problem)

    def forward() -> tuple[torch.Tensor, torch.Tensor]:
        return differentiated.run(**choices, deterministic=deterministic, return_lse=True)

    def backward() -> tuple[torch.Tensor, ...]:
        given = ((out,), dout) if dlse is None else ((out, lse), (dout, dlse))
        return torch.autograd.grad(given[0], variables, given[1], retain_graph=True)

    if machine.simulated:
        with machine.simulate():
            out, lse = forward()
            compile_seconds, _ = _timed(lambda: compiled(config))
            seconds, grads = _timed(backward)
    else:
        out, lse = forward()
        compile_seconds, _ = _timed(lambda: compiled(config))
        grads = backward()
        seconds = _gpu_seconds(backward)
    gradients = reference.Gradients.of(differentiated.variables(), grads)
    out, lse, given = out.detach(), lse.detach(), (inputs.q, inputs.k, inputs.v)
    return BackwardResult(
        canonical_name(kernel, problem),
        config,
        machine,
        reference.check(out, lse, *given, **inputs.options()),
        compile_seconds,
        seconds,
        out,
        lse,
        dout,
        dlse,
        gradients,
        reference.check_gradients(gradients, *given, dout, dlse, **inputs.options()),
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
