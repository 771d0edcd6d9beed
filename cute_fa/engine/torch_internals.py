"""What is asked of torch by its private names, all of them here.

Each has an answer for a torch that lacks the name: the one that sends a call through the dispatcher, which is slower
and right.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import is_grad_enabled, library
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

PLAIN = frozenset((torch.Tensor, torch.nn.Parameter, type(None)))

try:
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
    from torch.autograd import profiler
    from torch.utils._device import DeviceContext

    torch._C._AutoDispatchBelowAutograd, torch._C._after_autograd_keyset, torch._C._any_requires_grad  # noqa: B018
    torch._C._ExcludeDispatchKeyGuard  # noqa: B018
    profiler._is_profiler_enabled  # noqa: B018  (asked for here, since it is read at every call)
    forward_ad._current_level  # noqa: B018
    HAS_FAST_PATH = True
except (ImportError, AttributeError):
    HAS_FAST_PATH = False


def unwatched(tensors: tuple) -> bool:
    """Whether the dispatcher would do nothing for them but convert an operator's many arguments back and forth: eager
    mode, no gradient asked for, no autocast, mode, profiler or transform watching, plain tensors or None.

    Two kinds of plain tensors are not asked about here, because it would take too long: some have no memory of their
    own (:func:`have_memory`), and while torch.jit traces, sizes are tensors, by which no plan is found."""
    if (
        not HAS_FAST_PATH
        or is_dynamo_compiling()
        or _len_torch_dispatch_stack()
        or (_len_torch_function_stack() and _function_modes())
        or profiler._is_profiler_enabled
        or _is_any_autocast_enabled()
        or peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
    ):
        return False
    if not PLAIN.issuperset(map(type, tensors)):
        return False
    if is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
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


def has_values(tensor: torch.Tensor | None) -> bool:
    """Whether this is no tensor of a fake or of a trace, which has a shape alone."""
    if tensor is None:
        return True
    return type(tensor) in PLAIN and not (tensor.is_meta or (HAS_FAST_PATH and is_functorch_wrapped_tensor(tensor)))


def transformed(tensors: tuple) -> bool:
    """Whether a transform of ``torch.func`` or forward-mode differentiation is on, or, for a torch that does not say
    so, follows one of the tensors in forward mode: the dispatcher would drop its tangent."""
    if not HAS_FAST_PATH:
        return is_differentiated(tensors)
    return peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def is_differentiated(tensors: tuple) -> bool:
    """Whether a transform of ``torch.func`` or forward-mode differentiation follows one of the tensors; of transforms
    torch itself complains where it does not say which are on."""
    if not HAS_FAST_PATH:
        return any(tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)
    stack = get_interpreter_stack() or []
    reverse = any(interpreter.key() == TransformType.Grad for interpreter in stack)
    forward = forward_ad._current_level >= 0
    for tensor in tensors:
        for layer in _layers(tensor):
            if (reverse and layer.requires_grad) or (forward and forward_ad.unpack_dual(layer).tangent is not None):
                return True
    return False


def _layers(tensor: torch.Tensor | None) -> Iterator[torch.Tensor]:
    """The tensor and, where transforms wrap it, what they wrap; without the wrappers of vmap, which hide both kinds of
    derivative."""
    while tensor is not None:
        if not is_batchedtensor(tensor):
            yield tensor
        tensor = get_unwrapped(tensor) if is_functorch_wrapped_tensor(tensor) else None


def without_autocast(device: str) -> AbstractContextManager:
    """A context in which operators on this kind of device see no autocast."""
    if not HAS_FAST_PATH:
        return torch.autocast(device, enabled=False)
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device.upper()}"))
    return torch._C._ExcludeDispatchKeyGuard(keys)


def differentiate(lib: library.Library, name: str, forward: Callable, backward: Callable, num_tensors: int) -> None:
    """Give an operator its derivative. ``forward(arguments)`` is told of a call that a gradient is asked of;
    ``backward(ctx, *gradients)`` gives a gradient or None for each argument, and finds the first ``num_tensors``
    arguments and the outputs in ``ctx.saved_tensors``, the other arguments in ``ctx.options``.

    What ``library.register_autograd`` does, but for a step that takes 0.5 ms of every call with a gradient: it fills in
    defaults, which these operators have none of, in time quadratic in the number of arguments."""
    operator = getattr(getattr(torch.ops, lib.ns), name).default

    def setup(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:num_tensors], *output)
        ctx.options = inputs[num_tensors:]

    if not HAS_FAST_PATH:

        def setup_told(ctx: Any, inputs: tuple, output: tuple) -> None:
            forward(inputs)
            setup(ctx, inputs, output)

        library.register_autograd(f"{lib.ns}::{name}", backward, setup_context=setup_told, lib=lib)
        return

    def below(keys: Any, arguments: tuple) -> tuple:
        with torch._C._AutoDispatchBelowAutograd():
            return operator.redispatch(keys & torch._C._after_autograd_keyset, *arguments)

    class Differentiated(torch.autograd.Function):
        """The operator below autograd, for its arguments and the dispatcher's keys."""

        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> tuple:
            *inputs, keys = arguments
            output = below(keys, tuple(inputs))
            setup(ctx, tuple(inputs), output)
            return output

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> tuple:
            return (*backward(ctx, *gradients), None)

    def dispatched(keys: Any, *arguments: Any) -> tuple:
        if is_grad_enabled() and torch._C._any_requires_grad(*arguments):
            forward(arguments)
            return Differentiated.apply(*arguments, keys)
        return below(keys, arguments)

    lib.impl(name, dispatched, "Autograd", with_keyset=True)


def assert_on_device(condition: torch.Tensor, message: str) -> None:
    """Stop at run time, also of compiled code, where the condition, a tensor that nobody waits for, does not hold."""
    torch._assert_async(condition, message)
