"""The derivative of ``cute_fa::attention``: the operator ``cute_fa::attention_backward`` and the formula that calls it.

Gradients come from whatever kernel of the backward the table names, which need not be of the forward's family. Saved
between the two are q, k, v, out, lse and the small tensors of the call; nothing is read by the host.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import library

from cute_fa.engine import operator as ops
from cute_fa.engine.compiler import compiled
from cute_fa.engine.contract import AttentionTensors, BackwardTensors
from cute_fa.engine.table import TABLE
from cute_fa.engine.worlds import simulated_arch, target_of
from cute_fa.semantics.argument_names import names_of
from cute_fa.semantics.errors import NoBackwardError
from cute_fa.semantics.reference import Gradients
from cute_fa.semantics.tensors import ALIGNMENT, check_devices, check_like, check_pointers, check_values, load_rule
from cute_fa.semantics.types import Direction, PersistentMode

if TYPE_CHECKING:
    from cute_fa.engine.compiler import CompiledKernel
    from cute_fa.engine.contract import AttentionKernel
    from cute_fa.engine.worlds import Target
    from cute_fa.semantics.argument_names import ArgumentNames
    from cute_fa.semantics.problem import AttentionProblem
    from cute_fa.semantics.types import SmArch

ops.LIBRARY.define(
    f"attention_backward(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, {ops.ARGUMENTS}, bool slopes_gradient) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)


@dataclass
class _Plan:
    """What is known of every call with one description. ``names``: what the caller calls the arguments. ``launches``:
    whether there is any query and any key. ``strides``: canonical strides of q, k, v, out, dout where a dimension of
    size 1 has odd ones. ``copies``: whether dout has strides that no kernel can load. ``compiled`` is set by the first
    launch, after all checks."""

    problem: AttentionProblem
    names: ArgumentNames
    kernel: type[AttentionKernel]
    num_sms: int
    launches: bool
    strides: tuple[tuple[int, ...] | None, ...]
    copies: bool
    compiled: CompiledKernel | None = None


_plans: dict[tuple, _Plan] = {}


def problem_of_backward(
    arch: SmArch,
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    call: ops.Call,
    slopes_gradient: bool,
) -> AttentionProblem:
    """The validated problem of a call's backward."""
    problem = ops.problem_of_call(
        arch,
        _forward_choices_left_out(call),
        out,
        direction=Direction.BACKWARD,
        deterministic=call.deterministic,
        lse_gradient=dlse is not None,
        slopes_gradient=slopes_gradient,
    )
    check_like("dout", dout, out.shape, out.dtype)
    check_like("lse", lse, ops.lse_shape(call), torch.float32)
    if dlse is not None:
        check_like("dlse", dlse, lse.shape, torch.float32)
    query = names_of(call.names)["q"]
    check_devices({query: call.q, "dout": dout, "dlse": dlse, "lse": lse}, query)
    return problem


def _attention_backward(dout, dlse, out, lse, *arguments):
    *arguments, slopes_gradient = arguments
    call = ops.Call._make(arguments)
    plan = _plan(dout, dlse, out, lse, call, slopes_gradient)
    if ops.CHECK_VALUES or simulated_arch() is not None:
        check_values(plan.problem, call.q, call.k, *call[3 : ops.NUM_TENSORS], names=plan.names)
    grads = _new_gradients(call, slopes_gradient)
    if not plan.launches:
        _without_keys(grads, dlse, lse)
        return grads
    q, k, v = call[:3]
    check_pointers(plan.names.of({"q": q, "k": k, "v": v, "out": out}))
    *strides, strides_dout = plan.strides
    if any(strides):
        q, k, v, out = map(ops.restrided, (q, k, v, out), strides)
    if plan.copies or dout.data_ptr() % ALIGNMENT:
        dout = dout.clone(memory_format=torch.contiguous_format)
    else:
        dout = ops.restrided(dout, strides_dout)
    forward = AttentionTensors(q, k, v, out, lse.contiguous(), *call[3 : ops.NUM_TENSORS])
    dlse = None if dlse is None else dlse.contiguous()
    tensors = BackwardTensors(forward, dout, dlse, *_named(grads, call, slopes_gradient))
    if plan.compiled is None:
        plan.compiled = compiled(plan.kernel.configure(plan.problem))
    plan.compiled.launch(plan.kernel.arguments(plan.problem, tensors, plan.num_sms))
    return grads


def _plan(dout, dlse, out, lse, call: ops.Call, slopes_gradient: bool) -> _Plan:
    target = target_of(call.q.device)
    described = ops.signatures((dout, dlse, out, lse, *call[: ops.NUM_TENSORS]))
    key = (target, described, call[ops.NUM_TENSORS :], slopes_gradient)
    plan = _plans.get(key)
    if plan is None:
        plan = _make_plan(target, dout, dlse, out, lse, call, slopes_gradient)
        ops.keep(_plans, key, plan)
    return plan


def _make_plan(target: Target, dout, dlse, out, lse, call: ops.Call, slopes_gradient: bool) -> _Plan:
    problem = problem_of_backward(target.arch, dout, dlse, out, lse, call, slopes_gradient)
    return _Plan(
        problem=problem,
        names=names_of(call.names),
        kernel=TABLE.lookup(problem, call.family),
        num_sms=target.num_sms,
        launches=ops.launches(call),
        strides=tuple(ops.odd_strides(t) for t in (call.q, call.k, call.v, out, dout)),
        copies=load_rule(dout) is not None,
    )


def _wanted(call: ops.Call, slopes_gradient: bool) -> tuple[bool, bool]:
    """Whether the slopes and the sink get gradients."""
    return slopes_gradient, call.learnable_sink is not None


def _new_gradients(call: ops.Call, slopes_gradient: bool) -> tuple[torch.Tensor, ...]:
    """dq, dk, dv, dalibi, dsink, contiguous; an operator returns no None: empty ones stand for those not wanted. Packed
    tensors may have rows after the last sequence, where only the device knows: these are 0 beforehand."""
    packed = (call.cu_seqlens_q, call.cu_seqlens_k, call.cu_seqlens_k)
    small = zip((call.alibi_slopes, call.learnable_sink), _wanted(call, slopes_gradient), strict=True)
    return (
        *(t.new_empty(t.shape) if cu is None else t.new_zeros(t.shape) for t, cu in zip(call[:3], packed, strict=True)),
        *(call.q.new_empty(t.shape if wanted else (0,), dtype=torch.float32) for t, wanted in small),
    )


def _named(grads: tuple[torch.Tensor, ...], call: ops.Call, slopes_gradient: bool) -> Gradients:
    """With None for gradients that are not wanted."""
    small = zip(grads[3:], _wanted(call, slopes_gradient), strict=True)
    return Gradients(*grads[:3], *(grad if wanted else None for grad, wanted in small))


def _without_keys(grads: tuple[torch.Tensor, ...], dlse: torch.Tensor | None, lse: torch.Tensor) -> None:
    """The result where no query or no key exists at all. LSE is the sink then, or −inf in rows that do not count."""
    for grad in grads:
        grad.zero_()
    if grads[4].numel() and dlse is not None:
        counting = torch.where(lse.isneginf(), 0.0, dlse)
        grads[4].copy_(counting.sum([dim for dim in range(lse.dim()) if dim != lse.dim() - 2]))


def _fake(dout, dlse, out, lse, *arguments):
    call = ops.Call._make(arguments[:-1])
    ops.check_call_devices(call, dout=dout, dlse=dlse, out=out, lse=lse)
    return _new_gradients(call, arguments[-1])


ops.LIBRARY.impl("attention_backward", _attention_backward, "CompositeExplicitAutograd")
library.register_fake("cute_fa::attention_backward", _fake, lib=ops.LIBRARY)
_attention_backward_op = torch.ops.cute_fa.attention_backward.default


def attention_backward(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    call: ops.Call,
    slopes_gradient: bool = False,
) -> Gradients:
    """The operator ``cute_fa::attention_backward``: gradients of the inputs of ``call``, whose forward gave ``out`` and
    ``lse``, from those of these two; ``dlse`` None is zero."""
    tensors = (dout, dlse, out, lse, *call[: ops.NUM_TENSORS])
    direct = ops.unwatched(tensors) and not call.q.is_meta and ops.have_memory(dout, dlse)
    run = _attention_backward if direct else _attention_backward_op
    return _named(run(*tensors, *call[ops.NUM_TENSORS :], slopes_gradient), call, slopes_gradient)


class _Attention(torch.autograd.Function):
    """``cute_fa::attention``, below autograd for the arguments but the last, the dispatcher's keys."""

    @staticmethod
    def forward(ctx, *arguments):
        *inputs, keys = arguments
        output = _below_autograd(keys, *inputs)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[: ops.NUM_TENSORS], *output)
        ctx.options = inputs[ops.NUM_TENSORS :]
        return output

    @staticmethod
    def backward(ctx, dout, dlse):
        return (*_gradients(ctx, dout, dlse), None)


def _autograd(keys: torch._C.DispatchKeySet, *arguments):
    """What ``library.register_autograd`` makes of the formula, but for a step that takes 0.5 ms of every call with a
    gradient: it fills in defaults, which this operator has none of, in time quadratic in the number of arguments."""
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
        _check_family(ops.Call._make(arguments))
        return _Attention.apply(*arguments, keys)
    return _below_autograd(keys, *arguments)


def _check_family(call: ops.Call) -> None:
    """Raise UnsupportedKeyError where gradients will be asked of a family that has no backward for them."""
    if call.family is None or not ops.has_values(call.q):
        return
    problem = _forward_choices_left_out(call)
    options = {"direction": Direction.BACKWARD, "deterministic": call.deterministic}
    TABLE.lookup(ops.problem_of_call(target_of(call.q.device).arch, problem, **options), call.family)


def _forward_choices_left_out(call: ops.Call) -> ops.Call:
    """The call without what it chose of how the forward is computed, which is not the backward's own."""
    return call._replace(num_splits=1, pack_gqa=None, persistent=PersistentMode.AUTO.value)


def _below_autograd(keys: torch._C.DispatchKeySet, *arguments):
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.cute_fa.attention.default.redispatch(keys & torch._C._after_autograd_keyset, *arguments)


def _gradients(ctx, dout, dlse):
    *tensors, out, lse = ctx.saved_tensors
    call = ops.Call(*tensors, *ctx.options)
    call = call._replace(deterministic=call.deterministic or torch.are_deterministic_algorithms_enabled())
    if dout is None:
        dout = torch.zeros_like(out)
    slopes = ops.Call._fields.index("alibi_slopes")
    grads = attention_backward(dout, dlse, out, lse, call, ctx.needs_input_grad[slopes])
    by_name = {"q": grads.dq, "k": grads.dk, "v": grads.dv}
    by_name |= {"alibi_slopes": grads.dalibi, "learnable_sink": grads.dsink}
    return tuple(by_name.get(name) for name in ops.Call._fields)


def _second_derivative(ctx, *_):
    raise NoBackwardError("attention differentiated twice: gradients of its gradients are not computed")


ops.LIBRARY.impl("attention", _autograd, "Autograd", with_keyset=True)
library.register_autograd("cute_fa::attention_backward", _second_derivative, lib=ops.LIBRARY)
