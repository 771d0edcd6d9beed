"""The FA2 forward as the dispatch table sees it: what it serves, how it is configured, what it is launched with."""

from __future__ import annotations

from typing import NamedTuple

from cute_fa.device.tiling import ceil_div
from cute_fa.engine.contract import AttentionKernel, AttentionTensors, Candidate, CommonArguments, common_arguments
from cute_fa.semantics.problem import AttentionProblem
from cute_fa.semantics.types import Direction
from fa2_sm80.common.rules import objections
from fa2_sm80.forward.config import Fa2ForwardConfig, forward_candidates, forward_config


class Launch(NamedTuple):
    """What a launch takes, in the order of ``fa2_sm80.forward.arguments.ForwardArguments``."""

    common: CommonArguments
    seqlen_q: int


class Fa2Forward(AttentionKernel):
    """Forward with cp.async and mma.sync, for sm_80 and every arch after it: fp16 and bf16, head_dim 8 … 256."""

    family = "fa2"
    direction = Direction.FORWARD

    @classmethod
    def supports(cls, problem: AttentionProblem) -> list[str]:
        def grids() -> dict[str, int]:
            tiles = ceil_div(problem.seqlen_q, cls.configure(problem).tile_m)
            return {"tiles of queries": tiles * problem.num_heads * problem.batch}

        return objections(problem, grids)

    @classmethod
    def configure(cls, problem: AttentionProblem) -> Fa2ForwardConfig:
        return forward_config(problem)

    @classmethod
    def candidates(cls, problem: AttentionProblem) -> list[Candidate]:
        return forward_candidates(problem)

    @classmethod
    def arguments(
        cls, problem: AttentionProblem, config: Fa2ForwardConfig, tensors: AttentionTensors, num_sms: int
    ) -> Launch:
        return Launch(common=common_arguments(problem, tensors), seqlen_q=problem.seqlen_q)
