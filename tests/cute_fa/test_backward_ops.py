"""The backward through torch: gradients of the public functions, tracing, checkpointing, autocast, what is refused."""

import dataclasses
import functools
import math
import shutil
import types

import pytest
import torch
from torch import library
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import cute_fa
from cute_fa import compat, flash_attn_func, flash_attn_varlen_func
from cute_fa.api.requests import CumulativeSeqlens, Fa2BwdRequest
from cute_fa.engine import autograd, worlds
from cute_fa.engine import plan as plans
from cute_fa.semantics import reference
from cute_fa.semantics.call import FIELDS, Call
from cute_fa.semantics.errors import (
    AlignmentError,
    ArgumentError,
    CumulativeSeqlensError,
    DeviceError,
    DTypeError,
    Fp8Error,
    NoBackwardError,
    ShapeError,
    StrideError,
    UnsupportedKeyError,
)
from cute_fa.semantics.names import canonical_name
from cute_fa.semantics.reference import Gradients
from cute_fa.semantics.types import Direction, MaskKind, PositionBias, SmArch
from cute_fa.tools.inputs import Inputs, InputSpec, make_inputs, output_gradients
from tests.testing.cases import spec_name
from tests.testing.gradients import call_of
from tests.testing.simulated import unwritten_is_nan

DENSE = InputSpec(batch=2, seqlen_q=20, seqlen_k=36, heads=4, heads_kv=2, head_dim=32, causal=True)
PACKED = dataclasses.replace(DENSE, batch=3, varlen_q=True, varlen_k=True)
FULL = dataclasses.replace(DENSE, alibi=True, learnable_sink=True)


@pytest.fixture
def simulated():
    plans.PLANS.clear()
    with cute_fa.simulate("sm_80") as simulation:
        yield simulation
    plans.PLANS.clear()  # a test may have put something else in the place of their kernels


def variables(inputs: Inputs) -> tuple[Inputs, list[torch.Tensor]]:
    """The inputs asking for gradients, and what asks for one."""
    inputs = inputs.requiring_gradients()
    return inputs, list(inputs.variables().values())


def check(inputs: Inputs, grads, dout, dlse=None) -> None:
    """Compare gradients, those of slopes and sink only where there are any."""
    named = Gradients.of(inputs.variables(), [grad for grad in grads if grad is not None])
    given = (inputs.q.detach(), inputs.k.detach(), inputs.v.detach(), dout, dlse)
    options = {name: t.detach() if isinstance(t, torch.Tensor) else t for name, t in inputs.options().items()}
    errors = reference.check_gradients(named, *given, **options)
    assert len(errors) == len(inputs.variables())
    assert all(error.ok for error in errors.values()), errors


def without_a_kernel(config):
    """In the place of ``compiled``, for tests of what a kernel is asked."""
    return types.SimpleNamespace(launch=lambda arguments: None)


def last_problem():
    return list(plans.PLANS.values())[-1].problem


def backward_call(inputs: Inputs, **changes) -> tuple:
    """Arguments of the operator: dout and dlse, results of the reference in the forward's place, the call."""
    out, lse = reference.attention(inputs.q, inputs.k, inputs.v, **inputs.options())
    given = {"out": out.to(inputs.q.dtype), "lse": lse, **changes}
    dout, dlse = output_gradients(inputs, seed=1)
    return given.get("dout", dout), given.get("dlse", dlse), given["out"], given["lse"], *call_of(inputs).flat()


def test_schema_and_call_agree():
    names = [argument.name for argument in torch.ops.cute_fa.attention_backward.default._schema.arguments]
    assert names == ["dout", "dlse", "out", "lse", *FIELDS, "slopes_gradient"]


@pytest.mark.sampled
@pytest.mark.parametrize("spec", [FULL, PACKED], ids=["full", "packed"])
def test_opcheck(simulated, spec):
    inputs, _ = variables(make_inputs(spec, poison=False))
    dout, dlse, out, lse, *call = backward_call(inputs)
    library.opcheck(torch.ops.cute_fa.attention.default, tuple(call))
    call = [t.detach() if isinstance(t, torch.Tensor) else t for t in call]
    forward = (dout, dlse, out.detach(), lse.detach())
    library.opcheck(torch.ops.cute_fa.attention_backward.default, (*forward, *call, spec.alibi))


@pytest.mark.parametrize(
    "spec", [FULL, dataclasses.replace(DENSE, seqlen_q=36, seqlen_k=20, layout="padded")], ids=["full", "hidden"]
)
def test_gradients(simulated, spec):
    inputs, leaves = variables(make_inputs(spec, "peaked", seed=1))
    dout, dlse = output_gradients(inputs, seed=2)
    out, lse = inputs.run(return_lse=True)
    dlse = dlse.masked_fill(lse.isneginf(), math.nan)  # the gradient of logaddexp, where no part has keys
    check(inputs, torch.autograd.grad((out, lse), leaves, (dout, dlse)), dout, dlse)


def test_which_gradients_the_kernel_is_asked_for(simulated, monkeypatch):
    inputs, leaves = variables(make_inputs(FULL))
    dout, dlse = output_gradients(inputs)
    out, lse = inputs.run(return_lse=True)

    def asked(outputs, wanted, given):
        plans.PLANS.clear()
        grads = torch.autograd.grad(outputs, wanted, given, retain_graph=True)
        return grads, (last_problem().lse_gradient, last_problem().slopes_gradient)

    grads, flags = asked(out, leaves, dout)
    assert flags == (False, True)
    check(inputs, grads, dout)
    grads, flags = asked(lse, leaves, dlse)
    assert flags == (True, True)
    check(inputs, grads, torch.zeros_like(dout), dlse)

    monkeypatch.setattr(plans, "compiled", without_a_kernel)
    inputs = dataclasses.replace(inputs, alibi_slopes=inputs.alibi_slopes.detach())
    out, lse = inputs.run(return_lse=True)
    q, k, v, _, sink = leaves
    assert asked(out, (q, k, v, sink), dout)[1] == (False, False)
    assert last_problem().direction is Direction.BACKWARD
    assert not last_problem().deterministic


def test_deterministic_is_the_callers_and_torchs(simulated, monkeypatch):
    monkeypatch.setattr(plans, "compiled", without_a_kernel)
    _, (q, k, v) = variables(make_inputs(DENSE))

    def asked(out):
        plans.PLANS.clear()
        out.float().sum().backward()
        return last_problem().deterministic

    lengths = (None, None, None, None)
    assert not asked(flash_attn_func(q, k, v))
    assert asked(flash_attn_func(q, k, v, deterministic=True))
    assert asked(flash_attn_varlen_func(q, k, v, *lengths, deterministic=True))
    assert asked(compat.fa2.flash_attn_func(q, k, v, deterministic=True))
    assert asked(compat.fa3.flash_attn_func(q, k, v, deterministic=True))
    assert asked(compat.fa4.flash_attn_func(q, k, v, deterministic=True)[0])
    torch.use_deterministic_algorithms(True)
    try:
        assert asked(flash_attn_func(q, k, v))
    finally:
        torch.use_deterministic_algorithms(False)


def test_splits_are_the_forwards(simulated, monkeypatch):
    monkeypatch.setattr(plans, "compiled", without_a_kernel)
    inputs, _ = variables(make_inputs(DENSE))
    flash_attn_func(inputs.q, inputs.k, inputs.v, num_splits=2).sum().backward()
    assert [plan.problem.num_splits for plan in plans.PLANS.values()] == [2, 1]


def test_deterministic_gradients_are_bit_identical():
    """In two orders of the warps, with more CTAs than SMs."""
    inputs, leaves = variables(make_inputs(dataclasses.replace(FULL, seqlen_q=70, seqlen_k=150)))
    dout, dlse = output_gradients(inputs)

    def gradients(**simulation):
        with cute_fa.simulate("sm_80", num_sms=2, **simulation):
            results = inputs.run(deterministic=True, return_lse=True)
            return torch.autograd.grad(results, leaves, (dout, dlse))

    first = gradients(schedule_seed=1)
    check(inputs, first, dout, dlse)
    assert all(map(torch.equal, first, gradients(schedule_seed=2, late=True)))


def test_choices_of_the_forward_are_not_the_backwards():
    inputs, leaves = variables(make_inputs(DENSE))
    dout, _ = output_gradients(inputs)
    with cute_fa.simulate("sm_90a"):
        check(inputs, torch.autograd.grad(inputs.run(pack_gqa=True, persistent="on"), leaves, dout), dout)
    assert (last_problem().arch.value, last_problem().pack_gqa) == ("sm_90a", None)
    inputs, leaves = variables(make_inputs(dataclasses.replace(DENSE, seqlen_q=1)))
    with cute_fa.simulate("sm_100a"):
        with pytest.raises(UnsupportedKeyError, match="fa4_bwd: no fa4_sm100 backward exists yet"):
            inputs.run(family="fa4")
        with torch.no_grad():
            inputs.run(family="fa4")


@pytest.mark.parametrize("peer", [compat.fa2, compat.fa3, compat.fa4])
def test_peers_signatures_give_gradients(simulated, peer):
    inputs, leaves = variables(make_inputs(DENSE))
    dout, _ = output_gradients(inputs)
    result = peer.flash_attn_func(inputs.q, inputs.k, inputs.v, causal=True)
    out = result[0] if isinstance(result, tuple) else result
    check(inputs, torch.autograd.grad(out, leaves, dout), dout)


def test_half_precision_sink(simulated):
    inputs, _ = variables(make_inputs(FULL))
    sink = inputs.learnable_sink.detach().bfloat16().requires_grad_()
    dataclasses.replace(inputs, learnable_sink=sink).run().float().square().sum().backward()
    assert sink.grad.dtype is torch.bfloat16 and sink.grad.ne(0).all()


def test_little_is_saved(simulated):
    """q, k, v, out, lse and the vectors of the call: not one tensor of seqlen_q × seqlen_k."""
    inputs, _ = variables(make_inputs(dataclasses.replace(FULL, varlen_q=True, varlen_k=True, batch=3)))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out, lse = inputs.run(return_lse=True)
    small = (inputs.cu_seqlens_q, inputs.cu_seqlens_k, inputs.alibi_slopes, inputs.learnable_sink)
    expected = [inputs.q, inputs.k, inputs.v, *small, out, lse]
    assert [t.data_ptr() for t in saved] == [t.data_ptr() for t in expected]


def test_compile(simulated):
    """One graph for forward and backward, and one for all lengths."""

    def loss(q, k, v, slopes, sink, dout):
        out = flash_attn_func(q * 1.0, k, v, causal=True, alibi_slopes=slopes, learnable_sink=sink)
        return (out * dout).sum()

    torch._dynamo.reset()
    counter, counts = CompileCounterWithBackend("aot_eager"), []
    traced = torch.compile(loss, fullgraph=True, backend=counter, dynamic=True)
    for seqlen_q, seqlen_k in ((20, 36), (12, 44), (24, 28)):
        inputs, leaves = variables(make_inputs(dataclasses.replace(FULL, seqlen_q=seqlen_q, seqlen_k=seqlen_k)))
        dout, _ = output_gradients(inputs)
        compiled = torch.autograd.grad(traced(*leaves, dout), leaves)
        torch.testing.assert_close(compiled, torch.autograd.grad(loss(*leaves, dout), leaves), atol=0, rtol=0)
        check(inputs, compiled, dout)
        counts.append(counter.frame_count)
    assert counts[0] > 0 and counts == [counts[0]] * 3


def test_compile_with_inductor(simulated):
    """The operators alone, so that the C++ compiler stays out."""
    inputs, leaves = variables(make_inputs(FULL))
    dout, dlse = output_gradients(inputs)
    torch._dynamo.reset()
    out, lse = torch.compile(lambda: inputs.run(return_lse=True), fullgraph=True)()
    check(inputs, torch.autograd.grad((out, lse), leaves, (dout, dlse)), dout, dlse)


def test_compile_packed(simulated):
    def model(q, k, v, cu_q, cu_k, longest):
        out, lse = flash_attn_varlen_func(q, k, v, cu_q, cu_k, longest, 36, causal=True, return_lse=True)
        return out + 0.0, lse * 1.0

    torch._dynamo.reset()
    traced = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for seed, longest in ((0, 20), (1, 28)):
        inputs, leaves = variables(make_inputs(dataclasses.replace(PACKED, seqlen_q=longest), seed=seed))
        dout, dlse = output_gradients(inputs, poison=False)
        results = traced(*leaves, inputs.cu_seqlens_q, inputs.cu_seqlens_k, longest)
        # −inf times 1 has no gradient that means anything
        dlse = dlse.masked_fill(results[1].isneginf(), 0.0)
        check(inputs, torch.autograd.grad(results, leaves, (dout, dlse)), dout, dlse)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(simulated, reentrant):
    inputs, leaves = variables(make_inputs(DENSE))
    dout, _ = output_gradients(inputs)

    def block(q, k, v):
        return flash_attn_func(q, k, v, causal=True)

    plain = torch.autograd.grad(block(*leaves), leaves, dout)
    assert not [t.grad for t in leaves if t.grad is not None]
    checkpoint(block, *leaves, use_reentrant=reentrant).backward(dout)
    torch.testing.assert_close([t.grad for t in leaves], list(plain), atol=0, rtol=0)


def test_selective_checkpointing_keeps_the_result(simulated):
    """A policy that saves the operator's results: they are not computed again."""
    inputs, leaves = variables(make_inputs(DENSE))
    dout, _ = output_gradients(inputs)
    contexts = functools.partial(create_selective_checkpoint_contexts, [torch.ops.cute_fa.attention.default])

    def launches(context_fn):
        before = len(simulated.launches)
        out = checkpoint(lambda q: flash_attn_func(q, *leaves[1:], causal=True), leaves[0], **context_fn)
        check(inputs, torch.autograd.grad(out, leaves, dout), dout)
        return len(simulated.launches) - before

    recomputed = launches({"use_reentrant": False})
    assert launches({"use_reentrant": False, "context_fn": contexts}) == recomputed - 1


def test_autocast(simulated):
    """fp32 inputs are cast as torch's own attention does, slopes and sink are not; gradients are fp32."""
    inputs, _ = variables(make_inputs(FULL))
    wide = dataclasses.replace(inputs, **{n: getattr(inputs, n).detach().float().requires_grad_() for n in "qkv"})
    with pytest.raises(DTypeError, match="q is float32"):
        wide.run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, lse = wide.run(return_lse=True)
        written = torch.empty_like(out)
        with torch.no_grad():
            wide.run(out=written)
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    assert written.equal(out)
    dout, _ = output_gradients(inputs)
    grads = torch.autograd.grad(out, list(wide.variables().values()), dout)
    assert {grad.dtype for grad in grads} == {torch.float32}
    check(inputs, grads, dout)
    with FakeTensorMode(), torch.autocast("cpu", dtype=torch.float16):
        for dtype in (torch.float32, torch.bfloat16):
            q = torch.empty(1, 16, 1, 64, dtype=dtype)
            assert flash_attn_func(q, q, q).dtype is torch.float16


def test_autocast_in_compiled_code(simulated):
    inputs, _ = variables(make_inputs(DENSE))
    q, k, v = (getattr(inputs, name).detach().float().requires_grad_() for name in "qkv")

    def step(q, k, v):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return flash_attn_func(q, k, v, causal=True).float().square().sum()

    torch._dynamo.reset()
    traced = torch.compile(step, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(step(q, k, v), (q, k, v))
    torch.testing.assert_close(torch.autograd.grad(traced(q, k, v), (q, k, v)), expected, atol=0, rtol=0)


def test_no_second_derivative(simulated):
    inputs, leaves = variables(make_inputs(DENSE))
    (dq,) = torch.autograd.grad(inputs.run().float().square().sum(), leaves[0], create_graph=True)
    assert dq.requires_grad
    with pytest.raises(NoBackwardError, match="differentiated twice"):
        dq.float().sum().backward()


def test_mapped_calls_have_gradients(simulated):
    inputs, leaves = variables(make_inputs(DENSE))
    dout, _ = output_gradients(inputs)
    q, k, v = leaves
    out = torch.vmap(lambda q: flash_attn_func(q, k, v, causal=True))(torch.stack([q, q]))
    check(inputs, [grad / 2 for grad in torch.autograd.grad(out, leaves, torch.stack([dout, dout]))], dout)


def test_what_no_kernel_differentiates(simulated):
    fp8 = torch.zeros(1, 16, 1, 64).to(torch.float8_e4m3fn)
    out, lse = torch.zeros(1, 16, 1, 64, dtype=torch.bfloat16), torch.zeros(1, 1, 16)
    call = Call.made(fp8, fp8, fp8)
    with pytest.raises(Fp8Error, match="e4m3 input on sm_80: no kernel serves it in 8 bits"):
        autograd.attention_backward(out, None, out, lse, call)
    paged = backward_call(make_inputs(InputSpec(page_size=16)))
    with pytest.raises(UnsupportedKeyError, match="page_size"):
        torch.ops.cute_fa.attention_backward(*paged, False)


def test_no_value_is_read(simulated, monkeypatch):
    def refuse(*_):
        raise AssertionError("a value of a tensor was read")

    inputs, leaves = variables(make_inputs(PACKED))
    dout, dlse = output_gradients(inputs)
    monkeypatch.setattr(worlds, "checks_values", lambda: False)
    with monkeypatch.context() as patch:
        for method in ("item", "tolist", "cpu", "numpy", "__int__", "__bool__", "__index__", "__float__"):
            patch.setattr(torch.Tensor, method, refuse)
        grads = torch.autograd.grad(inputs.run(return_lse=True), leaves, (dout, dlse), retain_graph=True)
        patch.setattr(worlds, "checks_values", lambda: True)
        with pytest.raises(AssertionError, match="was read"):
            torch.autograd.grad(inputs.run(return_lse=True), leaves, (dout, dlse))
    check(inputs, grads, dout, dlse)


def test_one_plan_for_equal_calls(simulated, monkeypatch):
    inputs, _ = variables(make_inputs(DENSE))
    for _ in range(3):
        inputs.run().sum().backward()
    assert len(plans.PLANS) == 2  # of the forward, and of the backward
    monkeypatch.setattr(plans, "_MAX_PLANS", 2)
    for scale in (0.1, 0.2, 0.3):
        flash_attn_func(inputs.q, inputs.k[:, :0], inputs.v[:, :0], softmax_scale=scale).sum().backward()
    assert len(plans.PLANS) <= 2


def expanded(dout):
    return dout[..., :1].expand_as(dout)


def misaligned(dout):
    return torch.empty(dout.numel() + 1, dtype=dout.dtype)[1:].view(dout.shape).copy_(dout)


def odd_rows(dout):
    return torch.empty(*dout.shape[:-1], dout.shape[-1] + 1, dtype=dout.dtype)[..., :-1].copy_(dout)


def heads_first(dout):
    return dout.transpose(1, 2).contiguous().transpose(1, 2)


@pytest.mark.parametrize("layout", [expanded, misaligned, odd_rows, heads_first])
def test_layouts_of_the_incoming_gradient(simulated, layout):
    inputs, leaves = variables(make_inputs(DENSE))
    dout = layout(output_gradients(inputs)[0])
    check(inputs, torch.autograd.grad(inputs.run(), leaves, dout), dout)


def test_expanded_inputs_get_the_sum(simulated):
    """k and v with stride 0 over the heads: the gradient of the one head is the sum."""
    inputs, _ = variables(make_inputs(DENSE))
    q, k, v = inputs.q, *(getattr(inputs, name)[:, :, :1].detach().clone().requires_grad_() for name in "kv")
    dout, _ = output_gradients(inputs)
    out = flash_attn_func(q, k.expand(-1, -1, 2, -1), v.expand(-1, -1, 2, -1), causal=True)
    one_head = dataclasses.replace(inputs, k=k, v=v)
    check(one_head, torch.autograd.grad(out, (q, k, v), dout), dout)


@pytest.mark.parametrize("spec", [FULL, PACKED, dataclasses.replace(FULL, seqused_q=True)], ids=spec_name)
def test_no_keys_at_all(simulated, spec):
    inputs, _ = variables(make_inputs(dataclasses.replace(spec, alibi=True, learnable_sink=True, seqlen_k=0)))
    leaves = [inputs.q, inputs.k, inputs.v, inputs.alibi_slopes, inputs.learnable_sink]
    dout, dlse = output_gradients(inputs)
    lengths = (inputs.cu_seqlens_q, inputs.cu_seqlens_k, spec.seqlen_q, None)
    small = {name: getattr(inputs, name) for name in ("seqused_q", "alibi_slopes", "learnable_sink")}
    out, lse = flash_attn_varlen_func(*leaves[:3], *lengths, **small, return_lse=True)
    dq, dk, dv, dalibi, dsink = torch.autograd.grad((out, lse), leaves, (dout, dlse), retain_graph=True)
    assert not (dq.any() or dk.any() or dv.any() or dalibi.any())
    counted = dlse.nan_to_num().transpose(0, -2).reshape(4, -1).sum(-1)
    torch.testing.assert_close(dsink, counted)
    assert not torch.autograd.grad(out, leaves, dout)[-1].any()


def test_rows_after_the_last_sequence(simulated):
    """They hold anything and have gradients of 0."""
    inputs = make_inputs(PACKED)
    plain = {name: getattr(inputs, name) for name in "qkv"}
    inputs = dataclasses.replace(
        inputs, **{n: torch.cat([t, torch.full_like(t[:9], math.nan)]) for n, t in plain.items()}
    )
    dout, dlse, out, lse, *call = backward_call(inputs)
    out[-9:] = math.nan
    with unwritten_is_nan():
        grads = torch.ops.cute_fa.attention_backward(dout, dlse, out, lse, *call, False)[:3]
    assert not any(grad[-9:].any() for grad in grads)
    check(inputs, grads, dout, dlse)


def test_no_queries_at_all(simulated):
    inputs, leaves = variables(make_inputs(dataclasses.replace(FULL, seqlen_q=0)))
    grads = torch.autograd.grad(inputs.run(), leaves, torch.empty(2, 0, 4, 32, dtype=torch.bfloat16))
    assert [grad.shape for grad in grads] == [t.shape for t in leaves]
    assert not any(grad.any() for grad in grads)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"dout": torch.zeros(2, 20, 4, 16).bfloat16()}, ShapeError, r"dout \(2, 20, 4, 16\): \(2, 20, 4, 32\)"),
        ({"dout": torch.zeros(2, 20, 4, 32)}, DTypeError, "dout is float32: bfloat16 is needed"),
        ({"dlse": torch.zeros(2, 20, 4)}, ShapeError, r"dlse \(2, 20, 4\): \(2, 4, 20\) is needed"),
        ({"dlse": torch.zeros(2, 4, 20).bfloat16()}, DTypeError, "dlse is bfloat16: float32 is needed"),
        ({"lse": torch.zeros(2, 20, 4)}, ShapeError, r"lse \(2, 20, 4\): \(2, 4, 20\) is needed"),
        ({"out": torch.zeros(2, 20, 4, 32)}, DTypeError, "out is float32: bfloat16 is needed"),
        ({"out": torch.zeros(2, 20, 4, 33).bfloat16()[..., :32]}, StrideError, "out has strides"),
        ({"out": torch.zeros(5121).bfloat16()[1:].view(2, 20, 4, 32)}, AlignmentError, "out starts at"),
        ({"dlse": torch.zeros(2, 4, 20, device="meta")}, DeviceError, "dlse is on meta"),
    ],
)
def test_wrong_tensors(simulated, changes, error, message):
    with pytest.raises(error, match=message):
        torch.ops.cute_fa.attention_backward(*backward_call(make_inputs(DENSE), **changes), False)
    assert not simulated.launches


def test_a_slopes_gradient_needs_slopes(simulated):
    with pytest.raises(ArgumentError, match="slopes_gradient without alibi"):
        torch.ops.cute_fa.attention_backward(*backward_call(make_inputs(DENSE)), True)


@pytest.mark.gpu
def test_cuda_graph():
    """Forward and backward captured once and replayed with other values."""
    inputs, leaves = variables(make_inputs(FULL, device="cuda"))
    dout, _ = output_gradients(inputs)

    def step():
        return torch.autograd.grad(inputs.run(), leaves, dout)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        grads = step()
    other, _ = variables(make_inputs(FULL, seed=5, device="cuda"))
    with torch.no_grad():
        for name in ("q", "k", "v", "alibi_slopes", "learnable_sink"):
            getattr(inputs, name).copy_(getattr(other, name))
    graph.replay()
    check(inputs, grads, dout)


@pytest.mark.gpu
@pytest.mark.skipif(not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="torch.compile needs a C compiler")
def test_cuda_graphs_of_torch_compile():
    plain, leaves = variables(make_inputs(DENSE, device="cuda"))
    dout, _ = output_gradients(plain)
    q, k, v = leaves
    traced = torch.compile(
        lambda q, k, v: flash_attn_func(q, k, v, causal=True), fullgraph=True, mode="reduce-overhead"
    )
    for _ in range(3):
        torch.compiler.cudagraph_mark_step_begin()
        grads = torch.autograd.grad(traced(q, k, v), (q, k, v), dout)
    check(plain, grads, dout)


class TestRequest:
    def given(self, spec):
        """q, k, v, out, lse, dout of a forward, and the request's options."""
        inputs = make_inputs(spec, seed=3)
        dout, dlse = output_gradients(inputs)
        out, lse = inputs.run(return_lse=True)
        return inputs, dlse, (inputs.q, inputs.k, inputs.v, out, lse, dout)

    def test_dense(self, simulated):
        inputs, dlse, tensors = self.given(FULL)
        mask = {"mask": MaskKind.CAUSAL, "position_bias": PositionBias.ALIBI, "alibi_slopes": inputs.alibi_slopes}
        options = {**mask, "learnable_sink": inputs.learnable_sink, "dlse": dlse, "slopes_gradient": True}
        request = Fa2BwdRequest(*tensors, **options)
        assert request.problem().lse_gradient and request.problem().slopes_gradient
        assert canonical_name(request.kernel(), request.problem()) == (
            "fa2_bwd_sm80_bf16_hd32_causal_alibi_lsink_gqa2_dlse_dalibi"
        )
        assert request.dispatch_key().direction is Direction.BACKWARD
        check(inputs, request.run(), tensors[-1], dlse)
        assert Fa2BwdRequest(*tensors, **{**options, "deterministic": True}).problem().deterministic

    def test_packed(self, simulated):
        inputs, dlse, tensors = self.given(PACKED)
        cu = {name: CumulativeSeqlens.from_tensor(getattr(inputs, name)) for name in ("cu_seqlens_q", "cu_seqlens_k")}
        request = Fa2BwdRequest(*tensors, mask=MaskKind.CAUSAL, dlse=dlse, **cu)
        assert request.problem().varlen_q and request.problem().varlen_k
        check(inputs, request.run(), tensors[-1], dlse)
        with pytest.raises(ArgumentError, match="give both or neither"):
            Fa2BwdRequest(*tensors, cu_seqlens_q=cu["cu_seqlens_q"])
        with pytest.raises(CumulativeSeqlensError, match="cu_seqlens_k ends at 10000"):
            Fa2BwdRequest(*tensors, **{**cu, "cu_seqlens_k": CumulativeSeqlens((0, 1, 2, 10000))})

    def test_rules(self, simulated):
        _, dlse, tensors = self.given(DENSE)
        *others, dout = tensors
        with pytest.raises(ShapeError, match=r"dout \(2, 20, 4, 16\)"):
            Fa2BwdRequest(*others, dout[..., :16])
        with pytest.raises(ArgumentError, match="lse is NoneType: a Tensor is needed"):
            Fa2BwdRequest(*others[:4], None, dout)
        with pytest.raises(DTypeError, match="dlse is float16: float32 is needed"):
            Fa2BwdRequest(*tensors, dlse=dlse.half())
        with pytest.raises(ArgumentError, match="slopes_gradient without alibi"):
            Fa2BwdRequest(*tensors, slopes_gradient=True)
        with pytest.raises(ArgumentError, match="arch=sm_90a: the tensors are on cpu, sm_80"):
            Fa2BwdRequest(*tensors, arch=SmArch.SM_90A).run()
