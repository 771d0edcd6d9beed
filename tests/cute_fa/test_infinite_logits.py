"""Logits of −inf: sinks that are none beside rows that see no key, and parts without keys that are merged. Logits that
would make NaN of a head are refused where values are checked."""

import dataclasses
import math

import pytest
import torch

import cute_fa
from cute_fa import flash_attn_func, flash_attn_varlen_func, merge_states
from cute_fa.engine import autograd
from cute_fa.semantics import reference
from cute_fa.semantics.call import Call
from cute_fa.semantics.errors import ArgumentError
from cute_fa.semantics.reference import Gradients
from cute_fa.semantics.types import DType
from cute_fa.tools.inputs import Inputs, InputSpec, make_inputs, output_gradients
from tests.testing.simulated import unwritten_is_nan

# The first 20 queries see no key.
HIDDEN = InputSpec(batch=1, seqlen_q=50, seqlen_k=30, heads=2, head_dim=64, causal=True, learnable_sink=True)
SINKS = (-math.inf, 0.3)
ARCHS = ("sm_80", "sm_90a", "sm_100a")


def given(inputs: str = "random", **changes) -> Inputs:
    made = make_inputs(dataclasses.replace(HIDDEN, **changes), inputs, seed=3)
    return dataclasses.replace(made, learnable_sink=torch.tensor(SINKS))


@pytest.mark.sampled
@pytest.mark.parametrize("options", [{}, {"num_splits": 3}], ids=["whole", "split"])
@pytest.mark.parametrize("arch", ARCHS)
def test_forward(arch, options):
    """All families, whose softmax ends in the same lines, and the merge of splits, which adds the sink."""
    made = given("peaked")
    with cute_fa.simulate(arch), unwritten_is_nan():
        out, lse = made.run(return_lse=True, **options)
    assert reference.check(out, lse, made.q, made.k, made.v, **made.options()).ok
    assert lse[:, 0, :20].isneginf().all() and not out[:, :20].any()
    assert lse[:, 1, :20].allclose(torch.tensor(0.3))
    # −inf is no sink at all
    plain = dataclasses.replace(made, learnable_sink=None)
    whole, parts = reference.attention(made.q, made.k, made.v, **plain.options())
    torch.testing.assert_close(lse[:, 0], parts[:, 0], atol=1e-3, rtol=0)
    torch.testing.assert_close(out[:, :, 0].float(), whole[:, :, 0], atol=0.03, rtol=0)


PACKED = {"batch": 2, "varlen_q": True, "varlen_k": True, "lengths_q": (50, 40), "lengths_k": (30, 12)}


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("arch", "deterministic", "changes"),
    [*((arch, False, {}) for arch in ARCHS), ("sm_80", True, PACKED)],
    ids=[*ARCHS, "packed, deterministic"],
)
def test_gradients(arch, deterministic, changes):
    made = given("peaked", **changes)
    dout, dlse = output_gradients(made, seed=4)
    leaves = made.requiring_gradients()
    with cute_fa.simulate(arch), unwritten_is_nan():
        out, lse = leaves.run(return_lse=True, deterministic=deterministic)
        dlse = dlse.masked_fill(lse.isneginf(), math.nan)  # the gradient of logaddexp, where no part has keys
        variables = leaves.variables()
        grads = torch.autograd.grad((out, lse), list(variables.values()), (dout, dlse))
    named = Gradients.of(variables, grads)
    options = made.options()
    errors = reference.check_gradients(named, made.q, made.k, made.v, dout, dlse, **options)
    assert all(error.ok for error in errors.values()), errors
    assert named.dsink[0] == 0.0 and abs(named.dsink[1]) > 0.1
    assert all(grad.isfinite().all() for grad in grads)


def test_the_reference():
    """Gradients of the sinks, against those of a sink that is so low that nothing sees it."""
    made = given(seqlen_q=6, seqlen_k=4)
    dout, dlse = output_gradients(made, seed=4)
    tensors = made.q, made.k, made.v, dout, dlse
    infinite = reference.gradients(*tensors, **made.options())
    low = torch.tensor([-90.0, 0.3])
    finite = reference.gradients(*tensors, **{**made.options(), "learnable_sink": low})
    for name in ("dq", "dk", "dv"):
        assert getattr(infinite, name).equal(getattr(finite, name))
    assert infinite.dsink[1] == finite.dsink[1] and infinite.dsink[0] == 0.0
    # a row of the low sink alone gives it all of dLSE
    torch.testing.assert_close(finite.dsink[0], dlse[0, 0, :2].sum())


def test_the_tolerance_of_fp8_beside_rows_without_keys():
    """A row that holds nothing but a sink is exact in any precision: it allows no error."""
    made = given(dtype=DType.E4M3)
    expected = reference.expected(made.q, made.k, made.v, **made.options())
    assert 0.0 < expected.out_allowed < 1.0


@pytest.mark.parametrize("arch", ARCHS)
def test_no_keys_at_all(arch):
    made = given()
    leaves = [made.q.requires_grad_(), made.learnable_sink.requires_grad_()]
    with cute_fa.simulate(arch):
        out, lse = flash_attn_func(made.q, made.k[:, :0], made.v[:, :0], learnable_sink=leaves[1], return_lse=True)
        _, dsink = torch.autograd.grad((out, lse), leaves, (torch.ones_like(out), torch.ones_like(lse)))
    assert not out.any() and lse[:, 0].isneginf().all() and (lse[:, 1] == torch.tensor(0.3)).all()
    assert dsink.tolist() == [0.0, 50.0]


def test_merged_states():
    """Of parts that all lack keys for some rows, one with the sinks: as of the whole, with finite gradients."""
    made = given("peaked")
    outs, lses = [], []
    for keys, sink in ((slice(0, 0), made.learnable_sink), (slice(0, 14), None), (slice(14, 30), None)):
        k, v = made.k[:, keys], made.v[:, keys]
        diagonal = (None, 30 - keys.stop)  # stays where it is: key j of the part is key start + j of the whole
        out, lse = reference.attention(made.q, k, v, window_size=diagonal, learnable_sink=sink)
        outs.append(out)
        lses.append(lse)
    outs, lses = torch.stack(outs).requires_grad_(), torch.stack(lses).requires_grad_()
    out, lse = merge_states(outs, lses)
    whole = reference.attention(made.q, made.k, made.v, **made.options())
    torch.testing.assert_close((out, lse), whole)
    for grad in torch.autograd.grad((out, lse), (outs, lses), (torch.ones_like(out), torch.ones_like(lse))):
        assert grad.isfinite().all() and grad.any()


LARGEST = 2.0**126


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("learnable_sink", [0.0, math.inf], r"learnable_sink\[1\]=inf: between -2\^126 and 2\^126, or -inf for none"),
        ("learnable_sink", [math.nan, 0.0], r"learnable_sink\[0\]=nan: between"),
        ("learnable_sink", [0.0, -3e38], r"learnable_sink\[1\]=-3e\+38: between"),
        ("alibi_slopes", [0.0, math.inf], r"alibi_slopes\[1\]=inf: between -.* so that no bias overflows float32"),
        ("alibi_slopes", [-math.inf, 0.0], r"alibi_slopes\[0\]=-inf: between"),
        ("alibi_slopes", [[0.0, 0.0], [0.0, math.nan]], r"alibi_slopes\[1, 1\]=nan: between"),
        ("alibi_slopes", [LARGEST / 50 / 7, 0.0], r"alibi_slopes\[0\]=2.431e\+35: between -2.13e\+35 and 2.13e\+35"),
    ],
)
def test_what_is_refused(name, values, message):
    """Where values are checked, before anything runs, in the forward and in the backward."""
    made = given(batch=2)
    tensor = torch.tensor(values)
    with cute_fa.simulate("sm_80") as simulation:
        with pytest.raises(ArgumentError, match=message):
            flash_attn_func(made.q, made.k, made.v, **{name: tensor})
        cu = torch.tensor([0, 50, 100], dtype=torch.int32)
        packed = [t.flatten(0, 1) for t in (made.q, made.k, made.v)]
        with pytest.raises(ArgumentError, match=message):
            flash_attn_varlen_func(*packed, cu, cu * 3 // 5, 50, 30, **{name: tensor})
        call = Call.made(made.q, made.k, made.v)
        out, lse = torch.zeros_like(made.q), torch.zeros(2, 2, 50)
        with pytest.raises(ArgumentError, match=message):
            autograd.attention_backward(out, None, out, lse, call.changed(**{name: tensor}))
        assert not simulation.launches


@pytest.mark.sampled
@pytest.mark.parametrize(("arch", "softcap"), [("sm_80", 3.0), ("sm_90a", 0.0), ("sm_100a", 0.0)])
def test_the_largest_that_is_not_refused(arch, softcap):
    """A bias that hides all keys but one, and a sink that outweighs them."""
    made = given("peaked", seqlen_k=50)
    options = {"causal": True, "softcap": softcap, "learnable_sink": torch.tensor([-LARGEST, LARGEST])}
    options["alibi_slopes"] = torch.tensor([LARGEST / 50 / 8, 0.1])
    with cute_fa.simulate(arch):
        out, lse = flash_attn_func(made.q, made.k, made.v, return_lse=True, **options)
    _, expected = reference.attention(made.q, made.k, made.v, **options)
    torch.testing.assert_close(lse, expected, atol=2e-3, rtol=1e-6)
    assert out[:, :, 0].equal(made.v[:, :, 0]) and not out[:, :, 1].any()
