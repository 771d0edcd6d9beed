"""``flash_attn_with_kvcache``: append to a KV cache, then attend to it."""

from __future__ import annotations

import numbers
from contextlib import nullcontext
from typing import Any, Literal, overload

import torch
from typing_extensions import Unpack

from cute_fa.api.append import append, autocast_to, autocasts
from cute_fa.api.attention import LengthOptions, Result, SharedOptions, prepare
from cute_fa.api.peers import check_peers, too_many
from cute_fa.api.scheduler_metadata import check_scheduler_metadata
from cute_fa.api.values import check_tensor, flag, integer
from cute_fa.engine import attention as engine
from cute_fa.semantics.argument_names import spelled
from cute_fa.semantics.call import AppendCall, Call
from cute_fa.semantics.errors import ArgumentError, NoBackwardError
from cute_fa.semantics.tensors import batch_of, check_dims, is_codes

# What callers call arguments of the two operators, by how they call the page table.
_TABLES = ("page_table", "block_table")
_CACHES = {"k": "k_cache", "v": "v_cache", "seqused_k": "cache_seqlens"}
_ATTENTION_NAMES = {table: spelled(**_CACHES, page_table=table) for table in _TABLES}
_APPEND_NAMES = {table: spelled(page_table=table) for table in _TABLES}

# Of the attention's tensors, those that say where appended rows go and which queries rotate.
_APPENDED = ("page_table", "cache_batch_idx", "cu_seqlens_q", "seqused_q")


class CacheOptions(SharedOptions, LengthOptions, total=False):
    """Keyword arguments of :func:`flash_attn_with_kvcache`, for type checkers; see there."""

    rotary_cos: torch.Tensor | None
    rotary_sin: torch.Tensor | None
    rotary_seqlens: torch.Tensor | None
    rotary_interleaved: bool
    cache_seqlens: int | torch.Tensor | None
    cache_batch_idx: torch.Tensor | None
    cache_leftpad: torch.Tensor | None
    cu_seqlens_q: torch.Tensor | None
    cu_seqlens_k_new: torch.Tensor | None
    max_seqlen_q: int | None
    max_seqlen_k_new: int | None


@overload
def flash_attn_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    *,
    return_lse: Literal[False] = False,
    return_attn_probs: Literal[False] = False,
    return_softmax_lse: Literal[False] = False,
    **options: Unpack[CacheOptions],
) -> torch.Tensor: ...
@overload
def flash_attn_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    *,
    return_lse: Literal[True],
    return_attn_probs: bool = ...,
    return_softmax_lse: bool = ...,
    **options: Unpack[CacheOptions],
) -> tuple[torch.Tensor, torch.Tensor]: ...
@overload
def flash_attn_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    *,
    return_attn_probs: Literal[True],
    return_lse: bool = ...,
    return_softmax_lse: bool = ...,
    **options: Unpack[CacheOptions],
) -> tuple[torch.Tensor, torch.Tensor]: ...
@overload
def flash_attn_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    *,
    return_softmax_lse: Literal[True],
    return_lse: bool = ...,
    return_attn_probs: bool = ...,
    **options: Unpack[CacheOptions],
) -> tuple[torch.Tensor, torch.Tensor]: ...
@overload
def flash_attn_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    *,
    return_lse: bool = ...,
    return_attn_probs: bool = ...,
    return_softmax_lse: bool = ...,
    **options: Unpack[CacheOptions],
) -> Result: ...
def flash_attn_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    *by_position: Any,
    rotary_cos: torch.Tensor | None = None,
    rotary_sin: torch.Tensor | None = None,
    cache_seqlens: int | torch.Tensor | None = None,
    cache_batch_idx: torch.Tensor | None = None,
    cache_leftpad: torch.Tensor | None = None,
    page_table: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    seqused_q: torch.Tensor | None = None,
    cu_seqlens_k_new: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k_new: int | None = None,
    rotary_seqlens: torch.Tensor | None = None,
    tree_mask: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (None, None),
    sink_tokens: int = 0,
    softcap: float | None = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: torch.Tensor | None = None,
    learnable_sink: torch.Tensor | None = None,
    q_descale: torch.Tensor | float | None = None,
    k_descale: torch.Tensor | float | None = None,
    v_descale: torch.Tensor | float | None = None,
    scheduler_metadata: torch.Tensor | None = None,
    num_splits: int = 0,
    batch_invariant: bool | None = None,
    seqlen_k_per_split: int | None = None,
    pack_gqa: bool | None = None,
    return_lse: bool = False,
    return_attn_probs: bool = False,
    return_softmax_lse: bool = False,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    promote_every: int | None = None,
    family: str | None = None,
    **peers: Any,
) -> Result:
    """Attention of few or many queries over a KV cache, for inference; the arguments of FA2's and FA3's function of
    this name. Arguments not named here are those of :func:`cute_fa.flash_attn_func`.

    q: (batch, seqlen_q, heads, head_dim), or (total_q, heads, head_dim) with ``cu_seqlens_q`` int32 (batch + 1) and at
    most ``max_seqlen_q`` queries a sequence (None: total_q).
    seqused_q: int32 (batch), how many queries of each sequence count, all by default; those are its last tokens. Beyond
    them O is 0 and LSE −inf. New rows of k and v all count, whatever it says: ``cu_seqlens_k_new`` packs fewer.
    k_cache, v_cache: (batch, seqlen_cache, heads_kv, head_dim | head_dim_v); with ``cache_batch_idx`` int32 (batch),
    (batch_cache, …), of which sequence b's is number cache_batch_idx[b]; or pages (num_pages, page_size, heads_kv, …)
    with ``page_table`` (``block_table``) int32 (batch, max_pages), or (batch_cache, max_pages) of which the index says
    each sequence's row. Only the strides say in which order the dimensions lie in memory: for (pages, heads, page_size,
    head_dim) pass ``cache.transpose(1, 2)``.
    k, v: new rows (batch, seqlen_new, heads_kv, …), or (total_new, …) with ``cu_seqlens_k_new``, that are first written
    to the cache, in place, behind the ``cache_seqlens`` tokens that each sequence has there; for caches in fp8 or int8
    16-bit values, which are divided by ``k_descale`` and ``v_descale``, or codes of the caches' types. Descales of the
    cache's rows are written for values, and for codes are to be there already.
    cache_seqlens: int32 (batch) or one int: tokens in the cache, before new ones are written; all there is room for by
    default, where nothing is written.
    cache_leftpad: int32 (batch), rows of the cache before a sequence's first key, which cache_seqlens and the places of
    tokens count and attention leaves out.
    rotary_cos, rotary_sin: (positions, rotary_dim / 2), with new k alone: rotates the new keys by their place in the
    cache, and q: row t by cache_seqlens[b] + t if causal or with a window, else all rows by cache_seqlens[b].
    ``rotary_seqlens`` int32 (batch) takes the place of cache_seqlens there; FA3's callers pass it without rotary_cos
    too, where nothing rotates. ``rotary_interleaved``: neighbours are pairs, as in FA2 and FA3; else halves. See
    :func:`cute_fa.append_kv`.
    tree_mask: int32 (batch, seqlen_q, words) or (total_q, words), which draft tokens a query sees where the queries are
    a tree of them, as for :func:`cute_fa.flash_attn_varlen_func`; the drafts are the last keys after the append.
    scheduler_metadata: of ``cute_fa.compat.fa3.get_scheduler_metadata`` for this batch; changes nothing.
    num_splits: parts that the keys are split into; 0 leaves it to the table, and with it the kernel: up to 128 tokens
    go to one whose CTAs share all key blocks evenly.

    Under autocast q and the new k and v are cast to the caches' dtype; the caches, which are written, never are.

    Causal and windows count from the end: the last query is that of the last token. Returns out like q with head_dim_v,
    or (out, lse), as :func:`cute_fa.flash_attn_varlen_func` does. Has no gradient: raises NoBackwardError if one is
    asked for. Raises a subclass of ``cute_fa.errors.CuteFaError`` before anything is written.
    """
    if by_position:
        raise too_many("flash_attn_with_kvcache", "q, the caches, k and v", by_position)
    check_peers(peers)
    returns = {"return_lse": return_lse, "return_attn_probs": return_attn_probs}
    returns["return_softmax_lse"] = return_softmax_lse
    returns = {name: flag(name, value) for name, value in returns.items()}
    rotary_interleaved = flag("rotary_interleaved", rotary_interleaved)
    if page_table is not None and block_table is not None:
        raise ArgumentError("page_table and block_table: two names of one argument, give one")
    if (k is None) != (v is None):
        raise ArgumentError("k and v: give both or neither")
    if rotary_cos is None and rotary_sin is None:
        rotary_seqlens = None
    table = "page_table" if block_table is None else "block_table"
    rotary = {"rotary_cos": rotary_cos, "rotary_sin": rotary_sin, "rotary_seqlens": rotary_seqlens}
    new: dict[str, Any] = {"cu_seqlens_k_new": cu_seqlens_k_new, "max_seqlen_k_new": max_seqlen_k_new, **rotary}
    if k is None:
        for name, value in new.items():
            if value is not None:
                raise ArgumentError(f"{name} without new k and v: nothing is appended")
    call = prepare(
        q,
        k_cache,
        v_cache,
        cu_seqlens_q=cu_seqlens_q,
        seqused_q=seqused_q,
        seqused_k=_lengths(cache_seqlens, q, cu_seqlens_q),
        page_table=page_table if page_table is not None else block_table,
        cache_batch_idx=cache_batch_idx,
        cache_leftpad=cache_leftpad,
        tree_mask=tree_mask,
        max_seqlen_q=max_seqlen_q,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        sink_tokens=sink_tokens,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        learnable_sink=learnable_sink,
        q_descale=q_descale,
        k_descale=k_descale,
        v_descale=v_descale,
        num_splits=num_splits,
        batch_invariant=batch_invariant,
        seqlen_k_per_split=seqlen_k_per_split,
        family=family,
        pack_gqa=pack_gqa,
        out_dtype=out_dtype,
        promote_every=promote_every,
        names=_ATTENTION_NAMES[table],
    )
    if scheduler_metadata is not None:
        check_scheduler_metadata(scheduler_metadata, q, cu_seqlens_q)
    given = {**rotary, "cu_seqlens_k_new": cu_seqlens_k_new, "k": k, "v": v, "out": out}
    for name, tensor in given.items():
        if tensor is not None:
            check_tensor(name, tensor)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (*call.tensors(), *given.values())):
        raise NoBackwardError("flash_attn_with_kvcache has no gradient: call it under torch.no_grad()")
    (query,) = autocast_to(call.k, call.q)
    if query is not call.q:
        call = call.changed(q=query)
    if k is not None and v is not None:
        k, v = autocast_to(call.k, k, v)
        if max_seqlen_k_new is not None:
            new["max_seqlen_k_new"] = integer("max_seqlen_k_new", max_seqlen_k_new)
        new |= {"rotary_interleaved": rotary_interleaved, "names": _APPEND_NAMES[table]}
        call = _append(call, k, v, out, new)
    with torch.autocast(q.device.type, enabled=False) if autocasts(q.device) else nullcontext():
        if out is None:
            out, lse = engine.attention(call)
        else:
            lse = engine.attention_out(call, out)
    return (out, lse) if any(returns.values()) else out


def _append(call: Call, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor | None, new: dict[str, Any]) -> Call:
    """The call after the append: with q rotated, and lengths with the new tokens."""
    extras, options = call.extras, call.options
    if extras.seqused_k is None:
        raise ArgumentError("k and v without cache_seqlens: where the new tokens go is not known")
    engine.validate(call, out)  # nothing is written for attention that cannot be
    if is_codes(call.k) and not is_codes(k):
        # None is 1, as for the attention
        for name in ("k_descale", "v_descale"):
            given = getattr(extras, name)
            new[name] = call.k.new_ones((), dtype=torch.float32) if given is None else given
    appended = AppendCall(
        call.k,
        call.v,
        k,
        v,
        extras.seqused_k,
        q=call.q,
        max_seqlen_q=options.max_seqlen_q,
        rotate_each=options.window_left is not None or options.window_right is not None,
        **{name: getattr(extras, name) for name in _APPENDED},
        **new,
    )
    rotated, seqused_k = append(appended)
    return call.changed(q=rotated, seqused_k=seqused_k)


def _lengths(cache_seqlens: Any, q: Any, cu_seqlens_q: Any) -> torch.Tensor | None:
    """int32 (batch), from one int for all sequences too."""
    if cache_seqlens is None or isinstance(cache_seqlens, torch.Tensor):
        return cache_seqlens
    if isinstance(cache_seqlens, bool) or not isinstance(cache_seqlens, (int, torch.SymInt, numbers.Integral)):
        raise ArgumentError(f"cache_seqlens={cache_seqlens!r}: an int, or an int32 tensor (batch)")
    cache_seqlens = integer("cache_seqlens", cache_seqlens)
    check_tensor("q", q)
    if cu_seqlens_q is not None:
        check_tensor("cu_seqlens_q", cu_seqlens_q)
        batch = batch_of("cu_seqlens_q", cu_seqlens_q)
    else:
        check_dims("q", q, 4, "(batch, seqlen_q, heads, head_dim)")
        batch = q.shape[0]
    return torch.full((batch,), cache_seqlens, dtype=torch.int32, device=q.device)
