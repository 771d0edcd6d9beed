"""Gradients beside those of FlashAttention-4's backward for sm_90, both simulated: how far each is off."""

import pytest

import ptxsim
from cute_fa.semantics import reference
from cute_fa.tools.inputs import InputSpec, make_inputs, output_gradients
from ptxsim.host.posing import posing
from tests.testing.gradients import gradients_of


def of_flash_attention_4(spec: InputSpec, inputs: str, monkeypatch) -> reference.Gradients:
    """Gradients of the inputs that :func:`gradients_of` takes, without one of the LSE."""
    for name, value in {"FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED": "0", "QUACK_CACHE_ENABLED": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("FLASH_ATTENTION_NUM_SMS", "132")
    ptxsim.install()
    from flash_attn.cute import interface  # once PTX of all that it compiles is at hand

    given = make_inputs(spec, inputs)
    dout, _ = output_gradients(given, seed=1)
    out, lse = reference.attention(given.q, given.k, given.v, **given.options())
    with ptxsim.simulate("sm_90a", sm_count=132) as simulation, posing(simulation):
        grads = interface._flash_attn_bwd(
            given.q, given.k, given.v, out.to(given.q.dtype), dout, lse.float(), causal=spec.causal
        )
    return reference.Gradients(*grads[:3], None, None)


def distances(grads: reference.Gradients, expected: reference.ExpectedGradients) -> dict[str, float]:
    """Root mean square of what dQ, dK and dV are off the reference."""
    return {
        name: float((getattr(grads, name).double() - getattr(expected.gradients, name).double()).square().mean().sqrt())
        for name in ("dq", "dk", "dv")
    }


@pytest.mark.sampled
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_as_close_to_the_reference(head_dim, causal, monkeypatch):
    spec = InputSpec(1, 200, 260, 2, 2, head_dim, causal=causal)
    theirs = of_flash_attention_4(spec, "random", monkeypatch)
    ours, expected = gradients_of(spec, "random", arch="sm_90a", family="fa3", lse_gradient=False)
    off, theirs_off = distances(ours, expected), distances(theirs, expected)
    assert all(error.ok for error in expected.check(theirs).values())
    assert all(off[name] < 1.02 * theirs_off[name] for name in off), (off, theirs_off)
