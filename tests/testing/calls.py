"""A small good call of every public function, by name: what tests of them all start from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

import cute_fa
from cute_fa.compat import fa2, fa3, fa4
from cute_fa.integrations import auto_deploy

if TYPE_CHECKING:
    from collections.abc import Callable

BF16 = torch.bfloat16


class Call(NamedTuple):
    """A function and arguments by name, of which ``differentiable`` may require gradients."""

    function: Callable
    arguments: dict[str, Any]
    differentiable: tuple[str, ...] = ()

    def __call__(self, **changes: Any) -> Any:
        return self.function(**{**self.arguments, **changes})

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        return {name: value for name, value in self.arguments.items() if isinstance(value, torch.Tensor)}


def rows(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(BF16)


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def calls() -> dict[str, Call]:
    """Two sequences of 24 and up to 40 tokens, 4 heads over 2, head_dim 64 and 32 for the values."""
    q, k, v = rows(2, 24, 4, 64), rows(2, 40, 2, 64), rows(2, 40, 2, 32)
    dense = {"q": q, "k": k, "v": v, "causal": True, "window_size": (16, 0), "softmax_scale": 0.1, "softcap": 5.0}
    packed = {"q": rows(48, 4, 64), "k": rows(80, 2, 64), "v": rows(80, 2, 32)}
    packed |= {"cu_seqlens_q": ints(0, 20, 48), "cu_seqlens_k": ints(0, 30, 80), "max_seqlen_q": 28, "max_seqlen_k": 50}
    packed |= {"causal": True, "softmax_scale": 0.1}
    paged = {"k": rows(6, 16, 2, 64), "v": rows(6, 16, 2, 32)}
    table, lengths = ints(4, 0, 5, 1, 2, 3).reshape(2, 3), ints(40, 30)
    small = {"alibi_slopes": torch.rand(4) + 0.1, "learnable_sink": torch.rand(4)}
    cache = {"q": rows(2, 3, 4, 64), "k_cache": paged["k"], "v_cache": paged["v"], "cache_seqlens": lengths}
    new = {"k": rows(2, 3, 2, 64), "v": rows(2, 3, 2, 32), "causal": True}
    rotary = {"rotary_cos": rows(48, 16), "rotary_sin": rows(48, 16)}
    contiguous = {"k_cache": rows(3, 48, 2, 64), "v_cache": rows(3, 48, 2, 32), "cache_batch_idx": ints(2, 0)}
    append = {name: value for name, value in {**cache, **new, **rotary}.items() if name != "causal"}
    mha = {"q": rows(2, 1, 4 * 64), "k": rows(2, 1, 2 * 64), "v": rows(2, 1, 2 * 32), "input_pos": lengths}
    caches = {"k_cache": rows(2, 48, 2, 64), "v_cache": rows(2, 48, 2, 32), "freqs_cis": rows(48, 16, 2)}
    flat = {"q": rows(1, 5, 4 * 64), "k": rows(1, 5, 2 * 64), "v": rows(1, 5, 2 * 32), "input_pos": lengths}
    flat |= {"cache_loc": ints(1, 0), "seq_len": ints(3, 2), "seq_start": ints(0, 3), **caches}
    pages = {"page_table": table, "max_seq_len": 48, "k_cache": paged["k"], "v_cache": paged["v"]}
    states = {"outs": rows(2, 2, 24, 4, 32), "lses": torch.rand(2, 2, 4, 24)}
    heads_first = {"query": q.transpose(1, 2), "key": k.transpose(1, 2), "value": v.transpose(1, 2), "scale": 0.1}
    by_4 = {name: value for name, value in dense.items() if name != "alibi_slopes"}
    return {
        "flash_attn_func": Call(cute_fa.flash_attn_func, {**dense, **small, "return_lse": True}, ("q", "k", "v")),
        "varlen": Call(cute_fa.flash_attn_varlen_func, {**packed, **small, "return_lse": True}, ("q", "k", "v")),
        "varlen, page_table": Call(
            cute_fa.flash_attn_varlen_func,
            {**packed, **paged, "cu_seqlens_k": None, "seqused_k": lengths, "max_seqlen_k": 48, "page_table": table},
        ),
        "varlen, block_table": Call(
            cute_fa.flash_attn_varlen_func,
            {**packed, **paged, "cu_seqlens_k": ints(0, 40, 70), "max_seqlen_k": 48, "block_table": table},
        ),
        "kvcache": Call(cute_fa.flash_attn_with_kvcache, {**cache, "page_table": table, "return_lse": True}),
        "kvcache, block_table, append": Call(
            cute_fa.flash_attn_with_kvcache, {**cache, **new, **rotary, "block_table": table, "return_lse": True}
        ),
        "kvcache, contiguous, append": Call(cute_fa.flash_attn_with_kvcache, {**cache, **new, **contiguous}),
        "append_kv": Call(cute_fa.append_kv, {**append, "page_table": table}),
        "append_kv, contiguous": Call(cute_fa.append_kv, {**append, **contiguous}),
        "merge_states": Call(cute_fa.merge_states, states, ("outs", "lses")),
        "fa2 dense": Call(fa2.flash_attn_func, {**dense, "alibi_slopes": small["alibi_slopes"]}, ("q", "k", "v")),
        "fa2 qkvpacked": Call(fa2.flash_attn_qkvpacked_func, {"qkv": rows(2, 24, 3, 4, 64)}, ("qkv",)),
        "fa2 kvpacked": Call(fa2.flash_attn_kvpacked_func, {"q": dense["q"], "kv": rows(2, 40, 2, 2, 64)}, ("q", "kv")),
        "fa2 varlen qkvpacked": Call(
            fa2.flash_attn_varlen_qkvpacked_func,
            {"qkv": rows(50, 3, 4, 64), "cu_seqlens": ints(0, 20, 50), "max_seqlen": 30},
            ("qkv",),
        ),
        "fa2 varlen kvpacked": Call(
            fa2.flash_attn_varlen_kvpacked_func,
            {name: value for name, value in packed.items() if name not in ("k", "v")} | {"kv": rows(80, 2, 2, 64)},
            ("q", "kv"),
        ),
        "fa2 varlen": Call(fa2.flash_attn_varlen_func, packed, ("q", "k", "v")),
        "fa2 varlen, paged": Call(
            fa2.flash_attn_varlen_func,
            {**packed, **paged, "cu_seqlens_k": ints(0, 40, 70), "max_seqlen_k": 48, "block_table": table},
        ),
        "fa2 kvcache": Call(fa2.flash_attn_with_kvcache, {**cache, **new, **rotary, "block_table": table}),
        "fa3 dense": Call(fa3.flash_attn_func, dense, ("q", "k", "v")),
        "fa3 varlen": Call(fa3.flash_attn_varlen_func, {**packed, "seqused_k": ints(20, 30)}, ("q", "k", "v")),
        "fa3 kvcache": Call(fa3.flash_attn_with_kvcache, {**cache, **new, **rotary, "page_table": table}),
        "fa4 dense": Call(fa4.flash_attn_func, {**by_4, "learnable_sink": torch.rand(4)}, ("q", "k", "v")),
        "fa4 varlen": Call(fa4.flash_attn_varlen_func, packed, ("q", "k", "v")),
        "fused_mha_with_cache": Call(auto_deploy.fused_mha_with_cache, {**mha, **caches}),
        "fused_flattened_mha_with_cache": Call(auto_deploy.fused_flattened_mha_with_cache, flat),
        "fused_flattened_mha_with_cache_rope_fusion": Call(
            auto_deploy.fused_flattened_mha_with_cache_rope_fusion, flat
        ),
        "fused_mha_with_paged_cache": Call(auto_deploy.fused_mha_with_paged_cache, {**flat, **pages}),
        "scaled_dot_product_attention": Call(auto_deploy.scaled_dot_product_attention, heads_first),
    }
