"""The split-KV forward as the dispatch table sees it: what it serves, its configuration, what it is launched with."""

from __future__ import annotations

import torch

from cute_fa.kernel import AttentionKernel, AttentionTensors, common_arguments, common_objections
from cute_fa.problem import AttentionProblem
from cute_fa.tiling import ceil_div
from cute_fa.types import Direction, DType, PersistentMode
from fa2_sm80.forward import MAX_CTAS
from fa2_sm80.split_config import Fa2SplitConfig, split_config


class Fa2Split(AttentionKernel):
    """Forward with cp.async and mma.sync for few queries, split keys and paged caches, on sm_80 and every arch after
    it: fp16 and bf16, head_dim 8 … 256."""

    family = "fa2"
    direction = Direction.FORWARD

    @classmethod
    def supports(cls, problem: AttentionProblem) -> list[str]:
        reasons = []
        if problem.dtype not in (DType.FP16, DType.BF16):
            reasons.append(f"dtype {problem.dtype.value}: sm_80 tensor cores take fp16 and bf16, fp8 has no FA2 kernel")
        reasons += common_objections(problem, "16-byte copies", splits=True)
        if problem.persistent is PersistentMode.ON:
            reasons.append("persistent: this kernel launches one CTA for each tile and split")
        config = cls.configure(problem)
        rows = problem.seqlen_q * problem.gqa_ratio
        ctas = ceil_div(rows, config.tile_m) * problem.num_heads_kv * problem.batch * problem.num_splits
        if ctas > MAX_CTAS:
            reasons.append(f"{ctas} tiles of queries and splits: a grid has at most {MAX_CTAS} CTAs")
        return reasons

    @classmethod
    def configure(cls, problem: AttentionProblem) -> Fa2SplitConfig:
        return split_config(problem)

    @classmethod
    def arguments(cls, problem: AttentionProblem, tensors: AttentionTensors, num_sms: int) -> tuple:
        return (
            *common_arguments(problem, tensors),
            tensors.page_table,
            _parts(problem, tensors),
            problem.seqlen_q,
            problem.num_splits,
        )


def _parts(problem: AttentionProblem, tensors: AttentionTensors) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Memory in the order of ``fa2_sm80.split_arguments.Parts``."""
    if problem.num_splits == 1:
        return None
    rows = tensors.lse.numel()
    return (
        tensors.lse.new_empty(problem.num_splits, rows, problem.head_dim_v),
        tensors.lse.new_empty(problem.num_splits, rows),
    )
