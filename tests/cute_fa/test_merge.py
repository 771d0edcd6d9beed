"""Partial attention over disjoint keys, merged: the attention over all keys, and its gradients."""

import math

import pytest
import torch

import cute_fa
from cute_fa import flash_attn_func, merge_states
from cute_fa.compat import fa3, fa4, flashinfer
from cute_fa.semantics import reference
from cute_fa.semantics.errors import (
    ArgumentError,
    CuteFaError,
    DeviceError,
    DTypeError,
    ShapeError,
    UnsupportedArgumentError,
)
from cute_fa.tools.inputs import InputSpec, make_inputs, output_gradients

PARTS = [slice(0, 7), slice(7, 60), slice(60, 61), slice(61, 100)]


def states(q, k, v, parts, attention=reference.attention, **options):
    """(outs, lses) over each part of the keys."""
    return zip(*(attention(q, k[:, part], v[:, part], **options) for part in parts), strict=True)


@pytest.mark.parametrize("kind", ["random", "peaked"])
def test_all_keys(kind):
    given = make_inputs(InputSpec(2, 9, 100, 6, 2, 64, 40), kind)
    whole = reference.attention(given.q, given.k, given.v)
    outs, lses = states(given.q, given.k, given.v, PARTS)
    for merged in (merge_states(outs, lses), merge_states(torch.stack(outs), list(lses))):
        for ours, theirs in zip(merged, whole, strict=True):
            assert (ours.dtype, ours.shape) == (torch.float32, theirs.shape)
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=3e-6)


def test_packed():
    """(total_q, heads, head_dim_v) beside (heads, total_q): a prompt and a decoding sequence."""
    packed = {"cu_seqlens_q": torch.tensor([0, 9, 10])}
    given = make_inputs(InputSpec(2, 9, 100, 4, 4, varlen_q=True, lengths_q=(9, 1)), "peaked")
    whole = reference.attention(given.q, given.k, given.v, **packed)
    for ours, theirs in zip(merge_states(*states(given.q, given.k, given.v, PARTS, **packed)), whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=3e-6)


def test_merging_by_turns():
    """In any order and grouping: what flash decoding and cascades rely on."""
    given = make_inputs(InputSpec(1, 5, 100, 2, 2))
    [a, b, c, d] = zip(*states(given.q, given.k, given.v, PARTS), strict=True)

    def merged(*pairs):
        return merge_states(*zip(*pairs, strict=True))

    for result in (merged(d, b, a, c), merged(merged(a, b), merged(c, d)), merged(merged(merged(d, c), b), a)):
        for ours, theirs in zip(result, merged(a, b, c, d), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    assert all(map(torch.equal, merged(a), a))


def test_precision():
    """fp32 for 16-bit outputs, whose own type holds neither these LSEs nor thirds; fp64 where an input is."""
    lses = torch.full((3, 1, 1, 1), 1e4)
    out, lse = merge_states(torch.tensor([1.0, 1.0, 256.0]).half().reshape(3, 1, 1, 1, 1), lses)
    assert (out.dtype, lse.dtype) == (torch.float16, torch.float32)
    assert out.item() == 86.0
    assert lse.item() == pytest.approx(1e4 + math.log(3), rel=1e-7)
    lses = torch.tensor([1e4, 1e4, 1e4 + 1e-9], dtype=torch.float64).reshape(3, 1, 1, 1)
    out, lse = merge_states(torch.tensor([1.0, 1.0, 256.0]).double().reshape(3, 1, 1, 1, 1), lses)
    # the derivative by the third LSE: share · (256 − 86)
    assert out.item() - 86.0 == pytest.approx(170e-9 / 3, rel=0.01)


def test_absent_states():
    """Rows: present twice, once, never. What an absent state holds does not matter."""
    outs = torch.tensor([[1.0, 2.0, math.nan], [3.0, math.nan, math.inf]]).reshape(2, 1, 3, 1, 1).requires_grad_()
    lses = torch.tensor([[0.0, 5.0, -math.inf], [0.0, -math.inf, -math.inf]]).reshape(2, 1, 1, 3).requires_grad_()
    out, lse = merge_states(outs, lses)
    assert out.flatten().tolist() == [2.0, 2.0, 0.0]
    assert lse.flatten().tolist() == [pytest.approx(math.log(2)), 5.0, -math.inf]
    douts, dlses = torch.autograd.grad((out, lse), (outs, lses), (torch.ones_like(out), torch.ones_like(lse)))
    assert douts.flatten(1).tolist() == [[0.5, 1.0, 0.0], [0.5, 0.0, 0.0]]
    # ∂out/∂lse is the share times (out_s − out), and ∂lse/∂lse the share
    assert dlses.flatten(1).tolist() == [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]


def test_nan_of_a_state_that_counts_shows():
    outs, lses = torch.ones(2, 1, 1, 1, 1), torch.zeros(2, 1, 1, 1)
    outs[1] = math.nan
    assert merge_states(outs, lses)[0].isnan().all()


def test_derivative():
    rng = torch.Generator().manual_seed(0)
    outs, lses = (torch.randn(shape, generator=rng).double() for shape in ((3, 2, 4, 2, 5), (3, 2, 2, 4)))
    assert torch.autograd.gradcheck(merge_states, (outs.requires_grad_(), lses.mul_(3).requires_grad_()))


def test_gradients_of_the_whole():
    given = make_inputs(InputSpec(2, 9, 100, 4, 2)).requiring_gradients()
    tensors = [t.detach().double().requires_grad_() for t in (given.q, given.k, given.v)]
    douts = [t.double() for t in output_gradients(given)]
    results = merge_states(*states(*tensors, PARTS, dtype=torch.float64))
    expected = reference.gradients(*(t.detach() for t in tensors), *douts, dtype=torch.float64)
    for ours, theirs in zip(torch.autograd.grad(results, tensors, douts), expected, strict=False):
        torch.testing.assert_close(ours, theirs)


def test_kernels():
    """Forward and backward of two simulated calls, the gradient of LSE included."""
    given = make_inputs(InputSpec(1, 40, 96, 2, 1)).requiring_gradients()
    tensors = [given.q, given.k, given.v]
    with cute_fa.simulate("sm_80"):
        outs, lses = states(*tensors, [slice(0, 32), slice(32, 96)], flash_attn_func, return_lse=True)
        out, lse = merge_states(outs, lses)
        douts = output_gradients(given)
        grads = torch.autograd.grad((out, lse), tensors, douts)
    assert reference.check(out, lse, *(t.detach() for t in tensors)).ok
    gradients = reference.Gradients(*grads, None, None)
    checks = reference.check_gradients(gradients, *(t.detach() for t in tensors), *douts)
    assert len(checks) == 3 and all(check.ok for check in checks.values()), checks


OUTS, LSES = torch.zeros(2, 3, 8, 4, 64), torch.zeros(2, 3, 4, 8)


@pytest.mark.parametrize(
    ("outs", "lses", "error", "message"),
    [
        ([], LSES, ArgumentError, "outs of no states: at least one"),
        (OUTS[:0], LSES[:0], ArgumentError, "outs of no states"),
        (OUTS, (), ArgumentError, "lses of no states"),
        (0.5, LSES, ArgumentError, "outs is float: a tensor or a sequence"),
        ([0.5], LSES, ArgumentError, "outs holds float: a sequence of tensors"),
        (None, LSES, ArgumentError, "outs is NoneType"),
        (OUTS.int(), LSES, DTypeError, "outs is int32: one of float16, bfloat16, float32, float64"),
        (OUTS, LSES.half(), DTypeError, "lses is float16: one of float32, float64 is needed"),
        ([OUTS[0], OUTS[1].half()], LSES, DTypeError, "outs is float16: the first state is float32"),
        ([OUTS[0], OUTS[1, :2]], LSES, ShapeError, r"outs holds \(3, 8, 4, 64\) and \(2, 8, 4, 64\)"),
        (OUTS[0, 0], LSES, ShapeError, r"outs \(8, 4, 64\): \(num_states, batch"),
        (OUTS, LSES[:1], ShapeError, r"lses \(1, 3, 4, 8\): \(2, 3, 4, 8\) is needed for outs"),
        (OUTS, LSES.transpose(2, 3), ShapeError, r"lses \(2, 3, 8, 4\): \(2, 3, 4, 8\)"),
        (OUTS[0], LSES, ShapeError, r"lses \(2, 3, 4, 8\): \(3, 4, 8\)"),
        (OUTS, LSES.to("meta"), DeviceError, "lses are on meta and outs on cpu"),
        ([OUTS[0], OUTS[1].to("meta")], LSES, DeviceError, "outs lie on cpu and meta"),
    ],
)
def test_errors(outs, lses, error, message):
    with pytest.raises(CuteFaError, match=message) as caught:
        merge_states(outs, lses)
    assert type(caught.value) is error


@pytest.mark.parametrize("as_sequence", [False, True])
def test_flashinfer_layout_and_base(as_sequence):
    """Rows before heads and states, logarithms of base 2; a row absent from one state and one from all."""
    packed = {"cu_seqlens_q": torch.tensor([0, 9, 10])}
    given = make_inputs(InputSpec(2, 9, 100, 4, 4, varlen_q=True, lengths_q=(9, 1)), "peaked")
    outs, lses = map(torch.stack, states(given.q, given.k, given.v, PARTS, **packed))
    lses[1, :, 3], lses[:, 2, 5] = -math.inf, -math.inf
    expected, expected_lse = merge_states(outs, lses)
    v, s = outs.movedim(0, 1), (lses / math.log(2)).permute(2, 0, 1)
    if as_sequence:
        v, s = v.unbind(1), s.unbind(1)
    out, lse = merge_states(v, s, layout="flashinfer", lse_base=2)
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(lse, (expected_lse / math.log(2)).T, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("masked", [False, True])
def test_functions_of_flashinfer(masked):
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(6, 3, 2, 16, generator=generator).half()
    s = torch.randn(6, 3, 2, generator=generator)
    weights = torch.softmax(s * math.log(2), 1)
    expected = (weights[..., None] * v.float()).sum(1)
    expected_lse = s.exp2().sum(1).log2()
    out, lse = flashinfer.merge_states(v, s)
    assert (out.dtype, lse.dtype) == (torch.float16, torch.float32)
    torch.testing.assert_close(out.float(), expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(lse, expected_lse)
    a, b = [t.contiguous() for t in (v[:, 0], s[:, 0])], flashinfer.merge_state(v[:, 1], s[:, 1], v[:, 2], s[:, 2])
    kept = [t.clone() for t in a]
    mask = torch.tensor([True, False, True, True, False, True]) if masked else None
    flashinfer.merge_state_in_place(*a, *b, mask)
    changed = torch.ones(6, dtype=torch.bool) if mask is None else mask
    torch.testing.assert_close(a[0][changed].float(), expected[changed], rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(a[1][changed], expected_lse[changed])
    assert torch.equal(a[0][~changed], kept[0][~changed])
    assert torch.equal(a[1][~changed], kept[1][~changed])


@pytest.mark.parametrize("dims", [5, 4])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_combine(dims, dtype):
    """FlashAttention-3's, of tensors that are not contiguous; one split is empty for a row."""
    generator = torch.Generator().manual_seed(0)
    partial = torch.randn(6, 3, 2, 7, 40, generator=generator).transpose(2, 3)[:4]
    lses = torch.randn(4, 3, 4, 7, generator=generator).transpose(-1, -2)[..., :2]
    lses[2, 1, 5] = -math.inf
    if dims == 4:
        partial, lses = partial.flatten(1, 2), lses.flatten(1, 2)
    weights = torch.softmax(lses, 0)
    expected = (weights[..., None] * partial).sum(0)
    out, lse = fa3.flash_attn_combine(partial, lses, out_dtype=dtype)
    assert (out.dtype, lse.dtype) == (dtype or torch.float32, torch.float32)
    torch.testing.assert_close(out.float(), expected, rtol=2**-8 if dtype else 1e-5, atol=1e-6)
    torch.testing.assert_close(lse, lses.logsumexp(0))
    for ours, theirs in zip(fa4.flash_attn_combine(partial, lses, None, dtype), (out, lse), strict=True):
        assert torch.equal(ours, theirs)
    written = torch.full_like(expected, math.nan).half()
    again, none = fa3.flash_attn_combine(partial, lses, written, return_lse=False)
    assert again is written
    assert none is None
    torch.testing.assert_close(written.float(), expected, rtol=2**-10, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: merge_states(OUTS, LSES, layout="hnd"), ArgumentError, "layout='hnd': one of flash_attn, flashinfer"),
        (lambda: merge_states(OUTS, LSES, lse_base=10), ArgumentError, "lse_base=10: math.e or 2"),
        (lambda: merge_states(OUTS, LSES, layout="flashinfer"), ShapeError, r"outs .*: \(total_q, num_states, heads"),
        (
            lambda: merge_states(OUTS[0], LSES[0], layout="flashinfer"),
            ShapeError,
            r"lses \(3, 4, 8\): \(3, 8, 4\) is needed",
        ),
        (lambda: merge_states(OUTS[0, :, :0], LSES, layout="flashinfer"), ArgumentError, "outs of no states"),
        (lambda: fa3.flash_attn_combine(OUTS, LSES), ShapeError, r"lse_partial \(2, 3, 4, 8\): \(2, 3, 8, 4\)"),
        (lambda: fa3.flash_attn_combine(OUTS[0, 0], LSES), ShapeError, r"out_partial \(8, 4, 64\): \(num_splits"),
        (
            lambda: fa4.flash_attn_combine(OUTS, LSES, seqused=OUTS),
            UnsupportedArgumentError,
            "seqused=tensor of shape .* is not implemented",
        ),
        (lambda: fa3.flash_attn_combine(OUTS, None), ArgumentError, "lse_partial is NoneType"),
        (
            lambda: fa3.flash_attn_combine(OUTS, LSES.transpose(2, 3), out_dtype=torch.int8),
            DTypeError,
            "out_dtype is int8",
        ),
        (
            lambda: fa3.flash_attn_combine(OUTS, LSES.transpose(2, 3), torch.zeros(2)),
            ShapeError,
            r"out \(2,\): \(3, 8, 4, 64\)",
        ),
    ],
)
def test_errors_of_options(call, error, message):
    with pytest.raises(CuteFaError, match=message) as caught:
        call()
    assert type(caught.value) is error
