"""The Hopper backward as the dispatch table sees it: what it serves, how it is configured, what it is launched with."""

from __future__ import annotations

from cute_fa.device.tiled_backward import Launch, backward_launch
from cute_fa.engine.contract import AttentionKernel, BackwardTensors, Candidate
from cute_fa.semantics.problem import AttentionProblem
from cute_fa.semantics.types import Direction
from fa3_sm90.backward.config import Fa3BackwardConfig, backward_candidates, backward_config, backward_objections
from fa3_sm90.backward.rules import grid_objections, problem_objections


class Fa3Backward(AttentionKernel):
    """Backward with TMA and wgmma, for sm_90a: fp16 and bf16, head_dims whose sums fit two warpgroups' registers."""

    family = "fa3"
    direction = Direction.BACKWARD

    @classmethod
    def supports(cls, problem: AttentionProblem) -> list[str]:
        reasons = problem_objections(problem) or backward_objections(problem)
        if reasons:
            return reasons
        config = cls.configure(problem)
        return grid_objections(problem, config.tile_m, config.tile_n)

    @classmethod
    def configure(cls, problem: AttentionProblem) -> Fa3BackwardConfig:
        return backward_config(problem)

    @classmethod
    def candidates(cls, problem: AttentionProblem) -> list[Candidate]:
        return backward_candidates(problem)

    @classmethod
    def arguments(
        cls, problem: AttentionProblem, config: Fa3BackwardConfig, tensors: BackwardTensors, num_sms: int
    ) -> Launch:
        return backward_launch(problem, config, tensors)
