"""Merging partial attention: outputs of the same queries over disjoint sets of keys become the output over all keys."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from cute_fa.errors import ArgumentError, DeviceError, DTypeError, ShapeError

_OUT = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_LSE = (torch.float32, torch.float64)


def merge_states(
    outs: torch.Tensor | Sequence[torch.Tensor], lses: torch.Tensor | Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) over all keys, from those over each part of the keys.

    outs: (num_states, batch, seqlen_q, heads, head_dim_v) or packed (num_states, total_q, heads, head_dim_v), fp16,
    bf16, fp32 or fp64; lses: natural logarithm as ``cute_fa.flash_attn_func`` returns it, (num_states, batch, heads,
    seqlen_q) or (num_states, heads, total_q), fp32 or fp64; or a sequence of num_states tensors in the place of either.

    With m the largest LSE of a row (Dao et al., FlashAttention, 2022, section 3.1):
    lse = m + log Σ exp(lse_s − m), out = Σ exp(lse_s − lse) out_s, computed in fp32, or fp64 if an input is. A state of
    LSE −inf contributes nothing, whatever its out holds, NaN included; where all are −inf, out is 0 and lse −inf. A
    learnable sink is an addend of one state's LSE alone: give it to one of the calls.

    Results have the dtypes of outs and lses; torch differentiates them. Raises ArgumentError, ShapeError, DTypeError or
    DeviceError.
    """
    outs, lses = _stacked("outs", outs, _OUT), _stacked("lses", lses, _LSE)
    _check_shapes(outs, lses)
    compute = torch.promote_types(lses.dtype, outs.dtype)
    states = lses.to(compute)
    absent = states == -math.inf
    empty = absent.all(0)
    largest = states.detach().amax(0).masked_fill(empty, 0.0)
    weights = torch.exp(states - largest)
    total = weights.sum(0).masked_fill(empty, 1.0)
    # (…, heads, rows) beside (…, rows, heads, head_dim_v)
    shares, absent = ((t.transpose(-1, -2)[..., None]) for t in (weights / total, absent))
    out = (shares * outs.to(compute).masked_fill(absent, 0.0)).sum(0)
    lse = (largest + total.log()).masked_fill(empty, -math.inf)
    return out.to(outs.dtype), lse.to(lses.dtype)


def _stacked(name: str, given: torch.Tensor | Sequence[torch.Tensor], dtypes: tuple[torch.dtype, ...]) -> torch.Tensor:
    """The states along the first dimension."""
    if isinstance(given, torch.Tensor):
        tensors = [given]
    elif isinstance(given, Sequence):
        tensors = list(given)
    else:
        raise ArgumentError(f"{name} is {type(given).__name__}: a tensor or a sequence of tensors is needed")
    for tensor in tensors:
        if not isinstance(tensor, torch.Tensor):
            raise ArgumentError(f"{name} holds {type(tensor).__name__}: a sequence of tensors is needed")
        if tensor.dtype not in dtypes:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise DTypeError(name, tensor.dtype, f"one of {names} is needed")
        if tensor.dtype != tensors[0].dtype:
            raise DTypeError(name, tensor.dtype, f"the first state is {str(tensors[0].dtype).removeprefix('torch.')}")
        if tensor.shape != tensors[0].shape:
            raise ShapeError(f"{name} holds {tuple(tensors[0].shape)} and {tuple(tensor.shape)}: states are alike")
        if tensor.device != tensors[0].device:
            raise DeviceError(f"{name} lie on {tensors[0].device} and {tensor.device}: one device is needed")
    if not tensors or (tensors[0] is given and given.shape[:1] == (0,)):
        raise ArgumentError(f"{name} of no states: at least one is needed")
    return given if isinstance(given, torch.Tensor) else torch.stack(tensors)


def _check_shapes(outs: torch.Tensor, lses: torch.Tensor) -> None:
    if outs.dim() not in (4, 5):
        rule = "(num_states, batch, seqlen_q, heads, head_dim_v) or (num_states, total_q, heads, head_dim_v) is needed"
        raise ShapeError(f"outs {tuple(outs.shape)}: {rule}")
    *leading, rows, heads, _ = outs.shape
    if tuple(lses.shape) != (*leading, heads, rows):
        raise ShapeError(f"lses {tuple(lses.shape)}: {(*leading, heads, rows)} is needed for outs {tuple(outs.shape)}")
    if lses.device != outs.device:
        raise DeviceError(f"lses are on {lses.device} and outs on {outs.device}: all tensors must be on one device")
