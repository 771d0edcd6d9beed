"""FlashAttention 2 and cuDNN as torch ships them."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from cute_fa.semantics.problem import normalize_window
from cute_fa.tools.inputs import Inputs
from perf.providers.base import HEADS_FIRST, Attention, Provider, Unavailable


def _sdpa(backend: SDPBackend, causal: bool) -> Attention:
    def forward(q, k, v):
        with sdpa_kernel(backend):
            return torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]
            )

    return Attention(forward, HEADS_FIRST)


def _sdpa_lacks(inputs: Inputs) -> str | None:
    """What of the problem torch's scaled_dot_product_attention has no argument for."""
    spec = inputs.spec
    left, right = normalize_window(spec.window, spec.causal)
    if left is not None or right not in (None, 0):
        return "a window"
    if right == 0 and spec.seqlen_q != spec.seqlen_k:
        return "a causal mask aligned to the last key"
    if inputs.cu_seqlens_q is not None or inputs.seqused_k is not None:
        return "sequences of different lengths"
    return None


class CuDnn(Provider):
    """cuDNN's attention behind torch's scaled_dot_product_attention."""

    name = "cuDNN"

    def version(self) -> str:
        version = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
        if version is None:
            raise Unavailable("this build of torch has no cuDNN")
        return str(version)

    def prepare(self, inputs: Inputs) -> Attention:
        lacks = _sdpa_lacks(inputs)
        if lacks:
            raise Unavailable(f"torch's scaled_dot_product_attention has no argument for {lacks}")
        return _sdpa(SDPBackend.CUDNN_ATTENTION, inputs.spec.causal)


class FlashAttention2(Provider):
    """torch's copy of FlashAttention 2: behind scaled_dot_product_attention, or behind ``varlen_attn`` for what that
    has no argument for, with every sequence packed."""

    name = "FA2"

    def version(self) -> str:
        return f"torch {torch.__version__}"

    def prepare(self, inputs: Inputs) -> Attention:
        if not _sdpa_lacks(inputs):
            return _sdpa(SDPBackend.FLASH_ATTENTION, inputs.spec.causal)
        try:
            from torch.nn.attention.varlen import varlen_attn
        except ImportError as error:
            raise Unavailable(f"lengths and windows need torch.nn.attention.varlen: {error}") from None
        spec = inputs.spec
        window = tuple(-1 if bound is None else bound for bound in normalize_window(spec.window, spec.causal))
        cu_seqlens_q, cu_seqlens_k = inputs.cu_seqlens_q, inputs.cu_seqlens_k
        # only what is needed: the function has gained its arguments one release after the other
        options: dict[str, Any] = {"window_size": window}
        if spec.heads != spec.heads_kv:
            options["enable_gqa"] = True
        if inputs.seqused_k is not None:
            options["seqused_k"] = inputs.seqused_k
        if inputs.page_table is not None:
            options["block_table"] = inputs.page_table
        elif cu_seqlens_k is None:
            cu_seqlens_k = _starts(inputs.k)
        if cu_seqlens_q is None:
            cu_seqlens_q = _starts(inputs.q)
        rows_q, rows_k = inputs.cu_seqlens_q is None, inputs.cu_seqlens_k is None and inputs.page_table is None

        def forward(q, k, v):
            if rows_k:
                k, v = k.flatten(0, 1), v.flatten(0, 1)
            packed = q.flatten(0, 1) if rows_q else q
            out = varlen_attn(packed, k, v, cu_seqlens_q, cu_seqlens_k, spec.seqlen_q, spec.seqlen_k, **options)
            return out.unflatten(0, q.shape[:2]) if rows_q else out

        return Attention(forward)


def _starts(rows: torch.Tensor) -> torch.Tensor:
    """cu_seqlens of sequences that fill a tensor (batch, seqlen, …)."""
    batch, seqlen = rows.shape[:2]
    return torch.arange(0, (batch + 1) * seqlen, seqlen, dtype=torch.int32, device=rows.device)
