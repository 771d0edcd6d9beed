"""The plan of ``gpu-check`` without a GPU: the host's side of every launch, up to the launch.

Tensors in host memory pose as CUDA tensors of a simulated GPU (``ptxsim.host.posing``); each launch makes its plan, and
is then left out, so that large problems cost nothing and ``record_keys`` learns which kernels they launch.

As a pytest plugin (``-p perf.gpu_check.dry_run --dry-gpu sm_90a``) it runs the tests marked gpu up to where they
compare what a launch computed, or ask for CUDA itself, and skips the rest of each. A test that launches nothing, or
raises anything else, fails: its kernels would be missing in what was recorded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import pytest
import torch

import ptxsim
from cute_fa import engine
from cute_fa.api import ranges
from cute_fa.engine import plan, worlds
from cute_fa.semantics import reference
from cute_fa.semantics.types import Direction, SmArch
from cute_fa.tools.inputs import output_gradients
from ptxsim.host.posing import posing

# What a torch without CUDA, or without a GPU, says where it is asked for a graph or a generator of the device.
_NO_CUDA = (
    "Tried to instantiate dummy base class",
    "Torch not compiled with CUDA",
    "Found no NVIDIA driver",
    "No CUDA GPUs",
)
# Tests that ask the GPU something before they launch: what they launch is in ``perf.gpu_check.pack``.
NOT_WALKED = (
    "test_a_gpu_runs_compiled_and_loaded_kernels_on_the_current_stream",
    "test_a_gpu_waits_for_the_callers_stream",
    "test_a_gpu_keeps_a_result_while_the_caller_reads_it",
    "test_cuda_events_time_a_copy_within_what_memory_allows",
    "test_ceilings_of_a_gpu_are_plausible",
    "test_sweep_on_a_gpu",
    "test_cuda_graphs_of_torch_compile",
)


class _Unlaunched:
    """A compiled kernel whose launches run nothing and are counted."""

    def __init__(self) -> None:
        self.launches = 0

    def launch(self, arguments: tuple) -> None:
        self.launches += 1


@contextmanager
def dry_gpu(arch: str) -> Iterator[_Unlaunched]:
    """Inside, this machine seems to have a GPU of that architecture, and kernels are neither compiled nor run: all are
    the one that this gives."""
    kernel = _Unlaunched()
    target = worlds.described(SmArch(arch), torch.device("cpu"))
    with ExitStack() as stack:
        simulation = stack.enter_context(ptxsim.simulate(arch, sm_count=target.num_sms))
        stack.enter_context(posing(simulation))
        stack.enter_context(mock.patch.object(plan, "compiled", lambda config: kernel))
        stack.enter_context(mock.patch.object(worlds, "_gpu", lambda index: target))
        # Operators that were registered before the pose see through it.
        for module in (engine.attention, engine.append, engine.autograd, engine.range_plans, ranges):
            stack.enter_context(mock.patch.object(module, "target_of", lambda device: target))
        # Plans keep the kernel that they were made with, and know nothing of this GPU.
        known = dict(plan.PLANS)
        plan.PLANS.clear()
        stack.callback(plan.PLANS.update, known)
        stack.callback(plan.PLANS.clear)
        yield kernel


# ---- the plugin ------------------------------------------------------------------------------------------------------


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--dry-gpu", metavar="ARCH", help="Run tests marked gpu up to their first comparison.")


def pytest_configure(config: Any) -> None:
    """Before tests are imported, which take these functions by name."""
    if config.getoption("--dry-gpu"):

        def compared(*arguments: Any, **options: Any) -> Any:
            raise AssertionError("compared with the reference")

        for name in ("expected", "check", "expected_gradients", "check_gradients"):
            setattr(reference, name, compared)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: Any) -> Iterator[None]:
    arch = item.config.getoption("--dry-gpu")
    if not arch:
        return (yield)
    if item.originalname in NOT_WALKED:
        pytest.skip("dry run: it asks the GPU something before it launches")
    with dry_gpu(arch) as kernel:
        try:
            result = yield
        except Exception as error:
            compares = isinstance(error, AssertionError) or str(error).startswith(_NO_CUDA)
            if not (kernel.launches and compares):
                raise
        else:
            assert kernel.launches, "nothing was launched"
            return result
    pytest.skip("dry run: nothing was computed that could be compared")


# ---- the sweep -------------------------------------------------------------------------------------------------------


def launch_once(workload: Any, arch: str) -> None:
    """What a sweep launches of ours for a workload."""
    from perf.providers import CuteFa

    inputs = workload.inputs("random")
    with dry_gpu(arch):
        attention = CuteFa().prepare(inputs)
        if workload.direction is Direction.FORWARD:
            with torch.no_grad():
                attention.forward(inputs.q, inputs.k, inputs.v)
            return
        leaves = [t.detach().requires_grad_() for t in (inputs.q, inputs.k, inputs.v)]
        out = attention.forward(*leaves)
        torch.autograd.grad(out, leaves, output_gradients(inputs)[0])
