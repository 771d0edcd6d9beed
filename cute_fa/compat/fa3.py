"""The functions of FlashAttention 3 (hopper/flash_attn_interface.py), and ``apply_rotary_emb`` that goes with them."""

from __future__ import annotations

from typing import Any

import torch

from cute_fa.api import attention, kvcache
from cute_fa.api.merge import merge_states
from cute_fa.api.rotary import apply_rotary_emb as apply_rotary_emb
from cute_fa.api.scheduler_metadata import scheduler_metadata_of
from cute_fa.api.values import check_tensor, flag
from cute_fa.compat.order import INFINITE, in_order
from cute_fa.semantics.errors import ArgumentError, DTypeError, ShapeError
from cute_fa.semantics.tensors import check_like

Window = tuple[int | None, int | None]


@in_order(lambda given: attention.flash_attn_func(**given))
def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: None = None,
    q_descale: torch.Tensor | None = None,
    k_descale: torch.Tensor | None = None,
    v_descale: torch.Tensor | None = None,
    window_size: Window = INFINITE,
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Any:
    """See :func:`cute_fa.flash_attn_func`. Returns out, or (out, lse) with ``return_attn_probs``."""


@in_order(lambda given: attention.flash_attn_varlen_func(**given))
def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    seqused_q: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: None = None,
    q_descale: torch.Tensor | None = None,
    k_descale: torch.Tensor | None = None,
    v_descale: torch.Tensor | None = None,
    window_size: Window = INFINITE,
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Any:
    """See :func:`cute_fa.flash_attn_varlen_func`. Returns out, or (out, lse) with ``return_attn_probs``."""


@in_order(lambda given: kvcache.flash_attn_with_kvcache(**given))
def flash_attn_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    qv: None = None,
    rotary_cos: torch.Tensor | None = None,
    rotary_sin: torch.Tensor | None = None,
    cache_seqlens: int | torch.Tensor | None = None,
    cache_batch_idx: torch.Tensor | None = None,
    cache_leftpad: torch.Tensor | None = None,
    page_table: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k_new: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    rotary_seqlens: torch.Tensor | None = None,
    q_descale: torch.Tensor | None = None,
    k_descale: torch.Tensor | None = None,
    v_descale: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = INFINITE,
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: torch.Tensor | None = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
) -> Any:
    """See :func:`cute_fa.flash_attn_with_kvcache`. Returns out, or (out, lse) with ``return_softmax_lse``."""


def flash_attn_combine(
    out_partial: torch.Tensor,
    lse_partial: torch.Tensor,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    return_lse: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(out, lse) over all keys from those of each split; :func:`cute_fa.merge_states` in FlashAttention-3's layout.

    out_partial: (num_splits, batch, seqlen, heads, head_dim_v) or (num_splits, total_q, heads, head_dim_v), fp32, fp16
    or bf16; lse_partial: fp32 (num_splits, batch, seqlen, heads) or (num_splits, total_q, heads), any strides.
    out: where to write the result, of ``out_dtype`` (None: out's dtype, or out_partial's); it then has no gradient.

    Returns out (batch, seqlen, heads, head_dim_v) or (total_q, …), and lse fp32 (batch, seqlen, heads) or (total_q,
    heads), a transposed view of heads before rows as there; with ``return_lse=False`` None in its place.
    """
    for name, tensor in {"out_partial": out_partial, "lse_partial": lse_partial}.items():
        check_tensor(name, tensor)
    return_lse = flag("return_lse", return_lse)
    if out_partial.dim() not in (4, 5):
        rule = "(num_splits, batch, seqlen, heads, head_dim_v) or (num_splits, total_q, heads, head_dim_v) is needed"
        raise ShapeError(f"out_partial {tuple(out_partial.shape)}: {rule}")
    check_like("lse_partial", lse_partial, out_partial.shape[:-1], torch.float32)
    given = out_partial.dtype if out is None else out.dtype
    dtype = given if out_dtype is None else out_dtype
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise DTypeError("out_dtype", dtype, "float32, float16 or bfloat16 is needed")
    merged, by_head = merge_states(out_partial.float(), lse_partial.transpose(-1, -2))
    merged, lse = merged.to(dtype), by_head.transpose(-1, -2) if return_lse else None
    if out is None:
        return merged, lse
    check_like("out", out, merged.shape, dtype)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (out, out_partial, lse_partial)):
        raise ArgumentError("out= with a tensor that requires a gradient: a result written in place has none")
    return out.copy_(merged), lse


def _scheduler_metadata(given: dict[str, Any]) -> torch.Tensor:
    return scheduler_metadata_of(given["batch_size"], "cache_seqlens", given["cache_seqlens"])


@in_order(_scheduler_metadata)
def get_scheduler_metadata(
    batch_size: int,
    max_seqlen_q: int,
    max_seqlen_k: int,
    num_heads_q: int,
    num_heads_kv: int,
    headdim: int,
    cache_seqlens: torch.Tensor,
    qkv_dtype: torch.dtype = torch.bfloat16,
    headdim_v: int | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k_new: torch.Tensor | None = None,
    cache_leftpad: torch.Tensor | None = None,
    page_size: int | None = None,
    max_seqlen_k_new: int = 0,
    causal: bool = False,
    window_size: Window = INFINITE,
    attention_chunk: int = 0,
    has_softcap: bool = False,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
) -> Any:
    """What :func:`flash_attn_with_kvcache` and :func:`cute_fa.flash_attn_varlen_func` take as ``scheduler_metadata``:
    int32 (batch_size + 1) zeros on the device of ``cache_seqlens``, int32 (batch_size). Scheduling here needs no plan
    that is made before (``cute_fa.api.scheduler_metadata`` says why): the other arguments describe the problem for
    kernels that do, and change nothing."""
