"""How the Hopper decode kernel is built: a frozen config, the pipelines as data, and the one heuristic that chooses."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import ClassVar

from cute_fa.device.pipeline_spec import PipelineSpec
from cute_fa.engine.contract import Candidate, FeatureConfig, candidates, chosen
from cute_fa.semantics.problem import AttentionProblem
from fa3_sm90.common.wgmma import WARPGROUP, WGMMA_M

CONSUMERS = 2  # warpgroups
TILE_N = 64
# setmaxnreg of producers and consumers: of 65,536 registers what the loading warps need for addresses, 168 at launch.
REGISTERS = (40, 232)
# Room for the mbarriers beside the tiles.
BARRIER_BYTES = 1024
# Columns of O at a time that one warpgroup hands to the other that has the same rows.
EXCHANGED_COLUMNS = 64
# Tokens of a sequence from which on a prompt's kernel is to be used.
MOST_TOKENS = 128
_MOST_STAGES = 16


@dataclass(frozen=True)
class Fa3DecodeConfig(FeatureConfig):
    """Everything that shapes the machine code.

    A row is one query of one head; the rows of all query heads of a kv head share tiles, so that each key is read once
    for all of them. ``row_groups`` consumer warpgroups have 64 rows each: two have a tile of 128 and both take every
    block of keys, or one tile of 64 and the blocks by turns. ``stages`` blocks of K and of V are in flight. ``even``:
    the CTAs share all key blocks, those that would have fewer than ``least_blocks`` have none; else each has a part of
    a tile.
    """

    kernel_module: ClassVar[str] = "fa3_sm90.decode.kernel"

    row_groups: int
    stages: int
    even: bool = True
    tile_n: int = TILE_N
    least_blocks: int = 2

    @property
    def key_groups(self) -> int:
        """Warpgroups that have the same rows, and take blocks of keys by turns."""
        return CONSUMERS // self.row_groups

    @property
    def tile_m(self) -> int:
        """Rows of a tile."""
        return WGMMA_M * self.row_groups

    @property
    def num_threads(self) -> int:
        """The producer warpgroup and the consumers."""
        return WARPGROUP * (1 + CONSUMERS)

    @property
    def value_columns(self) -> int:
        """Columns of V's tiles; what lies beyond head_dim_v is zero."""
        return self.head_dim_v_padded

    @property
    def key_rows(self) -> int:
        """Keys that one TMA copy brings: of a page as many as a block and a page have in common."""
        return self.tile_n if self.page_size is None else math.gcd(self.page_size, self.tile_n)

    @property
    def ragged_keys(self) -> bool:
        """Whether a sequence's keys may end before the rows of the tensor, or of the page, do."""
        return self.cu_seqlens_k or self.seqused_k or self.cache_leftpad or self.page_size is not None

    @property
    def exchange_bytes(self) -> int:
        """Sums of a tile's rows on their way from one warpgroup to the other, fp32."""
        return 0 if self.key_groups == 1 else WGMMA_M * EXCHANGED_COLUMNS * 4

    @property
    def smem_bytes(self) -> int:
        """Shared memory of a CTA."""
        keys = self.stages * self.tile_n * (self.head_dim_padded + self.value_columns)
        return self.dtype.bytes * (self.tile_m * self.head_dim_padded + keys) + self.exchange_bytes + BARRIER_BYTES

    @property
    def pipelines(self) -> tuple[PipelineSpec, ...]:
        """A block of keys is read by the warpgroups that have different rows."""
        of_keys, everyone, size = 4 * self.row_groups, 4 * CONSUMERS, self.dtype.bytes
        return (
            PipelineSpec("q", 1, 0, everyone),
            PipelineSpec("k", self.stages, self.tile_n * self.head_dim_padded * size, of_keys),
            PipelineSpec("v", self.stages, self.tile_n * self.value_columns * size, of_keys),
        )

    @property
    def compile_name(self) -> str:
        paged = self.page_size is not None
        return self.named("fa3_decode", **{f"page{self.page_size}": paged, "parts": not self.even})


@lru_cache(maxsize=4096)
def decode_config(problem: AttentionProblem) -> Fa3DecodeConfig:
    """Tiles of 64 rows, or of 128 where there are more, and as many blocks in flight as there is room for: memory is
    what a decoding kernel waits for."""
    return chosen(_weighed(problem))


def decode_candidates(problem: AttentionProblem) -> list[Candidate]:
    """The configs that :func:`decode_config` weighs."""
    return candidates(_weighed(problem), lambda config: config)


def _config(problem: AttentionProblem, row_groups: int, stages: int) -> Fa3DecodeConfig:
    features, even = FeatureConfig.features(problem), problem.num_splits == 0
    return Fa3DecodeConfig(**features, row_groups=row_groups, stages=stages, even=even)


def _weighed(problem: AttentionProblem) -> Iterator[tuple[Fa3DecodeConfig, str | None]]:
    """Configs in order of preference, each with why it is refused."""
    rows = problem.seqlen_q * problem.gqa_ratio
    row_groups = 1 if rows <= WGMMA_M else CONSUMERS
    config = partial(_config, problem, row_groups)
    for stages in range(_MOST_STAGES, 0, -2):
        reason = None
        if config(stages).smem_bytes > problem.arch.smem_bytes:
            reason = f"{stages} stages take {config(stages).smem_bytes:,} bytes, {problem.arch.smem_bytes:,} available"
        yield config(stages), reason
