"""What a kernel class of an arch folder offers, and the two data types that pass between it and the package.

The path of a call: ``AttentionProblem`` (what is asked) → kernel class (who serves it) → ``KernelConfig`` (how it is
built: everything that shapes the machine code and nothing else) → compiled kernel (``cute_fa.engine.compiler``) →
launch with the argument tuple that the kernel class packs from ``AttentionTensors``.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

from cute_fa.semantics.types import Direction, DType, SmArch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import torch

    from cute_fa.semantics.problem import AttentionProblem

T = TypeVar("T")

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
    ``cache_batch_idx`` int32 (batch): which sequence of k and v, or row of page_table, each one of the batch reads,
    ``cache_leftpad`` int32 (batch): rows of k and v before its first key, ``alibi_slopes`` fp32 (heads) or (batch,
    heads), ``learnable_sink`` fp32 (heads).
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
    cache_batch_idx: torch.Tensor | None
    cache_leftpad: torch.Tensor | None
    alibi_slopes: torch.Tensor | None
    learnable_sink: torch.Tensor | None


class BackwardTensors(NamedTuple):
    """The tensors of one backward call. ``forward``: inputs, and out and lse as the forward gave them. ``dout`` is
    shaped like out, ``dlse`` like lse (fp32) or None; written: ``dq``, ``dk``, ``dv``, shaped like q, k, v and
    contiguous, ``dalibi`` fp32 like alibi_slopes or None, ``dsink`` fp32 (heads) or None."""

    forward: AttentionTensors
    dout: torch.Tensor
    dlse: torch.Tensor | None
    dq: torch.Tensor
    dk: torch.Tensor
    dv: torch.Tensor
    dalibi: torch.Tensor | None
    dsink: torch.Tensor | None


@dataclass(frozen=True)
class KernelConfig(ABC):
    """Everything that shapes the machine code of one kernel: frozen, hashable, printable; the compile cache's key.

    ``kernel_module``: the module of its device code, whose ``build`` takes the config. Named, not imported, since what
    launches a kernel from the cache must not load the DSL's compiler."""

    kernel_module: ClassVar[str]

    arch: SmArch

    @property
    @abstractmethod
    def compile_name(self) -> str:
        """Name of the compiled kernel: flags only, never run-time values; unique among configs of one source tree
        up to the tuning fields (tiles, stages), which the cache key holds besides."""

    def build(self) -> tuple[Any, tuple]:
        """The ``cute.jit`` callable and its fake arguments, for ``cute.compile(fn, *args)``. Imports the DSL."""
        return importlib.import_module(self.kernel_module).build(self)


@dataclass(frozen=True, kw_only=True)
class FeatureConfig(KernelConfig):
    """What every config holds beside its tiles. The flags say which features exist, never their
    values; a page's size, None for contiguous keys, is in the code."""

    dtype: DType
    head_dim: int
    head_dim_v: int
    window_left: bool = False
    window_right: bool = False
    sink_tokens: bool = False
    softcap: bool = False
    alibi: bool = False
    learnable_sink: bool = False
    cu_seqlens_q: bool = False
    cu_seqlens_k: bool = False
    seqused_q: bool = False
    seqused_k: bool = False
    page_size: int | None = None
    cache_batch_idx: bool = False
    cache_leftpad: bool = False

    @staticmethod
    def features(problem: AttentionProblem) -> dict[str, Any]:
        """The fields above for a problem."""
        return {
            "arch": problem.arch,
            "dtype": problem.dtype,
            "head_dim": problem.head_dim,
            "head_dim_v": problem.head_dim_v,
            "window_left": problem.window_left is not None,
            "window_right": problem.window_right is not None,
            "sink_tokens": problem.sink_tokens > 0 and problem.window_left is not None,
            "softcap": problem.softcap > 0.0,
            "alibi": problem.alibi,
            "learnable_sink": problem.learnable_sink,
            "cu_seqlens_q": problem.varlen_q,
            "cu_seqlens_k": problem.varlen_k,
            "seqused_q": problem.seqused_q,
            "seqused_k": problem.seqused_k,
            "page_size": problem.page_size,
            "cache_batch_idx": problem.cache_batch_idx,
            "cache_leftpad": problem.cache_leftpad,
        }

    @property
    def head_dim_padded(self) -> int:
        """head_dim as the tiles hold it."""
        return padded(self.head_dim)

    @property
    def head_dim_v_padded(self) -> int:
        """head_dim_v as the tiles hold it."""
        return padded(self.head_dim_v)

    def named(self, kernel: str, **choices: bool) -> str:
        """The compile name: ``kernel``, arch, dtype and head_dim, then a token for each flag that is set, then
        ``choices``: the kernel's own tokens."""
        head_dim = f"hd{self.head_dim}" + (f"v{self.head_dim_v}" if self.head_dim_v != self.head_dim else "")
        flags = {
            "left": self.window_left,
            "right": self.window_right,
            "sink": self.sink_tokens,
            "softcap": self.softcap,
            "alibi": self.alibi,
            "lsink": self.learnable_sink,
            "cuq": self.cu_seqlens_q,
            "cuk": self.cu_seqlens_k,
            "usedq": self.seqused_q,
            "usedk": self.seqused_k,
            "index": self.cache_batch_idx,
            "leftpad": self.cache_leftpad,
            **choices,
        }
        tokens = (token for token, on in flags.items() if on)
        return "_".join([kernel, self.arch.short, self.dtype.value, head_dim, *tokens])


@dataclass(frozen=True)
class Candidate:
    """A config that a heuristic weighed. ``reason``: why it was refused, with the figures; None for the chosen one."""

    config: KernelConfig
    reason: str | None = None


def chosen(weighed: Iterable[tuple[T, str | None]]) -> T:
    """The first of a heuristic's tiles, which come in order of preference with a reason against each, that has none."""
    for tiles, reason in weighed:
        if reason is None:
            return tiles
    raise AssertionError("no tiles fit")  # supports() bounds the problems


def candidates(weighed: Iterable[tuple[T, str | None]], config: Callable[[T], KernelConfig]) -> list[Candidate]:
    """The configs of a heuristic's tiles up to the chosen ones."""
    found = []
    for tiles, reason in weighed:
        found.append(Candidate(config(tiles), reason))
        if reason is None:
            break
    return found


def smem_objection(smem_bytes: int, what: str, arch: SmArch) -> str | None:
    """Why a CTA cannot have so much shared memory for ``what``; None if it can."""
    if smem_bytes <= arch.smem_bytes:
        return None
    return f"shared memory: {smem_bytes:,} bytes of {what}, {arch.smem_bytes:,} available"


def padded(head_dim: int) -> int:
    """head_dim as the tiles hold it: tensor-core instructions take 16 elements of Q·Kᵀ at a time; the rest is zero."""
    return (head_dim + 15) // 16 * 16


class AttentionKernel(ABC):
    """A kernel family's entry point; one class a kernel, named by ``cute_fa.engine.table``."""

    family: ClassVar[str]
    direction: ClassVar[Direction]

    @classmethod
    @abstractmethod
    def supports(cls, problem: AttentionProblem) -> list[str]:
        """Reasons why this kernel does not serve the problem; empty if it does."""

    @classmethod
    @abstractmethod
    def configure(cls, problem: AttentionProblem) -> KernelConfig:
        """The heuristic: which tiles, stages and flags serve a problem to which ``supports`` has no objection."""

    @classmethod
    def candidates(cls, problem: AttentionProblem) -> list[Candidate]:
        """What the heuristic weighs for this problem, in order of preference, up to what it chooses."""
        return [Candidate(cls.configure(problem))]

    @classmethod
    def num_splits(cls, problem: AttentionProblem, num_sms: int) -> int | None:
        """Into how many parts to split the keys of a problem that this kernel serves, where the caller leaves it open;
        None if the problem is better served in the table's order, with one."""
        return None

    @classmethod
    @abstractmethod
    def arguments(cls, problem: AttentionProblem, tensors: AttentionTensors | BackwardTensors, num_sms: int) -> tuple:
        """Run-time arguments in the order of ``KernelConfig.build()``: torch tensors, numbers, nested tuples, None.
        A backward takes BackwardTensors and allocates what it needs besides.

        ``num_sms``: SMs of the device, which a persistent kernel launches its CTAs by."""


def common_objections(problem: AttentionProblem, head_dim_rule: str, splits: bool = False) -> list[str]:
    """Reasons that all kernels share: head_dims beyond 256 or no multiple of 8 (``head_dim_rule`` says why);
    what none of them computes; limits of the common device code. ``splits``: whether the kernel splits the keys."""
    reasons = []
    for name in ("head_dim", "head_dim_v"):
        size = getattr(problem, name)
        if size % 8 or not 8 <= size <= 256:
            reasons.append(f"{name} {size}: a multiple of 8 from 8 to 256 is needed ({head_dim_rule})")
    if problem.num_splits > 1 and not splits:
        reasons.append(f"num_splits {problem.num_splits}: this kernel does not split the keys")
    if problem.out_dtype is not None and problem.out_dtype is not problem.dtype:
        reasons.append(f"out_dtype {problem.out_dtype.value}: the output has the input's dtype")
    if max(problem.seqlen_q, problem.seqlen_k) > MAX_BOUND:
        reasons.append(f"a sequence longer than {MAX_BOUND}: positions are int32")
    if problem.softcap > MAX_SOFTCAP:
        reasons.append(f"softcap {problem.softcap:g}: at most {MAX_SOFTCAP:g}, beyond it scores lose precision")
    return reasons


def common_arguments(problem: AttentionProblem, tensors: AttentionTensors) -> tuple:
    """What all kernels take first: ``cute_fa.device.arguments.CommonArguments``."""
    t, slopes = tensors, tensors.alibi_slopes
    if slopes is not None and slopes.dim() == 1:
        slopes = slopes.expand(problem.batch, -1)
    left, right = problem.window_left, problem.window_right
    sink_tokens = problem.sink_tokens if problem.sink_tokens and left is not None else None
    window = tuple(None if b is None else max(-MAX_BOUND, min(b, MAX_BOUND)) for b in (left, right, sink_tokens))
    return (
        t.q,
        t.k,
        t.v,
        t.out,
        t.lse,
        (t.cu_seqlens_q, t.cu_seqlens_k, t.seqused_q, t.seqused_k, t.cache_leftpad),
        window,
        slopes,
        t.learnable_sink,
        problem.softmax_scale,
        problem.softcap if problem.softcap else None,
        t.page_table,
        t.cache_batch_idx,
    )
