"""torch's FlexAttention, which compiles to Triton, and the attention kernel of Triton's own tutorials."""

from __future__ import annotations

import importlib
import importlib.metadata
import itertools
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from cute_fa import RangePlan
from cute_fa.semantics.problem import default_scale, normalize_window
from cute_fa.semantics.visibility import Neighbourhood, key_intervals
from cute_fa.tools.inputs import Inputs
from perf.providers.base import HEADS_FIRST, Attention, Layout, Provider, Unavailable

_PACKED = Layout(lambda tensor: tensor.transpose(0, 1)[None], lambda tensor: tensor[0].transpose(0, 1))
_CONTIGUOUS = Layout(lambda tensor: tensor.transpose(1, 2).contiguous(), HEADS_FIRST.restore)


class FlexAttention(Provider):
    """torch.compile of flex_attention, with a block mask for masks, windows, packed sequences and range plans.

    Compiled on CUDA alone: elsewhere torch computes the same formula without fusing it.
    """

    name = "FlexAttention"
    takes_ranges = True

    def version(self) -> str:
        return f"torch {torch.__version__}"

    def prepare(self, inputs: Inputs) -> Attention:
        if inputs.page_table is not None or inputs.seqused_k is not None:
            raise Unavailable("a cache with lengths or pages has no FlexAttention call of its own")
        attention, make_mask, build = flex_attention, create_block_mask, None
        if inputs.q.is_cuda:
            # each problem has its own code: forgotten ones must not count against torch's limit of recompilations
            torch.compiler.reset()
            attention = torch.compile(flex_attention, dynamic=False, fullgraph=True)
            make_mask = torch.compile(create_block_mask, dynamic=False)
        if inputs.q_ranges is None:
            mask = _block_mask(inputs)
        else:
            rows_q, rows_k, device = inputs.q.shape[1], inputs.k.shape[1], inputs.q.device
            build = partial(make_mask, _sees(_intervals(inputs)), None, None, rows_q, rows_k, device=device)
            mask = build()
        grouped = inputs.spec.heads != inputs.spec.heads_kv
        layout = HEADS_FIRST if inputs.cu_seqlens_q is None else _PACKED
        return Attention(lambda q, k, v: attention(q, k, v, block_mask=mask, enable_gqa=grouped), layout, build)


def _block_mask(inputs: Inputs) -> BlockMask | None:
    """What is visible, None for everything."""
    left, right = normalize_window(inputs.spec.window, inputs.spec.causal)
    packed = inputs.cu_seqlens_q is not None
    if left is None and right is None and not packed:
        return None
    rows_q, rows_k = (tensor.shape[0 if packed else 1] for tensor in (inputs.q, inputs.k))
    if packed:
        start, stop = _visible_rows(inputs, left, right)

        def visible(batch, head, query, key):
            return (key >= start[query]) & (key < stop[query])

    else:
        # a bound that no key reaches, where there is none
        left, right = (rows_q + rows_k if bound is None else bound for bound in (left, right))

        def visible(batch, head, query, key):
            window = Neighbourhood(query + rows_k - rows_q, left, right)
            return (key >= window.first) & (key <= window.last)

    return create_block_mask(visible, None, None, rows_q, rows_k, device=inputs.q.device)


def _sees(intervals: list[tuple[torch.Tensor, torch.Tensor]]) -> Callable[..., torch.Tensor]:
    """Whether a key is in one of a query's intervals."""

    def visible(batch, head, query, key):
        seen = key < 0
        for start, stop in intervals:
            seen = seen | ((key >= start[query]) & (key < stop[query]))
        return seen

    return visible


def _intervals(inputs: Inputs) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """[start, stop) of the first keys that each query sees in a row under a plan, of the next ones …: int64 (seqlen_q),
    0 and 0 where there are no more."""
    totals = {"total_q": inputs.q.shape[1], "total_k": inputs.k.shape[1]}
    plan = RangePlan.build(inputs.q_ranges, inputs.k_ranges, inputs.attn_type_map, **totals)
    edges = torch.nn.functional.pad(plan.mask().char(), (1, 1)).diff(dim=1)
    count = (edges > 0).sum(1)
    bounds = []
    for edge in (1, -1):
        query, key = (edges == edge).nonzero(as_tuple=True)
        place = torch.arange(len(query), device=query.device) - (count.cumsum(0) - count)[query]
        bounds.append(query.new_zeros(max(int(count.max()), 1), len(count)).index_put((place, query), key))
    return list(zip(*bounds, strict=True))


def _visible_rows(inputs: Inputs, left: int | None, right: int | None) -> list[torch.Tensor]:
    """[start, stop) of the visible rows of packed k for every row of packed q."""
    starts = (itertools.pairwise(lengths.tolist()) for lengths in (inputs.cu_seqlens_q, inputs.cu_seqlens_k))
    bounds = []
    for (start_q, end_q), (start_k, end_k) in zip(*starts, strict=True):
        seqlen_q = end_q - start_q
        window = key_intervals(range(seqlen_q), seqlen_q, end_k - start_k, left, right)[-1]
        bounds.append(start_k + np.stack(window))
    return list(torch.from_numpy(np.concatenate(bounds, axis=1)).to(inputs.q.device))


class TritonTutorial(Provider):
    """``06-fused-attention.py``, which no wheel has: where it lies in a folder on the Python path."""

    name = "Triton"

    def version(self) -> str:
        self._attention()
        return importlib.metadata.version("triton")

    def _attention(self):
        try:
            return importlib.import_module("06-fused-attention").attention
        except ImportError as error:
            raise Unavailable(f"Triton's tutorial 06-fused-attention.py is not on the Python path: {error}") from None

    def prepare(self, inputs: Inputs) -> Attention:
        attention, spec = self._attention(), inputs.spec
        left, right = normalize_window(spec.window, spec.causal)
        lacks = {
            "windows": left is not None or right not in (None, 0),
            "packed sequences or caches": inputs.cu_seqlens_q is not None or inputs.seqused_k is not None,
            "fewer kv heads than heads": spec.heads != spec.heads_kv,
            "seqlen_q ≠ seqlen_k": spec.seqlen_q != spec.seqlen_k,
        }
        if any(lacks.values()):
            raise Unavailable(f"Triton's tutorial has no {', '.join(name for name, needed in lacks.items() if needed)}")
        scale = default_scale(spec.head_dim)
        # its warp specialisation is for Blackwell
        specialise = torch.cuda.get_device_capability(inputs.q.device)[0] >= 10 if inputs.q.is_cuda else False
        return Attention(lambda q, k, v: attention(q, k, v, right == 0, scale, specialise), _CONTIGUOUS)
