"""The functions of FlashAttention 4 (flash_attn/cute/interface.py, 4.0.0b36)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from cute_fa.api import attention as api
from cute_fa.api.scheduler_metadata import scheduler_metadata_of
from cute_fa.compat import fa3
from cute_fa.compat.order import REQUIRED, in_order
from cute_fa.semantics.errors import ArgumentError, UnsupportedArgumentError
from cute_fa.semantics.problem import LiteralWindow

if TYPE_CHECKING:
    from collections.abc import Callable

_QKV = {"q": REQUIRED, "k": REQUIRED, "v": REQUIRED, "qv": None}
_LENGTHS = dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"))
_OPTIONS = {
    "softmax_scale": None,
    "causal": False,
    "window_size": (None, None),
    "learnable_sink": None,
    "softcap": 0.0,
    "num_splits": 1,
    "pack_gqa": None,
    "deterministic": False,
    "score_mod": None,
    "score_mod_bwd": None,
    "mask_mod": None,
}
_BLOCK_SPARSE = {"block_sparse_tensors": None}
_AUX = {"aux_tensors": None, "aux_scalars": None}
_GATHER_BWD = {"gather_bwd_recompute_p": False, "gather_bwd_token_chunk": None}
_RETURNS = (
    "``window_size`` as FlashAttention 4 has it: None is infinite, two negative bounds are full attention, any other "
    "is meant as it is, −1 too; causal puts 0 in the place of the right one. Always returns (out, lse); lse is None "
    "unless asked for or needed for a gradient."
)


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


flash_attn_func = in_order(
    "flash_attn_func",
    _QKV
    | {"gather_kv_indices": None}
    | _OPTIONS
    | _AUX
    | _BLOCK_SPARSE
    | {"block_sparse_tensors_bwd": None, "return_lse": False}
    | _GATHER_BWD,
    lambda given: _call(api.flash_attn_func, given),
    f"See :func:`cute_fa.flash_attn_func`. {_RETURNS}",
)
flash_attn_varlen_func = in_order(
    "flash_attn_varlen_func",
    _QKV
    | _LENGTHS
    | dict.fromkeys(("min_seqlen_k", "seqused_q", "seqused_k", "gather_kv_indices", "page_table"))
    | _OPTIONS
    | _BLOCK_SPARSE
    | _AUX
    | {"return_lse": False, "scheduler_metadata": None, "seqlen_k_per_split": None, "disable_scheduler_metadata": False}
    | _GATHER_BWD,
    lambda given: _call(api.flash_attn_varlen_func, _LENGTHS | given),
    f"See :func:`cute_fa.flash_attn_varlen_func`. {_RETURNS}",
)


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
            api.check_tensor(name, lengths)
            lengths = lengths[1:] if name.startswith("cu_") else lengths
            return scheduler_metadata_of(lengths.shape[0], name, lengths)
    raise ArgumentError("seqused_k, seqused_q, cu_seqlens_k or cu_seqlens_q is needed: they say how many sequences")


flash_attn_combine = in_order(
    "flash_attn_combine",
    dict.fromkeys(("out_partial", "lse_partial"), REQUIRED)
    | dict.fromkeys(("out", "out_dtype", "cu_seqlens", "seqused", "virtual_batch_idx"))
    | {"return_lse": True},
    _combine,
    "See :func:`cute_fa.compat.fa3.flash_attn_combine`.",
)
get_scheduler_metadata = in_order(
    "get_scheduler_metadata",
    dict.fromkeys("max_seqlen_q max_seqlen_k nheads nheads_kv headdim num_splits".split(), REQUIRED)
    | {"headdim_v": None, "pack_gqa": None, "causal": False, "window_size_left": None, "window_size_right": None}
    | {"seqlen_k_new": 0}
    | dict.fromkeys(
        "cu_seqlens_q cu_seqlens_k cu_seqlens_k_new seqused_q seqused_k leftpad_k seqlen_k_per_split _arch".split()
    ),
    _scheduler_metadata,
    """What :func:`flash_attn_varlen_func` takes as ``scheduler_metadata``: int32 (batch + 1) zeros, one tensor in the
    place of FlashAttention 4's tuple. See :func:`cute_fa.compat.fa3.get_scheduler_metadata`.""",
)
