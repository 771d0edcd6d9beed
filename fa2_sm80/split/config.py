"""How the split-KV forward is built: a frozen config, and the one heuristic that chooses it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import ClassVar, NamedTuple

from cute_fa.device.tiling import ceil_div
from cute_fa.device.widening import WideningConfig
from cute_fa.engine.contract import Candidate, FeatureConfig, candidates, chosen, padded
from cute_fa.semantics.problem import AttentionProblem
from cute_fa.semantics.types import DType

WARPS = 4  # of a CTA, but for tiles of 128 rows
_MOST_WARPS = 8
WARP_ROWS = 16
# Columns of codes that an ldmatrix.x4 brings, of 16 rows.
CODE_COLUMNS = 32
TILE_N = 64
# Columns of O for which a warp that has all keys of a step finds registers beside the scores of 64 of them: with more
# it spills up to 10 accesses, with 32 keys none.
_MOST_COLUMNS = 192
# Query tokens of a sequence up to which this kernel is chosen where the caller leaves the splits open.
MOST_TOKENS = 128
_RESERVED_BYTES = 1024  # of shared memory, by the system for each CTA


@dataclass(frozen=True)
class Fa2SplitConfig(WideningConfig):
    """Everything that shapes the machine code.

    A row is one query of one head; the rows of all query heads of a kv head share tiles, so that each key is read once
    for all of them. ``row_warps`` warps own 16 rows each, ``key_warps`` share the ``tile_n`` keys of a step;
    ``stages`` steps are in flight. ``even``: the CTAs share all key blocks, those that would have fewer than
    ``least_blocks`` have none; else each has a part of a tile. In batch-invariant mode a warp has all keys of a step,
    and a step as many keys whatever the rows.
    """

    kernel_module: ClassVar[str] = "fa2_sm80.split.kernel"

    row_warps: int
    tile_n: int
    stages: int
    even: bool = True
    least_blocks: int = 2

    @property
    def head_dim_padded(self) -> int:
        return self._columns(self.head_dim)

    @property
    def head_dim_v_padded(self) -> int:
        return self._columns(self.head_dim_v)

    def _columns(self, head_dim: int) -> int:
        """Of the tiles, zeros beyond head_dim."""
        return ceil_div(head_dim, CODE_COLUMNS) * CODE_COLUMNS if self.widens else padded(head_dim)

    @property
    def shifted(self) -> tuple[bool, bool]:
        """Whether codes of K, and of V, widen without the instruction for it, which sm_89 is the first to have."""
        return tuple(self._shifts(dtype) for dtype in (self.dtype_k, self.dtype_v))

    @property
    def shifts_queries(self) -> bool:
        """The same of codes of Q."""
        return self._shifts(self.dtype)

    def _shifts(self, dtype: DType) -> bool:
        return dtype is DType.E4M3 and self.arch.number < 89

    @property
    def key_warps(self) -> int:
        return 1 if self.batch_invariant else max(WARPS // self.row_warps, 1)

    @property
    def tile_m(self) -> int:
        return WARP_ROWS * self.row_warps

    @property
    def num_threads(self) -> int:
        return 32 * self.row_warps * self.key_warps

    @property
    def merge_bytes(self) -> int:
        """O and LSE of the rows of each of the warps that share them, fp32."""
        return 4 * self.key_warps * self.tile_m * (self.head_dim_v_padded + 1)

    @property
    def smem_bytes(self) -> int:
        """Q, and K and V of every stage with the descales of their rows, whose place the parts of O take; and what rows
        of Q are divided by."""
        keys = self.stages * self.tile_n * (self.head_dim_padded + self.head_dim_v_padded)
        tiles = self.product_dtype.bytes * self.tile_m * self.head_dim_padded + self.dtype_k.bytes * keys
        return max(tiles + self.descale_bytes, self.merge_bytes) + self.factor_bytes

    @property
    def descale_bytes(self) -> int:
        """Of one for each key of every stage, for K and for V where their rows have some, fp32."""
        return 4 * self.stages * self.tile_n * (self.k_row_descale + self.v_row_descale)

    @property
    def factor_bytes(self) -> int:
        """Of a power of two for each row of Q, fp32."""
        return 4 * self.tile_m * self.scales_rows

    @property
    def ctas_per_sm(self) -> int:
        """How many an SM has room for, up to two; of registers eight warps take all."""
        with_memory = (self.arch.smem_bytes + _RESERVED_BYTES) // (self.smem_bytes + _RESERVED_BYTES)
        return min(with_memory, _MOST_WARPS * 32 // self.num_threads)

    @property
    def compile_name(self) -> str:
        parts = not self.even and not self.batch_invariant
        return self.named("fa2_split", paged=self.page_size is not None, parts=parts)


class Tiles(NamedTuple):
    """``row_warps`` and ``stages`` of a :class:`Fa2SplitConfig`, and how many CTAs of it an SM is to have room for."""

    row_warps: int
    ctas_per_sm: int
    stages: int


# (CTAs an SM, stages) in order of preference: two CTAs, so that one computes while the other waits for memory.
_DEPTHS = ((2, 4), (2, 3), (2, 2), (1, 4), (1, 3), (1, 2), (1, 1))
# Of eight warps, which take all registers of an SM. With one stage nobody would compute while memory is waited for: two
# tiles of 64 rows read the keys twice instead, the second time out of the L2 cache.
_WIDE_DEPTHS = ((1, 4), (1, 3), (1, 2))


@lru_cache(maxsize=4096)
def split_config(problem: AttentionProblem) -> Fa2SplitConfig:
    """As few rows a tile as hold the queries: one warp's 16 rows with the keys shared by four warps, else 64, or 128
    where there are more and they leave room for two steps of keys. 64 keys a step, or 32 where registers are short, and
    as many steps in flight, up to four, as two CTAs find room for; one CTA where that leaves it a single step."""
    return _config(problem, chosen(_weighed(problem)))


def split_candidates(problem: AttentionProblem) -> list[Candidate]:
    """The configs that :func:`split_config` weighs."""
    return candidates(_weighed(problem), partial(_config, problem))


def _config(problem: AttentionProblem, tiles: Tiles) -> Fa2SplitConfig:
    features, even = FeatureConfig.features(problem), problem.num_splits == 0
    halved = tiles.row_warps > 1 and padded(problem.head_dim_v) > _MOST_COLUMNS
    tile_n = TILE_N // 2 if halved else TILE_N
    return Fa2SplitConfig(**features, row_warps=tiles.row_warps, tile_n=tile_n, stages=tiles.stages, even=even)


def _weighed(problem: AttentionProblem) -> Iterator[tuple[Tiles, str | None]]:
    """Tiles in order of preference, each with why it is refused."""
    rows = problem.seqlen_q * problem.gqa_ratio
    if rows <= WARP_ROWS and not problem.seqlen_k_per_split:
        sizes = [(1, _DEPTHS)]
    elif rows <= WARP_ROWS * WARPS:
        sizes = [(WARPS, _DEPTHS)]
    else:
        sizes = [(_MOST_WARPS, _WIDE_DEPTHS), (WARPS, _DEPTHS)]
    for row_warps, depths in sizes:
        for depth in depths:
            tiles = Tiles(row_warps, *depth)
            yield tiles, _depth_objection(problem, tiles)


def _depth_objection(problem: AttentionProblem, tiles: Tiles) -> str | None:
    """Why an SM has no room for so many CTAs with so many steps of keys."""
    needed = _config(problem, tiles).smem_bytes
    available = problem.arch.smem_bytes // tiles.ctas_per_sm - (tiles.ctas_per_sm - 1) * _RESERVED_BYTES
    if needed <= available:
        return None
    return (
        f"shared memory: {needed:,} bytes of Q and {tiles.stages} steps of keys, {available:,} available with "
        f"{tiles.ctas_per_sm} CTA{'s' * (tiles.ctas_per_sm > 1)} an SM"
    )
