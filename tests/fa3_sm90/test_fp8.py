"""The FA3 forward in fp8."""

import math
from typing import NamedTuple

import pytest
import torch

import cute_fa
from cute_fa.semantics.problem import AttentionProblem
from cute_fa.semantics.types import DType, SmArch
from fa3_sm90.forward.entry import Fa3Forward

E4M3 = torch.float8_e4m3fn
CODES = {DType.E4M3: E4M3, DType.E5M2: torch.float8_e5m2}
# P is e4m3 and at most 2^8.75; the references of a row lie 2^8 below its maximum.
P_SCALE = 2.0**8


class Case(NamedTuple):
    """Queries, keys, query heads and kv heads of ``batch`` sequences; ``spread``: standard deviation of q and k."""

    head_dim: int
    seqlen_q: int
    seqlen_k: int
    causal: bool = False
    heads: int = 2
    heads_kv: int = 1
    batch: int = 1
    spread: float = 1.5
    dtype: DType = DType.E4M3
    head_dim_v: int | None = None

    def problem(self) -> AttentionProblem:
        return AttentionProblem(
            arch=SmArch.SM_90A,
            dtype=self.dtype,
            batch=self.batch,
            seqlen_q=self.seqlen_q,
            seqlen_k=self.seqlen_k,
            num_heads=self.heads,
            num_heads_kv=self.heads_kv,
            head_dim=self.head_dim,
            head_dim_v=self.head_dim_v or self.head_dim,
            softmax_scale=self.head_dim**-0.5,
            window_right=0 if self.causal else None,
        )


class Codes(NamedTuple):
    """q, k, v in fp8 and their descales, fp32 (batch, heads_kv)."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    descales: tuple[torch.Tensor, torch.Tensor, torch.Tensor]

    @classmethod
    def peaked(cls, case: Case) -> "Codes":
        """The first columns of V are digits ±1 of the key's index: a key too many or too few moves O by about 1."""
        generator = torch.Generator().manual_seed(0)

        def normal(tokens: int, heads: int, spread: float, columns: int = case.head_dim) -> torch.Tensor:
            return torch.randn(case.batch, tokens, heads, columns, generator=generator) * spread

        q = normal(case.seqlen_q, case.heads, case.spread).to(CODES[case.dtype])
        k = normal(case.seqlen_k, case.heads_kv, case.spread).to(CODES[case.dtype])
        v = normal(case.seqlen_k, case.heads_kv, 1.0, case.head_dim_v or case.head_dim)
        digits = (torch.arange(case.seqlen_k)[:, None] >> torch.arange(10)) % 2 * 2 - 1
        v[..., :10] = digits[None, :, None]
        scales = (torch.rand(case.batch, case.heads_kv, generator=generator) + 0.5 for _ in range(3))
        return cls(q, k, v.to(CODES[case.dtype]), tuple(scales))

    def run(self, case: Case, num_sms: int = 2, **simulation) -> tuple[torch.Tensor, torch.Tensor]:
        """(out, lse) of the kernel, simulated."""
        q_descale, k_descale, v_descale = self.descales
        descales = {"q_descale": q_descale, "k_descale": k_descale, "v_descale": v_descale}
        with cute_fa.simulate("sm_90a", num_sms=num_sms, **simulation):
            return cute_fa.flash_attn_func(self.q, self.k, self.v, causal=case.causal, **descales, return_lse=True)

    def expected(self, case: Case, rounds_p: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """(out, lse) in fp64 of the dequantised values; ``rounds_p``: P in e4m3 as the kernel has it."""
        shared = case.heads // case.heads_kv
        q_scale, k_scale, v_scale = (scale.double()[:, None, :, None] for scale in self.descales)
        q = self.q.double() * q_scale.repeat_interleave(shared, 2)
        k = (self.k.double() * k_scale).repeat_interleave(shared, 2)
        v = (self.v.double() * v_scale).repeat_interleave(shared, 2)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * case.head_dim**-0.5
        if case.causal:
            hidden = torch.arange(case.seqlen_k) > torch.arange(case.seqlen_q)[:, None] + case.seqlen_k - case.seqlen_q
            scores = scores.masked_fill(hidden, -math.inf)
        lse = scores.logsumexp(-1)
        p = (scores - scores.amax(-1, keepdim=True).clamp(min=-1e9)).exp()
        total = p.sum(-1, keepdim=True).clamp(min=1e-300)  # 0 for rows without keys
        if rounds_p:
            p = (p.float() * P_SCALE).to(E4M3).double() / P_SCALE
        return torch.einsum("bhqk,bkhd->bqhd", p / total, v), lse


CASES = [
    Case(128, 70, 300),
    Case(128, 130, 257, causal=True, heads=4, heads_kv=2),
    Case(128, 200, 129, causal=True, heads=1),
    Case(128, 5, 1, heads=4, heads_kv=4, batch=2),
    Case(64, 70, 321, causal=True, batch=2),
    Case(64, 129, 160, heads=3),
    Case(256, 70, 130, causal=True),
    Case(256, 66, 193, heads=2, heads_kv=2, spread=4.0),
    Case(128, 70, 300, causal=True, spread=5.0),
    Case(64, 40, 500, spread=5.0),
    Case(128, 70, 300, causal=True, dtype=DType.E5M2),
    Case(64, 70, 300, dtype=DType.E5M2),
]
SCHEDULES = [{"race": True}, {"late": True, "schedule_seed": 1}, {"late": True, "schedule_seed": 2, "race": True}]


@pytest.mark.parametrize("index", range(len(CASES)))
def test_against_the_reference(index):
    case = CASES[index]
    codes = Codes.peaked(case)
    out, lse = codes.run(case, num_sms=1 + index % 2, **SCHEDULES[index % len(SCHEDULES)])
    exact, exact_lse = codes.expected(case)
    rounded, _ = codes.expected(case, rounds_p=True)
    tolerance = 2 * (rounded - exact).abs().max() + exact.abs().max() * 2**-8
    seen = exact_lse.isfinite()
    assert (out.double() - exact).abs().max() <= tolerance
    assert (lse - exact_lse)[seen].abs().max() <= 1e-3
    assert (lse[~seen] == -math.inf).all()


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_sums_do_not_lose_bits_over_many_keys(head_dim):
    """With the accumulator's 14 bits, on what it loses most of: near-uniform scores and values of mean 1. Without
    promotion the error is 0.1 at 8192 keys and head_dim 64."""
    case = Case(head_dim, 64, 4096, heads=1, spread=0.3)
    codes = Codes.peaked(case)
    codes = codes._replace(v=(torch.randn(codes.v.shape, generator=torch.Generator().manual_seed(1)) + 1).to(E4M3))
    out, lse = codes.run(case, fp8_bits=14)
    exact, exact_lse = codes.expected(case)
    assert (out.double() - exact).norm() <= 2.5e-3 * exact.norm()  # of which bf16 is 1.7e-3
    assert (lse - exact_lse).abs().max() <= 1e-3


@pytest.mark.parametrize(("head_dim", "every"), [(64, 5), (128, 4), (256, 2)])
def test_promotion_is_part_of_the_config(head_dim, every):
    config = Fa3Forward.configure(Case(head_dim, 64, 64).problem())
    assert config.promote_every == every
    assert config.smem_bytes <= SmArch.SM_90A.smem_bytes
