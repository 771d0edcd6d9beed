"""How the FA2 forward is built: a frozen config, and the one heuristic that chooses it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import ClassVar, NamedTuple

from cute_fa.engine.contract import Candidate, FeatureConfig, candidates, chosen, padded, smem_objection
from cute_fa.semantics.problem import AttentionProblem
from fa2_sm80.common.rules import accumulator_objection


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
    def walk_shape(self) -> tuple[int, int]:
        """Rows and columns of a tile, of a range plan's walk."""
        return self.tile_m, self.tile_n

    @property
    def smem_bytes(self) -> int:
        """Q (reused by O), and K and V of every stage."""
        return self.dtype.bytes * _smem_elements(self, self.head_dim_padded, self.head_dim_v_padded)

    @property
    def compile_name(self) -> str:
        return self.named("fa2_fwd")


class Tiles(NamedTuple):
    """The fields of these names of :class:`Fa2ForwardConfig`."""

    tile_m: int
    tile_n: int
    num_warps: int
    stages: int


# In order of preference.
_TILES = (Tiles(128, 64, 4, 2), Tiles(128, 48, 4, 1), Tiles(128, 32, 4, 2), Tiles(128, 64, 8, 1), Tiles(64, 64, 4, 1))
# What two of these together spill with 48 keys at head_dim 128: accesses to local memory in the loops over keys, at
# most, of bf16 kernels with and without packed sequences. With one of them, or with 32 keys, there are none.
_SPILLS = {
    ("window_left", "softcap"): 15,
    ("window_left", "alibi"): 20,
    ("alibi", "softcap"): 9,
    ("window_left", "alibi", "softcap"): 16,
}


@lru_cache(maxsize=4096)
def forward_config(problem: AttentionProblem) -> Fa2ForwardConfig:
    """Tiles by head_dim and shared memory.

    Up to head_dim 128 four warps own 32 queries each: every K and V fragment that ldmatrix brings then feeds two
    m16n8k16, and shared memory stays below the tensor cores (with 16 queries a warp it would need 1.3 times their
    time on an A100). Beyond that O alone would fill the registers, so eight warps own 16 each. Where a CTA has 99 KB,
    head_dim 256 takes 64 queries instead of 128. The wider of the two head_dims counts.
    """
    return _config(problem, chosen(_weighed(problem)))


def forward_candidates(problem: AttentionProblem) -> list[Candidate]:
    """The configs that :func:`forward_config` weighs."""
    return candidates(_weighed(problem), partial(_config, problem))


def _config(problem: AttentionProblem, tiles: Tiles) -> Fa2ForwardConfig:
    return Fa2ForwardConfig(**FeatureConfig.features(problem), **tiles._asdict())


def _weighed(problem: AttentionProblem) -> Iterator[tuple[Tiles, str | None]]:
    """Tiles in order of preference, each with why it is refused."""
    widest = max(padded(problem.head_dim), padded(problem.head_dim_v))
    for tiles in _TILES:
        yield tiles, _objection(problem, tiles, widest)


def _objection(problem: AttentionProblem, tiles: Tiles, widest: int) -> str | None:
    rows = tiles.tile_m // tiles.num_warps
    smem_bytes = problem.dtype.bytes * _smem_elements(tiles, widest, widest)
    return (
        accumulator_objection(rows * widest // 32, f"O of {rows} queries a warp, {widest} wide")
        or (_spills(problem, tiles) if 96 < widest <= 128 else None)
        or smem_objection(smem_bytes, f"Q, K and V {widest} wide", problem.arch)
    )


def _spills(problem: AttentionProblem, tiles: Tiles) -> str | None:
    """Whether registers spill at head_dim 128: how many accesses to local memory the loops have."""
    if tiles.tile_n == 64:
        return (
            "registers spill: 3 accesses and 8.5 instructions per score at 64 keys, none and 6.3 at 48 (head_dim 128)"
        )
    crowd = _crowd(problem)
    if tiles.tile_n == 48 and crowd in _SPILLS:
        return f"registers spill with {' and '.join(crowd)}: up to {_SPILLS[crowd]} accesses at 48 keys, none at 32"
    return None


def _crowd(problem: AttentionProblem) -> tuple[str, ...]:
    """Which of the features whose values take registers in the loops the problem has."""
    given = {
        "window_left": problem.window_left is not None,
        "alibi": problem.alibi,
        "softcap": problem.softcap > 0.0,
    }
    return tuple(name for name, present in given.items() if present)


def _smem_elements(tiles: Tiles | Fa2ForwardConfig, head_dim: int, head_dim_v: int) -> int:
    """Q (reused by O), and K and V of every stage."""
    return tiles.tile_m * max(head_dim, head_dim_v) + tiles.stages * tiles.tile_n * (head_dim + head_dim_v)
