"""The serving operators of TensorRT-LLM's auto_deploy, with its argument order, as ``torch.ops.cute_fa.*``.

They append the new tokens' keys and values to a cache, rotated, and attend to what is then in the cache, causally: the
new tokens are the last ones of each sequence.

q (b, s, heads · head_dim), k (b, s, heads_kv · head_dim) and v (b, s, heads_kv · head_dim_v) come as the projections
make them, or with their heads as a fourth dimension; the caches say how many there are: k_cache (…, heads_kv,
head_dim), v_cache (…, heads_kv, head_dim_v). The result is (b, s, heads · head_dim_v), or has a fourth dimension where
q has. With s == 1 and b sequences the batch is generate-only: sequence i has the token q[i, 0]. Else the b · s tokens
are one flattened row, in which the ``seq_len[i]`` tokens of sequence i start at ``seq_start[i]``. A step without tokens
or without sequences touches no cache and launches nothing.

    input_pos int32 (batch): tokens that a sequence has in the cache already, and so the position of its first new one
    seq_len int32 (batch): its new tokens; 0 for what fills up a batch, which writes nothing
    seq_start int32 or int64 (batch): where they start in the flattened row: from 0, never decreasing
    cache_loc int32 (batch): where a sequence lies in the cache: its index in a contiguous cache, (batch_cache,
        max_seq_len, heads_kv, …), or its row of ``page_table`` for pages (num_pages, page_size, heads_kv, …)
    freqs_cis (positions, rotary_dim / 2, 2): pairs (cos, sin), fp16, bf16 or fp32; element i of a head rotates with
        element i + rotary_dim / 2. None or an empty tensor: nothing rotates
    scale: of the scores, 1/√head_dim by default

Where the original is wrong:

- It declares its caches unchanged. Here they are mutated arguments.
- It reads lengths on the host (``max(seq_len)``), which no CUDA graph can hold. Here longest lengths come from shapes.
- Generate-only it ignores ``seq_len``, and what fills up a batch writes into the cache. Here its length is 0.
- ``fused_mha_with_cache`` ignores ``input_pos`` for more than one token. Here they follow what is in the cache.
- A flattened row of one token, whose other sequences have none, it takes for a generate-only batch of the first one.
- Rows of the flattened row that belong to no sequence are left as they are in memory. Here they are 0.
- The operators return q's shape whatever v's head_dim is. Here it is that of the values.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import torch
from torch import library
from torch.nn.functional import pad

from cute_fa.api.append import append
from cute_fa.api.attention import prepare
from cute_fa.engine import attention as engine
from cute_fa.engine import worlds
from cute_fa.engine.operators import define
from cute_fa.engine.torch_internals import has_values
from cute_fa.semantics.argument_names import spelled
from cute_fa.semantics.call import AppendCall
from cute_fa.semantics.errors import (
    CacheIndexError,
    DTypeError,
    EmptyCacheError,
    LengthError,
    NoBackwardError,
    ShapeError,
    UnsupportedArgumentError,
)
from cute_fa.semantics.tensors import check_devices, check_dims, check_like

if TYPE_CHECKING:
    from collections.abc import Callable

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")
_CACHES = ("k_cache", "v_cache")
# What callers of these operators call arguments of those below.
_QUERIES = {"cu_seqlens_q": "seq_start", "seqused_q": "seq_len", "cache_batch_idx": "cache_loc"}
_ATTENTION_NAMES = spelled(**_QUERIES, k="k_cache", v="v_cache", seqused_k="input_pos")
_APPEND_NAMES = spelled(
    **_QUERIES,
    cache_seqlens="input_pos",
    cu_seqlens_k_new="seq_start",
    seqused_k_new="seq_len",
    rotary_cos="freqs_cis",
    rotary_sin="freqs_cis",
)
_SDPA_NAMES = spelled(q="query", k="key", v="value", softmax_scale="scale")
_CACHE = "(batch_cache, seqlen_cache, heads_kv, head_dim) or (num_pages, page_size, heads_kv, head_dim)"


def _operator(
    *, mutates: tuple[str, ...] = (), fake: Callable | None = None
) -> Callable[[Callable[Parameters, Result]], Callable[Parameters, Result]]:
    """Makes a function the operator ``cute_fa::`` of its name, and gives a function that calls that. What depends on
    shapes alone is its own fake."""

    def register(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
        name = function.__name__
        arguments, _, returns = library.infer_schema(function, mutates_args=mutates).partition(" -> ")
        define(name, arguments.removeprefix("(").removesuffix(")"), returns, function, fake or function)
        operator = getattr(torch.ops.cute_fa, name).default

        @functools.wraps(function)
        def call(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
            return operator(*args, **kwargs)

        return call

    return register


@_operator(mutates=_CACHES)
def fused_mha_with_cache(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    input_pos: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    freqs_cis: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """b sequences with s new tokens each, of which number i is number i of the contiguous cache."""
    if k_cache.shape[0] < q.shape[0]:
        raise ShapeError(
            f"k_cache {tuple(k_cache.shape)}: a place for each of the {q.shape[0]} sequences of q is needed"
        )
    return _attend(q, k, v, k_cache[: q.shape[0]], v_cache[: q.shape[0]], input_pos, freqs_cis, scale)


@_operator(mutates=_CACHES)
def fused_flattened_mha_with_cache(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seq_len: torch.Tensor,
    input_pos: torch.Tensor,
    cache_loc: torch.Tensor,
    seq_start: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    freqs_cis: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """Sequences of any lengths in a contiguous cache; ``cache_loc``: the index of each in it."""
    _check_batch(input_pos, seq_len=seq_len, cache_loc=cache_loc, seq_start=seq_start)
    new = (seq_len, seq_start)
    return _attend(q, k, v, k_cache, v_cache, input_pos, freqs_cis, scale, *new, cache_batch_idx=cache_loc)


@_operator(mutates=_CACHES)
def fused_flattened_mha_with_cache_rope_fusion(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    input_pos: torch.Tensor,
    cache_loc: torch.Tensor,
    seq_len: torch.Tensor,
    seq_start: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    freqs_cis: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """:func:`fused_flattened_mha_with_cache` in another order of arguments: there, too, one kernel rotates and appends.
    Without ``freqs_cis`` the original hands these arguments on in the wrong order."""
    _check_batch(input_pos, seq_len=seq_len, cache_loc=cache_loc, seq_start=seq_start)
    new = (seq_len, seq_start)
    return _attend(q, k, v, k_cache, v_cache, input_pos, freqs_cis, scale, *new, cache_batch_idx=cache_loc)


@_operator(mutates=_CACHES)
def fused_mha_with_paged_cache(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    input_pos: torch.Tensor,
    cache_loc: torch.Tensor,
    seq_len: torch.Tensor,
    seq_start: torch.Tensor,
    page_table: torch.Tensor,
    max_seq_len: int,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    freqs_cis: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """Sequences of any lengths in pages of any power of two from 1 to 1024 tokens.

    ``page_table`` int32 (rows, max_pages): the pages of a sequence in order; ``cache_loc``: the row of each sequence.
    ``max_seq_len``: at least the most tokens that a sequence has afterwards: no page beyond is looked at.
    """
    _check_batch(input_pos, seq_len=seq_len, cache_loc=cache_loc, seq_start=seq_start)
    check_dims("k_cache", k_cache, 4, _CACHE)
    check_dims("page_table", page_table, 2, "(rows, max_pages)")
    if max_seq_len < 0:
        raise LengthError(f"max_seq_len={max_seq_len}: a sequence has 0 tokens or more")
    if k_cache.numel() == 0:
        raise EmptyCacheError(f"k_cache {tuple(k_cache.shape)}: the cache has no pages")
    if has_values(cache_loc) and worlds.checks_values():
        for b, row in enumerate(cache_loc.tolist()):
            if not 0 <= row < page_table.shape[0]:
                raise CacheIndexError(f"cache_loc[{b}]={row}: page_table has {page_table.shape[0]} rows")
    pages = page_table[:, : _pages_for(max_seq_len, k_cache.shape[1])].index_select(0, cache_loc)
    return _attend(q, k, v, k_cache, v_cache, input_pos, freqs_cis, scale, seq_len, seq_start, page_table=pages)


@_operator()
def prepare_fused_mha_metadata(
    input_ids: torch.Tensor,
    seq_len: torch.Tensor,
    input_pos: torch.Tensor,
    cache_loc: torch.Tensor,
    pages_per_seq: torch.Tensor,
    page_size: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(seq_len, input_pos, cache_loc, seq_start), as :func:`fused_flattened_mha_with_cache` takes them, from
    ``SequenceInfo.args``, whose ``cache_loc`` lists one place in the cache for each sequence.

    Of a generate-only batch (input_ids (b, 1)) they have b sequences, of a single token the one that has it, of others
    all that ``seq_len`` has, with ``seq_len`` and ``input_pos`` 0 for those that are none: how many there are only the
    device knows, where the original has the host wait for it.
    """
    which, seq_len, input_pos, seq_start = _sequences(input_ids, seq_len, input_pos)
    batch = seq_start.shape[0]
    if cache_loc.shape[0] < batch:
        raise ShapeError(f"cache_loc {tuple(cache_loc.shape)}: a place for each of {batch} sequences is needed")
    return seq_len, input_pos, cache_loc[which].clone(), seq_start


@_operator()
def prepare_paged_mha_metadata(
    input_ids: torch.Tensor,
    seq_len: torch.Tensor,
    input_pos: torch.Tensor,
    cache_loc: torch.Tensor,
    pages_per_seq: torch.Tensor,
    page_size: int,
    max_seq_len: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """(input_pos, cache_loc, seq_len, seq_start, page_table, max_seq_len), as :func:`fused_mha_with_paged_cache` takes
    them, from ``SequenceInfo.args``, whose ``cache_loc`` lists the pages of all sequences; the original has no such
    operator. Sequences as for :func:`prepare_fused_mha_metadata`.

    Row b of the table is that of sequence b: as many pages as ``max_seq_len`` needs (None: as ``cache_loc`` has), −1
    behind the last one, so that a sequence which outgrows its pages is noticed where values are checked.
    """
    which, seq_len, input_pos, seq_start = _sequences(input_ids, seq_len, input_pos)
    width = cache_loc.shape[0]
    if width == 0:
        raise EmptyCacheError(f"cache_loc {tuple(cache_loc.shape)}: the cache has no pages")
    if max_seq_len is not None:
        width = min(width, _pages_for(max_seq_len, page_size))
    first = pages_per_seq.cumsum(0, dtype=torch.int32) - pages_per_seq
    counts = pages_per_seq[which, None]
    slot = torch.arange(width, dtype=torch.int32, device=cache_loc.device)
    pages = cache_loc[(first[which, None] + slot).clamp(max=cache_loc.shape[0] - 1)]
    page_table = torch.where(slot < counts, pages, -1)
    rows = torch.arange(seq_start.shape[0], dtype=torch.int32, device=cache_loc.device)
    return input_pos, rows, seq_len, seq_start, page_table, width * page_size


def _fake_sdpa(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> torch.Tensor:
    check_devices({"query": query, "key": key, "value": value}, "query")
    batch, heads, seqlen = query.shape[:3]
    return query.new_empty((batch, seqlen, heads, value.shape[-1])).transpose(1, 2)


@_operator(fake=_fake_sdpa)
def scaled_dot_product_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> torch.Tensor:
    """torch's function of this name as an operator, by the kernels of this package: query (batch, heads, seqlen_q,
    head_dim), key and value (batch, heads_kv, seqlen_k, …).

    ``is_causal``: query i sees keys up to i, also where the lengths differ, as torch has it and ``flash_attn_func`` has
    not. Raises UnsupportedArgumentError for ``attn_mask`` and ``dropout_p``.
    """
    if attn_mask is not None:
        raise UnsupportedArgumentError("attn_mask", attn_mask)
    if dropout_p != 0.0:
        raise UnsupportedArgumentError("dropout_p", dropout_p)
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_dims(name, tensor, 4, "(batch, heads, seqlen, head_dim)")
    _check_no_gradient(query, key, value)
    window: tuple[int | None, int | None] = (None, None)
    if is_causal:
        # keys behind the last query are visible to none; without them the diagonal of the kernels is never negative
        key, value = (t[:, :, : query.shape[2]] for t in (key, value))
        window = (None, query.shape[2] - key.shape[2])
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    out, _ = engine.attention(prepare(q, k, v, window_size=window, softmax_scale=scale, names=_SDPA_NAMES))
    return out.transpose(1, 2)


def _with_heads(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor
) -> list[torch.Tensor]:
    """q, k and v as (b, s, heads, head_dim)."""
    _check_no_gradient(q, k, v, k_cache, v_cache)
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        check_dims(name, cache, 4, _CACHE)
    if q.dim() not in (3, 4):
        raise ShapeError(f"q has shape {tuple(q.shape)}: (b, s, heads · head_dim) or (b, s, heads, head_dim) is needed")
    heads_kv, head_dim = k_cache.shape[2:]
    elements = math.prod(q.shape[2:])
    if heads_kv == 0 or head_dim == 0 or elements == 0 or elements % (heads_kv * head_dim):
        raise ShapeError(
            f"q {tuple(q.shape)}: its rows are a multiple of k_cache's {heads_kv} heads of {head_dim} elements"
        )
    split = []
    heads = elements // head_dim
    for name, tensor, shape in (("q", q, (heads, head_dim)), ("k", k, k_cache.shape[2:]), ("v", v, v_cache.shape[2:])):
        expected = shape if tensor.dim() == 4 else (math.prod(shape),)
        check_like(name, tensor, (*q.shape[:2], *expected), tensor.dtype, f"q with {name}_cache")
        split.append(tensor if tensor.dim() == 4 else tensor.unflatten(2, shape))
    for name, tensor, cache in (("k", k, k_cache), ("v", v, v_cache)):
        if tensor.dtype != cache.dtype:
            raise DTypeError(name, tensor.dtype, f"{name}_cache is {str(cache.dtype).removeprefix('torch.')}")
    return split


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    input_pos: torch.Tensor,
    freqs_cis: torch.Tensor | None,
    scale: float | None,
    seq_len: torch.Tensor | None = None,
    seq_start: torch.Tensor | None = None,
    cache_batch_idx: torch.Tensor | None = None,
    page_table: torch.Tensor | None = None,
) -> torch.Tensor:
    """Appends and attends; generate-only or without ``seq_start`` the tokens of a sequence are a row of q."""
    heads_apart = q.dim() == 4
    q, k, v = _with_heads(q, k, v, k_cache, v_cache)
    b, s, heads, _ = q.shape
    sequences = input_pos.shape[0]
    cu_seqlens = None
    if seq_start is not None and (s != 1 or (b <= 1 and b != sequences)):
        q, k, v = (t.flatten(0, 1) for t in (q, k, v))
        # the last sequence owns the rows behind it, beyond its length: they are 0, and no length has to be read
        cu_seqlens = pad(seq_start.to(torch.int32), (0, 1), value=b * s)
    cos, sin = None, None
    if freqs_cis is not None and freqs_cis.numel() > 0:
        check_dims("freqs_cis", freqs_cis, 3, "(positions, rotary_dim / 2, 2)")
        if freqs_cis.shape[2] != 2:
            raise ShapeError(f"freqs_cis {tuple(freqs_cis.shape)}: (positions, rotary_dim / 2, 2) is needed")
        cos, sin = freqs_cis.unbind(2)
    places: dict[str, Any] = {"page_table": page_table, "cache_batch_idx": cache_batch_idx}
    queries: dict[str, Any] = {"cu_seqlens_q": cu_seqlens, "seqused_q": seq_len}
    new: dict[str, Any] = {"cu_seqlens_k_new": cu_seqlens, "seqused_k_new": seq_len}
    new |= {"rotary_cos": cos, "rotary_sin": sin}
    choices = {"causal": True, "num_splits": 0, "softmax_scale": scale, "names": _ATTENTION_NAMES}
    call = prepare(q, k_cache, v_cache, seqused_k=input_pos, **queries, **places, **choices)
    if sequences > 0:
        engine.validate(call)  # nothing is written for attention that cannot be
    shape = (b, s, heads, v.shape[-1])
    if b * s == 0 or sequences == 0:
        out = q.new_zeros(shape)
    else:
        appended = AppendCall(k_cache, v_cache, k, v, input_pos, q=q, **queries, **new, **places, names=_APPEND_NAMES)
        rotated, seqused_k = append(appended)
        out = engine.attention(call.changed(q=rotated, seqused_k=seqused_k))[0].reshape(shape)
    return out if heads_apart else out.flatten(2)


def _pages_for(tokens: int, page_size: int) -> int:
    """Pages that a sequence of at most so many tokens needs, one at least: a page table has columns."""
    return max(-(-tokens // page_size), 1)


def _sequences(
    input_ids: torch.Tensor, seq_len: torch.Tensor, input_pos: torch.Tensor
) -> tuple[slice | torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(an index of the sequences that the metadata is of, seq_len, input_pos, seq_start)."""
    check_dims("input_ids", input_ids, 2, "(b, s)")
    check_dims("seq_len", seq_len, 1, "(batch)")
    batch, s = input_ids.shape
    if s == 1 and batch > seq_len.shape[0]:
        raise ShapeError(f"seq_len {tuple(seq_len.shape)}: a length for each of {batch} sequences is needed")
    which: slice | torch.Tensor = slice(batch if s == 1 else seq_len.shape[0])
    if s == 1 and batch == 1:
        which = (seq_len > 0).int().argmax(0, keepdim=True)
    seq_len = seq_len[which].clone()
    seq_start = seq_len.cumsum(0, dtype=torch.int32) - seq_len
    return which, seq_len, torch.where(seq_len > 0, input_pos[which], 0), seq_start


def _check_batch(input_pos: torch.Tensor, **metadata: torch.Tensor) -> None:
    """Raise DTypeError, ShapeError or DeviceError unless all are int32 (batch) on one device; ``seq_start`` may be
    int64, as torch.cumsum gives it of int32 lengths."""
    check_dims("input_pos", input_pos, 1, "(batch)")
    for name, tensor in metadata.items():
        wide = name == "seq_start" and tensor.dtype == torch.int64
        check_like(name, tensor, input_pos.shape, torch.int64 if wide else torch.int32, "input_pos")
    check_devices({"input_pos": input_pos, **metadata}, "input_pos")


def _check_no_gradient(*tensors: torch.Tensor) -> None:
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise NoBackwardError(
            "an operator for serving with a tensor that requires a gradient: call under torch.no_grad()"
        )
