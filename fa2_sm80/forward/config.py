"""How the FA2 forward is built: a frozen config, and the one heuristic that chooses it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cute_fa.engine.contract import FeatureConfig, padded
from cute_fa.semantics.problem import AttentionProblem


@dataclass(frozen=True)
class Fa2ForwardConfig(FeatureConfig):
    """Everything that shapes the machine code. ``tile_m`` queries and ``tile_n`` keys a step, each warp owning 16 or 32
    of the queries; ``stages`` key blocks in flight."""

    kernel_module: ClassVar[str] = "fa2_sm80.forward.kernel"

    tile_m: int
    tile_n: int
    num_warps: int
    stages: int

    @property
    def num_threads(self) -> int:
        return 32 * self.num_warps

    @property
    def rows_per_thread(self) -> int:
        """Queries of which a thread holds scores: two for each m16n8k16 of its warp."""
        return 2 * (self.tile_m // (16 * self.num_warps))

    @property
    def smem_bytes(self) -> int:
        """Q (reused by O), and K and V of every stage."""
        q_or_o = self.tile_m * max(self.head_dim_padded, self.head_dim_v_padded)
        k_and_v = self.stages * self.tile_n * (self.head_dim_padded + self.head_dim_v_padded)
        return self.dtype.bytes * (q_or_o + k_and_v)

    @property
    def compile_name(self) -> str:
        return self.named("fa2_fwd")


def forward_config(problem: AttentionProblem) -> Fa2ForwardConfig:
    """Tiles by head_dim and shared memory.

    Up to head_dim 128 four warps own 32 queries each: every K and V fragment that ldmatrix brings then feeds two
    m16n8k16, and shared memory stays below the tensor cores (with 16 queries a warp it would need 1.3 times their
    time on an A100). Beyond that O alone would fill the registers, so eight warps own 16 each. Where a CTA has 99 KB,
    head_dim 256 takes 64 queries instead of 128.
    """
    tile_m, tile_n, num_warps, stages = _tiles(problem)
    return Fa2ForwardConfig(
        **FeatureConfig.features(problem),
        tile_m=tile_m,
        tile_n=tile_n,
        num_warps=num_warps,
        stages=stages,
    )


def _tiles(problem: AttentionProblem) -> tuple[int, int, int, int]:
    """(tile_m, tile_n, num_warps, stages)."""
    widest = max(padded(problem.head_dim), padded(problem.head_dim_v))
    if widest <= 96:
        return 128, 64, 4, 2
    if widest <= 128:
        # The main loop takes 6.7 instructions per score with 48 keys and 8.7 with 32; with 64, or with 48 and two of
        # these features, registers spill.
        crowded = (problem.window_left is not None) + problem.alibi + (problem.softcap > 0.0) >= 2
        return (128, 32, 4, 2) if crowded else (128, 48, 4, 1)
    if widest <= 192 or problem.arch.smem_bytes >= 160 * 1024:
        return 128, 64, 8, 1
    return 64, 64, 4, 1
