"""Attention in plain torch: what every kernel is compared with, and by how much it may differ.

The formula, with D = seqlen_k − seqlen_q of the sequence, for query i, key j and query head h:

    s = softmax_scale · q_i · k_j;   s = c·tanh(s/c) if softcap c > 0;   s = s − slope[h]·|i + D − j| with ALiBi
    key j is visible iff j ≤ i + D + right, and j ≥ i + D − left or j < sink_tokens
    O_i = Σ_j p_j v_j with p the softmax over the visible keys and, if given, the extra logit learnable_sink[h]

LSE is the natural logarithm of the softmax's denominator. A row without visible keys has O = 0 and LSE = −inf, or
learnable_sink[h]. Rows beyond seqused_q have O = 0 and LSE = −inf. Only elements inside the lengths are read.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from cute_fa.problem import default_scale, normalize_window

# Scores held at once, in elements: bounds the memory at long lengths.
_MAX_SCORES = 2**24
LSE_TOLERANCE = 1e-3
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


class _Span(NamedTuple):
    """One sequence: where its rows start in the packed tensor (0 if dense), and how many count."""

    batch: int
    start_q: int
    seqlen_q: int
    start_k: int
    seqlen_k: int


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    seqused_q: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    page_table: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (None, None),
    sink_tokens: int = 0,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    learnable_sink: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Reference attention; returns (out, lse).

    q: (batch, seqlen_q, heads, head_dim), or (total_q, heads, head_dim) with ``cu_seqlens_q`` (batch + 1).
    k, v: (batch, seqlen_k, heads_kv, head_dim | head_dim_v), or (total_k, heads_kv, …) with ``cu_seqlens_k``, or pages
    (num_pages, page_size, heads_kv, …) with ``page_table`` (batch, max_pages); lengths are then ``seqused_k`` (batch),
    else the differences of ``cu_seqlens_k``, else whole rows of the table.
    alibi_slopes: (heads) or (batch, heads). learnable_sink: (heads). softmax_scale: 1/√head_dim by default.
    out: q's shape with head_dim_v, of ``dtype``; lse: (batch, heads, seqlen_q) or (heads, total_q).

    ``dtype`` float32 or float64 computes in that precision. A lower one (bfloat16, float16) rounds to it whatever a
    plain implementation in that type would store: scores, probabilities and O; the ALiBi bias, whose positions such
    types cannot hold, stays fp32, as does the softmax. An fp8 type rounds the exponentials alone, relative to the row's
    maximum, and leaves O in fp32: its scores and results are never fp8. LSE is never lower than fp32.
    """
    compute = dtype if dtype in (torch.float32, torch.float64) else torch.float32
    left, right = normalize_window(window_size, causal)
    heads, head_dim = q.shape[-2:]
    scale = default_scale(head_dim) if softmax_scale is None else softmax_scale
    out = torch.zeros(*q.shape[:-1], v.shape[-1], dtype=compute if dtype in _FP8 else dtype, device=q.device)
    lse_shape = (heads, q.shape[0]) if cu_seqlens_q is not None else (q.shape[0], heads, q.shape[1])
    lse = torch.full(lse_shape, -math.inf, dtype=compute, device=q.device)

    for span in _spans(q, k, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, page_table):
        rows = slice(span.start_q, span.start_q + span.seqlen_q)
        q_s = q[rows] if cu_seqlens_q is not None else q[span.batch, rows]
        out_s = out[rows] if cu_seqlens_q is not None else out[span.batch, rows]
        lse_s = lse[:, rows] if cu_seqlens_q is not None else lse[span.batch, :, rows]
        k_s, v_s = (_keys(t, span, cu_seqlens_k, page_table).to(compute) for t in (k, v))
        slopes = alibi_slopes[span.batch] if alibi_slopes is not None and alibi_slopes.dim() == 2 else alibi_slopes
        step = max(1, _MAX_SCORES // max(1, heads * span.seqlen_k))
        for first in range(0, span.seqlen_q, step):
            chunk = slice(first, min(first + step, span.seqlen_q))
            position = torch.arange(chunk.start, chunk.stop, device=q.device) + span.seqlen_k - span.seqlen_q
            key = torch.arange(span.seqlen_k, device=q.device)
            distance = position[:, None] - key
            visible = torch.ones_like(distance, dtype=torch.bool)
            if left is not None:
                visible &= (distance <= left) | (key < sink_tokens)
            if right is not None:
                visible &= distance >= -right
            scores = _scores(q_s[chunk].to(compute), k_s, scale, softcap, compute if dtype in _FP8 else dtype)
            if slopes is not None:
                scores = scores - slopes.to(compute)[:, None, None] * distance.abs()
            scores = scores.masked_fill(~visible, -math.inf)
            out_s[chunk], lse_s[:, chunk] = _softmax_pv(scores, v_s, learnable_sink, dtype)
    return out, lse


def _spans(q, k, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, page_table) -> list[_Span]:
    """Every sequence of the batch."""
    if cu_seqlens_q is not None:
        starts_q = cu_seqlens_q.tolist()
        batch, lengths_q = len(starts_q) - 1, [b - a for a, b in itertools.pairwise(starts_q)]
    else:
        batch = q.shape[0]
        starts_q, lengths_q = [0] * batch, [q.shape[1]] * batch
    starts_k = [0] * batch
    if cu_seqlens_k is not None:
        ends = cu_seqlens_k.tolist()
        lengths_k = [b - a for a, b in itertools.pairwise(ends)]
        if page_table is None:
            starts_k = ends
    elif page_table is not None:
        lengths_k = [page_table.shape[1] * k.shape[1]] * batch
    else:
        lengths_k = [k.shape[1]] * batch
    if seqused_q is not None:
        lengths_q = seqused_q.tolist()
    if seqused_k is not None:
        lengths_k = seqused_k.tolist()
    return [_Span(b, starts_q[b], lengths_q[b], starts_k[b], lengths_k[b]) for b in range(batch)]


def _keys(tensor, span: _Span, cu_seqlens_k, page_table) -> torch.Tensor:
    """Rows of k or v that belong to one sequence: (seqlen_k, heads_kv, …)."""
    if page_table is not None:
        page_size = tensor.shape[1]
        pages = page_table[span.batch, : -(-span.seqlen_k // page_size)].long()
        # gathers only slots that count: a page's unused slots may hold anything
        slots = torch.arange(span.seqlen_k, device=tensor.device)
        return tensor[pages[slots // page_size], slots % page_size]
    if cu_seqlens_k is not None:
        return tensor[span.start_k : span.start_k + span.seqlen_k]
    return tensor[span.batch, : span.seqlen_k]


def _scores(q, k, scale: float, softcap: float, dtype: torch.dtype) -> torch.Tensor:
    """softcap(scale · q·kᵀ): (heads, rows, keys), rounded to ``dtype`` after every step, stored in q's dtype."""
    groups = k.shape[1]
    rows, heads, head_dim = q.shape
    grouped = q.transpose(0, 1).reshape(groups, heads // groups * rows, head_dim)
    scores = (grouped @ k.permute(1, 2, 0)).reshape(heads, rows, k.shape[0])
    scores = _rounded(_rounded(scores, dtype) * scale, dtype)
    if softcap > 0.0:
        scores = _rounded(_rounded(torch.tanh(_rounded(scores / softcap, dtype)), dtype) * softcap, dtype)
    return scores


def _softmax_pv(scores, v, learnable_sink, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, heads, head_dim_v) and LSE (heads, rows) of masked scores (heads, rows, keys)."""
    lse = torch.logsumexp(scores, dim=-1)
    if learnable_sink is not None:
        lse = torch.logaddexp(lse, learnable_sink.to(lse.dtype)[:, None])
    # exp(−inf − −inf) is NaN where nothing is visible: subtract 0 there
    reference = lse.masked_fill(lse == -math.inf, 0.0)
    if dtype in _FP8 and scores.shape[-1]:
        # at most 1 before rounding, as in a kernel, which normalises last: fp8 would flush small probabilities to 0
        reference = scores.amax(-1).masked_fill(lse == -math.inf, 0.0)
    p = _rounded(torch.exp(scores - reference[..., None]), dtype)
    heads, rows, keys = p.shape
    groups = v.shape[1]
    out = p.reshape(groups, heads // groups * rows, keys) @ v.transpose(0, 1)
    out = out.reshape(heads, rows, v.shape[-1])
    if dtype in _FP8:
        out = out * torch.exp(reference - lse.masked_fill(lse == -math.inf, 0.0))[..., None]
    return out.transpose(0, 1), lse


def _rounded(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return x if dtype in (torch.float32, torch.float64) else x.to(dtype).to(x.dtype)


class Comparison(NamedTuple):
    """Largest errors of a kernel's result, and what is allowed; infinite for NaN or a −inf in the wrong place."""

    out_error: float
    out_allowed: float
    lse_error: float
    lse_allowed: float

    @property
    def ok(self) -> bool:
        return self.out_error <= self.out_allowed and self.lse_error <= self.lse_allowed


@dataclass(frozen=True)
class Expected:
    """What a kernel should return: fp32 ``out`` and ``lse``, and the largest error allowed of each."""

    out: torch.Tensor
    lse: torch.Tensor
    out_allowed: float
    lse_allowed: float = LSE_TOLERANCE

    def check(self, out: torch.Tensor, lse: torch.Tensor | None = None) -> Comparison:
        """Compare a result; without ``lse`` only O is compared."""
        return Comparison(
            _largest_error(out, self.out),
            self.out_allowed,
            0.0 if lse is None else _largest_error(lse, self.lse),
            self.lse_allowed,
        )


def expected(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options) -> Expected:
    """Reference result and tolerance for inputs of a low-precision type; options as for :func:`attention`.

    The rule: max|out − ref32| ≤ 2·max|lowprec − ref32| + eps·max|ref32|, where lowprec is the same formula in the
    input's type, for fp8 the fp32 formula with P rounded to e4m3, and eps that of the output's type, bf16 for fp8; LSE
    within 1e-3, −inf exactly where the reference has it.
    """
    fp8 = q.dtype in _FP8
    out, lse = attention(q, k, v, **options)
    low, _ = attention(q, k, v, **options, dtype=torch.float8_e4m3fn if fp8 else q.dtype)
    largest = out.abs().max().item() if out.numel() else 0.0
    allowed = 2.0 * _largest_error(low, out) + torch.finfo(torch.bfloat16 if fp8 else q.dtype).eps * largest
    return Expected(out, lse, allowed)


def check(out: torch.Tensor, lse: torch.Tensor | None, q, k, v, **options) -> Comparison:
    """Compare a kernel's result with the reference; options as for :func:`attention`."""
    return expected(q, k, v, **options).check(out, lse)


def _largest_error(actual: torch.Tensor, reference: torch.Tensor) -> float:
    """max|actual − reference|; equal infinities count as 0, NaN and differing shapes as infinite."""
    if actual.shape != reference.shape:
        return math.inf
    if not actual.numel():
        return 0.0
    actual = actual.detach().to(reference.dtype)
    error = torch.where(actual == reference, torch.zeros_like(reference), (actual - reference).abs())
    return error.nan_to_num(nan=math.inf, posinf=math.inf).max().item()
