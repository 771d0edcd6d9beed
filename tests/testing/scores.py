"""Inputs whose scores are prescribed, in log2 units, for what a softmax does with its rows' references."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

import torch

from cute_fa.semantics.types import DType
from cute_fa.tools.inputs import Inputs, InputSpec, make_inputs

if TYPE_CHECKING:
    from fa4_sm100.forward.config import Fa4ForwardConfig

_WARP = 32  # rows, and the columns that a thread has at a time
# By dtype how far a score may grow beyond the reference until P, or what emulates it, is wrong: fp16 ends at 2^16, fp32
# and bf16 at 2^128, and what is shifted into an exponent's 8 bits comes round at 2^512.
_GROWTHS = {DType.FP16: (16.5, 16.125, 17.0, 40.0, 15.5, 14.5), DType.BF16: (130.0, 512.0, 256.0, 384.0, 20.0, 140.0)}


def scored(terms: list[tuple[torch.Tensor, torch.Tensor]], noise: float = 0.5, **spec) -> Inputs:
    """One head whose scores in log2 units are Σ a[query]·b[key] of the ``terms`` (a, b), and noise of that size;
    ``spec``: further fields of InputSpec."""
    queries, keys = (len(side) for side in terms[0])
    spec = InputSpec(1, queries, keys, 1, 1, softmax_scale=math.log(2), **{"head_dim": 64, **spec})
    given = make_inputs(spec)
    q, k = given.q.clone(), given.k * (noise / math.sqrt(spec.head_dim))
    for column, (of_query, of_key) in enumerate(terms):
        q[0, :, 0, column], k[0, :, 0, column] = of_query, of_key
    return dataclasses.replace(given, q=q, k=k)


def visits(config: Fa4ForwardConfig, seqlen_k: int) -> torch.Tensor:
    """How many blocks are visited before that of each key, from the last one on."""
    block = torch.arange(seqlen_k) // config.tile_n
    return block.max() - block


def spikes(config: Fa4ForwardConfig, spec: InputSpec) -> Inputs:
    """In each block behind the first that is visited one key stands out, another one for each warp, and for one of its
    rows alone: in the last columns of the block, which are not summed before they are asked about, in emulated ones,
    and elsewhere. ``spec``: head_dims, dtype and queries; the keys are as many as there are columns of q for."""
    warps = -(-spec.seqlen_q // _WARP)
    blocks = min(10, 1 + (spec.head_dim - 8) // warps)
    seqlen_k = blocks * config.tile_n - 3  # the first block has an edge
    columns = [-1, 6, -_WARP, 0, _WARP + 31, -20, 14, _WARP - 1, 17]
    growths, terms = _GROWTHS[spec.dtype], []
    for place in range((blocks - 1) * warps):
        block, warp = divmod(place, warps)
        of_query, of_key = torch.zeros(spec.seqlen_q), torch.zeros(seqlen_k)
        of_query[(warp * _WARP + (7 * block + 3) % _WARP) % spec.seqlen_q] = growths[place % len(growths)]
        of_key[block * config.tile_n + columns[(block + warp) % len(columns)] % config.tile_n] = 1.0
        terms.append((of_query, of_key))
    return scored(terms, head_dim=spec.head_dim, head_dim_v=spec.head_dim_v, dtype=spec.dtype)
