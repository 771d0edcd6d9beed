"""One simulated backward of given inputs, after the reference's forward."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

import cute_fa
from cute_fa.engine import autograd
from cute_fa.semantics import reference
from cute_fa.semantics.call import Call
from cute_fa.semantics.problem import normalize_window
from cute_fa.tools.inputs import make_inputs, output_gradients
from tests.testing.simulated import unwritten_is_nan

if TYPE_CHECKING:
    from cute_fa.tools.inputs import Inputs, InputSpec


def call_of(given: Inputs, **choices: Any) -> Call:
    """The operator's arguments for these inputs; ``choices``: fields of the call."""
    options = given.options()
    left, right = normalize_window(options.pop("window_size"), options.pop("causal"))
    longest = {"max_seqlen_q": given.spec.seqlen_q, "max_seqlen_k": given.spec.seqlen_k}
    fields = longest | {"window_left": left, "window_right": right} | options
    return Call.made(given.q, given.k, given.v, **fields | choices)


def gradients_of(
    spec: InputSpec,
    inputs: str = "random",
    arch: str = "sm_80",
    deterministic: bool = False,
    lse_gradient: bool = True,
    family: str = "fa2",
    **simulation: Any,
) -> tuple[reference.Gradients, reference.ExpectedGradients]:
    """(gradients, what they should be); ``simulation``: options of ``cute_fa.simulate``."""
    given = make_inputs(spec, inputs)
    dout, dlse = output_gradients(given, seed=1)
    tensors = given.q, given.k, given.v
    out, lse = reference.attention(*tensors, **given.options())
    out, dlse = out.to(given.q.dtype), dlse if lse_gradient else None
    call = call_of(given, deterministic=deterministic, family=family)
    with cute_fa.simulate(arch, **simulation), unwritten_is_nan():
        grads = autograd.attention_backward(dout, dlse, out, lse, call, slopes_gradient=given.alibi_slopes is not None)
    return grads, reference.expected_gradients(*tensors, dout, dlse, **given.options())


def assert_right(spec: InputSpec, inputs: str = "random", **options: Any) -> reference.Gradients:
    """The gradients, all within the tolerance."""
    grads, expected = gradients_of(spec, inputs, **options)
    errors = expected.check(grads)
    assert len(errors) == 3 + (grads.dalibi is not None) + (grads.dsink is not None)
    assert all(error.ok for error in errors.values()), errors
    return grads


def same_bits(first: reference.Gradients, second: reference.Gradients) -> bool:
    """Whether all gradients are equal."""
    pairs = zip(first, second, strict=True)
    return all((a is None and b is None) or torch.equal(a, b) for a, b in pairs)
