"""What a range plan becomes on the device: sorted ranges, and walks over their blocks for tiles of one kernel.

Both are made by torch and one kernel, of ranges that only the device knows: no host synchronisation, shapes that follow
from capacities. The operator ``cute_fa::range_walk`` makes a walk, ``cute_fa.device.range_walk`` says what is in it.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from cute_fa.engine.contract import MAX_BOUND, WalkTensors
from cute_fa.engine.operators import define, schema
from cute_fa.engine.plan import Plan, plan_of, signatures
from cute_fa.engine.table import TABLE
from cute_fa.engine.worlds import target_of
from cute_fa.semantics.argument_names import names_of
from cute_fa.semantics.problem import AttentionProblem
from cute_fa.semantics.types import Direction
from cute_fa.semantics.walk_layout import TABLE_WORDS, Header, mask_words, masks_start, table_start, tiles_of
from cute_fa.semantics.walk_problem import WalkProblem

if TYPE_CHECKING:
    from cute_fa.engine.contract import KernelConfig
    from cute_fa.engine.worlds import Target
    from cute_fa.semantics.append_problem import AppendProblem

_INFINITE = MAX_BOUND  # of a bound of column − row: within int32 with a row added
_CLASSES = 32


class SortedRanges(NamedTuple):
    """``ranges`` int32 (n, 8): first and last row, first and last column (exclusive behind), least and largest
    column − row, two words of nothing; by class and first row. ``classes`` int32 (33): where a class begins, that of c
    being ranges of 2^c … 2^(c+1) − 1 rows; the last one, which no kernel looks at, holds what names no pair."""

    ranges: torch.Tensor
    classes: torch.Tensor

    @classmethod
    def of_queries(cls, q_ranges, k_ranges, types, total_q: int, total_k: int) -> SortedRanges:
        """Of queries as rows: q_ranges, k_ranges int32 (n, 2), types int32 (n), whatever they hold."""
        at_start, at_end = (k_ranges.long() - q_ranges.long()).unbind(1)
        least = torch.where((types & 2) != 0, at_start, -_INFINITE)
        most = torch.where((types & 1) != 0, at_end, _INFINITE)
        return cls._sorted(q_ranges, k_ranges, least, most, total_q, total_k)

    @classmethod
    def of_keys(cls, q_ranges, k_ranges, types, total_q: int, total_k: int) -> SortedRanges:
        """Of keys as rows: seen from there a bound from above is one from below."""
        at_start, at_end = (q_ranges.long() - k_ranges.long()).unbind(1)
        least = torch.where((types & 1) != 0, at_end, -_INFINITE)
        most = torch.where((types & 2) != 0, at_start, _INFINITE)
        return cls._sorted(k_ranges, q_ranges, least, most, total_k, total_q)

    @classmethod
    def _sorted(cls, rows, columns, least, most, total_rows: int, total_columns: int) -> SortedRanges:
        """``least``, ``most``: bounds of column − row. Rows and columns outside the tensors are cut off: none is read
        there."""
        (first_row, last_row), (first_column, last_column) = (t.long().unbind(1) for t in (rows, columns))
        least, most = least.clamp(-_INFINITE, _INFINITE), most.clamp(-_INFINITE, _INFINITE)
        first_row, first_column = first_row.clamp(min=0), first_column.clamp(min=0)
        last_row, last_column = last_row.clamp(max=total_rows), last_column.clamp(max=total_columns)
        # rows that see a column: i + most ≥ first column, i + least < last column
        start = torch.maximum(first_row, first_column - most)
        stop = torch.minimum(last_row, last_column - least)
        nothing = (stop <= start) | (last_column <= first_column) | (most < least)
        start, stop = start.clamp(0, total_rows), stop.clamp(0, total_rows)
        bounds = torch.arange(1, _CLASSES - 1, device=rows.device)
        of = torch.bucketize(stop - start, 2**bounds, right=True).masked_fill(nothing, _CLASSES - 1)
        order = (of * 2**32 + start).argsort()
        fields = start, stop, first_column, last_column, least, most, torch.zeros_like(start), torch.zeros_like(start)
        table = torch.stack(fields, 1)[order].to(torch.int32)
        numbers = torch.arange(_CLASSES + 1, device=rows.device)
        classes = torch.searchsorted(of[order].contiguous(), numbers, out_int32=True)
        classes[_CLASSES] = classes[_CLASSES - 1]  # the last class is empty
        return cls(table, classes)


class WalkShape(NamedTuple):
    """Tiles of a walk: ``rows`` of so many rows of ``columns`` columns."""

    rows: int
    columns: int


class WalkShapes(NamedTuple):
    """Of the walks of one problem: forward; of tiles of keys; of the kernel for dQ alone, None where there is none."""

    queries: WalkShape
    keys: WalkShape | None = None
    dq: WalkShape | None = None


@lru_cache(maxsize=4096)
def walk_shapes(forward: AttentionProblem, backward: AttentionProblem | None, family: str | None) -> WalkShapes:
    """The tiles of the kernels that serve these problems; ``backward`` None where no gradient is asked for."""
    config = TABLE.lookup(forward, family).configure(forward)
    if backward is None:
        return WalkShapes(config.walk_shape)
    gradients = TABLE.lookup(backward, family).configure(backward)
    return WalkShapes(config.walk_shape, gradients.key_walk_shape, gradients.dq_walk_shape)


def walk_configs(problem: AttentionProblem | AppendProblem, config: Any) -> list[KernelConfig]:
    """Of the kernels that make the walks which the kernel of ``config`` takes for the problem, each once."""
    if not isinstance(problem, AttentionProblem) or not problem.ranges:
        return []
    if problem.direction is Direction.FORWARD:
        shapes = [config.walk_shape]
    else:
        shapes = [config.key_walk_shape, config.dq_walk_shape]
    walks = [WalkProblem(problem.arch, *shape, rows=1, columns=1) for shape in shapes if shape is not None]
    return list(dict.fromkeys(TABLE.lookup(walk).configure(walk) for walk in walks))


class WalkSizes(NamedTuple):
    """The operator's arguments beside sorted ranges: a ``WalkProblem``'s, and for how many entries and mask tiles
    there is room."""

    rows: int
    columns: int
    tile_rows: int
    tile_columns: int
    whole_tiles: bool
    entry_capacity: int
    mask_capacity: int

    @property
    def tiles(self) -> int:
        """Of rows."""
        return tiles_of(self.rows, self.tile_rows)

    @property
    def words(self) -> int:
        """Of the walk's tensor."""
        masks = self.mask_capacity * self.tile_rows * mask_words(self.tile_columns)
        return masks_start(self.tiles, self.entry_capacity) + masks


def _range_walk(ranges: torch.Tensor, classes: torch.Tensor, *numbers: int) -> torch.Tensor:
    sizes, target = WalkSizes(*numbers), target_of(ranges.device)
    key = ("range_walk", target, signatures((ranges, classes)), sizes)
    plan = plan_of(key, _make_plan, target, sizes)
    walk = _fake(ranges, classes, *sizes)
    walk[: Header.WORDS] = 0
    walk[Header.MASK_TILES] = 1
    tiles = sizes.tiles
    table = walk[table_start(tiles) :][: TABLE_WORDS * tiles].view(tiles, TABLE_WORDS)
    if plan.launches:
        plan.launch((ranges, classes, walk, sizes.entry_capacity, sizes.mask_capacity))
    else:
        table.zero_()
    walk[Header.WORDS :][:tiles] = table[:, 2].argsort(descending=True, stable=True)
    return walk


def _make_plan(target: Target, sizes: WalkSizes) -> Plan:
    problem = WalkProblem(
        target.arch, sizes.tile_rows, sizes.tile_columns, sizes.rows, sizes.columns, sizes.whole_tiles
    )
    return Plan(
        kind=WalkTensors,
        problem=problem,
        names=names_of(""),
        kernel=TABLE.lookup(problem),
        target=target,
        launches=problem.rows > 0 and problem.columns > 0,
    )


def _fake(ranges: torch.Tensor, classes: torch.Tensor, *numbers: int) -> torch.Tensor:
    return ranges.new_empty(WalkSizes(*numbers).words)


define("range_walk", schema("Tensor ranges, Tensor classes", WalkSizes), "Tensor", _range_walk, _fake)
range_walk = torch.ops.cute_fa.range_walk.default
