"""Plain data types that every package of the project shares: architectures, dtypes, mask kinds. No torch, no DSL."""

from __future__ import annotations

from enum import Enum


class SmArch(Enum):
    """A GPU architecture that kernels are compiled for; the value is the DSL's and ptxas's target name."""

    SM_80 = "sm_80"
    SM_86 = "sm_86"
    SM_89 = "sm_89"
    SM_90A = "sm_90a"
    SM_100A = "sm_100a"
    SM_103A = "sm_103a"
    SM_120A = "sm_120a"

    @property
    def number(self) -> int:
        """Compute capability as one number: 80, 90, 100 …"""
        return int(self.value.removeprefix("sm_").rstrip("a"))

    @property
    def short(self) -> str:
        """The form used in kernel names: ``sm90a``."""
        return self.value.replace("_", "")

    @property
    def smem_bytes(self) -> int:
        """Dynamic shared memory that one CTA may use, in bytes (CUDA programming guide, technical specifications)."""
        return {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99}[self.number] * 1024

    @property
    def has_wgmma(self) -> bool:
        """WGMMA exists on sm_90a alone: sm_100 replaced it by tcgen05."""
        return self is SmArch.SM_90A


class DType(Enum):
    """Element type of q, k and v; the value is the token used in kernel names."""

    FP16 = "fp16"
    BF16 = "bf16"
    E4M3 = "e4m3"
    E5M2 = "e5m2"

    @property
    def bytes(self) -> int:
        return 1 if self in (DType.E4M3, DType.E5M2) else 2


class Direction(Enum):
    FORWARD = "fwd"
    BACKWARD = "bwd"


class MaskKind(Enum):
    """The shape of the visible region; the value is the token used in tables."""

    NONE = "none"
    CAUSAL = "causal"
    SLIDING = "sliding"
    SLIDING_CAUSAL = "sliding-causal"


class PositionBias(Enum):
    NONE = "none"
    ALIBI = "alibi"
