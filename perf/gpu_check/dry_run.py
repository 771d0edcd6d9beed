"""The plan of ``gpu-check`` without a GPU: the host's side of every launch, up to the launch.

Tensors in host memory pose as CUDA tensors of a simulated GPU (``ptxsim.posing``); each launch makes its plan, and is
then left out, so that large problems cost nothing and ``record_keys`` learns which kernels they launch.

As a pytest plugin (``-p perf.gpu_check.dry_run --dry-gpu sm_90a``) it runs the tests marked gpu up to the first
comparison with the reference, and skips the rest of each.
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
from cute_fa.engine import plan, worlds
from cute_fa.semantics import reference
from cute_fa.semantics.types import Direction, SmArch
from cute_fa.tools.inputs import make_inputs, output_gradients
from ptxsim.posing import posing


class _Unlaunched:
    """A compiled kernel whose launches run nothing."""

    def launch(self, arguments: tuple) -> None:
        pass


@contextmanager
def dry_gpu(arch: str) -> Iterator[None]:
    """Inside, this machine seems to have a GPU of that architecture, and kernels are neither compiled nor run."""
    target = worlds.described(SmArch(arch), torch.device("cpu"))
    with ExitStack() as stack:
        simulation = stack.enter_context(ptxsim.simulate(arch, sm_count=target.num_sms))
        stack.enter_context(posing(simulation))
        stack.enter_context(mock.patch.object(plan, "compiled", lambda config: _Unlaunched()))
        stack.enter_context(mock.patch.object(worlds, "_gpu", lambda index: target))
        # Operators that were registered before the pose see through it.
        for module in (engine.attention, engine.append, engine.autograd):
            stack.enter_context(mock.patch.object(module, "target_of", lambda device: target))
        yield


# ---- the plugin ------------------------------------------------------------------------------------------------------


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--dry-gpu", metavar="ARCH", help="Run tests marked gpu up to their first comparison.")


def pytest_configure(config: Any) -> None:
    """Before tests are imported, which take these functions by name."""
    if config.getoption("--dry-gpu"):

        def compared(*arguments: Any, **options: Any) -> Any:
            pytest.skip("dry run: nothing was computed that could be compared")

        for name in ("expected", "check", "expected_gradients", "check_gradients"):
            setattr(reference, name, compared)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: Any) -> Iterator[None]:
    arch = item.config.getoption("--dry-gpu")
    if not arch:
        return (yield)
    try:
        with dry_gpu(arch):
            return (yield)
    except Exception as error:  # graphs and timers need a GPU, and what is compared otherwise was not computed
        pytest.skip(f"dry run: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")


# ---- the sweep -------------------------------------------------------------------------------------------------------


def launch_once(workload: Any, arch: str) -> None:
    """What a sweep launches of ours for a workload."""
    from perf.providers import CuteFa

    inputs = make_inputs(workload.spec(), "random", poison=False)
    with dry_gpu(arch):
        attention = CuteFa().prepare(inputs)
        if workload.direction is Direction.FORWARD:
            with torch.no_grad():
                attention.forward(inputs.q, inputs.k, inputs.v)
            return
        leaves = [t.detach().requires_grad_() for t in (inputs.q, inputs.k, inputs.v)]
        out = attention.forward(*leaves)
        torch.autograd.grad(out, leaves, output_gradients(inputs)[0])
