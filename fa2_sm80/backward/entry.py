"""The FA2 backward as the dispatch table sees it: what it serves, how it is configured, what it is launched with."""

from __future__ import annotations

from cute_fa.device.tiled_backward import TiledBackward
from cute_fa.device.tiling import ceil_div
from cute_fa.engine.contract import Candidate
from cute_fa.semantics.problem import AttentionProblem
from fa2_sm80.backward.config import Fa2BackwardConfig, backward_candidates, backward_config
from fa2_sm80.common.rules import objections


class Fa2Backward(TiledBackward):
    """Backward with cp.async and mma.sync, for sm_80 and every arch after it: fp16 and bf16, head_dim 8 … 256."""

    family = "fa2"

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
