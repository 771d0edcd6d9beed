"""The FA3 forward as the dispatch table sees it: what it serves, how it is configured, what it is launched with."""

from __future__ import annotations

from typing import NamedTuple

from cute_fa.device.tiling import MAX_TILES, ceil_div, dense_tiles, head_group, num_ctas, packed_tiles
from cute_fa.engine.contract import (
    AttentionKernel,
    AttentionTensors,
    Candidate,
    CommonArguments,
    common_arguments,
    common_objections,
)
from cute_fa.semantics.names import dtypes_of_code
from cute_fa.semantics.problem import AttentionProblem
from cute_fa.semantics.types import Direction
from fa3_sm90.forward.config import (
    WGMMA_M,
    Fa3ForwardConfig,
    forward_candidates,
    forward_config,
    promotion_objection,
)

# Of an H100 and an H200 (NVIDIA H100 whitepaper): what the order of tiles is planned for.
L2_BYTES = 50 * 2**20


class Grid(NamedTuple):
    """The tiles of a launch, in the order of ``cute_fa.device.tile_scheduler.TileGrid``."""

    m_blocks: int
    heads: int
    batches: int
    head_group: int


class Launch(NamedTuple):
    """What a launch takes, in the order of ``fa3_sm90.forward.arguments.ForwardArguments``."""

    common: CommonArguments
    grid: Grid
    num_ctas: int


class Fa3Forward(AttentionKernel):
    """Forward with TMA and wgmma, for sm_90a: fp16 and bf16 with head_dim 8 … 256, fp8 with 16 … 256."""

    family = "fa3"
    direction = Direction.FORWARD

    @classmethod
    def supports(cls, problem: AttentionProblem) -> list[str]:
        reasons = []
        if problem.is_fp8 and not problem.dtype.is_fp8:
            reasons.append(f"dtype {dtypes_of_code(problem)}: k and v in fp8 with q in 16 bits")
        reasons += common_objections(problem, "16-byte strides of TMA")
        if problem.dtype.is_fp8:
            sizes = {name: getattr(problem, name) for name in ("head_dim", "head_dim_v")}
            reasons += [
                f"{name} {size} in fp8: a multiple of 16 is needed (16-byte strides of TMA)"
                for name, size in sizes.items()
                if size % 16
            ]
            refused = None if reasons else promotion_objection(problem)
            reasons += [] if refused is None else [refused]
        if problem.cache_leftpad and problem.page_size is not None:
            reasons.append(f"cache_leftpad with page_size {problem.page_size}: blocks of keys start where pages do")
        if problem.pack_gqa and problem.gqa_ratio > WGMMA_M:
            reasons.append(f"pack_gqa with gqa_ratio {problem.gqa_ratio}: a warpgroup holds {WGMMA_M} query heads")
        if not reasons:
            tiles = _tiles(problem, cls.configure(problem), problem.batch * problem.seqlen_q)
            if tiles > MAX_TILES:
                reasons.append(f"{tiles} tiles of queries: at most {MAX_TILES}")
        return reasons

    @classmethod
    def configure(cls, problem: AttentionProblem) -> Fa3ForwardConfig:
        return forward_config(problem)

    @classmethod
    def candidates(cls, problem: AttentionProblem) -> list[Candidate]:
        return forward_candidates(problem)

    @classmethod
    def arguments(
        cls, problem: AttentionProblem, config: Fa3ForwardConfig, tensors: AttentionTensors, num_sms: int
    ) -> Launch:
        shared = problem.gqa_ratio // config.pack_gqa
        kv_bytes = problem.seqlen_k * (problem.head_dim + problem.head_dim_v) * problem.dtype.bytes
        tiles = _tiles(problem, config, tensors.q.shape[0] if problem.varlen_q else problem.batch * problem.seqlen_q)
        return Launch(
            common=common_arguments(problem, tensors),
            grid=Grid(
                m_blocks=ceil_div(problem.seqlen_q, config.tile_tokens),
                heads=problem.num_heads // config.pack_gqa,
                batches=problem.batch,
                head_group=min(head_group(kv_bytes, L2_BYTES, shared), MAX_TILES),
            ),
            num_ctas=num_ctas(tiles, num_sms, config.persistent),
        )


def _tiles(problem: AttentionProblem, config: Fa3ForwardConfig, total_q: int) -> int:
    """Tiles of queries, at most; ``total_q``: queries of all sequences together."""
    heads = problem.num_heads // config.pack_gqa
    if problem.varlen_q:
        return packed_tiles(total_q, config.tile_tokens, heads, problem.batch)
    return dense_tiles(problem.seqlen_q, config.tile_tokens, heads, problem.batch)
