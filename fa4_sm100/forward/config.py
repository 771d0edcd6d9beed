"""How the FA4 forward is built: a frozen config, the pipelines as data, and the one heuristic that chooses."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import ClassVar, NamedTuple

from cute_fa.device.pipeline_spec import HANDOUT_STAGES, RESPONSE_BYTES, PipelineSpec
from cute_fa.device.tiled_forward import packing_objection
from cute_fa.engine.contract import Candidate, FeatureConfig, candidates, chosen, smem_objection
from cute_fa.semantics.problem import DESCALE_BLOCK, AttentionProblem
from cute_fa.semantics.types import PersistentMode, SmArch

WARP, WARPGROUP = 32, 128
COLUMNS = 512  # of tensor memory
TILE_M = 128  # rows of an accumulator in tensor memory, a row a thread
MMA_BYTES = 32  # of a dot product that one tcgen05.mma takes
# A swizzle atom of 8 rows of 128 bytes, of which the pattern of TMA and tcgen05 is a function of the absolute address.
TILE_ALIGNMENT = 1024
# Room for mbarriers, the address of tensor memory and what the tile scheduler hands on.
BARRIER_BYTES = 1024
# Columns of S that a softmax thread has in registers at a time.
SCORE_CHUNK = 32
# Columns of O that pass through shared memory at once.
OUTPUT_COLUMNS = 128


class Registers(NamedTuple):
    """setmaxnreg of each warpgroup's threads, 65,536 together."""

    softmax: int
    epilogue: int
    others: int


# By number of softmax warpgroups. Which split spills nothing in the loops is a matter of trying: with softcap alone 29
# words of the loop with the usual one of two, by the compiler for CUDA 13; with ALiBi 4 to 10 with the other.
_REGISTERS = {2: Registers(176, 88, 72), 1: Registers(232, 168, 104)}
_SOFTCAP_REGISTERS = Registers(184, 80, 64)


@dataclass(frozen=True)
class Fa4ForwardConfig(FeatureConfig):
    """Everything that shapes the machine code.

    A CTA computes ``q_tiles`` tiles of 128 rows of Q at a time, two in ping-pong or one, each with a softmax
    warpgroup, and takes ``tile_n`` keys a step. K and V share a ring of ``stages`` blocks. ``pack_gqa`` query heads of
    one kv head share a tile (1: none). ``ctas``: 2 for pairs, whose products span both: each has 128 rows of a tile
    of 256, half of a block's keys and half of the columns of its V. ``persistent``: CTAs walk over tiles.
    ``emulated``: of 32 exponentials, how many the FMA pipe computes.
    """

    kernel_module: ClassVar[str] = "fa4_sm100.forward.kernel"

    q_tiles: int
    tile_n: int
    stages: int
    pack_gqa: int = 1
    ctas: int = 1
    persistent: bool = True
    emulated: int = 0

    @property
    def mma_k(self) -> int:
        """Elements of a dot product that one instruction takes."""
        return MMA_BYTES // self.dtype.bytes

    @property
    def head_dim_padded(self) -> int:
        """head_dim as the tiles hold it, in whole steps of the products; the rest is zero."""
        return -(-self.head_dim // self.mma_k) * self.mma_k

    @property
    def value_columns(self) -> int:
        """Of head_dim_v what TMA brings to a CTA, in panels of at least 32 bytes; the rest is zero."""
        return -(-self.head_dim_v // self.mma_k) * self.mma_k // self.ctas

    @property
    def loaded_columns(self) -> int:
        """Columns of V in its tile, which are its rows where the keys are contiguous."""
        return self.head_dim_v_padded if self.key_major_v else self.value_columns

    @property
    def softmax_threads(self) -> int:
        return WARPGROUP * self.q_tiles

    @property
    def num_threads(self) -> int:
        """A softmax warpgroup for each tile, the epilogue's, and one for the MMA, load and scheduler warps."""
        return WARPGROUP * (self.q_tiles + 2)

    @property
    def registers(self) -> Registers:
        if self.q_tiles == 2 and self.softcap and not self.alibi:
            return _SOFTCAP_REGISTERS
        return _REGISTERS[self.q_tiles]

    @property
    def tokens(self) -> int:
        """Query positions of one tile of 128 rows: as many, or fewer where heads are packed."""
        return TILE_M // self.pack_gqa

    @property
    def tile_tokens(self) -> int:
        """Query positions that a CTA, or a pair, computes at a time."""
        return self.tokens * self.q_tiles * self.ctas

    @property
    def walk_shape(self) -> tuple[int, int]:
        """Rows and columns of a tile, of a range plan's walk."""
        return self.tile_tokens, self.tile_n

    @property
    def handed(self) -> bool:
        """Whether running CTAs take over the tiles of those that do not run yet. Not under a range plan: how many tiles
        have blocks the device alone knows, and CTAs are there for the others, too."""
        return self.persistent and not self.ranges

    @property
    def tile_keys(self) -> int:
        """Keys of a block that a CTA has K of."""
        return self.tile_n // self.ctas

    @property
    def key_rows(self) -> int:
        """Keys that one TMA copy brings: of a page, as many as K of a block and a page have in common."""
        return self.tile_keys if self.page_size is None else math.gcd(self.page_size, self.tile_keys)

    @property
    def value_rows(self) -> int:
        """As :attr:`key_rows`, of V."""
        return self.tile_n if self.page_size is None else self.key_rows

    @property
    def ragged_keys(self) -> bool:
        """Whether a sequence's keys may end before the rows of the tensor, or of the page, do."""
        return self.cu_seqlens_k or self.seqused_k or self.cache_leftpad or self.page_size is not None

    # Tensor memory: two buffers of scores, of one tile each or by turns of the same, then O of each tile.
    @property
    def score_columns(self) -> int:
        """Columns from one buffer of scores to the next."""
        return self.tile_n

    @property
    def probability_column(self) -> int:
        """Where P begins in its buffer of scores, in the second half, since its threads have read them by then."""
        return self.tile_n // 2

    @property
    def early_columns(self) -> int:
        """Columns of P that are handed over first, so that P·V begins beside the last exponentials."""
        return self.tile_n - SCORE_CHUNK

    @property
    def output_column(self) -> int:
        """Where O of the first tile begins."""
        return 2 * self.score_columns

    @property
    def tensor_columns(self) -> int:
        """Columns to allocate, a power of 2."""
        needed = self.output_column + self.q_tiles * self.head_dim_v_padded
        return 1 << (needed - 1).bit_length()

    # Shared memory.
    @property
    def q_bytes(self) -> int:
        """Q of one tile, or O where that is larger and takes its place."""
        return max(TILE_M * self.head_dim_padded * self.dtype.bytes, self.o_bytes)

    @property
    def k_bytes(self) -> int:
        """What a CTA has of a block of K."""
        return self.tile_keys * self.head_dim_padded * self.dtype.bytes

    @property
    def v_bytes(self) -> int:
        """What a CTA has of a block of V."""
        return self.tile_n * self.loaded_columns * self.dtype.bytes

    @property
    def stage_bytes(self) -> int:
        """A stage of the ring, which holds K and V by turns."""
        return -(-max(self.k_bytes, self.v_bytes) // TILE_ALIGNMENT) * TILE_ALIGNMENT

    @property
    def output_columns(self) -> int:
        """Columns of O that pass through shared memory at once."""
        return min(self.head_dim_v_padded, OUTPUT_COLUMNS)

    @property
    def o_bytes(self) -> int:
        """O of one tile on its way out."""
        return TILE_M * self.output_columns * self.out_dtype.bytes

    @property
    def own_output(self) -> bool:
        """Whether O has its own memory, so that the next tile's Q is loaded while O is stored; else it takes Q's."""
        return self._inputs_bytes + self.o_bytes <= self.arch.smem_bytes

    @property
    def stats_bytes(self) -> int:
        """Sum and reference of each row on their way from the softmax to the epilogue."""
        return self.q_tiles * 2 * TILE_M * 4

    @property
    def _inputs_bytes(self) -> int:
        ring = self.stages * self.stage_bytes
        return self.q_tiles * self.q_bytes + ring + self.stats_bytes + BARRIER_BYTES

    @property
    def smem_bytes(self) -> int:
        """Shared memory of a CTA."""
        return self._inputs_bytes + (self.o_bytes if self.own_output else 0)

    @property
    def pipelines(self) -> tuple[PipelineSpec, ...]:
        """``q0``, ``q1``: Q of each tile, and ``kv``: K and V, which products release; the bytes are of K. In tensor
        memory ``s``: scores, which the first part of P releases; ``p``: the rest of P; ``o``: O. ``stats``: sums and
        references. ``tiles``: the next ones, for the softmax and epilogue warps, the MMA, load and scheduler warp."""
        bytes_q = self.pack_gqa * self.tokens * self.head_dim_padded * self.dtype.bytes
        tiles, ctas = self.q_tiles, self.ctas
        pair, warps = ctas > 1, 4 * ctas
        takers = ctas * (4 * tiles + 4 + 2) + 1
        return (
            *(PipelineSpec(f"q{i}", 1, bytes_q, 1) for i in range(tiles)),
            PipelineSpec("kv", self.stages, self.k_bytes, 1),
            PipelineSpec("s", 2, 0, warps, shared=pair),
            PipelineSpec("p", 2, 0, 1, warps, shared=pair),
            PipelineSpec("o", tiles, 0, warps, shared=pair),
            PipelineSpec("stats", tiles, 0, 4, 4),
            PipelineSpec("tiles", HANDOUT_STAGES, RESPONSE_BYTES, takers, shared=pair),
        )

    @property
    def compile_name(self) -> str:
        choices = {
            f"page{self.page_size}": self.page_size is not None,
            f"pack{self.pack_gqa}": self.pack_gqa > 1,
            "pair": self.ctas > 1,
            "single": not self.persistent,
        }
        return self.named("fa4_fwd", **choices)


class Tiles(NamedTuple):
    """The fields of these names of :class:`Fa4ForwardConfig`."""

    q_tiles: int
    tile_n: int
    stages: int
    ctas: int = 1
    pack_gqa: int = 1


# Blocks in the ring. With two, the next block of K or V begins to arrive when its predecessor has been read, a product
# before it is needed.
_STAGES = (8, 6, 4, 3)


@lru_cache(maxsize=4096)
def forward_config(problem: AttentionProblem) -> Fa4ForwardConfig:
    """The heuristic: two tiles where tensor memory and shared memory hold them and there are rows for both."""
    return _config(problem, chosen(_weighed(problem)))


def forward_candidates(problem: AttentionProblem) -> list[Candidate]:
    """The configs that :func:`forward_config` weighs."""
    return candidates(_weighed(problem), partial(_config, problem))


def _config(problem: AttentionProblem, tiles: Tiles) -> Fa4ForwardConfig:
    return Fa4ForwardConfig(
        **FeatureConfig.features(problem),
        **tiles._asdict(),
        persistent=problem.persistent is not PersistentMode.OFF,
        emulated=8 if problem.arch is SmArch.SM_100A else 0,
    )


def _weighed(problem: AttentionProblem) -> Iterator[tuple[Tiles, str | None]]:
    """Tiles in order of preference, each with why it is refused: as many keys as leave room for three blocks."""
    for q_tiles in (2, 1):
        for ctas in (2, 1):
            for tile_n in (128, 96, 64):
                for stages in _STAGES:
                    tiles = Tiles(q_tiles, tile_n, stages, ctas)
                    reason = _objection(problem, tiles)
                    if reason is None and problem.gqa_ratio > 1:
                        packed = tiles._replace(pack_gqa=problem.gqa_ratio)
                        yield packed, packing_objection(problem, q_tiles * ctas, TILE_M)
                    yield tiles, reason


def _objection(problem: AttentionProblem, tiles: Tiles) -> str | None:
    """Why such tiles do not serve."""
    config = _config(problem, tiles)
    needed = config.output_column + config.q_tiles * config.head_dim_v_padded
    if needed > COLUMNS:
        return f"tensor memory: {needed} columns of S and O, {COLUMNS} available"
    rows = TILE_M * tiles.q_tiles * tiles.ctas
    if not problem.ranges and 2 * problem.seqlen_q * problem.gqa_ratio <= rows > TILE_M:
        return f"{problem.seqlen_q} queries of {problem.gqa_ratio} heads fill half of {rows} rows at most"
    if tiles.ctas == 2:
        refused = _pair_objection(problem, config)
        if refused is not None:
            return refused
    if problem.page_size is not None and config.tile_keys % 64 and problem.page_size > 32:
        return f"paged keys: a block of {tiles.tile_n} and a page of {problem.page_size} have 32 rows in common"
    if DESCALE_BLOCK % tiles.tile_n and (problem.k_block_descale or problem.v_block_descale):
        return f"descales of blocks: {tiles.tile_n} keys may have several, of {DESCALE_BLOCK} keys each"
    return smem_objection(config.smem_bytes, "Q, K, V, O and barriers", problem.arch)


def _pair_objection(problem: AttentionProblem, config: Fa4ForwardConfig) -> str | None:
    """Why products do not span two CTAs: where the tile of 512 or 256 rows would be mostly masked, or as much would not
    be shared. They halve what a CTA reads of K and V, from shared memory and into it: 384 instead of 768 cycles a block
    of 128 keys at head_dim 128, beside 1,024 of products, and make room for as many blocks again."""
    if not config.persistent:
        return "pairs walk over tiles"
    if problem.ranges:
        return "pairs: tiles of 512 queries meet more masked blocks of a range plan than those of 256"
    if problem.v_layout != "head_dim":
        return "pairs: each CTA takes half of V's columns, which are rows of a key-major V"
    if problem.head_dim_v % (2 * config.mma_k) or config.head_dim_v_padded < 64:
        return f"pairs: half of head_dim_v {problem.head_dim_v} is no multiple of {config.mma_k}, or less than 32"
    if max(problem.head_dim, problem.head_dim_v) < 96:
        return f"pairs: at head_dim {problem.head_dim} exponentials take longer than shared memory as it is"
    if config.q_tiles == 2 and (problem.window_left is not None or problem.window_right is not None):
        return "pairs: tiles of 512 queries meet more masked blocks under a window or causal than those of 256"
    rows, tokens = config.tile_tokens // config.ctas, config.tile_tokens
    seqlen_q = max(problem.seqlen_q, 1)
    apart, together = (-(-seqlen_q // tile) * tile for tile in (rows, tokens))
    if together > apart:
        return f"pairs: {seqlen_q} queries fill {together} rows of tiles of pairs, {apart} of a CTA's"
    return None
