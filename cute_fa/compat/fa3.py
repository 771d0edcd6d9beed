"""``flash_attn_func``, ``flash_attn_varlen_func`` and ``flash_attn_with_kvcache`` of FlashAttention 3
(hopper/flash_attn_interface.py)."""

from __future__ import annotations

from cute_fa import api, kvcache
from cute_fa.compat.order import INFINITE, REQUIRED, in_order

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
