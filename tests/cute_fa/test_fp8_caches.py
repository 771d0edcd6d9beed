"""Caches of codes from append to attention: what new rows become in the cache is what queries in 16 bits then read."""

import dataclasses

import pytest
import torch

import cute_fa
from cute_fa.semantics.reference import attention
from tests.testing.caches import Rotary

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
PAGES, PAGE_SIZE, HEADS_KV = 12, 16, 2


@dataclasses.dataclass
class Cache:
    """Pages of two sequences in random order, NaN where nothing was appended."""

    k: torch.Tensor
    v: torch.Tensor
    descales: dict[str, torch.Tensor]
    page_table: torch.Tensor

    @classmethod
    def empty(cls, dtype_k: torch.dtype, dtype_v: torch.dtype, head_dim: int, head_dim_v: int) -> "Cache":
        rng = torch.Generator().manual_seed(2)
        k, v = (
            torch.full((2 * PAGES, PAGE_SIZE, HEADS_KV, size), torch.nan).to(dtype)
            for dtype, size in ((dtype_k, head_dim), (dtype_v, head_dim_v))
        )
        descales = {name: 0.01 + 0.02 * torch.rand(2, HEADS_KV, generator=rng) for name in ("k_descale", "v_descale")}
        return cls(k, v, descales, torch.randperm(2 * PAGES, generator=rng).int().view(2, PAGES))

    def rows(self, name: str, tokens: int) -> torch.Tensor:
        """Of k or v in fp64, (2, tokens, heads_kv, head_dim): value = code × descale."""
        codes = getattr(self, name).double()[self.page_table.long()].flatten(1, 2)[:, :tokens]
        return codes * self.descales[f"{name}_descale"].double()[:, None, :, None]


@pytest.mark.sampled
@pytest.mark.parametrize(("arch", "codes"), [
    ("sm_80", (E4M3, E4M3)),
    ("sm_86", (E5M2, E4M3)),
    ("sm_89", (E4M3, E5M2)),
    ("sm_90a", (E4M3, E4M3)),
    ("sm_100a", (E4M3, E4M3)),
    ("sm_120a", (E5M2, E5M2)),
    ("sm_80", (torch.int8, torch.int8)),
    ("sm_90a", (torch.int8, E4M3)),
    ("sm_89", (E5M2, torch.int8)),
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_append_prefill_and_decode(arch, codes, dtype):
    """A prompt of more than 128 tokens, a token, a few drafts, with rotary embedding."""
    rng = torch.Generator().manual_seed(7)
    cache, rotary = Cache.empty(*codes, 64, 32), Rotary.random(PAGES * PAGE_SIZE, 32)
    lengths = torch.zeros(2, dtype=torch.int32)
    for tokens in (140, 1, 5):
        q, k = (torch.randn(2, tokens, heads, 64, generator=rng).to(dtype) for heads in (8, HEADS_KV))
        v = torch.randn(2, tokens, HEADS_KV, 32, generator=rng).to(dtype)
        before = int(lengths[0])
        with cute_fa.simulate(arch, num_sms=4):
            out, lse = cute_fa.flash_attn_with_kvcache(
                *(q, cache.k, cache.v, k, v),
                cache_seqlens=lengths,
                page_table=cache.page_table,
                causal=True,
                return_lse=True,
                **rotary.arguments(),
                **cache.descales,
            )
        lengths = lengths + tokens
        keys, values = (cache.rows(name, before + tokens) for name in "kv")
        positions = before + torch.arange(tokens)
        # what was appended: rotated, divided, and rounded to the nearest code
        new_keys = torch.stack([rotary(row.double(), positions) for row in k])
        for rows, new, least in ((keys, new_keys, codes[0]), (values, v.double(), codes[1])):
            if least == torch.int8:  # of which the largest descale is 0.03
                bound = torch.maximum((new.abs() - 127 * 0.01), torch.tensor(0.51 * 0.03))
            else:
                bound = torch.maximum(new.abs() * 0.51 * torch.finfo(least).eps, torch.tensor(1e-3))
            assert ((rows[:, before:] - new).abs() <= bound).all()
        queries = torch.stack([rotary(row, positions) for row in q]).double()
        exact, exact_lse = attention(queries, keys, values, causal=True, dtype=torch.float64)
        assert (out - exact).abs().max() < 4 * torch.finfo(dtype).eps * exact.abs().max()
        assert (lse - exact_lse).abs().max() < 1e-3
        assert out.dtype is dtype
