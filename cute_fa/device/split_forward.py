"""What the table sees of the forwards whose CTAs share all key blocks (``cute_fa.device.split_walk``). No DSL."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, NamedTuple

import torch

from cute_fa.device.tiling import MAX_TILES, ceil_div
from cute_fa.engine.contract import AttentionKernel, AttentionTensors, CommonArguments, Memory, common_arguments
from cute_fa.semantics.problem import AttentionProblem
from cute_fa.semantics.types import Direction
from cute_fa.semantics.visibility import visible_keys

_EVEN_SLOTS = 2  # for parts of tiles that a CTA leaves, of an even cut
# Bytes of scratch memory that chunks with a CTA each may take. With 128 tiles of 128 rows and head_dim 128, those of
# 128k keys, 1024 in a chunk, take 1.01 GiB, of 1M keys 8.06.
_MOST_CHUNK_BYTES = 2**30


class Parts(NamedTuple):
    """Memory for parts of tiles, and what lies in it, in the order of ``cute_fa.device.split_parts.Parts``."""

    out: Any
    lse: Any


class Grid(NamedTuple):
    """The shares of a launch, in the order of ``cute_fa.device.split_walk.SplitGrid``."""

    ctas: int
    merges: int
    parts: int | None
    tiles: int | None = None
    chunk_blocks: int | None = None


class Launch(NamedTuple):
    """What a launch takes, in the order of ``cute_fa.device.split_arguments.SplitArguments``."""

    common: CommonArguments
    parts: Parts
    grid: Grid


class SplitForward(AttentionKernel):
    """Scratch memory, fp32, a tile being tile_m rows, or as many as a kv head has, of head_dim_v + 1 numbers: two tiles
    for each CTA of an even cut, whatever the lengths and the batch; of N parts, N for each tile that there may be, if
    so many key blocks. In batch-invariant mode one for each chunk of keys where tiles are too few for all SMs and these
    take 1 GiB at most, else two for each CTA.
    """

    direction = Direction.FORWARD

    @classmethod
    @abstractmethod
    def ctas_per_sm(cls, config) -> int:
        """How many CTAs run on an SM at a time."""

    @classmethod
    def num_splits(cls, problem: AttentionProblem, num_sms: int) -> int | None:
        if problem.seqlen_k_per_split:
            return 1  # chunks take their place
        return 0 if problem.seqlen_q <= cls.most_tokens else None

    @classmethod
    def grid_objections(cls, problem: AttentionProblem) -> list[str]:
        """Why the line of all tiles' units is too long to be counted."""
        units = cls.tiles(problem, cls.configure(problem)) * cls.units(problem, cls.configure(problem))
        what = "parts" if problem.num_splits else "key blocks"
        return [f"{units} {what} of all tiles: at most {MAX_TILES}"] if units > MAX_TILES else []

    @classmethod
    def head_tiles(cls, problem: AttentionProblem, config) -> int:
        """Tiles of rows of a kv head, at most."""
        return ceil_div(problem.seqlen_q * problem.gqa_ratio, config.tile_m)

    @classmethod
    def tiles(cls, problem: AttentionProblem, config) -> int:
        """Tiles of rows, at most."""
        return cls.head_tiles(problem, config) * problem.num_heads_kv * problem.batch

    @classmethod
    def part_rows(cls, problem: AttentionProblem, config) -> int:
        """Rows of a tile's part in scratch memory."""
        return min(config.tile_m, problem.seqlen_q * problem.gqa_ratio)

    @classmethod
    def units(cls, problem: AttentionProblem, config) -> int:
        """Of a tile, at most."""
        if problem.seqlen_k_per_split:
            return max(1, ceil_div(problem.seqlen_k, problem.seqlen_k_per_split))
        window = problem.window_left, problem.window_right, problem.sink_tokens
        blocks = max(1, ceil_div(visible_keys(problem.seqlen_q, problem.seqlen_k, *window), config.tile_n))
        return min(problem.num_splits, blocks) if problem.num_splits else blocks

    @classmethod
    def grid(cls, problem: AttentionProblem, config, num_sms: int) -> Grid:
        """One CTA a part; of an even cut as many as run at a time, or as there may be work for. Of chunks one each, or
        one for all of a tile: bits do not depend on that."""
        tiles, resident = cls.tiles(problem, config), num_sms * cls.ctas_per_sm(config)
        units = tiles * cls.units(problem, config)
        if problem.seqlen_k_per_split:
            chunks = cls.head_tiles(problem, config), problem.seqlen_k_per_split // config.tile_n
            bytes_of_all = 4 * units * cls.part_rows(problem, config) * (problem.head_dim_v + 1)
            if tiles < resident and units > tiles and bytes_of_all <= _MOST_CHUNK_BYTES:
                return Grid(units, tiles, units // tiles, *chunks)
            return Grid(min(tiles, resident), 0, 1, *chunks)
        if problem.num_splits:
            return Grid(units, tiles if units > tiles else 0, units // tiles)
        ctas = max(1, min(resident, ceil_div(units, config.least_blocks)))
        return Grid(ctas, ctas - 1, None)

    @classmethod
    def scratch(
        cls, problem: AttentionProblem, config, tensors: AttentionTensors, num_sms: int
    ) -> tuple[Memory | None, ...]:
        grid = cls.grid(problem, config, num_sms)
        slots = grid.ctas if grid.parts else _EVEN_SLOTS * grid.ctas
        if not grid.merges:
            in_turn = problem.seqlen_k_per_split and cls.units(problem, config) > 1
            slots = _EVEN_SLOTS * grid.ctas if in_turn else 1
        shape = max(slots, 1), cls.part_rows(problem, config)
        return Parts(Memory((*shape, problem.head_dim_v), torch.float32), Memory(shape, torch.float32))

    @classmethod
    def arguments(cls, problem: AttentionProblem, config, tensors: AttentionTensors, num_sms: int) -> Launch:
        return Launch(common_arguments(problem, tensors), Parts(*tensors.scratch), cls.grid(problem, config, num_sms))
