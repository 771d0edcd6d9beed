"""The kernel that makes walks, as the dispatch table sees it."""

from __future__ import annotations

from typing import NamedTuple

import torch

from cute_fa.device.tiling import ceil_div
from cute_fa.engine.contract import MAX_BOUND, AttentionKernel, WalkTensors
from cute_fa.semantics.problem import INT32_MAX
from cute_fa.semantics.types import Direction
from cute_fa.semantics.walk_problem import WalkProblem
from fa2_sm80.ranges.config import MAX_BLOCKS, RangeWalkConfig


class Launch(NamedTuple):
    """What a launch takes, in the order of ``fa2_sm80.ranges.kernel.WalkArguments``."""

    ranges: torch.Tensor
    classes: torch.Tensor
    walk: torch.Tensor
    rows: int
    columns: int
    counted_rows: int
    entry_capacity: int
    mask_capacity: int


class RangeWalks(AttentionKernel):
    """Lists of blocks and their masks out of sorted ranges, for every arch."""

    family = "fa2"
    direction = Direction.PLAN

    @classmethod
    def supports(cls, problem: WalkProblem) -> list[str]:
        reasons = []
        blocks = ceil_div(problem.columns, problem.tile_columns)
        if blocks > MAX_BLOCKS:
            rule = f"at most {MAX_BLOCKS} blocks of {problem.tile_columns} are marked in shared memory"
            reasons.append(f"{problem.columns} columns: {rule}")
        if blocks * ceil_div(problem.rows, problem.tile_rows) > INT32_MAX:
            reasons.append(f"{problem.rows} rows and {problem.columns} columns: entries are counted in int32")
        if max(problem.rows, problem.columns) > MAX_BOUND:
            reasons.append(f"more than {MAX_BOUND} rows or columns: positions are int32")
        return reasons

    @classmethod
    def configure(cls, problem: WalkProblem) -> RangeWalkConfig:
        return RangeWalkConfig(problem.arch, problem.tile_rows, problem.tile_columns)

    @classmethod
    def arguments(cls, problem: WalkProblem, config: RangeWalkConfig, tensors: WalkTensors, num_sms: int) -> Launch:
        return Launch(
            tensors.ranges,
            tensors.classes,
            tensors.walk,
            problem.rows,
            problem.columns,
            ceil_div(problem.rows, problem.tile_rows) * problem.tile_rows if problem.whole_tiles else problem.rows,
            tensors.entry_capacity,
            tensors.mask_capacity,
        )
