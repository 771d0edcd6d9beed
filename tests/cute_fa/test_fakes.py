"""Shapes without data: every public function on meta tensors, under FakeTensorMode and traced with fakes gives what it
gives in eager mode, and so do gradients."""

import types

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import cute_fa
from cute_fa.engine import append
from cute_fa.engine import plan as plans
from tests.testing.calls import calls

CALLS = calls()
DIFFERENTIABLE = [name for name, call in CALLS.items() if call.differentiable]


def described(result):
    """Shape, strides and dtype of each tensor."""
    results = result if isinstance(result, tuple) else (result,)
    return [None if t is None else (tuple(t.shape), t.stride(), t.dtype) for t in results]


@pytest.fixture
def eager(monkeypatch):
    """What a call gives in eager mode, but for the numbers: nothing is compiled."""
    nothing = types.SimpleNamespace(launch=lambda arguments: None)
    monkeypatch.setattr(plans, "compiled", lambda config: nothing)
    monkeypatch.setattr(plans, "PLANS", {})
    monkeypatch.setattr(append, "_outputs", lambda call: ((call.k if call.q is None else call.q), call.cache_seqlens))

    def run(call, **changes):
        with cute_fa.simulate("sm_80"):
            return described(call(**changes))

    return run


def on_meta(call, **changes):
    return call(**{name: tensor.to("meta") for name, tensor in call.tensors.items()} | changes)


def under_fake_mode(call, **changes):
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        return call(**{name: mode.from_tensor(tensor) for name, tensor in call.tensors.items()} | changes)


def traced(call, mode="fake", **changes):
    """The graph's output, as the tracer saw it."""
    graph = make_fx(lambda tensors: call(**tensors | changes), tracing_mode=mode)(call.tensors)
    operators = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert any("cute_fa" in str(operator) for operator in operators) or call.function is cute_fa.merge_states
    (output,) = (node for node in graph.graph.nodes if node.op == "output")
    results = output.args[0] if isinstance(output.args[0], (tuple, list)) else (output.args[0],)
    return tuple(None if node is None else node.meta["val"] for node in results)


@pytest.mark.parametrize("ways", [on_meta, under_fake_mode, traced], ids=lambda way: way.__name__)
@pytest.mark.parametrize("name", list(CALLS))
def test_shapes_are_those_of_eager_mode(eager, name, ways):
    call = CALLS[name]
    expected = eager(call)
    assert described(ways(call)) == expected
    if "cache_seqlens" in call.arguments and "kvcache" in name:  # one length for all sequences
        assert described(ways(call, cache_seqlens=20)) == expected


def test_lengths_may_be_symbols_of_a_trace():
    call = CALLS["kvcache, block_table, append"]
    out, lse = traced(call, "symbolic")
    assert (out.shape, lse.shape) == ((2, 3, 4, 32), (2, 4, 3))


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients_have_the_shapes_of_their_tensors(name):
    call = CALLS[name]
    wanted = [call.arguments[name] for name in call.differentiable]
    expected = [(tuple(t.shape), t.dtype) for t in wanted]

    def gradients(tensors):
        inputs = [tensors[name].detach().requires_grad_() for name in call.differentiable]
        result = call(**tensors | dict(zip(call.differentiable, inputs, strict=True)))
        results = result if isinstance(result, tuple) else (result,)
        total = sum(t.float().sum() for t in results if t is not None and t.requires_grad)
        return torch.autograd.grad(total, inputs)

    shapes = lambda grads: [(tuple(t.shape), t.dtype) for t in grads]  # noqa: E731
    assert shapes(gradients({name: tensor.to("meta") for name, tensor in call.tensors.items()})) == expected
    with FakeTensorMode() as mode:
        fakes = {name: mode.from_tensor(tensor) for name, tensor in call.tensors.items()}
        assert shapes(gradients(fakes)) == expected
    graph = make_fx(gradients, tracing_mode="fake")(call.tensors)
    (output,) = (node for node in graph.graph.nodes if node.op == "output")
    assert shapes([node.meta["val"] for node in output.args[0]]) == expected


def test_nothing_is_written_without_data():
    """A trace of an append leaves the caches that it is traced with alone."""
    call = CALLS["kvcache, block_table, append"]
    before = call.arguments["k_cache"].clone()
    traced(call)
    assert call.arguments["k_cache"].equal(before)
