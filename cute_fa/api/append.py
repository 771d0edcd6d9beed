"""Appending to a KV cache: the operator ``cute_fa::append_kv``, its rules and its launch.

One kernel writes the new keys and values to their slots and rotates keys and queries on the way
(``fa2_sm80.append.kernel``, for every architecture). Nothing is read by the host.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import library

from cute_fa.api import attention as api
from cute_fa.engine import operator as ops
from cute_fa.engine.compiler import compiled
from cute_fa.engine.worlds import simulated_arch, target_of
from cute_fa.semantics.argument_names import ArgumentNames, names_of
from cute_fa.semantics.errors import ArgumentError, DTypeError, Fp8Error, LengthError, ShapeError
from cute_fa.semantics.problem import INT32_MAX
from cute_fa.semantics.tensors import (
    DTYPES,
    batch_of,
    check_cache_places,
    check_devices,
    check_dims,
    check_head_dim,
    check_like,
    check_loadable,
    check_pointers,
    check_separate,
    check_vector,
    check_writable,
    held_lengths,
    keys_of,
    used_within,
)

if TYPE_CHECKING:
    from cute_fa.engine.compiler import CompiledKernel
    from cute_fa.engine.worlds import Target
    from fa2_sm80.append.config import AppendConfig

_MAX_HEAD_DIM = 256
_ROTARY_DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


class AppendCall(NamedTuple):
    """Arguments of the operator, in the schema's order; meanings as for :func:`append_kv`. ``names``: what the caller
    calls them (``cute_fa.semantics.argument_names``)."""

    k_cache: torch.Tensor
    v_cache: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    cache_seqlens: torch.Tensor
    q: torch.Tensor | None = None
    page_table: torch.Tensor | None = None
    cache_batch_idx: torch.Tensor | None = None
    cu_seqlens_q: torch.Tensor | None = None
    cu_seqlens_k_new: torch.Tensor | None = None
    seqused_q: torch.Tensor | None = None
    seqused_k_new: torch.Tensor | None = None
    rotary_cos: torch.Tensor | None = None
    rotary_sin: torch.Tensor | None = None
    rotary_seqlens: torch.Tensor | None = None
    max_seqlen_q: int | None = None
    max_seqlen_k_new: int | None = None
    rotary_interleaved: bool = False
    rotate_each: bool = True
    names: str = ""


_NUM_REQUIRED = 5
_NUM_TENSORS = 15
ops.LIBRARY.define(
    "append_kv(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v, Tensor cache_seqlens, Tensor? q, "
    "Tensor? page_table, Tensor? cache_batch_idx, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k_new, Tensor? seqused_q, "
    "Tensor? seqused_k_new, Tensor? rotary_cos, Tensor? rotary_sin, Tensor? rotary_seqlens, SymInt? max_seqlen_q, "
    "SymInt? max_seqlen_k_new, bool rotary_interleaved, bool rotate_each, str names) -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)


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
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Write new keys and values into a cache, in place, and rotate keys and queries on the way.

    k, v: (batch, seqlen_new, heads_kv, head_dim | head_dim_v), or (total_new, heads_kv, …) with ``cu_seqlens_k_new``;
    fp16 or bf16, as the caches are; autocast casts them and q to that. ``seqused_k_new`` int32 (batch): how many rows
    of each sequence count; one without any writes nothing.
    k_cache, v_cache: (batch, seqlen_cache, heads_kv, …); with ``cache_batch_idx`` int32 (batch), (batch_cache, …) of
    which sequence b's is number cache_batch_idx[b]; or pages (num_pages, page_size, heads_kv, …) with ``page_table``
    int32 (batch, max_pages), of which with ``cache_batch_idx`` sequence b uses row cache_batch_idx[b]. Strides are free
    but for the last, which is 1, and multiples of 16 bytes.
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
        max_seqlen_q=None if max_seqlen_q is None else api.integer("max_seqlen_q", max_seqlen_q),
        max_seqlen_k_new=None if max_seqlen_k_new is None else api.integer("max_seqlen_k_new", max_seqlen_k_new),
        rotary_interleaved=api.flag("rotary_interleaved", rotary_interleaved),
        rotate_each=api.flag("rotate_each", rotate_each),
    )
    for i, (name, tensor) in enumerate(zip(AppendCall._fields, call[:_NUM_TENSORS], strict=False)):
        if tensor is not None or i < _NUM_REQUIRED:
            api.check_tensor(name, tensor)
    k, v, q = autocast_to(k_cache, k, v, q)
    return append(call._replace(k=k, v=v, q=q))


def autocast_to(cache: torch.Tensor, *tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """Under autocast, tensors in the dtype of the cache that they meet, whatever autocast's is: the cache itself is
    written in place and can be no copy."""
    if not autocasts(cache.device) or cache.dtype not in (torch.float16, torch.bfloat16):
        return tensors
    return tuple(t.to(cache.dtype) if t is not None and t.dtype in ops.CAST else t for t in tensors)


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on for tensors there."""
    return device.type in ops.AUTOCAST_DEVICES and torch.is_autocast_enabled(device.type)


def append(call: AppendCall) -> tuple[torch.Tensor | None, torch.Tensor]:
    """What :func:`append_kv` does and returns, for arguments of the operator."""
    q = call.q
    if call.rotary_cos is None and call.rotary_sin is None:
        call = call._replace(q=None, cu_seqlens_q=None, seqused_q=None)
    rotated, seqused_k = torch.ops.cute_fa.append_kv(*call)
    return rotated if call.q is not None else q, seqused_k


@dataclass
class _Plan:
    """What is known of every call with one description; ``names``: what the caller calls the arguments; ``longest``:
    rows of q and of the new keys that a sequence has at most; ``launches``: whether there is any sequence. ``compiled``
    is set by the first launch, after all checks."""

    names: ArgumentNames
    config: AppendConfig
    longest: tuple[int, int]
    launches: bool
    compiled: CompiledKernel | None = None


_plans: dict[tuple, _Plan] = {}


def _append_kv(*arguments):
    call = AppendCall._make(arguments)
    target = target_of(call.k_cache.device)
    key = target, ops.signatures(arguments[:_NUM_TENSORS]), arguments[_NUM_TENSORS:]
    plan = _plans.get(key)
    if plan is None:
        plan = _make_plan(target, call)
        ops.keep(_plans, key, plan)
    if ops.CHECK_VALUES or simulated_arch() is not None:
        _check_values(call)
    tensors = {"k": call.k, "v": call.v, "k_cache": call.k_cache, "v_cache": call.v_cache}
    check_pointers(plan.names.of(tensors | ({} if call.q is None else {"q": call.q})))
    rotated, seqused_k = _outputs(call)
    if not plan.launches:
        return rotated, seqused_k
    if plan.compiled is None:
        plan.compiled = compiled(plan.config)
    plan.compiled.launch(_arguments(call, plan, rotated, seqused_k))
    return rotated, seqused_k


def _outputs(call: AppendCall) -> tuple[torch.Tensor, torch.Tensor]:
    """(rotated q, or an empty tensor, since an operator returns no None; seqused_k)."""
    rotated = call.k.new_empty(0) if call.q is None else call.q.new_empty(call.q.shape)
    return rotated, call.cache_seqlens.new_empty(call.cache_seqlens.shape)


def _arguments(call: AppendCall, plan: _Plan, rotated: torch.Tensor, seqused_k: torch.Tensor) -> tuple:
    """In the order of ``fa2_sm80.append.arguments.AppendArguments``."""
    longest_q, longest_k = plan.longest
    q = None
    if call.q is not None:
        q = (canonical(call.q), call.cu_seqlens_q, call.seqused_q, longest_q)
    rotary = None
    if call.rotary_cos is not None:
        rotary = (call.rotary_cos, call.rotary_sin, call.rotary_seqlens, int(call.rotate_each))
    return (
        q,
        None if call.q is None else canonical(rotated),
        (canonical(call.k), call.cu_seqlens_k_new, call.seqused_k_new, longest_k),
        canonical(call.v),
        (canonical(call.k_cache), canonical(call.v_cache), call.page_table, call.cache_batch_idx),
        call.cache_seqlens,
        seqused_k,
        rotary,
    )


def canonical(tensor: torch.Tensor) -> torch.Tensor:
    return ops.restrided(tensor, ops.odd_strides(tensor))


def _make_plan(target: Target, call: AppendCall) -> _Plan:
    """Every rule that shapes, strides and dtypes can break."""
    # Here, since kernels' folders import this package
    from fa2_sm80.append.config import AppendConfig, launch_objections

    names = names_of(call.names)
    _check_devices(call)
    batch, rows_k = _new_rows(names["k"], call.k, "heads_kv", call.cu_seqlens_k_new, names["cu_seqlens_k_new"])
    sequences = f"{batch} sequences of {names['k' if call.cu_seqlens_k_new is None else 'cu_seqlens_k_new']}"
    dtype = _check_cache(names, call, batch, sequences)
    for name, tensor, size in (
        ("cache_seqlens", call.cache_seqlens, batch),
        ("cu_seqlens_k_new", call.cu_seqlens_k_new, batch + 1),
        ("seqused_k_new", call.seqused_k_new, batch),
        ("seqused_q", call.seqused_q, batch),
        ("cu_seqlens_q", call.cu_seqlens_q, batch + 1),
        ("rotary_seqlens", call.rotary_seqlens, batch),
    ):
        if tensor is not None:
            check_vector(names[name], tensor, torch.int32, (size,), of=sequences)
    rotary_dim = _check_rotary(names, call)
    rows_q = 0
    if call.q is not None:
        batch_q, rows_q = _new_rows(names["q"], call.q, "heads", call.cu_seqlens_q, names["cu_seqlens_q"])
        if batch_q != batch:
            raise ShapeError(f"{names['q']} {tuple(call.q.shape)} is of {batch_q} sequences, the new keys of {batch}")
        check_like(names["q"], call.q, (*call.q.shape[:-1], call.k.shape[-1]), call.k.dtype, names["k"])
        check_loadable(names["q"], call.q)
    config = AppendConfig(
        arch=target.arch,
        dtype=dtype,
        head_dim=call.k.shape[-1],
        head_dim_v=call.v.shape[-1],
        page_size=None if call.page_table is None else call.k_cache.shape[1],
        cache_batch_idx=call.cache_batch_idx is not None,
        query=call.q is not None,
        packed_q=call.cu_seqlens_q is not None,
        packed_k=call.cu_seqlens_k_new is not None,
        used_q=call.seqused_q is not None,
        used_k=call.seqused_k_new is not None,
        rotary_dim=rotary_dim,
        rotary_dtype="fp32" if call.rotary_cos is None else _ROTARY_DTYPES[call.rotary_cos.dtype],
        rotary_interleaved=rotary_dim > 0 and call.rotary_interleaved,
        rotary_seqlens=call.rotary_seqlens is not None,
    )
    longest_q = _longest(names["max_seqlen_q"], call.max_seqlen_q, rows_q, call.cu_seqlens_q is not None)
    longest_k = _longest(names["max_seqlen_k_new"], call.max_seqlen_k_new, rows_k, call.cu_seqlens_k_new is not None)
    rows = {"query heads": longest_q * (0 if call.q is None else call.q.shape[-2])}
    rows["kv heads"] = longest_k * call.k.shape[-2]
    objections = launch_objections(config, rows, batch)
    if objections:
        raise ArgumentError(f"append: {'; '.join(objections)}")
    return _Plan(names, config, (longest_q, longest_k), launches=batch > 0)


def _new_rows(name: str, tensor: torch.Tensor, heads: str, cu_seqlens, offsets: str) -> tuple[int, int]:
    """(batch, rows of the tensor)."""
    if cu_seqlens is None:
        check_dims(name, tensor, 4, f"(batch, seqlen, {heads}, head_dim)")
        return tensor.shape[0], tensor.shape[1]
    check_dims(name, tensor, 3, f"(total, {heads}, head_dim) with {offsets}")
    return batch_of(offsets, cu_seqlens), tensor.shape[0]


def _check_cache(names: ArgumentNames, call: AppendCall, batch: int, sequences: str):
    """The dtype of new rows and caches, which fit each other."""
    k, v, k_cache, v_cache = call.k, call.v, call.k_cache, call.v_cache
    if k.dtype not in DTYPES:
        raise DTypeError(names["k"], k.dtype, "float16 or bfloat16 is needed")
    dtype = DTYPES[k.dtype]
    if dtype.is_fp8:
        raise Fp8Error(f"{names['k']} is {dtype.value}: no kernel writes an fp8 cache")
    for name, tensor in (("v", v), ("k_cache", k_cache), ("v_cache", v_cache)):
        if tensor.dtype != k.dtype:
            raise DTypeError(names[name], tensor.dtype, f"{dtype.value} is needed, as {names['k']} is")
    # the cache is what keys are read from elsewhere, the new keys what asks for them
    reading = names | {"q": f"the new {names['k']}", "k": names["k_cache"], "v": names["v_cache"]}
    places = None, call.page_table, call.cache_batch_idx
    keys_of(ArgumentNames(reading), k, k_cache, v_cache, batch, sequences, *places)
    for name, tensor, cache in (("k", k, k_cache), ("v", v, v_cache)):
        new, old = names[name], names[f"{name}_cache"]
        size = "head_dim" if name == "k" else "head_dim_v"
        check_head_dim(old, cache, size)
        if cache.shape[-1] > _MAX_HEAD_DIM:
            raise ShapeError(f"{old} {tuple(cache.shape)}: {size}={cache.shape[-1]}: at most {_MAX_HEAD_DIM}")
        check_like(new, tensor, (*k.shape[:-2], *cache.shape[-2:]), k.dtype, old)
        check_loadable(new, tensor)
        check_loadable(old, cache)
        check_writable(old, cache)
    written = names.of({"k": k, "v": v} | ({} if call.q is None else {"q": call.q}))
    check_separate(names["k_cache"], k_cache, written)
    check_separate(names["v_cache"], v_cache, written)
    return dtype


def _check_rotary(names: ArgumentNames, call: AppendCall) -> int:
    """How many elements of a head rotate."""
    from fa2_sm80.append.config import ROTARY_STEP

    cos, sin = call.rotary_cos, call.rotary_sin
    name, other = names["rotary_cos"], names["rotary_sin"]
    if (cos is None) != (sin is None):
        raise ArgumentError(f"{name} and {other}: give both or neither")
    if cos is None:
        if call.rotary_seqlens is not None:
            raise ArgumentError(f"{names['rotary_seqlens']} without {name}: nothing rotates")
        return 0
    check_dims(name, cos, 2, "(positions, rotary_dim / 2)")
    if cos.dtype not in _ROTARY_DTYPES:
        raise DTypeError(name, cos.dtype, "float16, bfloat16 or float32 is needed")
    check_like(other, sin, cos.shape, cos.dtype, name)
    rotary_dim = 2 * cos.shape[1]
    if rotary_dim % ROTARY_STEP or not 0 < rotary_dim <= call.k.shape[-1]:
        raise ShapeError(
            f"{name} {tuple(cos.shape)} rotates {rotary_dim} of {call.k.shape[-1]} elements: "
            f"a multiple of {ROTARY_STEP}, at most head_dim, is needed"
        )
    if cos.shape[0] == 0:
        raise ShapeError(f"{name} {tuple(cos.shape)}: at least one position is needed")
    return rotary_dim


def _longest(name: str, given: int | None, rows: int, packed: bool) -> int:
    if given is None:
        return rows
    if not 0 <= given <= INT32_MAX:
        raise ArgumentError(f"{name}={given!r}: an int between 0 and {INT32_MAX}")
    if not packed and given < rows:
        raise LengthError(f"{name}={given}: each sequence has {rows} tokens")
    return min(given, rows)


def _check_values(call: AppendCall) -> None:
    """Check the numbers in tensors: host synchronisations. Raises LengthError, CumulativeSeqlensError, PageTableError
    or CacheIndexError."""
    names = names_of(call.names)
    new = _lengths(names, call.k, call.cu_seqlens_k_new, call.seqused_k_new, "k_new", call.max_seqlen_k_new)
    queries = [0] * len(new)
    if call.q is not None:
        queries = _lengths(names, call.q, call.cu_seqlens_q, call.seqused_q, "q", call.max_seqlen_q)
    capacity = call.k_cache.shape[1] * (1 if call.page_table is None else call.page_table.shape[1])
    holder = "the sequence" if call.page_table is None else f"a row of {names['page_table']}"
    totals = []
    for b, (before, length) in enumerate(zip(call.cache_seqlens.tolist(), new, strict=True)):
        if before < 0 or before + length > capacity:
            raise LengthError(
                f"{names['cache_seqlens']}[{b}]={before} and {length} new tokens: {holder} has room for {capacity}"
            )
        totals.append(before + length)
    check_cache_places(names, call.k_cache, totals, call.page_table, call.cache_batch_idx)
    if call.rotary_cos is not None:
        starts = call.cache_seqlens if call.rotary_seqlens is None else call.rotary_seqlens
        for b, (start, length, query) in enumerate(zip(starts.tolist(), new, queries, strict=True)):
            end = start + max(length, query if call.rotate_each else min(query, 1))
            if start < 0 or end > call.rotary_cos.shape[0]:
                rule = f"{names['rotary_cos']} has {call.rotary_cos.shape[0]}"
                raise LengthError(f"sequence {b} rotates by positions {start} to {end - 1}: {rule}")


def _lengths(
    names: ArgumentNames, tensor: torch.Tensor, cu_seqlens, seqused, name: str, longest: int | None
) -> list[int]:
    """Rows of each sequence that count."""
    if cu_seqlens is not None:
        held = held_lengths(names[f"cu_seqlens_{name}"], cu_seqlens, tensor)
        if longest is not None and max(held, default=0) > longest:
            raise LengthError(f"{names[f'max_seqlen_{name}']}={longest}: a sequence has {max(held)} tokens")
    else:
        held = [tensor.shape[1]] * tensor.shape[0]
    return used_within(names[f"seqused_{name}"], seqused, held)


def _check_devices(call: AppendCall) -> None:
    """Raise DeviceError unless all tensors are where the cache is."""
    names = names_of(call.names)
    check_devices(names.of(dict(zip(AppendCall._fields, call[:_NUM_TENSORS], strict=False))), names["k_cache"])


def _fake(*arguments):
    call = AppendCall._make(arguments)
    _check_devices(call)
    return _outputs(call)


ops.LIBRARY.impl("append_kv", _append_kv, "CompositeExplicitAutograd")
library.register_fake("cute_fa::append_kv", _fake, lib=ops.LIBRARY)
