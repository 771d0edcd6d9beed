"""What no Hopper backward serves."""

from __future__ import annotations

from cute_fa.device.tiling import MAX_TILES, ceil_div
from cute_fa.engine.contract import common_objections
from cute_fa.semantics.names import dtypes_of_code
from cute_fa.semantics.problem import AttentionProblem
from cute_fa.semantics.types import PersistentMode


def problem_objections(problem: AttentionProblem) -> list[str]:
    """Why the problem is not served whatever the tiles."""
    reasons = []
    if problem.has_codes:
        reasons.append(f"dtype {dtypes_of_code(problem)}: codes have no backward")
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
    return reasons


def grid_objections(problem: AttentionProblem, tile_m: int, tile_n: int) -> list[str]:
    """Why so many tiles of queries and of keys cannot be launched."""
    grids = {
        "queries": ceil_div(problem.seqlen_q, tile_m) * problem.num_heads * problem.batch,
        "keys": ceil_div(problem.seqlen_k, tile_n) * problem.num_heads_kv * problem.batch,
    }
    return [
        f"{ctas} tiles of {name}: a grid has at most {MAX_TILES} CTAs"
        for name, ctas in grids.items()
        if ctas > MAX_TILES
    ]
