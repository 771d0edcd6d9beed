"""``RangePlan``: which query intervals see which key intervals, ready for the kernels."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch.compiler import is_dynamo_compiling

from cute_fa.api.values import check_tensor, integer
from cute_fa.engine import torch_internals, worlds
from cute_fa.engine.range_plans import SortedRanges, WalkShape, range_walk
from cute_fa.semantics.errors import ArgumentError, RangeError
from cute_fa.semantics.problem import INT32_MAX
from cute_fa.semantics.ranges import HostRanges
from cute_fa.semantics.tensors import check_devices, check_dims, check_vector
from cute_fa.semantics.walk_layout import TABLE_WORDS, Header, mask_words, masks_start, table_start, tiles_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PATHS = ("simple", "packed", "native", "merge")
# Room that a walk takes by default, in words, where all blocks of all tiles would take more.
_DEFAULT_WORDS = 2**24
_TILE = WalkShape(128, 128)


@dataclass(eq=False)
class RangePlan:
    """A sparse attention plan on a device, for any number of layers, heads and dtypes, and both directions. Made by
    :meth:`build`.

    ``q_ranges``, ``k_ranges`` int32 (n, 2), half open, and ``types`` int32 (n), 0 full, 1 causal, 2 inverse causal, 3
    both: see ``cute_fa.semantics.ranges``. ``host``: the same where the host knows them, else None. ``path``: how
    attention is computed, one of PATHS, and ``reasons``, why not in the ways before it. ``mask_capacity``: mask tiles
    that a walk has room for.

    What kernels walk over is made when it is first needed, on the device and without a host synchronisation, and kept:
    a list of blocks for each tile of queries (of keys, for a backward), with bit masks of those that are seen in part.
    Memory of a walk, of tiles of r rows and c columns: 4 bytes a block of the grid of tiles, and r · c / 8 (c rounded
    up to a power of two from 32 on) a block that is seen in part; at most 64 MiB of either by default.
    """

    q_ranges: torch.Tensor
    k_ranges: torch.Tensor
    types: torch.Tensor
    total_q: int
    total_k: int
    host: HostRanges | None = field(default=None, repr=False)
    path: str = "native"
    reasons: dict[str, str] = field(default_factory=dict)
    forced: bool = False
    mask_capacity: int | None = None
    _sorted: dict[str, SortedRanges] = field(default_factory=dict, repr=False)
    _walks: dict[tuple, torch.Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def build(
        cls,
        q_ranges: torch.Tensor | HostRanges | Any,
        k_ranges: torch.Tensor | Any = None,
        attn_type_map: torch.Tensor | Any = None,
        *,
        total_q: int | None = None,
        total_k: int | None = None,
        segment_offsets: torch.Tensor | Any = None,
        device: torch.device | str | None = None,
        path: str | None = None,
        mask_capacity: int | None = None,
    ) -> RangePlan:
        """The plan of n ranges of total_q queries and total_k keys.

        q_ranges, k_ranges: int32 (n, 2) on the device, not copied: they may not change between calls with the plan; or
            what the host knows, lists, arrays, or tensors on another device than ``device``, which are copied there; or
            a ready-made plan (``cute_fa.api.ready_plans``) alone.
        attn_type_map: int32 (n), None for full everywhere.
        segment_offsets: int32 (m + 1), as LA Flash has it: segments [segment_offsets[i], segment_offsets[i + 1]) of
            k_ranges belong to q_ranges[i] and have the type attn_type_map[i].
        device: of tensors by default theirs, else the GPU, or the CPU in a simulation.
        path: "simple" (packed sequences, the kernels of ``flash_attn_varlen_func``), "packed" (full key segments
            gathered as pages, forward alone), "native" (one kernel for everything) or "merge" (a call for each segment
            of a query range, merged by LSE). None: the first that fits what the host knows, native where it knows
            nothing.
        mask_capacity: blocks that are seen in part, at most, over all tiles; None for all, or 64 MiB of masks. Tiles
            that find no room have NaN for results; ``check`` and ``stats`` say how many there are.

        Makes no host synchronisation, unless values are checked (``CUTE_FA_CHECK=1``, simulations). Raises
        ArgumentError, ShapeError, DTypeError, DeviceError, and RangeError for what the host knows to be no plan, or not
        to fit the path.
        """
        if path is not None and path not in PATHS:
            raise ArgumentError(f"path={path!r}: one of {', '.join(PATHS)}")
        if mask_capacity is not None and (mask_capacity := integer("mask_capacity", mask_capacity)) < 1:
            raise ArgumentError(f"mask_capacity={mask_capacity}: at least 1 is needed")
        choices: dict[str, Any] = {"path": path or "native", "forced": path is not None, "mask_capacity": mask_capacity}
        if isinstance(q_ranges, HostRanges):
            more = {"k_ranges": k_ranges, "attn_type_map": attn_type_map, "segment_offsets": segment_offsets}
            for name, value in (more | {"total_q": total_q, "total_k": total_k}).items():
                if value is not None:
                    raise ArgumentError(f"{name} with a HostRanges for q_ranges: that says it, leave it out")
            return cls._of_host(q_ranges, device, path, choices)
        total_q, total_k = integer("total_q", total_q), integer("total_k", total_k)
        given: dict[str, Any] = {"q_ranges": q_ranges, "k_ranges": k_ranges, "attn_type_map": attn_type_map}
        given |= {"segment_offsets": segment_offsets}
        for name in ("q_ranges", "k_ranges"):
            if given[name] is None:
                raise ArgumentError(f"{name} is missing: a plan has ranges of queries and of keys")
        if _is_known(device, given):
            host = _host_ranges(**given, total_q=total_q, total_k=total_k)
            return cls._of_host(host, device, path, choices)
        if path not in (None, "native"):
            rule = "only the host can tell whether a plan fits it: give lists, or tensors on the CPU, and device="
            raise ArgumentError(f"path={path!r} with ranges on {q_ranges.device}: {rule}")
        ranges = _device_ranges(**given)
        if segment_offsets is not None and _are_checked(q_ranges):  # as the caller numbers them
            values = {name: None if tensor is None else tensor.cpu().numpy() for name, tensor in given.items()}
            _host_ranges(**values, total_q=total_q, total_k=total_k, whole=False)
        return cls(*ranges, total_q, total_k, **choices).checked()

    @classmethod
    def _of_host(cls, host: HostRanges, device: Any, path: str | None, choices: dict) -> RangePlan:
        reasons = {}
        for name in ("simple", "packed"):
            objection = getattr(host, f"{name}_objection")()
            if path in (None, name) and objection is None:
                choices["path"] = name
                break
            reasons[name] = objection or f"path={path!r} is asked for"
        if path in reasons:
            raise RangeError(f"path={path!r}: {reasons[path]}")
        if device is None:
            device = "cuda" if torch.cuda.is_available() and worlds.simulated_arch() is None else "cpu"
        q_ranges, k_ranges, types = (torch.from_numpy(a).to(device) for a in (host.q_ranges, host.k_ranges, host.types))
        return cls(q_ranges, k_ranges, types, host.total_q, host.total_k, host, reasons=reasons, **choices)

    def walk(self, rows: str, shape: tuple[int, int]) -> torch.Tensor:
        """The walk (``cute_fa.device.range_walk``) of tiles of ``shape``, (rows, columns), whose rows are "queries" or
        "keys"; made once."""
        key = (rows, tuple(shape), worlds.simulated_target())
        walk = self._walks.get(key)
        if walk is None:
            with _for_any_use():
                walk = self._make_walk(rows, WalkShape(*shape))
            if not _stays(walk):
                return walk  # of that graph, or that transform, alone
            self._walks[key] = walk
            if worlds.checks_values():
                self._check_room(walk, rows, shape)
        return walk

    @property
    def walks_made(self) -> list[tuple[str, tuple[int, int]]]:
        """Arguments of :meth:`walk` that it has kept the walks of."""
        return [(rows, shape) for rows, shape, _ in self._walks]

    def _make_walk(self, rows: str, shape: WalkShape) -> torch.Tensor:
        of_rows = self._sorted.get(rows)
        if of_rows is None:
            make = SortedRanges.of_queries if rows == "queries" else SortedRanges.of_keys
            of_rows = make(self.q_ranges, self.k_ranges, self.types, self.total_q, self.total_k)
            if _stays(of_rows.ranges):
                self._sorted[rows] = of_rows
        sizes = (self.total_q, self.total_k) if rows == "queries" else (self.total_k, self.total_q)
        blocks = tiles_of(sizes[0], shape.rows) * tiles_of(sizes[1], shape.columns)
        entries, words = min(blocks, _DEFAULT_WORDS), shape.rows * mask_words(shape.columns)
        room = (INT32_MAX - masks_start(tiles_of(sizes[0], shape.rows), entries)) // words - 1  # places are int32
        asked = _DEFAULT_WORDS // words if self.mask_capacity is None else self.mask_capacity
        return range_walk(*of_rows, *sizes, *shape, rows == "keys", entries, 1 + min(blocks, asked, room))

    def checked(self) -> RangePlan:
        """The plan, :meth:`check` having been called where values on the device are checked."""
        if self.host is None and _are_checked(self.q_ranges):
            self.check()
        return self

    def check(self) -> None:
        """Raise RangeError for a range that is reversed, leaves the rows that there are or has no known type, and where
        a walk has found no room: a host synchronisation."""
        self._known  # noqa: B018  # making it checks
        for (rows, shape, _), walk in self._walks.items():
            self._check_room(walk, rows, shape)

    def _check_room(self, walk: torch.Tensor, rows: str, shape: tuple[int, int]) -> None:
        entries, masks, _, lost = walk[: Header.MASKS].tolist()
        if lost:
            given = self.mask_capacity or _DEFAULT_WORDS // (shape[0] * mask_words(shape[1]))
            found = f"{lost} tiles of {shape[0]} {rows} found no room"
            if entries > _DEFAULT_WORDS:
                raise RangeError(f"{found}: {entries} blocks of {shape[1]} are seen, a list has {_DEFAULT_WORDS}")
            raise RangeError(f"mask_capacity={given}: {found}, {masks - 1} blocks of {shape[1]} are seen in part")

    @cached_property
    def _known(self) -> HostRanges:
        """What the host knows, at the latest now."""
        if self.host is not None:
            return self.host
        q_ranges, k_ranges, types = (t.cpu().numpy() for t in (self.q_ranges, self.k_ranges, self.types))
        return HostRanges(q_ranges, k_ranges, types, self.total_q, self.total_k)

    def mask(self) -> torch.Tensor:
        """bool (total_q, total_k): whether query i sees key j; for tests and pictures."""
        return torch.from_numpy(self._known.mask()).to(self.q_ranges.device)

    def stats(self, tile: tuple[int, int] = _TILE) -> dict[str, Any]:
        """Figures of the plan, of tiles of (queries, keys); a host synchronisation.

        ranges: how many; area: pairs that are seen, density: their share of all; tiles: blocks that kernels of such
        tiles visit, masked: those seen in part; imbalance: most blocks of a tile of queries over their mean, of those
        that have any; path; no_room: tiles of rows that found none in such a walk, or in one that a kernel has walked;
        mask_tiles: how much room there should be. Raises ArgumentError for a tile of no rows or columns.
        """
        if min(tile) < 1:
            raise ArgumentError(f"tile={tile}: at least one query and one key are needed")
        area, walk = self._known.area(), self._make_walk("queries", WalkShape(*tile))
        rows = tiles_of(self.total_q, tile[0])
        table = walk[table_start(rows) :][: TABLE_WORDS * rows].view(rows, TABLE_WORDS).cpu()
        blocks, masked = table[:, 2].clamp(min=0), table[:, 1]
        filled = blocks[blocks > 0].double()
        return {
            "ranges": len(self._known),
            "area": area,
            "density": area / max(self.total_q * self.total_k, 1),
            "tiles": int(blocks.sum()),
            "masked": int(masked.sum()),
            "imbalance": float(filled.max() / filled.mean()) if len(filled) else 1.0,
            "path": self.path,
            "no_room": max(int(made[Header.NO_ROOM]) for made in (walk, *self._walks.values())),
            "mask_tiles": int(walk[Header.MASK_TILES]) - 1,
        }

    def plot(self, ax: Axes | None = None, tile: tuple[int, int] = _TILE) -> Axes:
        """A picture of the mask, keys to the right and queries downwards, with the grid of tiles; needs matplotlib."""
        import matplotlib.pyplot as plt

        if ax is None:
            ax = plt.figure(layout="constrained").add_subplot()
        ax.imshow(self._known.mask(), cmap="Blues", vmin=0, vmax=1.6, interpolation="nearest", aspect="auto")
        ax.set_xticks([x - 0.5 for x in range(0, self.total_k + 1, tile[1])], minor=True)
        ax.set_yticks([y - 0.5 for y in range(0, self.total_q + 1, tile[0])], minor=True)
        ax.grid(which="minor", linewidth=0.4, color="gray")
        ax.tick_params(which="minor", length=0)
        ax.set(xlabel="keys", ylabel="queries")
        return ax

    @cached_property
    def parts(self) -> list[RangePlan]:
        """Native plans whose results, merged, are this one's: the i-th of each query range's ranges. Raises RangeError
        where two of them name the same pair, which would count twice."""
        host = self._known
        seen: dict[tuple, int] = {}
        turns = []
        for pair in map(tuple, host.q_ranges.tolist()):
            turns.append(seen.get(pair, 0))
            seen[pair] = turns[-1] + 1
        plans = []
        for turn in range(max(turns, default=0) + 1):
            own = [i for i, of in enumerate(turns) if of == turn]
            q_ranges, k_ranges, types = (array[own] for array in (host.q_ranges, host.k_ranges, host.types))
            plans.append(HostRanges(q_ranges, k_ranges, types, self.total_q, self.total_k))
        if sum(plan.area() for plan in plans) != host.area():
            raise RangeError("path='merge': a pair that two ranges name would count twice")
        device = self.q_ranges.device
        return [RangePlan.build(plan, device=device, path="native") for plan in plans]

    @cached_property
    def sequences(self) -> dict[str, Any]:
        """Of the simple path: arguments of attention over packed sequences."""
        simple = self._known.simple()
        window_right = 0 if simple.causal else None
        lengths = {"max_seqlen_q": simple.max_seqlen_q, "max_seqlen_k": simple.max_seqlen_k}
        names = ("cu_seqlens_q", "cu_seqlens_k", "seqused_k")
        tensors = {name: self._tensor(getattr(simple, name)) for name in names}
        return tensors | lengths | {"window_right": window_right}

    @cached_property
    def pages(self) -> tuple[int, dict[str, Any]]:
        """Of the packed path: rows of a page, and arguments of attention over pages."""
        packed = self._known.packed()
        lengths = {"max_seqlen_q": packed.max_seqlen_q, "max_seqlen_k": packed.max_seqlen_k}
        names = ("cu_seqlens_q", "page_table", "seqused_k")
        return packed.page_size, {name: self._tensor(getattr(packed, name)) for name in names} | lengths

    def _tensor(self, array: Any) -> torch.Tensor | None:
        if array is None:
            return None
        with _for_any_use():
            return torch.from_numpy(array).to(self.q_ranges.device)


def _are_checked(ranges: torch.Tensor) -> bool:
    """Whether the values of ranges on the device are checked."""
    return not is_dynamo_compiling() and torch_internals.has_values(ranges) and worlds.checks_values()


def _is_known(device: Any, given: dict[str, Any]) -> bool:
    """Whether the host knows the ranges: they are no tensors, or lie on the CPU on their way to another device."""
    tensors = [isinstance(value, torch.Tensor) for value in given.values() if value is not None]
    if not any(tensors):
        return True
    if not all(tensors):
        kinds = ", ".join(f"{name} {type(value).__name__}" for name, value in given.items() if value is not None)
        raise ArgumentError(f"{kinds}: all tensors, or none")
    on = given["q_ranges"].device
    return device is not None and on.type == "cpu" and torch.device(device).type != "cpu"


def _host_ranges(
    q_ranges: Any,
    k_ranges: Any,
    attn_type_map: Any,
    segment_offsets: Any,
    total_q: int,
    total_k: int,
    whole: bool = True,
) -> HostRanges:
    if segment_offsets is None:
        return HostRanges(q_ranges, k_ranges, attn_type_map, total_q, total_k)
    totals = {"total_q": total_q, "total_k": total_k}
    return HostRanges.from_segment_offsets(q_ranges, k_ranges, attn_type_map, segment_offsets, **totals, whole=whole)


def _device_ranges(
    q_ranges: Any, k_ranges: Any, attn_type_map: Any, segment_offsets: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q_ranges, k_ranges and types of the same length, from tensors whose values only the device knows."""
    given = {"q_ranges": q_ranges, "k_ranges": k_ranges, "attn_type_map": attn_type_map}
    given |= {"segment_offsets": segment_offsets}
    for name, tensor in given.items():
        if tensor is not None:
            check_tensor(name, tensor)
    check_dims("q_ranges", q_ranges, 2, "(n, 2)")
    check_dims("k_ranges", k_ranges, 2, "(n, 2)")
    groups = q_ranges.shape[0]
    if attn_type_map is None:
        attn_type_map = torch.zeros(groups, dtype=torch.int32, device=q_ranges.device)
    segments = groups if segment_offsets is None else k_ranges.shape[0]
    shapes = {"q_ranges": (groups, 2), "k_ranges": (segments, 2), "attn_type_map": (groups,)}
    shapes |= {"segment_offsets": (groups + 1,)}
    given["attn_type_map"] = attn_type_map
    for name, tensor in given.items():
        if tensor is not None and not is_dynamo_compiling():  # which compares no tuples of sizes
            check_vector(name, tensor, torch.int32, shapes[name], of=f"{groups} q_ranges")
    check_devices(given, "q_ranges")
    if segment_offsets is None or not groups:
        return q_ranges, k_ranges[:groups], attn_type_map
    place = torch.arange(segments, dtype=torch.int32, device=q_ranges.device)
    group = torch.searchsorted(segment_offsets[1:].contiguous(), place, right=True).clamp(max=groups - 1)
    outside = (place < segment_offsets[0]) | (place >= segment_offsets[-1])
    return q_ranges[group].masked_fill(outside[:, None], 0), k_ranges, attn_type_map[group]  # [0, 0): sees nothing


def _for_any_use() -> AbstractContextManager:
    """A context in which tensors are made that calls outside of inference mode can save for their gradients, too."""
    return nullcontext() if is_dynamo_compiling() else torch.inference_mode(False)


def _stays(tensor: torch.Tensor) -> bool:
    """Whether a tensor just made is one for later calls: not of a trace or a transform of ``torch.func``, nor of a CUDA
    graph being captured, before whose replay it holds nothing."""
    if is_dynamo_compiling() or torch.compiler.is_exporting():
        return False
    if not torch_internals.has_values(tensor):
        return False
    return not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())
