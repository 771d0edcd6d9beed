"""How the split-KV forward is built: a frozen config, and the one heuristic that chooses it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import ClassVar, NamedTuple

from cute_fa.device.tiling import ceil_div
from cute_fa.engine.contract import Candidate, FeatureConfig, candidates, chosen, padded
from cute_fa.semantics.problem import AttentionProblem
from cute_fa.semantics.visibility import visible_keys

WARPS = 4
WARP_ROWS = 16
TILE_N = 64
# Up to as many rows as one tile holds the keys are read once, and more CTAs come from splitting them alone.
DECODE_ROWS = WARPS * WARP_ROWS
# What the model of ``num_splits`` counts in key blocks beside the blocks themselves: a CTA's start, with the first
# copies' latency, and the second kernel. Not yet measured on a GPU.
_START_BLOCKS = 2
_COMBINE_BLOCKS = 4
_MAX_SPLITS = 128
_MAX_CTAS_PER_SM = 2
_RESERVED_BYTES = 1024  # of shared memory, by the system for each CTA


@dataclass(frozen=True)
class Fa2SplitConfig(FeatureConfig):
    """Everything that shapes the machine code.

    A row is one query of one head; the rows of all query heads of a kv head share tiles, so that each key is read once
    for all of them. ``row_warps`` warps own 16 rows each, ``key_warps`` share the ``tile_n`` keys of a step;
    ``stages`` steps are in flight. ``split``: a CTA computes a part of the keys,
    and a second kernel merges the parts.
    """

    kernel_module: ClassVar[str] = "fa2_sm80.split.kernel"

    row_warps: int
    tile_n: int
    stages: int
    split: bool = False

    @property
    def key_warps(self) -> int:
        return WARPS // self.row_warps

    @property
    def tile_m(self) -> int:
        return WARP_ROWS * self.row_warps

    @property
    def num_threads(self) -> int:
        return 32 * WARPS

    @property
    def merge_bytes(self) -> int:
        """O and LSE of the rows of each of the warps that share them, fp32."""
        return 4 * self.key_warps * self.tile_m * (self.head_dim_v_padded + 1)

    @property
    def smem_bytes(self) -> int:
        """Q, and K and V of every stage, whose place the parts of O take."""
        keys = self.stages * self.tile_n * (self.head_dim_padded + self.head_dim_v_padded) * self.dtype.bytes
        return self.dtype.bytes * self.tile_m * self.head_dim_padded + max(keys, self.merge_bytes)

    @property
    def compile_name(self) -> str:
        return self.named("fa2_split", paged=self.page_size is not None, parts=self.split)


class Tiles(NamedTuple):
    """The fields of these names of :class:`Fa2SplitConfig`, and how many CTAs of them an SM has room for."""

    row_warps: int
    ctas_per_sm: int
    stages: int


_ROW_WARPS = (1, 2, 4)
# (CTAs an SM, stages) in order of preference.
_DEPTHS = ((2, 4), (2, 3), (2, 2), (1, 4), (1, 3), (1, 2), (1, 1))


@lru_cache(maxsize=4096)
def split_config(problem: AttentionProblem) -> Fa2SplitConfig:
    """As few rows a tile as hold the queries: one warp's 16 rows with the keys shared by four warps for decoding, up to
    64 rows for chunks of a prompt. 64 keys a step, and as many steps in flight, up to four, as two CTAs find room for,
    so that one computes while the other waits for memory; one CTA where that leaves it a single step."""
    return _config(problem, chosen(_weighed(problem)))


def split_candidates(problem: AttentionProblem) -> list[Candidate]:
    """The configs that :func:`split_config` weighs."""
    return candidates(_weighed(problem), partial(_config, problem))


def _config(problem: AttentionProblem, tiles: Tiles) -> Fa2SplitConfig:
    return Fa2SplitConfig(
        **FeatureConfig.features(problem),
        row_warps=tiles.row_warps,
        tile_n=TILE_N,
        stages=tiles.stages,
        split=problem.num_splits > 1,
    )


def _weighed(problem: AttentionProblem) -> Iterator[tuple[Tiles, str | None]]:
    """Tiles in order of preference, each with why it is refused."""
    rows = problem.seqlen_q * problem.gqa_ratio
    for row_warps in _ROW_WARPS:
        held = WARP_ROWS * row_warps
        if rows > held and row_warps != _ROW_WARPS[-1]:
            largest = WARP_ROWS * _ROW_WARPS[-1]
            yield (
                Tiles(row_warps, *_DEPTHS[0]),
                f"{rows} rows of a kv head: {ceil_div(rows, held)} tiles of {held} would each read its keys, "
                f"{ceil_div(rows, largest)} of {largest}",
            )
            continue
        for depth in _DEPTHS:
            tiles = Tiles(row_warps, *depth)
            yield tiles, _depth_objection(problem, tiles)


def _depth_objection(problem: AttentionProblem, tiles: Tiles) -> str | None:
    """Why an SM has no room for so many CTAs with so many steps of keys."""
    head_dim, head_dim_v = padded(problem.head_dim), padded(problem.head_dim_v)
    keys = tiles.stages * TILE_N * (head_dim + head_dim_v)
    needed = problem.dtype.bytes * (WARP_ROWS * tiles.row_warps * head_dim + keys)
    available = problem.arch.smem_bytes // tiles.ctas_per_sm - (tiles.ctas_per_sm - 1) * _RESERVED_BYTES
    if needed <= available:
        return None
    return (
        f"shared memory: {needed:,} bytes of Q and {tiles.stages} steps of keys, {available:,} available with "
        f"{tiles.ctas_per_sm} CTA{'s' * (tiles.ctas_per_sm > 1)} an SM"
    )


def num_splits(problem: AttentionProblem, num_sms: int) -> int | None:
    """Into how many parts to split the keys: what takes the least time if a CTA's time is its key blocks and a start,
    CTAs run in waves of as many as fit the GPU, and a second kernel follows where there is more than one part. Lengths
    on the device are not read: ``seqlen_k`` is the longest that there may be. None for more rows than one tile."""
    if problem.seqlen_q * problem.gqa_ratio > DECODE_ROWS:
        return None
    config = split_config(problem)
    tiles = problem.num_heads_kv * problem.batch
    window = problem.window_left, problem.window_right, problem.sink_tokens
    blocks = ceil_div(visible_keys(problem.seqlen_q, problem.seqlen_k, *window), config.tile_n)
    ctas = num_sms * max(1, min(_MAX_CTAS_PER_SM, problem.arch.smem_bytes // config.smem_bytes))

    def time(splits: int) -> int:
        waves = ceil_div(tiles * splits, ctas)
        return waves * (ceil_div(blocks, splits) + _START_BLOCKS) + (_COMBINE_BLOCKS if splits > 1 else 0)

    return min(range(1, min(_MAX_SPLITS, max(blocks, 1)) + 1), key=time)
