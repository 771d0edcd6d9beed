"""The append as the dispatch table sees it: what it serves, how it is configured, what it is launched with."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, NamedTuple

from cute_fa.device.tiling import ceil_div
from cute_fa.engine.contract import AppendTensors, AttentionKernel, Descales
from cute_fa.semantics.append_problem import MAX_HEAD_DIM, ROTARY_STEP, AppendProblem
from cute_fa.semantics.types import Direction
from fa2_sm80.append.config import MAX_ROWS, NUM_THREADS, AppendConfig, chunk_of, lanes_of_row
from fa2_sm80.common.rules import MAX_CTAS

if TYPE_CHECKING:
    import torch


class NewRows(NamedTuple):
    """In the order of ``fa2_sm80.append.arguments.NewRows``."""

    tensor: torch.Tensor
    cu_seqlens: torch.Tensor | None
    seqused: torch.Tensor | None
    longest: int


class Cache(NamedTuple):
    """In the order of ``fa2_sm80.append.arguments.Cache``."""

    k: torch.Tensor
    v: torch.Tensor
    page_table: torch.Tensor | None
    cache_batch_idx: torch.Tensor | None


class Rotary(NamedTuple):
    """In the order of ``fa2_sm80.append.arguments.Rotary``."""

    cos: torch.Tensor
    sin: torch.Tensor
    seqlens: torch.Tensor | None
    query_step: int


class Launch(NamedTuple):
    """What a launch takes, in the order of ``fa2_sm80.append.arguments.AppendArguments``."""

    q: NewRows | None
    q_rotated: torch.Tensor | None
    k: NewRows
    v: torch.Tensor
    cache: Cache
    cache_seqlens: torch.Tensor
    seqused_k: torch.Tensor
    rotary: Rotary | None
    descales: Descales | None


class Fa2Append(AttentionKernel):
    """Append with 16-byte copies, for sm_80 and every arch after it: fp16, bf16 and fp8, head_dim 8 … 256."""

    family = "fa2"
    direction = Direction.APPEND

    @classmethod
    def supports(cls, problem: AppendProblem) -> list[str]:
        reasons = []
        for name, dtype in zip(("head_dim", "head_dim_v"), problem.cache_dtypes, strict=True):
            size, step = getattr(problem, name), chunk_of(dtype)
            if size % step or not step <= size <= MAX_HEAD_DIM:
                rule = f"a multiple of {step} from {step} to {MAX_HEAD_DIM} is needed (16-byte copies)"
                reasons.append(f"{name} {size}: {rule}")
        if problem.rotary_dim % ROTARY_STEP or problem.rotary_dim > problem.head_dim:
            rule = f"a multiple of {ROTARY_STEP}, at most head_dim {problem.head_dim}, is needed"
            reasons.append(f"rotary_dim {problem.rotary_dim}: {rule}")
        return reasons or _launch_objections(problem)

    @classmethod
    def configure(cls, problem: AppendProblem) -> AppendConfig:
        return AppendConfig(**{field.name: getattr(problem, field.name) for field in fields(AppendConfig)})

    @classmethod
    def arguments(cls, problem: AppendProblem, config: AppendConfig, tensors: AppendTensors, num_sms: int) -> Launch:
        t, call = tensors, tensors.call
        q = None
        if t.q is not None:
            q = NewRows(t.q, call.cu_seqlens_q, call.seqused_q, problem.tokens_q)
        rotary = None
        if call.rotary_cos is not None:
            rotary = Rotary(call.rotary_cos, call.rotary_sin, call.rotary_seqlens, int(call.rotate_each))
        descales = None
        if problem.quantises:
            k_descale = call.k_row_descale if problem.k_row_descale else call.k_descale
            v_descale = call.v_row_descale if problem.v_row_descale else call.v_descale
            descales = Descales(None, k_descale, v_descale)
        return Launch(
            q=q,
            q_rotated=t.q_rotated,
            k=NewRows(t.k, call.cu_seqlens_k_new, call.seqused_k_new, problem.tokens_k),
            v=t.v,
            cache=Cache(t.k_cache, t.v_cache, call.page_table, call.cache_batch_idx),
            cache_seqlens=call.cache_seqlens,
            seqused_k=t.seqused_k,
            rotary=rotary,
            descales=descales,
        )


def _launch_objections(problem: AppendProblem) -> list[str]:
    """Reasons why a launch is too large."""
    rows = {"query heads": problem.tokens_q * problem.num_heads, "kv heads": problem.tokens_k * problem.num_heads_kv}
    reasons = [f"{count} tokens × {heads}: at most {MAX_ROWS}" for heads, count in rows.items() if count > MAX_ROWS]
    widest = max(problem.head_dim, problem.head_dim_v)
    per_cta = NUM_THREADS // lanes_of_row(widest, problem.dtype, problem.k_row_descale or problem.v_row_descale)
    ctas = problem.batch * (2 + sum(2 * ceil_div(count, per_cta) for count in rows.values()))
    if ctas > MAX_CTAS:
        reasons.append(f"{ctas} CTAs: a grid has at most {MAX_CTAS}")
    return reasons
