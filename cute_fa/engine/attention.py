"""The torch operators ``cute_fa::attention`` and ``cute_fa::attention_out``; their derivative is in
``cute_fa.engine.autograd``. A call that has a plan costs a dictionary look-up, the outputs' allocation and the launch
(:func:`again`)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.compiler import is_dynamo_compiling

from cute_fa.engine import plan as plans
from cute_fa.engine import torch_internals, worlds
from cute_fa.engine.contract import AttentionTensors
from cute_fa.engine.operators import LIBRARY, define, schema
from cute_fa.engine.plan import Plan, new_like, odd_strides, plan_of, restrided, signature, signatures
from cute_fa.engine.table import TABLE
from cute_fa.engine.torch_internals import has_values, unwatched
from cute_fa.engine.worlds import simulated_target, target_of
from cute_fa.semantics.argument_names import names_of
from cute_fa.semantics.call import NO_EXTRAS, Call, Extras, Options
from cute_fa.semantics.errors import NoBackwardError
from cute_fa.semantics.tensors import (
    ALIGNMENT,
    TORCH_DTYPES,
    check_devices,
    check_like,
    check_pointers,
    check_separate,
    check_values,
    problem_of,
)
from cute_fa.semantics.types import DType

if TYPE_CHECKING:
    from collections.abc import Callable

    from cute_fa.semantics.problem import AttentionProblem

_NO_TRANSFORM = (
    "attention inside a transform of torch.func, or with forward-mode differentiation: only torch.autograd (backward() "
    "or torch.autograd.grad) differentiates it"
)
# What autocast casts, and where.
CAST = (torch.float32, torch.float16, torch.bfloat16)
AUTOCAST_DEVICES = ("cpu", "cuda")
ARGUMENTS = schema("Tensor q, Tensor k, Tensor v", Extras, Options)


@dataclass(kw_only=True)
class ForwardPlan(Plan):
    """``new_out`` and ``new_lse`` allocate on their argument's device. ``strides``: canonical strides of q, k, v and
    out where a dimension of size 1 has odd ones; None if none has. ``expanded``: tensors of Extras that hold one number
    for all sequences, or all heads, too, and the shapes in which kernels are given them."""

    new_out: Callable[[torch.Tensor], torch.Tensor]
    new_lse: Callable[[torch.Tensor], torch.Tensor]
    strides: tuple[tuple[int, ...] | None, ...] | None
    expanded: dict[str, tuple[int, ...]]


def _attention(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    call = Call.of(arguments)
    return _run(_plan(call), *call, (call.q.data_ptr(), call.k.data_ptr(), call.v.data_ptr()))


def _attention_out(*arguments: Any) -> torch.Tensor:
    call, out = Call.of(arguments[:-1]), arguments[-1]
    plan = _plan(call, out)
    check_separate(plan.names["out"], out, plan.names.of({"q": call.q, "k": call.k, "v": call.v}))
    return _run(plan, *call, (call.q.data_ptr(), call.k.data_ptr(), call.v.data_ptr()), out)[1]


def _plan(call: Call, out: torch.Tensor | None = None) -> ForwardPlan:
    return plan_of(key_of(*call, out), _make_plan, call, out)


def key_of(q: Any, k: Any, v: Any, extras: Extras, options: Options, out: torch.Tensor | None = None) -> tuple:
    """What plans of a call are found by. Devices say which GPU it is of, but not which one is simulated."""
    return (
        simulated_target(),
        options,
        (q.shape, q.stride(), q.dtype, q.device),
        (k.shape, k.stride(), k.dtype, k.device),
        (v.shape, v.stride(), v.dtype, v.device),
        extras if extras is NO_EXTRAS else signatures(extras),
        None if out is None else signature(out),
    )


def _make_plan(call: Call, out: torch.Tensor | None) -> ForwardPlan:
    target = target_of(call.q.device)
    problem = problem_of(target.arch, call, out)
    problem, kernel = TABLE.choose(problem, call.options.family, target.num_sms, call.options.num_splits)
    of_v = odd_strides(call.v, 1 if problem.v_layout == "key_major" else -1)
    strides = (odd_strides(call.q), odd_strides(call.k), of_v, odd_strides(out))
    return ForwardPlan(
        kind=AttentionTensors,
        problem=problem,
        names=names_of(call.options.names),
        kernel=kernel,
        target=target,
        launches=call.has_work,
        new_out=new_like((*call.q.shape[:-1], call.v.shape[-1]), TORCH_DTYPES[problem.out_dtype]),
        new_lse=new_like(call.lse_shape, torch.float32),
        strides=None if strides == (None,) * 4 else strides,
        expanded=expanded_extras(problem, call),
    )


def expanded_extras(problem: AttentionProblem, call: Call) -> dict[str, tuple[int, ...]]:
    """Slopes and descales that are not one for each head of each sequence, or of each row, and the shape of those."""
    descales = dict.fromkeys(("q_descale", "k_descale", "v_descale"), problem.num_heads_kv)
    heads = {"alibi_slopes": problem.num_heads} | descales
    given = {name: getattr(call.extras, name) for name in heads}
    shapes = {name: (problem.batch, heads[name]) for name, tensor in given.items() if tensor is not None}
    for name, rows in (("k_descale", call.k), ("v_descale", call.v)):
        if name in shapes and given[name].dim() == 4:
            shapes[name] = (*rows.shape[:3], 1)
    return {name: shape for name, shape in shapes.items() if given[name].dim() != 3 and given[name].shape != shape}


def validate(call: Call, out: torch.Tensor | None = None) -> None:
    """Raise what the operator would raise for these arguments, nothing for tensors that are shapes alone; nothing
    runs."""
    if is_dynamo_compiling() or not all(map(has_values, (*call.tensors(), out))):
        return
    plan = _plan(call, out)
    inputs = plan.names.of({"q": call.q, "k": call.k, "v": call.v})
    check_pointers(inputs | ({} if out is None else {plan.names["out"]: out}))
    if out is not None:
        check_separate(plan.names["out"], out, inputs)
    if worlds.checks_values():
        check_values(plan.problem, call)


def _run(
    plan: ForwardPlan,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    extras: Extras,
    options: Options,
    addresses: tuple[int, int, int],
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) of a call, the kernel launched; allocates what is to be returned. ``addresses``: those of q, k and v.

    Every call comes through here: its parts are passed on as they are, since making a NamedTuple takes 0.3 µs."""
    if worlds.checks_values():
        check_values(plan.problem, Call(q, k, v, extras, options))
    lse = plan.new_lse(q)
    bits = addresses[0] | addresses[1] | addresses[2]
    if out is None:
        out = plan.new_out(q)  # which is aligned
    else:
        bits |= out.data_ptr()
    if not plan.launches:
        _without_keys(extras, out, lse)
        return out, lse
    if bits % ALIGNMENT:
        check_pointers(plan.names.of({"q": q, "k": k, "v": v, "out": out}))
    into = out
    if plan.strides is not None:
        q, k, v, into = map(restrided, (q, k, v, out), plan.strides)
    if plan.expanded:
        extras = extras._replace(**{n: getattr(extras, n).expand(shape) for n, shape in plan.expanded.items()})
    plan.launch((q, k, v, into, lse, extras))
    return out, lse


def _without_keys(extras: Extras, out: torch.Tensor, lse: torch.Tensor) -> None:
    """The result where no key exists at all: O = 0 and LSE = −inf, or learnable_sink for rows that count."""
    offsets, seqused_q = extras.cu_seqlens_q, extras.seqused_q
    out.zero_()
    lse.fill_(-math.inf)
    if extras.learnable_sink is None or lse.numel() == 0 or (offsets is not None and offsets.shape[0] < 2):
        return
    sink = extras.learnable_sink[:, None]
    if seqused_q is None:
        lse.copy_(sink.expand_as(lse))
        return
    row = torch.arange(lse.shape[-1], device=lse.device)
    if offsets is None:
        counts = (row < seqused_q[:, None])[:, None]
    else:
        starts = offsets[:-1]
        sequence = torch.searchsorted(offsets[1:], row, right=True, out_int32=True)
        sequence = sequence.clamp(max=starts.shape[0] - 1)
        counts = row - starts[sequence] < seqused_q[sequence]
    lse.copy_(torch.where(counts, sink, lse))


def _fake(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    call = Call.of(arguments)
    check_call_devices(call)
    q, v = call.q, call.v
    dtype = torch.bfloat16 if q.dtype.itemsize == 1 else q.dtype
    if call.options.out_dtype is not None:
        dtype = TORCH_DTYPES[DType(call.options.out_dtype)]
    out = q.new_empty((*q.shape[:-1], v.shape[-1]), dtype=dtype)
    return out, q.new_empty(call.lse_shape, dtype=torch.float32)


def _fake_out(*arguments: Any) -> torch.Tensor:
    call, out = Call.of(arguments[:-1]), arguments[-1]
    check_call_devices(call, out=out)
    return call.q.new_empty(call.lse_shape, dtype=torch.float32)


def check_call_devices(call: Call, **others: torch.Tensor | None) -> None:
    """Raise DeviceError unless all tensors of the call, and others beside them, are where q is."""
    names = names_of(call.options.names)
    check_devices(names.of(call.named_tensors() | others), names["q"])


def _autocast(op: Callable, device: str) -> Callable:
    """The operator with q, k and v cast to autocast's dtype, as torch's own attention is; fp8 and fp64 stay."""

    def cast(*arguments: Any) -> Any:
        dtype = torch.get_autocast_dtype(device)
        qkv = (t.to(dtype) if t.dtype in CAST else t for t in arguments[:3])
        with torch_internals.without_autocast(device):
            return op(*qkv, *arguments[3:])

    return cast


def dtype_computed(q: torch.Tensor) -> torch.dtype:
    """What q's dtype is after autocast, if that is on."""
    device = q.device.type
    if device in AUTOCAST_DEVICES and q.dtype in CAST and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return q.dtype


define("attention", ARGUMENTS, "(Tensor, Tensor)", _attention, _fake)
define("attention_out", f"{ARGUMENTS}, Tensor(a!) out", "Tensor", _attention_out, _fake_out)
_attention_op = torch.ops.cute_fa.attention.default
_attention_out_op = torch.ops.cute_fa.attention_out.default
for _device in AUTOCAST_DEVICES:
    LIBRARY.impl("attention", _autocast(_attention_op, _device), f"Autocast{_device.upper()}")
    LIBRARY.impl("attention_out", _autocast(_attention_out_op, _device), f"Autocast{_device.upper()}")


def attention(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) of a call."""
    done = again(*call)
    return dispatched(call) if done is None else done


def dispatched(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) of a call for which :func:`again` has nothing: the operator ``cute_fa::attention``."""
    if not is_dynamo_compiling() and torch_internals.transformed(call.tensors()):
        check_derivatives(call.tensors())
    return _attention_op(*call.flat())


def again(q: Any, k: Any, v: Any, extras: Extras, options: Options) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(out, lse) of a call, without the dispatcher, if there is a plan for it and the tensors are
    :func:`~cute_fa.engine.torch_internals.unwatched`. None otherwise, whatever the tensors are."""
    # Asked first: torch.compile before 2.11 cannot trace the comparison of NamedTuples.
    if is_dynamo_compiling() or not unwatched((q, k, v) if extras is NO_EXTRAS else (q, k, v, *extras)):
        return None
    try:
        plan = plans.PLANS.get(key_of(q, k, v, extras, options))
        addresses = q.data_ptr(), k.data_ptr(), v.data_ptr()
    except (AttributeError, RuntimeError):  # None; what has no strides, as sparse tensors, or no memory
        return None
    if plan is None or (plan.launches and 0 in addresses):
        return None
    return _run(plan, q, k, v, extras, options, addresses)


def attention_out(call: Call, out: torch.Tensor) -> torch.Tensor:
    """lse of a call whose out is written to a tensor: the operator ``cute_fa::attention_out``."""
    if not is_dynamo_compiling() and torch_internals.transformed((*call.tensors(), out)):
        check_derivatives((*call.tensors(), out))
        # No transform knows what an operator writes, but all know copy_.
        result, lse = _attention_op(*call.flat())
        check_like("out", out, result.shape, result.dtype)
        out.copy_(result)
        return lse
    return _attention_out_op(*call.flat(), out)


def check_derivatives(tensors: tuple) -> None:
    """Raise NoBackwardError where a transform of ``torch.func`` or forward-mode differentiation follows a tensor: torch
    would complain about the operator's internals in the first case, and drop the tangent in the second."""
    if torch_internals.is_differentiated(tensors):
        raise NoBackwardError(_NO_TRANSFORM)
