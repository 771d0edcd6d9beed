"""How the FA2 backward is built: a frozen config, and the one heuristic that chooses it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import ClassVar, NamedTuple

from cute_fa.engine.contract import Candidate, FeatureConfig, candidates, chosen, smem_objection
from cute_fa.semantics.problem import AttentionProblem
from fa2_sm80.common.rules import accumulator_objection
from fa2_sm80.common.warp_grid import WarpGrid

# An mma.sync m16n8k16 has 16 rows; B operands come in pairs, 16 columns at a time.
MMA_ROWS = 16


@dataclass(frozen=True)
class QueryKernelTiles:
    """Tiles of the kernel that computes dQ alone: ``tile_m`` queries, each warp owning 16 or 32 of them, and ``tile_n``
    keys a step, ``stages`` steps in flight."""

    tile_m: int
    tile_n: int
    num_warps: int
    stages: int

    @property
    def num_threads(self) -> int:
        return 32 * self.num_warps

    @property
    def smem_rows(self) -> int:
        """Rows of both head_dims in shared memory: those of Q and dO, and of K and V of every stage."""
        return self.tile_m + self.stages * self.tile_n

    @property
    def rows_per_thread(self) -> int:
        """Queries of which a thread holds scores: two for each m16n8k16 of its warp."""
        return 2 * (self.tile_m // (16 * self.num_warps))


@dataclass(frozen=True)
class Fa2BackwardConfig(FeatureConfig):
    """Everything that shapes the machine code of the kernels of one backward.

    A CTA owns ``tile_n`` keys and meets ``tile_m`` queries a step; ``stages`` steps are in flight. ``scores``,
    ``keys`` and ``queries`` are the warps of Sᵀ (and dPᵀ), of dK and dV, and of dQ. ``query_kernel``: dQ by a kernel of
    its own instead of atomic additions, for deterministic gradients. ``lse_gradient``: dLSE is given;
    ``slopes_gradient``: that of the ALiBi slopes is wanted.
    """

    kernel_module: ClassVar[str] = "fa2_sm80.backward.kernel"
    probability_shift: ClassVar[int] = 0
    slopes_by_keys: ClassVar[bool] = True
    statistics: ClassVar[str] = "rows"
    turns: ClassVar[bool] = False
    longest_first: ClassVar[bool] = False

    tile_m: int
    tile_n: int
    stages: int
    scores: WarpGrid
    keys: WarpGrid
    queries: WarpGrid
    query_kernel: QueryKernelTiles | None = None
    lse_gradient: bool = False
    slopes_gradient: bool = False

    @property
    def deterministic(self) -> bool:
        return self.query_kernel is not None

    @property
    def dq_sums(self) -> bool:
        """Whether dQ is summed up in scratch memory."""
        return not self.deterministic

    @property
    def stats_elements(self) -> int:
        """Statistics of a tile of queries: LSE and D."""
        return 2 * self.tile_m

    @property
    def slope_parts(self) -> int:
        """Parts of a slope's gradient that a tile of keys gives: one a warp."""
        return self.num_warps

    @property
    def num_warps(self) -> int:
        return self.scores.rows * self.scores.columns

    @property
    def num_threads(self) -> int:
        return 32 * self.num_warps

    @property
    def head_dim_padded(self) -> int:
        return _padded(self.head_dim, self.keys.columns)

    @property
    def head_dim_v_padded(self) -> int:
        return _padded(self.head_dim_v, self.keys.columns)

    @property
    def p_in_registers(self) -> bool:
        """Whether the warp that computes rows of Sᵀ also owns those of dK and dV: P then never leaves it."""
        return _p_in_registers(self)

    @property
    def ds_in_smem(self) -> bool:
        """Whether dS leaves the registers: for dQ, or with P."""
        return _ds_in_smem(self)

    @property
    def key_walk_shape(self) -> tuple[int, int]:
        """Rows, keys, and columns, queries, of a tile, of a range plan's walk."""
        return self.tile_n, self.tile_m

    @property
    def dq_walk_shape(self) -> tuple[int, int] | None:
        """The same of the kernel for dQ alone: rows are queries."""
        return None if self.query_kernel is None else (self.query_kernel.tile_m, self.query_kernel.tile_n)

    @property
    def smem_bytes(self) -> int:
        """K, V, Q and dO of every stage, their LSE and D, and dSᵀ and Pᵀ where they leave the registers."""
        widths = self.head_dim_padded + self.head_dim_v_padded
        return _smem_bytes(self, widths, self.dtype.bytes)

    @property
    def query_kernel_smem_bytes(self) -> int:
        """Q and dO, and K and V of every stage, of the kernel for dQ alone."""
        return self.dtype.bytes * self.query_kernel.smem_rows * (self.head_dim_padded + self.head_dim_v_padded)

    @property
    def compile_name(self) -> str:
        return self.named("fa2_bwd", det=self.deterministic, dlse=self.lse_gradient, dslopes=self.slopes_gradient)


class Tiles(NamedTuple):
    """The fields of these names of :class:`Fa2BackwardConfig`."""

    tile_m: int
    tile_n: int
    stages: int
    scores: WarpGrid
    keys: WarpGrid
    query_kernel: QueryKernelTiles | None = None

    @property
    def num_warps(self) -> int:
        return self.scores.rows * self.scores.columns

    @property
    def deterministic(self) -> bool:
        return self.query_kernel is not None


# In order of preference.
_TILES = (
    Tiles(32, 128, 2, WarpGrid(4), WarpGrid(4)),
    Tiles(64, 128, 2, WarpGrid(4, 2), WarpGrid(4, 2)),
    Tiles(32, 64, 2, WarpGrid(4), WarpGrid(4)),
    Tiles(32, 64, 2, WarpGrid(4, 2), WarpGrid(2, 4)),
    Tiles(32, 32, 1, WarpGrid(2, 2), WarpGrid(1, 4)),
)
# As the forward's, with 32 keys: S, dP and dQ share the registers.
_QUERY_TILES = (
    QueryKernelTiles(128, 32, 4, 2),
    QueryKernelTiles(128, 32, 8, 1),
    QueryKernelTiles(64, 32, 4, 1),
)


@lru_cache(maxsize=4096)
def backward_config(problem: AttentionProblem) -> Fa2BackwardConfig:
    """Tiles by head_dim and shared memory.

    Sᵀ = K·Qᵀ rather than S, so that Pᵀ and dSᵀ already lie in the registers as operand A of dV += Pᵀ·dO and
    dK += dSᵀ·Q; only dS goes through shared memory, for dQ. What limits the tiles is dK and dV in the registers: up to
    head_dim 64 a warp owns 32 keys. Beyond, with 16 keys a warp, shared memory would need 1.3 times the tensor cores'
    time at head_dim 128; instead two or four warps share rows of 32 keys (1.1 times), and P goes through shared memory
    too. Where a CTA has 99 KB that does not fit, up to 128. The wider of the two head_dims counts.
    """
    return _config(problem, chosen(_weighed(problem)))


def backward_candidates(problem: AttentionProblem) -> list[Candidate]:
    """The configs that :func:`backward_config` weighs."""
    return candidates(_weighed(problem), partial(_config, problem))


def _config(problem: AttentionProblem, tiles: Tiles) -> Fa2BackwardConfig:
    return Fa2BackwardConfig(
        **FeatureConfig.features(problem),
        **tiles._asdict(),
        queries=_query_warps(_padded(problem.head_dim, tiles.keys.columns), tiles.tile_m, tiles.num_warps),
        lse_gradient=problem.lse_gradient,
        slopes_gradient=problem.slopes_gradient,
    )


def _weighed(problem: AttentionProblem) -> Iterator[tuple[Tiles, str | None]]:
    """Tiles in order of preference, each with why it is refused."""
    query_tiles = _QUERY_TILES if problem.deterministic else (None,)
    for tiles in _TILES:
        tiles = tiles._replace(query_kernel=query_tiles[0])
        reason = _objection(problem, tiles)
        if reason:
            yield tiles, reason
            continue
        for query_kernel in query_tiles:
            tiles = tiles._replace(query_kernel=query_kernel)
            yield tiles, _query_kernel_objection(problem, tiles) if query_kernel else None


def _objection(problem: AttentionProblem, tiles: Tiles) -> str | None:
    widest = _widest(problem, tiles)
    accumulators = tiles.tile_n * 2 * widest // (32 * tiles.num_warps)
    smem_bytes = _smem_bytes(tiles, 2 * widest, problem.dtype.bytes)
    return accumulator_objection(
        accumulators, f"dK and dV of {tiles.tile_n} keys in {tiles.num_warps} warps, {widest} wide"
    ) or smem_objection(smem_bytes, f"K, V, Q, dO and scores {widest} wide", problem.arch)


def _query_kernel_objection(problem: AttentionProblem, tiles: Tiles) -> str | None:
    widest, kernel = _widest(problem, tiles), tiles.query_kernel
    rows = kernel.tile_m // kernel.num_warps
    smem_bytes = problem.dtype.bytes * kernel.smem_rows * 2 * widest
    return accumulator_objection(rows * widest // 32, f"dQ of {rows} queries a warp, {widest} wide") or smem_objection(
        smem_bytes, f"Q, dO, K and V {widest} wide for dQ alone", problem.arch
    )


def _widest(problem: AttentionProblem, tiles: Tiles) -> int:
    """The wider head_dim as the tiles hold it."""
    return _padded(max(problem.head_dim, problem.head_dim_v), tiles.keys.columns)


def _p_in_registers(tiles: Tiles | Fa2BackwardConfig) -> bool:
    return tiles.scores.columns == 1 and tiles.keys.columns == 1


def _ds_in_smem(tiles: Tiles | Fa2BackwardConfig) -> bool:
    return not (_p_in_registers(tiles) and tiles.deterministic)


def _smem_bytes(tiles: Tiles | Fa2BackwardConfig, widths: int, element: int) -> int:
    """Shared memory of a CTA that owns keys; ``widths``: the two head_dims, ``element``: bytes of an element."""
    rows = tiles.tile_n + tiles.stages * tiles.tile_m
    transposed = tiles.tile_n * tiles.tile_m * (_ds_in_smem(tiles) + (not _p_in_registers(tiles)))
    return element * (rows * widths + transposed) + 8 * tiles.stages * tiles.tile_m


def _padded(head_dim: int, warps: int) -> int:
    """head_dim as the tiles hold it: 16 columns, or as many for each of ``warps``."""
    step = MMA_ROWS * warps
    return -(-head_dim // step) * step


def _query_warps(head_dim: int, tile_m: int, warps: int) -> WarpGrid:
    """Warps of dQ = dS·K: over its columns where these can be shared in blocks of 16, two blocks of rows each, which is
    when they load least; else over its rows, and over the keys, whose parts the atomic additions sum up."""
    rows = tile_m // (2 * MMA_ROWS)
    columns = warps // rows
    if head_dim % (MMA_ROWS * columns) == 0:
        return WarpGrid(rows, columns)
    rows = tile_m // MMA_ROWS
    columns = warps // rows
    if head_dim % (MMA_ROWS * columns) == 0:
        return WarpGrid(rows, columns)
    return WarpGrid(rows, 1, columns)
