"""How the FA2 backward is built: a frozen config, and the one heuristic that chooses it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cute_fa.engine.contract import FeatureConfig, padded
from cute_fa.semantics.problem import AttentionProblem
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
        return self.scores.columns == 1 and self.keys.columns == 1

    @property
    def ds_in_smem(self) -> bool:
        """Whether dS leaves the registers: for dQ, or with P."""
        return not (self.p_in_registers and self.deterministic)

    @property
    def smem_bytes(self) -> int:
        """K, V, Q and dO of every stage, their LSE and D, and dSᵀ and Pᵀ where they leave the registers."""
        widths = self.head_dim_padded + self.head_dim_v_padded
        tiles = (self.tile_n + self.stages * self.tile_m) * widths
        transposed = self.tile_n * self.tile_m * (self.ds_in_smem + (not self.p_in_registers))
        return self.dtype.bytes * (tiles + transposed) + 8 * self.stages * self.tile_m

    @property
    def query_kernel_smem_bytes(self) -> int:
        """Q and dO, and K and V of every stage, of the kernel for dQ alone."""
        tiles = self.query_kernel
        rows = tiles.tile_m + tiles.stages * tiles.tile_n
        return self.dtype.bytes * rows * (self.head_dim_padded + self.head_dim_v_padded)

    @property
    def compile_name(self) -> str:
        return self.named("fa2_bwd", det=self.deterministic, dlse=self.lse_gradient, dslopes=self.slopes_gradient)


def backward_config(problem: AttentionProblem) -> Fa2BackwardConfig:
    """Tiles by head_dim and shared memory.

    Sᵀ = K·Qᵀ rather than S, so that Pᵀ and dSᵀ already lie in the registers as operand A of dV += Pᵀ·dO and
    dK += dSᵀ·Q; only dS goes through shared memory, for dQ. What limits the tiles is dK and dV in the registers: up to
    head_dim 64 a warp owns 32 keys. Beyond, with 16 keys a warp, shared memory would need 1.3 times the tensor cores'
    time at head_dim 128; instead two or four warps share rows of 32 keys (1.1 times), and P goes through shared memory
    too. Where a CTA has 99 KB that does not fit, up to 128.
    """
    widest = max(padded(problem.head_dim), padded(problem.head_dim_v))
    roomy = problem.arch.smem_bytes >= 160 * 1024
    tile_m, tile_n, stages = 32, 64, 2
    if widest <= 64:
        scores = keys = WarpGrid(4)
        tile_n = 128
    elif widest <= 128:
        scores = keys = WarpGrid(4, 2) if roomy else WarpGrid(4)
        tile_m, tile_n = (64, 128) if roomy else (32, 64)
    elif roomy:
        scores, keys = WarpGrid(4, 2), WarpGrid(2, 4)
    else:
        scores, keys = WarpGrid(2, 2), WarpGrid(1, 4)
        tile_n, stages = 32, 1
    return Fa2BackwardConfig(
        **FeatureConfig.features(problem),
        tile_m=tile_m,
        tile_n=tile_n,
        stages=stages,
        scores=scores,
        keys=keys,
        queries=_query_warps(_padded(problem.head_dim, keys.columns), tile_m, scores.rows * scores.columns),
        query_kernel=_query_kernel(problem) if problem.deterministic else None,
        lse_gradient=problem.lse_gradient,
        slopes_gradient=problem.slopes_gradient,
    )


def _query_kernel(problem: AttentionProblem) -> QueryKernelTiles:
    """As the forward's tiles, with 32 keys: S, dP and dQ share the registers."""
    widest = max(padded(problem.head_dim), padded(problem.head_dim_v))
    if widest <= 128:
        return QueryKernelTiles(128, 32, 4, 2)
    return QueryKernelTiles(128, 32, 8, 1) if problem.arch.smem_bytes >= 160 * 1024 else QueryKernelTiles(64, 32, 4, 1)


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
