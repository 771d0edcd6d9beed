"""The functions of FlashAttention 4 (flash_attn/cute/interface.py, 4.0.0b36)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from cute_fa.api import attention
from cute_fa.api.scheduler_metadata import scheduler_metadata_of
from cute_fa.api.values import check_tensor
from cute_fa.compat import fa3
from cute_fa.compat.order import in_order
from cute_fa.semantics.errors import ArgumentError, UnsupportedArgumentError
from cute_fa.semantics.problem import LiteralWindow

if TYPE_CHECKING:
    from collections.abc import Callable

Window = tuple[int | None, int | None]
_LENGTHS = dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"))


def _call(function: Callable, given: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor | None]:
    if "window_size" in given:
        given["window_size"] = _window(given["window_size"], given.get("causal"))
    inputs = (given["q"], given["k"], given["v"])
    keep = given.get("return_lse") or (
        torch.is_grad_enabled() and any(isinstance(t, torch.Tensor) and t.requires_grad for t in inputs)
    )
    out, lse = function(**(given | {"return_lse": True}))
    return out, lse if keep else None


def _window(window_size: Any, causal: Any) -> LiteralWindow:
    """What FlashAttention 4 makes of a window (``_resolve_causal_local_window``)."""
    left, right = LiteralWindow.of(window_size)
    if left is not None and right is not None and left < 0 and right < 0:
        left = right = None
    return LiteralWindow(left, 0 if causal else right)


@in_order(lambda given: _call(attention.flash_attn_func, given))
def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    qv: None = None,
    gather_kv_indices: None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (None, None),
    learnable_sink: torch.Tensor | None = None,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    score_mod: None = None,
    score_mod_bwd: None = None,
    mask_mod: None = None,
    aux_tensors: None = None,
    aux_scalars: None = None,
    block_sparse_tensors: None = None,
    block_sparse_tensors_bwd: None = None,
    return_lse: bool = False,
    gather_bwd_recompute_p: bool = False,
    gather_bwd_token_chunk: None = None,
) -> Any:
    """See :func:`cute_fa.flash_attn_func`.

    ``window_size`` as FlashAttention 4 has it: None is infinite, two negative bounds are full attention, any other is
    meant as it is, −1 too; causal puts 0 in the place of the right one. Always returns (out, lse); lse is None unless
    asked for or needed for a gradient.
    """


@in_order(lambda given: _call(attention.flash_attn_varlen_func, _LENGTHS | given))
def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    qv: None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    min_seqlen_k: None = None,
    seqused_q: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    gather_kv_indices: None = None,
    page_table: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (None, None),
    learnable_sink: torch.Tensor | None = None,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    score_mod: None = None,
    score_mod_bwd: None = None,
    mask_mod: None = None,
    block_sparse_tensors: None = None,
    aux_tensors: None = None,
    aux_scalars: None = None,
    return_lse: bool = False,
    scheduler_metadata: torch.Tensor | None = None,
    seqlen_k_per_split: int | None = None,
    disable_scheduler_metadata: bool = False,
    gather_bwd_recompute_p: bool = False,
    gather_bwd_token_chunk: None = None,
) -> Any:
    """See :func:`cute_fa.flash_attn_varlen_func`.

    ``window_size`` as FlashAttention 4 has it: None is infinite, two negative bounds are full attention, any other is
    meant as it is, −1 too; causal puts 0 in the place of the right one. Always returns (out, lse); lse is None unless
    asked for or needed for a gradient.
    """


def _combine(given: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor | None]:
    for name in ("cu_seqlens", "seqused", "virtual_batch_idx"):
        value = given.pop(name, None)
        if value is not None:
            raise UnsupportedArgumentError(name, value)
    return fa3.flash_attn_combine(**given)


def _scheduler_metadata(given: dict[str, Any]) -> torch.Tensor:
    for name in ("seqused_k", "seqused_q", "cu_seqlens_k", "cu_seqlens_q"):
        lengths = given.get(name)
        if lengths is not None:
            check_tensor(name, lengths)
            lengths = lengths[1:] if name.startswith("cu_") else lengths
            return scheduler_metadata_of(lengths.shape[0], name, lengths)
    raise ArgumentError("seqused_k, seqused_q, cu_seqlens_k or cu_seqlens_q is needed: they say how many sequences")


@in_order(_combine)
def flash_attn_combine(
    out_partial: torch.Tensor,
    lse_partial: torch.Tensor,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    cu_seqlens: None = None,
    seqused: None = None,
    virtual_batch_idx: None = None,
    return_lse: bool = True,
) -> Any:
    """See :func:`cute_fa.compat.fa3.flash_attn_combine`."""


@in_order(_scheduler_metadata)
def get_scheduler_metadata(
    max_seqlen_q: int,
    max_seqlen_k: int,
    nheads: int,
    nheads_kv: int,
    headdim: int,
    num_splits: int,
    headdim_v: int | None = None,
    pack_gqa: bool | None = None,
    causal: bool = False,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    seqlen_k_new: int = 0,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    cu_seqlens_k_new: torch.Tensor | None = None,
    seqused_q: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    leftpad_k: torch.Tensor | None = None,
    seqlen_k_per_split: torch.Tensor | None = None,
    _arch: int | None = None,
) -> Any:
    """What :func:`flash_attn_varlen_func` takes as ``scheduler_metadata``: int32 (batch + 1) zeros, one tensor in the
    place of FlashAttention 4's tuple. See :func:`cute_fa.compat.fa3.get_scheduler_metadata`."""
