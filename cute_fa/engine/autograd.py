"""The derivative of ``cute_fa::attention``: the operator ``cute_fa::attention_backward`` and the formula that calls it.

Gradients come from whatever kernel of the backward the table names, which need not be of the forward's family. Saved
between the two are q, k, v, out, lse and the other tensors of the call; nothing is read by the host.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import library

from cute_fa.engine import torch_internals, worlds
from cute_fa.engine.attention import ARGUMENTS, check_call_devices
from cute_fa.engine.contract import AttentionTensors, BackwardTensors
from cute_fa.engine.operators import LIBRARY, define
from cute_fa.engine.plan import Plan, odd_strides, plan_of, restrided, signatures
from cute_fa.engine.table import TABLE
from cute_fa.engine.worlds import target_of
from cute_fa.semantics.argument_names import names_of
from cute_fa.semantics.call import FIELDS, TENSORS, Call
from cute_fa.semantics.errors import Fp8Error, NoBackwardError
from cute_fa.semantics.reference import Gradients
from cute_fa.semantics.tensors import (
    ALIGNMENT,
    check_devices,
    check_like,
    check_pointers,
    check_values,
    is_fp8,
    is_spread,
    load_rule,
    problem_of,
)
from cute_fa.semantics.types import Direction, PersistentMode

if TYPE_CHECKING:
    from cute_fa.engine.worlds import Target
    from cute_fa.semantics.problem import AttentionProblem
    from cute_fa.semantics.types import SmArch

GIVEN = "Tensor dout, Tensor? dlse, Tensor out, Tensor lse"


@dataclass(kw_only=True)
class BackwardPlan(Plan):
    """``strides``: canonical strides of q, k, v, out, dout where a dimension of size 1 has odd ones. ``copies``:
    whether dout has strides that no kernel can load."""

    strides: tuple[tuple[int, ...] | None, ...]
    copies: bool


def problem_of_backward(
    arch: SmArch,
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    call: Call,
    slopes_gradient: bool,
) -> AttentionProblem:
    """The validated problem of a call's backward."""
    problem = problem_of(
        arch,
        _forward_choices_left_out(call),
        out,
        direction=Direction.BACKWARD,
        deterministic=call.options.deterministic,
        lse_gradient=dlse is not None,
        slopes_gradient=slopes_gradient,
    )
    walks = call.extras
    if walks.query_walk is not None and (walks.key_walk is None or (problem.deterministic and walks.dq_walk is None)):
        rule = "ask for it, or for torch.use_deterministic_algorithms, before the forward, which makes the walks"
        raise NoBackwardError(f"deterministic={problem.deterministic} with a range plan: {rule}")
    check_like("dout", dout, out.shape, out.dtype)
    check_like("lse", lse, call.lse_shape, torch.float32)
    if dlse is not None:
        check_like("dlse", dlse, lse.shape, torch.float32)
    query = names_of(call.options.names)["q"]
    check_devices({query: call.q, "dout": dout, "dlse": dlse, "lse": lse}, query)
    return problem


def _attention_backward(dout, dlse, out, lse, *arguments):
    call, slopes_gradient = Call.of(arguments[:-1]), arguments[-1]
    target = target_of(call.q.device)
    key = ("backward", target, signatures((dout, dlse, out, lse, *call.tensors())), call.options, slopes_gradient)
    plan = plan_of(key, _make_plan, target, dout, dlse, out, lse, call, slopes_gradient)
    if worlds.checks_values():
        check_values(plan.problem, call)
    grads = _new_gradients(call, slopes_gradient)
    if not plan.launches:
        _without_keys(grads, dlse, lse)
        return grads
    q, k, v = call[:3]
    check_pointers(plan.names.of({"q": q, "k": k, "v": v, "out": out}))
    *strides, strides_dout = plan.strides
    if any(strides):
        q, k, v, out = map(restrided, (q, k, v, out), strides)
    if plan.copies or dout.data_ptr() % ALIGNMENT:
        dout = dout.clone(memory_format=torch.contiguous_format)
    else:
        dout = restrided(dout, strides_dout)
    forward = AttentionTensors(q, k, v, out, lse.contiguous(), call.extras)
    dlse = None if dlse is None else dlse.contiguous()
    plan.launch((forward, dout, dlse, *_named(grads, call, slopes_gradient)))
    return grads


def _make_plan(target: Target, dout, dlse, out, lse, call: Call, slopes_gradient: bool) -> BackwardPlan:
    problem = problem_of_backward(target.arch, dout, dlse, out, lse, call, slopes_gradient)
    return BackwardPlan(
        kind=BackwardTensors,
        problem=problem,
        names=names_of(call.options.names),
        kernel=TABLE.lookup(problem, call.options.family),
        target=target,
        launches=call.has_work,
        strides=tuple(map(odd_strides, (call.q, call.k, call.v, out, dout))),
        copies=load_rule(dout) is not None or (call.extras.query_walk is not None and is_spread(dout)),
    )


def _wanted(call: Call, slopes_gradient: bool) -> tuple[bool, bool]:
    """Whether the slopes and the sink get gradients."""
    return slopes_gradient, call.extras.learnable_sink is not None


def _new_gradients(call: Call, slopes_gradient: bool) -> tuple[torch.Tensor, ...]:
    """dq, dk, dv, dalibi, dsink, contiguous; an operator returns no None: empty ones stand for those not wanted. Packed
    tensors may have rows after the last sequence, where only the device knows: these are 0 beforehand."""
    packed = (call.extras.cu_seqlens_q, call.extras.cu_seqlens_k, call.extras.cu_seqlens_k)
    small = zip((call.extras.alibi_slopes, call.extras.learnable_sink), _wanted(call, slopes_gradient), strict=True)
    return (
        *(t.new_empty(t.shape) if cu is None else t.new_zeros(t.shape) for t, cu in zip(call[:3], packed, strict=True)),
        *(call.q.new_empty(t.shape if wanted else (0,), dtype=torch.float32) for t, wanted in small),
    )


def _named(grads: tuple[torch.Tensor, ...], call: Call, slopes_gradient: bool) -> Gradients:
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
    call, slopes_gradient = Call.of(arguments[:-1]), arguments[-1]
    check_call_devices(call, dout=dout, dlse=dlse, out=out, lse=lse)
    return _new_gradients(call, slopes_gradient)


define(
    "attention_backward",
    f"{GIVEN}, {ARGUMENTS}, bool slopes_gradient",
    "(Tensor, Tensor, Tensor, Tensor, Tensor)",
    _attention_backward,
    _fake,
)
_attention_backward_op = torch.ops.cute_fa.attention_backward.default


def attention_backward(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    call: Call,
    slopes_gradient: bool = False,
) -> Gradients:
    """The operator ``cute_fa::attention_backward``: gradients of the inputs of ``call``, whose forward gave ``out`` and
    ``lse``, from those of these two; ``dlse`` None is zero."""
    given = (dout, dlse, out, lse)
    unwatched = torch_internals.unwatched((*given, *call.tensors()))
    direct = unwatched and not call.q.is_meta and torch_internals.have_memory(dout, dlse)
    run = _attention_backward if direct else _attention_backward_op
    return _named(run(*given, *call.flat(), slopes_gradient), call, slopes_gradient)


def _check_differentiable(arguments: tuple) -> None:
    """Raise Fp8Error where gradients will be asked of fp8 tensors, UnsupportedKeyError where of a family that has no
    backward for them."""
    call = Call.of(arguments)
    if any(map(is_fp8, call[:3])):
        given = names_of(call.options.names).of(call.named_tensors())
        asking = next(name for name, tensor in given.items() if tensor is not None and tensor.requires_grad)
        raise Fp8Error(f"{asking} requires a gradient: attention in fp8 has none, call it under torch.no_grad()")
    if call.options.family is None or not torch_internals.has_values(call.q):
        return
    backward = {"direction": Direction.BACKWARD, "deterministic": call.options.deterministic}
    problem = problem_of(target_of(call.q.device).arch, _forward_choices_left_out(call), **backward)
    TABLE.lookup(problem, call.options.family)


def _forward_choices_left_out(call: Call) -> Call:
    """The call without what it chose of how the forward is computed, which is not the backward's own."""
    return call.changed(num_splits=1, pack_gqa=None, persistent=PersistentMode.AUTO.value)


def _gradients(ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """A gradient for each argument of the forward."""
    *tensors, out, lse = ctx.saved_tensors
    call = Call.of((*tensors, *ctx.options))
    call = call.changed(deterministic=call.options.deterministic or torch.are_deterministic_algorithms_enabled())
    if dout is None:
        dout = torch.zeros_like(out)
    grads = attention_backward(dout, dlse, out, lse, call, ctx.needs_input_grad[FIELDS.index("alibi_slopes")])
    by_name = {"q": grads.dq, "k": grads.dk, "v": grads.dv}
    by_name |= {"alibi_slopes": grads.dalibi, "learnable_sink": grads.dsink}
    return tuple(by_name.get(name) for name in FIELDS)


def _second_derivative(ctx, *_):
    raise NoBackwardError("attention differentiated twice: gradients of its gradients are not computed")


torch_internals.differentiate(LIBRARY, "attention", _check_differentiable, _gradients, len(TENSORS))
library.register_autograd("cute_fa::attention_backward", _second_derivative, lib=LIBRARY)
