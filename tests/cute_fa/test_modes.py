"""Modes and transforms of torch around a call, each tried on a call that has a plan already and so could pass them by:
the values of the plain call, or one error that says what is not offered."""

import contextlib
import dataclasses

import pytest
import torch
from torch import _vmap_internals
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
from torch.autograd import forward_ad, graph
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import BaseTorchFunctionMode, TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import cute_fa
from cute_fa import flash_attn_func
from cute_fa.engine import attention as engine
from cute_fa.semantics.errors import ArgumentError, DTypeError, NoBackwardError, ShapeError
from cute_fa.tools.inputs import InputSpec, make_inputs, output_gradients

DENSE = InputSpec(batch=2, seqlen_q=20, seqlen_k=36, heads=4, heads_kv=2, head_dim=32, causal=True)
FULL = dataclasses.replace(DENSE, alibi=True, learnable_sink=True)
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's own


@pytest.fixture
def given():
    """q, k and v of a causal call that has a plan."""
    inputs = make_inputs(DENSE, "peaked")
    with cute_fa.simulate("sm_80"):
        attend(inputs.q, inputs.k, inputs.v)
        yield inputs.q, inputs.k, inputs.v


def attend(q, k, v):
    return flash_attn_func(q, k, v, causal=True)


def written(q, k, v):
    """The same, by ``out=``."""
    out = torch.empty_like(q)
    flash_attn_func(q, k, v, causal=True, out=out)
    return out


# ---- the forward ----------------------------------------------------------------------------------------------------


def older_functionalization(f, *tensors):
    torch._enable_functionalization(reapply_views=True)
    try:
        out = f(*map(torch._to_functional_tensor, tensors))
        torch._sync(out)
        return torch._from_functional_tensor(out)
    finally:
        torch._disable_functionalization()


def functional_tensors(f, *tensors):
    with FunctionalTensorMode():
        out = f(*map(FunctionalTensor.to_functional, tensors))
    return torch._from_functional_tensor(out.elem)


def mapped(vmap, f, q, k, v, dim=0):
    """Attention of a stack of other queries and these: the latter's."""
    return vmap(lambda q: f(q, k, v), in_dims=dim)(torch.stack([2 * q, q], dim))[1]


def inside(mode):
    def run(f, *tensors):
        with mode():
            return f(*tensors)

    return run


def traced(trace):
    """A graph recorded with other queries."""

    def run(f, q, k, v):
        return trace(f, (3 * q, k, v))(q, k, v)

    return run


class Attention(torch.nn.Module):
    def forward(self, q, k, v):
        return attend(q, k, v)


class Queries(torch.Tensor):
    """A subclass that changes nothing."""


MODES = {
    "vmap": lambda f, *qkv: mapped(torch.vmap, f, *qkv),
    "vmap of the second dimension": lambda f, *qkv: mapped(torch.vmap, f, *qkv, dim=1),
    "older vmap": lambda f, *qkv: mapped(_vmap_internals._vmap, f, *qkv),
    "functionalize": lambda f, *qkv: torch.func.functionalize(f)(*qkv),
    "older functionalization": older_functionalization,
    "FunctionalTensorMode": functional_tensors,
    "TorchFunctionMode": inside(BaseTorchFunctionMode),
    "default device": inside(lambda: torch.device("cpu")),
    "dual level": inside(forward_ad.dual_level),
    "inference_mode": inside(torch.inference_mode),
    "profiler": inside(torch.profiler.profile),
    "subclass": lambda f, q, k, v: f(q.as_subclass(Queries), k, v).as_subclass(torch.Tensor),
    "jit.trace": traced(lambda f, qkv: torch.jit.trace(f, qkv, check_trace=False)),
    "make_fx": traced(lambda f, qkv: make_fx(f)(*qkv)),
    "make_fx of symbols": traced(lambda f, qkv: make_fx(f, tracing_mode="symbolic")(*qkv)),
    "export": traced(lambda f, qkv: torch.export.export(Attention(), qkv).module()),
}


@pytest.mark.parametrize("mode", list(MODES))
def test_same_values(given, mode):
    expected = attend(*given)
    with torch.no_grad():
        assert MODES[mode](attend, *given).equal(expected)


@pytest.mark.parametrize("mode", ["vmap", "functionalize", "dual level", "TorchFunctionMode", "jit.trace", "make_fx"])
def test_same_values_written(given, mode):
    assert MODES[mode](written, *given).equal(attend(*given))


@pytest.mark.parametrize(
    ("out", "error", "message"),
    [
        (torch.empty(2, 20, 4, 16).bfloat16(), ShapeError, r"out \(2, 20, 4, 16\): \(2, 20, 4, 32\) is needed"),
        (torch.empty(2, 20, 4, 32), DTypeError, "out is float32: bfloat16 is needed"),
    ],
)
def test_what_a_transform_writes_keeps_the_rules(given, out, error, message):
    with pytest.raises(error, match=message):
        torch.func.functionalize(lambda *qkv: flash_attn_func(*qkv, causal=True, out=out))(*given)


@pytest.mark.parametrize("mode", ["older vmap", "older functionalization"])
def test_what_is_not_written(given, mode):
    """torch's own error, which names the operator."""
    with pytest.raises(RuntimeError, match="cute_fa::attention_out"):
        MODES[mode](written, *given)


def test_fake_tensors(given):
    with FakeTensorMode() as mode:
        out = attend(*map(mode.from_tensor, given))
    assert isinstance(out, FakeTensor) and out.shape == given[0].shape


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_nested_tensors(given, layout):
    q, k, v = given
    nested = torch.nested.as_nested_tensor([q[0], q[1, :7]], layout=layout)
    with pytest.raises(ArgumentError, match="q is a nested tensor: flash_attn_varlen_func"):
        attend(nested, k, v)


def test_function_modes_see_every_call(given):
    """Whatever a mode does with the operator it does with the first call and with those that have a plan."""

    class Negative(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            return (-result[0], result[1]) if function is torch.ops.cute_fa.attention.default else result

    expected = attend(*given)
    with Negative():
        assert attend(*given).equal(-expected)
        with torch.device("cpu"):
            assert attend(*given).equal(-expected)
    assert attend(*given).equal(expected)


def test_a_profile_has_every_call(given):
    with torch.profiler.profile() as profile:
        for _ in range(3):
            attend(*given)
    assert {event.key: event.count for event in profile.key_averages()}["cute_fa::attention"] == 3


def test_a_default_device_costs_no_dispatch(given, monkeypatch):
    monkeypatch.setattr(engine, "_attention_op", None)
    with torch.device("cpu"):
        attend(*given)


# ---- the backward ---------------------------------------------------------------------------------------------------


@pytest.fixture
def forward():
    """Leaves, out and lse of a call whose backward has a plan, and two gradients of each result."""
    inputs = make_inputs(FULL, "peaked").requiring_gradients()
    leaves = list(inputs.variables().values())
    with cute_fa.simulate("sm_80"):
        out, lse = inputs.run(return_lse=True)
        given = [output_gradients(inputs, seed) for seed in (1, 2)]
        douts, dlses = map(torch.stack, zip(*given, strict=True))
        torch.autograd.grad((out, lse), leaves, (douts[0], dlses[0]), retain_graph=True)
        torch.autograd.grad(out, leaves, douts[0], retain_graph=True)
        yield leaves, out, lse, douts, dlses


def one_by_one(results, leaves, *gradients):
    """What batched gradients are: those of every element of the batch."""
    each = [torch.autograd.grad(results, leaves, grads, retain_graph=True) for grads in zip(*gradients, strict=True)]
    return [torch.stack(grads) for grads in zip(*each, strict=True)]


def test_batched_gradients(forward):
    leaves, out, lse, douts, dlses = forward
    for results, batches in (((out,), (douts,)), ((lse,), (dlses,)), ((out, lse), (douts, dlses))):
        batched = torch.autograd.grad(results, leaves, batches, is_grads_batched=True, retain_graph=True)
        torch.testing.assert_close(list(batched), one_by_one(results, leaves, *batches), atol=0, rtol=0)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_batches_of_batches(forward):
    leaves, out, _, douts, _ = forward

    def gradient(dout):
        return torch.autograd.grad(out, leaves[0], dout, retain_graph=True)[0]

    (expected,) = one_by_one((out,), leaves[:1], douts)
    for vmap in (torch.vmap, _vmap_internals._vmap):
        assert vmap(vmap(gradient))(douts[None]).equal(expected[None])


def test_batched_gradients_of_a_graph_that_is_kept(forward):
    leaves, out, _, douts, _ = forward
    (batched,) = torch.autograd.grad(out, leaves[0], douts, is_grads_batched=True, create_graph=True)
    assert batched.equal(one_by_one((out,), leaves[:1], douts)[0])
    with pytest.raises(NoBackwardError, match="differentiated twice"):
        batched.float().sum().backward()


def test_batched_gradients_of_recomputed_results(given):
    q, k, v = given
    q = q.clone().requires_grad_()
    douts = torch.stack([q.detach(), -2 * q.detach()])
    expected = one_by_one((attend(q, k, v),), (q,), douts)[0]
    out = checkpoint(attend, q, k, v, use_reentrant=False)
    assert torch.autograd.grad(out, q, douts, is_grads_batched=True)[0].equal(expected)


def test_jacobian(given):
    """All rows at once, beside torch's own attention."""
    q, k, v = given[0][:1, :1, :2].contiguous(), *(t[:1, :2, :1] for t in given[1:])

    def jacobian(f, **options):
        return torch.autograd.functional.jacobian(lambda q: f(q)[..., ::8], q, vectorize=True, **options).float()

    def own(q):
        heads_first = (t.float().transpose(1, 2) for t in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(*heads_first, enable_gqa=True).transpose(1, 2)

    expected = jacobian(own)
    assert expected.abs().max() > 0.05
    torch.testing.assert_close(jacobian(lambda q: attend(q, k, v)), expected, atol=0.002, rtol=0.02)
    with pytest.raises(NoBackwardError, match="forward-mode"):
        jacobian(lambda q: attend(q, k, v), strategy="forward-mode")


CONTEXTS = {
    "saved on the CPU": graph.save_on_cpu,
    "hooks forbidden": lambda: graph.disable_saved_tensors_hooks("none here"),
    "anomalies looked for": lambda: torch.autograd.detect_anomaly(check_nan=True),
    "profiler": torch.profiler.profile,
    "TorchFunctionMode": BaseTorchFunctionMode,
}


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("name", list(CONTEXTS))
def test_same_gradients(given, name):
    leaves = [t.clone().requires_grad_() for t in given]
    dout = given[0].clone()
    expected = torch.autograd.grad(attend(*leaves), leaves, dout)
    for inside_backward in (False, True):
        with contextlib.ExitStack() as stack:
            stack.enter_context(CONTEXTS[name]())
            out = attend(*leaves)
            if not inside_backward:
                stack.close()
            grads = torch.autograd.grad(out, leaves, dout)
        torch.testing.assert_close(grads, expected, atol=0, rtol=0)


def test_a_profile_has_the_backward(forward):
    leaves, out, _, douts, _ = forward
    with torch.profiler.profile() as profile:
        torch.autograd.grad(out, leaves, douts[0], retain_graph=True)
    assert "cute_fa::attention_backward" in {event.key for event in profile.key_averages()}


def test_what_hooks_unpack_is_checked(given):
    """Hooks that keep another dtype and do not restore it."""
    q, k, v = given
    q = q.clone().requires_grad_()
    with graph.saved_tensors_hooks(torch.Tensor.float, lambda t: t):
        out = attend(q, k, v)
    with pytest.raises(DTypeError, match="q is float32"):
        out.sum().backward()


def test_a_gradient_of_zeros_without_memory(forward):
    leaves, out, _, _, _ = forward
    zeros = torch._efficientzerotensor(out.shape, dtype=out.dtype)
    assert not any(grad.any() for grad in torch.autograd.grad(out, leaves, zeros, retain_graph=True))
