"""``RangePlan``: which query intervals see which key intervals, ready for the kernels."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from cute_fa.device.tiling import ceil_div
from cute_fa.device.walk_layout import mask_words
from cute_fa.engine.range_plans import SortedRanges, WalkShape, range_walk
from cute_fa.semantics.tensors import check_devices, check_vector

# What a walk may take by default, in words: 64 MiB of mask tiles, as much of entries.
_DEFAULT_WORDS = 2**24


@dataclass(eq=False)
class RangePlan:
    """A sparse attention plan on a device. Make one with :meth:`build`.

    ``q_ranges``, ``k_ranges`` int32 (n, 2), ``types`` int32 (n); ``total_q`` queries, ``total_k`` keys.
    """

    q_ranges: torch.Tensor
    k_ranges: torch.Tensor
    types: torch.Tensor
    total_q: int
    total_k: int
    mask_capacity: int | None = None
    _sorted: dict[str, SortedRanges] = field(default_factory=dict, repr=False)
    _walks: dict[tuple[str, WalkShape], torch.Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def build(
        cls,
        q_ranges: torch.Tensor,
        k_ranges: torch.Tensor,
        attn_type_map: torch.Tensor | None = None,
        *,
        total_q: int,
        total_k: int,
        mask_capacity: int | None = None,
    ) -> RangePlan:
        """The plan of n ranges."""
        types = attn_type_map
        if types is None:
            types = torch.zeros(q_ranges.shape[:1], dtype=torch.int32, device=q_ranges.device)
        for name, ranges in (("q_ranges", q_ranges), ("k_ranges", k_ranges)):
            check_vector(name, ranges, torch.int32, (q_ranges.shape[0], 2), of=f"{q_ranges.shape[0]} q_ranges")
        check_vector("attn_type_map", types, torch.int32, (q_ranges.shape[0],), of=f"{q_ranges.shape[0]} q_ranges")
        check_devices({"q_ranges": q_ranges, "k_ranges": k_ranges, "attn_type_map": types}, "q_ranges")
        return cls(q_ranges, k_ranges, types, total_q, total_k, mask_capacity)

    def walk(self, rows: str, shape: WalkShape) -> torch.Tensor:
        """The walk for tiles of ``shape``, whose rows are "queries" or "keys"; made once."""
        walk = self._walks.get((rows, shape))
        if walk is None:
            walk = self._walks[rows, shape] = self._make_walk(rows, shape)
        return walk

    def _make_walk(self, rows: str, shape: WalkShape) -> torch.Tensor:
        if rows not in self._sorted:
            make = SortedRanges.of_queries if rows == "queries" else SortedRanges.of_keys
            self._sorted[rows] = make(self.q_ranges, self.k_ranges, self.types, self.total_q, self.total_k)
        sizes = (self.total_q, self.total_k) if rows == "queries" else (self.total_k, self.total_q)
        blocks = ceil_div(sizes[0], shape.rows) * ceil_div(sizes[1], shape.columns)
        most = _DEFAULT_WORDS // (shape.rows * mask_words(shape.columns))
        masks = min(blocks, most if self.mask_capacity is None else self.mask_capacity)
        return range_walk(*self._sorted[rows], *sizes, *shape, rows == "keys", min(blocks, _DEFAULT_WORDS), 1 + masks)
