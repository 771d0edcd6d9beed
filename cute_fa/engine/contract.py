"""What a kernel class of an arch folder offers, and the two data types that pass between it and the package.

The path of a call: ``AttentionProblem`` (what is asked) → kernel class (who serves it) → ``KernelConfig`` (how it is
built: everything that shapes the machine code and nothing else) → compiled kernel (``cute_fa.engine.compiler``) →
launch with the argument tuple that the kernel class packs from ``AttentionTensors``.
"""

from __future__ import annotations

import importlib
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, make_dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

from cute_fa.semantics.names import kind_of_code
from cute_fa.semantics.options import flag_tokens, flags_of, options_of
from cute_fa.semantics.problem import AttentionProblem
from cute_fa.semantics.types import Direction, DType, SmArch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import torch

    from cute_fa.semantics.call import AppendCall, Extras

T = TypeVar("T")

# Device code adds positions and bounds in int32: sequences are at most this long, larger bounds are clamped to it.
MAX_BOUND = 2**30 - 1
# Draft tokens of a sequence under a tree mask.
MAX_DRAFTS = 128
# c·tanh(s/c) is computed as c − 2c/(1 + e^(2s/c)), whose rounding error of c·6e-8 must stay below the LSE's tolerance.
MAX_SOFTCAP = 2.0**13


class AttentionTensors(NamedTuple):
    """The tensors of one call, as the caller laid them out.

    Dense: q (batch, seqlen_q, heads, head_dim), k (batch, seqlen_k, heads_kv, head_dim), v (…, head_dim_v), out
    (batch, seqlen_q, heads, head_dim_v), lse fp32 (batch, heads, seqlen_q). With ``cu_seqlens_q`` q and out are
    (total_q, heads, …) and lse is (heads, total_q); with ``cu_seqlens_k`` k and v are (total_k, heads_kv, …); with
    ``page_table`` they are (num_pages, page_size, heads_kv, …). ``scratch``: what :meth:`AttentionKernel.scratch` asks
    for.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor
    extras: Extras
    scratch: tuple[torch.Tensor | None, ...] = ()


class BackwardTensors(NamedTuple):
    """The tensors of one backward call. ``forward``: inputs, and out and lse as the forward gave them. ``dout`` is
    shaped like out, ``dlse`` like lse (fp32) or None; written: ``dq``, ``dk``, ``dv``, shaped like q, k, v and
    contiguous, ``dalibi`` fp32 (1 or batch, heads) or None, ``dsink`` fp32 (1, heads) or None. ``scratch``: what
    :meth:`AttentionKernel.scratch` asks for."""

    forward: AttentionTensors
    dout: torch.Tensor
    dlse: torch.Tensor | None
    dq: torch.Tensor
    dk: torch.Tensor
    dv: torch.Tensor
    dalibi: torch.Tensor | None
    dsink: torch.Tensor | None
    scratch: tuple[torch.Tensor | None, ...] = ()


class AppendTensors(NamedTuple):
    """The tensors of one append, with strides as kernels take them: new keys and values, the caches that are written,
    queries that rotate and where to (None without), ``seqused_k`` int32 (batch), written. ``call``: what else is
    given."""

    k: torch.Tensor
    v: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    q: torch.Tensor | None
    q_rotated: torch.Tensor | None
    seqused_k: torch.Tensor
    call: AppendCall


class WalkTensors(NamedTuple):
    """The tensors of one walk of a range plan. ``ranges`` int32 (n, 8) and ``classes`` int32 (CLASSES + 1), sorted and
    clipped (``cute_fa.engine.range_plans``); ``walk`` int32, written, with room for so many entries and mask tiles."""

    ranges: torch.Tensor
    classes: torch.Tensor
    walk: torch.Tensor
    entry_capacity: int
    mask_capacity: int


class Memory(NamedTuple):
    """A contiguous tensor that a launch needs beside those of its call."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class KernelConfig(ABC):
    """Everything that shapes the machine code of one kernel: frozen, hashable, printable; the compile cache's key.

    ``kernel_module``: the module of its device code, whose ``build`` takes the config. Named, not imported, since what
    launches a kernel from the cache must not load the DSL's compiler. ``derived``: properties that are printed beside
    the fields."""

    kernel_module: ClassVar[str]
    derived: ClassVar[tuple[str, ...]] = ()

    arch: SmArch

    @property
    @abstractmethod
    def compile_name(self) -> str:
        """Name of the compiled kernel: flags only, never run-time values; unique among configs of one source tree
        up to the tuning fields (tiles, stages), which the cache key holds besides."""

    def build(self) -> tuple[Any, tuple]:
        """The ``cute.jit`` callable and its fake arguments, for ``cute.compile(fn, *args)``. Imports the DSL."""
        return importlib.import_module(self.kernel_module).build(self)


def flags_class(problem: type) -> type:
    """A dataclass of the flags that the class of a problem declares, each absent by default: what its configs are made
    of beside sizes and tiles."""
    declared = [(name, of) for name, of in options_of(problem).items() if of.flag]
    defaults = problem.__dataclass_fields__
    flags = [(of.flag, Any, field(default=defaults[name].default if of.flag_value else False)) for name, of in declared]
    return make_dataclass(f"{problem.__name__}Flags", flags, frozen=True, kw_only=True)


_AttentionFlags: Any = flags_class(AttentionProblem)


@dataclass(frozen=True, kw_only=True)
class FeatureConfig(_AttentionFlags, KernelConfig):
    """What every config holds beside its tiles, and a flag for each feature that ``AttentionProblem`` declares one of:
    whether it is used, never its value; a page's size alone, None for contiguous keys, is in the code."""

    dtype: DType
    dtype_k: DType
    dtype_v: DType
    out_dtype: DType
    head_dim: int
    head_dim_v: int

    @staticmethod
    def features(problem: AttentionProblem) -> dict[str, Any]:
        """The fields above for a problem."""
        names = ("arch", "dtype", "dtype_k", "dtype_v", "out_dtype", "head_dim", "head_dim_v")
        return {name: getattr(problem, name) for name in names} | flags_of(problem)

    @property
    def head_dim_padded(self) -> int:
        """head_dim as the tiles hold it."""
        return padded(self.head_dim)

    @property
    def head_dim_v_padded(self) -> int:
        """head_dim_v as the tiles hold it."""
        return padded(self.head_dim_v)

    def named(self, kernel: str, **choices: bool) -> str:
        """The compile name: ``kernel``, arch, dtypes and head_dim, then a token for each flag that is set, then
        ``choices``: the kernel's own tokens."""
        own = [token for token, on in choices.items() if on]
        if self.dtype.is_fp8 and self.out_dtype is not DType.BF16:
            own.append(f"out{self.out_dtype.value}")
        return "_".join([kernel, kind_of_code(self), *flag_tokens(self, AttentionProblem), *own])


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
    # Of a kernel whose configs can be forced (``cute_fa.engine.overrides``): their kind, and what :meth:`configure`
    # then makes of the heuristic's config for a problem; None where it is left as it is.
    tuned: ClassVar[type[KernelConfig] | None] = None
    override: ClassVar[Callable[[Any, Any], Any] | None] = None
    # Query tokens of a sequence up to which a problem that leaves the number of splits open is this kernel's.
    most_tokens: ClassVar[int] = 0

    @classmethod
    @abstractmethod
    def supports(cls, problem: Any) -> list[str]:
        """Reasons why this kernel does not serve the problem, of the kind that its direction has; empty if it does."""

    @classmethod
    @abstractmethod
    def configure(cls, problem: Any) -> KernelConfig:
        """The heuristic: which tiles, stages and flags serve a problem to which ``supports`` has no objection."""

    @classmethod
    def candidates(cls, problem: Any) -> list[Candidate]:
        """What the heuristic weighs for this problem, in order of preference, up to what it chooses."""
        return [Candidate(cls.configure(problem))]

    @classmethod
    def config_objection(cls, problem: Any, config: Any) -> str | None:
        """Why a config, of the kind ``tuned``, does not serve the problem, whatever the heuristic thinks of it: which
        field, its value and the rule."""
        return None

    @classmethod
    def num_splits(cls, problem: AttentionProblem, num_sms: int) -> int | None:
        """Into how many parts to split the keys of a problem, where the caller leaves it open; 0 if the kernel cuts
        them evenly between its CTAs, None if it does not serve the problem, or that is better served in the table's
        order, with one part."""
        return None

    @classmethod
    def scratch(cls, problem: Any, config: Any, tensors: Any, num_sms: int) -> tuple[Memory | None, ...]:
        """What a launch needs beside the tensors of its call, the same for all calls of one description. It is
        allocated anew for each launch, on that launch's stream, and handed to :meth:`arguments` as ``tensors.scratch``,
        None for None. Its values are undefined: a kernel reads there what it has written. ``num_sms``: of the
        device."""
        return ()

    @classmethod
    @abstractmethod
    def arguments(cls, problem: Any, config: Any, tensors: Any, num_sms: int) -> tuple:
        """Run-time arguments in the order of ``KernelConfig.build()``: torch tensors, numbers, nested tuples, None.
        ``config``: that of :meth:`configure`; ``tensors``: AttentionTensors, BackwardTensors, AppendTensors or
        WalkTensors, whose views it may take; a tensor of its own costs every call time (``cute_fa.engine.plan``).

        ``num_sms``: SMs of the device, which a persistent kernel launches its CTAs by."""


def common_objections(problem: AttentionProblem, head_dim_rule: str, decodes: bool = False) -> list[str]:
    """Reasons that all kernels share: head_dims beyond 256 or no multiple of 8 (``head_dim_rule`` says why);
    what none of them computes; limits of the common device code. ``decodes``: whether the kernel is one for decoding,
    which splits the keys and takes trees of drafts."""
    reasons = []
    for name in ("head_dim", "head_dim_v"):
        size = getattr(problem, name)
        if size % 8 or not 8 <= size <= 256:
            reasons.append(f"{name} {size}: a multiple of 8 from 8 to 256 is needed ({head_dim_rule})")
    if problem.num_splits != 1 and not decodes:
        reasons.append(f"num_splits {problem.num_splits}: this kernel does not split the keys")
    if problem.seqlen_k_per_split and not decodes:
        reasons.append("batch_invariant: this kernel's sums depend on its tiles")
    if problem.tree_mask and problem.direction is Direction.BACKWARD:
        reasons.append("tree_mask: drafts have no gradient")
    elif problem.tree_mask and not decodes:
        reasons.append("tree_mask: this kernel does not hide drafts")
    elif problem.tree_mask and problem.seqlen_q > MAX_DRAFTS:
        reasons.append(f"tree_mask of {problem.seqlen_q} queries: at most {MAX_DRAFTS} draft tokens a sequence")
    if problem.out_dtype is not problem.dtype and not problem.dtype.is_fp8:
        reasons.append(f"out_dtype {problem.out_dtype.value}: the output has the dtype of q, {problem.dtype.value}")
    if problem.promote_every is not None and not problem.dtype.is_fp8:
        reasons.append(f"promote_every {problem.promote_every} with q in {problem.dtype.value}: of fp8 alone")
    if max(problem.seqlen_q, problem.seqlen_k) > MAX_BOUND:
        reasons.append(f"a sequence longer than {MAX_BOUND}: positions are int32")
    if problem.softcap > MAX_SOFTCAP:
        reasons.append(f"softcap {problem.softcap:g}: at most {MAX_SOFTCAP:g}, beyond it scores lose precision")
    return reasons


class LengthArguments(NamedTuple):
    """Where sequences lie and how long they are: tensors as in ``cute_fa.semantics.call.Extras``."""

    cu_seqlens_q: Any
    cu_seqlens_k: Any
    seqused_q: Any
    seqused_k: Any
    cache_leftpad: Any


class WindowArguments(NamedTuple):
    """Bounds of the window, None where infinite; ``sink_tokens`` is None if there are none, and needs a left bound."""

    left: Any
    right: Any
    sink_tokens: Any


class Descales(NamedTuple):
    """What codes of q, k and v are multiplied by to give values: fp32 (batch, heads_kv) of any strides, or None; of k
    and v also (batch, heads_kv, blocks)."""

    q: Any
    k: Any
    v: Any


class CommonArguments(NamedTuple):
    """What all kernels of attention take first. The order is declared here, without the DSL, whose own tuple
    (``cute_fa.device.arguments``) has the same fields: a test compares them."""

    q: Any
    k: Any
    v: Any
    out: Any
    lse: Any
    lengths: LengthArguments
    window: WindowArguments
    alibi_slopes: Any
    learnable_sink: Any
    softmax_scale: Any
    softcap: Any
    page_table: Any
    cache_batch_idx: Any
    descales: Descales
    query_walk: Any
    q_positions: Any
    k_positions: Any
    tree_mask: Any


def common_arguments(problem: AttentionProblem, tensors: AttentionTensors) -> CommonArguments:
    """The first argument of a launch."""
    t, extras = tensors, tensors.extras
    slopes = extras.alibi_slopes
    if slopes is not None and slopes.dim() == 1:
        slopes = slopes.expand(problem.batch, -1)
    left, right = problem.window_left, problem.window_right
    sink_tokens = problem.sink_tokens if problem.sink_tokens and left is not None else None
    bounds = (None if b is None else max(-MAX_BOUND, min(b, MAX_BOUND)) for b in (left, right, sink_tokens))
    lengths = (extras.cu_seqlens_q, extras.cu_seqlens_k, extras.seqused_q, extras.seqused_k, extras.cache_leftpad)
    handed_on = ("learnable_sink", "page_table", "cache_batch_idx", "query_walk", "q_positions", "k_positions")
    handed_on += ("tree_mask",)
    return CommonArguments(
        *(t.q, t.k, t.v, t.out, t.lse),
        lengths=LengthArguments(*lengths),
        window=WindowArguments(*bounds),
        alibi_slopes=slopes,
        softmax_scale=problem.softmax_scale,
        softcap=problem.softcap or None,
        descales=Descales(extras.q_descale, extras.k_descale, extras.v_descale),
        **{name: getattr(extras, name) for name in handed_on},
    )
