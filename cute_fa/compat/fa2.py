"""The functions of ``flash_attn`` 2 (flash_attn_interface.py), ``apply_rotary_emb`` (layers/rotary.py), and the helpers
of bert_padding.py.

As there, a head_dim that is no multiple of 8 is padded with zeros, and q, k and v whose last dimension is strided are
copied. ``flash_attn_with_kvcache`` pads whole caches, and copies them back where it appends.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import pad

from cute_fa.api import attention, kvcache
from cute_fa.api.peers import check_peers
from cute_fa.api.rotary import apply_rotary_emb as apply_rotary_emb
from cute_fa.api.values import check_tensor, flag
from cute_fa.compat.bert_padding import index_first_axis as index_first_axis
from cute_fa.compat.bert_padding import pad_input as pad_input
from cute_fa.compat.bert_padding import unpad_input as unpad_input
from cute_fa.compat.order import INFINITE, in_order
from cute_fa.engine import attention as engine
from cute_fa.semantics.argument_names import spelled
from cute_fa.semantics.errors import ShapeError
from cute_fa.semantics.problem import default_scale

if TYPE_CHECKING:
    from collections.abc import Callable

Window = tuple[int | None, int | None]
_LARGEST = 256  # head_dim that a kernel serves
_ROWS = ("q", "k", "v", "k_cache", "v_cache")
# What callers of the packed functions call arguments of the operator.
_LENGTH_NAMES = {f"{kind}_{side}": kind for kind in ("cu_seqlens", "max_seqlen") for side in "qk"}
_QKV_NAMES = spelled(q="qkv", k="qkv", v="qkv", **_LENGTH_NAMES)
_KV_NAMES = spelled(k="kv", v="kv")


def _dense(given: dict[str, Any]) -> Any:
    return _with_dmask(_padded(attention.flash_attn_func, given, "v"), given)


def _varlen(given: dict[str, Any]) -> Any:
    return _with_dmask(_padded(attention.flash_attn_varlen_func, given, "v"), given)


def _qkvpacked(given: dict[str, Any]) -> Any:
    q, k, v = _unpacked("qkv", given)
    if "cu_seqlens" in given:
        offsets, longest = given.pop("cu_seqlens"), given.pop("max_seqlen")
        given |= {"cu_seqlens_q": offsets, "cu_seqlens_k": offsets}
        given |= {"max_seqlen_q": longest, "max_seqlen_k": longest}
    return _of_parts(given | {"q": q, "k": k, "v": v}, _QKV_NAMES)


def _kvpacked(given: dict[str, Any]) -> Any:
    k, v = _unpacked("kv", given)
    return _of_parts(given | {"k": k, "v": v}, _KV_NAMES)


def _unpacked(name: str, given: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    """q, k and v, or k and v, of one tensor (…, 3 or 2, heads, head_dim), which is taken out of ``given``."""
    tensor, parts = given.pop(name), len(name)
    check_tensor(name, tensor)
    if tensor.dim() < 4 or tensor.shape[-3] != parts:
        raise ShapeError(f"{name} {tuple(tensor.shape)}: (…, {parts}, heads, head_dim) is needed")
    return tensor.unbind(-3)


def _of_parts(given: dict[str, Any], names: str) -> Any:
    """Attention of tensors that the caller calls by ``names``."""

    def of_parts(*, dropout_p: Any = 0.0, return_attn_probs: Any = False, **options: Any) -> Any:
        check_peers({"dropout_p": dropout_p})
        result = engine.attention(attention.prepare(**options, names=names))
        return result if flag("return_attn_probs", return_attn_probs) else result[0]

    return _with_dmask(_padded(of_parts, given, "v"), given)


def _with_dmask(result: Any, given: dict[str, Any]) -> Any:
    return (*result, given["q"].new_empty(0)) if given.get("return_attn_probs") else result


def _with_kvcache(given: dict[str, Any]) -> Any:
    return _padded(kvcache.flash_attn_with_kvcache, given, "v_cache")


def _padded(call: Callable, given: dict[str, Any], values: str) -> Any:
    """The call with tensors as kernels take them, and its result as the caller's are; ``values``: which argument's
    head_dim the output has."""
    taken = {name: _taken(name, given[name]) for name in _ROWS if name in given}
    if all(tensor is given[name] for name, tensor in taken.items()):
        return call(**given)
    scale = given.get("softmax_scale")
    if scale is None and taken["q"] is not given["q"]:
        scale = default_scale(given["q"].shape[-1])  # not that of the padding
    result = call(**given | taken | {"softmax_scale": scale})
    if isinstance(given.get("k"), torch.Tensor):
        for name in ("k_cache", "v_cache"):
            if name in taken and taken[name] is not given[name]:
                given[name].copy_(taken[name][..., : given[name].shape[-1]])
    out, *others = result if isinstance(result, tuple) else (result,)
    out = out[..., : given[values].shape[-1]]
    return (out, *others) if others else out


def _taken(name: str, tensor: Any) -> Any:
    """A tensor that kernels can load the rows of, itself if it is one; what is wrong otherwise is left to the call."""
    if not isinstance(tensor, torch.Tensor) or tensor.dim() == 0:
        return tensor
    if tensor.stride(-1) != 1 and not name.endswith("_cache"):
        tensor = tensor.contiguous()
    size = tensor.shape[-1]
    return tensor if size % 8 == 0 or size > _LARGEST else pad(tensor, (0, -size % 8))


@in_order(_dense)
def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = INFINITE,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """See :func:`cute_fa.flash_attn_func`. Returns out, or with ``return_attn_probs`` (out, lse,
    S_dmask), S_dmask empty as in FA2 without dropout."""


@in_order(_varlen)
def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = INFINITE,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: torch.Tensor | None = None,
) -> Any:
    """See :func:`cute_fa.flash_attn_varlen_func`. Returns out, or with ``return_attn_probs`` (out, lse,
    S_dmask), S_dmask empty as in FA2 without dropout."""


@in_order(_qkvpacked)
def flash_attn_qkvpacked_func(
    qkv: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = INFINITE,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """``flash_attn_func`` of qkv (batch, seqlen, 3, heads, head_dim). Returns out, or with
    ``return_attn_probs`` (out, lse, S_dmask), S_dmask empty as in FA2 without dropout."""


@in_order(_kvpacked)
def flash_attn_kvpacked_func(
    q: torch.Tensor,
    kv: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = INFINITE,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """``flash_attn_func`` of q and kv (batch, seqlen_k, 2, heads_kv, head_dim). Returns out, or with
    ``return_attn_probs`` (out, lse, S_dmask), S_dmask empty as in FA2 without dropout."""


@in_order(_qkvpacked)
def flash_attn_varlen_qkvpacked_func(
    qkv: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = INFINITE,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """``flash_attn_varlen_func`` of qkv (total, 3, heads, head_dim). Returns out, or with
    ``return_attn_probs`` (out, lse, S_dmask), S_dmask empty as in FA2 without dropout."""


@in_order(_kvpacked)
def flash_attn_varlen_kvpacked_func(
    q: torch.Tensor,
    kv: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = INFINITE,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """``flash_attn_varlen_func`` of q and kv (total_k, 2, heads_kv, head_dim). Returns out, or with
    ``return_attn_probs`` (out, lse, S_dmask), S_dmask empty as in FA2 without dropout."""


@in_order(_with_kvcache)
def flash_attn_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    rotary_cos: torch.Tensor | None = None,
    rotary_sin: torch.Tensor | None = None,
    cache_seqlens: int | torch.Tensor | None = None,
    cache_batch_idx: torch.Tensor | None = None,
    cache_leftpad: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = INFINITE,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: torch.Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Any:
    """See :func:`cute_fa.flash_attn_with_kvcache`. Returns out, or (out, lse) with ``return_softmax_lse``."""
