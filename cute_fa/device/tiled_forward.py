"""What the dispatch table sees of the forwards that walk over tiles of queries by TMA, on sm_90 and sm_100. No DSL."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

from cute_fa.device.tiling import MAX_TILES, ceil_div, dense_tiles, head_group, num_ctas, packed_tiles
from cute_fa.engine.contract import (
    AttentionKernel,
    AttentionTensors,
    CommonArguments,
    common_arguments,
    common_objections,
)
from cute_fa.semantics.names import dtypes_of_code
from cute_fa.semantics.problem import AttentionProblem
from cute_fa.semantics.types import Direction

SWIZZLE_ROWS = 8


class Grid(NamedTuple):
    """The tiles of a launch, in the order of ``cute_fa.device.tile_scheduler.TileGrid``."""

    m_blocks: int
    heads: int
    batches: int
    head_group: int


class Launch(NamedTuple):
    """What a launch takes, in the order of the kernels' ``ForwardArguments``."""

    common: CommonArguments
    grid: Grid
    num_ctas: int


class TiledForward(AttentionKernel):
    """``rows``: of queries in the smallest tile, which query heads of one kv head may share; ``l2_bytes``: of the cache
    that the order of tiles is planned for."""

    direction = Direction.FORWARD
    rows: ClassVar[int]
    l2_bytes: ClassVar[int]

    @classmethod
    def supports(cls, problem: AttentionProblem) -> list[str]:
        reasons = []
        if problem.has_codes and not problem.dtype.is_fp8:
            reasons.append(f"dtype {dtypes_of_code(problem)}: k and v in codes with q in 16 bits")
        reasons += common_objections(problem, "16-byte strides of TMA")
        if problem.dtype.is_fp8:
            sizes = {name: getattr(problem, name) for name in ("head_dim", "head_dim_v")}
            reasons += [
                f"{name} {size} in fp8: a multiple of 16 is needed (16-byte strides of TMA)"
                for name, size in sizes.items()
                if size % 16
            ]
            refused = None if reasons else cls.promotion_objection(problem)
            reasons += [] if refused is None else [refused]
        if problem.k_row_descale or problem.v_row_descale:
            reasons.append("descales of the cache's rows: this kernel takes one for each sequence, or block, and head")
        if problem.ranges and problem.has_codes:
            reasons.append(f"a range plan with dtype {dtypes_of_code(problem)}: its kernels are of 16 bits")
        if problem.ranges and problem.pack_gqa and problem.gqa_ratio > 1:
            reasons.append("pack_gqa with a range plan: its masks are of tiles of queries of one head")
        if problem.page_size is not None and problem.page_size < SWIZZLE_ROWS:
            rule = f"TMA copies of {SWIZZLE_ROWS} rows and more, after which the swizzle of shared memory repeats"
            reasons.append(f"page_size {problem.page_size}: {rule}")
        if problem.cache_leftpad and problem.page_size is not None:
            reasons.append(f"cache_leftpad with page_size {problem.page_size}: blocks of keys start where pages do")
        if problem.pack_gqa and problem.gqa_ratio > cls.rows:
            reasons.append(f"pack_gqa with gqa_ratio {problem.gqa_ratio}: a warpgroup holds {cls.rows} query heads")
        if not reasons:
            config = cls.configure(problem)
            tiles, most = _tiles(problem, config, problem.batch * problem.seqlen_q), MAX_TILES // cls.ctas(config)
            if tiles > most:
                reasons.append(f"{tiles} tiles of queries: at most {most}")
        return reasons

    @classmethod
    def promotion_objection(cls, problem: AttentionProblem) -> str | None:
        """Why sums of fp8 products are not promoted as often as is asked for; None where they are kept in fp32."""
        return None

    @classmethod
    def arguments(cls, problem: AttentionProblem, config, tensors: AttentionTensors, num_sms: int) -> Launch:
        shared = problem.gqa_ratio // config.pack_gqa
        kv_bytes = problem.seqlen_k * (problem.head_dim + problem.head_dim_v) * problem.dtype.bytes
        tiles = _tiles(problem, config, tensors.q.shape[0] if problem.varlen_q else problem.batch * problem.seqlen_q)
        return Launch(
            common=common_arguments(problem, tensors),
            grid=Grid(
                m_blocks=ceil_div(problem.seqlen_q, config.tile_tokens),
                heads=problem.num_heads // config.pack_gqa,
                batches=problem.batch,
                head_group=min(head_group(kv_bytes, cls.l2_bytes, shared), MAX_TILES),
            ),
            num_ctas=cls.num_ctas(config, tiles, num_sms),
        )

    @classmethod
    def ctas(cls, config) -> int:
        """CTAs that compute a tile together."""
        return 1

    @classmethod
    def num_ctas(cls, config, tiles: int, num_sms: int) -> int:
        """CTAs to launch for so many tiles."""
        return num_ctas(tiles, num_sms, config.persistent)


def _tiles(problem: AttentionProblem, config, total_q: int) -> int:
    """Tiles of queries, at most; ``total_q``: queries of all sequences together."""
    heads = problem.num_heads // config.pack_gqa
    if problem.varlen_q:
        return packed_tiles(total_q, config.tile_tokens, heads, problem.batch)
    return dense_tiles(problem.seqlen_q, config.tile_tokens, heads, problem.batch)


def packing_objection(problem: AttentionProblem, units: int, unit_rows: int) -> str | None:
    """Why the query heads of one kv head do not share a tile of ``units`` times ``unit_rows``: they do where asked for,
    else where that fills the rows of the tiles better by a tenth, as with few queries (decoding, chunks)."""
    ratio = problem.gqa_ratio
    if problem.ranges:
        return f"pack_gqa {ratio}: the masks of a range plan are of tiles of queries of one head"
    if ratio > unit_rows:
        return f"pack_gqa {ratio}: a warpgroup holds {unit_rows} query heads"
    if problem.pack_gqa is not None:
        return None if problem.pack_gqa else "pack_gqa False is asked for"
    rows = units * unit_rows
    tokens = units * (unit_rows // ratio)
    seqlen_q = max(problem.seqlen_q, 1)
    apart = seqlen_q / (-(-seqlen_q // rows) * rows)
    packed = seqlen_q * ratio / (-(-seqlen_q // tokens) * rows)
    if packed > 1.1 * apart:
        return None
    return f"packed heads fill {packed:.1%} of the tiles' rows, heads apart {apart:.1%}: a tenth more is needed"
