"""The public functions. They accept the argument names of FlashAttention 2, 3 and 4 alike.

What attention means here (masks, biases, LSE, empty rows) is written down in ``cute_fa.reference``.
"""

from __future__ import annotations

import numbers
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch.compiler import is_dynamo_compiling

from cute_fa.api.scheduler_metadata import check_scheduler_metadata
from cute_fa.engine import operator as ops
from cute_fa.semantics.argument_names import names_of, spelled
from cute_fa.semantics.errors import ArgumentError, UnsupportedArgumentError
from cute_fa.semantics.problem import INT32_MAX, LiteralWindow, normalize_window
from cute_fa.semantics.tensors import used_lengths
from cute_fa.semantics.types import PersistentMode

# Arguments of the peers that are not implemented, with the values that ask for nothing.
_NOT_IMPLEMENTED: dict[str, tuple] = {
    "dropout_p": (0.0, None),
    "qv": (None,),
    "q_descale": (None,),
    "k_descale": (None,),
    "v_descale": (None,),
    "attention_chunk": (0, None),
    "sm_margin": (0,),
    "score_mod": (None,),
    "score_mod_bwd": (None,),
    "mask_mod": (None,),
    "aux_tensors": (None,),
    "aux_scalars": (None,),
    "block_sparse_tensors": (None,),
    "block_sparse_tensors_bwd": (None,),
    "gather_kv_indices": (None,),
    "gather_bwd_recompute_p": (False,),
    "gather_bwd_token_chunk": (None,),
    "min_seqlen_k": (None,),
    "leftpad_k": (None,),
    "scheduler_metadata": (None,),
    "seqlen_k_per_split": (None,),
    "disable_scheduler_metadata": (False,),
    "m_block_size": (None,),
    "n_block_size": (None,),
    "num_threads": (None,),
}
_PAIRS = (tuple, list, LiteralWindow)
# What callers of flash_attn_varlen_func call arguments of the operator.
_BLOCK_TABLE = spelled(page_table="block_table")
# The same where differences of cu_seqlens_k are the lengths of a paged cache.
_PAGED_LENGTHS = {
    "": spelled(seqused_k="cu_seqlens_k.diff()"),
    _BLOCK_TABLE: spelled(seqused_k="cu_seqlens_k.diff()", page_table="block_table"),
}


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
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    persistent: PersistentMode | str = "auto",
    deterministic: bool = False,
    return_lse: bool = False,
    return_attn_probs: bool = False,
    return_softmax_lse: bool = False,
    out: torch.Tensor | None = None,
    family: str | None = None,
    **peers: Any,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention over sequences of one length.

    q: (batch, seqlen_q, heads, head_dim); k: (batch, seqlen_k, heads_kv, head_dim); v: (batch, seqlen_k, heads_kv,
    head_dim_v), fp16 or bf16. heads is a multiple of heads_kv: query head h uses kv head h // (heads / heads_kv). The
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
    num_splits: parts that the keys are split into; 1, or 0 to let the kernel choose.
    pack_gqa: whether query heads of one kv head share a tile; None lets the kernel choose, as "auto" does below.
    persistent: "auto", "on" (a CTA computes one tile after the other) or "off" (one CTA a tile).
    deterministic: bit-identical gradients between runs, also asked for by torch.use_deterministic_algorithms(True); the
        forward always is.
    return_lse (return_attn_probs, return_softmax_lse): also return the LSE.
    out: where to write the result; it then has no gradient.
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
    small = ops.NO_TENSORS
    if alibi_slopes is not None or learnable_sink is not None:
        small = (*ops.NO_TENSORS[2:], alibi_slopes, learnable_sink)
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
        "",
    )
    return _attention(q, k, v, small, options, out, return_lse, return_attn_probs, return_softmax_lse)


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
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (None, None),
    sink_tokens: int = 0,
    softcap: float | None = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    learnable_sink: torch.Tensor | None = None,
    scheduler_metadata: torch.Tensor | None = None,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    persistent: PersistentMode | str = "auto",
    deterministic: bool = False,
    return_lse: bool = False,
    return_attn_probs: bool = False,
    return_softmax_lse: bool = False,
    out: torch.Tensor | None = None,
    family: str | None = None,
    **peers: Any,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention over sequences of different lengths; arguments not named here are those of :func:`flash_attn_func`.

    q: (total_q, heads, head_dim) with ``cu_seqlens_q`` int32 (batch + 1): sequence b has rows cu_seqlens_q[b] up to
    cu_seqlens_q[b + 1]; without it (batch, seqlen_q, heads, head_dim). k and v likewise with ``cu_seqlens_k``, or pages
    (num_pages, page_size, heads_kv, …) with ``page_table`` (``block_table``) int32 (batch, max_pages), which lists each
    sequence's pages in order; page_size is 8, 16, 32, 64, 128 or 256.
    max_seqlen_q, max_seqlen_k: at least the longest sequence's length; None takes what the tensor could hold.
    seqused_q, seqused_k: int32 (batch), how many rows of each sequence count, all by default. Beyond seqused_q O is 0
    and LSE −inf. A paged cache takes the differences of ``cu_seqlens_k`` in the place of ``seqused_k``; with neither,
    all max_pages · page_size rows of each sequence count. Entries of page_table beyond the lengths are not read.
    scheduler_metadata: of ``cute_fa.compat.fa3.get_scheduler_metadata`` for this batch; changes nothing.

    Returns out (total_q, heads, head_dim_v), or (out, lse) with lse fp32 (heads, total_q); for unpacked q as
    :func:`flash_attn_func`. Rows of q after the last sequence are not written. What lies outside the lengths may hold
    anything, NaN included. Values in device tensors are checked with ``CUTE_FA_CHECK=1`` and when simulating.
    """
    if by_position:
        raise too_many("flash_attn_varlen_func", "what stands before seqused_q", by_position)
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
    small = (*lengths, page_table, None, None, alibi_slopes, learnable_sink)
    longest = (max_seqlen_q, max_seqlen_k)
    choices = (*longest, softmax_scale, sink_tokens, softcap, num_splits, family, pack_gqa, persistent, deterministic)
    options = _options(window_size, causal, *choices, names)
    return _attention(q, k, v, small, options, out, return_lse, return_attn_probs, return_softmax_lse)


def prepare(
    q: Any,
    k: Any,
    v: Any,
    *,
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
    seqused_q: Any = None,
    seqused_k: Any = None,
    page_table: Any = None,
    cache_batch_idx: Any = None,
    cache_leftpad: Any = None,
    alibi_slopes: Any = None,
    learnable_sink: Any = None,
    max_seqlen_q: Any = None,
    max_seqlen_k: Any = None,
    softmax_scale: Any = None,
    causal: Any = False,
    window_size: Any = (None, None),
    sink_tokens: Any = 0,
    softcap: Any = 0.0,
    num_splits: Any = 1,
    family: Any = None,
    pack_gqa: Any = None,
    persistent: Any = "auto",
    deterministic: Any = False,
    names: str = "",
) -> ops.Call:
    """Arguments of ``ops.attention`` from those of the public functions: kinds checked, since the dispatcher's own
    complaints name no rule, and choices normalised. ``names``: what the caller calls them
    (:mod:`cute_fa.semantics.argument_names`)."""
    lengths = (cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k)
    tensors = (q, k, v, *lengths, page_table, cache_batch_idx, cache_leftpad, alibi_slopes, learnable_sink)
    longest = (max_seqlen_q, max_seqlen_k)
    choices = (*longest, softmax_scale, sink_tokens, softcap, num_splits, family, pack_gqa, persistent, deterministic)
    return ops.Call(*_checked(tensors, names), *_options(window_size, causal, *choices, names))


def _checked(tensors: tuple, names: str) -> tuple:
    """The tensors of :class:`ops.Call`, a sink of lower precision widened."""
    for name, tensor in zip(ops.Call._fields, tensors, strict=False):
        if tensor is not None or name in "qkv":
            check_tensor(name, tensor, names)
    *others, sink = tensors
    return (*others, sink.float()) if sink is not None and sink.dtype in (torch.float16, torch.bfloat16) else tensors


def _options(window_size: Any, *choices: Any) -> tuple:
    """``_normalized``, which is asked once for values that are equal and of the same types."""
    if not is_dynamo_compiling() and type(window_size) in _PAIRS:
        try:
            return _remembered(type(window_size), *window_size, *choices)
        except TypeError:  # something has no hash, or is no constant, or the window is no pair
            pass
    return _normalized(window_size, *choices)


@lru_cache(maxsize=4096, typed=True)
def _remembered(kind: type, left: Any, right: Any, *choices: Any) -> tuple:
    if any(isinstance(value, torch.Tensor) for value in (left, right, *choices)):
        raise TypeError("a tensor's hash is that of the object, whatever number it holds now")
    return _normalized(LiteralWindow(left, right) if kind is LiteralWindow else (left, right), *choices)


def _normalized(
    window_size: Any,
    causal: Any,
    max_seqlen_q: Any,
    max_seqlen_k: Any,
    softmax_scale: Any,
    sink_tokens: Any,
    softcap: Any,
    num_splits: Any,
    family: Any,
    pack_gqa: Any,
    persistent: Any,
    deterministic: Any,
    names: str,
) -> tuple:
    """The options of :class:`ops.Call`."""
    called = names_of(names)
    if family is not None and not isinstance(family, str):
        raise ArgumentError(f"family={family!r}: a name")
    if not isinstance(persistent, str):
        persistent = PersistentMode.named(persistent).value
    return (
        None if max_seqlen_q is None else integer(called["max_seqlen_q"], max_seqlen_q),
        None if max_seqlen_k is None else integer(called["max_seqlen_k"], max_seqlen_k),
        None if softmax_scale is None else _float(called["softmax_scale"], softmax_scale),
        *normalize_window(window_size, flag("causal", causal)),
        integer("sink_tokens", sink_tokens),
        0.0 if softcap is None else _float("softcap", softcap),
        integer("num_splits", num_splits),
        family,
        None if pack_gqa is None else flag("pack_gqa", pack_gqa),
        persistent,
        flag("deterministic", deterministic),
        names,
    )


def _attention(
    q: Any,
    k: Any,
    v: Any,
    small: tuple,
    options: tuple,
    out: Any,
    return_lse: Any,
    return_attn_probs: Any,
    return_softmax_lse: Any,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    if not (type(return_lse) is type(return_attn_probs) is type(return_softmax_lse) is bool):
        return_lse = flag("return_lse", return_lse)
        return_attn_probs = flag("return_attn_probs", return_attn_probs)
        return_softmax_lse = flag("return_softmax_lse", return_softmax_lse)
    done = ops.again(q, k, v, small, options) if out is None else None
    if done is not None:
        out, lse = done
    elif out is None:
        out, lse = ops.attention(*_checked((q, k, v, *small), options[-1]), *options)
    else:
        tensors = _checked((q, k, v, *small), options[-1])
        check_tensor("out", out)
        if torch.is_grad_enabled() and any(t.requires_grad for t in (*tensors, out) if t is not None):
            raise ArgumentError("out= with a tensor that requires a gradient: a result written in place has none")
        lse = ops.attention_out(*tensors, *options, out)
    return (out, lse) if return_lse or return_attn_probs or return_softmax_lse else out


def too_many(function: str, first: str, by_position: tuple) -> ArgumentError:
    """For an argument that peers have in different places: FlashAttention 2's fourth is dropout_p, FlashAttention 3's
    softmax_scale, FlashAttention 4's qv."""
    shown = type(by_position[0]).__name__ if isinstance(by_position[0], torch.Tensor) else repr(by_position[0])
    return ArgumentError(
        f"{function}: {shown} by position: only {first} are taken so, name the others; "
        "cute_fa.compat.fa2, fa3 and fa4 have each peer's order"
    )


def check_peers(peers: dict[str, Any]) -> None:
    for name, value in peers.items():
        if name not in _NOT_IMPLEMENTED:
            raise ArgumentError(f"{name}: no such argument")
        if not any(value is default or (_is_number(value) and value == default) for default in _NOT_IMPLEMENTED[name]):
            raise UnsupportedArgumentError(name, value)


def flag(name: str, value: Any) -> bool:
    """A bool; 0, 1 and numpy's bools are bools too. Raises ArgumentError for anything else."""
    if isinstance(value, (bool, np.bool_)) or (isinstance(value, numbers.Integral) and value in (0, 1)):
        return bool(value)
    raise ArgumentError(f"{name}={value!r}: True or False")


def check_tensor(name: str, tensor: Any, names: str = "") -> None:
    """Raise ArgumentError unless this is a tensor with strides; ``names``: what the caller calls arguments."""
    if not isinstance(tensor, torch.Tensor):
        raise ArgumentError(f"{names_of(names)[name]} is {type(tensor).__name__}: a torch.Tensor is needed")
    if tensor.is_nested:
        rule = "flash_attn_varlen_func takes packed ones"
        raise ArgumentError(f"{names_of(names)[name]} is a nested tensor: {rule}")
    if tensor.layout is not torch.strided:
        layout = str(tensor.layout).removeprefix("torch.")
        raise ArgumentError(f"{names_of(names)[name]} has layout {layout}: strided is needed")


def integer(name: str, value: Any) -> int:
    """An int between 0 and 2^31 − 1, from numpy's and from a tensor on the host too. Raises ArgumentError for anything
    else."""
    value = _on_host(name, value)
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt, numbers.Integral)):
        raise ArgumentError(f"{name}={value!r}: an int is needed")
    if _known(value < 0) or _known(value > INT32_MAX):
        raise ArgumentError(f"{name}={value}: between 0 and {INT32_MAX}")
    return value if isinstance(value, (int, torch.SymInt)) else int(value)


def _known(condition: bool | torch.SymBool) -> bool:
    """Whether a condition is known to hold. One on an int that has no value while tracing is not: the operator checks
    the value when it runs."""
    if is_dynamo_compiling() or isinstance(condition, torch.SymBool):
        from torch.fx.experimental.symbolic_shapes import statically_known_true  # a second to import

        return statically_known_true(condition)
    return condition


def _float(name: str, value: Any) -> float:
    value = _on_host(name, value)
    if not _is_number(value):
        raise ArgumentError(f"{name}={value!r}: a number is needed")
    try:
        return float(value)
    except OverflowError:
        raise ArgumentError(f"{name}: the number is beyond any float") from None


def _on_host(name: str, value: Any) -> Any:
    """The number in a tensor of no dimensions; other values as they are. Raises ArgumentError for a tensor on a device:
    the host would have to wait for it."""
    if not isinstance(value, torch.Tensor):
        return value
    if value.dim() > 0:
        raise ArgumentError(f"{name} is a tensor of shape {tuple(value.shape)}: a number is needed")
    if value.requires_grad:
        raise ArgumentError(f"{name} is a tensor that requires a gradient: it has none, give a number")
    if value.device.type != "cpu":
        raise ArgumentError(f"{name} is a tensor on {value.device}: the host would wait for its value, give a number")
    return value.item()


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, torch.SymFloat, numbers.Real)) and not isinstance(value, bool)
