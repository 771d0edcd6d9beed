"""Seeded inputs for tests, the command line and benchmarks, made from one small frozen description.

Two kinds. ``random``: standard normal. ``peaked``: q_i is a multiple of one key's ±1 pattern, mostly a key at the edge
of what query i may see or just beyond it, and the rows of V are the ±1 digits of the key's index, scrambled per batch
and head: one key too many or too few, or of another head, then moves O by order 1. White noise would hide it.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from cute_fa.semantics.errors import ArgumentError
from cute_fa.semantics.problem import DESCALE_BLOCK, normalize_window
from cute_fa.semantics.tensors import TORCH_DTYPES
from cute_fa.semantics.types import DType

if TYPE_CHECKING:
    from collections.abc import Callable

    from cute_fa.semantics.call import Call
    from cute_fa.semantics.ranges import HostRanges

_LAYOUTS = ("contiguous", "padded", "transposed", "expanded")
_CHOICES = ("softmax_scale", "causal", "sink_tokens", "softcap")
_LARGEST_INT8, _INT8_UNIT = 127, 1 / 16
_LENGTH_TENSORS = ("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k", "page_table")


@dataclass(frozen=True)
class InputSpec:
    """One attention problem in the caller's terms.

    ``seqlen_q`` and ``seqlen_k`` are the longest lengths; ``head_dim_v`` is ``head_dim`` by default, ``dtype_k`` and
    ``dtype_v`` ``dtype``. ``descales``: tensors of codes have some, one for each kv head of each sequence;
    ``block_descales``: those of k and v have one for each 128 keys; ``row_descales``: one for each row and head of the
    cache ("rows") or for each page and head ("pages").
    ``lengths_q``/``lengths_k`` fix every sequence's length for varlen and seqused; without them they are drawn from the
    seed, the first one at its longest, with odd and empty ones among the rest. ``varlen_*`` packs the sequences with
    cu_seqlens; ``seqused_*`` passes lengths shorter than what the tensors hold. ``page_size`` stores k and v in pages,
    with ``seqused_k`` for the lengths; ``cache_batch_idx`` stores the sequences, or the rows of the page table, in
    another order among more than the batch has, ``cache_leftpad`` behind a few rows that do not count.
    ``layout``: ``padded`` rows have 16 unused bytes after each head, ``transposed`` stores heads before sequence (so
    that sequence strides differ), ``expanded`` has one kv head with stride 0 in the place of ``heads_kv``.
    ``v_layout``: "key_major" has v's keys contiguous. ``ranges``: how many ranges a plan has that says what is
    visible, of a batch of one sequence; ``positions``: between which ALiBi's distances are. ``tree``: queries are
    drafts of a random tree for each sequence, which see the context, themselves and their ancestors.
    """

    batch: int = 2
    seqlen_q: int = 64
    seqlen_k: int = 64
    heads: int = 2
    heads_kv: int = 2
    head_dim: int = 64
    head_dim_v: int | None = None
    dtype: DType = DType.BF16
    dtype_k: DType | None = None
    dtype_v: DType | None = None
    descales: bool = True
    block_descales: bool = False
    row_descales: str = ""
    softmax_scale: float | None = None
    causal: bool = False
    window: tuple[int | None, int | None] = (None, None)
    sink_tokens: int = 0
    softcap: float = 0.0
    alibi: bool = False
    alibi_per_batch: bool = False
    learnable_sink: bool = False
    varlen_q: bool = False
    varlen_k: bool = False
    seqused_q: bool = False
    seqused_k: bool = False
    page_size: int | None = None
    cache_batch_idx: bool = False
    cache_leftpad: bool = False
    lengths_q: tuple[int, ...] | None = None
    lengths_k: tuple[int, ...] | None = None
    layout: str = "contiguous"
    v_layout: str = "head_dim"
    ranges: int = 0
    positions: bool = False
    tree: bool = False

    def __post_init__(self):
        if self.head_dim_v is None:
            object.__setattr__(self, "head_dim_v", self.head_dim)
        if self.layout not in _LAYOUTS:
            raise ArgumentError(f"layout={self.layout!r}: one of {', '.join(_LAYOUTS)}")
        if self.page_size and self.varlen_k:
            raise ArgumentError("varlen_k with page_size: a paged cache takes its lengths from seqused_k")
        if self.is_cache and self.varlen_k:
            raise ArgumentError("varlen_k with cache_batch_idx or cache_leftpad: the function for caches takes none")
        if self.row_descales not in ("", "rows", "pages") or (self.row_descales == "pages" and not self.page_size):
            raise ArgumentError(f"row_descales={self.row_descales!r}: rows, or pages with page_size")
        if self.positions and not self.ranges:
            raise ArgumentError("positions without ranges: nothing depends on them")

    @property
    def dtypes(self) -> tuple[DType, DType, DType]:
        """Of q, k and v."""
        return self.dtype, self.dtype_k or self.dtype, self.dtype_v or self.dtype

    @property
    def is_cache(self) -> bool:
        """Whether flash_attn_with_kvcache alone takes it."""
        return self.cache_batch_idx or self.cache_leftpad


_CACHE_TENSORS = ("cache_batch_idx", "cache_leftpad")
_DESCALES = ("q_descale", "k_descale", "v_descale")
_RANGES = ("q_ranges", "k_ranges", "attn_type_map", "q_positions", "k_positions")
_TENSORS = (*_LENGTH_TENSORS, *_CACHE_TENSORS, "alibi_slopes", "learnable_sink", *_DESCALES, *_RANGES, "tree_mask")


@dataclass(frozen=True)
class Inputs:
    """The tensors of one call and the options that go with them; see ``cute_fa.api.attention`` for shapes."""

    spec: InputSpec
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    cu_seqlens_q: torch.Tensor | None = None
    cu_seqlens_k: torch.Tensor | None = None
    seqused_q: torch.Tensor | None = None
    seqused_k: torch.Tensor | None = None
    page_table: torch.Tensor | None = None
    cache_batch_idx: torch.Tensor | None = None
    cache_leftpad: torch.Tensor | None = None
    alibi_slopes: torch.Tensor | None = None
    learnable_sink: torch.Tensor | None = None
    q_descale: torch.Tensor | None = None
    k_descale: torch.Tensor | None = None
    v_descale: torch.Tensor | None = None
    q_ranges: torch.Tensor | None = None
    k_ranges: torch.Tensor | None = None
    attn_type_map: torch.Tensor | None = None
    q_positions: torch.Tensor | None = None
    k_positions: torch.Tensor | None = None
    tree_mask: torch.Tensor | None = None

    def options(self) -> dict[str, Any]:
        """Keyword arguments, beside q, k and v, for ``cute_fa.reference.attention`` and ``expected``."""
        absent = {name for name in (*_CACHE_TENSORS, *_RANGES, "tree_mask") if getattr(self, name) is None}
        tensors = {name: getattr(self, name) for name in _TENSORS if name not in absent}
        choices = {name: getattr(self.spec, name) for name in _CHOICES}
        return tensors | choices | {"window_size": self.spec.window}

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments, beside q, k and v, of the public function that takes these inputs: the one for caches
        where there is an index or left padding, the varlen one where there are lengths, pages or trees."""
        options = self.options()
        if self.spec.is_cache:
            used = options.pop("seqused_k")
            del options["cu_seqlens_k"]
            return options | {"cache_seqlens": used, "max_seqlen_q": self.spec.seqlen_q}
        lengths = {name: options.pop(name) for name in _LENGTH_TENSORS}
        if all(tensor is None for tensor in (*lengths.values(), self.tree_mask)):
            key_major = self.spec.v_layout != "head_dim"
            return options | ({"v_layout": self.spec.v_layout} if key_major else {})
        return lengths | {"max_seqlen_q": self.spec.seqlen_q, "max_seqlen_k": self.spec.seqlen_k} | options

    def call(self, **choices: Any) -> Call:
        """The call of these inputs, but for a range plan; ``choices``: further options of the public functions."""
        from cute_fa.api.attention import prepare

        longest = {}
        if any(getattr(self, name) is not None for name in _LENGTH_TENSORS) or self.spec.is_cache:
            longest["max_seqlen_q"] = self.spec.seqlen_q
        if longest and not self.spec.is_cache:
            longest["max_seqlen_k"] = self.spec.seqlen_k
        options = {name: value for name, value in self.options().items() if name not in _RANGES}
        return prepare(self.q, self.k, self.v, **options, **longest, **choices)

    def variables(self) -> dict[str, torch.Tensor]:
        """The tensors that have gradients, by name, in the order of ``reference.Gradients``."""
        names = ("q", "k", "v", "alibi_slopes", "learnable_sink")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def requiring_gradients(self) -> Inputs:
        """The same memory, with variables that ask for gradients."""
        return replace(self, **{name: t.detach().requires_grad_() for name, t in self.variables().items()})

    def run(self, **extra) -> Any:
        """Call the public function that takes these inputs; ``extra`` is passed on (``return_lse=True`` …)."""
        from cute_fa.api.attention import flash_attn_func, flash_attn_varlen_func
        from cute_fa.api.kvcache import flash_attn_with_kvcache

        arguments = self.arguments()
        if self.spec.ranges:
            return self._run_ranges(**arguments, **extra)
        function = flash_attn_varlen_func if "page_table" in arguments else flash_attn_func
        if self.spec.is_cache:
            function = flash_attn_with_kvcache
        return function(self.q, self.k, self.v, **arguments, **extra)

    def _run_ranges(self, **arguments: Any) -> Any:
        """As :meth:`run`: range_attention takes its one sequence without the batch, and no windows."""
        from cute_fa.api.ranges import range_attention

        given = {name: value for name, value in arguments.items() if name not in _NOT_OF_RANGES}
        return_lse = given.pop("return_lse", False)
        out, lse = range_attention(self.q[0], self.k[0], self.v[0], **given, return_lse=True)
        return (out[None], lse[None]) if return_lse else out[None]


# What says beside a plan which keys are seen, and how a forward is computed, by values that ask for nothing.
_NOT_OF_RANGES = ("causal", "window_size", "sink_tokens", *_DESCALES, "num_splits")


def make_inputs(
    spec: InputSpec,
    inputs: str = "random",
    seed: int = 0,
    poison: bool = True,
    device: str = "cpu",
    plan: HostRanges | None = None,
) -> Inputs:
    """Inputs of the kind ``random`` or ``peaked``; the same seed gives the same inputs on every machine.

    ``poison`` fills with NaN whatever lies outside the lengths: padding, tails, unused slots and unlisted pages.
    ``plan``: of ``spec.ranges`` ranges, in the place of one drawn from the seed.
    """
    if inputs not in ("random", "peaked"):
        raise ArgumentError(f"inputs={inputs!r}: random or peaked")
    if spec.heads_kv < 1 or spec.heads % spec.heads_kv:
        raise ArgumentError(f"heads={spec.heads}, heads_kv={spec.heads_kv}: heads must be a multiple of heads_kv")
    rng = torch.Generator().manual_seed(seed)
    ranges = draw_ranges(spec, seed) if spec.ranges else None
    if plan is not None:
        ranges = tuple(torch.from_numpy(array) for array in (plan.q_ranges, plan.k_ranges, plan.types))
    lengths_q = _lengths(spec.batch, spec.seqlen_q, spec.lengths_q, spec.varlen_q or spec.seqused_q, rng)
    any_k = spec.varlen_k or spec.seqused_k or spec.page_size is not None or spec.cache_leftpad
    lengths_k = _lengths(spec.batch, spec.seqlen_k, spec.lengths_k, any_k, rng)
    make = _random
    if inputs == "peaked":
        make = _peaked if ranges is None else partial(_peaked_at, partial(_edges_of_ranges, ranges))
    trees = [draw_tree(length, seed + b) for b, length in enumerate(lengths_q)] if spec.tree else []
    makes = [make] * spec.batch
    if trees and inputs == "peaked":
        makes = [partial(_peaked_at, partial(_edges_of_tree, spec, tree)) for tree in trees]
    lengths = zip(makes, lengths_q, lengths_k, strict=True)
    sequences = [make(spec, length_q, length_k, rng) for make, length_q, length_k in lengths]
    descales = _draw_descales(spec, seed)
    if spec.block_descales:
        descales = [descales[0], *_draw_block_descales(descales[1:], spec, lengths_k, poison, seed)]
    pads = _pads(spec, seed)
    of_rows: list[list[torch.Tensor]] = []
    of_sequences = [[None if d is None else d[b] for d in descales] for b in range(spec.batch)]
    if spec.row_descales:
        of_rows = _draw_row_descales(descales[1:], spec, lengths_k, pads, seed)
        for b, (of_k, of_v) in enumerate(zip(*of_rows, strict=True)):
            of_sequences[b][1:] = of_k, of_v
    sequences = [_codes(parts, own) for parts, own in zip(sequences, of_sequences, strict=True)]
    fill = math.nan if poison else 0.0

    q_rows, q_extent, cu_q, used_q = _extents(lengths_q, spec.seqlen_q, spec.varlen_q, spec.seqused_q, rng)
    held_k = [pad + length for pad, length in zip(pads, lengths_k, strict=True)]
    longest_k = spec.seqlen_k + max(pads, default=0)
    used_only = spec.seqused_k or spec.cache_leftpad
    k_rows, k_extent, cu_k, used_k = _extents(held_k, longest_k, spec.varlen_k, used_only, rng)
    of_keys = [[sequence[part] for sequence in sequences] for part in (1, 2)] + of_rows
    of_keys = [[_behind(rows, pad, fill) for rows, pad in zip(column, pads, strict=True)] for column in of_keys]
    page_table = None
    q = _pack([s[0] for s in sequences], q_rows, q_extent, fill)
    if spec.page_size is not None:
        (k, v, *stored), page_table = _paged(of_keys, spec, longest_k, fill, rng)
        used_k = torch.tensor(held_k, dtype=torch.int32)
    else:
        k, v, *stored = (_pack(parts, k_rows, k_extent, fill) for parts in of_keys)
    index = None
    if spec.cache_batch_idx:
        index = torch.randperm(spec.batch + 1, generator=torch.Generator().manual_seed(seed))[: spec.batch].int()
        if page_table is not None:
            page_table = _by_index(page_table, index, page_table.amax())
        else:
            k, v, *stored = (_by_index(t, index, fill) for t in (k, v, *stored))
    if spec.row_descales == "pages":
        stored = [_of_pages(descale, fill) for descale in stored]
    if spec.row_descales:
        descales[1:] = stored
    dtypes = (TORCH_DTYPES[dtype] for dtype in spec.dtypes)
    q, k, v = (
        lay_out(_stored(t, dtype), layout, fill)
        for t, dtype, layout in zip((q, k, v), dtypes, _layouts(spec.layout), strict=True)
    )
    if spec.v_layout == "key_major":
        v = _key_major(v, fill)
    if spec.layout == "expanded":
        k, v = (t.expand(*t.shape[:-2], spec.heads_kv, t.shape[-1]) for t in (k, v))

    slopes = None
    if spec.alibi or spec.alibi_per_batch:
        shape = (spec.batch, spec.heads) if spec.alibi_per_batch else (spec.heads,)
        slopes = 0.5 * torch.rand(shape, generator=rng) + 0.01
    sink = torch.randn(spec.heads, generator=rng) * 2.0 if spec.learnable_sink else None
    leftpad = torch.tensor(pads, dtype=torch.int32) if spec.cache_leftpad else None
    tensors = (q, k, v, cu_q, cu_k, used_q, used_k, page_table, index, leftpad, slopes, sink, *descales)
    tensors += (None,) * len(_RANGES) if ranges is None else (*ranges, *_draw_positions(spec, seed))
    tensors += (_tree_mask(trees, q_rows, q_extent, spec, poison, seed) if trees else None,)
    return Inputs(spec, *(None if t is None else _to_device(t, device) for t in tensors))


def output_gradients(inputs: Inputs, seed: int = 0, poison: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """Standard normal gradients of out and lse for these inputs: dout of their dtype and layout, dlse fp32.

    ``poison`` fills with NaN the rows that lie outside the lengths.
    """
    spec, q = inputs.spec, inputs.q
    rng = torch.Generator().manual_seed(seed)
    # not the numbers that q has for the same seed
    rng.manual_seed(int(torch.randint(2**62, (), generator=rng)))
    dout = torch.randn(*q.shape[:-1], spec.head_dim_v, generator=rng)
    dlse = torch.randn(*q.shape[:-1], generator=rng)
    if poison:
        outside = ~_counts(inputs)
        dout[outside], dlse[outside] = math.nan, math.nan
    dout = lay_out(dout.to(q.dtype), _layouts(spec.layout)[0], math.nan)
    return _to_device(dout, q.device), dlse.transpose(-1, -2).contiguous().to(q.device)


def _counts(inputs: Inputs) -> torch.Tensor:
    """Which rows of q lie inside the lengths: (batch, seqlen_q), or (total_q) if packed; on the CPU."""
    used = None if inputs.seqused_q is None else inputs.seqused_q.tolist()
    if inputs.cu_seqlens_q is None:
        rows = torch.arange(inputs.q.shape[1]).expand(inputs.q.shape[0], -1)
        return rows < (inputs.q.shape[1] if used is None else torch.tensor(used)[:, None])
    counts = torch.zeros(inputs.q.shape[0], dtype=torch.bool)
    offsets = inputs.cu_seqlens_q.tolist()
    for b, (start, end) in enumerate(itertools.pairwise(offsets)):
        counts[start : end if used is None else start + used[b]] = True
    return counts


def _lengths(batch: int, longest: int, given, vary: bool, rng) -> list[int]:
    if given is not None:
        if not vary or len(given) != batch or not all(0 <= length <= longest for length in given):
            raise ArgumentError(f"lengths={given}: {batch} lengths of at most {longest}, for varlen or seqused")
        return list(given)
    if not vary:
        return [longest] * batch
    drawn = torch.randint(0, longest + 1, (batch,), generator=rng).tolist()
    # an odd length and an empty one must not depend on luck
    lengths = [longest, longest * 5 // 8 | 1, 0, *drawn][:batch]
    return [min(length, longest) for length in lengths]


def draw_ranges(spec: InputSpec, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q_ranges, k_ranges and attn_type_map of a random plan, int32: long and short ranges, one in five empty or of a
    single row, of all types."""
    rng = torch.Generator().manual_seed(seed)
    ranges = []
    for total in (spec.seqlen_q, spec.seqlen_k):
        reach = total * torch.rand(spec.ranges, generator=rng).square()
        few = torch.rand(spec.ranges, generator=rng) < 0.2
        short = torch.randint(0, 2, (spec.ranges,), generator=rng)
        length = torch.where(few, short, reach.ceil().long()).clamp(max=total)
        start = (torch.rand(spec.ranges, generator=rng) * (total - length + 1)).long().clamp(max=total)
        ranges.append(torch.stack([start, start + length], 1).int())
    return *ranges, torch.randint(0, 4, (spec.ranges,), generator=rng, dtype=torch.int32)


def draw_tree(drafts: int, seed: int) -> torch.Tensor:
    """bool (drafts, drafts) of a random tree: which drafts each one sees, itself and its ancestors. A draft follows one
    before it, or the context."""
    rng = torch.Generator().manual_seed(seed)
    tree = torch.eye(drafts, dtype=torch.bool)
    for draft in range(1, drafts):
        parent = int(torch.randint(-1, draft, (), generator=rng))
        if parent >= 0:
            tree[draft] |= tree[parent]
    return tree


def tree_words(tree: torch.Tensor) -> torch.Tensor:
    """The bits of bool (rows, drafts) in int32 words (rows, ⌈drafts / 32⌉)."""
    rows, drafts = tree.shape
    words = -(-drafts // 32)
    bits = torch.zeros(rows, 32 * words, dtype=torch.int64)
    bits[:, :drafts] = tree
    return (bits.view(rows, words, 32) << torch.arange(32)).sum(2).to(torch.int32)


def _tree_mask(trees: list[torch.Tensor], starts, extent: tuple[int, ...], spec: InputSpec, poison: bool, seed: int):
    """The words of each sequence's tree, and one more than the longest needs; ``poison``: bits that do not count may be
    anything."""
    words = -(-spec.seqlen_q // 32) + 1
    whole = torch.zeros(*extent, words, dtype=torch.int32)
    if poison:
        whole.random_(-(2**31), 2**31, generator=torch.Generator().manual_seed(seed))
    for tree, start in zip(trees, starts, strict=True):
        own = tree_words(tree)
        count = tree_words(torch.ones_like(tree))
        at = (*start[:-1], slice(start[-1], start[-1] + len(tree)), slice(own.shape[1]))
        whole[at] = whole[at] & ~count | own
    return whole


def _draw_positions(spec: InputSpec, seed: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Of queries and keys, int32."""
    if not spec.positions:
        return None, None
    rng = torch.Generator().manual_seed(seed)
    q, k = (torch.randint(-50, 50, (rows,), generator=rng).int() for rows in (spec.seqlen_q, spec.seqlen_k))
    return q, k


def _draw_descales(spec: InputSpec, seed: int) -> list[torch.Tensor | None]:
    """Of q, k and v, between 1/2 and 2, of int8 between 1/32 and 1/8, where they are codes: fp32 (batch, heads_kv)."""
    rng = torch.Generator().manual_seed(seed)
    drawn = [torch.exp2(2.0 * torch.rand(spec.batch, spec.heads_kv, generator=rng) - 1.0) for _ in spec.dtypes]
    given = [spec.descales and dtype.is_codes for dtype in spec.dtypes]
    units = [_INT8_UNIT if dtype is DType.INT8 else 1.0 for dtype in spec.dtypes]
    return [unit * d if used else None for d, used, unit in zip(drawn, given, units, strict=True)]


def _draw_block_descales(
    descales: list[torch.Tensor | None], spec: InputSpec, lengths_k: list[int], poison: bool, seed: int
) -> list[torch.Tensor | None]:
    """Between 1/2 and 2 of the sequences' for each block of keys, whole pages of them, and one block more: fp32 (batch,
    heads_kv, blocks); ``poison``: NaN for blocks without keys."""
    rng = torch.Generator().manual_seed(seed)
    page_size = spec.page_size or 1
    held = -(-spec.seqlen_k // page_size) * page_size
    first = torch.arange(0, held + DESCALE_BLOCK, DESCALE_BLOCK)
    unused = (first >= torch.tensor(lengths_k)[:, None])[:, None]
    of_blocks: list[torch.Tensor | None] = []
    for descale in descales:
        factors = torch.exp2(2.0 * torch.rand(spec.batch, spec.heads_kv, len(first), generator=rng) - 1.0)
        factors = factors.masked_fill(unused, math.nan if poison else 1.0)
        of_blocks.append(None if descale is None else descale[..., None] * factors)
    return of_blocks


def _draw_row_descales(
    descales: list[torch.Tensor | None], spec: InputSpec, lengths_k: list[int], pads: list[int], seed: int
) -> list[list[torch.Tensor]]:
    """Between 1/4 and 2 of the sequences' for each row, or each page, of every sequence: (rows, heads_kv, 1)."""
    rng = torch.Generator().manual_seed(seed)
    kv_heads, columns = 1 if spec.layout == "expanded" else spec.heads_kv, []
    for descale in descales:
        if descale is None:
            raise ArgumentError(f"row_descales={spec.row_descales!r}: k and v in fp8 with descales have some")
        column = []
        for own, pad, length in zip(descale, pads, lengths_k, strict=True):
            rows = pad + torch.arange(length)
            if spec.row_descales == "pages":
                rows = rows // spec.page_size
            factors = torch.exp2(3.0 * torch.rand(pad + length, kv_heads, generator=rng) - 2.0)[rows]
            column.append((own[:kv_heads] * factors)[..., None])
        columns.append(column)
    return columns


def _of_pages(descale: torch.Tensor, fill: float) -> torch.Tensor:
    """The one number of each page and head (num_pages, page_size, heads_kv, 1), whose rows without keys hold
    ``fill``: (num_pages, 1, heads_kv, 1)."""
    largest = descale.nan_to_num(0.0).amax(1, keepdim=True)
    return torch.where(largest > 0.0, largest, fill)


def _codes(parts: tuple[torch.Tensor, ...], descales: list[torch.Tensor | None]) -> tuple[torch.Tensor, ...]:
    """q, k and v of one sequence divided by its descales, (heads_kv), (heads_kv, blocks) or (rows, heads_kv, 1); where
    one kv head stands for all, by its own."""
    kv_heads = parts[1].shape[1]
    codes = []
    for part, descale in zip(parts, descales, strict=True):
        if descale is not None and descale.dim() == 3:
            part = part / descale
        elif descale is not None:
            of_heads = descale[:kv_heads].repeat_interleave(part.shape[1] // kv_heads, 0)
            if of_heads.dim() == 2:
                of_heads = of_heads.repeat_interleave(DESCALE_BLOCK, 1)[:, : part.shape[0]].T
            part = part / of_heads[..., None]
        codes.append(part)
    return tuple(codes)


def _stored(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rounded to a type; in int8, which has no NaN, the largest code stands for it."""
    if dtype != torch.int8:
        return values.to(dtype)
    return values.nan_to_num(_LARGEST_INT8).round().clamp(-_LARGEST_INT8, _LARGEST_INT8).to(dtype)


def _pads(spec: InputSpec, seed: int) -> list[int]:
    """Rows of the cache before each sequence's first key."""
    if not spec.cache_leftpad:
        return [0] * spec.batch
    return torch.randint(0, 12, (spec.batch,), generator=torch.Generator().manual_seed(seed)).tolist()


def _behind(rows: torch.Tensor, pad: int, fill: float) -> torch.Tensor:
    return torch.cat([rows.new_full((pad, *rows.shape[1:]), fill), rows])


def _by_index(whole: torch.Tensor, index: torch.Tensor, fill: float | torch.Tensor) -> torch.Tensor:
    """Number b as number index[b] of one more."""
    larger = torch.full((whole.shape[0] + 1, *whole.shape[1:]), float(fill)).to(whole.dtype)
    larger[index.long()] = whole
    return larger


def _random(spec: InputSpec, seqlen_q: int, seqlen_k: int, rng):
    """q, k and v of one sequence."""
    kv_heads = 1 if spec.layout == "expanded" else spec.heads_kv
    q = torch.randn(seqlen_q, spec.heads, spec.head_dim, generator=rng)
    k = torch.randn(seqlen_k, kv_heads, spec.head_dim, generator=rng)
    v = torch.randn(seqlen_k, kv_heads, spec.head_dim_v, generator=rng)
    return q, k, v


def _peaked(spec: InputSpec, seqlen_q: int, seqlen_k: int, rng):
    """q, k and v of one sequence."""
    return _peaked_at(partial(_edges_of_window, spec), spec, seqlen_q, seqlen_k, rng)


def _peaked_at(edges_of: Callable, spec: InputSpec, seqlen_q: int, seqlen_k: int, rng):
    """q, k and v of one sequence; ``edges_of(seqlen_q, seqlen_k, rng)``: keys at the edges of what queries see, each
    (seqlen_q, 1) or (seqlen_q, heads)."""
    kv_heads = 1 if spec.layout == "expanded" else spec.heads_kv
    k = _signs((seqlen_k, kv_heads, spec.head_dim), rng)
    bits = torch.arange(spec.head_dim_v) % max(1, (seqlen_k - 1).bit_length())
    digits = 1.0 - 2.0 * (torch.arange(seqlen_k)[:, None] >> bits & 1)
    v = digits[:, None, :] * _signs((1, kv_heads, spec.head_dim_v), rng)
    if seqlen_k == 0:
        return torch.zeros(seqlen_q, spec.heads, spec.head_dim), k, v

    anywhere = torch.randint(0, seqlen_k, (seqlen_q, spec.heads), generator=rng)
    edges = torch.stack([edge.expand(-1, spec.heads) for edge in (*edges_of(seqlen_q, seqlen_k, rng), anywhere)])
    choice = torch.randint(0, len(edges), (1, seqlen_q, spec.heads), generator=rng)
    target = edges.gather(0, choice)[0]
    target = torch.where((target >= 0) & (target < seqlen_k), target, anywhere)
    group = torch.arange(spec.heads) * kv_heads // spec.heads
    # a target's score is then about 16 after the default scale, the others' about 16/√head_dim
    sharpness = 16.0 / math.sqrt(spec.head_dim)
    return sharpness * k[target, group], k, v


def _edges_of_window(spec: InputSpec, seqlen_q: int, seqlen_k: int, rng) -> tuple[torch.Tensor, ...]:
    left, right = normalize_window(spec.window, spec.causal)
    position = torch.arange(seqlen_q)[:, None] + seqlen_k - seqlen_q
    last = position + (seqlen_k if right is None else right)
    first = position - (seqlen_k if left is None else left)
    sink = torch.full_like(position, spec.sink_tokens)
    end = torch.full_like(position, seqlen_k - 1)
    return last, last + 1, first, first - 1, sink - 1, sink, end


def _edges_of_tree(spec: InputSpec, tree: torch.Tensor, seqlen_q: int, seqlen_k: int, rng) -> tuple[torch.Tensor, ...]:
    """Beside those of the window some draft that each query sees, and one that it does not: of the tree, where it has
    any."""
    edges = _edges_of_window(spec, seqlen_q, seqlen_k, rng)
    if seqlen_q == 0:
        return edges
    drawn = torch.rand(seqlen_q, seqlen_q, generator=rng)
    seen, hidden = ((drawn + sign * tree).argmax(1, keepdim=True) for sign in (1.0, -1.0))
    return *edges, *(draft + seqlen_k - seqlen_q for draft in (seen, hidden))


def _edges_of_ranges(plan: tuple, seqlen_q: int, seqlen_k: int, rng) -> tuple[torch.Tensor, ...]:
    """Ends and diagonals of a range of each query's own, drawn from the plan."""
    q_ranges, k_ranges, _ = (tensor.long() for tensor in plan)
    own = torch.randint(0, len(q_ranges), (seqlen_q,), generator=rng)
    (q_start, q_stop), (k_start, k_stop) = (ranges[own].T[..., None] for ranges in (q_ranges, k_ranges))
    row = torch.arange(seqlen_q)[:, None]
    last, first = row + k_stop - q_stop, row + k_start - q_start
    return k_start, k_start - 1, k_stop - 1, k_stop, last, last + 1, first, first - 1


def _signs(shape: tuple[int, ...], rng) -> torch.Tensor:
    return 1.0 - 2.0 * torch.randint(0, 2, shape, generator=rng)


def _extents(lengths: list[int], longest: int, varlen: bool, seqused: bool, rng):
    """Where each sequence's rows go: (first rows, rows of the whole tensor, cu_seqlens, seqused).

    The whole is (rows,) if packed, else (batch, rows). Packed sequences have unused rows behind them with seqused.
    """
    batch = len(lengths)
    used = torch.tensor(lengths, dtype=torch.int32) if seqused else None
    if not varlen:
        return [(b, 0) for b in range(batch)], (batch, longest), None, used
    tails = [0] * batch
    if seqused:
        drawn = torch.randint(0, 8, (batch,), generator=rng).tolist()
        tails = [min(tail, longest - length) for tail, length in zip(drawn, lengths, strict=True)]
    cu_seqlens = torch.zeros(batch + 1, dtype=torch.int32)
    cu_seqlens[1:] = torch.tensor([a + b for a, b in zip(lengths, tails, strict=True)]).cumsum(0)
    starts = cu_seqlens.tolist()
    return [(start,) for start in starts[:batch]], (starts[-1],), cu_seqlens, used


def _pack(parts: list[torch.Tensor], starts, extent: tuple[int, ...], fill: float) -> torch.Tensor:
    whole = torch.full((*extent, *parts[0].shape[1:]), fill)
    for part, start in zip(parts, starts, strict=True):
        rows = slice(start[-1], start[-1] + part.shape[0])
        whole[(*start[:-1], rows)] = part
    return whole


def _paged(columns: list[list[torch.Tensor]], spec: InputSpec, longest: int, fill: float, rng):
    """k and v in shuffled pages; the table's unused entries point at a page that no sequence owns."""
    size = spec.page_size
    counts = [-(-part.shape[0] // size) for part in columns[0]]
    width = max(1, -(-longest // size))
    order = torch.randperm(sum(counts) + 1, generator=rng).tolist()
    unlisted = order.pop()
    table = torch.full((spec.batch, width), unlisted, dtype=torch.int32)
    stores = [torch.full((sum(counts) + 1, size, *parts[0].shape[1:]), fill) for parts in columns]
    for b, count in enumerate(counts):
        pages, order = order[:count], order[count:]
        table[b, :count] = torch.tensor(pages, dtype=torch.int32)
        for store, parts in zip(stores, columns, strict=True):
            for slot, page in enumerate(pages):
                rows = parts[b][slot * size : (slot + 1) * size]
                store[page, : rows.shape[0]] = rows
    return stores, table


def _layouts(layout: str) -> tuple[str, str, str]:
    """Layouts of q, k and v: the three differ from each other where the spec asks for an unusual one."""
    if layout == "padded":
        return "padded", "transposed", "padded"
    if layout == "transposed":
        return "transposed", "padded", "contiguous"
    return "contiguous", "contiguous", "contiguous"


def _key_major(v: torch.Tensor, fill: float) -> torch.Tensor:
    """The same values (batch, rows, heads, size) with the rows contiguous; gaps hold ``fill``."""
    rows = v.shape[1]
    wide = v.new_full((v.shape[0], v.shape[3], v.shape[2], -(-rows // 16) * 16), fill)
    wide[..., :rows] = v.permute(0, 3, 2, 1)
    return wide[..., :rows].permute(0, 3, 2, 1)


def lay_out(tensor: torch.Tensor, layout: str, fill: float) -> torch.Tensor:
    """The same values (…, rows, heads, size) in other memory: "padded" or "transposed", as in :class:`InputSpec`; gaps
    hold ``fill``."""
    if not tensor.is_floating_point():
        fill = _LARGEST_INT8
    if layout == "padded":
        wide = tensor.new_full((*tensor.shape[:-1], tensor.shape[-1] + 16 // tensor.itemsize), fill)
        wide[..., : tensor.shape[-1]] = tensor
        return wide[..., : tensor.shape[-1]]
    if layout == "transposed":
        return tensor.transpose(-3, -2).contiguous().transpose(-3, -2)
    return tensor


def _to_device(tensor: torch.Tensor, device: str | torch.device) -> torch.Tensor:
    """Moved without changing its strides."""
    if tensor.device == torch.device(device):
        return tensor
    storage = tensor.untyped_storage()
    moved = torch.empty(storage.nbytes(), dtype=torch.uint8, device=device)
    moved.untyped_storage().copy_(storage)
    return moved.view(tensor.dtype).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
