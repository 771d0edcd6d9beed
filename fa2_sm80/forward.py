"""The FA2 forward as the dispatch table sees it: what it serves, how it is configured, what it is launched with."""

from __future__ import annotations

from cute_fa.kernel import AttentionKernel, AttentionTensors, common_arguments, common_objections
from cute_fa.problem import AttentionProblem
from cute_fa.types import Direction, DType, PersistentMode
from fa2_sm80.config import Fa2ForwardConfig, forward_config

MAX_CTAS = 2**31 - 1


class Fa2Forward(AttentionKernel):
    """Forward with cp.async and mma.sync, for sm_80 and every arch after it: fp16 and bf16, head_dim 8 … 256."""

    family = "fa2"
    direction = Direction.FORWARD

    @classmethod
    def supports(cls, problem: AttentionProblem) -> list[str]:
        reasons = []
        if problem.dtype not in (DType.FP16, DType.BF16):
            reasons.append(f"dtype {problem.dtype.value}: sm_80 tensor cores take fp16 and bf16, fp8 has no FA2 kernel")
        reasons += common_objections(problem, "16-byte copies")
        if problem.page_size is not None:
            reasons.append(f"page_size {problem.page_size}: this kernel reads contiguous K and V only")
        if problem.pack_gqa and problem.gqa_ratio > 1:
            reasons.append("pack_gqa: this kernel's tiles hold the queries of one head")
        if problem.persistent is PersistentMode.ON:
            reasons.append("persistent: this kernel launches one CTA for each tile")
        tiles = -(-problem.seqlen_q // cls.configure(problem).tile_m) * problem.num_heads * problem.batch
        if tiles > MAX_CTAS:
            reasons.append(f"{tiles} tiles of queries: a grid has at most {MAX_CTAS} CTAs")
        return reasons

    @classmethod
    def configure(cls, problem: AttentionProblem) -> Fa2ForwardConfig:
        return forward_config(problem)

    @classmethod
    def arguments(cls, problem: AttentionProblem, tensors: AttentionTensors, num_sms: int) -> tuple:
        return (
            *common_arguments(problem, tensors),
            problem.seqlen_q,
        )
