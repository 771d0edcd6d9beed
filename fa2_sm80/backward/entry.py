"""The FA2 backward as the dispatch table sees it: what it serves, how it is configured, what it is launched with."""

from __future__ import annotations

from typing import NamedTuple

import torch

from cute_fa.device.tiling import ceil_div
from cute_fa.engine.contract import AttentionKernel, BackwardTensors, Candidate, CommonArguments, common_arguments
from cute_fa.semantics.problem import AttentionProblem
from cute_fa.semantics.types import Direction
from fa2_sm80.backward.config import Fa2BackwardConfig, backward_candidates, backward_config
from fa2_sm80.common.rules import objections


class Scratch(NamedTuple):
    """Memory in the order of ``fa2_sm80.backward.arguments.Scratch``."""

    stats: torch.Tensor
    dq: torch.Tensor | None
    dsink: torch.Tensor | None
    dslopes: torch.Tensor | None


class Launch(NamedTuple):
    """What a launch takes, in the order of ``fa2_sm80.backward.arguments.BackwardArguments``."""

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


class Fa2Backward(AttentionKernel):
    """Backward with cp.async and mma.sync, for sm_80 and every arch after it: fp16 and bf16, head_dim 8 … 256."""

    family = "fa2"
    direction = Direction.BACKWARD

    @classmethod
    def supports(cls, problem: AttentionProblem) -> list[str]:
        def grids() -> dict[str, int]:
            config = cls.configure(problem)
            return {
                "tiles of queries": ceil_div(problem.seqlen_q, config.tile_m) * problem.num_heads * problem.batch,
                "tiles of keys": ceil_div(problem.seqlen_k, config.tile_n) * problem.num_heads_kv * problem.batch,
            }

        return objections(problem, grids)

    @classmethod
    def configure(cls, problem: AttentionProblem) -> Fa2BackwardConfig:
        return backward_config(problem)

    @classmethod
    def candidates(cls, problem: AttentionProblem) -> list[Candidate]:
        return backward_candidates(problem)

    @classmethod
    def arguments(
        cls, problem: AttentionProblem, config: Fa2BackwardConfig, tensors: BackwardTensors, num_sms: int
    ) -> Launch:
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
            dq_walk=inputs.extras.dq_walk if config.deterministic else None,
        )


def _scratch(
    config: Fa2BackwardConfig, problem: AttentionProblem, q: torch.Tensor, seqlen_q: int, seqlen_k: int
) -> Scratch:
    """Memory between the kernels."""
    heads, batch = problem.num_heads, problem.batch
    m_blocks, n_blocks = ceil_div(seqlen_q, config.tile_m), ceil_div(seqlen_k, config.tile_n)
    tiles = q.shape[0] // config.tile_m + batch if problem.varlen_q else batch * m_blocks

    def empty(wanted: bool, *shape: int) -> torch.Tensor | None:
        return torch.empty(shape, dtype=torch.float32, device=q.device) if wanted else None

    return Scratch(
        stats=empty(True, tiles, heads, 2 * config.tile_m),
        dq=empty(not config.deterministic, tiles, heads, config.tile_m * config.head_dim_padded),
        dsink=empty(config.learnable_sink, batch, heads, m_blocks),
        dslopes=empty(config.slopes_gradient, batch, heads, n_blocks * config.num_warps),
    )
