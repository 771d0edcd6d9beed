"""What a backward is launched with, and its memory between the kernels. No DSL."""

from __future__ import annotations

from typing import NamedTuple

import torch

from cute_fa.device.tiling import ceil_div
from cute_fa.engine.contract import BackwardTensors, CommonArguments, common_arguments
from cute_fa.semantics.problem import AttentionProblem


class Scratch(NamedTuple):
    """Memory in the order of ``cute_fa.device.backward_arguments.Scratch``."""

    stats: torch.Tensor
    dq: torch.Tensor | None
    dsink: torch.Tensor | None
    dslopes: torch.Tensor | None
    turns: torch.Tensor | None


class Launch(NamedTuple):
    """What a launch takes, in the order of ``cute_fa.device.backward_arguments.BackwardArguments``."""

    common: CommonArguments
    dout: torch.Tensor
    dlse: torch.Tensor | None
    dq: torch.Tensor
    dk: torch.Tensor
    dv: torch.Tensor
    dalibi: torch.Tensor | None
    dsink: torch.Tensor | None
    scratch: Scratch
    seqlen_q: int
    seqlen_k: int
    key_walk: torch.Tensor | None
    dq_walk: torch.Tensor | None


def backward_launch(problem: AttentionProblem, config, tensors: BackwardTensors) -> Launch:
    """The launch of a backward's config."""
    t, inputs = tensors, tensors.forward
    seqlen_q = problem.seqlen_q if problem.varlen_q else inputs.q.shape[1]
    seqlen_k = problem.seqlen_k if problem.varlen_k else inputs.k.shape[1]
    return Launch(
        common=common_arguments(problem, inputs),
        dout=t.dout,
        dlse=t.dlse,
        dq=t.dq,
        dk=t.dk,
        dv=t.dv,
        dalibi=None if t.dalibi is None else t.dalibi.view(-1, problem.num_heads),
        dsink=None if t.dsink is None else t.dsink.view(1, -1),
        scratch=_scratch(config, problem, inputs.q, seqlen_q, seqlen_k),
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        key_walk=inputs.extras.key_walk,
        dq_walk=None if config.dq_sums else inputs.extras.dq_walk,
    )


def _scratch(config, problem: AttentionProblem, q: torch.Tensor, seqlen_q: int, seqlen_k: int) -> Scratch:
    """Memory between the kernels."""
    heads, batch = problem.num_heads, problem.batch
    m_blocks, n_blocks = ceil_div(seqlen_q, config.tile_m), ceil_div(seqlen_k, config.tile_n)
    slope_blocks = n_blocks if config.slopes_by_keys else m_blocks
    tiles = q.shape[0] // config.tile_m + batch if problem.varlen_q else batch * m_blocks

    def empty(wanted: bool, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor | None:
        return torch.empty(shape, dtype=dtype, device=q.device) if wanted else None

    return Scratch(
        stats=empty(True, tiles, heads, config.stats_elements),
        dq=empty(config.dq_sums, tiles, heads, config.tile_m * config.head_dim_padded),
        dsink=empty(config.learnable_sink, batch, heads, m_blocks),
        dslopes=empty(config.slopes_gradient, batch, heads, slope_blocks * config.slope_parts),
        turns=empty(config.turns, tiles * heads + 1, dtype=torch.int32),
    )
