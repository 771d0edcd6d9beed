"""Tensors in fp8, and caches in int8: quantise, dequantise, and rotate q and k so that outliers cost less.

A value is code × descale: codes have the shape of the tensor and an 8-bit type, descales are fp32 and shared by many
values. They are what the attention functions take as ``q_descale``, ``k_descale`` and ``v_descale``. Everything here is
plain torch, makes no host synchronisation and works under ``torch.compile`` and in CUDA graphs. docs/fp8.md explains
the types, the choices and the errors.

    q, k = (hadamard(t, random_signs(q.shape[-1])) for t in (q, k))
    (q, q_descale), (k, k_descale), (v, v_descale) = (quantize_per_head(t, heads_kv=k.shape[2]) for t in (q, k, v))

What is quantised: (batch, seqlen, heads, head_dim), or (total, heads, head_dim) with ``cu_seqlens`` int32 (batch + 1),
in fp16, bf16 or fp32, to ``dtype`` torch.float8_e4m3fn, torch.float8_e5m2 or torch.int8 (k and v alone). Codes
saturate, infinities too but in e5m2, which has them; NaN stays NaN, and is 0 in int8. The largest finite magnitude sets
a scale: NaN and infinities do not spoil their neighbours. Where all is 0 the descale is 1, and it is at
least 2^-126, a normal number, for denormal input too; of rows at least 2^-32. Rounding has no gradient: input that
requires one raises NoBackwardError. Bad input raises a subclass of ``cute_fa.errors.CuteFaError``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from cute_fa.semantics.errors import ArgumentError, DTypeError, NoBackwardError, ShapeError
from cute_fa.semantics.tensors import batch_of, check_devices, check_dims, check_integers, check_like, check_row_descale

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
_LARGEST = {E4M3: 448.0, E5M2: 57344.0, torch.int8: 127.0}  # codes
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


class Quantized(NamedTuple):
    """Values = codes × descale. ``codes``: in the tensor's shape; ``descale``: fp32 (), (batch, heads_kv), (batch,
    heads_kv, blocks) or (batch, seqlen, heads, 1)."""

    codes: torch.Tensor
    descale: torch.Tensor


def quantize_per_tensor(x: torch.Tensor, dtype: torch.dtype = E4M3) -> Quantized:
    """One descale (), for a tensor of any shape."""
    _check_values(x, dtype)
    descale = _descale(_magnitudes(x).amax() if x.numel() else x.new_zeros(()), dtype)
    return Quantized(quantize(x, descale, dtype), descale)


def quantize_per_head(
    x: torch.Tensor,
    dtype: torch.dtype = E4M3,
    *,
    heads_kv: int | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> Quantized:
    """A descale for each sequence and kv head, (batch, heads_kv).

    heads_kv: how many heads k and v have, for q, whose heads share the descale of their group; all of x's by default.
    Packed rows after the last sequence do not count.
    """
    _check_values(x, dtype)
    descale = _descale(_block_maxima(x, None, heads_kv, cu_seqlens, None), dtype).squeeze(2)
    return Quantized(quantize(x, descale, dtype, cu_seqlens=cu_seqlens), descale)


def quantize_per_block(
    x: torch.Tensor,
    block_size: int,
    dtype: torch.dtype = E4M3,
    *,
    heads_kv: int | None = None,
    cu_seqlens: torch.Tensor | None = None,
    max_seqlen: int | None = None,
) -> Quantized:
    """A descale for each sequence, kv head and block of ``block_size`` tokens, (batch, heads_kv, blocks).

    heads_kv: as for :func:`quantize_per_head`. max_seqlen: at least the longest packed sequence's length, which says
    how many blocks there are; all rows by default. Blocks that a sequence does not reach have a descale of 1.
    """
    _check_values(x, dtype)
    _check_count("block_size", block_size)
    descale = _descale(_block_maxima(x, block_size, heads_kv, cu_seqlens, max_seqlen), dtype)
    return Quantized(quantize(x, descale, dtype, block_size=block_size, cu_seqlens=cu_seqlens), descale)


def quantize_per_row(x: torch.Tensor, dtype: torch.dtype = E4M3) -> Quantized:
    """A descale for each token and head of a cache or of its pages, (batch, seqlen, heads, 1) as x has them: those that
    ``cute_fa.append_kv`` writes, between 2^-32, also of rows that are 0, and 2^32; so are the codes, but for infinities
    in e5m2, which become the largest finite number there."""
    _check_values(x, dtype)
    _check_rows("x", x, None)
    largest = _magnitudes(x).amax(-1, keepdim=True).float()
    descale = (largest / _LARGEST[dtype]).clamp(2.0**-32, 2.0**32)
    return Quantized(quantize(x, descale, dtype), descale)


def quantize(
    x: torch.Tensor,
    descale: torch.Tensor,
    dtype: torch.dtype = E4M3,
    *,
    block_size: int | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> torch.Tensor:
    """Codes x / descale, rounded to nearest even and saturated, for positive descales that are known already: those of
    a calibration, or of the cache that x is appended to. ``descale``: as in :class:`Quantized`, with ``block_size`` if
    it has blocks."""
    _check_values(x, dtype)
    largest = _LARGEST[dtype]
    scaled = x.float() / _of_each_row(descale, "x", x, block_size, cu_seqlens)
    codes = scaled.clamp(-largest, largest)  # not every version of torch saturates
    if dtype == torch.int8:
        codes = codes.nan_to_num(0.0).round()
    return (torch.where(x.isinf(), scaled, codes) if dtype == E5M2 else codes).to(dtype)


def dequantize(
    codes: torch.Tensor,
    descale: torch.Tensor,
    dtype: torch.dtype = torch.float32,
    *,
    block_size: int | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> torch.Tensor:
    """codes × descale, rounded to ``dtype``; arguments as for :func:`quantize`. Differentiable in ``descale``."""
    _check_tensor("codes", codes)
    if codes.dtype not in _LARGEST:
        raise DTypeError("codes", codes.dtype, "float8_e4m3fn, float8_e5m2 or int8 is needed")
    if dtype not in _FLOATS:
        raise ArgumentError(f"dtype={dtype}: float16, bfloat16 or float32 is needed")
    return (codes.float() * _of_each_row(descale, "codes", codes, block_size, cu_seqlens)).to(dtype)


def random_signs(
    head_dim: int, seed: int | torch.Generator = 0, device: torch.device | str | None = None
) -> torch.Tensor:
    """±1, fp32 (head_dim), for :func:`hadamard`. The same seed gives the same signs in every process and on every
    device, as those that write and those that read a cache need."""
    _check_count("head_dim", head_dim)
    generator = seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)
    bits = torch.randint(2, (head_dim,), generator=generator, device=generator.device)
    return (2.0 * bits - 1.0).to(device or generator.device)


def hadamard(x: torch.Tensor, signs: torch.Tensor | None = None, *, inverse: bool = False) -> torch.Tensor:
    """x times the orthonormal matrix diag(signs) · H, over the last dimension; ``inverse``: times its transpose.

    With q and k rotated alike q · k stays what it is, up to rounding, while an outlier of either is spread over all of
    its row: the incoherent processing of FlashAttention-3 (arXiv 2407.08608, section 3.3). It goes behind the rotary
    embedding, which it does not commute with. H is Hadamard's matrix / √size; a head_dim that is no power of two has a
    block for each power of two that it is a sum of, 96 = 64 + 32. Computed in fp32, returned in x's dtype, where fp16
    beyond 65504 is infinite. Differentiable.

    signs: fp32 (head_dim), ±1, see :func:`random_signs`; all +1 by default. They keep elements that are alike from
    being gathered in one.
    """
    _check_tensor("x", x)
    if x.dtype not in _FLOATS:
        raise DTypeError("x", x.dtype, "float16, bfloat16 or float32 is needed")
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ShapeError(f"x {tuple(x.shape)}: a last dimension of at least 1 is needed")
    y = x.float()
    if signs is not None:
        check_like("signs", signs, x.shape[-1:], torch.float32)
        check_devices({"x": x, "signs": signs}, "x")
        if not inverse:
            y = y * signs
    sizes = [1 << bit for bit in reversed(range(x.shape[-1].bit_length())) if x.shape[-1] >> bit & 1]
    y = torch.cat([_transformed(part) for part in y.split(sizes, -1)], -1)
    if signs is not None and inverse:
        y = y * signs
    return y.to(x.dtype)


def sum_error_bound(instructions: int, bits: int = 14) -> float:
    """How far off a sum of fp8 products may be that ``instructions`` wgmma of 32 products each accumulate with ``bits``
    significant bits, relative to the sum of the products' magnitudes: (33 n − 1) · 2^(1 − bits), see docs/fp8.md."""
    _check_count("instructions", instructions)
    return (33 * instructions - 1) * 2.0 ** (1 - bits)


def _magnitudes(x: torch.Tensor) -> torch.Tensor:
    """|x|, 0 in the place of what is not finite."""
    return torch.where(x.isfinite(), x.abs(), 0.0)


def _descale(largest: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What takes the largest magnitude to the largest code."""
    smallest = torch.finfo(torch.float32).smallest_normal
    descale = (largest.float() / _LARGEST[dtype]).clamp(min=smallest)
    return torch.where(largest == 0, 1.0, descale)


def _block_maxima(
    x: torch.Tensor,
    block_size: int | None,
    heads_kv: int | None,
    cu_seqlens: torch.Tensor | None,
    max_seqlen: int | None,
) -> torch.Tensor:
    """Largest magnitudes (batch, heads_kv, blocks); without ``block_size`` a sequence is one block."""
    _check_rows("x", x, cu_seqlens)
    heads_kv = x.shape[-2] if heads_kv is None else heads_kv
    _check_count("heads_kv", heads_kv)
    if x.shape[-2] % heads_kv:
        raise ArgumentError(f"heads_kv={heads_kv}: a divisor of the {x.shape[-2]} heads of x is needed")
    rows = x.shape[-3] if max_seqlen is None else max_seqlen
    _check_count("max_seqlen", rows, least=0)
    block_size = max(rows, 1) if block_size is None else block_size
    blocks = max(-(-rows // block_size), 1)
    maxima = _magnitudes(x).unflatten(-2, (heads_kv, -1)).amax((-2, -1))
    if cu_seqlens is None:
        if max_seqlen is not None:
            raise ArgumentError(f"max_seqlen={max_seqlen} without cu_seqlens: dense sequences have one length")
        maxima = F.pad(maxima, (0, 0, 0, blocks * block_size - rows))
        return maxima.unflatten(1, (blocks, block_size)).amax(2).transpose(1, 2)
    sequence, position = _places(x, cu_seqlens)
    block = sequence * blocks + (position // block_size).clamp(max=blocks - 1)
    batch = cu_seqlens.shape[0] - 1
    # one sequence more, for the rows after the last one
    largest = maxima.new_zeros((batch + 1) * blocks, heads_kv)
    largest = largest.scatter_reduce(0, block[:, None].expand(-1, heads_kv), maxima, "amax")
    return largest.unflatten(0, (batch + 1, blocks))[:batch].transpose(1, 2)


def _of_each_row(
    descale: torch.Tensor, name: str, x: torch.Tensor, block_size: int | None, cu_seqlens: torch.Tensor | None
) -> torch.Tensor:
    """Descales that broadcast over x, ``name``: (), (batch or 1, rows or 1, heads or 1, 1) or (total, heads, 1)."""
    _check_tensor("descale", descale)
    if descale.dtype != torch.float32:
        raise DTypeError("descale", descale.dtype, "float32 is needed")
    check_devices({name: x, "descale": descale, "cu_seqlens": cu_seqlens}, name)
    if descale.dim() == 0:
        return descale
    if descale.dim() == 4:
        for given, value in (("block_size", block_size), ("cu_seqlens", cu_seqlens)):
            if value is not None:
                raise ArgumentError(f"{given} with descale {tuple(descale.shape)}: descales of rows are of a cache")
        check_row_descale("descale", descale, name, x)
        return descale
    _check_rows(name, x, cu_seqlens)
    batch, heads = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1, x.shape[-2]
    shape = "(batch, heads_kv)" if block_size is None else "(batch, heads_kv, blocks)"
    fits = descale.dim() == 2 + (block_size is not None) and descale.shape[0] == batch
    if not fits or descale.shape[1] == 0 or heads % descale.shape[1]:
        raise ShapeError(
            f"descale {tuple(descale.shape)}: () or {shape} is needed, batch {batch} and heads_kv a divisor of {heads}"
        )
    by_block = descale[..., None] if block_size is None else descale
    blocks = by_block.shape[2]
    if block_size is not None:
        _check_count("block_size", block_size)
        if cu_seqlens is None and blocks * block_size < x.shape[1]:
            raise ShapeError(f"descale {tuple(descale.shape)}: {blocks} blocks of {block_size} for {x.shape[1]} tokens")
    by_block = by_block.transpose(1, 2).repeat_interleave(heads // descale.shape[1], 2)[..., None]
    if cu_seqlens is not None and batch == 0:
        return descale.new_ones(())  # of rows that no sequence has
    if cu_seqlens is not None:
        sequence, position = _places(x, cu_seqlens)
        block = torch.zeros_like(position) if block_size is None else (position // block_size).clamp(max=blocks - 1)
        # rows after the last sequence have its descales: their codes mean nothing
        return by_block[sequence.clamp(max=batch - 1), block]
    return by_block if block_size is None else by_block.repeat_interleave(block_size, 1)[:, : x.shape[1]]


def _places(x: torch.Tensor, cu_seqlens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequence of each packed row, the batch's size for rows after the last one, and its position there."""
    rows = torch.arange(x.shape[0], dtype=torch.int32, device=x.device)
    sequence = torch.searchsorted(cu_seqlens, rows, right=True) - 1
    return sequence, rows - cu_seqlens[sequence]


def _transformed(x: torch.Tensor) -> torch.Tensor:
    """x times Hadamard's matrix / √size; the size of the last dimension is a power of two."""
    size, half = x.shape[-1], 1
    while half < size:
        first, second = x.unflatten(-1, (-1, 2, half)).unbind(-2)
        x = torch.stack((first + second, first - second), -2).flatten(-3)
        half *= 2
    return x * size**-0.5


def _check_tensor(name: str, tensor: torch.Tensor) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise ArgumentError(f"{name} is {type(tensor).__name__}: a torch.Tensor is needed")


def _check_values(x: torch.Tensor, dtype: torch.dtype) -> None:
    _check_tensor("x", x)
    if dtype not in _LARGEST:
        raise ArgumentError(f"dtype={dtype}: torch.float8_e4m3fn, torch.float8_e5m2 or torch.int8 is needed")
    if x.dtype not in _FLOATS:
        raise DTypeError("x", x.dtype, "float16, bfloat16 or float32 is needed")
    if x.requires_grad and torch.is_grad_enabled():
        raise NoBackwardError("x requires a gradient: rounding to codes has none, pass x.detach()")


def _check_rows(name: str, x: torch.Tensor, cu_seqlens: torch.Tensor | None) -> None:
    if cu_seqlens is None:
        check_dims(name, x, 4, "(batch, seqlen, heads, head_dim)")
    else:
        _check_tensor("cu_seqlens", cu_seqlens)
        check_dims(name, x, 3, "(total, heads, head_dim) with cu_seqlens")
        check_integers("cu_seqlens", cu_seqlens)
        batch_of("cu_seqlens", cu_seqlens)
        check_devices({name: x, "cu_seqlens": cu_seqlens}, name)
    if 0 in x.shape[-2:]:
        raise ShapeError(f"{name} {tuple(x.shape)}: at least 1 head and a head_dim of at least 1 are needed")


def _check_count(name: str, number: int, least: int = 1) -> None:
    if isinstance(number, bool) or not isinstance(number, (int, torch.SymInt)):
        raise ArgumentError(f"{name}={number!r}: an int is needed")
    if number < least:
        raise ArgumentError(f"{name}={number}: at least {least} is needed")
