"""The Hopper decode as the dispatch table sees it: what it serves, and its configuration."""

from __future__ import annotations

from cute_fa.device.split_forward import SplitForward
from cute_fa.device.widening import code_objections
from cute_fa.engine.contract import Candidate, common_objections
from cute_fa.semantics.problem import AttentionProblem
from fa3_sm90.decode.config import MOST_TOKENS, Fa3DecodeConfig, decode_candidates, decode_config


class Fa3Decode(SplitForward):
    """Forward with TMA and wgmma for up to 128 query tokens, for sm_90a: fp16, bf16 and fp8, head_dim 8 … 256, all
    query heads of a kv head in one tile, key blocks cut evenly between the CTAs."""

    family = "fa3"
    most_tokens = MOST_TOKENS

    @classmethod
    def supports(cls, problem: AttentionProblem) -> list[str]:
        reasons = common_objections(problem, "16-byte strides of TMA", decodes=True)
        reasons += code_objections(problem, "16-byte strides of TMA")
        if problem.ranges:
            reasons.append("a range plan: its masks are of whole tiles of queries, this kernel's tiles hold any rows")
        return reasons or cls.grid_objections(problem)

    @classmethod
    def configure(cls, problem: AttentionProblem) -> Fa3DecodeConfig:
        return decode_config(problem)

    @classmethod
    def candidates(cls, problem: AttentionProblem) -> list[Candidate]:
        return decode_candidates(problem)

    @classmethod
    def ctas_per_sm(cls, config: Fa3DecodeConfig) -> int:
        return 1
