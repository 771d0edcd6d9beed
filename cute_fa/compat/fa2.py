"""``flash_attn_func``, ``flash_attn_varlen_func`` and ``flash_attn_with_kvcache`` of ``flash_attn`` 2
(flash_attn_interface.py), and ``apply_rotary_emb`` (layers/rotary.py).

As there, a head_dim that is no multiple of 8 is padded with zeros, and q, k and v whose last dimension is strided are
copied. ``flash_attn_with_kvcache`` pads whole caches, and copies them back where it appends.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import pad

from cute_fa import api, kvcache
from cute_fa.compat.order import INFINITE, REQUIRED, in_order
from cute_fa.problem import default_scale
from cute_fa.rotary import apply_rotary_emb as apply_rotary_emb

if TYPE_CHECKING:
    from collections.abc import Callable

_LARGEST = 256  # head_dim that a kernel serves
_ROWS = ("q", "k", "v", "k_cache", "v_cache")
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
    return _with_dmask(_padded(api.flash_attn_func, given, "v"), given)


def _varlen(given: dict[str, Any]) -> Any:
    return _with_dmask(_padded(api.flash_attn_varlen_func, given, "v"), given)


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
    _with_kvcache,
    "See :func:`cute_fa.flash_attn_with_kvcache`. Returns out, or (out, lse) with ``return_softmax_lse``.",
)
