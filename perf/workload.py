"""The attention problems that a sweep times: the grid, and what each costs at least in arithmetic and in traffic."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from cute_fa.semantics.errors import ArgumentError
from cute_fa.semantics.ranges import HostRanges
from cute_fa.semantics.types import Direction, DType
from cute_fa.semantics.visibility import visible_keys, visible_pairs
from cute_fa.tools.inputs import Inputs, InputSpec, make_inputs
from perf.plans import PLANS, keys_of

LENGTHS = ("dense", "equal", "uniform", "skewed")
_SHORTEST_SKEWED = 16


@dataclass(frozen=True)
class Workload:
    """One problem to time, of as many sequences as make ``tokens``.

    ``seqlen``: the longest sequence's length; ``decode``: the last ``query_tokens`` queries of each sequence, over a
    cache of that many keys, else as many queries as keys. ``dtype_kv``: an fp8 cache's beside q in ``dtype``.
    ``window``: keys that a query sees to its left, and to its right unless causal. ``lengths``:

    - ``dense``: all of one length, with a batch dimension;
    - ``equal``: all of one length, packed (decode: with seqused_k);
    - ``uniform``: packed, uniform in 1 … seqlen;
    - ``skewed``: packed, log-uniform in 16 … seqlen, so that few sequences hold most of the tokens.

    The last drawn sequence is cut so that the tokens are exactly as many as asked for. ``page_size``: K and V in pages.
    ``plan``: what is visible, by name in ``perf.plans``, of one sequence. ``deterministic``: gradients with the same
    bits in every run; predicted (``perf.predict``), not timed.
    """

    direction: Direction = Direction.FORWARD
    dtype: DType = DType.BF16
    head_dim: int = 128
    head_dim_v: int = 128
    heads: int = 16
    heads_kv: int = 16
    seqlen: int = 4096
    tokens: int = 16384
    causal: bool = False
    window: int | None = None
    lengths: str = "dense"
    page_size: int | None = None
    decode: bool = False
    query_tokens: int = 1
    dtype_kv: DType | None = None
    plan: str | None = None
    deterministic: bool = False

    def __post_init__(self):
        if self.lengths not in LENGTHS:
            raise ArgumentError(f"lengths={self.lengths!r}: one of {', '.join(LENGTHS)}")
        if not 1 <= self.seqlen <= self.tokens:
            raise ArgumentError(f"seqlen={self.seqlen}: between 1 and tokens={self.tokens}")
        if self.decode and self.direction is Direction.BACKWARD:
            raise ArgumentError("decode backward: a cache has no gradient")
        if not 1 <= self.query_tokens <= (self.seqlen if self.decode else 1):
            raise ArgumentError(f"query_tokens={self.query_tokens}: between 1 and seqlen={self.seqlen}, of a decode")
        if self.dtype_kv is not None and (not self.dtype_kv.is_fp8 or self.direction is Direction.BACKWARD):
            raise ArgumentError(f"dtype_kv={self.dtype_kv.value!r} {self.direction.value}: an fp8 cache's, forward")
        if self.deterministic and self.direction is not Direction.BACKWARD:
            raise ArgumentError("deterministic forward: it is so anyway")
        if self.page_size is not None and self.direction is Direction.BACKWARD:
            raise ArgumentError(f"page_size={self.page_size} backward: a cache has no gradient")
        if self.plan is not None:
            if self.plan not in PLANS:
                raise ArgumentError(f"plan={self.plan!r}: one of {', '.join(PLANS)}")
            one = (self.seqlen, False, None, "dense", None, False, None)
            asked = (self.tokens, self.causal, self.window, self.lengths, self.page_size, self.decode, self.dtype_kv)
            if asked != one:
                raise ArgumentError(f"plan={self.plan!r}: of one sequence, and nothing else says what is visible")

    @cached_property
    def lengths_k(self) -> tuple[int, ...]:
        """Every sequence's length; the same on every machine."""
        if self.lengths in ("dense", "equal"):
            return (self.seqlen,) * (self.tokens // self.seqlen)
        shortest = min(_SHORTEST_SKEWED, self.seqlen)
        drawn, left, rng = [], self.tokens, np.random.default_rng(self.seqlen)
        while left:
            if self.lengths == "uniform":
                length = int(rng.integers(1, self.seqlen + 1))
            else:
                length = round(float(np.exp(rng.uniform(np.log(shortest), np.log(self.seqlen)))))
            # the longest comes first: where the draw is cut, some sequence has the length that names the problem
            drawn.append(min(length if drawn else self.seqlen, left))
            left -= drawn[-1]
        return tuple(drawn)

    @cached_property
    def ranges(self) -> HostRanges | None:
        """The plan."""
        return None if self.plan is None else PLANS[self.plan](self.tokens)

    @property
    def batch(self) -> int:
        return len(self.lengths_k)

    @property
    def lengths_q(self) -> tuple[int, ...]:
        return (self.query_tokens,) * self.batch if self.decode else self.lengths_k

    @property
    def window_size(self) -> tuple[int | None, int | None]:
        """(left, right), None where infinite; causal folded in. A decoded query sees nothing to its right."""
        ends = self.causal or (self.decode and (self.window is not None or self.query_tokens > 1))
        return self.window, 0 if ends else self.window

    def spec(self) -> InputSpec:
        """What makes the tensors."""
        packed, paged = self.lengths != "dense", self.page_size is not None
        return InputSpec(
            batch=self.batch,
            seqlen_q=max(self.lengths_q),
            seqlen_k=max(self.lengths_k),
            heads=self.heads,
            heads_kv=self.heads_kv,
            head_dim=self.head_dim,
            head_dim_v=self.head_dim_v,
            dtype=self.dtype,
            dtype_k=self.dtype_kv,
            dtype_v=self.dtype_kv,
            descales=False,  # the peers are given none
            causal=self.causal,
            window=self.window_size,
            varlen_q=packed and not self.decode,
            varlen_k=packed and not self.decode and not paged,
            seqused_k=packed and self.decode and not paged,
            page_size=self.page_size,
            lengths_q=self.lengths_q if packed and not self.decode else None,
            lengths_k=self.lengths_k if packed or paged else None,
            ranges=0 if self.ranges is None else len(self.ranges),
        )

    def inputs(self, kind: str, seed: int = 0, device: str = "cpu") -> Inputs:
        """Tensors of the ``kind`` of make_inputs, nothing but zeros outside the lengths."""
        return make_inputs(self.spec(), kind, seed, poison=False, device=device, plan=self.ranges)

    @cached_property
    def work(self) -> Work:
        """What the problem costs at least.

        Arithmetic as FlashAttention counts it, with every visible pair of query and key counted exactly (causal: about
        half): two products forward, 2·heads·pairs·(head_dim + head_dim_v); five backward, where Q·Kᵀ is computed again,
        2·heads·pairs·(3·head_dim + 2·head_dim_v). Traffic: each element that matters moved once: q, k, v, o; backward
        q, k, v, o, dO and the fp32 LSE read, dq, dk, dv written. Keys that no query sees do not count.
        """
        pairs, keys = (0, 0) if self.ranges is None else (self.ranges.area(), keys_of(self.ranges))
        sequences = zip(self.lengths_q, self.lengths_k, strict=True) if self.ranges is None else ()
        for lengths, count in _counted(sequences):
            pairs += count * visible_pairs(*lengths, *self.window_size)
            keys += count * visible_keys(*lengths, *self.window_size)
        queries = sum(self.lengths_q)
        size, out_size = self.dtype.bytes, 2
        q, o = queries * self.heads * self.head_dim, queries * self.heads * self.head_dim_v
        kv = keys * self.heads_kv * (self.head_dim + self.head_dim_v)
        if self.direction is Direction.FORWARD:
            flops = 2 * self.heads * pairs * (self.head_dim + self.head_dim_v)
            return Work(pairs, flops, q * size + kv * (self.dtype_kv or self.dtype).bytes + o * out_size)
        flops = 2 * self.heads * pairs * (3 * self.head_dim + 2 * self.head_dim_v)
        return Work(pairs, flops, 2 * (q + kv) * size + 2 * o * out_size + 4 * queries * self.heads)

    def columns(self) -> dict[str, Any]:
        """What names the problem in a table of results."""
        left, right = self.window_size
        return {
            "direction": self.direction.value,
            "dtype": self.dtype.value,
            "dtype_kv": (self.dtype_kv or self.dtype).value,
            "head_dim": self.head_dim,
            "head_dim_v": self.head_dim_v,
            "heads": self.heads,
            "heads_kv": self.heads_kv,
            "phase": "decode" if self.decode else "prefill",
            "query_tokens": self.query_tokens,
            "seqlen_q": max(self.lengths_q),
            "seqlen_k": self.seqlen,
            "batch": self.batch,
            "tokens": self.tokens,
            "causal": self.causal,
            "window_left": left,
            "window_right": right,
            "lengths": self.lengths,
            "page_size": self.page_size,
            "plan": self.plan,
        }

    def __str__(self) -> str:
        return problem_name(self.columns()) + (" deterministic" if self.deterministic else "")


def problem_name(columns: Mapping[str, Any]) -> str:
    """One line for a problem's columns."""
    lengths = f"{columns['batch']}×{columns['seqlen_k']}"
    return f"{columns['direction']} {columns['dtype']} {lengths} {configuration_name(columns)}"


def configuration_name(columns: Mapping[str, Any]) -> str:
    """What problems of different lengths have in common; what is at its usual value is left out."""
    decode, planned = columns["phase"] == "decode", not pd.isna(columns["plan"])
    value = f"v{columns['head_dim_v']}" if columns["head_dim_v"] != columns["head_dim"] else ""
    parts = [
        "decode" if decode else "",
        f"of {columns['query_tokens']}" if columns["query_tokens"] > 1 else "",
        f"d{columns['head_dim']}{value} h{columns['heads']}/{columns['heads_kv']}",
        "" if decode or planned else "causal" if columns["causal"] else "full",
        columns["plan"] if planned else "",
        "" if pd.isna(columns["window_left"]) else f"window {columns['window_left']}",
        "" if columns["lengths"] == "dense" else columns["lengths"],
        "" if pd.isna(columns["page_size"]) else f"pages of {columns['page_size']}",
        f"cache in {columns['dtype_kv']}" if columns["dtype_kv"] != columns["dtype"] else "",
    ]
    return " ".join(filter(None, parts))


class Work(NamedTuple):
    """``pairs`` of query and key that are visible, over the batch and for one head; ``flops``; ``bytes``."""

    pairs: int
    flops: int
    bytes: int


def _counted(pairs: Iterable[tuple[int, int]]) -> Iterator[tuple[tuple[int, int], int]]:
    """Each different pair and how often it comes."""
    ordered = sorted(pairs)
    return ((pair, len(list(group))) for pair, group in itertools.groupby(ordered))


def grid(**choices: Iterable[Any]) -> list[Workload]:
    """The workloads of all combinations of these values of fields; ``head_dims`` and ``heads`` are pairs: (head_dim,
    head_dim_v), (heads, heads_kv). What means nothing is left out: gradients of a cache, sequences longer than the
    tokens, causal masks when decoding, a number of queries when not, or beyond the keys, a window that is no bound, a
    cache's dtype that is q's, and masks beside a plan, whose tokens are its seqlen."""
    workloads = []
    for values in itertools.product(*choices.values()):
        fields = dict(zip(choices, values, strict=True))
        if "head_dims" in fields:
            fields["head_dim"], fields["head_dim_v"] = fields.pop("head_dims")
        if "heads" in fields:
            fields["heads"], fields["heads_kv"] = fields["heads"]
        if fields.get("plan") is not None:
            fields["tokens"] = fields["seqlen"]
        if _means_something(**fields):
            workloads.append(Workload(**fields))
    return workloads


def _means_something(*, seqlen: int, tokens: int, **fields: Any) -> bool:
    decode, window = fields.get("decode", False), fields.get("window")
    masked = decode or window is not None or fields.get("causal", False)
    stored = fields.get("page_size") is not None or fields.get("lengths", "dense") != "dense"
    dtype_kv, query_tokens = fields.get("dtype_kv"), fields.get("query_tokens", 1)
    cached = decode or fields.get("page_size") is not None or dtype_kv is not None
    return not (
        seqlen > tokens
        or (fields.get("plan") is not None and (masked or stored or dtype_kv is not None))
        or (cached and fields.get("direction") is Direction.BACKWARD)
        or (decode and fields.get("causal", False))
        or query_tokens > (seqlen if decode else 1)
        or (dtype_kv is not None and dtype_kv is fields.get("dtype"))
        or (window is not None and window >= seqlen - 1)
    )
