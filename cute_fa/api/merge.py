"""Merging partial attention: outputs of the same queries over disjoint sets of keys become the output over all keys."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from cute_fa.semantics.errors import ArgumentError, DeviceError, DTypeError, ShapeError

_OUT = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_LSE = (torch.float32, torch.float64)


LAYOUTS = ("flash_attn", "flashinfer")
LSE_BASES = (math.e, 2)


def merge_states(
    outs: torch.Tensor | Sequence[torch.Tensor],
    lses: torch.Tensor | Sequence[torch.Tensor],
    *,
    layout: str = "flash_attn",
    lse_base: float = math.e,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) over all keys, from those over each part of the keys.

    outs: (num_states, batch, seqlen_q, heads, head_dim_v) or packed (num_states, total_q, heads, head_dim_v), fp16,
    bf16, fp32 or fp64; lses: natural logarithm as ``cute_fa.flash_attn_func`` returns it, (num_states, batch, heads,
    seqlen_q) or (num_states, heads, total_q), fp32 or fp64; or a sequence of num_states tensors in the place of either.
    layout: "flash_attn" for these; "flashinfer" for that library's order, outs (total_q, num_states, heads, head_dim_v)
    and lses (total_q, num_states, heads), of sequences (total_q, heads, …); out and lse then have that order too.
    lse_base: base of the logarithms, e or 2 (FlashInfer's), in and out.

    With m the largest LSE of a row (Dao et al., FlashAttention, 2022, section 3.1), in the base of the logarithms:
    lse = m + log Σ exp(lse_s − m), out = Σ exp(lse_s − lse) out_s, computed in fp32, or fp64 if an input is. A state of
    LSE −inf contributes nothing, whatever its out holds, NaN included; where all are −inf, out is 0 and lse −inf. A
    learnable sink is an addend of one state's LSE alone: give it to one of the calls.

    Results have the dtypes of outs and lses; torch differentiates them. Raises ArgumentError, ShapeError, DTypeError or
    DeviceError.
    """
    _check_options(layout, lse_base)
    dim = LAYOUTS.index(layout)
    outs, lses = _stacked("outs", outs, _OUT, dim), _stacked("lses", lses, _LSE, dim)
    if layout == "flashinfer":
        _check_rows_first(outs, lses)
        outs, lses = outs.movedim(1, 0), lses.permute(1, 2, 0)
    else:
        _check_shapes(outs, lses)
    log, exp = (torch.log2, torch.exp2) if lse_base == 2 else (torch.log, torch.exp)
    compute = torch.promote_types(lses.dtype, outs.dtype)
    states = lses.to(compute)
    absent = states == -math.inf
    empty = absent.all(0)
    largest = states.detach().amax(0).masked_fill(empty, 0.0)
    weights = exp(states - largest)
    total = weights.sum(0).masked_fill(empty, 1.0)
    # (…, heads, rows) beside (…, rows, heads, head_dim_v)
    shares, absent = ((t.transpose(-1, -2)[..., None]) for t in (weights / total, absent))
    out = (shares * outs.to(compute).masked_fill(absent, 0.0)).sum(0)
    lse = (largest + log(total)).masked_fill(empty, -math.inf)
    if layout == "flashinfer":
        lse = lse.transpose(0, 1).contiguous()
    return out.to(outs.dtype), lse.to(lses.dtype)


def _check_options(layout: str, lse_base: float) -> None:
    if layout not in LAYOUTS:
        raise ArgumentError(f"layout={layout!r}: one of {', '.join(LAYOUTS)}")
    if isinstance(lse_base, bool) or lse_base not in LSE_BASES:
        raise ArgumentError(f"lse_base={lse_base!r}: math.e or 2")


def _stacked(
    name: str, given: torch.Tensor | Sequence[torch.Tensor], dtypes: tuple[torch.dtype, ...], dim: int
) -> torch.Tensor:
    """The states along dimension ``dim``."""
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
    if not tensors or (tensors[0] is given and given.shape[dim : dim + 1] == (0,)):
        raise ArgumentError(f"{name} of no states: at least one is needed")
    if isinstance(given, torch.Tensor):
        return given
    if given[0].dim() < dim:
        raise ShapeError(f"{name} holds {tuple(given[0].shape)}: states of at least {dim} dimension are needed")
    return torch.stack(tensors, dim)


def _check_shapes(outs: torch.Tensor, lses: torch.Tensor) -> None:
    if outs.dim() not in (4, 5):
        rule = "(num_states, batch, seqlen_q, heads, head_dim_v) or (num_states, total_q, heads, head_dim_v) is needed"
        raise ShapeError(f"outs {tuple(outs.shape)}: {rule}")
    *leading, rows, heads, _ = outs.shape
    if tuple(lses.shape) != (*leading, heads, rows):
        raise ShapeError(f"lses {tuple(lses.shape)}: {(*leading, heads, rows)} is needed for outs {tuple(outs.shape)}")
    _check_device(outs, lses)


def _check_rows_first(outs: torch.Tensor, lses: torch.Tensor) -> None:
    if outs.dim() != 4:
        raise ShapeError(f"outs {tuple(outs.shape)}: (total_q, num_states, heads, head_dim_v) is needed")
    if lses.shape != outs.shape[:-1]:
        raise ShapeError(f"lses {tuple(lses.shape)}: {tuple(outs.shape[:-1])} is needed for outs {tuple(outs.shape)}")
    _check_device(outs, lses)


def _check_device(outs: torch.Tensor, lses: torch.Tensor) -> None:
    if lses.device != outs.device:
        raise DeviceError(f"lses are on {lses.device} and outs on {outs.device}: all tensors must be on one device")
