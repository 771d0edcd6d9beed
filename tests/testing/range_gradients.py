"""One simulated forward and backward under a range plan."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch

import cute_fa
from cute_fa.api.ranges import range_attention
from tests.testing.simulated import unwritten_is_nan

if TYPE_CHECKING:
    from cute_fa.api.range_plan import RangePlan
    from tests.testing.range_reference import RangeInputs
    from tests.testing.range_walks import Ranges


def gradients_of(
    ranges: Ranges,
    inputs: RangeInputs,
    deterministic: bool = False,
    arch: str = "sm_80",
    plan: RangePlan | None = None,
    **schedule,
) -> dict[str, torch.Tensor]:
    """By variable. ``schedule``: options of ``cute_fa.simulate``."""
    x = inputs.requiring_gradients()
    choices = {"plan": plan or ranges.plan(), "deterministic": deterministic, "return_lse": True, "family": "fa2"}
    # what makes new tensors NaN also makes all gradients deterministic
    with cute_fa.simulate(arch, **schedule), unwritten_is_nan() if deterministic else nullcontext():
        out, lse = range_attention(x.q, x.k, x.v, **choices, **x.options())
        results, incoming = [out], [x.dout]
        if x.dlse is not None:
            results.append(lse)
            incoming.append(x.dlse)
        grads = torch.autograd.grad(results, list(x.variables().values()), incoming)
    return dict(zip(x.variables(), grads, strict=True))


def assert_right(ranges: Ranges, inputs: RangeInputs, **options) -> dict[str, torch.Tensor]:
    """The gradients, all within the tolerance."""
    grads = gradients_of(ranges, inputs, **options)
    errors = inputs.check_gradients(grads)
    assert all(error.ok for error in errors.values()), errors
    return grads


def same_bits(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Whether all gradients are equal."""
    return all(torch.equal(first[name], second[name]) for name in first)
