"""``flash_attn_func``, ``flash_attn_varlen_func`` and ``flash_attn_with_kvcache`` of ``flash_attn`` 2
(flash_attn_interface.py), and ``apply_rotary_emb`` (layers/rotary.py)."""

from __future__ import annotations

from typing import Any

from cute_fa import api, kvcache
from cute_fa.compat.order import INFINITE, REQUIRED, in_order
from cute_fa.rotary import apply_rotary_emb as apply_rotary_emb

_OPTIONS = {
    "dropout_p": 0.0,
    "softmax_scale": None,
    "causal": False,
    "window_size": INFINITE,
    "softcap": 0.0,
    "alibi_slopes": None,
    "deterministic": False,
    "return_attn_probs": False,
}
_QKV = {"q": REQUIRED, "k": REQUIRED, "v": REQUIRED}
_LENGTHS = dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"), REQUIRED)
_CACHE = {"q": REQUIRED, "k_cache": REQUIRED, "v_cache": REQUIRED} | dict.fromkeys(
    ("k", "v", "rotary_cos", "rotary_sin", "cache_seqlens", "cache_batch_idx", "cache_leftpad", "block_table")
)
_RETURNS = "Returns out, or with ``return_attn_probs`` (out, lse, S_dmask), S_dmask empty as in FA2 without dropout."


def _dense(given: dict[str, Any]) -> Any:
    return _with_dmask(api.flash_attn_func(**given), given)


def _varlen(given: dict[str, Any]) -> Any:
    return _with_dmask(api.flash_attn_varlen_func(**given), given)


def _with_dmask(result: Any, given: dict[str, Any]) -> Any:
    return (*result, given["q"].new_empty(0)) if given.get("return_attn_probs") else result


flash_attn_func = in_order(
    "flash_attn_func", _QKV | _OPTIONS, _dense, f"See :func:`cute_fa.flash_attn_func`. {_RETURNS}"
)
flash_attn_varlen_func = in_order(
    "flash_attn_varlen_func",
    _QKV | _LENGTHS | _OPTIONS | {"block_table": None},
    _varlen,
    f"See :func:`cute_fa.flash_attn_varlen_func`. {_RETURNS}",
)
flash_attn_with_kvcache = in_order(
    "flash_attn_with_kvcache",
    _CACHE
    | {
        "softmax_scale": None,
        "causal": False,
        "window_size": INFINITE,
        "softcap": 0.0,
        "rotary_interleaved": True,
        "alibi_slopes": None,
        "num_splits": 0,
        "return_softmax_lse": False,
    },
    lambda given: kvcache.flash_attn_with_kvcache(**given),
    "See :func:`cute_fa.flash_attn_with_kvcache`. Returns out, or (out, lse) with ``return_softmax_lse``.",
)
