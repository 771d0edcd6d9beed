"""``append_kv``: writing new keys and values into a KV cache."""

from __future__ import annotations

from typing import Any, TypeVar

import torch

from cute_fa.api import values
from cute_fa.engine.attention import AUTOCAST_DEVICES, CAST
from cute_fa.semantics.call import AppendCall
from cute_fa.semantics.tensors import DTYPES

Given = TypeVar("Given", torch.Tensor, torch.Tensor | None)
# A call of an operator that appends: AppendCall, or what cute_fa.api.append_by_position has.
Written = TypeVar("Written", bound=Any)
_REQUIRED = ("k_cache", "v_cache", "k", "v", "cache_seqlens")


def append_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_seqlens: torch.Tensor,
    *,
    q: torch.Tensor | None = None,
    page_table: torch.Tensor | None = None,
    cache_batch_idx: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k_new: torch.Tensor | None = None,
    seqused_q: torch.Tensor | None = None,
    seqused_k_new: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k_new: int | None = None,
    rotary_cos: torch.Tensor | None = None,
    rotary_sin: torch.Tensor | None = None,
    rotary_interleaved: bool = False,
    rotary_seqlens: torch.Tensor | None = None,
    rotate_each: bool = True,
    k_descale: torch.Tensor | float | None = None,
    v_descale: torch.Tensor | float | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Write new keys and values into a cache, in place, and rotate keys and queries on the way.

    k, v: (batch, seqlen_new, heads_kv, head_dim | head_dim_v), or (total_new, heads_kv, …) with ``cu_seqlens_k_new``;
    fp16 or bf16, as the caches are or for caches in fp8 or int8; or codes of the type that their cache has, which are
    copied and do not rotate. Autocast casts others and q to the caches' dtype, or to its own for caches of codes.
    ``seqused_k_new`` int32 (batch): how many rows of each sequence count; one without any writes nothing.
    k_cache, v_cache: (batch, seqlen_cache, heads_kv, …); with ``cache_batch_idx`` int32 (batch), (batch_cache, …) of
    which sequence b's is number cache_batch_idx[b]; or pages (num_pages, page_size, heads_kv, …) with ``page_table``
    int32 (batch, max_pages), of which with ``cache_batch_idx`` sequence b uses row cache_batch_idx[b]. Strides are free
    but for the last, which is 1, and multiples of 16 bytes. fp16, bf16, or both codes, e4m3, e5m2 or int8 each.
    k_descale, v_descale: for caches of codes, to which rows in fp16 or bf16 go as value / descale: fp32 (batch,
    heads_kv), any strides, or one number; or of four dimensions, which lie beside the cache: (num_pages, 1, heads_kv,
    1), one for each page, or sequence of a contiguous cache, and head; or (num_pages, page_size, heads_kv, 1),
    (batch_cache, seqlen_cache, heads_kv, 1), one for each row and head, any strides. The latter are written: a new row
    chooses the one that takes its largest finite element to the largest code, between 2^-32 and 2^32. The quotient, of
    keys behind the rotation, all in fp32, is rounded to the nearest code, ties to even; what is larger than the largest
    finite one, infinite too, becomes that one, NaN stays NaN, and is 0 in int8, whose largest code is 127.
    cache_seqlens: int32 (batch), tokens in the cache before; new row t becomes token cache_seqlens[b] + t. What does
    not fit is an error where values are checked (``CUTE_FA_CHECK=1``, simulating), and is not written.
    rotary_cos, rotary_sin: (positions, rotary_dim / 2), fp16, bf16 or fp32, any strides; the first rotary_dim elements
    of each head rotate (arXiv 2104.09864, section 3.4.2), a multiple of 16; neighbours if ``rotary_interleaved``, else
    element i with i + rotary_dim / 2. The position is that in the cache, or counts from ``rotary_seqlens`` int32
    (batch).
    q: (batch, seqlen_q, heads, head_dim), or (total_q, …) with ``cu_seqlens_q``; row t has position
    cache_seqlens[b] + t, or if not ``rotate_each`` cache_seqlens[b]. Rows beyond ``seqused_q`` are not written.
    max_seqlen_q, max_seqlen_k_new: at least the longest packed sequence's rows; None takes all there are.

    Returns (q rotated, a new tensor, or q itself if nothing rotates; int32 (batch): tokens in the cache now). Raises a
    subclass of ``cute_fa.errors.CuteFaError`` before anything is written.
    """
    given = {"k_descale": k_descale, "v_descale": v_descale}
    call = AppendCall(
        k_cache=k_cache,
        v_cache=v_cache,
        k=k,
        v=v,
        cache_seqlens=cache_seqlens,
        q=q,
        page_table=page_table,
        cache_batch_idx=cache_batch_idx,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k_new=cu_seqlens_k_new,
        seqused_q=seqused_q,
        seqused_k_new=seqused_k_new,
        rotary_cos=rotary_cos,
        rotary_sin=rotary_sin,
        rotary_seqlens=rotary_seqlens,
        **{name: values.descale(name, descale, k_cache) for name, descale in given.items()},
        max_seqlen_q=None if max_seqlen_q is None else values.integer("max_seqlen_q", max_seqlen_q),
        max_seqlen_k_new=None if max_seqlen_k_new is None else values.integer("max_seqlen_k_new", max_seqlen_k_new),
        rotary_interleaved=values.flag("rotary_interleaved", rotary_interleaved),
        rotate_each=values.flag("rotate_each", rotate_each),
    )
    for name, tensor in call.tensors().items():
        if tensor is not None or name in _REQUIRED:
            values.check_tensor(name, tensor)
    k, v = autocast_to(k_cache, k, v)
    (q,) = autocast_to(k_cache, q)
    return append(call._replace(k=k, v=v, q=q))


def autocast_to(cache: torch.Tensor, *tensors: Given) -> tuple[Given, ...]:
    """Under autocast, tensors in the dtype of the cache that they meet, whatever autocast's is: the cache itself is
    written in place and can be no copy. With a cache of codes in autocast's dtype."""
    if not autocasts(cache.device) or cache.dtype not in DTYPES:
        return tensors
    dtype = torch.get_autocast_dtype(cache.device.type) if DTYPES[cache.dtype].is_codes else cache.dtype
    return tuple(t.to(dtype) if t is not None and t.dtype in CAST else t for t in tensors)


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on for tensors there."""
    return device.type in AUTOCAST_DEVICES and torch.is_autocast_enabled(device.type)


def append(call: AppendCall) -> tuple[torch.Tensor | None, torch.Tensor]:
    """What :func:`append_kv` does and returns, for arguments of the operator."""
    q = call.q
    if call.rotary_cos is None and call.rotary_sin is None:
        call = call._replace(q=None, cu_seqlens_q=None, seqused_q=None)
    rotated, seqused_k = torch.ops.cute_fa.append_kv(*with_written_descales(call))
    return rotated if call.q is not None else q, seqused_k


def with_written_descales(call: Written) -> Written:
    """The call with those descales that an append writes, one for each row of the cache, as ``*_row_descale``."""
    for rows in ("k", "v"):
        descale, cache = getattr(call, f"{rows}_descale"), getattr(call, f"{rows}_cache")
        if descale is not None and descale.dim() == cache.dim() == 4 and descale.shape[1] == cache.shape[1]:
            call = call._replace(**{f"{rows}_descale": None, f"{rows}_row_descale": descale})
    return call
