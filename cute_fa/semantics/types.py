"""Plain data types that every package of the project shares: architectures, dtypes, mask kinds. No torch, no DSL."""

from __future__ import annotations

from enum import Enum

from cute_fa.semantics.errors import ArgumentError, DeviceError


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

    @classmethod
    def named(cls, name: str | SmArch) -> SmArch:
        """The architecture of a name such as ``sm_90a``; raises ArgumentError for others."""
        try:
            return cls(name)
        except ValueError:
            raise ArgumentError(f"arch={name!r}: one of {', '.join(arch.value for arch in cls)}") from None

    @classmethod
    def of_capability(cls, major: int, minor: int) -> SmArch:
        """The target for a GPU's compute capability; raises DeviceError for one that no kernel is built for.

        Code for a target with the suffix "a" runs on that very capability alone: sm_120a's not on 12.1.
        """
        for arch in cls:
            if arch.number == 10 * major + minor:
                return arch
        raise DeviceError(f"compute capability {major}.{minor}: kernels exist for {', '.join(a.value for a in cls)}")


class DType(Enum):
    """Element type of q, k and v; the value is the token used in kernel names. int8 is of k and v alone."""

    FP16 = "fp16"
    BF16 = "bf16"
    E4M3 = "e4m3"
    E5M2 = "e5m2"
    INT8 = "int8"

    @property
    def bytes(self) -> int:
        return 1 if self.is_codes else 2

    @property
    def is_fp8(self) -> bool:
        return self in (DType.E4M3, DType.E5M2)

    @property
    def is_codes(self) -> bool:
        """Whether a value is code × descale: fp8, int8."""
        return self.is_fp8 or self is DType.INT8


class Direction(Enum):
    """What a kernel computes; the value is the token used in kernel names."""

    FORWARD = "fwd"
    BACKWARD = "bwd"
    APPEND = "append"
    PLAN = "plan"


class MaskKind(Enum):
    """The shape of the visible region; the value is the token used in tables."""

    NONE = "none"
    CAUSAL = "causal"
    SLIDING = "sliding"
    SLIDING_CAUSAL = "sliding-causal"


class PositionBias(Enum):
    """What is added to the scores by distance."""

    NONE = "none"
    ALIBI = "alibi"


class KvLayout(Enum):
    """Order of the dimensions of a page in memory: N tokens, H kv heads, D head_dim."""

    NHD = "nhd"
    HND = "hnd"


class PersistentMode(Enum):
    """How a kernel's CTAs get their tiles: as its heuristic chooses, one tile each, or a persistent loop."""

    AUTO = "auto"
    OFF = "off"
    ON = "on"

    @classmethod
    def named(cls, name: str | PersistentMode) -> PersistentMode:
        """The mode of a name, "auto", "off" or "on"; raises ArgumentError for others."""
        try:
            return cls(name)
        except ValueError:
            raise ArgumentError(f"persistent={name!r}: one of {', '.join(mode.value for mode in cls)}") from None
