"""The torch operators ``cute_fa::attention`` and ``cute_fa::attention_out``, and the launch path behind them; their
derivative is in ``cute_fa.engine.autograd``.

A call is described by shapes, strides, dtypes and options. Validation, dispatch and compilation depend on nothing else
and are done once for each such description: what they find is a ``_Plan``, and a call that has one costs a dictionary
look-up, the outputs' allocation and the launch (:func:`again`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from operator import methodcaller
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import is_grad_enabled, library
from torch._C import (
    _get_function_stack_at,
    _is_any_autocast_enabled,
    _len_torch_dispatch_stack,
    _len_torch_function_stack,
)
from torch._C._functorch import (
    TransformType,
    get_interpreter_stack,
    get_unwrapped,
    is_batchedtensor,
    is_functorch_wrapped_tensor,
    peek_interpreter_stack,
)
from torch.autograd import forward_ad, profiler
from torch.compiler import is_dynamo_compiling
from torch.utils._device import DeviceContext

from cute_fa.engine.compiler import compiled
from cute_fa.engine.contract import AttentionTensors
from cute_fa.engine.environment import switch
from cute_fa.engine.table import TABLE
from cute_fa.engine.worlds import simulated_arch, simulated_target, target_of
from cute_fa.semantics.argument_names import names_of
from cute_fa.semantics.errors import NoBackwardError
from cute_fa.semantics.problem import LiteralWindow
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
from cute_fa.semantics.types import PersistentMode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch._ops import OpOverload

    from cute_fa.engine.compiler import CompiledKernel
    from cute_fa.engine.contract import AttentionKernel
    from cute_fa.semantics.argument_names import ArgumentNames
    from cute_fa.semantics.problem import AttentionProblem
    from cute_fa.semantics.types import SmArch

# Whether to check values that live on the device, at the price of host synchronisations.
CHECK_VALUES = switch("CUTE_FA_CHECK", default=False)
# A description that changes at every call (decoding, packed batches) must not fill the memory.
_MAX_PLANS = 4096
_NO_TRANSFORM = (
    "attention inside a transform of torch.func, or with forward-mode differentiation: only torch.autograd (backward() "
    "or torch.autograd.grad) differentiates it"
)


class Call(NamedTuple):
    """Arguments of the operators, in the schema's order; meanings as in ``cute_fa.api.attention``, the window
    normalised: bounds are literal, None alone is infinite. ``names``: what the caller calls them
    (``cute_fa.semantics.argument_names``)."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    cu_seqlens_q: torch.Tensor | None
    cu_seqlens_k: torch.Tensor | None
    seqused_q: torch.Tensor | None
    seqused_k: torch.Tensor | None
    page_table: torch.Tensor | None
    cache_batch_idx: torch.Tensor | None
    cache_leftpad: torch.Tensor | None
    alibi_slopes: torch.Tensor | None
    learnable_sink: torch.Tensor | None
    max_seqlen_q: int | None
    max_seqlen_k: int | None
    softmax_scale: float | None
    window_left: int | None
    window_right: int | None
    sink_tokens: int
    softcap: float
    num_splits: int
    family: str | None
    pack_gqa: bool | None
    persistent: str
    deterministic: bool
    names: str = ""


NUM_TENSORS = 12
NO_TENSORS = (None,) * (NUM_TENSORS - 3)  # those after q, k and v, where none is given
_PLAIN = (torch.Tensor, torch.nn.Parameter, type(None))
# What autocast casts, and where.
CAST = (torch.float32, torch.float16, torch.bfloat16)
AUTOCAST_DEVICES = ("cpu", "cuda")
ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? seqused_q, Tensor? seqused_k, "
    "Tensor? page_table, Tensor? cache_batch_idx, Tensor? cache_leftpad, Tensor? alibi_slopes, Tensor? learnable_sink, "
    "SymInt? max_seqlen_q, SymInt? max_seqlen_k, float? softmax_scale, SymInt? window_left, SymInt? window_right, "
    "SymInt sink_tokens, float softcap, SymInt num_splits, str? family, bool? pack_gqa, str persistent, "
    "bool deterministic, str names"
)
LIBRARY = library.Library("cute_fa", "DEF")
LIBRARY.define(f"attention({ARGUMENTS}) -> (Tensor, Tensor)", tags=torch.Tag.pt2_compliant_tag)
LIBRARY.define(f"attention_out({ARGUMENTS}, Tensor(a!) out) -> Tensor", tags=torch.Tag.pt2_compliant_tag)


@dataclass
class _Plan:
    """What is known of every call with one description. ``launches``: whether there is any query and any key.
    ``new_out`` and ``new_lse`` allocate on their argument's device. ``strides``: canonical strides of q, k, v and out
    where a dimension of size 1 has odd ones; None if none has. ``compiled``, and ``pack``, which gives the kernel's
    arguments, are set by the first launch, after all checks. ``names``: what the caller calls the arguments."""

    problem: AttentionProblem
    names: ArgumentNames
    kernel: type[AttentionKernel]
    num_sms: int
    launches: bool
    new_out: Callable[[torch.Tensor], torch.Tensor]
    new_lse: Callable[[torch.Tensor], torch.Tensor]
    strides: tuple[tuple[int, ...] | None, ...] | None
    compiled: CompiledKernel | None = None
    pack: Callable[..., tuple] | None = None


_plans: dict[tuple, _Plan] = {}


def _attention(*arguments):
    q, k, v = arguments[:3]
    small, options = arguments[3:NUM_TENSORS], arguments[NUM_TENSORS:]
    return _run(_plan(q, k, v, small, options), q, k, v, small, (q.data_ptr(), k.data_ptr(), v.data_ptr()))


def _attention_out(*arguments):
    q, k, v = arguments[:3]
    small, options, out = arguments[3:NUM_TENSORS], arguments[NUM_TENSORS:-1], arguments[-1]
    plan = _plan(q, k, v, small, options, out)
    check_separate(plan.names["out"], out, plan.names.of({"q": q, "k": k, "v": v}))
    return _run(plan, q, k, v, small, (q.data_ptr(), k.data_ptr(), v.data_ptr()), out)[1]


def _plan(q, k, v, small: tuple, options: tuple, out: torch.Tensor | None = None) -> _Plan:
    """``small``: the other tensors of :class:`Call`; ``options``: what follows them."""
    key = _key(q, k, v, small, options, out)
    plan = _plans.get(key)
    if plan is None:
        plan = _make_plan(Call(q, k, v, *small, *options), out)
        keep(_plans, key, plan)
    return plan


def _key(q, k, v, small: tuple, options: tuple, out: torch.Tensor | None = None) -> tuple:
    """What a plan is found by; the tensors' devices say which GPU it is of, but not which one is simulated."""
    return (
        simulated_target(),
        options,
        (q.shape, q.stride(), q.dtype, q.device),
        (k.shape, k.stride(), k.dtype, k.device),
        (v.shape, v.stride(), v.dtype, v.device),
        small if small is NO_TENSORS else signatures(small),
        None if out is None else signatures((out,)),
    )


def validate(call: Call, out: torch.Tensor | None = None) -> None:
    """Raise what the operator would raise for these arguments, nothing for tensors that are shapes alone; nothing
    runs."""
    if is_dynamo_compiling() or not all(has_values(tensor) for tensor in (*call[:NUM_TENSORS], out)):
        return
    plan = _plan(*call[:3], call[3:NUM_TENSORS], call[NUM_TENSORS:], out)
    inputs = plan.names.of({"q": call.q, "k": call.k, "v": call.v})
    check_pointers(inputs | ({} if out is None else {plan.names["out"]: out}))
    if out is not None:
        check_separate(plan.names["out"], out, inputs)
    if CHECK_VALUES or simulated_arch() is not None:
        check_values(plan.problem, call.q, call.k, *call[3:NUM_TENSORS], names=plan.names)


def has_values(tensor: torch.Tensor | None) -> bool:
    """Whether this is no tensor of a fake or of a trace, which has a shape alone."""
    return type(tensor) in _PLAIN and (tensor is None or not (tensor.is_meta or is_functorch_wrapped_tensor(tensor)))


def signatures(tensors: tuple[torch.Tensor | None, ...]) -> tuple:
    """What a plan knows of its tensors."""
    return tuple([None if t is None else (t.shape, t.stride(), t.dtype, t.device) for t in tensors])


def keep(plans: dict, key: tuple, plan: Any) -> None:
    """Remember a plan; too many are forgotten together."""
    if len(plans) >= _MAX_PLANS:
        plans.clear()
    plans[key] = plan


def problem_of_call(arch: SmArch, call: Call, out: torch.Tensor | None = None, **backward: Any) -> AttentionProblem:
    """The validated problem of a call. ``backward``: fields of one that is of a backward."""
    options = call._asdict()
    del options["family"], options["deterministic"]
    options["num_splits"] = call.num_splits or 1  # 0 is for the table to choose
    options["names"] = names_of(call.names)
    window = LiteralWindow(options.pop("window_left"), options.pop("window_right"))
    persistent = PersistentMode.named(options.pop("persistent"))
    return problem_of(arch, **options, window_size=window, persistent=persistent, out=out, **backward)


def _make_plan(call: Call, out: torch.Tensor | None) -> _Plan:
    target = target_of(call.q.device)
    problem = problem_of_call(target.arch, call, out)
    if call.num_splits == 0:
        problem, kernel = TABLE.choose(problem, call.family, target.num_sms)
    else:
        kernel = TABLE.lookup(problem, call.family)
    q, k, v = call.q, call.k, call.v
    strides = tuple(None if t is None else odd_strides(t) for t in (q, k, v, out))
    return _Plan(
        problem=problem,
        names=names_of(call.names),
        kernel=kernel,
        num_sms=target.num_sms,
        launches=launches(call),
        new_out=new_like((*q.shape[:-1], v.shape[-1]), TORCH_DTYPES[problem.out_dtype]),
        new_lse=new_like(lse_shape(call), torch.float32),
        strides=None if strides == (None,) * 4 else strides,
    )


def new_like(shape: tuple[int, ...], dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function that allocates a contiguous tensor on its argument's device. With its strides at hand that takes two
    thirds of the time."""
    strides = torch.empty(shape, dtype=dtype, device="meta").stride()
    return methodcaller("new_empty_strided", shape, strides, dtype=dtype)


def launches(call: Call) -> bool:
    """Whether there is any sequence, any query and any key."""
    offsets = call.cu_seqlens_q
    return (offsets is None or offsets.shape[0] > 1) and call.q.numel() > 0 and call.k.numel() > 0


def lse_shape(call: Call) -> tuple[int, ...]:
    """(heads, total_q) if packed, else (batch, heads, seqlen_q)."""
    if call.cu_seqlens_q is not None:
        return call.q.shape[1], call.q.shape[0]
    return call.q.shape[0], call.q.shape[2], call.q.shape[1]


def odd_strides(tensor: torch.Tensor) -> tuple[int, ...] | None:
    """Strides to use instead: those of dimensions of size 1 mean nothing, but kernels ask for multiples of 16 bytes."""
    step = ALIGNMENT // tensor.element_size()
    *outer, last = tensor.stride()
    canonical = (*(0 if size == 1 else stride for size, stride in zip(tensor.shape, outer, strict=False)), 1)
    return canonical if last != 1 or any(stride % step for stride in outer) else None


def restrided(tensor: torch.Tensor, strides: tuple[int, ...] | None) -> torch.Tensor:
    """The same elements with other strides, the tensor itself for None."""
    return tensor if strides is None else tensor.as_strided(tensor.shape, strides)


def _run(
    plan: _Plan, q, k, v, small: tuple, addresses: tuple[int, int, int], out: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse), the kernel launched; allocates what is to be returned. ``addresses``: those of q, k and v."""
    if CHECK_VALUES or simulated_arch() is not None:
        check_values(plan.problem, q, k, *small, names=plan.names)
    lse = plan.new_lse(q)
    bits = addresses[0] | addresses[1] | addresses[2]
    if out is None:
        out = plan.new_out(q)  # which is aligned
    else:
        bits |= out.data_ptr()
    if not plan.launches:
        _without_keys(small, out, lse)
        return out, lse
    if bits % ALIGNMENT:
        check_pointers(plan.names.of({"q": q, "k": k, "v": v, "out": out}))
    into = out
    if plan.strides is not None:
        q, k, v, into = map(restrided, (q, k, v, out), plan.strides)
    if plan.compiled is None:
        plan.pack = _packing(plan, AttentionTensors(q, k, v, into, lse, *small))
        plan.compiled = compiled(plan.kernel.configure(plan.problem))
    plan.compiled.launch(plan.pack(q, k, v, into, lse, *small))
    return out, lse


def _packing(plan: _Plan, tensors: AttentionTensors) -> Callable[..., tuple]:
    """``plan.kernel.arguments`` as a function of tensors of this description. All but the tensors are the same in every
    call, so it is asked once and only the tensors are put in their places; at every call where it makes tensors itself.
    """

    def arguments(*tensors: torch.Tensor | None) -> tuple:
        return plan.kernel.arguments(plan.problem, AttentionTensors(*tensors), plan.num_sms)

    # Objects of their own: one tensor may be q, k and v at once.
    named = [None if t is None else t.detach() for t in tensors]
    return packer(arguments(*named), named) or arguments


def packer(arguments: tuple, tensors: Sequence[torch.Tensor | None]) -> Callable[..., tuple] | None:
    """A function of as many tensors as ``tensors`` that gives ``arguments`` with them in the places of these; None if
    there are tensors of another origin."""
    places = {id(tensor): f"t{i}" for i, tensor in enumerate(tensors)}
    constants: list[Any] = []

    def source(value: Any) -> str:
        if isinstance(value, torch.Tensor):
            return places[id(value)]
        if isinstance(value, tuple) and any(map(_holds_tensors, value)):
            return f"({''.join(f'{source(item)}, ' for item in value)})"
        constants.append(value)
        return f"c{len(constants) - 1}"

    try:
        body = source(arguments)
    except KeyError:
        return None
    names = ", ".join(f"t{i}" for i in range(len(tensors)))
    return eval(f"lambda {names}: {body}", {f"c{i}": value for i, value in enumerate(constants)})


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, torch.Tensor) or (isinstance(value, tuple) and any(map(_holds_tensors, value)))


def _without_keys(small: tuple, out: torch.Tensor, lse: torch.Tensor) -> None:
    """The result where no key exists at all: O = 0 and LSE = −inf, or learnable_sink for rows that count."""
    cu_seqlens_q, _, seqused_q, *_, learnable_sink = small
    out.zero_()
    lse.fill_(-math.inf)
    if learnable_sink is None or lse.numel() == 0 or (cu_seqlens_q is not None and cu_seqlens_q.shape[0] < 2):
        return
    sink = learnable_sink[:, None]
    if seqused_q is None:
        lse.copy_(sink.expand_as(lse))
        return
    row = torch.arange(lse.shape[-1], device=lse.device)
    if cu_seqlens_q is None:
        counts = (row < seqused_q[:, None])[:, None]
    else:
        starts = cu_seqlens_q[:-1]
        sequence = torch.searchsorted(cu_seqlens_q[1:], row, right=True, out_int32=True)
        sequence = sequence.clamp(max=starts.shape[0] - 1)
        counts = row - starts[sequence] < seqused_q[sequence]
    lse.copy_(torch.where(counts, sink, lse))


def _fake(*arguments):
    call = Call._make(arguments)
    check_call_devices(call)
    q, v = call.q, call.v
    dtype = torch.bfloat16 if q.dtype.itemsize == 1 else q.dtype
    out = q.new_empty((*q.shape[:-1], v.shape[-1]), dtype=dtype)
    return out, q.new_empty(lse_shape(call), dtype=torch.float32)


def _fake_out(*arguments):
    call = Call._make(arguments[:-1])
    check_call_devices(call, out=arguments[-1])
    return call.q.new_empty(lse_shape(call), dtype=torch.float32)


def check_call_devices(call: Call, **others: torch.Tensor | None) -> None:
    """Raise DeviceError unless all tensors of the call, and others beside them, are where q is."""
    names = names_of(call.names)
    tensors = dict(zip(Call._fields, call[:NUM_TENSORS], strict=False)) | others
    check_devices(names.of(tensors), names["q"])


def _autocast(op: OpOverload, device: str) -> Callable:
    """The operator with q, k and v cast to autocast's dtype, as torch's own attention is; fp8 and fp64 stay."""
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device.upper()}"))

    def cast(*arguments):
        dtype = torch.get_autocast_dtype(device)
        qkv = (t.to(dtype) if t.dtype in CAST else t for t in arguments[:3])
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return op(*qkv, *arguments[3:])

    return cast


LIBRARY.impl("attention", _attention, "CompositeExplicitAutograd")
LIBRARY.impl("attention_out", _attention_out, "CompositeExplicitAutograd")
library.register_fake("cute_fa::attention", _fake, lib=LIBRARY)
library.register_fake("cute_fa::attention_out", _fake_out, lib=LIBRARY)
_attention_op = torch.ops.cute_fa.attention.default
_attention_out_op = torch.ops.cute_fa.attention_out.default
for _device in AUTOCAST_DEVICES:
    LIBRARY.impl("attention", _autocast(_attention_op, _device), f"Autocast{_device.upper()}")
    LIBRARY.impl("attention_out", _autocast(_attention_out_op, _device), f"Autocast{_device.upper()}")


def attention(*arguments) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) for the arguments of :class:`Call`: the operator ``cute_fa::attention``."""
    done = again(*arguments[:3], arguments[3:NUM_TENSORS], arguments[NUM_TENSORS:])
    if done is not None:
        return done
    if not is_dynamo_compiling() and _transformed():
        _check_derivatives(arguments)
    return _attention_op(*arguments)


def again(q: Any, k: Any, v: Any, small: tuple, options: tuple) -> tuple[torch.Tensor, torch.Tensor] | None:
    """What ``attention(q, k, v, *small, *options)`` returns, without the dispatcher, if there is a plan for it and the
    tensors are :func:`unwatched`. None otherwise, whatever the tensors are."""
    if not unwatched((q, k, v) if small is NO_TENSORS else (q, k, v, *small)):
        return None
    try:
        plan = _plans.get(_key(q, k, v, small, options))
        addresses = q.data_ptr(), k.data_ptr(), v.data_ptr()
    except (AttributeError, RuntimeError):  # None; what has no strides, as sparse tensors, or no memory
        return None
    if plan is None or (plan.launches and 0 in addresses):
        return None
    return _run(plan, q, k, v, small, addresses)


def unwatched(tensors: tuple) -> bool:
    """Whether the dispatcher would do nothing for them but convert an operator's many arguments back and forth: eager
    mode, no gradient asked for, no autocast, mode, profiler or transform watching, plain tensors or None.

    Two kinds of plain tensors are not asked about here, because it would take too long: some have no memory of their
    own (:func:`have_memory`), and while torch.jit traces, sizes are tensors, by which no plan is found."""
    if (
        is_dynamo_compiling()
        or _len_torch_dispatch_stack()
        or (_len_torch_function_stack() and _function_modes())
        or profiler._is_profiler_enabled
        or _is_any_autocast_enabled()
        or peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
    ):
        return False
    needs_grad = is_grad_enabled()
    for tensor in tensors:
        if type(tensor) not in _PLAIN or (needs_grad and tensor is not None and tensor.requires_grad):
            return False
    return True


def _function_modes() -> bool:
    """Whether a mode sees calls of torch's functions, other than a default device, which is one that changes none of
    ours."""
    modes = map(_get_function_stack_at, range(_len_torch_function_stack()))
    return any(type(mode) is not DeviceContext for mode in modes)


def have_memory(*tensors: torch.Tensor | None) -> bool:
    """Whether kernels can be given these tensors as they are. Some stand for others although their type says nothing
    of it, and the dispatcher puts these in their places: those of the older vmap, by which
    ``torch.autograd.grad(…, is_grads_batched=True)`` maps, functionalized ones, and zeros that are not written yet."""
    try:
        return all(tensor is None or tensor.data_ptr() or not tensor.numel() for tensor in tensors)
    except RuntimeError:
        return False


def attention_out(*arguments) -> torch.Tensor:
    """lse for the arguments of :class:`Call` and the tensor to write: the operator ``cute_fa::attention_out``."""
    if not is_dynamo_compiling() and _transformed():
        _check_derivatives(arguments)
        # No transform knows what an operator writes, but all know copy_.
        *arguments, out = arguments
        result, lse = _attention_op(*arguments)
        check_like("out", out, result.shape, result.dtype)
        out.copy_(result)
        return lse
    return _attention_out_op(*arguments)


def _transformed() -> bool:
    return peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def _check_derivatives(arguments: tuple) -> None:
    """Raise NoBackwardError where a transform of ``torch.func`` or forward-mode differentiation follows a tensor: torch
    would complain about the operator's internals in the first case, and drop the tangent in the second."""
    stack = get_interpreter_stack() or []
    reverse = any(interpreter.key() == TransformType.Grad for interpreter in stack)
    forward = forward_ad._current_level >= 0
    for tensor in arguments[:NUM_TENSORS]:
        for layer in _layers(tensor):
            if (reverse and layer.requires_grad) or (forward and forward_ad.unpack_dual(layer).tangent is not None):
                raise NoBackwardError(_NO_TRANSFORM)


def _layers(tensor: torch.Tensor | None) -> Iterator[torch.Tensor]:
    """The tensor and, where transforms wrap it, what they wrap; without the wrappers of vmap, which hide both kinds of
    derivative."""
    while tensor is not None:
        if not is_batchedtensor(tensor):
            yield tensor
        tensor = get_unwrapped(tensor) if is_functorch_wrapped_tensor(tensor) else None
