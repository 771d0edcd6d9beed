"""An attention kernel on several problems, each checked against the reference: a script for ``python -m ptxsim``.

Arguments: whose kernel (cute-fa or fa4), head_dim, mask (full, causal, varlen: packed sequences and a window; paged),
and what (forward by default; fp8: the forward in e4m3; split: its keys in three parts; decode: few queries, the keys
cut evenly between CTAs, rows: the same from pages of one token, codes: from a cache in e4m3, descales: from one with a
descale for each row, invariant: in batch-invariant mode; backward; deterministic: the backward without atomic
additions). The problems are small, and made so that waits and barriers matter: tiles of queries without keys, with one
block of keys, two and many, and more tiles than SMs.
"""

import dataclasses
import os
import sys

os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "0")  # its cache on disk holds machine code for GPUs

import torch

from cute_fa.engine import autograd, worlds
from cute_fa.semantics import reference
from cute_fa.semantics.types import DType
from cute_fa.tools.inputs import Inputs, InputSpec, make_inputs, output_gradients
from tests.testing.gradients import call_of
from tests.testing.turns import Turns

# Parts of the keys, 0: cut evenly between CTAs, or in chunks.
SPLITS = {"split": 3, "decode": 0, "rows": 0, "codes": 0, "descales": 0, "invariant": 0}
CHUNKS = {"invariant": 256}
_CODES = {"dtype_k": DType.E4M3, "dtype_v": DType.E4M3}
CACHES = {"rows": {"page_size": 1}, "codes": _CODES, "descales": {**_CODES, "row_descales": "rows"}}


def problems(head_dim: int, mask: str, what: str) -> list[InputSpec]:
    if what in SPLITS:
        return [dataclasses.replace(spec, **CACHES.get(what, {})) for spec in decoding(head_dim, mask)]
    if what == "fp8":
        return [dataclasses.replace(spec, dtype=DType.E4M3) for spec in problems(head_dim, mask, "forward")]
    packed = {"varlen_q": True, "varlen_k": True}
    if what != "forward":
        if mask == "varlen":
            lengths = {"lengths_q": (100, 150, 200), "lengths_k": (500, 130, 20)}
            return [InputSpec(3, 200, 500, 2, 1, head_dim, window=(230, 20), **lengths, **packed)]
        # FlashAttention-4 for sm_90a has two stages of up to 128 queries
        seqlen_q = 400 if torch.cuda.get_device_capability() == (9, 0) else 200
        sizes = [(seqlen_q, 300, 2), (seqlen_q, 40, 1)]
        return [InputSpec(1, q, k, heads, 1, head_dim, causal=mask == "causal") for q, k, heads in sizes]
    if mask == "varlen":
        lengths = {"lengths_q": (260, 300, 600), "lengths_k": (800, 250, 30)}
        return [InputSpec(3, 600, 800, 1, 1, head_dim, window=(500, 20), **lengths, **packed)]
    if mask == "paged":
        lengths = {"lengths_k": (500, 250, 40), "page_size": 64}
        return [InputSpec(3, 300, 500, 1, 1, head_dim, causal=True, **lengths)]
    sizes = [(200, 450, 2), (400, 250, 1), (260, 40, 1)]
    if torch.cuda.get_device_capability() == (10, 0):
        # FlashAttention-4's ring has ten stages, another kernel is compiled for up to 256 queries, and at head_dim 128
        # two SMs share a tile; of two heads the last tiles have all their rows
        sizes[0] = (300, 800, 2)
    return [InputSpec(1, q, k, heads, heads, head_dim, causal=mask == "causal") for q, k, heads in sizes]


def decoding(head_dim: int, mask: str) -> list[InputSpec]:
    """Few queries of several heads that share keys: of one sequence with keys for all parts, of one with keys for the
    first part alone."""
    lengths = {
        "full": {"seqused_k": True},
        "causal": {"seqused_k": True, "causal": True},
        "varlen": {"varlen_q": True, "varlen_k": True, "window": (500, 20)},
        "paged": {"page_size": 16, "causal": True},
    }[mask]
    return [InputSpec(2, 3, 1100, 4, 1, head_dim, lengths_k=(1100, 50), **lengths)]


def fa4(given: Inputs):
    """(out, lse) of FlashAttention-4."""
    from flash_attn.cute import flash_attn_func, flash_attn_varlen_func

    spec = given.spec
    options = {"causal": spec.causal, "return_lse": True}
    if not spec.varlen_q:
        return flash_attn_func(given.q, given.k, given.v, **options)
    lengths = {"max_seqlen_q": spec.seqlen_q, "max_seqlen_k": spec.seqlen_k}
    packed = {"cu_seqlens_q": given.cu_seqlens_q, "cu_seqlens_k": given.cu_seqlens_k}
    return flash_attn_varlen_func(given.q, given.k, given.v, window_size=spec.window, **packed, **lengths, **options)


def check_forward(given: Inputs, whose: str, splits: int, chunk: int | None) -> None:
    tiled = torch.cuda.get_device_capability() == (9, 0) and splits == 1
    choices = {"persistent": "on"} if tiled else {}
    if chunk is not None:
        choices["seqlen_k_per_split"] = chunk
    out, lse = fa4(given) if whose == "fa4" else given.run(return_lse=True, num_splits=splits, **choices)
    result = reference.expected(given.q, given.k, given.v, **given.options()).check(out, lse)
    assert result.ok, f"{given.spec}: {result}"


def fa4_backward(given: Inputs, dout: torch.Tensor, out: torch.Tensor, lse: torch.Tensor) -> reference.Gradients:
    """dQ, dK and dV of FlashAttention-4."""
    from flash_attn.cute.interface import _flash_attn_bwd

    grads = _flash_attn_bwd(given.q, given.k, given.v, out, dout, lse, causal=given.spec.causal)[:3]
    return reference.Gradients.of("qkv", grads)


def check_backward(given: Inputs, whose: str, deterministic: bool) -> None:
    """After the reference's forward."""
    tensors = given.q, given.k, given.v
    out, lse = reference.attention(*tensors, **given.options())
    out, lse = out.to(given.q.dtype), lse.contiguous()
    dout, dlse = output_gradients(given, seed=1)
    if whose == "fa4":
        dlse, grads = None, fa4_backward(given, dout, out, lse)
    else:
        turns = Turns()
        worlds.simulation().observers.append(turns)
        grads = autograd.attention_backward(dout, dlse, out, lse, call_of(given, deterministic=deterministic))
        assert not turns.faults, f"{given.spec}: {turns.faults[0]}"
    errors = reference.expected_gradients(*tensors, dout, dlse, **given.options()).check(grads)
    assert all(error.ok for error in errors.values()), f"{given.spec}: {errors}"


def main(whose: str, head_dim: str, mask: str, what: str = "forward") -> None:
    for spec in problems(int(head_dim), mask, what):
        given = make_inputs(spec, "peaked", device="cuda")
        if what in ("forward", "fp8", *SPLITS):
            check_forward(given, whose, SPLITS.get(what, 1), CHUNKS.get(what))
        else:
            check_backward(given, whose, deterministic=what == "deterministic")


main(*sys.argv[1:])
