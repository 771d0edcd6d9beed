"""In the place of LA Flash's ``kernel_utils``: range attention for NVIDIA LocateAnything's decoder.

``range_attention`` has its signature, and ``plan_attention`` takes the dictionary that the decoder makes for each step:
``q_ranges``, ``k_ranges``, ``attn_type_map`` and, if they are there, ``segment_offsets``, ``group_q_ranges``,
``group_attn_type_map`` and what says that it is packed sequences. Types are 0 (full) and 1 (causal, bottom right).
Unlike there, key segments that overlap count once, and queries that see nothing give 0 instead of an error.

``LA_FLASH_…`` variables are read once, at the first call: see ``Settings``.
"""

from __future__ import annotations

import os
from collections import deque
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

from cute_fa.api.attention import flash_attn_varlen_func
from cute_fa.api.range_plan import RangePlan
from cute_fa.api.ranges import range_attention as attention_over_ranges
from cute_fa.engine import worlds
from cute_fa.engine.environment import switch
from cute_fa.semantics.errors import ArgumentError, DeviceError
from cute_fa.semantics.ranges import CAUSAL, FULL, HostRanges

if TYPE_CHECKING:
    from collections.abc import MutableMapping

_ON = ("", "auto", "1", "on", "true", "yes", "force")
_OFF = ("0", "off", "false", "no")
_GROUPS = ("segment_offsets", "group_q_ranges", "group_attn_type_map")
_SEQUENCES = ("flash_cu_seqlens_q", "flash_cu_seqlens_k", "flash_causal")
_BUILT = "cute_fa_range_plan"  # in a plan's dictionary: what was built of it
_REMEMBERED_CALLS = 4096


@dataclass(frozen=True)
class Settings:
    """What the environment asks for. Values are compared without case and blanks around them; a switch is on for the
    empty string, auto, 1, on, true, yes and force, and off for 0, off, false and no.

    attention (``LA_FLASH_ATTN``): "la_flash", these kernels, the default, since a decoder that wants others does not
        call this module; or "sdpa", PyTorch's scaled_dot_product_attention with the plan's dense mask.
    fastpath (``LA_FLASH_FASTPATH``, on by default): a plan that comes with ``flash_cu_seqlens_q``,
        ``flash_cu_seqlens_k`` and ``flash_causal`` is one call of packed sequences; off: its ranges count.
    segment_fastpath (``LA_FLASH_SEGMENT_FASTPATH``, on by default): ranges run on these kernels; off: as with "sdpa".
    plan_stats (``LA_FLASH_PLAN_STATS``, 0 or 1, by default 0): each call's plan is counted, see ``plan_stats``.

    ``LA_FLASH_DENSE_BACKEND`` says what attends where the decoder has no plan. Such calls do not come here: "sdpa", the
    default, is the one value that is taken.
    """

    attention: str = "la_flash"
    fastpath: bool = True
    segment_fastpath: bool = True
    plan_stats: bool = False

    @classmethod
    def from_environment(cls) -> Settings:
        """Raises ArgumentError for a value that there is not."""
        attention, dense = _named("LA_FLASH_ATTN", "la_flash"), _named("LA_FLASH_DENSE_BACKEND", "sdpa")
        if attention not in ("la_flash", "sdpa"):
            raise ArgumentError(f"LA_FLASH_ATTN={attention!r}: la_flash or sdpa")
        if dense != "sdpa":
            raise ArgumentError(f"LA_FLASH_DENSE_BACKEND={dense!r}: sdpa alone, calls without a plan do not come here")
        return cls(
            attention,
            _is_on("LA_FLASH_FASTPATH"),
            _is_on("LA_FLASH_SEGMENT_FASTPATH"),
            switch("LA_FLASH_PLAN_STATS", default=False),
        )


def _named(name: str, default: str) -> str:
    return os.environ.get(name, "").strip().lower() or default


def _is_on(name: str) -> bool:
    value = _named(name, "auto")
    if value not in _ON + _OFF:
        raise ArgumentError(f"{name}={value!r}: on is one of {', '.join(_ON[1:])}, off one of {', '.join(_OFF)}")
    return value in _ON


@cache
def settings() -> Settings:
    """Those of this process, read when they are first needed; ``settings.cache_clear()`` has them read again."""
    return Settings.from_environment()


class CallStats(NamedTuple):
    """Of one call's plan. how: "sequences" (packed ones, by the fast path), "ranges" or "sdpa"; ranges: how many;
    q_tokens, k_tokens: sums of their lengths; max_q_len, max_k_len; full_ranges, causal_ranges; area: visible pairs,
    and density, their share of all."""

    how: str
    ranges: int
    q_tokens: int
    k_tokens: int
    max_q_len: int
    max_k_len: int
    full_ranges: int
    causal_ranges: int
    area: int
    density: float


_calls: deque[CallStats] = deque(maxlen=_REMEMBERED_CALLS)


def plan_stats() -> list[CallStats]:
    """Of the calls since ``reset_plan_stats``, the last 4096 at most, where ``LA_FLASH_PLAN_STATS=1``: the host then
    waits for each call's ranges, and calls cannot be captured in a CUDA graph."""
    return list(_calls)


def reset_plan_stats() -> None:
    """Forget the statistics of all calls."""
    _calls.clear()


def is_available() -> bool:
    """Whether there is something to run these kernels on: a GPU that they are for, or a simulation."""
    if worlds.simulated_arch() is not None:
        return True
    if not torch.cuda.is_available():
        return False
    try:
        worlds.arch_of(torch.device("cuda", torch.cuda.current_device()))
    except DeviceError:
        return False
    return True


def range_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_ranges: torch.Tensor | None,
    k_ranges: torch.Tensor,
    attn_type_map: torch.Tensor | None,
    softmax_scale: float,
    *,
    segment_offsets: torch.Tensor | None = None,
    group_q_ranges: torch.Tensor | None = None,
    group_attn_type_map: torch.Tensor | None = None,
    max_q_len: int | None = None,
    max_k_len: int | None = None,
    flash_cu_seqlens_q: torch.Tensor | None = None,
    flash_cu_seqlens_k: torch.Tensor | None = None,
    flash_causal: bool | None = None,
    disjoint_q_ranges: bool | None = None,
) -> torch.Tensor:
    """``kernel_utils.range_attention``: q (total_q, heads, head_dim), k and v (total_k, heads_kv, head_dim), fp16 or
    bf16, and int32 tensors of the same device.

    Range r shows queries q_ranges[r] the keys k_ranges[r] by attn_type_map[r]. With all three of segment_offsets,
    group_q_ranges and group_attn_type_map, queries group_q_ranges[g] see the key segments segment_offsets[g] up to
    segment_offsets[g + 1] of k_ranges by group_attn_type_map[g]. max_q_len, max_k_len: of the longest packed sequence.
    disjoint_q_ranges is not needed.

    The plan is made in each call, ``plan_attention`` makes it once for all layers. Returns (total_q, heads, head_dim)
    in q's dtype; raises subclasses of ``cute_fa.errors.CuteFaError``, which are RuntimeErrors.
    """
    plan = {
        "q_ranges": q_ranges,
        "k_ranges": k_ranges,
        "attn_type_map": attn_type_map,
        "segment_offsets": segment_offsets,
        "group_q_ranges": group_q_ranges,
        "group_attn_type_map": group_attn_type_map,
        "max_q_len": max_q_len,
        "max_k_len": max_k_len,
        "flash_cu_seqlens_q": flash_cu_seqlens_q,
        "flash_cu_seqlens_k": flash_cu_seqlens_k,
        "flash_causal": flash_causal,
    }
    return plan_attention(q, k, v, plan, softmax_scale)


def plan_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: MutableMapping[str, Any], softmax_scale: float
) -> torch.Tensor:
    """``range_attention`` with the plan as a dictionary of its arguments, in which the built plan is kept for the
    other layers: its tensors may not change afterwards. A dictionary without groups may have ``segment_offsets``
    (len(q_ranges) + 1) of its q_ranges."""
    asked = settings()
    how = _how(asked, plan)
    if asked.plan_stats:
        _calls.append(_stats_of(how, _built(plan, q, k)))
    if how == "sequences":
        return _over_sequences(q, k, v, plan, softmax_scale)
    if how == "ranges":
        out: Any = attention_over_ranges(q, k, v, plan=_built(plan, q, k), softmax_scale=softmax_scale)
        return out
    return _with_mask(q, k, v, _built(plan, q, k).mask(), softmax_scale)


def _how(asked: Settings, plan: MutableMapping[str, Any]) -> str:
    """What runs: "sequences", "ranges" or "sdpa"."""
    if asked.attention == "sdpa":
        return "sdpa"
    if asked.fastpath and all(plan.get(name) is not None for name in _SEQUENCES):
        return "sequences"
    return "ranges" if asked.segment_fastpath else "sdpa"


def _built(plan: MutableMapping[str, Any], q: torch.Tensor, k: torch.Tensor) -> RangePlan:
    """What was built of a dictionary, at the latest now."""
    if _BUILT not in plan:
        offsets, q_ranges, types = (plan.get(name) for name in _GROUPS)
        if any(given is None for given in (offsets, q_ranges, types)):
            q_ranges, types = plan.get("q_ranges"), plan.get("attn_type_map")
            # beside ranges that have a key range each, offsets say which of them have the same queries
            if offsets is not None and q_ranges is not None and len(offsets) != len(q_ranges) + 1:
                offsets = None
        ranges = q_ranges, plan.get("k_ranges"), types
        plan[_BUILT] = RangePlan.build(*ranges, total_q=len(q), total_k=len(k), segment_offsets=offsets)
    return plan[_BUILT]


def _over_sequences(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: MutableMapping[str, Any], softmax_scale: float
) -> torch.Tensor:
    cu_seqlens_q, cu_seqlens_k, causal = (plan[name] for name in _SEQUENCES)
    longest = plan.get("max_q_len"), plan.get("max_k_len")
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, *longest, softmax_scale=softmax_scale, causal=causal
    )


def _with_mask(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, softmax_scale: float
) -> torch.Tensor:
    """PyTorch's attention, in which queries without keys are 0 as in ours."""
    q, k, v = (tensor.transpose(0, 1)[None] for tensor in (q, k, v))
    out = scaled_dot_product_attention(q, k, v, mask, scale=softmax_scale, enable_gqa=True)
    return out[0].transpose(0, 1).where(mask.any(1)[:, None, None], 0.0).contiguous()


def _stats_of(how: str, plan: RangePlan) -> CallStats:
    q_ranges, k_ranges, types = (tensor.cpu().numpy() for tensor in (plan.q_ranges, plan.k_ranges, plan.types))
    host = HostRanges(q_ranges, k_ranges, types, plan.total_q, plan.total_k)
    q_lengths, k_lengths = (ranges[:, 1] - ranges[:, 0] for ranges in (host.q_ranges, host.k_ranges))
    area = host.area()
    return CallStats(
        how,
        len(host),
        int(q_lengths.sum()),
        int(k_lengths.sum()),
        int(q_lengths.max(initial=0)),
        int(k_lengths.max(initial=0)),
        int((host.types == FULL).sum()),
        int((host.types == CAUSAL).sum()),
        area,
        area / max(host.total_q * host.total_k, 1),
    )
