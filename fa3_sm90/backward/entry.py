"""The Hopper backward as the dispatch table sees it: what it serves, how it is configured, what it is launched with."""

from __future__ import annotations

from cute_fa.device.tiled_backward import TiledBackward
from cute_fa.device.tiling import MAX_TILES, ceil_div
from cute_fa.engine.contract import Candidate, common_objections
from cute_fa.semantics.names import dtypes_of_code
from cute_fa.semantics.problem import AttentionProblem
from cute_fa.semantics.types import PersistentMode
from fa3_sm90.backward.config import Fa3BackwardConfig, backward_candidates, backward_config, backward_objections


class Fa3Backward(TiledBackward):
    """Backward with TMA and wgmma, for sm_90a: fp16 and bf16, head_dims whose sums fit two warpgroups' registers."""

    family = "fa3"
    l2_bytes = 50 * 2**20  # of an H100 and an H200 (NVIDIA H100 whitepaper)

    @classmethod
    def supports(cls, problem: AttentionProblem) -> list[str]:
        reasons = []
        if problem.is_fp8:
            reasons.append(f"dtype {dtypes_of_code(problem)}: fp8 has no backward")
        reasons += common_objections(problem, "16-byte strides of TMA")
        if problem.page_size is not None:
            reasons.append(f"page_size {problem.page_size}: this kernel reads contiguous K and V only")
        if problem.pack_gqa and problem.gqa_ratio > 1:
            reasons.append("pack_gqa: this kernel's tiles hold the queries of one head")
        indexed = {"cache_batch_idx": problem.cache_batch_idx, "cache_leftpad": problem.cache_leftpad}
        reasons += [f"{name}: a cache has no gradient" for name, given in indexed.items() if given]
        if problem.persistent is PersistentMode.ON:
            reasons.append("persistent: this kernel launches one CTA for each tile")
        if problem.ranges:
            reasons.append("a range plan: this kernel walks over ranges of blocks, not over lists")
        if not reasons:
            reasons += backward_objections(problem)
        if reasons:
            return reasons
        config, heads = cls.configure(problem), problem.num_heads
        grids = {
            "queries": ceil_div(problem.seqlen_q, config.tile_m) * heads * problem.batch,
            "keys": ceil_div(problem.seqlen_k, config.tile_n) * problem.num_heads_kv * problem.batch,
        }
        return [
            f"{ctas} tiles of {name}: a grid has at most {MAX_TILES} CTAs"
            for name, ctas in grids.items()
            if ctas > MAX_TILES
        ]

    @classmethod
    def configure(cls, problem: AttentionProblem) -> Fa3BackwardConfig:
        return backward_config(problem)

    @classmethod
    def candidates(cls, problem: AttentionProblem) -> list[Candidate]:
        return backward_candidates(problem)
