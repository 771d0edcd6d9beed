"""The Hopper backward for wide head_dims as the dispatch table sees it."""

from __future__ import annotations

from cute_fa.device.tiled_backward import Launch, backward_launch
from cute_fa.engine.contract import AttentionKernel, BackwardTensors, Candidate
from cute_fa.semantics.problem import AttentionProblem
from cute_fa.semantics.types import Direction
from fa3_sm90.backward.rules import grid_objections, problem_objections
from fa3_sm90.backward_split.config import (
    TILE,
    Fa3SplitBackwardConfig,
    split_backward_candidates,
    split_backward_config,
)


class Fa3SplitBackward(AttentionKernel):
    """Backward with TMA and wgmma, for sm_90a: fp16 and bf16, any head_dims up to 256, dQ by a kernel of its own."""

    family = "fa3"
    direction = Direction.BACKWARD

    @classmethod
    def supports(cls, problem: AttentionProblem) -> list[str]:
        return problem_objections(problem) or grid_objections(problem, TILE, TILE)

    @classmethod
    def configure(cls, problem: AttentionProblem) -> Fa3SplitBackwardConfig:
        return split_backward_config(problem)

    @classmethod
    def candidates(cls, problem: AttentionProblem) -> list[Candidate]:
        return split_backward_candidates(problem)

    @classmethod
    def arguments(
        cls, problem: AttentionProblem, config: Fa3SplitBackwardConfig, tensors: BackwardTensors, num_sms: int
    ) -> Launch:
        return backward_launch(problem, config, tensors)
