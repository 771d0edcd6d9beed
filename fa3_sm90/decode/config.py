"""How the Hopper decode kernel is built: a frozen config, the pipelines as data, and the one heuristic that chooses."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import ClassVar

from cute_fa.device.pipeline_spec import PipelineSpec
from cute_fa.device.tiling import ceil_div
from cute_fa.device.widening import WideningConfig
from cute_fa.engine.contract import Candidate, FeatureConfig, candidates, chosen, smem_objection
from cute_fa.semantics.problem import AttentionProblem
from fa3_sm90.common.wgmma import WARPGROUP, WGMMA_M

CONSUMERS = 2  # warpgroups
WIDENERS = 2  # producer warps that widen fp8 codes
TMA_ROWS = 8  # of a page, at least, that TMA brings
# setmaxnreg of producers and consumers: of 65,536 registers what the loading warps need for addresses, 168 at launch.
REGISTERS = (56, 224)
# Room for the mbarriers beside the tiles.
BARRIER_BYTES = 1024
# Columns of O at a time that one warpgroup hands to the other that has the same rows.
EXCHANGED_COLUMNS = 64
# Tokens of a sequence from which on a prompt's kernel is to be used.
MOST_TOKENS = 128
_MOST_STAGES = 16
# Bytes of keys on their way to an SM that an H200's memory needs: 4.3 TB/s, of 132 SMs, times a latency of 1.5 µs.
_BYTES_IN_FLIGHT = 48 * 1024


@dataclass(frozen=True)
class Fa3DecodeConfig(WideningConfig):
    """Everything that shapes the machine code.

    A row is one query of one head; the rows of all query heads of a kv head share tiles, so that each key is read once
    for all of them. ``row_groups`` consumer warpgroups have 64 rows each: two have a tile of 128 and both take every
    block of ``tile_n`` keys, or one tile of 64 and the blocks by turns. ``stages`` blocks of K and of V are in shared
    memory, in 16 bits. ``code_stages``: of fp8 codes, which are widened there; 0 where keys come in 16 bits. ``even``:
    the CTAs share all key blocks, those that would have fewer than ``least_blocks`` have none; else each has a part of
    a tile. In batch-invariant mode a tile of 64 rows has one warpgroup, so that the same one adds up all blocks.
    """

    kernel_module: ClassVar[str] = "fa3_sm90.decode.kernel"

    row_groups: int
    tile_n: int
    stages: int
    code_stages: int = 0
    even: bool = True
    least_blocks: int = 2

    @property
    def by_rows(self) -> bool:
        """Whether keys are copied row by row: TMA brings whole swizzle patterns of 8 rows, from where pages start."""
        return self.page_size is not None and (self.page_size < TMA_ROWS or self.cache_leftpad)

    @property
    def values_with_keys(self) -> bool:
        """Whether a block's rows of V (or their codes) come with those of K, behind K's barrier: nobody signals V's."""
        return self.by_rows

    @property
    def row_loaders(self) -> int:
        """Producer warps that copy rows: all but the one of Q and those that widen."""
        return 1 if self.widens else 1 + WIDENERS

    @property
    def queries_in_registers(self) -> bool:
        """Whether wgmma takes Q from registers, of which it needs head_dim / 4 a thread."""
        return self.head_dim_padded <= 128 and self.head_dim_v_padded <= 128

    @property
    def key_groups(self) -> int:
        """Warpgroups that have the same rows, and take blocks of keys by turns."""
        return 1 if self.batch_invariant else CONSUMERS // self.row_groups

    @property
    def consumers(self) -> int:
        """Consumer warpgroups."""
        return self.row_groups * self.key_groups

    @property
    def tile_m(self) -> int:
        """Rows of a tile."""
        return WGMMA_M * self.row_groups

    @property
    def num_threads(self) -> int:
        """The producer warpgroup and the consumers."""
        return WARPGROUP * (1 + self.consumers)

    @property
    def value_columns(self) -> int:
        """Columns of V's tiles; what lies beyond head_dim_v is zero."""
        return self.head_dim_v_padded

    @property
    def code_columns(self) -> tuple[int, int]:
        """Columns of the tiles of K's and of V's codes, in panels of at least 32 bytes; the rest is zero."""
        return tuple(ceil_div(columns, 32) * 32 for columns in (self.head_dim, self.head_dim_v))

    @property
    def key_rows(self) -> int:
        """Keys that one TMA copy brings: of a page as many as a block and a page have in common."""
        return self.tile_n if self.page_size is None else math.gcd(self.page_size, self.tile_n)

    @property
    def ragged_keys(self) -> bool:
        """Whether a sequence's keys may end before the rows of the tensor, or of the page, do."""
        return self.cu_seqlens_k or self.seqused_k or self.cache_leftpad or self.page_size is not None

    @property
    def row_descales(self) -> int:
        """Of K and V, how many have descales of rows; they come with K."""
        return self.k_row_descale + self.v_row_descale

    @property
    def exchange_bytes(self) -> int:
        """Sums of a tile's rows on their way from one warpgroup to the other, fp32."""
        return 0 if self.key_groups == 1 else WGMMA_M * EXCHANGED_COLUMNS * 4

    @property
    def smem_bytes(self) -> int:
        """Shared memory of a CTA."""
        keys = self.stages * self.tile_n * (self.head_dim_padded + self.value_columns)
        codes = self.code_stages * self.tile_n * sum(self.code_columns)
        tiles = 2 * (self.tile_m * self.head_dim_padded + keys) + codes
        numbers = self.tile_m * self.scales_rows + self.row_descales * self.tile_n * (self.stages + self.code_stages)
        return tiles + self.exchange_bytes + 4 * numbers + BARRIER_BYTES

    @property
    def bytes_in_flight(self) -> int:
        """Of keys and values that TMA may be bringing."""
        if self.widens:
            return self.code_stages * self.tile_n * (self.head_dim + self.head_dim_v)
        return self.stages * self.tile_n * (self.head_dim + self.head_dim_v) * 2

    @property
    def pipelines(self) -> tuple[PipelineSpec, ...]:
        """A block of keys is read by the warpgroups that have different rows."""
        of_keys, size, names = 4 * self.row_groups, self.dtype_k.bytes, ("k", "v")
        filled = (PipelineSpec(name, self.stages, 0, of_keys, WIDENERS) for name in names)
        loaded, stages, readers = (self.head_dim_padded, self.value_columns), self.stages, of_keys
        if self.widens:
            names, loaded, stages, readers = ("k_codes", "v_codes"), self.code_columns, self.code_stages, WIDENERS
        rings = []
        for name, columns in zip(names, loaded, strict=True):
            lanes = 32 if name == "k_codes" and self.row_descales else 0
            by_tma = PipelineSpec(name, stages, self.tile_n * columns * size, readers, copying_lanes=lanes)
            rings.append(PipelineSpec(name, stages, 0, readers, self.row_loaders) if self.by_rows else by_tma)
        return (PipelineSpec("q", 1, 0, 4 * self.consumers), *rings, *(filled if self.widens else ()))

    @property
    def compile_name(self) -> str:
        paged, parts = self.page_size is not None, not self.even and not self.batch_invariant
        return self.named("fa3_decode", **{f"page{self.page_size}": paged, "parts": parts})


@lru_cache(maxsize=4096)
def decode_config(problem: AttentionProblem) -> Fa3DecodeConfig:
    """Tiles of 64 rows, or of 128 where there are more, and as many blocks in flight as there is room for: memory is
    what a decoding kernel waits for."""
    return chosen(_weighed(problem))


def decode_candidates(problem: AttentionProblem) -> list[Candidate]:
    """The configs that :func:`decode_config` weighs."""
    return candidates(_weighed(problem), lambda config: config)


def _weighed(problem: AttentionProblem) -> Iterator[tuple[Fa3DecodeConfig, str | None]]:
    """Configs in order of preference, each with why it is refused."""
    row_groups = 1 if problem.seqlen_q * problem.gqa_ratio <= WGMMA_M else CONSUMERS
    config = partial(
        Fa3DecodeConfig, **FeatureConfig.features(problem), row_groups=row_groups, even=problem.num_splits == 0
    )
    for tile_n, stages, code_stages in _codes_depths() if problem.dtype_k.is_codes else _depths():
        tiles = config(tile_n=tile_n, stages=stages, code_stages=code_stages)
        # in batch-invariant mode as many keys as the tile with the most rows has room for
        widest = replace(tiles, row_groups=CONSUMERS) if tiles.batch_invariant else tiles
        yield tiles, _objection(tiles) or _objection(widest)


def _depths() -> Iterator[tuple[int, int, int]]:
    """Keys of a block, stages, and none of codes: even numbers, which two warpgroups share."""
    for stages in range(_MOST_STAGES, 0, -2):
        yield 64, stages, 0


def _codes_depths() -> Iterator[tuple[int, int, int]]:
    """Enough codes in flight, then as many stages behind them as warpgroups and wideners can use."""
    for tile_n in (64, 32):
        for stages in (4, 3, 2):
            for code_stages in range(_MOST_STAGES, 2, -1):
                yield tile_n, stages, code_stages


def _objection(config: Fa3DecodeConfig) -> str | None:
    tiles = f"{config.stages} stages of {config.tile_n} keys, {config.code_stages} of codes"
    if refused := smem_objection(config.smem_bytes, tiles, config.arch):
        return refused
    narrow = config.bytes_in_flight < _BYTES_IN_FLIGHT and config.widens and config.code_stages < _MOST_STAGES
    if narrow and (config.tile_n, config.stages) != (32, 2):
        return f"{tiles}: {config.bytes_in_flight:,} bytes in flight, {_BYTES_IN_FLIGHT:,} are needed"
    return None
