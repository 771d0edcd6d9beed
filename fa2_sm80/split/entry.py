"""The split-KV forward as the dispatch table sees it: what it serves, and its configuration."""

from __future__ import annotations

from cute_fa.device.split_forward import SplitForward
from cute_fa.device.widening import code_objections
from cute_fa.engine.contract import Candidate
from cute_fa.semantics.problem import AttentionProblem
from fa2_sm80.common.rules import objections
from fa2_sm80.split.config import MOST_TOKENS, Fa2SplitConfig, split_candidates, split_config


class Fa2Split(SplitForward):
    """Forward with cp.async and mma.sync for few queries, split keys and paged caches, on sm_80 and every arch after
    it: fp16 and bf16, caches and queries in fp8, too, head_dim 8 … 256, all query heads of a kv head in one tile."""

    family = "fa2"
    most_tokens = MOST_TOKENS

    @classmethod
    def supports(cls, problem: AttentionProblem) -> list[str]:
        reasons = objections(problem, rows_of_any_head=True) + code_objections(problem, "16-byte copies")
        return reasons or cls.grid_objections(problem)

    @classmethod
    def configure(cls, problem: AttentionProblem) -> Fa2SplitConfig:
        return split_config(problem)

    @classmethod
    def candidates(cls, problem: AttentionProblem) -> list[Candidate]:
        return split_candidates(problem)

    @classmethod
    def ctas_per_sm(cls, config: Fa2SplitConfig) -> int:
        return config.ctas_per_sm
