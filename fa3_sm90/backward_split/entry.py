"""The Hopper backward for wide head_dims as the dispatch table sees it."""

from __future__ import annotations

from cute_fa.device.tiled_backward import TiledBackward
from cute_fa.engine.contract import Candidate
from cute_fa.semantics.problem import AttentionProblem
from fa3_sm90.backward.entry import Fa3Backward
from fa3_sm90.backward.rules import grid_objections, problem_objections
from fa3_sm90.backward_split.config import (
    TILE,
    Fa3SplitBackwardConfig,
    split_backward_candidates,
    split_backward_config,
)


class Fa3SplitBackward(TiledBackward):
    """Backward with TMA and wgmma, for sm_90a: fp16 and bf16, any head_dims up to 256, dQ by a kernel of its own."""

    family = "fa3"
    l2_bytes = Fa3Backward.l2_bytes

    @classmethod
    def supports(cls, problem: AttentionProblem) -> list[str]:
        return problem_objections(problem) or grid_objections(problem, TILE, TILE)

    @classmethod
    def configure(cls, problem: AttentionProblem) -> Fa3SplitBackwardConfig:
        return split_backward_config(problem)

    @classmethod
    def candidates(cls, problem: AttentionProblem) -> list[Candidate]:
        return split_backward_candidates(problem)
