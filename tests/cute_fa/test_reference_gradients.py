"""The reference's gradients against numeric differentiation, torch's own attention, and their own rules."""

import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from cute_fa.semantics import reference
from cute_fa.semantics.errors import ArgumentError
from cute_fa.tools.inputs import InputSpec, make_inputs, output_gradients
from tests.testing.cases import spec_name

CASES = [
    InputSpec(seqlen_q=9, seqlen_k=14, causal=True, head_dim=16, heads=4),
    InputSpec(seqlen_q=14, seqlen_k=9, causal=True, head_dim=16, learnable_sink=True),
    InputSpec(seqlen_q=20, seqlen_k=20, window=(3, 2), sink_tokens=2, head_dim=16, heads=4, heads_kv=1, alibi=True),
    InputSpec(seqlen_q=11, seqlen_k=17, window=(4, -1), softcap=5.0, head_dim=8, head_dim_v=24, alibi=True),
    InputSpec(seqlen_q=11, seqlen_k=17, seqused_q=True, seqused_k=True, causal=True, head_dim=8, batch=3),
    InputSpec(seqlen_q=7, seqlen_k=9, alibi_per_batch=True, learnable_sink=True, softmax_scale=0.3, head_dim=8),
    InputSpec(seqlen_q=12, seqlen_k=9, varlen_q=True, varlen_k=True, seqused_k=True, batch=4, head_dim=8, alibi=True),
]


class Reference(torch.autograd.Function):
    """reference.attention with reference.gradients as its backward, in fp64."""

    @staticmethod
    def forward(ctx, inputs, q, k, v, slopes, sink):
        ctx.save_for_backward(q, k, v)
        ctx.options = inputs.options() | {"alibi_slopes": slopes, "learnable_sink": sink, "dtype": torch.float64}
        out, lse = reference.attention(q, k, v, **ctx.options)
        # −inf has no numeric derivative; a row that has it must have no influence on any gradient
        return out, lse.masked_fill(lse == -math.inf, 0.0)

    @staticmethod
    def backward(ctx, dout, dlse):
        return None, *reference.gradients(*ctx.saved_tensors, dout, dlse, **ctx.options)


@pytest.mark.parametrize("spec", CASES, ids=spec_name)
def test_gradcheck(spec):
    inputs = make_inputs(spec, seed=3, poison=False)
    tensors = (inputs.q, inputs.k, inputs.v, inputs.alibi_slopes, inputs.learnable_sink)
    variables = [None if t is None else t.double().requires_grad_() for t in tensors]
    torch.manual_seed(0)  # of the directions that are tried
    assert torch.autograd.gradcheck(lambda *args: Reference.apply(inputs, *args), variables, fast_mode=True)


def test_against_torch():
    inputs = make_inputs(InputSpec(seqlen_q=40, seqlen_k=40, heads=4, heads_kv=2, causal=True), seed=1)
    dout, _ = output_gradients(inputs)
    q, k, v = (t.float().requires_grad_() for t in (inputs.q, inputs.k, inputs.v))
    out = scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), is_causal=True, enable_gqa=True)
    expected = torch.autograd.grad(out.transpose(1, 2), (q, k, v), dout.float())
    actual = reference.gradients(inputs.q, inputs.k, inputs.v, dout, causal=True)
    torch.testing.assert_close(actual[:3], expected, atol=1e-5, rtol=1e-5)
    assert (actual.dalibi, actual.dsink) == (None, None)


def test_long_rows_in_pieces(monkeypatch):
    spec = InputSpec(seqlen_q=50, seqlen_k=70, causal=True, alibi=True, learnable_sink=True, heads=4, heads_kv=2)
    inputs = make_inputs(spec, seed=2)
    given = (inputs.q, inputs.k, inputs.v, *output_gradients(inputs))
    whole = reference.gradients(*given, **inputs.options())
    monkeypatch.setattr(reference, "_MAX_SCORES", 7 * 4 * 70)
    torch.testing.assert_close(reference.gradients(*given, **inputs.options()), whole, atol=1e-4, rtol=1e-4)


def test_only_what_counts_is_read_and_gets_a_gradient():
    """Packed sequences with unused rows, some of them empty, poisoned: the gradients of each sequence alone, else 0."""
    spec = InputSpec(
        *(5, 21, 33, 4, 2), varlen_q=True, varlen_k=True, seqused_q=True, seqused_k=True, causal=True, alibi=True
    )
    inputs = make_inputs(spec, seed=5)
    dout, dlse = output_gradients(inputs, seed=6)
    assert dout.isnan().any() and dlse.isnan().any()
    grads = reference.gradients(inputs.q, inputs.k, inputs.v, dout, dlse, **inputs.options())
    starts, lengths = ([t.tolist() for t in pair] for pair in (
        (inputs.cu_seqlens_q, inputs.cu_seqlens_k), (inputs.seqused_q, inputs.seqused_k)
    ))  # fmt: skip
    dalibi = torch.zeros(4)
    counted = [torch.zeros(t.shape[0], dtype=torch.bool) for t in (inputs.q, inputs.k)]
    for b in range(5):
        rows, keys = (slice(s[b], s[b] + n[b]) for s, n in zip(starts, lengths, strict=True))
        counted[0][rows], counted[1][keys] = True, True
        one = [inputs.q[None, rows], inputs.k[None, keys], inputs.v[None, keys], dout[None, rows], dlse[None, :, rows]]
        alone = reference.gradients(*one, causal=True, alibi_slopes=inputs.alibi_slopes)
        for ours, theirs, part in zip(grads[:3], alone[:3], (rows, keys, keys), strict=True):
            torch.testing.assert_close(ours[part], theirs[0])
        dalibi += alone.dalibi
    torch.testing.assert_close(grads.dalibi, dalibi)
    for grad, rows in zip(grads[:3], (counted[0], counted[1], counted[1]), strict=True):
        assert grad[~rows].eq(0).all() and not rows.all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hidden_rows_have_no_gradient(dtype):
    inputs = make_inputs(InputSpec(seqlen_q=8, seqlen_k=3, causal=True, alibi=True), seed=0)
    dout, dlse = output_gradients(inputs)
    dlse[:, :, :5] = math.nan  # as the gradient of logaddexp is, where two partial results have no keys
    grads = reference.gradients(inputs.q, inputs.k, inputs.v, dout, dlse, **inputs.options(), dtype=dtype)
    assert grads.dq[:, :5].eq(0).all() and grads.dq[:, 5:].ne(0).any()
    assert all(grad.isfinite().all() for grad in grads[:4])
    shorter = [inputs.q[:, 5:], inputs.k, inputs.v, dout[:, 5:], dlse[:, :, 5:]]
    rest = reference.gradients(*shorter, **inputs.options(), dtype=dtype)
    torch.testing.assert_close((grads.dk, grads.dv, grads.dalibi), (rest.dk, rest.dv, rest.dalibi))


def test_tolerance_accepts_rounding_and_no_more():
    spec = InputSpec(seqlen_q=64, seqlen_k=64, causal=True, alibi=True, learnable_sink=True)
    inputs = make_inputs(spec, "peaked", seed=4)
    given = (inputs.q, inputs.k, inputs.v, *output_gradients(inputs))
    expected = reference.expected_gradients(*given, **inputs.options())
    exact = expected.gradients
    rounded = reference.Gradients(*(t.bfloat16() for t in exact[:3]), *exact[3:])
    assert all(error.ok for error in expected.check(rounded).values())
    for name, grad in exact._asdict().items():
        assert expected.allowed[name] < 0.1 * grad.abs().max()
        worse = expected.check(rounded._replace(**{name: grad + 1.01 * expected.allowed[name]}))
        assert [other for other, error in worse.items() if not error.ok] == [name]
        broken = grad.clone()
        broken.view(-1)[0] = math.nan
        assert expected.check(rounded._replace(**{name: broken}))[name].error == math.inf
    assert expected.check(rounded._replace(dsink=None))["dsink"] == (math.inf, 0.0)
    wider = reference.gradients(*given, **inputs.options() | {"causal": False, "window_size": (-1, 1)})
    assert expected.check(wider)["dv"].error > 5 * expected.allowed["dv"]


def test_what_has_no_backward():
    inputs = make_inputs(InputSpec(page_size=16))
    with pytest.raises(ArgumentError, match="paged cache"):
        reference.gradients(inputs.q, inputs.k, inputs.v, inputs.q, **inputs.options())
    q = torch.zeros(1, 4, 1, 16).to(torch.float8_e4m3fn)
    with pytest.raises(ArgumentError, match="fp8"):
        reference.gradients(q, q, q, q)
