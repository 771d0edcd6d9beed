"""Rotary position embedding as a function of its own, beside the one that ``append_kv`` applies on the way."""

from __future__ import annotations

from typing import Any

import torch

from cute_fa.engine import worlds
from cute_fa.semantics.errors import ArgumentError, DTypeError, LengthError, ShapeError
from cute_fa.semantics.problem import INT32_MAX
from cute_fa.semantics.tensors import check_devices, check_dims, check_like, held_lengths

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INTEGERS = (torch.int32, torch.int64)


def apply_rotary_emb(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | torch.Tensor = 0,
    cu_seqlens: torch.Tensor | None = None,
    max_seqlen: int | None = None,
) -> torch.Tensor:
    """Rotate the first rotary_dim elements of each head by the angles of its position (RoFormer, arXiv 2104.09864,
    section 3.4.2); arguments and order are those of ``flash_attn.layers.rotary.apply_rotary_emb``.

    x: (batch, seqlen, heads, head_dim), or (total, heads, head_dim) with ``cu_seqlens`` int32 (batch + 1); fp16, bf16,
    fp32 or fp64.
    cos, sin: (positions, rotary_dim / 2), of one floating-point dtype.
    interleaved: neighbours are pairs (GPT-J); else element i and i + rotary_dim / 2 (GPT-NeoX).
    inplace: x itself is overwritten, a leaf that requires a gradient too; go on with the result, not with x.
    seqlen_offsets: position of each sequence's first row, one int or int32 or int64 (batch).
    max_seqlen: at least the longest packed sequence's length; nothing here needs it.

    Returns a tensor like x, computed in fp32 (fp64 if x or the tables are) by torch's operators, on any device and
    without host synchronisation; torch differentiates it, in cos and sin only if not ``inplace``. Positions beyond the
    tables raise LengthError where the host knows them or values are checked (``CUTE_FA_CHECK=1``, simulating), and
    otherwise take the last one. Raises a subclass of ``cute_fa.errors.CuteFaError``.
    """
    _check(x, cos, sin, interleaved, inplace, seqlen_offsets, cu_seqlens, max_seqlen)
    positions = _positions(x, cos, seqlen_offsets, cu_seqlens)
    # (…, rows, 1, rotary_dim / 2) beside (…, rows, heads, rotary_dim / 2)
    angles = cos[positions].unsqueeze(-2), sin[positions].unsqueeze(-2)
    if inplace:
        return _RotateInPlace.apply(x, *angles, interleaved)
    rotary_dim = 2 * cos.shape[-1]
    rotated = _rotated(x[..., :rotary_dim], *angles, interleaved)
    return rotated if rotary_dim == x.shape[-1] else torch.cat((rotated, x[..., rotary_dim:]), -1)


class _RotateInPlace(torch.autograd.Function):
    """As ``flash_attn`` does it: a leaf is overwritten too, which torch's own in-place operators refuse."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        if not (x.is_leaf and x.requires_grad):
            ctx.mark_dirty(x)
        part = x[..., : 2 * cos.shape[-1]]
        part.copy_(_rotated(part, cos, sin, interleaved))
        return x

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        rotary_dim = 2 * cos.shape[-1]
        # the inverse of a rotation is the one by the negative angle
        rotated = _rotated(dout[..., :rotary_dim], cos, -sin, ctx.interleaved)
        return torch.cat((rotated, dout[..., rotary_dim:]), -1), None, None, None


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    compute = torch.promote_types(torch.promote_types(x.dtype, cos.dtype), torch.float32)
    first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)
    first, second, cos, sin = (t.to(compute) for t in (first, second, cos, sin))
    turned = first * cos - second * sin, first * sin + second * cos
    joined = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
    return joined.to(x.dtype)


def _positions(x: torch.Tensor, cos: torch.Tensor, offsets: int | torch.Tensor, cu_seqlens: torch.Tensor | None) -> Any:
    """Rows of the tables for the rows of x: a slice, (batch, rows) or (total)."""
    rows = x.shape[1] if cu_seqlens is None else x.shape[0]
    if cu_seqlens is None and not isinstance(offsets, torch.Tensor):
        return slice(offsets, offsets + rows)
    positions = torch.arange(rows, dtype=torch.int32, device=x.device)
    sequence: Any = (slice(None), None)
    if cu_seqlens is not None:
        sequence = torch.searchsorted(cu_seqlens, positions, right=True).sub(1).clamp(0, cu_seqlens.shape[0] - 2)
        positions = positions - cu_seqlens[sequence]
    positions = positions + (offsets[sequence] if isinstance(offsets, torch.Tensor) else offsets)
    return positions.clamp(0, cos.shape[0] - 1).long()


def _check(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    interleaved: Any,
    inplace: Any,
    offsets: Any,
    cu_seqlens: torch.Tensor | None,
    max_seqlen: Any,
) -> None:
    for name, tensor in {"x": x, "cos": cos, "sin": sin}.items():
        if not isinstance(tensor, torch.Tensor):
            raise ArgumentError(f"{name} is {type(tensor).__name__}: a torch.Tensor is needed")
        if tensor.dtype not in _FLOATS:
            raise DTypeError(name, tensor.dtype, "float16, bfloat16, float32 or float64 is needed")
    for name, flag in {"interleaved": interleaved, "inplace": inplace}.items():
        if not isinstance(flag, bool):
            raise ArgumentError(f"{name}={flag!r}: True or False")
    tensors = {"x": x, "cos": cos, "sin": sin, "cu_seqlens": cu_seqlens}
    if isinstance(offsets, torch.Tensor):
        tensors["seqlen_offsets"] = offsets
    check_devices(tensors, "x")
    check_dims("cos", cos, 2, "(positions, rotary_dim / 2)")
    check_like("sin", sin, cos.shape, cos.dtype)
    if not 0 < 2 * cos.shape[1] <= x.shape[-1]:
        raise ShapeError(f"cos {tuple(cos.shape)} rotates {2 * cos.shape[1]} elements: head_dim is {x.shape[-1]}")
    if cos.shape[0] == 0:
        raise ShapeError(f"cos {tuple(cos.shape)}: at least one position is needed")
    if inplace and torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad):
        raise ArgumentError("inplace=True with cos or sin that require a gradient: they have none then")
    if max_seqlen is not None and (isinstance(max_seqlen, bool) or not isinstance(max_seqlen, (int, torch.SymInt))):
        raise ArgumentError(f"max_seqlen={max_seqlen!r}: an int is needed")
    if cu_seqlens is None:
        check_dims("x", x, 4, "(batch, seqlen, heads, head_dim)")
        batch, rows = x.shape[:2]
    else:
        check_dims("x", x, 3, "(total, heads, head_dim) with cu_seqlens")
        check_dims("cu_seqlens", cu_seqlens, 1, "(batch + 1)")
        if cu_seqlens.dtype != torch.int32:
            raise DTypeError("cu_seqlens", cu_seqlens.dtype, "int32 is needed")
        batch, rows = cu_seqlens.shape[0] - 1, 0
        if batch < 1:
            raise ShapeError(f"cu_seqlens {tuple(cu_seqlens.shape)}: (batch + 1) is needed")
    if isinstance(offsets, torch.Tensor):
        if offsets.dtype not in _INTEGERS:
            raise DTypeError("seqlen_offsets", offsets.dtype, "int32 or int64 is needed")
        if tuple(offsets.shape) != (batch,):
            raise ShapeError(f"seqlen_offsets {tuple(offsets.shape)}: {(batch,)} is needed")
    elif isinstance(offsets, bool) or not isinstance(offsets, (int, torch.SymInt)):
        raise ArgumentError(f"seqlen_offsets={offsets!r}: an int or a tensor (batch)")
    elif not 0 <= offsets <= INT32_MAX:
        raise LengthError(f"seqlen_offsets={offsets}: between 0 and {INT32_MAX}")
    elif offsets + rows > cos.shape[0]:
        raise LengthError(f"seqlen_offsets={offsets} and {rows} rows of x: cos has {cos.shape[0]} positions")
    if not torch.compiler.is_compiling() and (worlds.checks_values()):
        _check_values(x, cos, batch, offsets, cu_seqlens, max_seqlen)


def _check_values(
    x: torch.Tensor,
    cos: torch.Tensor,
    batch: int,
    offsets: int | torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    max_seqlen: int | torch.SymInt | None,
) -> None:
    """Check the numbers in tensors: host synchronisations. Raises LengthError or CumulativeSeqlensError."""
    if any(type(t) is not torch.Tensor or t.is_meta for t in (offsets, cu_seqlens) if isinstance(t, torch.Tensor)):
        return  # shapes without data
    lengths = [x.shape[1]] * batch if cu_seqlens is None else held_lengths("cu_seqlens", cu_seqlens, x)
    if max_seqlen is not None and max(lengths) > max_seqlen:
        raise LengthError(f"max_seqlen={max_seqlen}: a sequence has {max(lengths)} rows")
    starts = offsets.tolist() if isinstance(offsets, torch.Tensor) else [offsets] * batch
    for b, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        if start < 0 or start + length > cos.shape[0]:
            last = start + length - 1
            raise LengthError(f"sequence {b} rotates by positions {start} to {last}: cos has {cos.shape[0]}")
