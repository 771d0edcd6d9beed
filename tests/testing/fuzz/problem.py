"""One problem of the fuzzer as a value: a public function, its sizes and options, and the simulated machine.

A problem is written as JSON (its fields that differ from their defaults) and read back, so that it reproduces alone.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING, Any

import torch

from cute_fa.api.range_plan import RangePlan
from cute_fa.engine.table import TABLE
from cute_fa.engine.worlds import described
from cute_fa.semantics.errors import ArgumentError, CuteFaError, Fa3ArchError, Fp8Error, RangeError, UnsupportedKeyError
from cute_fa.semantics.problem import normalize_window
from cute_fa.semantics.types import Direction, DType, PersistentMode, SmArch
from cute_fa.tools.inputs import InputSpec, draw_ranges
from cute_fa.tools.trial import Machine, problem_of_spec

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cute_fa.semantics.problem import AttentionProblem

FORWARD_REQUESTS = (
    "Fa2FwdRequest",
    "Fa3FwdRequest",
    "Fa3FwdFp8Request",
    "VarlenFwdRequest",
    "PagedAttentionRequest",
    "ChunkedPrefillRequest",
)
FUNCTIONS = ("flash_attn_func", "flash_attn_varlen_func")
DIFFERENTIATED = (*FUNCTIONS, "range_attention")  # by torch.autograd
TREES = ("flash_attn_varlen_func", "flash_attn_with_kvcache", "PagedAttentionRequest")  # take drafts of a tree
CACHE_CALLS = ("flash_attn_with_kvcache", "append_kv")
CALLS = (
    *DIFFERENTIATED,
    *CACHE_CALLS,
    *FORWARD_REQUESTS,
    "Fa2BwdRequest",
    "merge_states",
)
PLANS = (None, "auto", "native", "merge")
_FAMILIES = {"Fa2FwdRequest": "fa2", "Fa2BwdRequest": "fa2", "Fa3FwdRequest": "fa3", "Fa3FwdFp8Request": "fa3"}


@dataclass(frozen=True)
class CacheSpec:
    """How a call meets a KV cache, whose lengths, with the new rows, and pages are those of the spec.

    ``new``: rows that each sequence appends, the last of its tokens; None appends nothing. ``packed``: they come one
    after the other, with cu_seqlens_k_new. ``leftpad``: rows before each sequence's first key. ``indexed``: the cache
    has a sequence more than the batch, in another order, with cache_batch_idx. ``rotary_dim`` elements of each head
    rotate (0: none); ``rotary_starts``: positions that count in the place of those in the cache (rotary_seqlens);
    ``rotate_each``: whether append_kv rotates each query by its own position. ``one_length``: cache_seqlens is an int.
    ``codes``: append_kv's caches of k and v are in these types, e4m3, e5m2 or int8; so are its rows if ``copied``, else
    they are divided by descales, one for all heads if ``one_descale``.
    """

    new: tuple[int, ...] | None = None
    packed: bool = False
    leftpad: tuple[int, ...] | None = None
    indexed: bool = False
    rotary_dim: int = 0
    rotary_dtype: str = "fp32"
    rotary_interleaved: bool = False
    rotary_pairs: bool = False
    rotary_starts: tuple[int, ...] | None = None
    rotate_each: bool = True
    one_length: bool = False
    codes: tuple[str, str] | None = None
    copied: bool = False
    one_descale: bool = False


@dataclass(frozen=True)
class Problem:
    """``call`` of the public functions and requests with ``spec``'s tensors, made from ``inputs`` and ``seed``.

    ``backward``: the functions' results are differentiated, with a gradient of the LSE too if ``lse_gradient``, and by
    the slopes too if ``slopes_gradient``; ``summed``: the gradient of out is that of its sum, a one with strides of 0.
    ``max_seqlens``: whether the longest lengths are passed, or None for them. ``offsets_k``: a paged cache has its
    lengths from cu_seqlens_k. ``tail``: rows of packed q, k and v behind the last sequence. ``joined``: k and v are
    slices of one tensor (…, rows, 2, heads_kv, head_dim). ``into``: the result goes to a tensor of the caller's
    (``out=``). ``heads_first``: a cache's memory is (…, heads, rows, head_dim). ``parts``: where merge_states' parts of
    the keys end; the last one is causal if the spec is. ``plan``: range_attention is given a plan that the host built,
    of this path or, if "auto", of the one that it chooses; None: the ranges. ``segments``: so many key ranges belong to
    each range of queries, by segment_offsets.
    """

    call: str
    machine: Machine
    spec: InputSpec
    inputs: str = "peaked"
    seed: int = 0
    family: str | None = None
    num_splits: int = 1
    seqlen_k_per_split: int = 0
    pack_gqa: bool | None = None
    promote_every: int | None = None
    persistent: str = "auto"
    max_seqlens: bool = True
    offsets_k: bool = False
    tail: int = 0
    joined: bool = False
    summed: bool = False
    into: bool = False
    backward: bool = False
    deterministic: bool = False
    lse_gradient: bool = False
    slopes_gradient: bool = False
    heads_first: bool = False
    cache: CacheSpec = CacheSpec()
    parts: tuple[int, ...] = ()
    plan: str | None = None
    segments: int = 1

    @property
    def lengths_q(self) -> tuple[int, ...]:
        spec = self.spec
        return (spec.seqlen_q,) * spec.batch if spec.lengths_q is None else spec.lengths_q

    @property
    def lengths_k(self) -> tuple[int, ...]:
        spec = self.spec
        return (spec.seqlen_k,) * spec.batch if spec.lengths_k is None else spec.lengths_k

    @property
    def varies_q(self) -> bool:
        """Whether the queries' lengths are a tensor's."""
        return self.spec.varlen_q or self.spec.seqused_q

    @property
    def varies_k(self) -> bool:
        return self.spec.varlen_k or self.spec.seqused_k or self.spec.page_size is not None

    @property
    def prefix(self) -> int:
        """Keys before the queries of any sequence that has some, at most."""
        lengths = zip(self.lengths_q, self.lengths_k, strict=True)
        return max([length_k - length_q for length_q, length_k in lengths if length_q], default=0)

    def objection(self) -> str | None:
        """Why the problem is none: its fields contradict each other, or the table has no kernel for it."""
        try:
            return next(self._contradictions(), None) or self._unserved()
        except CuteFaError as error:
            return str(error)

    def _contradictions(self) -> Iterator[str]:
        spec, cache = self.spec, self.cache
        fixed = spec.lengths_q is None and spec.lengths_k is None
        if fixed and (self.varies_q or self.varies_k):
            yield "lengths that vary are fixed by the spec"
        if spec.batch < 1 or min(spec.heads, spec.heads_kv, spec.head_dim, spec.head_dim_v) < 1:
            yield "at least one sequence, head and element"
        if spec.heads % spec.heads_kv:
            yield "heads is a multiple of heads_kv"
        for lengths, longest, varies in (
            (spec.lengths_q, spec.seqlen_q, self.varies_q),
            (spec.lengths_k, spec.seqlen_k, self.varies_k),
        ):
            if (lengths is not None) != varies:
                yield "lengths for what varies alone"
            if lengths is not None and (len(lengths) != spec.batch or not 0 <= max(lengths) <= max(longest, 0)):
                yield "one length a sequence, none longer than the longest"
            if varies and longest < 1:
                yield "max_seqlen is at least 1"
        if spec.sink_tokens and normalize_window(spec.window, spec.causal)[0] is None:
            yield "sink_tokens without a left edge: they change nothing"
        if self.joined and (spec.head_dim != spec.head_dim_v or cache != CacheSpec()):
            yield "k and v of one shape are joined, but not where a cache is written"
        if self.tail and (self.call not in FUNCTIONS or not (spec.varlen_q or spec.varlen_k)):
            yield "rows behind the last sequence are those of packed tensors"
        if self.offsets_k and (self.call != "flash_attn_varlen_func" or spec.page_size is None):
            yield "cu_seqlens_k of a paged cache"
        if self.summed and not self.backward:
            yield "nothing is differentiated"
        if self.slopes_gradient and not (spec.alibi or spec.alibi_per_batch):
            yield "slopes_gradient without slopes"
        if spec.layout == "expanded" and cache.new is not None:
            yield "an expanded cache cannot be written"
        yield from self._contradictions_of_call()
        yield from self._contradictions_of_plan()
        yield from self._contradictions_of_cache()

    def _contradictions_of_call(self) -> Iterator[str]:
        spec, call = self.spec, self.call
        packed = spec.varlen_q and spec.varlen_k
        used = spec.seqused_q or spec.seqused_k
        paged = spec.page_size is not None
        if call not in CALLS:
            yield f"call is one of {', '.join(CALLS)}"
        if call in ("flash_attn_func", "Fa2FwdRequest", "Fa3FwdRequest", "Fa3FwdFp8Request", "merge_states") and (
            self.varies_q or self.varies_k
        ):
            yield "this call takes sequences of one length"
        if call == "flash_attn_varlen_func" and not (self.varies_q or self.varies_k):
            yield "this call takes lengths"
        if call == "VarlenFwdRequest" and (not packed or used):
            yield "this request takes packed sequences"
        if call == "Fa2BwdRequest" and (used or paged or spec.varlen_q != spec.varlen_k):
            yield "this request takes packed sequences, or sequences of one length"
        if call == "PagedAttentionRequest" and (not paged or used):
            yield "this request takes pages"
        if call == "ChunkedPrefillRequest":
            if used or not (packed or paged):
                yield "this request takes packed sequences or pages"
            if any(q > k for q, k in zip(self.lengths_q, self.lengths_k, strict=True) if q):
                yield "a chunk's queries are the last of the keys"
            if self.prefix + max(self.lengths_q) > spec.seqlen_k:
                yield "pages hold the longest prefix and the longest chunk behind it"
        if call in CACHE_CALLS and spec.varlen_k:
            yield "a cache's lengths are cache_seqlens"
        if spec.tree and (call not in TREES or not self.max_seqlens):
            yield "this call has no tree, or not of the longest length"
        if self.backward and (paged or call not in DIFFERENTIATED):
            yield "nothing differentiates this call"
        if call == "merge_states":
            least = spec.seqlen_k - spec.seqlen_q if spec.causal else spec.seqlen_k
            if list(self.parts) != sorted(self.parts) or not all(0 <= end <= least for end in self.parts):
                yield "parts end in order, where all queries see all keys before"
            if (spec.alibi or spec.alibi_per_batch) or spec.window != (None, None):
                yield "a part's positions are its own"

    def _contradictions_of_plan(self) -> Iterator[str]:
        spec = self.spec
        if (self.call == "range_attention") != (spec.ranges > 0):
            yield "range_attention, and no other call, has ranges"
        if self.call != "range_attention":
            if (self.plan, self.segments) != (None, 1):
                yield "this call has no plan"
            return
        if self.plan not in PLANS or self.segments < 1:
            yield f"plan is one of {', '.join(map(str, PLANS))}, of at least one segment"
        if spec.positions and not spec.alibi:
            yield "positions without slopes"
        if spec.causal or spec.alibi_per_batch or self.into or not self.max_seqlens:
            yield "range_attention takes no such argument"
        if (self.num_splits, self.pack_gqa, self.persistent) != (1, None, "auto"):
            yield "range_attention chooses how it computes"
        if self.plan == "merge":
            try:
                self.range_plan().parts  # noqa: B018  # making them checks
            except RangeError as error:
                yield str(error)

    def grouped_ranges(self) -> dict[str, torch.Tensor]:
        """The arguments that say the plan: of ``segments`` key ranges for each range of queries, or ranges alone."""
        names = ("q_ranges", "k_ranges", "attn_type_map")
        ranges = dict(zip(names, draw_ranges(self.spec, self.seed), strict=True))
        if self.segments == 1:
            return ranges
        offsets = torch.arange(0, self.spec.ranges + self.segments, self.segments, dtype=torch.int32)
        first = {name: ranges[name][:: self.segments] for name in ("q_ranges", "attn_type_map")}
        first["attn_type_map"] = first["attn_type_map"] & 1
        return ranges | first | {"segment_offsets": offsets.clamp(max=self.spec.ranges)}

    def range_plan(self) -> RangePlan:
        """What the host builds of them."""
        known = {name: tensor.tolist() for name, tensor in self.grouped_ranges().items()}
        totals = {"total_q": self.spec.seqlen_q, "total_k": self.spec.seqlen_k}
        return RangePlan.build(**known, **totals, device="cpu", path=None if self.plan == "auto" else self.plan)

    def _contradictions_of_cache(self) -> Iterator[str]:
        spec, cache = self.spec, self.cache
        if self.call not in CACHE_CALLS:
            if cache != CacheSpec():
                yield "this call has no cache"
            return
        lengths = self.lengths_k
        if cache.new is None:
            if self.call == "append_kv" or cache.rotary_dim or cache.rotary_starts:
                yield "nothing is appended"
        elif not (spec.seqused_k or spec.page_size is not None):
            yield "an append needs cache_seqlens"
        for rows in (cache.new, cache.leftpad, cache.rotary_starts):
            if rows is not None and (len(rows) != spec.batch or min(rows) < 0):
                yield "one number a sequence"
        new, pads = cache.new or (0,) * spec.batch, cache.leftpad or (0,) * spec.batch
        if any(pad + rows > length for pad, rows, length in zip(pads, new, lengths, strict=True)):
            yield "padding and new rows lie within the length"
        if self.call == "flash_attn_with_kvcache" and not cache.packed and len(set(new)) > 1:
            yield "new rows that differ in number are packed"
        if cache.rotary_dim and (cache.rotary_dim % 16 or cache.rotary_dim > spec.head_dim):
            yield "rotary_dim is a multiple of 16, at most head_dim"
        if cache.rotary_starts and not cache.rotary_dim:
            yield "rotary_starts without rotary_dim"
        if cache.indexed and spec.page_size is not None:
            yield "an index of pages is their table"
        if cache.one_length and not (cache.new is None and spec.seqused_k and len(set(lengths)) == 1):
            yield "one length for all sequences"
        if self.call == "append_kv" and cache.leftpad:
            yield "append_kv knows no padding"
        if cache.codes is not None and (self.call != "append_kv" or spec.head_dim % 16 or spec.head_dim_v % 16):
            yield "rows of codes are multiples of 16 bytes, and append_kv alone writes them"
        if (cache.copied or cache.one_descale) and cache.codes is None:
            yield "codes go to caches of codes, and only those have descales"
        if cache.copied and (cache.rotary_dim or cache.one_descale):
            yield "codes that are copied neither rotate nor have descales"

    def _unserved(self) -> str | None:
        """Why the table has no kernel."""
        try:
            for problem in self._problems():
                sms = self.machine.num_sms or described(self.machine.arch, torch.device("meta")).num_sms
                TABLE.choose(problem, self._family, sms, self.num_splits)
        except (UnsupportedKeyError, Fa3ArchError, Fp8Error) as error:
            return str(error)
        return None

    @property
    def _family(self) -> str | None:
        return _FAMILIES.get(self.call, self.family)

    def _problems(self) -> Iterator[AttentionProblem]:
        """What the table is asked."""
        if self.call != "Fa2BwdRequest":
            yield problem_of_spec(
                self.spec,
                self.machine.arch,
                num_splits=self.num_splits or 1,
                seqlen_k_per_split=self.seqlen_k_per_split,
                pack_gqa=self.pack_gqa,
                promote_every=self.promote_every,
                persistent=PersistentMode(self.persistent),
                cache_batch_idx=self.cache.indexed,
                cache_leftpad=self.cache.leftpad is not None,
            )
        if self.backward or self.call == "Fa2BwdRequest":
            yield problem_of_spec(
                self.spec,
                self.machine.arch,
                direction=Direction.BACKWARD,
                deterministic=self.deterministic,
                lse_gradient=self.lse_gradient,
                slopes_gradient=self.slopes_gradient,
            )

    def to_json(self) -> str:
        return json.dumps(_fields(self))

    @classmethod
    def from_json(cls, text: str) -> Problem:
        """Raises ArgumentError for what is no problem."""
        try:
            return _made(cls, json.loads(text))
        except (ValueError, TypeError, AttributeError) as error:
            raise ArgumentError(f"{text!r} is no problem: {error}") from None


# Types of fields that JSON does not have.
_KINDS = {"machine": Machine, "spec": InputSpec, "cache": CacheSpec, "arch": SmArch}
_KINDS |= dict.fromkeys(("dtype", "dtype_k", "dtype_v"), DType)


def _fields(value: Any) -> Any:
    """Those that differ from their defaults, in JSON's types."""
    if isinstance(value, Enum):
        return value.value
    if not dataclasses.is_dataclass(value):
        return value
    changed = (f for f in dataclasses.fields(value) if getattr(value, f.name) != f.default)
    return {f.name: _fields(getattr(value, f.name)) for f in changed}


def _made(kind: type, fields: dict[str, Any]) -> Any:
    values = {}
    for name, value in fields.items():
        inner = _KINDS.get(name)
        if isinstance(value, dict):
            value = _made(inner, value)
        elif inner is not None:
            value = inner(value)
        values[name] = tuple(value) if isinstance(value, list) else value
    return kind(**values)


def changed(problem: Problem, **changes: Any) -> Problem:
    """With other fields, of the problem itself, or of its spec, cache or machine."""
    own = {f.name for f in dataclasses.fields(Problem)}
    for part in ("spec", "cache", "machine"):
        value = getattr(problem, part)
        names = {f.name for f in dataclasses.fields(value)} - own
        inner = {name: changes.pop(name) for name in list(changes) if name in names}
        problem = replace(problem, **{part: replace(value, **inner)})
    return replace(problem, **changes)
