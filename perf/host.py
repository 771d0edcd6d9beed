"""Costs around a kernel, which need no GPU: the host's side of a call, compiling, loading from the cache, importing.

A call's host time is taken in parts. What precedes the launch runs as it does on a GPU, on CPU tensors inside a
simulation that the call is not told of and whose kernels are never reached. The launch itself is the DSL's own host
code, called through TVM-FFI with the packed arguments, on the stand-in runtime: launches are accepted and nothing runs.
It takes tensors that TVM-FFI has converted; what converting torch's takes is measured with a function that does nothing
else. What the CUDA driver takes, also for naming the current device, is in none of them. Times are the least of several
repetitions, since other work on the machine only adds to them.

What belongs to one process (compiling, loading, importing) is measured in fresh ones, ours and the peer's by turns.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import tvm_ffi
from torch import library

import cute_fa
import ptxsim
from cute_fa.api.attention import prepare
from cute_fa.engine import attention, worlds
from cute_fa.engine import plan as plans
from cute_fa.engine.autograd import attention_backward
from cute_fa.semantics.types import SmArch
from perf.static import StaticKey, fa4_installed, fa4_target
from ptxsim.host.views import map_tensors

# Many short runs: other processes interrupt long ones every time.
CALLS, REPETITIONS = 50, 600

# Targets: µs of an eager call beyond an operator of torch's that only allocates, and of a backward call altogether;
# compile time against FlashAttention-4's, and in seconds; milliseconds of a load; import time against torch's.
EAGER_US, BACKWARD_US, COMPILE_RATIO, COMPILE_S, LOAD_MS, IMPORT_RATIO = 5.0, 15.0, 1.2, 5.0, 20.0, 1.5


@dataclass(frozen=True)
class Figure:
    """One measured figure, and what it should be at most; ``target`` None: nothing is asked."""

    what: str
    value: float | None
    unit: str
    target: float | None = None

    def row(self) -> dict[str, Any]:
        verdict = "" if self.target is None or self.value is None else "met" if self.value <= self.target else "MISSED"
        value = "needs a GPU" if self.value is None else f"{self.value:.3g}"
        return {"what": self.what, "value": value, "unit": self.unit, "target": self.target, "verdict": verdict}


def microseconds(function: Callable[[], Any]) -> float:
    """Least mean time of a call, over ``REPETITIONS`` runs of ``CALLS`` calls."""
    best = float("inf")
    for _ in range(REPETITIONS):
        started = time.perf_counter()
        for _ in range(CALLS):
            function()
        best = min(best, time.perf_counter() - started)
    return best / CALLS * 1e6


class _Reached:
    """In the place of a compiled kernel: keeps what it would be launched with."""

    def launch(self, arguments: tuple) -> None:
        self.arguments = arguments


@contextmanager
def _launching_nothing(run: Callable[[], Any]) -> Iterator[tuple[Any, _Reached]]:
    """What ``run`` calls is launched without its kernel, and is not told of the simulation, which costs time of its
    own. Gives the plan of the call, and what stands for its kernel."""
    reached = _Reached()
    kept, target, checks = plans.PLANS, attention.simulated_target, worlds.checks_values
    try:
        plans.PLANS = {}
        run()
        key, plan = plans.PLANS.popitem()
        plans.PLANS[(None, *key[1:])] = replace(plan, compiled=reached)
        attention.simulated_target, worlds.checks_values = lambda: None, lambda: False
        yield plan, reached
    finally:
        plans.PLANS, attention.simulated_target, worlds.checks_values = kept, target, checks


@contextmanager
def _operator_that_allocates(allocate: Callable[[torch.Tensor], tuple]) -> Iterator[Callable]:
    """torch's own cost of an operator: one of three tensors, in Python, that gives what is allocated like the first."""
    scratch = library.Library("cute_fa_host", "DEF")
    outputs = len(allocate(torch.empty(0)))
    try:
        scratch.define(f"outputs(Tensor q, Tensor k, Tensor v) -> ({', '.join(['Tensor'] * outputs)})")
        scratch.impl("outputs", lambda q, k, v: allocate(q), "CompositeExplicitAutograd")
        yield torch.ops.cute_fa_host.outputs.default
    finally:
        scratch._destroy()


@dataclass(frozen=True)
class _Times:
    """Microseconds of a call's parts: what torch takes to ``allocate`` the outputs, an ``operator`` that does no more;
    up to the launch ``before`` it and ``converting`` its tensors, and the ``launch`` itself; ``traced``: as ``before``,
    of a function that is compiled by torch, None where none is."""

    allocate: float
    operator: float
    before: float
    converting: float
    launch: float
    traced: float | None

    @property
    def whole(self) -> float:
        return self.before + self.converting + self.launch


def _times(
    arch: SmArch, call: Callable[[], Any], outputs: Callable[[Any, torch.Tensor], tuple], traced: bool
) -> _Times:
    """Of a call whose plan allocates ``outputs(plan, q)``."""
    q = _inputs(1)[0]
    with cute_fa.simulate(arch) as simulation, torch.no_grad(), simulation.idle():
        with _launching_nothing(call) as (plan, reached):
            before, compiled = microseconds(call), None
            if traced:
                function = torch.compile(call, fullgraph=True, backend="aot_eager")
                function()
                compiled = microseconds(function)
        allocate = partial(outputs, plan)
        own = microseconds(lambda: allocate(q))
        with _operator_that_allocates(allocate) as operator:
            overhead = microseconds(lambda: operator(q, q, q))
        convert = tvm_ffi.get_global_func("ffi.Array")
        ready = map_tensors(tvm_ffi.from_dlpack, reached.arguments)
        converting = microseconds(lambda: convert(reached.arguments)) - microseconds(lambda: convert(ready))
        arguments = map_tensors(lambda t: tvm_ffi.from_dlpack(ptxsim.device_view(t)), reached.arguments)
        launch = microseconds(lambda: plan.compiled.function(arguments))
    return _Times(own, overhead, before, converting, launch, compiled)


def _inputs(count: int) -> list[torch.Tensor]:
    """Small: that the CPU's allocator takes longer for large tensors has nothing to do with a GPU."""
    return [torch.randn(1, 8, 4, 64, dtype=torch.bfloat16) for _ in range(count)]


def call_figures(arch: SmArch) -> Iterator[Figure]:
    """Host time of a call of ``flash_attn_func`` (bf16, causal, head_dim 64) on ``arch``."""
    q, k, v = _inputs(3)

    def call():
        return cute_fa.flash_attn_func(q, k, v, causal=True)

    times = _times(arch, call, lambda plan, q: (plan.new_out(q), plan.new_lse(q)), traced=True)
    where = f"{arch.value}: "
    yield Figure(where + "torch allocates the two outputs", times.allocate, "µs")
    yield Figure(where + "an operator of torch's that does no more", times.operator, "µs")
    yield Figure(where + "eager call up to the launch", times.before, "µs")
    yield Figure(where + "TVM-FFI converts torch's tensors", times.converting, "µs")
    yield Figure(where + "the launch's host code, without the driver", times.launch, "µs")
    yield Figure(where + "eager call beyond torch's allocations", times.whole - times.allocate, "µs")
    yield Figure(where + "eager call beyond such an operator", times.whole - times.operator, "µs", EAGER_US)
    yield Figure(where + "torch.compile (aot_eager) up to the launch", times.traced, "µs")
    yield Figure(where + "CUDA graph, replay", None, "µs")


def backward_figures(arch: SmArch) -> Iterator[Figure]:
    """Host time of the backward of such a call on ``arch``, without autograd."""
    q, k, v, dout, out = _inputs(5)
    lse = torch.randn(1, 4, 8)
    forward = prepare(q, k, v, causal=True)

    def call():
        return attention_backward(dout, None, out, lse, forward)

    def outputs(plan, q):
        return tuple(new(q) for new in plan.new if new is not None)

    times = _times(arch, call, outputs, traced=False)
    where = f"{arch.value}, backward: "
    yield Figure(where + "torch allocates the three gradients", times.allocate, "µs")
    yield Figure(where + "call up to the launch", times.before, "µs")
    yield Figure(where + "TVM-FFI converts torch's tensors", times.converting, "µs")
    yield Figure(where + "the launches' host code, without the driver", times.launch, "µs")
    yield Figure(where + "call, without autograd and the driver", times.whole, "µs", BACKWARD_US)


def compile_figures(arch: SmArch, head_dim: int, causal: bool, repetitions: int) -> Iterator[Figure]:
    """Cold compile of a forward (bf16), FlashAttention-4's for the same key, and the load from the disk cache."""
    key = [arch.value, str(head_dim), str(int(causal))]
    what = f"{StaticKey(arch, head_dim, causal)}: "
    ours, theirs, loads = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        cached = {"CUTE_FA_CACHE_DIR": folder, "CUTE_FA_CACHE": "1"}
        _process("compile", *key, environment=cached)
        for _ in range(repetitions):
            ours.append(_process("compile", *key, environment={"CUTE_FA_CACHE": "0"}))
            if fa4_installed():
                environment = fa4_target(arch) | {"FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED": "0"}
                theirs.append(_process("compile-fa4", *key, environment=environment))
            loads.append(_process("load", *key, environment=cached))
    yield Figure(what + "cold compile", min(ours), "s", COMPILE_S)
    if theirs:
        yield Figure(what + "cold compile of FlashAttention-4", min(theirs), "s")
        yield Figure(what + "cold compile, ours to FlashAttention-4's", min(ours) / min(theirs), "×", COMPILE_RATIO)
    yield Figure(what + "load from the disk cache", min(loads) * 1e3, "ms", LOAD_MS)


def import_figures(repetitions: int) -> Iterator[Figure]:
    """Import times in fresh processes."""
    times: dict[str, list[float]] = {"torch": [], "cute_fa": []}
    for _ in range(repetitions):
        for module, seconds in times.items():
            seconds.append(_python("-c", f"{_CLOCK}import {module}; {_TOLD}"))
    best = {module: min(seconds) for module, seconds in times.items()}
    for module, seconds in best.items():
        yield Figure(f"import {module}", seconds, "s")
    yield Figure("import cute_fa, to import torch", best["cute_fa"] / best["torch"], "×", IMPORT_RATIO)


_CLOCK = "import json, time; started = time.perf_counter(); "
_TOLD = "print(json.dumps({'seconds': time.perf_counter() - started}))"


def _process(*arguments: str, environment: dict[str, str]) -> float:
    return _python("-m", "perf.host_process", *arguments, environment=environment)


def _python(*arguments: str, environment: dict[str, str] | None = None) -> float:
    """Seconds that a fresh interpreter prints last."""
    command = [sys.executable, "-W", "ignore", *arguments]
    done = subprocess.run(command, env=os.environ | (environment or {}), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])["seconds"]
