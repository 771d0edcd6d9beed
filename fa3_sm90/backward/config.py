"""How the Hopper backward is built: a frozen config, the pipelines as data, and the one heuristic that chooses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import ClassVar, NamedTuple

from cute_fa.device.pipeline_spec import PipelineSpec
from cute_fa.engine.contract import Candidate, FeatureConfig, candidates, chosen, smem_objection
from cute_fa.semantics.problem import AttentionProblem
from fa3_sm90.common.wgmma import WARPGROUP, WGMMA_K, WGMMA_M

PANEL = 64  # columns of shared memory side by side, 128 bytes
# Consumer warpgroups, and setmaxnreg of the producers' warpgroup and of theirs: all 65,536 registers of the SM.
CONSUMERS = 2
REGISTERS = (24, 240)
# Room for the mbarriers beside the tiles.
BARRIER_BYTES = 1024
# Buffers of dSᵀ: one is written while the products still read the other.
SCORE_STAGES = 2
# Registers of a consumer thread that its sums and scores may take; the rest holds addresses, statistics and a share's
# operands and derivatives.
MAX_REGISTERS = 192


@dataclass(frozen=True)
class Fa3BackwardConfig(FeatureConfig):
    """Everything that shapes the machine code of the kernels of one backward.

    A CTA owns ``tile_n`` keys, 64 a consumer warpgroup, and meets ``tile_m`` queries a step, of which ``stages`` are in
    flight. To the sums of dQ a score element adds 4 · head_dim_padded / tile_n bytes in the L2, 2 at head_dim 64 and 4
    at 128.
    ``deterministic``: tiles of keys add to dQ in order. ``lse_gradient``: dLSE is given; ``slopes_gradient``: that of
    the ALiBi slopes is wanted.
    """

    kernel_module: ClassVar[str] = "fa3_sm90.backward.kernel"

    tile_m: int
    tile_n: int
    stages: int
    deterministic: bool = False
    lse_gradient: bool = False
    slopes_gradient: bool = False

    dq_sums: ClassVar[bool] = True
    cluster: ClassVar[int] = 1
    probability_shift: ClassVar[int] = 0
    slopes_by_keys: ClassVar[bool] = True
    statistics: ClassVar[str] = "wgmma"

    @property
    def turns(self) -> bool:
        """Whether tiles of keys take turns at a dQ."""
        return self.deterministic

    @property
    def longest_first(self) -> bool:
        """Whether tiles are handed out over several heads at a time (``work.key_tile``), the longest first: under a
        right bound alone, as a causal mask is one. A window's tiles are about equally long, as are those of full
        attention: they go head by head, unless they take turns, which is another order over several heads."""
        return self.turns or (self.window_right and not self.window_left)

    @property
    def stats_elements(self) -> int:
        """Statistics of a tile of queries: LSE and D."""
        return 2 * self.tile_m

    @property
    def slope_parts(self) -> int:
        """Parts of a slope's gradient that a tile of keys gives: one a consumer warp."""
        return 4 * CONSUMERS

    @property
    def head_dim_padded(self) -> int:
        return _padded(self.head_dim, self.tile_m)

    @property
    def head_dim_v_padded(self) -> int:
        return _padded_v(self.head_dim_v)

    @property
    def dq_columns(self) -> int:
        """Columns of dQ that one warpgroup computes, of 64 queries."""
        return self.head_dim_padded * self.tile_m // (WGMMA_M * CONSUMERS)

    @property
    def num_threads(self) -> int:
        """The producers' warpgroup and the consumers."""
        return WARPGROUP * (1 + CONSUMERS)

    @property
    def dq_bytes(self) -> int:
        """dQ of one warpgroup, fp32."""
        return WGMMA_M * self.dq_columns * 4

    @property
    def ragged_queries(self) -> bool:
        """Whether a sequence's queries may end before the rows of the tensor do."""
        return self.cu_seqlens_q or self.seqused_q

    @property
    def ragged_keys(self) -> bool:
        """Whether a sequence's keys may end before the rows of the tensor do."""
        return self.cu_seqlens_k or self.seqused_k

    @property
    def pipelines(self) -> tuple[PipelineSpec, ...]:
        """K and V come once; Q with the LSE and dO with D for every step."""
        size, warps = self.dtype.bytes, 4 * CONSUMERS
        queries, douts = (self.tile_m * columns * size for columns in (self.head_dim_padded, self.head_dim_v_padded))
        return (
            PipelineSpec("k", 1, self.tile_n * self.head_dim_padded * size, warps),
            PipelineSpec("v", 1, self.tile_n * self.head_dim_v_padded * size, warps),
            PipelineSpec("q", self.stages, queries + 4 * self.tile_m, warps),
            PipelineSpec("dout", self.stages, douts + 4 * self.tile_m, warps),
        )

    @property
    def smem_bytes(self) -> int:
        """Shared memory of a CTA."""
        return _smem_bytes(self, self.head_dim_padded, self.head_dim_v_padded, self.dtype.bytes)

    @property
    def compile_name(self) -> str:
        return self.named("fa3_bwd", det=self.deterministic, dlse=self.lse_gradient, dslopes=self.slopes_gradient)


class Tiles(NamedTuple):
    """The fields of these names of :class:`Fa3BackwardConfig`."""

    tile_m: int
    tile_n: int
    stages: int


# In order of preference.
_TILES = (Tiles(128, 128, 2), Tiles(64, 128, 2))


@lru_cache(maxsize=4096)
def backward_config(problem: AttentionProblem) -> Fa3BackwardConfig:
    """Tiles by head_dim.

    Sᵀ = K·Qᵀ rather than S, so that Pᵀ and dSᵀ already lie in the registers as operand A of dV += Pᵀ·dO and
    dK += dSᵀ·Q; only dSᵀ goes through shared memory, for dQ (FlashAttention-3, arXiv 2407.08608, section 3, does the
    same). The sums of 64 keys a warpgroup limit the tiles: 128 queries a step while both head_dims together have at
    most 128 columns, 64 up to 256.
    """
    return _config(problem, chosen(_weighed(problem)))


def backward_candidates(problem: AttentionProblem) -> list[Candidate]:
    """The configs that :func:`backward_config` weighs."""
    return candidates(_weighed(problem), partial(_config, problem))


def backward_objections(problem: AttentionProblem) -> list[str]:
    """Why no tiles serve the problem: those of the last, which need the least; none if some do."""
    reasons = [reason for _, reason in _weighed(problem)]
    return [] if None in reasons else [reasons[-1]]


def _config(problem: AttentionProblem, tiles: Tiles) -> Fa3BackwardConfig:
    return Fa3BackwardConfig(
        **FeatureConfig.features(problem),
        **tiles._asdict(),
        deterministic=problem.deterministic,
        lse_gradient=problem.lse_gradient,
        slopes_gradient=problem.slopes_gradient,
    )


def _weighed(problem: AttentionProblem) -> Iterator[tuple[Tiles, str | None]]:
    """Tiles in order of preference, each with why it is refused."""
    for tiles in _TILES:
        yield tiles, _objection(problem, tiles)


def _objection(problem: AttentionProblem, tiles: Tiles) -> str | None:
    head_dim, head_dim_v = _padded(problem.head_dim, tiles.tile_m), _padded_v(problem.head_dim_v)
    registers = _registers(tiles, head_dim, head_dim_v)
    if registers > MAX_REGISTERS:
        what = f"dK and dV of 64 keys, {head_dim} and {head_dim_v} wide, and scores of {tiles.tile_m} queries"
        return f"registers: {registers} a thread for {what}, at most {MAX_REGISTERS}"
    # At head_dim 64: 8 to 26 accesses with a softcap and a mask, 86 to 157 with the slopes' gradients.
    for feature, wanted in (("a softcap", problem.softcap > 0), ("the slopes' gradients", problem.slopes_gradient)):
        if wanted and tiles.tile_m > WGMMA_M:
            return f"registers: with {feature}, {tiles.tile_m} queries a step spill"
    smem_bytes = _smem_bytes(tiles, head_dim, head_dim_v, problem.dtype.bytes)
    return smem_objection(smem_bytes, f"K, V, Q, dO, dS and dQ {head_dim} and {head_dim_v} wide", problem.arch)


def _registers(tiles: Tiles, head_dim: int, head_dim_v: int) -> int:
    """Registers of sums and scores where most are alive: dK and dV, S and dP in fp32. What comes of these, the
    operands in half as many, takes their place share by share."""
    return (head_dim + head_dim_v) // 2 + tiles.tile_m


def _smem_bytes(tiles: Tiles | Fa3BackwardConfig, head_dim: int, head_dim_v: int, element: int) -> int:
    """K, V, Q and dO of every stage with their statistics, dSᵀ, dQ."""
    t = tiles
    rows = t.tile_n + t.stages * t.tile_m
    scores = SCORE_STAGES * t.tile_n * t.tile_m
    statistics = 8 * t.stages * t.tile_m
    return element * (rows * (head_dim + head_dim_v) + scores) + 4 * t.tile_m * head_dim + statistics + BARRIER_BYTES


def _padded(head_dim: int, tile_m: int) -> int:
    """head_dim as the tiles hold it: whole steps of wgmma; with 64 queries the warpgroups share dQ's columns, half a
    panel or whole panels of 64 each."""
    step = WGMMA_K if tile_m > WGMMA_M else PANEL if head_dim <= PANEL else PANEL * CONSUMERS
    return -(-head_dim // step) * step


def _padded_v(head_dim_v: int) -> int:
    return -(-head_dim_v // WGMMA_K) * WGMMA_K
