"""Values that callers pass: turned into plain ones, or refused by the name that the caller gave them."""

from __future__ import annotations

import numbers
from typing import Any

import numpy as np
import torch
from torch.compiler import is_dynamo_compiling

from cute_fa.semantics.argument_names import names_of
from cute_fa.semantics.errors import ArgumentError
from cute_fa.semantics.problem import INT32_MAX


def flag(name: str, value: Any) -> bool:
    """A bool; 0, 1 and numpy's bools are bools too. Raises ArgumentError for anything else."""
    if isinstance(value, (bool, np.bool_)) or (isinstance(value, numbers.Integral) and value in (0, 1)):
        return bool(value)
    raise ArgumentError(f"{name}={value!r}: True or False")


def check_tensor(name: str, tensor: Any, names: str = "") -> None:
    """Raise ArgumentError unless this is a tensor with strides; ``names``: what the caller calls arguments."""
    if not isinstance(tensor, torch.Tensor):
        raise ArgumentError(f"{names_of(names)[name]} is {type(tensor).__name__}: a torch.Tensor is needed")
    if tensor.is_nested:
        rule = "flash_attn_varlen_func takes packed ones"
        raise ArgumentError(f"{names_of(names)[name]} is a nested tensor: {rule}")
    if tensor.layout is not torch.strided:
        layout = str(tensor.layout).removeprefix("torch.")
        raise ArgumentError(f"{names_of(names)[name]} has layout {layout}: strided is needed")


def integer(name: str, value: Any) -> int:
    """An int between 0 and 2^31 − 1, from numpy's and from a tensor on the host too. Raises ArgumentError for anything
    else."""
    value = _on_host(name, value)
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt, numbers.Integral)):
        raise ArgumentError(f"{name}={value!r}: an int is needed")
    # Any: while tracing, a SymInt stands for an int
    size: Any = value if isinstance(value, (int, torch.SymInt)) else int(value)
    if _known(size < 0) or _known(size > INT32_MAX):
        raise ArgumentError(f"{name}={size}: between 0 and {INT32_MAX}")
    return size


def _known(condition: bool | torch.SymBool) -> bool:
    """Whether a condition is known to hold. One on an int that has no value while tracing is not: the operator checks
    the value when it runs."""
    if is_dynamo_compiling() or isinstance(condition, torch.SymBool):
        from torch.fx.experimental.symbolic_shapes import statically_known_true  # a second to import

        return statically_known_true(condition)
    return condition


def number(name: str, value: Any) -> float:
    """A float, from numpy's numbers and from a tensor on the host too. Raises ArgumentError for anything else."""
    value = _on_host(name, value)
    if not is_number(value):
        raise ArgumentError(f"{name}={value!r}: a number is needed")
    try:
        return float(value)
    except OverflowError:
        raise ArgumentError(f"{name}: the number is beyond any float") from None


def descale(name: str, value: Any, q: Any) -> Any:
    """What fp8 codes are multiplied by: a number as a tensor where q is, a tensor or None as it is. Raises
    ArgumentError for anything else."""
    if value is None or isinstance(value, torch.Tensor):
        return value
    return torch.full((), number(name, value), dtype=torch.float32, device=getattr(q, "device", None))


def _on_host(name: str, value: Any) -> Any:
    """The number in a tensor of no dimensions; other values as they are. Raises ArgumentError for a tensor on a device:
    the host would have to wait for it."""
    if not isinstance(value, torch.Tensor):
        return value
    if value.dim() > 0:
        raise ArgumentError(f"{name} is a tensor of shape {tuple(value.shape)}: a number is needed")
    if value.requires_grad:
        raise ArgumentError(f"{name} is a tensor that requires a gradient: it has none, give a number")
    if value.device.type != "cpu":
        raise ArgumentError(f"{name} is a tensor on {value.device}: the host would wait for its value, give a number")
    return value.item()


def is_number(value: Any) -> bool:
    """Whether this is a real number, and no bool."""
    return isinstance(value, (int, float, torch.SymFloat, numbers.Real)) and not isinstance(value, bool)
