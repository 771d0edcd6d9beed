"""How the Hopper backward for wide head_dims is built: a frozen config, the pipelines as data, the one heuristic."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import ClassVar, NamedTuple

from cute_fa.device.pipeline_spec import PipelineSpec
from cute_fa.device.tiling import ceil_div
from cute_fa.engine.contract import Candidate, FeatureConfig, candidates, chosen, smem_objection
from cute_fa.semantics.problem import AttentionProblem
from fa3_sm90.backward.config import BARRIER_BYTES, CONSUMERS
from fa3_sm90.common.wgmma import WARPGROUP, WGMMA_M

# Keys, or queries, of a tile: of all products 64 are rows of one wgmma.
TILE = WGMMA_M
CONSUMER_WARPS = 4 * CONSUMERS


@dataclass(frozen=True)
class Fa3SplitBackwardConfig(FeatureConfig):
    """Everything that shapes the machine code of the kernels of one backward.

    The kernel for dK and dV: a CTA owns 64 keys, of which one warpgroup has dV and the other dK, and meets 64 queries a
    step, of which ``stages`` are in flight. ``cluster``: CTAs that own keys and share their queries, of which each
    loads a part and sends it to all. The kernel for dQ: a CTA owns 64 queries a warpgroup and meets 64 keys a step;
    ``k_stages`` and ``v_stages`` of K and V are in flight. Nothing is added in the L2, 0 bytes a score element, so that
    the gradients are always deterministic. ``lse_gradient``: dLSE is given; ``slopes_gradient``: that of the ALiBi
    slopes is wanted.
    """

    kernel_module: ClassVar[str] = "fa3_sm90.backward_split.kernel"
    tile_m: ClassVar[int] = TILE
    tile_n: ClassVar[int] = TILE
    statistics: ClassVar[str] = "wgmma"
    dq_sums: ClassVar[bool] = False
    turns: ClassVar[bool] = False
    # The kernel for dK and dV has P times 2^15, at most 2^15: in fp16 numbers down to 2^-29 keep 11 bits. A product for
    # each score; as a part of the LSE it would cost none, but from 2^24 on be lost among the numbers of fp32.
    probability_shift: ClassVar[int] = 15
    slopes_by_keys: ClassVar[bool] = False

    stages: int
    k_stages: int
    v_stages: int
    cluster: int
    lse_gradient: bool = False
    slopes_gradient: bool = False

    @property
    def longest_first(self) -> bool:
        """As of :class:`Fa3BackwardConfig`: whether tiles differ in length, the longest of several heads come first."""
        return self.window_right and not self.window_left

    @property
    def stats_elements(self) -> int:
        """Statistics of a tile of queries: LSE and D."""
        return 2 * TILE

    @property
    def slope_parts(self) -> int:
        """Parts of a slope's gradient that 64 queries give: one a warp."""
        return 4

    @property
    def head_dim_padded(self) -> int:
        return _padded(self.head_dim)

    @property
    def head_dim_v_padded(self) -> int:
        return _padded(self.head_dim_v)

    @property
    def num_threads(self) -> int:
        """Of both kernels: the producer's warpgroup and the consumers."""
        return WARPGROUP * (1 + CONSUMERS)

    @property
    def query_rows(self) -> int:
        """Queries of a CTA of the kernel for dQ."""
        return TILE * CONSUMERS

    @property
    def ragged_queries(self) -> bool:
        """Whether a sequence's queries may end before the rows of the tensor do."""
        return self.cu_seqlens_q or self.seqused_q

    @property
    def ragged_keys(self) -> bool:
        """Whether a sequence's keys may end before the rows of the tensor do."""
        return self.cu_seqlens_k or self.seqused_k

    @property
    def key_pipelines(self) -> tuple[PipelineSpec, ...]:
        """Of the kernel for dK and dV: K and V come once; Q with the LSE and dO with D for every step; P goes from one
        warpgroup to the other."""
        columns, columns_v = self._tile_bytes
        numbers, everyone = 4 * TILE, CONSUMER_WARPS * self.cluster
        return (
            PipelineSpec("k", 1, columns, CONSUMER_WARPS),
            PipelineSpec("v", 1, columns_v, CONSUMER_WARPS),
            PipelineSpec("q", self.stages, columns + numbers, everyone, ctas=self.cluster),
            PipelineSpec("dout", self.stages, columns_v + numbers, everyone, ctas=self.cluster),
            PipelineSpec("p", self.stages, 0, 4, producer_warps=4),
        )

    @property
    def query_pipelines(self) -> tuple[PipelineSpec, ...]:
        """Of the kernel for dQ: Q and dO come once, a stage for each warpgroup; K and V for every step."""
        columns, columns_v = self._tile_bytes
        return (
            PipelineSpec("q", CONSUMERS, columns, 4),
            PipelineSpec("dout", CONSUMERS, columns_v, 4),
            PipelineSpec("k", self.k_stages, columns, CONSUMER_WARPS),
            PipelineSpec("v", self.v_stages, columns_v, CONSUMER_WARPS),
        )

    @property
    def _tile_bytes(self) -> tuple[int, int]:
        """A tile of Q or K, and one of dO or V."""
        size = TILE * self.dtype.bytes
        return size * self.head_dim_padded, size * self.head_dim_v_padded

    @property
    def smem_bytes(self) -> int:
        """Shared memory of a CTA that owns keys."""
        return _key_smem_bytes(self, self.head_dim_padded, self.head_dim_v_padded, self.dtype.bytes)

    @property
    def query_kernel_smem_bytes(self) -> int:
        """Shared memory of a CTA that owns queries."""
        return _query_smem_bytes(self, self.head_dim_padded, self.head_dim_v_padded, self.dtype.bytes)

    @property
    def compile_name(self) -> str:
        return self.named("fa3_bwd_split", pair=self.cluster > 1, dlse=self.lse_gradient, dslopes=self.slopes_gradient)


class Stages(NamedTuple):
    """The fields of these names of :class:`Fa3SplitBackwardConfig`."""

    stages: int
    k_stages: int
    v_stages: int


# Of which one more costs little.
_MANY_TILES = 16
# In order of preference.
_STAGES = (Stages(3, 2, 2), Stages(2, 2, 2), Stages(2, 2, 1))


@lru_cache(maxsize=4096)
def split_backward_config(problem: AttentionProblem) -> Fa3SplitBackwardConfig:
    """As many stages as shared memory holds, at most three of Q and dO; clusters by :func:`preferred_cluster`."""
    return _config(problem, chosen(_weighed(problem)))


def split_backward_candidates(problem: AttentionProblem) -> list[Candidate]:
    """The configs that :func:`split_backward_config` weighs."""
    return candidates(_weighed(problem), partial(_config, problem))


def preferred_cluster(problem: AttentionProblem) -> int:
    """CTAs that own keys and share their queries.

    At head_dim 256 a step of the kernel for dK and dV reads the L2 for as long as it takes (predicted for an H200: 99 %
    of the time, 2430 cycles with 2434 in a cluster of two, which reads half). Two CTAs have to walk over the queries of
    both, so that only those of full attention do, of whose tiles no cluster has one alone, or there are many.
    """
    bounded = problem.window_left is not None or problem.window_right is not None
    tiles = ceil_div(problem.seqlen_k, TILE)
    return 1 if bounded or problem.varlen_k or problem.seqused_k or (tiles % 2 and tiles < _MANY_TILES) else 2


def _config(problem: AttentionProblem, stages: Stages) -> Fa3SplitBackwardConfig:
    return Fa3SplitBackwardConfig(
        **FeatureConfig.features(problem),
        **stages._asdict(),
        cluster=preferred_cluster(problem),
        lse_gradient=problem.lse_gradient,
        slopes_gradient=problem.slopes_gradient,
    )


def _weighed(problem: AttentionProblem) -> Iterator[tuple[Stages, str | None]]:
    """Stages in order of preference, each with why they are refused."""
    widths = _padded(problem.head_dim), _padded(problem.head_dim_v)
    for stages in _STAGES:
        yield (
            stages,
            smem_objection(
                _key_smem_bytes(stages, *widths, problem.dtype.bytes),
                "K, V, Q, dO and P {} and {} wide".format(*widths),
                problem.arch,
            )
            or smem_objection(
                _query_smem_bytes(stages, *widths, problem.dtype.bytes),
                "Q, dO, K and V {} and {} wide, for dQ".format(*widths),
                problem.arch,
            ),
        )


def _key_smem_bytes(stages: Stages | Fa3SplitBackwardConfig, head_dim: int, head_dim_v: int, element: int) -> int:
    """K and V; Q, dO, their statistics and P of every stage."""
    columns = (1 + stages.stages) * (head_dim + head_dim_v) + stages.stages * TILE
    return TILE * (element * columns + 8 * stages.stages) + BARRIER_BYTES


def _query_smem_bytes(stages: Stages | Fa3SplitBackwardConfig, head_dim: int, head_dim_v: int, element: int) -> int:
    """Q and dO of every warpgroup, K and V of every stage."""
    columns = CONSUMERS * (head_dim + head_dim_v) + stages.k_stages * head_dim + stages.v_stages * head_dim_v
    return TILE * element * columns + BARRIER_BYTES


def _padded(head_dim: int) -> int:
    """head_dim as the tiles hold it: whole steps of wgmma."""
    return -(-head_dim // 16) * 16
