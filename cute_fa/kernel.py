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


# Device code adds positions and bounds in int32: sequences are at most this long, larger bounds are clamped to it.
MAX_BOUND = 2**30 - 1
# c·tanh(s/c) is computed as c − 2c/(1 + e^(2s/c)), whose rounding error of c·6e-8 must stay below the LSE's tolerance.
MAX_SOFTCAP = 2.0**13


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


def forward_objections(problem: AttentionProblem) -> list[str]:
    """Reasons that all forward kernels share: what none of them computes, and limits of the common device code."""
    reasons = []
    if problem.num_splits > 1:
        reasons.append(f"num_splits {problem.num_splits}: this kernel does not split the keys")
    if problem.out_dtype is not None and problem.out_dtype is not problem.dtype:
        reasons.append(f"out_dtype {problem.out_dtype.value}: the output has the input's dtype")
    if max(problem.seqlen_q, problem.seqlen_k) > MAX_BOUND:
        reasons.append(f"a sequence longer than {MAX_BOUND}: positions are int32")
    if problem.softcap > MAX_SOFTCAP:
        reasons.append(f"softcap {problem.softcap:g}: at most {MAX_SOFTCAP:g}, beyond it scores lose precision")
    return reasons


def window_arguments(problem: AttentionProblem) -> tuple[int | None, int | None, int | None]:
    """The run-time numbers of ``cute_fa.device.block_range.Window``."""
    left, right = problem.window_left, problem.window_right
    return (
        None if left is None else min(left, MAX_BOUND),
        None if right is None else min(right, MAX_BOUND),
        min(problem.sink_tokens, MAX_BOUND) if problem.sink_tokens and left is not None else None,
    )


def slopes_argument(problem: AttentionProblem, slopes: torch.Tensor | None) -> torch.Tensor | None:
    """ALiBi slopes as (batch or stride 0, heads)."""
    return slopes.expand(problem.batch, -1) if slopes is not None and slopes.dim() == 1 else slopes
