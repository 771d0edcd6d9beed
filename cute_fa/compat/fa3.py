"""The functions of FlashAttention 3 (hopper/flash_attn_interface.py), and ``apply_rotary_emb`` that goes with them."""

from __future__ import annotations

from typing import Any

import torch

from cute_fa.api import attention as api
from cute_fa.api import kvcache
from cute_fa.api.merge import merge_states
from cute_fa.api.rotary import apply_rotary_emb as apply_rotary_emb
from cute_fa.api.scheduler_metadata import scheduler_metadata_of
from cute_fa.compat.order import INFINITE, REQUIRED, in_order
from cute_fa.semantics.errors import ArgumentError, DTypeError, ShapeError
from cute_fa.semantics.tensors import check_like

_OPTIONS = {
    "softmax_scale": None,
    "causal": False,
    "qv": None,
    "q_descale": None,
    "k_descale": None,
    "v_descale": None,
    "window_size": INFINITE,
    "attention_chunk": 0,
    "softcap": 0.0,
    "num_splits": 1,
    "pack_gqa": None,
    "deterministic": False,
    "sm_margin": 0,
    "return_attn_probs": False,
}
_QKV = {"q": REQUIRED, "k": REQUIRED, "v": REQUIRED}
_LENGTHS = dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"), REQUIRED)
_CACHE = {"q": REQUIRED, "k_cache": REQUIRED, "v_cache": REQUIRED} | dict.fromkeys(
    "k v qv rotary_cos rotary_sin cache_seqlens cache_batch_idx cache_leftpad page_table cu_seqlens_q cu_seqlens_k_new "
    "max_seqlen_q rotary_seqlens q_descale k_descale v_descale softmax_scale".split()
)
_RETURNS = "Returns out, or (out, lse) with ``return_attn_probs``."

flash_attn_func = in_order(
    "flash_attn_func",
    _QKV | _OPTIONS,
    lambda given: api.flash_attn_func(**given),
    f"See :func:`cute_fa.flash_attn_func`. {_RETURNS}",
)
flash_attn_varlen_func = in_order(
    "flash_attn_varlen_func",
    _QKV | _LENGTHS | {"seqused_q": None, "seqused_k": None} | _OPTIONS,
    lambda given: api.flash_attn_varlen_func(**given),
    f"See :func:`cute_fa.flash_attn_varlen_func`. {_RETURNS}",
)
flash_attn_with_kvcache = in_order(
    "flash_attn_with_kvcache",
    _CACHE
    | {
        "causal": False,
        "window_size": INFINITE,
        "attention_chunk": 0,
        "softcap": 0.0,
        "rotary_interleaved": True,
        "scheduler_metadata": None,
        "num_splits": 0,
        "pack_gqa": None,
        "sm_margin": 0,
        "return_softmax_lse": False,
    },
    lambda given: kvcache.flash_attn_with_kvcache(**given),
    "See :func:`cute_fa.flash_attn_with_kvcache`. Returns out, or (out, lse) with ``return_softmax_lse``.",
)


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
        api.check_tensor(name, tensor)
    return_lse = api.flag("return_lse", return_lse)
    if out_partial.dim() not in (4, 5):
        rule = "(num_splits, batch, seqlen, heads, head_dim_v) or (num_splits, total_q, heads, head_dim_v) is needed"
        raise ShapeError(f"out_partial {tuple(out_partial.shape)}: {rule}")
    check_like("lse_partial", lse_partial, out_partial.shape[:-1], torch.float32)
    given = out_partial.dtype if out is None else out.dtype
    dtype = given if out_dtype is None else out_dtype
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise DTypeError("out_dtype", dtype, "float32, float16 or bfloat16 is needed")
    merged, lse = merge_states(out_partial.float(), lse_partial.transpose(-1, -2))
    merged, lse = merged.to(dtype), lse.transpose(-1, -2) if return_lse else None
    if out is None:
        return merged, lse
    check_like("out", out, merged.shape, dtype)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (out, out_partial, lse_partial)):
        raise ArgumentError("out= with a tensor that requires a gradient: a result written in place has none")
    return out.copy_(merged), lse


def _scheduler_metadata(given: dict[str, Any]) -> torch.Tensor:
    return scheduler_metadata_of(given["batch_size"], "cache_seqlens", given["cache_seqlens"])


get_scheduler_metadata = in_order(
    "get_scheduler_metadata",
    dict.fromkeys(
        "batch_size max_seqlen_q max_seqlen_k num_heads_q num_heads_kv headdim cache_seqlens".split(), REQUIRED
    )
    | {"qkv_dtype": torch.bfloat16}
    | dict.fromkeys("headdim_v cu_seqlens_q cu_seqlens_k_new cache_leftpad page_size".split())
    | {
        "max_seqlen_k_new": 0,
        "causal": False,
        "window_size": INFINITE,
        "attention_chunk": 0,
        "has_softcap": False,
        "num_splits": 0,
        "pack_gqa": None,
        "sm_margin": 0,
    },
    _scheduler_metadata,
    """What :func:`flash_attn_with_kvcache` and :func:`cute_fa.flash_attn_varlen_func` take as ``scheduler_metadata``:
    int32 (batch_size + 1) zeros on the device of ``cache_seqlens``, int32 (batch_size). Scheduling here needs no plan
    that is made before (``cute_fa.api.scheduler_metadata`` says why): the other arguments describe the problem for
    kernels that do, and change nothing.""",
)
