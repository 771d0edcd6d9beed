"""Requests as values: frozen descriptions of a forward or a backward, validated when made, that know their key and run.

They put the choices in the types of the dispatch layer, where the functions of ``cute_fa.api.attention`` take flags;
both end in the same call.
"""

from __future__ import annotations

import itertools
import numbers
from collections.abc import Iterable
from dataclasses import KW_ONLY, dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch

from cute_fa.api.attention import prepare
from cute_fa.engine import attention as engine
from cute_fa.engine import autograd
from cute_fa.engine.table import TABLE, DispatchKey
from cute_fa.engine.worlds import arch_of, described_arch
from cute_fa.semantics import reference
from cute_fa.semantics.call import FIELDS
from cute_fa.semantics.errors import (
    ArgumentError,
    ChunkIndexError,
    CumulativeSeqlensError,
    EmptyBatchError,
    Fp8Error,
    WindowError,
    ZeroLengthError,
)
from cute_fa.semantics.names import canonical_name
from cute_fa.semantics.problem import INT32_MAX, normalize_window
from cute_fa.semantics.tensors import TORCH_DTYPES, lengths_of, problem_of
from cute_fa.semantics.types import MaskKind, PersistentMode, PositionBias, SmArch

if TYPE_CHECKING:
    from cute_fa.engine.contract import AttentionKernel
    from cute_fa.semantics.call import Call
    from cute_fa.semantics.problem import AttentionProblem
    from cute_fa.semantics.reference import Gradients, ReferenceOptions
    from cute_fa.semantics.types import DType


@dataclass(frozen=True)
class CumulativeSeqlens:
    """Where each sequence of a packed batch starts: ``offsets`` (batch + 1) on the host, from 0, never decreasing, at
    most 2^31 − 1 since kernels read them as int32. Raises CumulativeSeqlensError or EmptyBatchError."""

    offsets: tuple[int, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.offsets, Iterable):
            raise ArgumentError(f"cu_seqlens is {type(self.offsets).__name__}: a sequence of offsets is needed")
        offsets = tuple(self.offsets)
        for offset in offsets:
            if isinstance(offset, bool) or not isinstance(offset, numbers.Integral):
                raise ArgumentError(f"cu_seqlens holds {offset!r}: offsets are ints")
        object.__setattr__(self, "offsets", tuple(map(int, offsets)))
        if len(offsets) < 2:
            raise EmptyBatchError(f"cu_seqlens {self.offsets}: at least one sequence is needed")
        lengths_of("cu_seqlens", self.offsets)
        if self.total > INT32_MAX:
            raise CumulativeSeqlensError(f"cu_seqlens ends at {self.total}: int32 offsets overflow at {INT32_MAX}")

    @classmethod
    def from_lengths(cls, lengths: list[int] | tuple[int, ...]) -> CumulativeSeqlens:
        """Offsets of sequences of these lengths, one after the other."""
        return cls((0, *itertools.accumulate(lengths)))

    @classmethod
    def from_tensor(cls, cu_seqlens: torch.Tensor) -> CumulativeSeqlens:
        """Offsets read from a tensor (batch + 1): waits for the device."""
        return cls(tuple(cu_seqlens.tolist()))

    @property
    def batch(self) -> int:
        return len(self.offsets) - 1

    @property
    def total(self) -> int:
        return self.offsets[-1]

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(end - start for start, end in itertools.pairwise(self.offsets))

    @property
    def max_seqlen(self) -> int:
        return max(self.lengths)

    def tensor(self, device: torch.device | str) -> torch.Tensor:
        """int32 (batch + 1), as the kernels take it."""
        return torch.tensor(self.offsets, dtype=torch.int32, device=device)

    def chunk(self, index: int, tokens: int) -> CumulativeSeqlens:
        """Offsets of the ``index``-th piece of ``tokens`` tokens of every sequence, as a chunked prefill takes them;
        sequences that end earlier have none or a shorter one. Raises ZeroLengthError for pieces of 0 tokens,
        ChunkIndexError for an index that no sequence reaches."""
        if tokens < 1:
            raise ZeroLengthError(f"chunk of {tokens} tokens: at least 1 is needed")
        chunks = -(-self.max_seqlen // tokens)
        if not 0 <= index < chunks:
            raise ChunkIndexError(f"chunk index {index}: sequences have {chunks} chunks of {tokens} tokens")
        return self.from_lengths([min(max(length - index * tokens, 0), tokens) for length in self.lengths])


@dataclass(frozen=True, eq=False)
class Request:
    """What the requests share. Tensors as for ``cute_fa.flash_attn_func`` or, packed, ``flash_attn_varlen_func``;
    keys and values are what a request calls ``k`` and ``v``.

    ``mask`` and ``window`` go together: NONE and CAUSAL take no window, SLIDING takes (left, right) with one bound
    finite, SLIDING_CAUSAL takes (left, 0) or (left, None). ``position_bias`` ALIBI needs ``alibi_slopes``. ``arch`` is
    the tensors' own by default; given, it lets a request for another machine be described.
    """

    q: torch.Tensor
    _: KW_ONLY
    mask: MaskKind = MaskKind.NONE
    window: tuple[int | None, int | None] = (None, None)
    sink_tokens: int = 0
    position_bias: PositionBias = PositionBias.NONE
    alibi_slopes: torch.Tensor | None = None
    softmax_scale: float | None = None
    softcap: float = 0.0
    learnable_sink: torch.Tensor | None = None
    arch: SmArch | None = None

    family: ClassVar[str | None] = None
    # Whether it is of fp8 tensors or of 16-bit ones; None: of either.
    fp8: ClassVar[bool | None] = False

    if TYPE_CHECKING:

        @property
        def k(self) -> torch.Tensor: ...
        @property
        def v(self) -> torch.Tensor: ...

    def __post_init__(self) -> None:
        check_kinds(self, mask=MaskKind, position_bias=PositionBias)
        self._check_window()
        if (self.position_bias is PositionBias.ALIBI) != (self.alibi_slopes is not None):
            given = "given" if self.alibi_slopes is not None else "missing"
            raise ArgumentError(f"position_bias={self.position_bias.value} with alibi_slopes {given}")
        call = self._call  # q is known to be a tensor from here on
        if call.extras.cu_seqlens_q is None and call.q.shape[:1] == (0,):
            raise EmptyBatchError(f"q {tuple(call.q.shape)}: a request is of at least one sequence")
        object.__setattr__(self, "arch", self._arch)
        check_kinds(self, arch=SmArch)
        self._check_dtypes()

    def problem(self) -> AttentionProblem:
        """The validated problem."""
        return self._problem

    def dispatch_key(self) -> DispatchKey:
        """What the table is asked."""
        return DispatchKey.of(self.problem())

    def kernel(self) -> type[AttentionKernel]:
        """The kernel that serves the request; raises UnsupportedKeyError if there is none."""
        return self._choose()[1]

    def kernel_name(self) -> str:
        """The canonical name of that kernel with this problem (``cute_fa.semantics.names``)."""
        problem, kernel = self._choose()
        return canonical_name(kernel, problem)

    def _choose(self) -> tuple[AttentionProblem, type[AttentionKernel]]:
        return self.problem(), TABLE.lookup(self.problem(), self.family)

    def _check_device(self) -> None:
        actual = arch_of(self.q.device)
        if actual is not self.arch:
            raise ArgumentError(f"arch={self._arch.value}: the tensors are on {self.q.device}, {actual.value}")

    @property
    def _arch(self) -> SmArch:
        """The request's, or before it has one the tensors'."""
        return described_arch(self.q.device) if self.arch is None else self.arch

    # What follows from the fields is found once: they never change.
    @cached_property
    def _call(self) -> Call:
        return prepare(self.q, self.k, self.v, family=self.family, **self._options())

    @cached_property
    def _problem(self) -> AttentionProblem:
        return problem_of(self._arch, self._call)

    def _options(self) -> dict[str, Any]:
        """Keyword arguments of the public functions."""
        causal = self.mask in (MaskKind.CAUSAL, MaskKind.SLIDING_CAUSAL)
        own = {"q", "k", "v", "cu_seqlens_q", "cu_seqlens_k"}  # of other types here, or taken apart
        alike = {field.name for field in fields(self)} & set(FIELDS) - own
        return {name: getattr(self, name) for name in alike} | {"causal": causal, "window_size": self.window}

    def _reference_options(self) -> ReferenceOptions:
        """Keyword arguments of the reference."""
        extras: Any = {name: given for name, given in self._call.extras._asdict().items() if given is not None}
        options = self._call.options
        return {
            **extras,
            "softmax_scale": options.softmax_scale,
            "window_size": (options.window_left, options.window_right),
            "sink_tokens": options.sink_tokens,
            "softcap": options.softcap,
        }

    def _check_dtypes(self) -> None:
        problem = self.problem()
        fits = problem.dtype.is_fp8 if self.fp8 else not problem.has_codes  # k and v are fp8 wherever q is
        if self.fp8 is not None and not fits:
            given = f"q, k and v in {', '.join(dtype.value for dtype in problem.dtypes)}"
            rule = "takes fp8 alone" if self.fp8 else "takes fp16 and bf16, Fa3FwdFp8Request fp8"
            raise Fp8Error(f"{given}: {type(self).__name__} {rule}")

    def _check_window(self) -> None:
        left, right = normalize_window(self.window, causal=False, name="window")
        sliding = self.mask in (MaskKind.SLIDING, MaskKind.SLIDING_CAUSAL)
        if not sliding and (left, right) != (None, None):
            raise WindowError(f"mask={self.mask.value} with window {self.window}: only sliding masks take a window")
        if self.mask is MaskKind.SLIDING and (right == 0 or (left, right) == (None, None)):
            raise WindowError(f"mask=sliding with window {self.window}: a finite bound, and right not 0, are needed")
        if self.mask is MaskKind.SLIDING_CAUSAL and (left is None or right not in (None, 0)):
            raise WindowError(f"mask=sliding-causal with window {self.window}: (left, 0) is needed")


@dataclass(frozen=True, eq=False)
class ForwardRequest(Request):
    """A request whose result is attention itself; ``batch_invariant`` and ``seqlen_k_per_split`` as for
    ``cute_fa.flash_attn_func``."""

    _: KW_ONLY
    batch_invariant: bool | None = None
    seqlen_k_per_split: int | None = None

    def _options(self) -> dict[str, Any]:
        return {**super()._options(), "batch_invariant": self.batch_invariant}

    def run(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(out, lse), on the device of the tensors, whose architecture must be the request's."""
        self._check_device()
        return engine.attention(self._call)

    def reference(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(out, lse) by ``cute_fa.reference`` in fp32, on any device and rounded as a kernel's; raises what
        ``kernel()`` raises."""
        self.kernel()
        out, lse = reference.attention(*self._call[:3], **self._reference_options())
        return out.to(TORCH_DTYPES[cast("DType", self.problem().out_dtype)]), lse


@dataclass(frozen=True, eq=False)
class _ContiguousForward(ForwardRequest):
    k: torch.Tensor
    v: torch.Tensor


@dataclass(frozen=True, eq=False)
class Fa2FwdRequest(_ContiguousForward):
    """A forward by FA2-style kernels, which run on every architecture from sm_80 on."""

    family = "fa2"


@dataclass(frozen=True, eq=False)
class Fa3FwdRequest(_ContiguousForward):
    """A forward by FA3-style kernels, on sm_100a and sm_103a by FA4-style ones; ``persistent`` and ``pack_gqa`` as for
    ``cute_fa.flash_attn_func``. Raises Fa3ArchError when made for an architecture before sm_90a."""

    family = "fa3"

    persistent: PersistentMode = PersistentMode.AUTO
    pack_gqa: bool | None = None

    def __post_init__(self) -> None:
        check_kinds(self, persistent=PersistentMode)
        super().__post_init__()
        TABLE.explain(self.problem(), self.family)  # raises Fa3ArchError


@dataclass(frozen=True, eq=False)
class Fa3FwdFp8Request(Fa3FwdRequest):
    """A forward in fp8 by the kernels of :class:`Fa3FwdRequest`: q, k and v in e4m3 or e5m2, of the same type or not;
    descales, ``out_dtype`` and ``promote_every`` as for ``cute_fa.flash_attn_func``. Raises Fp8Error if one is of 16
    bits."""

    fp8 = True

    q_descale: torch.Tensor | float | None = None
    k_descale: torch.Tensor | float | None = None
    v_descale: torch.Tensor | float | None = None
    out_dtype: torch.dtype | None = None
    promote_every: int | None = None


@dataclass(frozen=True, eq=False)
class VarlenFwdRequest(_ContiguousForward):
    """A forward over packed sequences, q (total_q, heads, head_dim), by the best kernel there is."""

    cu_seqlens_q: CumulativeSeqlens
    cu_seqlens_k: CumulativeSeqlens

    def __post_init__(self) -> None:
        check_kinds(self, q=torch.Tensor, cu_seqlens_q=CumulativeSeqlens, cu_seqlens_k=CumulativeSeqlens)
        super().__post_init__()
        check_packed(self, "q", "k")

    def _options(self) -> dict[str, Any]:
        return {**super()._options(), **packed(self, "q", "k")}


@dataclass(frozen=True, eq=False)
class Fa2BwdRequest(Request):
    """A backward by FA2-style kernels: the gradients of q, k, v and, where present, the learnable sink, for those of
    ``out`` and ``lse`` (``dout``; ``dlse``, None for zero), which a forward with the same choices gave.

    ``slopes_gradient`` asks for that of ``alibi_slopes`` too, ``deterministic`` for gradients that are bit-identical
    between runs. ``cu_seqlens_q`` and ``cu_seqlens_k`` go together: packed sequences, q (total_q, heads, head_dim).
    """

    k: torch.Tensor
    v: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor
    dout: torch.Tensor
    _: KW_ONLY
    dlse: torch.Tensor | None = None
    slopes_gradient: bool = False
    deterministic: bool = False
    cu_seqlens_q: CumulativeSeqlens | None = None
    cu_seqlens_k: CumulativeSeqlens | None = None

    family = "fa2"

    def __post_init__(self) -> None:
        check_kinds(self, out=torch.Tensor, lse=torch.Tensor, dout=torch.Tensor, slopes_gradient=bool)
        if self.dlse is not None:
            check_kinds(self, dlse=torch.Tensor)
        if (self.cu_seqlens_q is None) != (self.cu_seqlens_k is None):
            raise ArgumentError("cu_seqlens_q and cu_seqlens_k: give both or neither")
        if self._is_packed:
            check_kinds(self, q=torch.Tensor, cu_seqlens_q=CumulativeSeqlens, cu_seqlens_k=CumulativeSeqlens)
        super().__post_init__()
        if self._is_packed:
            check_packed(self, "q", "k")

    def run(self) -> Gradients:
        """The gradients, on the device of the tensors, whose architecture must be the request's."""
        self._check_device()
        return autograd.attention_backward(*self._given, self._call, self.slopes_gradient)

    def reference(self) -> Gradients:
        """The gradients by ``cute_fa.reference`` in fp32, on any device and rounded as a kernel's; raises what
        ``kernel()`` raises."""
        self.kernel()
        q, k, v = self._call[:3]
        grads = reference.gradients(q, k, v, self.dout, self.dlse, **self._reference_options())
        rounded = {"dq": grads.dq.to(q.dtype), "dk": grads.dk.to(k.dtype), "dv": grads.dv.to(v.dtype)}
        return grads._replace(**rounded, dalibi=grads.dalibi if self.slopes_gradient else None)

    @property
    def _is_packed(self) -> bool:
        return self.cu_seqlens_q is not None

    @property
    def _given(self) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]:
        return self.dout, self.dlse, self.out, self.lse

    @cached_property
    def _problem(self) -> AttentionProblem:
        return autograd.problem_of_backward(self._arch, *self._given, self._call, self.slopes_gradient)

    def _options(self) -> dict[str, Any]:
        offsets = packed(self, "q", "k") if self._is_packed else {}
        return {**super()._options(), **offsets}


def check_kinds(request: Any, **kinds: type) -> None:
    """Raise ArgumentError for a field that is of another type."""
    for name, kind in kinds.items():
        value = getattr(request, name)
        if not isinstance(value, kind):
            raise ArgumentError(f"{name} is {type(value).__name__}: a {kind.__name__} is needed")


def check_packed(request: Request, *names: str) -> None:
    """Raise CumulativeSeqlensError if the offsets of q or k end beyond the tensor."""
    for name in names:
        offsets, rows = getattr(request, f"cu_seqlens_{name}"), getattr(request, name).shape[0]
        if offsets.total > rows:
            raise CumulativeSeqlensError(f"cu_seqlens_{name} ends at {offsets.total}: {name} has {rows} rows")


def packed(request: Request, *names: str) -> dict[str, Any]:
    """Keyword arguments of the public functions that say where the packed sequences of q or k lie."""
    options = {}
    for name in names:
        offsets = getattr(request, f"cu_seqlens_{name}")
        options[f"cu_seqlens_{name}"] = offsets.tensor(request.q.device)
        # a batch of empty sequences only is legal; a longest length of 0 is not
        options[f"max_seqlen_{name}"] = max(offsets.max_seqlen, 1)
    return options
