"""A forward kernel on several problems, each checked against the reference: a script for ``python -m ptxsim``.

Arguments: whose kernel (cute-fa or fa4), head_dim, mask (full, causal, or varlen: packed sequences and a window). The
problems are small, and made so that waits and barriers matter: tiles of queries without keys, with one block of keys,
two and many, and more tiles than SMs.
"""

import os
import sys

os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "0")  # its cache on disk holds machine code for GPUs

import torch

from cute_fa.inputs import InputSpec, make_inputs
from cute_fa.reference import expected


def problems(head_dim: int, mask: str) -> list[InputSpec]:
    if mask == "varlen":
        lengths = {"varlen_q": True, "varlen_k": True, "lengths_q": (260, 600, 150), "lengths_k": (800, 30, 250)}
        return [InputSpec(3, 600, 800, 1, 1, head_dim, window=(500, 20), **lengths)]
    sizes = [(200, 450, 2), (400, 250, 1), (260, 40, 1)]
    return [InputSpec(1, q, k, heads, heads, head_dim, causal=mask == "causal") for q, k, heads in sizes]


def fa4(given):
    """(out, lse) of FlashAttention-4."""
    from flash_attn.cute import flash_attn_func, flash_attn_varlen_func

    spec = given.spec
    options = {"causal": spec.causal, "return_lse": True}
    if not spec.varlen_q:
        return flash_attn_func(given.q, given.k, given.v, **options)
    lengths = {"max_seqlen_q": spec.seqlen_q, "max_seqlen_k": spec.seqlen_k}
    packed = {"cu_seqlens_q": given.cu_seqlens_q, "cu_seqlens_k": given.cu_seqlens_k}
    return flash_attn_varlen_func(given.q, given.k, given.v, window_size=spec.window, **packed, **lengths, **options)


def main(whose: str, head_dim: str, mask: str) -> None:
    for spec in problems(int(head_dim), mask):
        given = make_inputs(spec, "peaked", device="cuda")
        persistent = {"persistent": "on"} if torch.cuda.get_device_capability() == (9, 0) else {}
        out, lse = fa4(given) if whose == "fa4" else given.run(return_lse=True, **persistent)
        result = expected(given.q, given.k, given.v, **given.options()).check(out, lse)
        assert result.ok, f"{spec}: {result}"


main(*sys.argv[1:])
