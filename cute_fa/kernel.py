"""What a kernel class of an arch folder offers, and the two data types that pass between it and the package.

The path of a call: ``AttentionProblem`` (what is asked) → kernel class (who serves it) → ``KernelConfig`` (how it is
built: everything that shapes the machine code and nothing else) → compiled kernel (``cute_fa.compiler``) → launch
with the argument tuple that the kernel class packs from ``AttentionTensors``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from cute_fa.types import Direction, SmArch

if TYPE_CHECKING:
    import torch

    from cute_fa.problem import AttentionProblem


class AttentionTensors(NamedTuple):
    """The tensors of one call, as the caller laid them out; absent features are None.

    Dense: q (batch, seqlen_q, heads, head_dim), k (batch, seqlen_k, heads_kv, head_dim), v (…, head_dim_v), out
    (batch, seqlen_q, heads, head_dim_v), lse fp32 (batch, heads, seqlen_q). With ``cu_seqlens_q`` q and out are
    (total_q, heads, …) and lse is (heads, total_q); with ``cu_seqlens_k`` k and v are (total_k, heads_kv, …).
    ``cu_seqlens_*`` int32 (batch + 1), ``seqused_*`` int32 (batch), ``page_table`` int32 (batch, max_pages),
    ``alibi_slopes`` fp32 (heads) or (batch, heads), ``learnable_sink`` fp32 (heads).
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor
    cu_seqlens_q: torch.Tensor | None
    cu_seqlens_k: torch.Tensor | None
    seqused_q: torch.Tensor | None
    seqused_k: torch.Tensor | None
    page_table: torch.Tensor | None
    alibi_slopes: torch.Tensor | None
    learnable_sink: torch.Tensor | None


@dataclass(frozen=True)
class KernelConfig(ABC):
    """Everything that shapes the machine code of one kernel: frozen, hashable, printable; the compile cache's key."""

    arch: SmArch

    @property
    @abstractmethod
    def compile_name(self) -> str:
        """Name of the compiled kernel: flags only, never run-time values; unique among configs of one source tree
        up to the tuning fields (tiles, stages), which the cache key holds besides."""

    @abstractmethod
    def build(self) -> tuple[Any, tuple]:
        """The ``cute.jit`` callable and its fake arguments, for ``cute.compile(fn, *args)``. Imports the DSL."""


class AttentionKernel(ABC):
    """A kernel family's entry point; one class a kernel, named by ``cute_fa.dispatch``."""

    family: ClassVar[str]
    direction: ClassVar[Direction]

    @classmethod
    @abstractmethod
    def supports(cls, problem: AttentionProblem) -> list[str]:
        """Reasons why this kernel does not serve the problem; empty if it does."""

    @classmethod
    @abstractmethod
    def configure(cls, problem: AttentionProblem) -> KernelConfig:
        """The heuristic: which tiles, stages and flags serve this problem."""

    @classmethod
    @abstractmethod
    def arguments(cls, problem: AttentionProblem, tensors: AttentionTensors, num_sms: int) -> tuple:
        """Run-time arguments in the order of ``KernelConfig.build()``: torch tensors, numbers, nested tuples, None.

        ``num_sms``: SMs of the device, which a persistent kernel launches its CTAs by."""
