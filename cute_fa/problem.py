"""``AttentionProblem``: one attention problem, validated once, holding every semantic choice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cute_fa.errors import WindowError
from cute_fa.types import Direction, DType, MaskKind, PositionBias, SmArch


def normalize_window(window_size: Any, causal: bool) -> tuple[int | None, int | None]:
    """(left, right) with None for infinite, causal folded in as right = min(right, 0).

    −1 (FA2, FA3) and None (FA4) are infinite; other negative bounds raise. (−1, 0) is causal, in every convention.
    """
    if window_size is None:
        window_size = (None, None)
    if not isinstance(window_size, (tuple, list)) or len(window_size) != 2:
        raise WindowError(f"window_size={window_size!r}: a pair (left, right) is needed")
    left, right = (_bound(side, bound) for side, bound in zip(("left", "right"), window_size, strict=True))
    return left, 0 if causal else right


def _bound(side: str, bound: Any) -> int | None:
    if bound is None:
        return None
    if isinstance(bound, bool) or not isinstance(bound, int):
        raise WindowError(f"window_size {side}={bound!r}: a bound is an int, or None or −1 for infinite")
    if bound < -1:
        raise WindowError(f"window_size {side}={bound}: a bound is ≥ 0, or None or −1 for infinite")
    return None if bound == -1 else bound


@dataclass(frozen=True)
class AttentionProblem:
    """What is asked of a kernel: shapes, dtypes and every semantic choice; made by :meth:`AttentionProblem.make`-like
    helpers of the API, the only place where window conventions, scales and layouts are normalised.

    ``window_left`` and ``window_right`` are None where infinite, and causal is folded in (``window_right == 0``).
    ``seqlen_q`` and ``seqlen_k`` are the longest lengths: ``max_seqlen_*`` for varlen.
    """

    arch: SmArch
    dtype: DType
    batch: int
    seqlen_q: int
    seqlen_k: int
    num_heads: int
    num_heads_kv: int
    head_dim: int
    head_dim_v: int
    softmax_scale: float
    window_left: int | None = None
    window_right: int | None = None
    sink_tokens: int = 0
    softcap: float = 0.0
    alibi: bool = False
    learnable_sink: bool = False
    varlen_q: bool = False
    varlen_k: bool = False
    seqused_q: bool = False
    seqused_k: bool = False
    page_size: int | None = None
    num_splits: int = 1
    direction: Direction = Direction.FORWARD
    out_dtype: DType | None = None

    @property
    def causal(self) -> bool:
        return self.window_right == 0

    @property
    def gqa_ratio(self) -> int:
        return self.num_heads // self.num_heads_kv

    @property
    def mask_kind(self) -> MaskKind:
        sliding = self.window_left is not None or self.window_right not in (None, 0)
        if sliding:
            return MaskKind.SLIDING_CAUSAL if self.causal else MaskKind.SLIDING
        return MaskKind.CAUSAL if self.causal else MaskKind.NONE

    @property
    def position_bias(self) -> PositionBias:
        return PositionBias.ALIBI if self.alibi else PositionBias.NONE
