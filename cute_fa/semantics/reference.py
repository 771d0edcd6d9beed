"""Attention in plain torch: what every kernel is compared with, and by how much it may differ.

The formula, with D = seqlen_k − seqlen_q of the sequence, for query i, key j and query head h:

    s = softmax_scale · q_i · k_j;   s = c·tanh(s/c) if softcap c > 0;   s = s − slope[h]·|i + D − j| with ALiBi
    with q, k, v of fp8 the codes times q_descale[b, g], k_descale[b, g], v_descale[b, g], g the kv head
    key j is visible iff j ≤ i + D + right, and j ≥ i + D − left or j < sink_tokens
    O_i = Σ_j p_j v_j with p the softmax over the visible keys and, if given, the extra logit learnable_sink[h]

under a tree mask, a visible key j ≥ D is draft j − D, and hidden where that bit of the query's words is not set

under a range plan, key j is visible iff a range names the pair (``cute_fa.semantics.ranges``), and ALiBi's distance is
|q_positions[i] − k_positions[j]|, by default |i − j|.

LSE is the natural logarithm of the softmax's denominator. A row without visible keys has O = 0 and LSE = −inf, or
learnable_sink[h]; a sink of −inf is none. Rows beyond seqused_q have O = 0 and LSE = −inf. Only elements inside the
lengths are read.

The backward, with dO and dLSE the gradients of O and LSE (Dao et al., FlashAttention, 2022, appendix B.2; dLSE and the
sink follow from ∂LSE/∂s_ij = p_ij):

    D_i = dO_i · O_i − dLSE_i, without dLSE_i where LSE_i = −inf
    dp_ij = dO_i · v_j;   ds_ij = p_ij (dp_ij − D_i), 0 for hidden keys and empty rows
    dslope[h] = −Σ_ij ds_ij |i + D − j|;   dsink[h] = −Σ_i exp(learnable_sink[h] − LSE_i) D_i,
    rows of LSE_i = −inf left out
    dx_ij = ds_ij (1 − tanh²(s_ij/c)) with softcap;   dq_i = softmax_scale Σ_j dx_ij k_j
    dk_j = softmax_scale Σ_i dx_ij q_i and dv_j = Σ_i p_ij dO_i, summed over the query heads of a kv head
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

import torch
from typing_extensions import Unpack

from cute_fa.semantics.errors import ArgumentError
from cute_fa.semantics.problem import DESCALE_BLOCK, default_scale, normalize_window
from cute_fa.semantics.ranges import HostRanges
from cute_fa.semantics.visibility import key_intervals

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

# Scores held at once, in elements: bounds the memory at long lengths.
_MAX_SCORES = 2**24
LSE_TOLERANCE = 1e-3
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_P_OFFSET = 8.0 * math.log(2.0)  # of exponents in fp8: e4m3 ends at 448


class Gradients(NamedTuple):
    """dq, dk, dv in the shapes of q, k and v; dalibi in that of alibi_slopes, dsink (heads), None where absent."""

    dq: torch.Tensor
    dk: torch.Tensor
    dv: torch.Tensor
    dalibi: torch.Tensor | None
    dsink: torch.Tensor | None

    @classmethod
    def of(cls, variables: Iterable[str], grads: Iterable[torch.Tensor]) -> Gradients:
        """Gradients of variables by their names: q, k, v, alibi_slopes, learnable_sink."""
        by_name = dict(zip(variables, grads, strict=True))
        parameters = by_name.get("alibi_slopes"), by_name.get("learnable_sink")
        return cls(by_name["q"], by_name["k"], by_name["v"], *parameters)


class ReferenceOptions(TypedDict, total=False):
    """Keyword arguments of :func:`attention` but for ``dtype``, for type checkers."""

    cu_seqlens_q: torch.Tensor | None
    cu_seqlens_k: torch.Tensor | None
    seqused_q: torch.Tensor | None
    seqused_k: torch.Tensor | None
    page_table: torch.Tensor | None
    cache_batch_idx: torch.Tensor | None
    cache_leftpad: torch.Tensor | None
    softmax_scale: float | None
    causal: bool
    window_size: tuple[int | None, int | None]
    sink_tokens: int
    softcap: float
    alibi_slopes: torch.Tensor | None
    learnable_sink: torch.Tensor | None
    q_descale: torch.Tensor | None
    k_descale: torch.Tensor | None
    v_descale: torch.Tensor | None
    q_ranges: torch.Tensor | None
    k_ranges: torch.Tensor | None
    attn_type_map: torch.Tensor | None
    q_positions: torch.Tensor | None
    k_positions: torch.Tensor | None
    tree_mask: torch.Tensor | None


class _RangePlan(NamedTuple):
    """``visible`` bool (seqlen_q, seqlen_k), and positions of queries and keys."""

    visible: torch.Tensor
    q_positions: torch.Tensor
    k_positions: torch.Tensor

    @classmethod
    def of(
        cls,
        q: torch.Tensor,
        k: torch.Tensor,
        q_ranges: torch.Tensor | None,
        k_ranges: torch.Tensor | None,
        attn_type_map: torch.Tensor | None,
        q_positions: torch.Tensor | None,
        k_positions: torch.Tensor | None,
    ) -> _RangePlan | None:
        """Of q and k (1, rows, heads, head_dim); None without ranges."""
        if q_ranges is None:
            return None
        given: Any = [None if t is None else t.cpu().numpy() for t in (q_ranges, k_ranges, attn_type_map)]
        host = HostRanges(given[0], given[1], given[2], q.shape[1], k.shape[1])
        of_q, of_k = (
            torch.arange(t.shape[1], device=q.device) if given is None else given
            for t, given in ((q, q_positions), (k, k_positions))
        )
        return cls(torch.from_numpy(host.mask()).to(q.device), of_q, of_k)


class _Span(NamedTuple):
    """One sequence: where its rows start in the packed tensor, or the cache, and how many count. ``sequence``: of dense
    k and v, or row of the page table."""

    batch: int
    sequence: int
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
    cache_batch_idx: torch.Tensor | None = None,
    cache_leftpad: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (None, None),
    sink_tokens: int = 0,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    learnable_sink: torch.Tensor | None = None,
    q_descale: torch.Tensor | None = None,
    k_descale: torch.Tensor | None = None,
    v_descale: torch.Tensor | None = None,
    q_ranges: torch.Tensor | None = None,
    k_ranges: torch.Tensor | None = None,
    attn_type_map: torch.Tensor | None = None,
    q_positions: torch.Tensor | None = None,
    k_positions: torch.Tensor | None = None,
    tree_mask: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Reference attention; returns (out, lse).

    q: (batch, seqlen_q, heads, head_dim), or (total_q, heads, head_dim) with ``cu_seqlens_q`` (batch + 1).
    k, v: (batch, seqlen_k, heads_kv, head_dim | head_dim_v), or (total_k, heads_kv, …) with ``cu_seqlens_k``, or pages
    (num_pages, page_size, heads_kv, …) with ``page_table`` (batch, max_pages); lengths are then ``seqused_k`` (batch),
    else the differences of ``cu_seqlens_k``, else whole rows of the table.
    cache_batch_idx (batch): which sequence of k and v, or row of page_table, each one of the batch reads; cache_leftpad
    (batch): rows before its first key, which its length counts.
    alibi_slopes: (heads) or (batch, heads). learnable_sink: (heads). q_descale, k_descale, v_descale: (batch, heads_kv)
    or one number, 1 by default; those of k and v also (batch, heads_kv, blocks), one for each 128 keys of a sequence,
    or of four dimensions that broadcast against k and v, which are no packed rows then.
    q_ranges, k_ranges, attn_type_map, q_positions, k_positions: a range plan, as for ``cute_fa.range_attention``, of a
    batch of one sequence; nothing else then says what is visible.
    tree_mask: int32 (batch, seqlen_q, words), packed (total_q, words): bit j of word w is set where the query sees
    draft 32 · w + j.
    softmax_scale: 1/√head_dim by default.
    out: q's shape with head_dim_v, of ``dtype``; lse: (batch, heads, seqlen_q) or (heads, total_q).

    ``dtype`` float32 or float64 computes in that precision. A lower one (bfloat16, float16) rounds to it whatever a
    plain implementation in that type would store: scores, probabilities and O; the ALiBi bias, whose positions such
    types cannot hold, stays fp32, as does the softmax. An fp8 type rounds the exponentials alone, times 2^8 relative to
    the row's maximum, and leaves O in fp32: its scores and results are never fp8. LSE is never lower than fp32.
    """
    compute = dtype if dtype in (torch.float32, torch.float64) else torch.float32
    left, right = normalize_window(window_size, causal)
    heads, head_dim = q.shape[-2:]
    scale = default_scale(head_dim) if softmax_scale is None else softmax_scale
    out = torch.zeros(*q.shape[:-1], v.shape[-1], dtype=compute if dtype in _FP8 else dtype, device=q.device)
    lse_shape = (heads, q.shape[0]) if cu_seqlens_q is not None else (q.shape[0], heads, q.shape[1])
    lse = torch.full(lse_shape, -math.inf, dtype=compute, device=q.device)

    plan = _RangePlan.of(q, k, q_ranges, k_ranges, attn_type_map, q_positions, k_positions)
    lengths = cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k
    for span in _spans(q, k, lengths, (page_table, cache_batch_idx, cache_leftpad)):
        k_s, v_s = (_keys(t, span, cu_seqlens_k, page_table).to(compute) for t in (k, v))
        of_k, of_v = (_of_rows(d, t, span, page_table) for d, t in ((k_descale, k), (v_descale, v)))
        k_s, v_s = _descaled(k_s, of_k, span), _descaled(v_s, of_v, span)
        slopes = _slopes(alibi_slopes, span, compute)
        for rows, distance, visible in _pieces(span, heads, left, right, sink_tokens, plan, q.device):
            at, at_lse = _index(span, rows, cu_seqlens_q)
            if tree_mask is not None:
                visible = visible & _in_tree(tree_mask[at], span)
            q_s = _descaled(q[at].to(compute), q_descale, span)
            scores = _scores(q_s, k_s, scale, softcap, compute if dtype in _FP8 else dtype)
            scores = _masked(scores, slopes, distance, visible)
            out[at], lse[at_lse], _ = _softmax_pv(scores, v_s, learnable_sink, dtype)
    return out, lse


_DEFAULTS = {name: value for name, value in (attention.__kwdefaults__ or {}).items() if name != "dtype"}


def gradients(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dout: torch.Tensor,
    dlse: torch.Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    **options: Unpack[ReferenceOptions],
) -> Gradients:
    """Reference gradients for those of out (``dout``) and lse (``dlse``, zero by default), in the shapes that
    :func:`attention` returns; options as there, without pages.

    A ``dtype`` lower than fp32 rounds what a plain implementation in that type would store: beside the forward's values
    dp, ds, dx and the results. The gradients of slopes and sink are never lower than fp32.
    """
    return _gradients(q, k, v, dout, dlse, options, dtype)[0]


def _gradients(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    options: ReferenceOptions,
    dtype: torch.dtype,
) -> tuple[Gradients, dict[str, torch.Tensor]]:
    """The gradients, and of dalibi and dsink the sums of the squares of their terms."""
    unknown = options.keys() - _DEFAULTS.keys()
    if unknown:
        raise TypeError(f"gradients: no such option: {', '.join(sorted(unknown))}")
    o = SimpleNamespace(**_DEFAULTS | dict(options))
    if any(t is not None for t in (o.q_descale, o.k_descale, o.v_descale)):
        raise ArgumentError("gradients with descales: nothing computes gradients in fp8")
    if o.tree_mask is not None:
        raise ArgumentError("gradients with tree_mask: drafts have no gradient")
    softcap, alibi_slopes, learnable_sink = o.softcap, o.alibi_slopes, o.learnable_sink
    if any(t is not None for t in (o.page_table, o.cache_batch_idx, o.cache_leftpad)):
        raise ArgumentError(
            "gradients of a paged cache, or of one by index or with left padding: nothing computes them"
        )
    if dtype in _FP8 or q.dtype in _FP8:
        raise ArgumentError("gradients in fp8: nothing computes them")
    compute = dtype if dtype in (torch.float32, torch.float64) else torch.float32
    left, right = normalize_window(o.window_size, o.causal)
    heads, head_dim = q.shape[-2:]
    scale = default_scale(head_dim) if o.softmax_scale is None else o.softmax_scale
    dq, dk, dv = (torch.zeros(t.shape, dtype=compute, device=q.device) for t in (q, k, v))
    sums = {}
    for name, parameter in (("dalibi", alibi_slopes), ("dsink", learnable_sink)):
        if parameter is not None:
            sums[name] = torch.zeros(2, *parameter.shape, dtype=compute, device=q.device)

    plan = _RangePlan.of(q, k, o.q_ranges, o.k_ranges, o.attn_type_map, o.q_positions, o.k_positions)
    lengths = o.cu_seqlens_q, o.cu_seqlens_k, o.seqused_q, o.seqused_k
    for span in _spans(q, k, lengths, (None, None, None)):
        k_s, v_s, dk_s, dv_s = (_keys(t, span, o.cu_seqlens_k, None) for t in (k, v, dk, dv))
        k_s, v_s = k_s.to(compute), v_s.to(compute)
        slopes = _slopes(alibi_slopes, span, compute)
        for rows, distance, visible in _pieces(span, heads, left, right, o.sink_tokens, plan, q.device):
            at, at_lse = _index(span, rows, o.cu_seqlens_q)
            q_p, do = q[at].to(compute), dout[at].to(compute)
            capped = _scores(q_p, k_s, scale, softcap, dtype)
            out, lse, p = _softmax_pv(_masked(capped, slopes, distance, visible), v_s, learnable_sink, dtype)
            delta = (do * _rounded(out, dtype)).sum(-1).T
            if dlse is not None:
                delta = delta - dlse[at_lse].to(compute).masked_fill(lse == -math.inf, 0.0)
            ds = _rounded(p * (_rounded(_by_group(do, v_s), dtype) - delta[..., None]), dtype)
            if alibi_slopes is not None:
                terms = ds * -distance.abs()
                total = sums["dalibi"][:, span.batch] if alibi_slopes.dim() == 2 else sums["dalibi"]
                total += torch.stack([terms.sum((1, 2)), terms.square().sum((1, 2))])
            if learnable_sink is not None:
                weights = torch.exp(learnable_sink.to(compute)[:, None] - lse).masked_fill(lse == -math.inf, 0.0)
                terms = -weights * delta
                sums["dsink"] += torch.stack([terms.sum(1), terms.square().sum(1)])
            dx = ds if softcap == 0.0 else _rounded(ds * (1.0 - (capped / softcap).square()), dtype)
            groups, rows_p = k_s.shape[1], q_p.shape[0]
            dx, p = (t.reshape(groups, heads // groups * rows_p, span.seqlen_k) for t in (dx, p))
            dq[at] = scale * (dx @ k_s.transpose(0, 1)).reshape(heads, rows_p, head_dim).transpose(0, 1)
            dk_s += scale * (dx.mT @ _grouped(q_p, groups)).transpose(0, 1)
            dv_s += (p.mT @ _grouped(do, groups)).transpose(0, 1)
    dq, dk, dv = (t.to(dtype) for t in (dq, dk, dv))
    first, squares = ({name: total[part] for name, total in sums.items()} for part in (0, 1))
    return Gradients(dq, dk, dv, first.get("dalibi"), first.get("dsink")), squares


def _pieces(
    span: _Span,
    heads: int,
    left: int | None,
    right: int | None,
    sink_tokens: int,
    plan: _RangePlan | None,
    device: torch.device,
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Rows of one sequence, as many at a time as memory allows, with i + D − j (rows, keys) and what is visible."""
    lengths = span.seqlen_q, span.seqlen_k
    key = torch.arange(span.seqlen_k, device=device)
    step = max(1, _MAX_SCORES // max(1, heads * span.seqlen_k))
    for first in range(0, span.seqlen_q, step):
        rows = slice(first, min(first + step, span.seqlen_q))
        if plan is not None:
            yield rows, plan.q_positions[rows, None] - plan.k_positions, plan.visible[rows]
            continue
        position = torch.arange(rows.start, rows.stop, device=device) + span.seqlen_k - span.seqlen_q
        distance = position[:, None] - key
        visible = torch.zeros_like(distance, dtype=torch.bool)
        for interval in key_intervals(range(rows.start, rows.stop), *lengths, left, right, sink_tokens):
            start, stop = (torch.from_numpy(bound).to(device)[:, None] for bound in interval)
            visible |= (key >= start) & (key < stop)
        yield rows, distance, visible


def _in_tree(words: torch.Tensor, span: _Span) -> torch.Tensor:
    """bool (rows, seqlen_k): which keys the words (rows, words) of some queries show, all before the drafts."""
    draft = torch.arange(span.seqlen_k, device=words.device) - (span.seqlen_k - span.seqlen_q)
    counted = draft.clamp(min=0)
    return (draft < 0) | (words[:, counted // 32] >> counted % 32 & 1).bool()


def _index(span: _Span, rows: slice, cu_seqlens_q: torch.Tensor | None) -> tuple[tuple, tuple]:
    """Where a sequence's rows lie in q and O, and in LSE."""
    if cu_seqlens_q is None:
        return (span.batch, rows), (span.batch, slice(None), rows)
    rows = slice(span.start_q + rows.start, span.start_q + rows.stop)
    return (rows,), (slice(None), rows)


def _slopes(alibi_slopes: torch.Tensor | None, span: _Span, compute: torch.dtype) -> torch.Tensor | None:
    """(heads, 1, 1) of one sequence."""
    if alibi_slopes is None:
        return None
    slopes = alibi_slopes[span.batch] if alibi_slopes.dim() == 2 else alibi_slopes
    return slopes.to(compute)[:, None, None]


def _of_rows(
    descale: torch.Tensor | None, cache: torch.Tensor, span: _Span, page_table: torch.Tensor | None
) -> torch.Tensor | None:
    """Those of one sequence's rows, (1, rows, heads_kv, 1), where rows of the cache have some; others as they are."""
    if descale is None or descale.dim() < 4:
        return descale
    return _keys(descale.expand(*cache.shape[:3], 1), span, None, page_table)[None]


def _descaled(rows: torch.Tensor, descale: torch.Tensor | None, span: _Span) -> torch.Tensor:
    """Values of codes (rows, heads or kv heads, size) of one sequence."""
    if descale is None:
        return rows
    if descale.dim() == 4:  # of rows
        return rows * descale[0].to(rows.dtype)
    if descale.dim() == 3:  # of blocks of keys
        of_rows = descale[span.batch].T.repeat_interleave(DESCALE_BLOCK, 0)
        return rows * of_rows[: rows.shape[0], :, None].to(rows.dtype)
    factors = descale[span.batch] if descale.numel() > 1 else descale.reshape(1)
    return rows * factors.to(rows.dtype).repeat_interleave(rows.shape[1] // factors.numel())[:, None]


def _masked(
    scores: torch.Tensor, slopes: torch.Tensor | None, distance: torch.Tensor, visible: torch.Tensor
) -> torch.Tensor:
    if slopes is not None:
        scores = scores - slopes * distance.abs()
    return scores.masked_fill(~visible, -math.inf)


def _spans(q: torch.Tensor, k: torch.Tensor, lengths: tuple, cache: tuple) -> list[_Span]:
    """Every sequence of the batch; ``lengths``: cu_seqlens and seqused, ``cache``: page table, index and padding."""
    cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k = lengths
    page_table, cache_batch_idx, cache_leftpad = cache
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
    if cache_leftpad is not None:
        starts_k = cache_leftpad.tolist()
        lengths_k = [length - start for start, length in zip(starts_k, lengths_k, strict=True)]
    sequences = range(batch) if cache_batch_idx is None else cache_batch_idx.tolist()
    return [_Span(b, sequences[b], starts_q[b], lengths_q[b], starts_k[b], lengths_k[b]) for b in range(batch)]


def _keys(
    tensor: torch.Tensor, span: _Span, cu_seqlens_k: torch.Tensor | None, page_table: torch.Tensor | None
) -> torch.Tensor:
    """Rows of k or v that belong to one sequence: (seqlen_k, heads_kv, …)."""
    if page_table is not None:
        page_size = tensor.shape[1]
        pages = page_table[span.sequence, : -(-(span.start_k + span.seqlen_k) // page_size)].long()
        # gathers only slots that count: a page's unused slots may hold anything
        slots = span.start_k + torch.arange(span.seqlen_k, device=tensor.device)
        return tensor[pages[slots // page_size], slots % page_size]
    rows = slice(span.start_k, span.start_k + span.seqlen_k)
    return tensor[rows] if cu_seqlens_k is not None else tensor[span.sequence, rows]


def _scores(q: torch.Tensor, k: torch.Tensor, scale: float, softcap: float, dtype: torch.dtype) -> torch.Tensor:
    """softcap(scale · q·kᵀ): (heads, rows, keys), rounded to ``dtype`` after every step, stored in q's dtype."""
    scores = _rounded(_rounded(_by_group(q, k), dtype) * scale, dtype)
    if softcap > 0.0:
        scores = _rounded(_rounded(torch.tanh(_rounded(scores / softcap, dtype)), dtype) * softcap, dtype)
    return scores


def _by_group(rows: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Products of (rows, heads, size) with their group's (keys, groups, size): (heads, rows, keys)."""
    products = _grouped(rows, keys.shape[1]) @ keys.permute(1, 2, 0)
    return products.reshape(rows.shape[1], rows.shape[0], keys.shape[0])


def _grouped(rows: torch.Tensor, groups: int) -> torch.Tensor:
    """(rows, heads, size) as (groups, heads/groups · rows, size)."""
    return rows.transpose(0, 1).reshape(groups, rows.shape[1] // groups * rows.shape[0], rows.shape[2])


def _softmax_pv(
    scores: torch.Tensor, v: torch.Tensor, learnable_sink: torch.Tensor | None, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(rows, heads, head_dim_v), LSE (heads, rows) and P, of masked scores (heads, rows, keys)."""
    lse = torch.logsumexp(scores, dim=-1)
    if learnable_sink is not None:
        lse = torch.logaddexp(lse, learnable_sink.to(lse.dtype)[:, None])
    # exp(−inf − −inf) is NaN where nothing is visible: subtract 0 there
    reference = lse.masked_fill(lse == -math.inf, 0.0)
    if dtype in _FP8 and scores.shape[-1]:
        # at most 2^8 before rounding, as in a kernel, which normalises last: fp8 would flush small probabilities to 0
        reference = scores.amax(-1) - _P_OFFSET
        reference = reference.masked_fill(reference == -math.inf, 0.0)
    p = _rounded(torch.exp(scores - reference[..., None]), dtype)
    heads, rows, keys = p.shape
    groups = v.shape[1]
    out = p.reshape(groups, heads // groups * rows, keys) @ v.transpose(0, 1)
    out = out.reshape(heads, rows, v.shape[-1])
    if dtype in _FP8:
        out = out * torch.exp(reference - lse.masked_fill(lse == -math.inf, 0.0))[..., None]
    return out.transpose(0, 1), lse, p


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
    """What a kernel should return: ``out`` and ``lse`` as the reference has them, and the largest error allowed of
    each."""

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


def expected(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    exact: torch.dtype = torch.float32,
    out_dtype: torch.dtype | None = None,
    **options: Unpack[ReferenceOptions],
) -> Expected:
    """Reference result and tolerance for inputs of a low-precision type; options as for :func:`attention`. ``exact``,
    float32 or float64, is what the reference is computed in; ``out_dtype`` the output's, bf16 for fp8 by default.

    The rule: max|out − ref32| ≤ 2·max|lowprec − ref32| + eps·max|ref32|, where lowprec is the same formula in the
    input's type, for fp8 the fp32 formula with P rounded to e4m3, and eps that of the output's type; LSE within 1e-3,
    −inf exactly where the reference has it.
    """
    fp8 = q.dtype in _FP8
    out, lse = attention(q, k, v, **options, dtype=exact)
    low, _ = attention(q, k, v, **options, dtype=torch.float8_e4m3fn if fp8 else q.dtype)
    largest = out.abs().max().item() if out.numel() else 0.0
    eps = torch.finfo(out_dtype or (torch.bfloat16 if fp8 else q.dtype)).eps
    allowed = 2.0 * _largest_error(low, out) + eps * largest
    return Expected(out, lse, allowed)


def check(
    out: torch.Tensor,
    lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    exact: torch.dtype = torch.float32,
    **options: Unpack[ReferenceOptions],
) -> Comparison:
    """Compare a kernel's result with the reference; options as for :func:`attention`."""
    return expected(q, k, v, exact=exact, out_dtype=out.dtype, **options).check(out, lse)


class Error(NamedTuple):
    """A largest error, infinite for NaN, and what is allowed."""

    error: float
    allowed: float

    @property
    def ok(self) -> bool:
        return self.error <= self.allowed


@dataclass(frozen=True)
class ExpectedGradients:
    """What a backward should return, and the largest error allowed of each gradient by name."""

    gradients: Gradients
    allowed: dict[str, float]

    def check(self, actual: Gradients) -> dict[str, Error]:
        """Compare gradients by name; those that neither side has are left out."""
        errors = {}
        for name, ours, theirs in zip(Gradients._fields, actual, self.gradients, strict=True):
            if ours is not None and theirs is not None:
                errors[name] = Error(_largest_error(ours, theirs), self.allowed[name])
            elif ours is not None or theirs is not None:
                errors[name] = Error(math.inf, 0.0)
        return errors


def expected_gradients(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dout: torch.Tensor,
    dlse: torch.Tensor | None = None,
    *,
    exact: torch.dtype = torch.float32,
    **options: Unpack[ReferenceOptions],
) -> ExpectedGradients:
    """Reference gradients and tolerances for inputs of a low-precision type; options as for :func:`gradients`, and
    ``exact`` as for :func:`expected`.

    The rule is that of :func:`expected`. A gradient that is one sum over everything, dalibi or dsink, makes ``lowprec``
    a single draw, which may hit by luck; there eps is taken of √Σ terms² in the place of the result, which is the
    error of terms rounded independently.
    """
    reference, squares = _gradients(q, k, v, dout, dlse, options, exact)
    low, _ = _gradients(q, k, v, dout, dlse, options, q.dtype)
    eps = torch.finfo(q.dtype).eps
    allowed = {}
    for name, right, rounded in zip(Gradients._fields, reference, low, strict=True):
        if right is not None and rounded is not None:
            size = squares[name].sqrt() if name in squares else right.abs()
            largest = size.max().item() if size.numel() else 0.0
            allowed[name] = 2.0 * _largest_error(rounded, right) + eps * largest
    return ExpectedGradients(reference, allowed)


def check_gradients(
    actual: Gradients,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dout: torch.Tensor,
    dlse: torch.Tensor | None = None,
    *,
    exact: torch.dtype = torch.float32,
    **options: Unpack[ReferenceOptions],
) -> dict[str, Error]:
    """Compare a backward's gradients with the reference; options as for :func:`gradients`."""
    return expected_gradients(q, k, v, dout, dlse, exact=exact, **options).check(actual)


def _largest_error(actual: torch.Tensor, reference: torch.Tensor) -> float:
    """max|actual − reference|; equal infinities count as 0, NaN and differing shapes as infinite."""
    if actual.shape != reference.shape:
        return math.inf
    if not actual.numel():
        return 0.0
    actual = actual.detach().to(reference.dtype)
    error = torch.where(actual == reference, torch.zeros_like(reference), (actual - reference).abs())
    return error.nan_to_num(nan=math.inf, posinf=math.inf).max().item()
