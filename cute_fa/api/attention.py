"""The public functions. They accept the argument names of FlashAttention 2, 3 and 4 alike.

What attention means here (masks, biases, LSE, empty rows) is written down in ``cute_fa.reference``.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal, TypedDict, get_args, get_type_hints, overload

import torch
from torch.compiler import is_dynamo_compiling
from typing_extensions import Unpack

from cute_fa.api.peers import PeerArguments, check_peers, too_many
from cute_fa.api.scheduler_metadata import check_scheduler_metadata
from cute_fa.api.values import check_tensor, descale, flag, integer, number
from cute_fa.engine import attention as engine
from cute_fa.engine.environment import switch
from cute_fa.semantics.argument_names import names_of, spelled
from cute_fa.semantics.call import NO_EXTRAS, Call, Extras, Options
from cute_fa.semantics.errors import ArgumentError, DTypeError
from cute_fa.semantics.problem import USUAL_CHUNK, LiteralWindow, normalize_window
from cute_fa.semantics.tensors import DTYPES, used_lengths
from cute_fa.semantics.types import PersistentMode

# Whether calls that leave it open are in batch-invariant mode.
BATCH_INVARIANT = switch("CUTE_FA_BATCH_INVARIANT", default=False)
_LOWER = (torch.float16, torch.bfloat16)
_PAIRS = (tuple, list, LiteralWindow)
# What callers of flash_attn_varlen_func call arguments of the operator.
_BLOCK_TABLE = spelled(page_table="block_table")
# The same where differences of cu_seqlens_k are the lengths of a paged cache.
_PAGED_LENGTHS = {
    "": spelled(seqused_k="cu_seqlens_k.diff()"),
    _BLOCK_TABLE: spelled(seqused_k="cu_seqlens_k.diff()", page_table="block_table"),
}


Result = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


class SharedOptions(PeerArguments, total=False):
    """Keyword arguments of all the public functions, for type checkers; see :func:`flash_attn_func`."""

    softmax_scale: float | None
    causal: bool
    window_size: tuple[int | None, int | None]
    sink_tokens: int
    softcap: float | None
    alibi_slopes: torch.Tensor | None
    learnable_sink: torch.Tensor | None
    q_descale: torch.Tensor | float | None
    k_descale: torch.Tensor | float | None
    v_descale: torch.Tensor | float | None
    num_splits: int
    batch_invariant: bool | None
    seqlen_k_per_split: int | None
    pack_gqa: bool | None
    out: torch.Tensor | None
    out_dtype: torch.dtype | None
    promote_every: int | None
    family: str | None


class EachOptions(SharedOptions, total=False):
    """Those of :func:`flash_attn_func` and :func:`flash_attn_varlen_func`."""

    persistent: PersistentMode | str
    deterministic: bool


class AttentionOptions(EachOptions, total=False):
    """Keyword arguments of :func:`flash_attn_func`, for type checkers; see there."""

    v_layout: str


class LengthOptions(TypedDict, total=False):
    """Those of functions for sequences of lengths of their own."""

    seqused_q: torch.Tensor | None
    page_table: torch.Tensor | None
    block_table: torch.Tensor | None
    tree_mask: torch.Tensor | None
    scheduler_metadata: torch.Tensor | None


class VarlenOptions(EachOptions, LengthOptions, total=False):
    """Keyword arguments of :func:`flash_attn_varlen_func`, for type checkers; see there."""

    seqused_k: torch.Tensor | None


@overload
def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    return_lse: Literal[False] = False,
    return_attn_probs: Literal[False] = False,
    return_softmax_lse: Literal[False] = False,
    **options: Unpack[AttentionOptions],
) -> torch.Tensor: ...
@overload
def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    return_lse: Literal[True],
    return_attn_probs: bool = ...,
    return_softmax_lse: bool = ...,
    **options: Unpack[AttentionOptions],
) -> tuple[torch.Tensor, torch.Tensor]: ...
@overload
def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    return_attn_probs: Literal[True],
    return_lse: bool = ...,
    return_softmax_lse: bool = ...,
    **options: Unpack[AttentionOptions],
) -> tuple[torch.Tensor, torch.Tensor]: ...
@overload
def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    return_softmax_lse: Literal[True],
    return_lse: bool = ...,
    return_attn_probs: bool = ...,
    **options: Unpack[AttentionOptions],
) -> tuple[torch.Tensor, torch.Tensor]: ...
@overload
def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    return_lse: bool = ...,
    return_attn_probs: bool = ...,
    return_softmax_lse: bool = ...,
    **options: Unpack[AttentionOptions],
) -> Result: ...
def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *by_position: Any,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (None, None),
    sink_tokens: int = 0,
    softcap: float | None = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    learnable_sink: torch.Tensor | None = None,
    q_descale: torch.Tensor | float | None = None,
    k_descale: torch.Tensor | float | None = None,
    v_descale: torch.Tensor | float | None = None,
    num_splits: int = 1,
    batch_invariant: bool | None = None,
    seqlen_k_per_split: int | None = None,
    pack_gqa: bool | None = None,
    persistent: PersistentMode | str = "auto",
    deterministic: bool = False,
    return_lse: bool = False,
    return_attn_probs: bool = False,
    return_softmax_lse: bool = False,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    promote_every: int | None = None,
    v_layout: str = "head_dim",
    family: str | None = None,
    **peers: Any,
) -> Result:
    """Attention over sequences of one length.

    q: (batch, seqlen_q, heads, head_dim); k: (batch, seqlen_k, heads_kv, head_dim); v: (batch, seqlen_k, heads_kv,
    head_dim_v), fp16 or bf16, or all three fp8 (e4m3, e5m2, mixed or not), or k and v alone codes (fp8, int8, mixed or
    not), see ``q_descale``. heads is a multiple of heads_kv: query head h uses kv head h // (heads / heads_kv). The
    last dimension is contiguous, other strides and the first address are multiples of 16 bytes, stride 0 included.

    softmax_scale: 1/√head_dim by default.
    causal: query i sees keys up to i + seqlen_k − seqlen_q.
    window_size: (left, right) in tokens around that diagonal, both inclusive; None or −1 is infinite.
    sink_tokens: the first keys stay visible although they lie left of the window.
    softcap: scores become softcap·tanh(score/softcap); 0 or None is off.
    alibi_slopes: fp32 (heads) or (batch, heads): −slope·|i + seqlen_k − seqlen_q − j| is added. Finite, and so small
        that no bias overflows fp32: a head's results may be NaN otherwise.
    learnable_sink: (heads), a logit that takes part in the softmax and has no value; −inf for none. +inf or NaN make a
        head's results NaN.
    q_descale, k_descale, v_descale: fp32 (batch, heads_kv) of any strides, or one number: what the codes of q, k
        and v are multiplied by; 1 by default. Numbers between 2^-32 and 2^32. Those of k and v may also be (batch,
        heads_kv, blocks): one for each 128 keys of a sequence, from its first one on; or, of dense k and v, caches and
        pages, of four dimensions that broadcast against them: (…, rows, heads_kv, 1), one for each row and head, or
        (num_pages, 1, heads_kv, 1), one for each page and head, of any strides. ``cute_fa.fp8`` quantises.
    num_splits: parts that the keys are split into; 1, or 0 to let the kernel choose.
    batch_invariant: the bits of a token's O and LSE depend on its query and on the keys and values that it sees alone:
        the same in a prompt, a chunk of it and decoding, in any batch, from pages or not (docs/batch_invariance.md).
        None: as CUTE_FA_BATCH_INVARIANT=1 says when cute_fa is imported. Gradients are as without it.
    seqlen_k_per_split: keys of a chunk, of which O is added up in that mode, a multiple of 64; it changes bits. 1024 by
        default; given alone it turns the mode on.
    pack_gqa: whether query heads of one kv head share a tile; None lets the kernel choose, as "auto" does below.
    persistent: "auto", "on" (a CTA computes one tile after the other) or "off" (one CTA a tile).
    deterministic: bit-identical gradients between runs, also asked for by torch.use_deterministic_algorithms(True); the
        forward always is.
    return_lse (return_attn_probs, return_softmax_lse): also return the LSE.
    out: where to write the result; it then has no gradient.
    out_dtype: of fp8 inputs float16 or bfloat16; by default that of ``out``, else bfloat16. Of others theirs.
    promote_every: wgmma of fp8 whose sums stay in the tensor cores' accumulator, which has few bits, see docs/fp8.md; 1
        to 5 where registers allow, None lets the kernel choose.
    v_layout: "head_dim", or for fp8 "key_major": v has the same shape, but its keys are contiguous in memory and the
        other strides multiples of 16 bytes. It is then not transposed on the way.
    family: ``fa2``, ``fa3`` or ``fa4`` for kernels of that family alone; the best there is by default.

    Other arguments of FlashAttention 2, 3 and 4 are accepted at their defaults and raise UnsupportedArgumentError
    otherwise. Returns out (batch, seqlen_q, heads, head_dim_v), or (out, lse) with lse fp32 (batch, heads, seqlen_q),
    natural logarithm, −inf where nothing is visible. Raises a subclass of ``cute_fa.errors.CuteFaError`` for whatever
    breaks a rule, before anything runs.
    """
    if by_position:
        raise too_many("flash_attn_func", "q, k and v", by_position)
    if peers:
        check_peers(peers)
    extras = NO_EXTRAS
    if not alibi_slopes is learnable_sink is q_descale is k_descale is v_descale is None:
        descales = _descales(q, q_descale, k_descale, v_descale)
        extras = Extras(alibi_slopes=alibi_slopes, learnable_sink=_widened(learnable_sink), **descales)
    options = _options(
        window_size,
        causal,
        None,
        None,
        softmax_scale,
        sink_tokens,
        softcap,
        num_splits,
        family,
        pack_gqa,
        persistent,
        deterministic,
        out_dtype,
        promote_every,
        v_layout,
        chunk_keys(batch_invariant, seqlen_k_per_split),
        "",
    )
    return _attention(q, k, v, extras, options, out, return_lse, return_attn_probs, return_softmax_lse)


@overload
def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    *,
    return_lse: Literal[False] = False,
    return_attn_probs: Literal[False] = False,
    return_softmax_lse: Literal[False] = False,
    **options: Unpack[VarlenOptions],
) -> torch.Tensor: ...
@overload
def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    *,
    return_lse: Literal[True],
    return_attn_probs: bool = ...,
    return_softmax_lse: bool = ...,
    **options: Unpack[VarlenOptions],
) -> tuple[torch.Tensor, torch.Tensor]: ...
@overload
def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    *,
    return_attn_probs: Literal[True],
    return_lse: bool = ...,
    return_softmax_lse: bool = ...,
    **options: Unpack[VarlenOptions],
) -> tuple[torch.Tensor, torch.Tensor]: ...
@overload
def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    *,
    return_softmax_lse: Literal[True],
    return_lse: bool = ...,
    return_attn_probs: bool = ...,
    **options: Unpack[VarlenOptions],
) -> tuple[torch.Tensor, torch.Tensor]: ...
@overload
def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    *,
    return_lse: bool = ...,
    return_attn_probs: bool = ...,
    return_softmax_lse: bool = ...,
    **options: Unpack[VarlenOptions],
) -> Result: ...
def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    *by_position: Any,
    seqused_q: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    page_table: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    tree_mask: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (None, None),
    sink_tokens: int = 0,
    softcap: float | None = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    learnable_sink: torch.Tensor | None = None,
    q_descale: torch.Tensor | float | None = None,
    k_descale: torch.Tensor | float | None = None,
    v_descale: torch.Tensor | float | None = None,
    scheduler_metadata: torch.Tensor | None = None,
    num_splits: int = 1,
    batch_invariant: bool | None = None,
    seqlen_k_per_split: int | None = None,
    pack_gqa: bool | None = None,
    persistent: PersistentMode | str = "auto",
    deterministic: bool = False,
    return_lse: bool = False,
    return_attn_probs: bool = False,
    return_softmax_lse: bool = False,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    promote_every: int | None = None,
    family: str | None = None,
    **peers: Any,
) -> Result:
    """Attention over sequences of different lengths; arguments not named here are those of :func:`flash_attn_func`.

    q: (total_q, heads, head_dim) with ``cu_seqlens_q`` int32 (batch + 1): sequence b has rows cu_seqlens_q[b] up to
    cu_seqlens_q[b + 1]; without it (batch, seqlen_q, heads, head_dim). k and v likewise with ``cu_seqlens_k``, or pages
    (num_pages, page_size, heads_kv, …) with ``page_table`` (``block_table``) int32 (batch, max_pages), which lists each
    sequence's pages in order; page_size is a power of two from 1 to 1024.
    max_seqlen_q, max_seqlen_k: at least the longest sequence's length; None takes what the tensor could hold.
    seqused_q, seqused_k: int32 (batch), how many rows of each sequence count, all by default. Beyond seqused_q O is 0
    and LSE −inf. A paged cache takes the differences of ``cu_seqlens_k`` in the place of ``seqused_k``; with neither,
    all max_pages · page_size rows of each sequence count. Entries of page_table beyond the lengths are not read.
    tree_mask: int32 (batch, seqlen_q, words), for packed q (total_q, words), at least ⌈max_seqlen_q / 32⌉ words: the
    queries of a sequence, at most 128, are draft tokens, its last keys, and bit j of word w says that a query sees
    draft 32 · w + j. The caller sets those of the query itself and its ancestors. Keys before the drafts are seen as
    ever; causal and windows hide drafts as they do other keys. No gradient: raises NoBackwardError if one is asked for.
    scheduler_metadata: of ``cute_fa.compat.fa3.get_scheduler_metadata`` for this batch; changes nothing.

    Returns out (total_q, heads, head_dim_v), or (out, lse) with lse fp32 (heads, total_q); for unpacked q as
    :func:`flash_attn_func`. Rows of q after the last sequence are not written. What lies outside the lengths may hold
    anything, NaN included. Values in device tensors are checked with ``CUTE_FA_CHECK=1`` and when simulating.
    """
    if by_position:
        raise too_many("flash_attn_varlen_func", "what stands before seqused_q", by_position)
    if peers:
        check_peers(peers)
    if page_table is not None and block_table is not None:
        raise ArgumentError("page_table and block_table: two names of one argument, give one")
    names = ""
    if block_table is not None:
        page_table, names = block_table, _BLOCK_TABLE
    if page_table is not None and isinstance(cu_seqlens_k, torch.Tensor):
        if seqused_k is None:
            seqused_k, names = used_lengths(cu_seqlens_k), _PAGED_LENGTHS[names]
        cu_seqlens_k = None
    if scheduler_metadata is not None:
        check_tensor("q", q)
        check_scheduler_metadata(scheduler_metadata, q, cu_seqlens_q)
    lengths = (cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k)
    sink = None if learnable_sink is None else _widened(learnable_sink)
    # Extras by position, made in a third of the time that its own constructor takes.
    extras = tuple.__new__(Extras, (*lengths, page_table, None, None, alibi_slopes, sink, *[None] * 8, tree_mask))
    if not q_descale is k_descale is v_descale is None:
        extras = extras._replace(**_descales(q, q_descale, k_descale, v_descale))
    options = _options(
        window_size,
        causal,
        max_seqlen_q,
        max_seqlen_k,
        softmax_scale,
        sink_tokens,
        softcap,
        num_splits,
        family,
        pack_gqa,
        persistent,
        deterministic,
        out_dtype,
        promote_every,
        "head_dim",
        chunk_keys(batch_invariant, seqlen_k_per_split),
        names,
    )
    return _attention(q, k, v, extras, options, out, return_lse, return_attn_probs, return_softmax_lse)


# How an option becomes one of ``Options``, by its type there.
_KINDS = {int: integer, float: number, bool: flag}
_HINTS = {name: get_args(hint) or (hint,) for name, hint in get_type_hints(Options).items()}
_CHOICES = tuple(name for name in Options._fields if not name.startswith("window_"))
# What callers of :func:`prepare` may leave out: the defaults of the public functions.
_CHOICE_DEFAULTS = tuple(Options._field_defaults[name] for name in _CHOICES)


def chunk_keys(batch_invariant: Any, seqlen_k_per_split: Any) -> Any:
    """Keys of a chunk, 0 where batch-invariant mode is off; raises ArgumentError where one argument says so and the
    other does not."""
    if batch_invariant is not None:
        batch_invariant = flag("batch_invariant", batch_invariant)
    if seqlen_k_per_split is None:
        on = BATCH_INVARIANT if batch_invariant is None else batch_invariant
        return USUAL_CHUNK if on else 0
    keys = integer("seqlen_k_per_split", seqlen_k_per_split)
    if batch_invariant is not None and batch_invariant != (keys != 0):
        rule = "the mode needs chunks" if batch_invariant else "there are no chunks"
        raise ArgumentError(f"seqlen_k_per_split={keys} with batch_invariant={batch_invariant}: {rule}")
    return keys


def prepare(q: Any, k: Any, v: Any, *, causal: Any = False, window_size: Any = (None, None), **given: Any) -> Call:
    """The call of arguments of the public functions and fields of ``Extras``: kinds checked, since the dispatcher's own
    complaints name no rule, and choices normalised. ``names``: what the caller calls them
    (:mod:`cute_fa.semantics.argument_names`)."""
    given["learnable_sink"] = _widened(given.get("learnable_sink"))
    given |= _descales(q, *(given.get(f"{name}_descale") for name in "qkv"))
    given["seqlen_k_per_split"] = chunk_keys(given.pop("batch_invariant", None), given.get("seqlen_k_per_split"))
    extras = Extras._make(map(given.pop, Extras._fields, NO_EXTRAS))
    options = _options(window_size, causal, *map(given.pop, _CHOICES, _CHOICE_DEFAULTS))
    if given:
        raise TypeError(f"prepare: no such argument: {', '.join(sorted(given))}")
    return _checked(Call(q, k, v, extras, options))


def _widened(sink: Any) -> Any:
    """A sink of lower precision in float32."""
    return sink.float() if isinstance(sink, torch.Tensor) and sink.dtype in _LOWER else sink


def _descales(q: Any, q_descale: Any, k_descale: Any, v_descale: Any) -> dict[str, Any]:
    """By name, numbers as tensors."""
    given = {"q_descale": q_descale, "k_descale": k_descale, "v_descale": v_descale}
    return {name: descale(name, value, q) for name, value in given.items()}


def _checked(call: Call) -> Call:
    """The call, its tensors known to be such."""
    for name, tensor in call.named_tensors().items():
        if tensor is not None or name in "qkv":
            check_tensor(name, tensor, call.options.names)
    return call


def _options(window_size: Any, *choices: Any) -> Options:
    """``_normalized``, which is asked once for values that are equal and of the same types."""
    kind: Any = type(window_size)
    if not is_dynamo_compiling() and kind in _PAIRS and len(window_size) == 2:
        try:
            return _remembered(kind, *window_size, *choices)
        except TypeError:  # something has no hash, or is no constant
            pass
    return _normalized(window_size, *choices)


@lru_cache(maxsize=4096, typed=True)
def _remembered(kind: type, left: Any, right: Any, *choices: Any) -> Options:
    if any(isinstance(value, torch.Tensor) for value in (left, right, *choices)):
        raise TypeError("a tensor's hash is that of the object, whatever number it holds now")
    return _normalized(LiteralWindow(left, right) if kind is LiteralWindow else (left, right), *choices)


def _normalized(window_size: Any, causal: Any, *choices: Any) -> Options:
    """``choices``: values of _CHOICES."""
    called = names_of(choices[-1])
    left, right = normalize_window(window_size, flag("causal", causal))
    normalized = {name: _choice(called[name], name, value) for name, value in zip(_CHOICES, choices, strict=True)}
    return Options(window_left=left, window_right=right, **normalized)


def _choice(called: str, name: str, value: Any) -> Any:
    """One option, of the type that Options declares; ``called``: by the caller."""
    if name == "softcap" and value is None:
        return 0.0
    if name == "persistent":
        if isinstance(value, PersistentMode):
            return value.value
        return value if isinstance(value, str) else PersistentMode.named(value).value
    if name == "out_dtype" and value is not None:
        if value not in _LOWER:
            raise DTypeError(called, value, "torch.float16 or torch.bfloat16 is needed")
        return DTYPES[value].value
    kinds = _HINTS[name]
    if value is None and type(None) in kinds:
        return None
    if str in kinds:
        if not isinstance(value, str):
            raise ArgumentError(f"{called}={value!r}: a name")
        return value
    return _KINDS[kinds[0]](called, value)


def _attention(
    q: Any,
    k: Any,
    v: Any,
    extras: Extras,
    options: Options,
    out: Any,
    return_lse: Any,
    return_attn_probs: Any,
    return_softmax_lse: Any,
) -> Result:
    if not (type(return_lse) is type(return_attn_probs) is type(return_softmax_lse) is bool):
        return_lse = flag("return_lse", return_lse)
        return_attn_probs = flag("return_attn_probs", return_attn_probs)
        return_softmax_lse = flag("return_softmax_lse", return_softmax_lse)
    done = engine.again(q, k, v, extras, options) if out is None else None
    if done is not None:
        out, lse = done
    elif out is None:
        out, lse = engine.dispatched(_checked(Call(q, k, v, extras, options)))
    else:
        call = _checked(Call(q, k, v, extras, options))
        check_tensor("out", out)
        if torch.is_grad_enabled() and any(t.requires_grad for t in (*call.tensors(), out) if t is not None):
            raise ArgumentError("out= with a tensor that requires a gradient: a result written in place has none")
        lse = engine.attention_out(call, out)
    return (out, lse) if return_lse or return_attn_probs or return_softmax_lse else out
