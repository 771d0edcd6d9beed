"""The Hopper backward as the dispatch table sees it: what it serves, how it is configured, what it is launched with."""

from __future__ import annotations

from cute_fa.device.tiled_backward import TiledBackward
from cute_fa.engine.contract import Candidate
from cute_fa.semantics.problem import AttentionProblem
from fa3_sm90.backward.config import Fa3BackwardConfig, backward_candidates, backward_config, backward_objections
from fa3_sm90.backward.rules import grid_objections, problem_objections


class Fa3Backward(TiledBackward):
    """Backward with TMA and wgmma, for sm_90a: fp16 and bf16, head_dims whose sums fit two warpgroups' registers."""

    family = "fa3"
    l2_bytes = 50 * 2**20  # of an H100 and an H200 (NVIDIA H100 whitepaper)

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
