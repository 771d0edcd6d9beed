"""The torch operator ``cute_fa::append_kv``: its rules and its launch; what it computes says ``cute_fa.append_kv``.

One kernel writes the new keys and values to their slots and rotates keys and queries on the way. Nothing is read by the
host.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from cute_fa.engine import worlds
from cute_fa.engine.contract import AppendTensors
from cute_fa.engine.operators import define, schema
from cute_fa.engine.plan import Plan, odd_strides, plan_of, restrided, signatures
from cute_fa.engine.table import TABLE
from cute_fa.engine.worlds import target_of
from cute_fa.semantics.append_problem import MAX_HEAD_DIM, ROTARY_STEP, AppendProblem
from cute_fa.semantics.argument_names import ArgumentNames, names_of
from cute_fa.semantics.call import APPEND_TENSORS, AppendCall
from cute_fa.semantics.errors import ArgumentError, DTypeError, Fp8Error, LengthError, ShapeError
from cute_fa.semantics.problem import INT32_MAX
from cute_fa.semantics.tensors import (
    DTYPES,
    batch_of,
    check_cache_places,
    check_descale,
    check_descale_values,
    check_devices,
    check_dims,
    check_head_dim,
    check_like,
    check_loadable,
    check_pointers,
    check_row_descale,
    check_separate,
    check_vector,
    check_writable,
    has_rows,
    held_lengths,
    keys_of,
    reached_rows,
    used_within,
)

if TYPE_CHECKING:
    from cute_fa.engine.worlds import Target
    from cute_fa.semantics.types import DType

_CODES = tuple(dtype for dtype, of in DTYPES.items() if of.is_codes)
_ROTARY_DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


@dataclass(kw_only=True)
class AppendPlan(Plan):
    """``strides``: canonical strides of k, v, the caches and q where a dimension of size 1 has odd ones; None if none
    has. ``descales``: the shape of those that are read, by argument."""

    strides: tuple[tuple[int, ...] | None, ...] | None
    descales: dict[str, tuple[int, ...]]


def append_kv(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(q rotated, or an empty tensor without q; tokens in the cache now) for the fields of AppendCall."""
    call = AppendCall._make(arguments)
    target = target_of(call.k_cache.device)
    key = ("append", target, signatures(arguments[:APPEND_TENSORS]), arguments[APPEND_TENSORS:])
    plan = plan_of(key, _make_plan, target, call)
    if worlds.checks_values():
        _check_separate(plan.names, call)
        _check_values(call)
    tensors = {"k": call.k, "v": call.v, "k_cache": call.k_cache, "v_cache": call.v_cache}
    check_pointers(plan.names.of(tensors | ({} if call.q is None else {"q": call.q})))
    rotated, seqused_k = _outputs(call)
    if plan.launches:
        *rows, q = call.k, call.v, call.k_cache, call.v_cache, call.q
        if plan.strides is not None:
            *rows, q = map(restrided, (*rows, q), plan.strides)
        if plan.descales:
            call = call._replace(**{name: getattr(call, name).expand(shape) for name, shape in plan.descales.items()})
        plan.launch((*rows, q, None if q is None else rotated, seqused_k, call))
    return rotated, seqused_k


def _outputs(call: AppendCall) -> tuple[torch.Tensor, torch.Tensor]:
    """(rotated q, or an empty tensor, since an operator returns no None; seqused_k)."""
    rotated = call.k.new_empty(0) if call.q is None else call.q.new_empty(call.q.shape)
    return rotated, call.cache_seqlens.new_empty(call.cache_seqlens.shape)


def _make_plan(target: Target, call: AppendCall) -> AppendPlan:
    """Every rule that shapes, strides and dtypes can break."""
    names = names_of(call.names)
    _check_devices(call)
    batch, rows_k = _new_rows(names["k"], call.k, "heads_kv", call.cu_seqlens_k_new, names["cu_seqlens_k_new"])
    sequences = f"{batch} sequences of {names['k' if call.cu_seqlens_k_new is None else 'cu_seqlens_k_new']}"
    dtypes = _check_dtypes(names, call)
    _check_cache(names, call, batch, sequences)
    _check_descales(names, call, batch, sequences)
    _check_separate(names, call)
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
    longest_q = _longest(names["max_seqlen_q"], call.max_seqlen_q, rows_q, call.cu_seqlens_q is not None)
    longest_k = _longest(names["max_seqlen_k_new"], call.max_seqlen_k_new, rows_k, call.cu_seqlens_k_new is not None)
    problem = AppendProblem(
        arch=target.arch,
        dtype=dtypes[0],
        dtype_k=dtypes[1],
        dtype_v=dtypes[2],
        batch=max(batch, 1),
        tokens_k=longest_k,
        tokens_q=longest_q,
        num_heads=0 if call.q is None else call.q.shape[-2],
        num_heads_kv=call.k.shape[-2],
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
        rotary_dtype=None if call.rotary_cos is None else _ROTARY_DTYPES[call.rotary_cos.dtype],
        rotary_interleaved=rotary_dim > 0 and call.rotary_interleaved,
        rotary_seqlens=call.rotary_seqlens is not None,
        k_page_descale=has_rows(call.k_descale),
        v_page_descale=has_rows(call.v_descale),
        k_row_descale=call.k_row_descale is not None,
        v_row_descale=call.v_row_descale is not None,
    )
    strides = tuple(map(odd_strides, (call.k, call.v, call.k_cache, call.v_cache, call.q)))
    return AppendPlan(
        kind=AppendTensors,
        problem=problem,
        names=names,
        kernel=TABLE.lookup(problem),
        target=target,
        launches=batch > 0,
        strides=strides if any(strides) else None,
        descales=_expanded_descales(call, batch),
    )


def _new_rows(name: str, tensor: torch.Tensor, heads: str, cu_seqlens, offsets: str) -> tuple[int, int]:
    """(batch, rows of the tensor)."""
    if cu_seqlens is None:
        check_dims(name, tensor, 4, f"(batch, seqlen, {heads}, head_dim)")
        return tensor.shape[0], tensor.shape[1]
    check_dims(name, tensor, 3, f"(total, {heads}, head_dim) with {offsets}")
    return batch_of(offsets, cu_seqlens), tensor.shape[0]


def _check_dtypes(names: ArgumentNames, call: AppendCall) -> tuple[DType, DType, DType]:
    """Those of new keys and of both caches, which fit each other and the new values."""
    k, k_cache, v_cache = call.k, call.k_cache, call.v_cache
    if k.dtype not in DTYPES:
        raise DTypeError(names["k"], k.dtype, f"{_either(*DTYPES)} is needed")
    like_k, codes = f"as {names['k']} is", f"as {names['k_cache']} is of codes"
    if DTYPES[k.dtype].is_codes:
        asked = [
            ("k_cache", (k.dtype,), like_k),
            ("v_cache", _CODES, codes),
            ("v", (v_cache.dtype,), f"as {names['v_cache']} is"),
        ]
    elif k_cache.dtype in _CODES:
        asked = [("v", (k.dtype,), like_k), ("v_cache", _CODES, codes)]
    else:
        asked = [
            ("v", (k.dtype,), like_k),
            ("k_cache", (k.dtype, *_CODES), f"for {names['k']}"),
            ("v_cache", (k.dtype,), like_k),
        ]
    for name, dtypes, why in asked:
        dtype = getattr(call, name).dtype
        if dtype not in dtypes:
            raise DTypeError(names[name], dtype, f"{_either(*dtypes)} is needed, {why}")
    return DTYPES[k.dtype], DTYPES[k_cache.dtype], DTYPES[v_cache.dtype]


def _either(*dtypes: torch.dtype) -> str:
    *others, last = (str(dtype).removeprefix("torch.") for dtype in dtypes)
    return f"{', '.join(others)} or {last}" if others else last


def _check_cache(names: ArgumentNames, call: AppendCall, batch: int, sequences: str) -> None:
    """Shapes and strides of new rows and caches fit each other."""
    k, v, k_cache, v_cache = call.k, call.v, call.k_cache, call.v_cache
    # the cache is what keys are read from elsewhere, the new keys what asks for them
    reading = names | {"q": f"the new {names['k']}", "k": names["k_cache"], "v": names["v_cache"]}
    places = None, call.page_table, call.cache_batch_idx
    keys_of(ArgumentNames(reading), k, k_cache, v_cache, batch, sequences, *places)
    for name, tensor, cache in (("k", k, k_cache), ("v", v, v_cache)):
        new, old = names[name], names[f"{name}_cache"]
        size = "head_dim" if name == "k" else "head_dim_v"
        check_head_dim(old, cache, size)
        if cache.shape[-1] > MAX_HEAD_DIM:
            raise ShapeError(f"{old} {tuple(cache.shape)}: {size}={cache.shape[-1]}: at most {MAX_HEAD_DIM}")
        check_like(new, tensor, (*k.shape[:-2], *cache.shape[-2:]), tensor.dtype, old)
        check_loadable(new, tensor)
        check_loadable(old, cache)
        check_writable(old, cache)


def _check_separate(names: ArgumentNames, call: AppendCall) -> None:
    """What is written shares no memory with what is read."""
    read = {name: getattr(call, name) for name in ("k", "v", "q", "cache_seqlens", "k_descale", "v_descale")}
    given = names.of({name: tensor for name, tensor in read.items() if tensor is not None})
    written = {"k_cache": call.k_cache, "v_cache": call.v_cache}
    for name, descale in (("k_descale", call.k_row_descale), ("v_descale", call.v_row_descale)):
        if descale is not None:
            check_separate(names[name], descale, given | names.of(written))
            written[name] = descale
    for name in ("k_cache", "v_cache"):
        check_separate(names[name], written[name], given)


def _check_descales(names: ArgumentNames, call: AppendCall, batch: int, sequences: str) -> None:
    """There are descales where rows are rounded to codes, and only there: fp32, one for each sequence and head, or one,
    or of the cache's pages or rows."""
    shape = batch, call.k.shape[-2]
    for rows in ("k", "v"):
        name, descale = names[f"{rows}_descale"], getattr(call, f"{rows}_descale")
        written = getattr(call, f"{rows}_row_descale")
        new, old, like = getattr(call, rows), getattr(call, f"{rows}_cache"), names[f"{rows}_cache"]
        is_16_bit, cache = not DTYPES[new.dtype].is_codes, f"{like} in {DTYPES[old.dtype].value}"
        if is_16_bit and DTYPES[old.dtype].is_codes:
            if descale is None and written is None:
                rule = f"{cache} takes {names[rows]} in {DTYPES[new.dtype].value} divided by it"
                raise ArgumentError(f"{name} is missing: {rule}")
            if written is not None:
                _check_written_descale(names, call, rows, written)
            elif has_rows(descale):
                check_row_descale(name, descale, like, old)
            else:
                check_descale(name, descale, shape, f"{sequences} and {shape[1]} heads of {names[rows]}")
        elif descale is not None or written is not None:
            what = f"{cache}: only fp8 and int8 caches have descales"
            if not is_16_bit:
                what = f"{names[rows]} in {DTYPES[new.dtype].value}: codes are copied as they are"
            raise Fp8Error(f"{name} with {what}")


def _check_written_descale(names: ArgumentNames, call: AppendCall, rows: str, written: torch.Tensor) -> None:
    """Each row and head of the cache has a place of its own for its descale."""
    name, cache, like = names[f"{rows}_descale"], getattr(call, f"{rows}_cache"), names[f"{rows}_cache"]
    check_row_descale(name, written, like, cache)
    whole = (*cache.shape[:3], 1)
    if tuple(written.shape) != whole:
        rule = f"{whole} is needed where descales are written, one for each row and head of {like}"
        raise ShapeError(f"{name} {tuple(written.shape)}: {rule}")
    check_writable(name, written)


def _expanded_descales(call: AppendCall, batch: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the descales that are read."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, cache in (("k_descale", call.k_cache), ("v_descale", call.v_cache)):
        descale = getattr(call, name)
        if descale is not None:
            shapes[name] = (*cache.shape[:3], 1) if has_rows(descale) else (batch, cache.shape[2])
    return shapes


def _check_rotary(names: ArgumentNames, call: AppendCall) -> int:
    """How many elements of a head rotate."""
    cos, sin = call.rotary_cos, call.rotary_sin
    name, other = names["rotary_cos"], names["rotary_sin"]
    if (cos is None) != (sin is None):
        raise ArgumentError(f"{name} and {other}: give both or neither")
    if cos is None:
        if call.rotary_seqlens is not None:
            raise ArgumentError(f"{names['rotary_seqlens']} without {name}: nothing rotates")
        return 0
    for rotated, tensor in names.of({"k": call.k, "q": call.q}).items():
        if tensor is not None and tensor.dtype in _CODES:
            rows = f"{rotated} in {DTYPES[tensor.dtype].value}"
            raise Fp8Error(f"{name} with {rows}: rows in fp16 or bf16 rotate, codes do not")
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
    for name, cache in (("k_descale", call.k_cache), ("v_descale", call.v_cache)):
        descale = getattr(call, name)
        if has_rows(descale):
            descale = reached_rows(descale, cache, totals, call.page_table, call.cache_batch_idx)
        if descale is not None:
            check_descale_values(names[name], descale)
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
    check_devices(names.of(call.tensors()), names["k_cache"])


def _fake(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    call = AppendCall._make(arguments)
    _check_devices(call)
    return _outputs(call)


WRITTEN = ("k_cache", "v_cache", "k_row_descale", "v_row_descale")
define("append_kv", schema(AppendCall, written=WRITTEN), "(Tensor, Tensor)", append_kv, _fake)
