"""How the FA3 forward is built: a frozen config, the pipelines as data, and the one heuristic that chooses."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import ClassVar, NamedTuple

from cute_fa.device.pipeline_spec import PipelineSpec
from cute_fa.device.tiled_forward import packing_objection
from cute_fa.engine.contract import Candidate, FeatureConfig, candidates, chosen, padded, smem_objection
from cute_fa.semantics.names import dtypes_of_code
from cute_fa.semantics.problem import DESCALE_BLOCK, AttentionProblem
from cute_fa.semantics.types import PersistentMode, SmArch
from fa3_sm90.common.wgmma import WARPGROUP, WGMMA_M

FP8_K = 32  # bytes of a dot product that one wgmma takes
# Room for the mbarriers beside the tiles.
BARRIER_BYTES = 1024
# setmaxnreg of (producer, consumer) by number of consumer warpgroups: all 65,536 registers of the SM, 128 or 168 a
# thread at launch, moved to the consumers.
REGISTERS = {2: (24, 240), 3: (32, 160)}


@dataclass(frozen=True)
class Fa3ForwardConfig(FeatureConfig):
    """Everything that shapes the machine code.

    ``warpgroups`` consumer warpgroups own 64 rows of Q each and take ``tile_n`` keys a step; ``stages`` blocks of K and
    of V are in flight. ``turns``: warpgroups take turns on the tensor cores. ``pack_gqa`` query heads of one kv head
    share a tile (1: none). ``persistent``: CTAs walk over tiles. ``promoted_columns``: of P·V in fp8, how many are
    computed at a time before they are added to O; None for all. ``cluster``: CTAs that walk over the same blocks of
    keys, 1 or 2; of two each has half of a tile's queries, and brings half of every block to both. ``max_chains``: of
    comparisons in which a thread looks for the largest of a row's scores, side by side.
    """

    kernel_module: ClassVar[str] = "fa3_sm90.forward.kernel"
    derived: ClassVar[tuple[str, ...]] = ("promote_every",)

    warpgroups: int
    tile_n: int
    stages: int
    turns: bool
    pack_gqa: int = 1
    persistent: bool = True
    promoted_columns: int | None = None
    cluster: int = 1
    max_chains: int = 1

    @property
    def transposers(self) -> int:
        """Producer warps that transpose V: wgmma takes fp8 operands only with the keys contiguous."""
        return 3 if self.dtype.is_fp8 and not self.key_major_v else 0

    @property
    def block_descales(self) -> bool:
        """Whether blocks of keys have descales of their own."""
        return self.k_block_descale or self.v_block_descale

    @property
    def output_parts(self) -> int:
        """Products one after the other that P·V is split into, by columns."""
        return 1 if self.promoted_columns is None else self.head_dim_v_padded // self.promoted_columns

    @property
    def promote_every(self) -> int | None:
        """wgmma instructions of an fp8 P·V whose sums stay in the tensor cores' accumulator; None for 16 bits."""
        return self.tile_n // self.mma_k if self.dtype.is_fp8 else None

    @property
    def mma_k(self) -> int:
        """Elements of a dot product that one wgmma takes, 32 bytes."""
        return FP8_K // self.dtype.bytes

    @property
    def head_dim_padded(self) -> int:
        """head_dim as the tiles hold it, in whole steps of wgmma; the rest is zero."""
        return -(-self.head_dim // self.mma_k) * self.mma_k

    @property
    def value_columns(self) -> int:
        """head_dim_v as TMA brings it, in panels of at least 32 bytes; the rest is zero."""
        return -(-self.head_dim_v // self.mma_k) * self.mma_k

    @property
    def loaded_columns(self) -> int:
        """Columns of V in the loader's tile, which are its rows where the keys are contiguous."""
        return self.head_dim_v_padded if self.key_major_v else self.value_columns

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
        """Query positions that a CTA, or a cluster, computes at a time."""
        return self.tokens * self.warpgroups * self.cluster

    @property
    def walk_shape(self) -> tuple[int, int]:
        """Rows and columns of a tile, of a range plan's walk."""
        return self.tile_tokens, self.tile_n

    @property
    def single_edge_step(self) -> bool:
        """Whether a tile's right edge meets two key blocks at most: its tokens' last visible keys lie side by side. A
        range plan's masks lie anywhere."""
        return not self.ranges and -(-(self.tile_n + self.tile_tokens - 2) // self.tile_n) <= 2

    @property
    def key_rows(self) -> int:
        """Keys that one TMA copy brings: a CTA's part of a block, of a page as many as a block and a page have in
        common."""
        return self.tile_n // self.cluster if self.page_size is None else math.gcd(self.page_size, self.tile_n)

    @property
    def value_rows(self) -> int:
        """As :attr:`key_rows`, of V."""
        return self.key_rows

    @property
    def ragged_keys(self) -> bool:
        """Whether a sequence's keys may end before the rows of the tensor, or of the page, do."""
        return self.cu_seqlens_k or self.seqused_k or self.cache_leftpad or self.page_size is not None

    @property
    def q_bytes(self) -> int:
        """Q of one warpgroup, or O where that is larger and takes its place."""
        q = WGMMA_M * self.head_dim_padded * self.dtype.bytes
        return q if self.own_output else max(q, self.o_bytes)

    @property
    def o_bytes(self) -> int:
        """O of one warpgroup."""
        return WGMMA_M * self.head_dim_v_padded * self.out_dtype.bytes

    @property
    def own_output(self) -> bool:
        """Whether O has its own memory, so that the next tile's Q is loaded while O is stored; else it takes Q's."""
        q = WGMMA_M * self.head_dim_padded * self.dtype.bytes
        return self.warpgroups * (q + self.o_bytes) + self.kv_bytes + BARRIER_BYTES <= self.arch.smem_bytes

    @property
    def kv_bytes(self) -> int:
        transposed = self.head_dim_v_padded if self.transposers else 0
        columns = self.head_dim_padded + self.loaded_columns + transposed
        return self.stages * self.tile_n * columns * self.dtype.bytes

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
        everyone, ctas = 4 * self.warpgroups * self.cluster, self.cluster
        queries = tuple(PipelineSpec(f"q{i}", 1, rows * self.head_dim_padded * size, 4) for i in range(self.warpgroups))
        bytes_k, bytes_v = (self.tile_n * columns * size for columns in (self.head_dim_padded, self.loaded_columns))
        keys = PipelineSpec("k", self.stages, bytes_k, everyone, ctas=ctas)
        loaded = PipelineSpec("v", self.stages, bytes_v, self.transposers or everyone, ctas=ctas)
        if not self.transposers:
            return (*queries, keys, loaded)
        transposed = PipelineSpec("vt", self.stages, 0, everyone, self.transposers)
        return (*queries, keys, loaded, transposed)

    @property
    def values(self) -> str:
        """The ring of V that the consumers read."""
        return "vt" if self.transposers else "v"

    @property
    def compile_name(self) -> str:
        choices = {
            f"page{self.page_size}": self.page_size is not None,
            f"pack{self.pack_gqa}": self.pack_gqa > 1,
            "pair": self.cluster > 1,
            "single": not self.persistent,
        }
        return self.named("fa3_fwd", **choices)


class Tiles(NamedTuple):
    """The fields of these names of :class:`Fa3ForwardConfig`."""

    warpgroups: int
    tile_n: int
    stages: int = 2
    pack_gqa: int = 1
    promoted_columns: int | None = None
    cluster: int = 1


# In order of preference.
_TILES = (Tiles(3, 128), Tiles(3, 96), *(Tiles(2, tile_n) for tile_n in (128, 112, 96, 80, 64)))
# Of fp8, in order of preference, each with P·V in the fewest parts that the registers allow; 160 where asked for: at
# head_dim 64 they take 5.9 instructions per score and 128 take 6.1, but over 64k keys whose values have one sign their
# longer sums lose 6.7e-4 of O, those of 128 keys 4.3e-4, where rounding P costs 2.2e-4. Columns of a part, at least:
# with fewer, wgmma reads P for too few products.
_FP8_KEYS = (128, 96, 64, 32)
_MOST_FP8_KEYS = 160
_FP8_COLUMNS = 48
# Queries among which blocks of 64 keys are chosen over 80, where 80 walk over so many times the keys. From 2048 on the
# timing model cannot tell which are faster; below 512 it has not been asked.
_SHORT_QUERIES = range(512, 2048)
_LEAST_OVERSHOOT = 1.04
# Accesses to local memory in the loops of (3, 128) at head_dim 64, at most, of bf16 kernels with and without a right
# bound, sink tokens and packed sequences; of those with a right bound and ALiBi, with and without each of the other
# features, compiled by either flavour of the DSL (none where head_dim_v is at most 32: there 128 keys take 7.5
# instructions per score, 96 take 7.7). With 96 keys there are none.
_SPILLS = {
    ("window_left",): 16,
    ("softcap",): 14,
    ("window_left", "softcap"): 43,
    ("window_right", "alibi"): 20,
    ("ranges", "alibi"): 54,
}


@lru_cache(maxsize=4096)
def forward_config(problem: AttentionProblem) -> Fa3ForwardConfig:
    """The heuristic: tiles by head_dim, registers and shared memory; packing by how full the tiles get.

    Three consumer warpgroups have 160 registers a thread each, enough up to head_dim 64, two have 240."""
    return _config(problem, chosen(_weighed(problem)))


def forward_candidates(problem: AttentionProblem) -> list[Candidate]:
    """The configs that :func:`forward_config` weighs."""
    return candidates(_weighed(problem), partial(_config, problem))


# Queries from which a cluster is preferred, without and with a right bound; at least so many where sequences may be
# shorter, which the timing model has not been asked about.
_CLUSTER_QUERIES = {False: 512, True: 2048}
_CLUSTER_QUERIES_VARLEN = 1024
# Of an odd number of tiles of a CTA's queries the last pair's second CTA is idle, beside the longest tile under a right
# bound: the least odd number with which a cluster is preferred, without and with a right bound.
_CLUSTER_ODD_TILES = {False: 11, True: 33}


def preferred_cluster(problem: AttentionProblem) -> int:
    """CTAs that share their blocks of K and V, where :func:`cluster_objection` has nothing against it.

    Two read half as much from the L2 cache, wait for each other at every block, and under a right bound the earlier CTA
    walks over its partner's blocks as well. Two are chosen where the timing model (docs/timing.md) tells that they are
    faster under each of its explanations of the published speeds, beyond two standard deviations: 1.14 times on an
    H100 at head_dim 256 full, 512 queries (1.16 at 1024), and 1.11 at 192 (1.14); causal, at 256, 1.09 at 2048 queries
    and 1.17 at 16384. It cannot tell at 128 (1.07 ± 0.05; 1.03 ± 0.04 if power sets the clock), at 192 causal (1.12;
    1.07 ± 0.04), at 192/128 (1.09; 1.06 ± 0.04) and for shorter causal sequences (1.05 ± 0.03 at 1024); at 64 one CTA
    is faster. Nothing of this has been timed. Packed sequences, whose lengths only the
    device knows, and windows that end on the left have not been asked about, nor have far fewer keys than queries.
    """
    right = problem.window_right is not None
    narrowest = min(problem.head_dim, problem.head_dim_v)
    wide = narrowest > 192 if right else narrowest >= 192
    asked = not (problem.varlen_q or problem.varlen_k or problem.window_left is not None)
    least = max(_CLUSTER_QUERIES[right], _CLUSTER_QUERIES_VARLEN if problem.varlen else 0)
    return 2 if asked and wide and problem.seqlen_q >= least else 1


def cluster_objection(problem: AttentionProblem) -> str | None:
    """Why two CTAs cannot share their blocks of K and V."""
    if problem.has_codes:
        return f"cluster 2 with dtype {dtypes_of_code(problem)}: its kernels are of 16 bits"
    if problem.page_size is not None:
        return f"cluster 2 with page_size {problem.page_size}: pages are looked up for whole blocks"
    if problem.ranges:
        return "cluster 2 with a range plan: its masks are of one CTA's queries"
    return None


def _config(problem: AttentionProblem, tiles: Tiles) -> Fa3ForwardConfig:
    return Fa3ForwardConfig(
        **FeatureConfig.features(problem),
        **tiles._asdict(),
        turns=_takes_turns(problem),
        persistent=problem.persistent is not PersistentMode.OFF,
    )


def _takes_turns(problem: AttentionProblem) -> bool:
    """Whether warpgroups take turns on the tensor cores. Beyond head_dim 128 a block's products take so long that the
    softmax of the other warpgroup hides behind them anyway."""
    return max(problem.head_dim, problem.head_dim_v) <= 128


def promotion_objection(problem: AttentionProblem) -> str | None:
    """Why P·V of fp8 is not promoted as often as is asked for: a block of keys is promoted as a whole."""
    if problem.promote_every is None:
        return None
    refused = f"promote_every {problem.promote_every}"
    if problem.promote_every * FP8_K > _MOST_FP8_KEYS:
        return f"{refused}: 1 to {_MOST_FP8_KEYS // FP8_K}, of blocks of up to {_MOST_FP8_KEYS} keys"
    reasons = [reason for _, reason in _weighed(problem)]
    return None if None in reasons else f"{refused}: {reasons[-1]}"


def _weighed(problem: AttentionProblem) -> Iterator[tuple[Tiles, str | None]]:
    """Tiles in order of preference, each with why it is refused."""
    fp8 = problem.dtype.is_fp8
    for tiles in _fp8_tiles(problem) if fp8 else _TILES:
        if fp8:
            reason = _fp8_objection(problem, tiles)
        else:
            reason = (_two_warpgroups if tiles.warpgroups == 2 else _three_warpgroups)(problem, tiles)
        if reason is None and problem.gqa_ratio > 1:
            packed = tiles._replace(pack_gqa=problem.gqa_ratio)
            yield from _in_clusters(problem, packed, packing_objection(problem, tiles.warpgroups, WGMMA_M))
        yield from _in_clusters(problem, tiles, reason)


def _in_clusters(problem: AttentionProblem, tiles: Tiles, reason: str | None) -> Iterator[tuple[Tiles, str | None]]:
    """Tiles against which there is ``reason``; before them in clusters, where those are preferred."""
    cluster = preferred_cluster(problem)
    if cluster > 1 and reason is None:
        pair = tiles._replace(cluster=cluster)
        yield pair, cluster_objection(problem) or _cluster_doubt(problem, pair)
    yield tiles, reason


def _cluster_doubt(problem: AttentionProblem, tiles: Tiles) -> str | None:
    """Why a cluster does not pay where it serves. The address of its barriers takes a register in the loops."""
    tokens = tiles.warpgroups * (WGMMA_M // tiles.pack_gqa)
    if problem.seqlen_q <= tokens:
        return f"cluster {tiles.cluster}: {problem.seqlen_q} queries are no more than the {tokens} of one CTA"
    # By the timing model at head_dim 256: 1.04 ± 0.04 with 9 tiles full (11: 1.16) and with 31 causal (33: 1.14).
    number = -(-problem.seqlen_q // tokens)
    if number % 2 and number < _CLUSTER_ODD_TILES[problem.window_right is not None]:
        return f"cluster {tiles.cluster}: of {number} tiles of queries the last would have a cluster of its own"
    if tiles.warpgroups == 3 and tiles.tile_n == 128 and problem.alibi:
        return f"cluster {tiles.cluster}: registers spill with alibi, 2 accesses at head_dim 64"
    return None


def _fp8_tiles(problem: AttentionProblem) -> Iterator[Tiles]:
    """Two warpgroups: with the 160 registers of three, 96 keys spill at head_dim 64."""
    size_v = padded(problem.head_dim_v)
    asked = problem.promote_every
    for tile_n in _FP8_KEYS if asked is None else (asked * FP8_K,):
        yield Tiles(2, tile_n)
        narrowest = _FP8_COLUMNS if tile_n > 64 else 32
        for parts in range(2, size_v // narrowest + 1):
            if size_v % (8 * parts) == 0:
                yield Tiles(2, tile_n, promoted_columns=size_v // parts)


def _fp8_objection(problem: AttentionProblem, tiles: Tiles) -> str | None:
    """Why fp8 is not served with so many keys and columns at a time."""
    size_v = padded(problem.head_dim_v)
    columns = tiles.promoted_columns or size_v
    # Scores, and as much again for P, the mask and what else follows the keys; O, a part of P·V, and 16. Beyond that
    # causal kernels spill in loops (head_dim_v 176 with 96 keys needs 244: 6 accesses; 224 with 64 keys in two parts
    # 248: 54; 128 with 128 in one part 272: 48), within it at most 1 access, with lengths and a right bound. In parts a
    # left edge takes 16 more (112, 144, 128 with 128 keys: 10, 148, 148 accesses; 160, 192 with 96: 10, 10; 208, 256
    # with 64: 18, 26).
    needed, available = tiles.tile_n + size_v // 2 + columns // 2 + 16, REGISTERS[2][1]
    if problem.window_left is not None and columns < size_v:
        needed += 16
    if needed > available:
        return (
            f"registers: about {needed} a thread for {tiles.tile_n} keys, O {size_v} wide and P·V {columns} wide, "
            f"{available} available"
        )
    if DESCALE_BLOCK % tiles.tile_n and (problem.k_block_descale or problem.v_block_descale):
        return f"descales of blocks: {tiles.tile_n} keys may have several, of {DESCALE_BLOCK} keys each"
    return _page_objection(problem, tiles.tile_n) or _memory_objection(problem, tiles)


def _three_warpgroups(problem: AttentionProblem, tiles: Tiles) -> str | None:
    """Why three consumer warpgroups do not serve."""
    widest = max(padded(problem.head_dim), padded(problem.head_dim_v))
    if widest > 64 and tiles.tile_n == 128:
        return (
            f"registers spill beyond head_dim 64 with {REGISTERS[3][1]} a thread: 10 accesses in the main loop at 80, "
            "and wgmma serialised"
        )
    if widest > 64:
        return "6.1 instructions per score with 96 keys and three warpgroups, 5.4 with 128 and two (head_dim 96)"
    given = {"window_left": problem.window_left is not None, "softcap": problem.softcap > 0.0}
    crowd = tuple(name for name, present in given.items() if present)
    if not crowd and problem.alibi and (padded(problem.head_dim_v) > 32 or problem.q_positions):
        beside = {"window_right": problem.window_right is not None, "ranges": problem.ranges}
        crowd = next(((name, "alibi") for name, present in beside.items() if present), ())
    if crowd and tiles.tile_n == 128:
        return f"registers spill with {' and '.join(crowd)}: up to {_SPILLS[crowd]} accesses at 128 keys, none at 96"
    return None


def walked_keys(problem: AttentionProblem, tokens: int, tile_n: int) -> int:
    """Keys that a head's tiles of ``tokens`` queries walk over, of dense lengths without a left bound: each tile whole
    blocks of ``tile_n`` up to the last key that one of its queries sees, at least one block."""
    walked = 0
    for end in range(tokens, problem.seqlen_q + tokens, tokens):
        keys = problem.seqlen_k
        if problem.window_right is not None:
            last = min(end, problem.seqlen_q) + problem.seqlen_k - problem.seqlen_q + problem.window_right
            keys = min(keys, last)
        walked += max(1, -(-keys // tile_n)) * tile_n
    return walked


def _overshoot(problem: AttentionProblem, tiles: Tiles) -> str | None:
    """Why blocks of 80 keys do not pay for short sequences: of the last one more is hidden than of one of 64.

    A step's time goes by its keys, so that a tile costs what it walks over. By the timing model (docs/timing.md), on an
    H100 at head_dim 256, blocks of 64 keys are faster by a little less than what they walk less: full 1.07 times at 512
    queries (1.09 in keys), 1.04 at 768 and at 1536 in clusters (both 1.04), and it cannot tell at 640 (1.00) and 1024
    (1.02); causal 1.08, 1.05, 1.04 and 1.04 at 512, 768, 1024 and 1536 (1.13, 1.07, 1.06, 1.04). At 240/240, 184/256
    and 256/184, near the ends of where 80 keys are chosen, 64 are told faster as well. Nothing of this has been timed.
    Lengths that only the device knows, left bounds and other lengths of keys than of queries have not been asked about.
    """
    dense = not (problem.varlen or problem.ranges)
    asked = dense and problem.window_left is None and problem.seqlen_q in _SHORT_QUERIES
    if tiles.tile_n != 80 or not asked:
        return None
    tokens = tiles.warpgroups * WGMMA_M
    walked, shorter = walked_keys(problem, tokens, 80), walked_keys(problem, tokens, 64)
    if walked < _LEAST_OVERSHOOT * shorter:
        return None
    return f"blocks of 80 keys overshoot: {walked} keys walked over by a head's tiles, {shorter} by blocks of 64"


def _two_warpgroups(problem: AttentionProblem, tiles: Tiles) -> str | None:
    """Why two consumer warpgroups do not serve with so many keys."""
    size_v = padded(problem.head_dim_v)
    # scores and probabilities of a block, O, and about 40 for addresses, the softmax's state and the mask
    needed, available = tiles.tile_n // 2 + tiles.tile_n // 4 + size_v // 2 + 40, REGISTERS[2][1]
    if needed > available:
        return f"registers: about {needed} a thread for {tiles.tile_n} keys and O {size_v} wide, {available} available"
    page = _page_objection(problem, tiles.tile_n)
    return page or _memory_objection(problem, tiles) or _overshoot(problem, tiles)


def _page_objection(problem: AttentionProblem, tile_n: int) -> str | None:
    """Why paged keys do not come in blocks of so many."""
    common = math.gcd(tile_n, 128)
    if problem.page_size is None or common >= min(64, tile_n):
        return None
    rows = f"{common} rows in common for a TMA copy, one of 64 has 64"
    return f"paged keys: a block of {tile_n} and a page of 128 have {rows}"


def _memory_objection(problem: AttentionProblem, tiles: Tiles) -> str | None:
    """Why shared memory does not hold the tiles, not even with O where Q is."""
    return smem_objection(_config(problem, tiles).smem_bytes, "Q, K, V and barriers", SmArch.SM_90A)
