"""How the FA3 forward is built: a frozen config, the pipelines as data, and the one heuristic that chooses."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

from cute_fa.device.pipeline_spec import PipelineSpec
from cute_fa.engine.contract import FeatureConfig, padded
from cute_fa.semantics.problem import AttentionProblem
from cute_fa.semantics.types import PersistentMode, SmArch

WARPGROUP = 128
WGMMA_M = 64
# Room for the mbarriers beside the tiles.
BARRIER_BYTES = 1024
# setmaxnreg of (producer, consumer) by number of consumer warpgroups: all 65,536 registers of the SM, 128 or 168 a
# thread at launch, moved to the consumers.
REGISTERS = {2: (24, 240), 3: (32, 160)}


@dataclass(frozen=True)
class Fa3ForwardConfig(FeatureConfig):
    """Everything that shapes the machine code.

    ``warpgroups`` consumer warpgroups own 64 rows of Q each and take ``tile_n`` keys a step; ``stages`` blocks of K and
    of V are in flight. ``pack_gqa`` query heads of one kv head share a tile (1: none). ``persistent``: CTAs walk over
    tiles.
    """

    kernel_module: ClassVar[str] = "fa3_sm90.forward.kernel"

    warpgroups: int
    tile_n: int
    stages: int
    pack_gqa: int = 1
    persistent: bool = True

    @property
    def num_threads(self) -> int:
        """The producer warpgroup and the consumers."""
        return WARPGROUP * (1 + self.warpgroups)

    @property
    def registers(self) -> tuple[int, int]:
        """Registers of a producer and of a consumer thread."""
        return REGISTERS[self.warpgroups]

    @property
    def tokens(self) -> int:
        """Query positions that one warpgroup owns: 64, or fewer where heads are packed."""
        return WGMMA_M // self.pack_gqa

    @property
    def tile_tokens(self) -> int:
        """Query positions of one tile."""
        return self.tokens * self.warpgroups

    @property
    def right_edge_blocks(self) -> int:
        """Most key blocks that a tile's right edge meets: its tokens' last visible keys lie side by side."""
        return -(-(self.tile_n + self.tile_tokens - 2) // self.tile_n)

    @property
    def key_rows(self) -> int:
        """Keys that one TMA copy brings: of a page, as many as a block and a page have in common."""
        return self.tile_n if self.page_size is None else math.gcd(self.page_size, self.tile_n)

    @property
    def ragged_keys(self) -> bool:
        """Whether a sequence's keys may end before the rows of the tensor, or of the page, do."""
        return self.cu_seqlens_k or self.seqused_k or self.cache_leftpad or self.page_size is not None

    @property
    def q_bytes(self) -> int:
        """Q of one warpgroup, or O where that is larger and takes its place."""
        columns = self.head_dim_padded if self.own_output else max(self.head_dim_padded, self.head_dim_v_padded)
        return WGMMA_M * columns * self.dtype.bytes

    @property
    def o_bytes(self) -> int:
        """O of one warpgroup."""
        return WGMMA_M * self.head_dim_v_padded * self.dtype.bytes

    @property
    def own_output(self) -> bool:
        """Whether O has its own memory, so that the next tile's Q is loaded while O is stored; else it takes Q's."""
        q = WGMMA_M * self.head_dim_padded * self.dtype.bytes
        return self.warpgroups * (q + self.o_bytes) + self.kv_bytes + BARRIER_BYTES <= self.arch.smem_bytes

    @property
    def kv_bytes(self) -> int:
        return self.stages * self.tile_n * (self.head_dim_padded + self.head_dim_v_padded) * self.dtype.bytes

    @property
    def smem_bytes(self) -> int:
        """Shared memory of a CTA."""
        output = self.o_bytes if self.own_output else 0
        return self.warpgroups * (self.q_bytes + output) + self.kv_bytes + BARRIER_BYTES

    @property
    def pipelines(self) -> tuple[PipelineSpec, ...]:
        """Q has one ring for each warpgroup, since each loads, waits for and releases its own rows."""
        rows = self.pack_gqa * self.tokens
        size = self.dtype.bytes
        everyone = 4 * self.warpgroups
        queries = tuple(PipelineSpec(f"q{i}", 1, rows * self.head_dim_padded * size, 4) for i in range(self.warpgroups))
        keys = PipelineSpec("k", self.stages, self.tile_n * self.head_dim_padded * size, everyone)
        values = PipelineSpec("v", self.stages, self.tile_n * self.head_dim_v_padded * size, everyone)
        return (*queries, keys, values)

    @property
    def pingpong(self) -> bool:
        """Whether warpgroups take turns on the tensor cores. Beyond head_dim 128 a block's products take so long that
        the softmax of the other warpgroup hides behind them anyway."""
        return max(self.head_dim_padded, self.head_dim_v_padded) <= 128

    @property
    def compile_name(self) -> str:
        choices = {
            f"page{self.page_size}": self.page_size is not None,
            f"pack{self.pack_gqa}": self.pack_gqa > 1,
            "single": not self.persistent,
        }
        return self.named("fa3_fwd", **choices)


@lru_cache(maxsize=4096)
def forward_config(problem: AttentionProblem) -> Fa3ForwardConfig:
    """The heuristic: tiles by head_dim, registers and shared memory; packing by how full the tiles get."""
    warpgroups, tile_n, stages = _tiles(problem)
    return Fa3ForwardConfig(
        **FeatureConfig.features(problem),
        warpgroups=warpgroups,
        tile_n=tile_n,
        stages=stages,
        pack_gqa=problem.gqa_ratio if packs(problem, warpgroups) else 1,
        persistent=problem.persistent is not PersistentMode.OFF,
    )


def packs(problem: AttentionProblem, warpgroups: int) -> bool:
    """Whether the query heads of one kv head share a tile: where asked for, else where it fills the rows of the tiles
    better by a tenth, as with few queries (decoding, chunks) it does."""
    ratio = problem.gqa_ratio
    if ratio == 1 or ratio > WGMMA_M:
        return False
    if problem.pack_gqa is not None:
        return problem.pack_gqa
    rows = warpgroups * WGMMA_M
    tokens = warpgroups * (WGMMA_M // ratio)
    seqlen_q = max(problem.seqlen_q, 1)
    apart = seqlen_q / (-(-seqlen_q // rows) * rows)
    packed = seqlen_q * ratio / (-(-seqlen_q // tokens) * rows)
    return packed > 1.1 * apart


def _tiles(problem: AttentionProblem) -> tuple[int, int, int]:
    """(warpgroups, tile_n, stages)."""
    size, size_v = padded(problem.head_dim), padded(problem.head_dim_v)
    if max(size, size_v) <= 64:
        # with a left edge or softcap beside 128 keys, 8 to 35 registers spill in loops of 160
        crowded = problem.window_left is not None or problem.softcap > 0.0
        return 3, 96 if crowded else 128, 2
    candidates = (128, 64) if problem.page_size is not None else (128, 112, 96, 80, 64)
    for tile_n in candidates:
        smem = problem.dtype.bytes * (2 * WGMMA_M * max(size, size_v) + 2 * tile_n * (size + size_v))
        # scores and probabilities of a block, O, and about 40 for addresses, the softmax's state and the mask
        registers = tile_n // 2 + tile_n // 4 + size_v // 2 + 40
        if smem + BARRIER_BYTES <= SmArch.SM_90A.smem_bytes and registers <= REGISTERS[2][1]:
            return 2, tile_n, 2
    raise AssertionError(f"head_dim {problem.head_dim}, {problem.head_dim_v}: no tile fits")  # supports() bounds them
