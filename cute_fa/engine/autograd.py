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
from cute_fa.engine.attention import ARGUMENTS, check_call_devices, expanded_extras, key_of
from cute_fa.engine.contract import AttentionTensors, BackwardTensors
from cute_fa.engine.operators import LIBRARY, define
from cute_fa.engine.plan import Plan, new_like, new_zeros, odd_strides, plan_of, restrided, signatures
from cute_fa.engine.table import TABLE
from cute_fa.engine.worlds import target_of
from cute_fa.semantics.argument_names import names_of
from cute_fa.semantics.call import FIELDS, NO_EXTRAS, TENSORS, Call
from cute_fa.semantics.errors import Fp8Error, NoBackwardError
from cute_fa.semantics.reference import Gradients
from cute_fa.semantics.tensors import (
    ALIGNMENT,
    check_devices,
    check_like,
    check_pointers,
    check_values,
    is_codes,
    is_spread,
    load_rule,
    problem_of,
)
from cute_fa.semantics.types import Direction, PersistentMode

if TYPE_CHECKING:
    from collections.abc import Callable

    from cute_fa.semantics.problem import AttentionProblem
    from cute_fa.semantics.types import SmArch

# Where in the operator's arguments those stand whose gradients Gradients names, in its order.
_DIFFERENTIABLE = tuple(map(FIELDS.index, ("q", "k", "v", "alibi_slopes", "learnable_sink")))
GIVEN = "Tensor dout, Tensor? dlse, Tensor out, Tensor lse"


@dataclass(kw_only=True)
class BackwardPlan(Plan):
    """``new`` allocate dq, dk, dv, dalibi and dsink on their argument's device, None for those not wanted. ``strides``:
    canonical strides of q, k, v, out and dout where a dimension of size 1 has odd ones; None if none has. ``copies``:
    whether dout has strides that no kernel can load. ``expanded``: as of a forward's plan."""

    new: tuple[Callable[[torch.Tensor], torch.Tensor] | None, ...]
    strides: tuple[tuple[int, ...] | None, ...] | None
    copies: bool
    expanded: dict[str, tuple[int, ...]]


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
    return _without_none(_run(dout, dlse, out, lse, call, slopes_gradient), call)


def _run(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    call: Call,
    slopes_gradient: bool,
) -> Gradients:
    """The gradients of a call, the kernels launched; allocates what is to be returned."""
    key = (*key_of(*call, out), *signatures((dout, dlse, lse)), slopes_gradient)
    plan = plan_of(key, _make_plan, dout, dlse, out, lse, call, slopes_gradient)
    q, k, v, extras, _ = call
    if worlds.checks_values():
        check_values(plan.problem, call)
    grads = Gradients(*[None if new is None else new(q) for new in plan.new])
    if not plan.launches:
        _without_keys(grads, dlse, lse)
        return grads
    if (q.data_ptr() | k.data_ptr() | v.data_ptr() | out.data_ptr()) % ALIGNMENT:
        check_pointers(plan.names.of({"q": q, "k": k, "v": v, "out": out}))
    if plan.copies or dout.data_ptr() % ALIGNMENT:
        dout = dout.clone(memory_format=torch.contiguous_format)
    elif plan.strides is not None:
        dout = restrided(dout, plan.strides[-1])
    if plan.strides is not None:
        q, k, v, out = map(restrided, (q, k, v, out), plan.strides[:-1])
    if plan.expanded:
        extras = extras._replace(**{n: getattr(extras, n).expand(shape) for n, shape in plan.expanded.items()})
    if dlse is not None:
        dlse = dlse.contiguous()
    dq, dk, dv, dalibi, dsink = grads
    if dalibi is not None:
        dalibi = dalibi.view(-1, dalibi.shape[-1])
    if dsink is not None:
        dsink = dsink.view(1, -1)
    plan.launch(((q, k, v, out, lse.contiguous(), extras), dout, dlse, dq, dk, dv, dalibi, dsink))
    return grads


def _make_plan(dout, dlse, out, lse, call: Call, slopes_gradient: bool) -> BackwardPlan:
    target = target_of(call.q.device)
    problem = problem_of_backward(target.arch, dout, dlse, out, lse, call, slopes_gradient)
    strides = tuple(map(odd_strides, (call.q, call.k, call.v, out, dout)))
    return BackwardPlan(
        kind=_backward_tensors,
        problem=problem,
        names=names_of(call.options.names),
        kernel=TABLE.lookup(problem, call.options.family),
        target=target,
        launches=call.has_work,
        new=_allocations(call, slopes_gradient),
        strides=None if strides == (None,) * 5 else strides,
        copies=load_rule(dout) is not None or (call.extras.query_walk is not None and is_spread(dout)),
        expanded=expanded_extras(problem, call),
    )


def _backward_tensors(forward: tuple, *others: Any) -> BackwardTensors:
    return BackwardTensors(AttentionTensors(*forward), *others)


def _gradient_shapes(call: Call, slopes_gradient: bool) -> Gradients:
    """Shape and dtype of each gradient, None for those not wanted."""
    slopes, sink = call.extras.alibi_slopes, call.extras.learnable_sink
    return Gradients(
        *((t.shape, t.dtype) for t in call[:3]),
        (slopes.shape, torch.float32) if slopes_gradient else None,
        None if sink is None else (sink.shape, torch.float32),
    )


def _allocations(call: Call, slopes_gradient: bool) -> tuple[Callable[[torch.Tensor], torch.Tensor] | None, ...]:
    """What allocates each gradient, contiguous. Packed tensors may have rows after the last sequence, where only the
    device knows: these are 0 beforehand."""
    offsets = call.extras.cu_seqlens_q, call.extras.cu_seqlens_k
    zeroed = (offsets[0] is not None, offsets[1] is not None, offsets[1] is not None, False, False)
    shapes = _gradient_shapes(call, slopes_gradient)
    return tuple(
        None if of is None else new_zeros(*of) if zero else new_like(*of)
        for of, zero in zip(shapes, zeroed, strict=True)
    )


def _without_none(grads: Gradients, call: Call) -> tuple[torch.Tensor, ...]:
    """What an operator returns: empty tensors stand for gradients not wanted."""
    return tuple(call.q.new_empty(0, dtype=torch.float32) if grad is None else grad for grad in grads)


def _without_keys(grads: Gradients, dlse: torch.Tensor | None, lse: torch.Tensor) -> None:
    """The result where no query or no key exists at all. LSE is the sink then, or −inf in rows that do not count."""
    for grad in grads:
        if grad is not None:
            grad.zero_()
    if grads.dsink is not None and dlse is not None:
        counting = torch.where(lse.isneginf(), 0.0, dlse)
        grads.dsink.copy_(counting.sum([dim for dim in range(lse.dim()) if dim != lse.dim() - 2]))


def _fake(dout, dlse, out, lse, *arguments):
    call, slopes_gradient = Call.of(arguments[:-1]), arguments[-1]
    check_call_devices(call, dout=dout, dlse=dlse, out=out, lse=lse)
    grads = (
        None if of is None else call.q.new_empty(of[0], dtype=of[1]) for of in _gradient_shapes(call, slopes_gradient)
    )
    return _without_none(Gradients(*grads), call)


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
    tensors = call[:3] if call.extras is NO_EXTRAS else call.tensors()
    unwatched = torch_internals.unwatched((dout, dlse, out, lse, *tensors))
    if unwatched and not call.q.is_meta and torch_internals.have_memory(dout, dlse):
        return _run(dout, dlse, out, lse, call, slopes_gradient)
    grads = _attention_backward_op(dout, dlse, out, lse, *call.flat(), slopes_gradient)
    wanted = _gradient_shapes(call, slopes_gradient)
    return Gradients(*(None if of is None else grad for of, grad in zip(wanted, grads, strict=True)))


def _check_differentiable(arguments: tuple) -> None:
    """Raise Fp8Error where gradients will be asked beside codes, NoBackwardError where under a tree mask,
    UnsupportedKeyError where of a family that has no backward for them."""
    call = Call.of(arguments)
    codes, tree = any(map(is_codes, call[:3])), call.extras.tree_mask is not None
    if codes or tree:
        given = names_of(call.options.names).of(call.named_tensors())
        asking = next(name for name, tensor in given.items() if tensor is not None and tensor.requires_grad)
        kind, error = ("with fp8 or int8", Fp8Error) if codes else ("with tree_mask", NoBackwardError)
        raise error(f"{asking} requires a gradient: attention {kind} has none, call it under torch.no_grad()")
    if call.options.family is None or not torch_internals.has_values(call.q):
        return
    backward = {"direction": Direction.BACKWARD, "deterministic": call.options.deterministic}
    problem = problem_of(target_of(call.q.device).arch, _forward_choices_left_out(call), **backward)
    TABLE.lookup(problem, call.options.family)


def _forward_choices_left_out(call: Call) -> Call:
    """The call without what it chose of how the forward is computed, which is not the backward's own."""
    return call.changed(num_splits=1, seqlen_k_per_split=0, pack_gqa=None, persistent=PersistentMode.AUTO.value)


def _gradients(ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """A gradient for each argument of the forward."""
    *tensors, out, lse = ctx.saved_tensors
    call = Call.of((*tensors, *ctx.options))
    if torch.are_deterministic_algorithms_enabled() and not call.options.deterministic:
        call = call.changed(deterministic=True)
    if dout is None:
        dout = torch.zeros_like(out)
    grads = attention_backward(dout, dlse, out, lse, call, ctx.needs_input_grad[_DIFFERENTIABLE[3]])
    by_field: list[torch.Tensor | None] = [None] * len(FIELDS)
    for place, grad in zip(_DIFFERENTIABLE, grads, strict=True):
        by_field[place] = grad
    return tuple(by_field)


def _second_derivative(ctx, *_):
    raise NoBackwardError("attention differentiated twice: gradients of its gradients are not computed")


torch_internals.differentiate(LIBRARY, "attention", _check_differentiable, _gradients, len(TENSORS))
library.register_autograd("cute_fa::attention_backward", _second_derivative, lib=LIBRARY)
