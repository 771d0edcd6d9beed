"""The dispatch table: which kernel serves which problem on which architecture, and why the others do not."""

from __future__ import annotations

import importlib
import itertools
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from cute_fa.semantics.append_problem import AppendProblem
from cute_fa.semantics.errors import ArgumentError, Fa3ArchError, Fp8Error, UnsupportedKeyError
from cute_fa.semantics.names import dtypes_of_code, problem_name
from cute_fa.semantics.options import options_of, rows_of
from cute_fa.semantics.problem import AttentionProblem, default_scale
from cute_fa.semantics.types import Direction, DType, SmArch
from cute_fa.semantics.walk_problem import WalkProblem

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cute_fa.engine.contract import AttentionKernel

Problem = AttentionProblem | AppendProblem | WalkProblem
FAMILIES = ("fa2", "fa3", "fa4")


@dataclass(frozen=True)
class DispatchKey:
    """What decides which kernel serves a problem: shapes of the head and features with their values, no lengths.

    ``sliding_window`` and ``window_right`` are the window's bounds in tokens, literal, None where infinite
    (``window_right`` is None for causal, which is bound 0); ``sink`` counts sink tokens; ``head_dim_v`` None means
    ``head_dim``, ``dtype_k`` and ``dtype_v`` None ``dtype``, ``out_dtype`` None bf16 for fp8, else ``dtype``. What
    changes only how a kernel computes (``persistent``, ``pack_gqa``) is left out: a key stands for its own choice.
    """

    arch: SmArch
    dtype: DType
    head_dim: int
    causal: bool = False
    varlen: bool = False
    sliding_window: int | None = None
    alibi: bool = False
    sink: int = 0
    paged: bool = False
    gqa_ratio: int = 1
    direction: Direction = Direction.FORWARD
    head_dim_v: int | None = None
    window_right: int | None = None
    softcap: float = 0.0
    learnable_sink: bool = False
    page_size: int | None = None
    splits: int = 1
    dtype_k: DType | None = None
    dtype_v: DType | None = None
    out_dtype: DType | None = None
    ranges: bool = False
    tree_mask: bool = False
    seqlen_k_per_split: int = 0

    def __post_init__(self):
        if self.direction not in (Direction.FORWARD, Direction.BACKWARD):
            rule = "a key is of attention, others are looked up by their problem"
            raise ArgumentError(f"direction={self.direction.value}: {rule}")
        if self.paged != (self.page_size is not None):
            raise ArgumentError(f"paged={self.paged} with page_size={self.page_size}: give both or neither")
        if self.causal and self.window_right not in (None, 0):
            raise ArgumentError(f"causal with window_right={self.window_right}: causal is bound 0")
        # one spelling of equal keys
        if self.head_dim_v is None:
            object.__setattr__(self, "head_dim_v", self.head_dim)
        usual = DType.BF16 if self.dtype.is_fp8 else self.dtype
        for name, dtype in (("dtype_k", self.dtype), ("dtype_v", self.dtype), ("out_dtype", usual)):
            if getattr(self, name) is None:
                object.__setattr__(self, name, dtype)
        if self.window_right == 0:
            object.__setattr__(self, "causal", True)
            object.__setattr__(self, "window_right", None)

    @classmethod
    def of(cls, problem: AttentionProblem) -> DispatchKey:
        declared = {of.key: getattr(problem, name) for name, of in options_of(problem).items() if of.key}
        derived = {"causal": problem.causal, "varlen": problem.varlen, "paged": problem.page_size is not None}
        return cls(**declared | derived, gqa_ratio=problem.gqa_ratio)

    def __str__(self) -> str:
        return problem_name(self.problem())

    def problem(self) -> AttentionProblem:
        """The smallest problem of this key: what ``supports()`` is asked about when only the key is known."""
        declared = {name: getattr(self, of.key) for name, of in options_of(AttentionProblem).items() if of.key}
        derived = {"varlen_q": self.varlen, "varlen_k": self.varlen and not self.paged}
        derived |= {"seqused_k": self.varlen and self.paged, "window_right": 0 if self.causal else self.window_right}
        scale = default_scale(self.head_dim)
        sizes = {"batch": 1, "seqlen_q": 1, "seqlen_k": 1, "num_heads": self.gqa_ratio, "num_heads_kv": 1}
        return AttentionProblem(**declared | derived | sizes, softmax_scale=scale)


@dataclass(frozen=True)
class Entry:
    """One kernel of the table. ``target`` is ``module:Class``, imported when first asked; where no kernel exists yet
    it is None and ``missing`` says so. ``arch_rule`` says why it runs on ``archs`` alone. ``expected``: others that one
    might look for it on, where it is a candidate that refuses by that rule."""

    name: str
    family: str
    direction: Direction
    archs: tuple[SmArch, ...]
    target: str | None = None
    missing: str = ""
    arch_rule: str = ""
    expected: tuple[SmArch, ...] = ()

    def reasons(self, problem: Problem) -> list[str]:
        """Why this kernel does not serve the problem; empty if it does."""
        if problem.direction is not self.direction:
            return [f"computes the {self.direction.value}, not the {problem.direction.value}"]
        if problem.arch not in self.archs:
            return [f"{self.arch_rule}; not {problem.arch.value}"]
        if self.target is None:
            return [self.missing]
        return self.kernel().supports(problem)

    def num_splits(self, problem: AttentionProblem, num_sms: int) -> int | None:
        """How this kernel splits the keys of a problem that leaves it open; None if it is not for this kernel."""
        if problem.arch not in self.archs or self.target is None:
            return None
        splits = self.kernel().num_splits(problem, num_sms)
        return None if splits is None or self.reasons(replace(problem, num_splits=splits)) else splits

    def kernel(self) -> type[AttentionKernel]:
        return _load(self.target)


class SupportRow(NamedTuple):
    """One cell of the support table: ``kernel`` is the entry's name or None; ``reasons`` say why the candidates before
    it, or all of them, do not serve."""

    arch: str
    direction: str
    feature: str
    kernel: str | None
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class DispatchTable:
    """Entries in order of preference."""

    entries: tuple[Entry, ...]

    def lookup(self, problem: Problem | DispatchKey, family: str | None = None) -> type[AttentionKernel]:
        """The kernel that serves the problem: the first entry whose ``supports()`` has no objection.

        ``family``: ``fa2``, ``fa3`` or ``fa4`` alone. An FA3 request on an architecture after sm_90a is one for FA4's
        kernels. Raises UnsupportedKeyError with every candidate's reasons, Fa3ArchError for an FA3 request before
        sm_90a, Fp8Error where the dtype alone is the obstacle.
        """
        entry = self._find(problem, family)
        if entry is not None:
            return entry.kernel()
        if isinstance(problem, DispatchKey):
            problem = problem.problem()
        reasons = self.explain(problem, family)
        if problem.has_codes and self.serves(_in_bf16(problem), family):
            listed = "; ".join(f"{name}: {', '.join(why)}" for name, why in reasons.items())
            dtypes = dtypes_of_code(problem)
            raise Fp8Error(f"{dtypes} input on {problem.arch.value}: no kernel serves it in 8 bits ({listed})")
        key = DispatchKey.of(problem) if isinstance(problem, AttentionProblem) else problem_name(problem)
        raise UnsupportedKeyError(key, reasons)

    def serves(self, problem: Problem | DispatchKey, family: str | None = None) -> bool:
        """Whether there is a kernel for the problem."""
        return self._find(problem, family) is not None

    def choose(
        self, problem: AttentionProblem, family: str | None, num_sms: int, num_splits: int
    ) -> tuple[AttentionProblem, type[AttentionKernel]]:
        """The problem and the kernel that serves it. Where the caller leaves the number of splits open, ``num_splits``
        0, both are those of the first kernel that wants the problem for itself (``AttentionKernel.num_splits``), else
        one split and :meth:`lookup`."""
        if num_splits:
            return problem, self.lookup(problem, family)
        for entry in self._candidates(problem, family):
            splits = entry.num_splits(problem, num_sms)
            if splits is not None:
                return replace(problem, num_splits=splits), entry.kernel()
        return problem, self.lookup(problem, family)

    def explain(self, problem: Problem | DispatchKey, family: str | None = None) -> dict[str, list[str]]:
        """Reasons of every candidate, by name; an empty list means that it serves the problem."""
        if isinstance(problem, DispatchKey):
            problem = problem.problem()
        return {entry.name: entry.reasons(problem) for entry in self._candidates(problem, family)}

    def rows(self) -> Iterator[SupportRow]:
        """The support table: every architecture × direction × feature that problems of the direction have."""
        for arch in SmArch:
            for direction in (Direction.FORWARD, Direction.BACKWARD, Direction.APPEND):
                kind, base = AttentionProblem, _ATTENTION
                if direction is Direction.APPEND:
                    kind, base = AppendProblem, _APPEND
                declared = options_of(kind)
                for feature, changes in rows_of(kind).items():
                    # A backward is not asked for what its call chose for the forward, nor the other way round.
                    others = {name for name, of in declared.items() if of.direction not in (None, direction)}
                    changes = {name: value for name, value in changes.items() if name not in others}
                    if kind is AttentionProblem:
                        changes["direction"] = direction
                    explained = self.explain(kind(arch=arch, **base | changes))
                    served = next((name for name, why in explained.items() if not why), None)
                    refusing = itertools.takewhile(lambda candidate: candidate[1], explained.items())
                    reasons = tuple(f"{name}: {', '.join(why)}" for name, why in refusing)
                    yield SupportRow(arch.value, direction.value, feature, served, reasons)

    def _find(self, problem, family: str | None) -> Entry | None:
        if isinstance(problem, DispatchKey):
            problem = problem.problem()
        return next((e for e in self._candidates(problem, family) if not e.reasons(problem)), None)

    def _candidates(self, problem: Problem, family: str | None) -> list[Entry]:
        if family is not None and family not in FAMILIES:
            raise ArgumentError(f"family={family!r}: one of {', '.join(FAMILIES)}")
        if family == "fa3" and problem.arch.number < 90:
            raise Fa3ArchError(f"FA3 kernels on {problem.arch.value}: they need WGMMA, which exists on sm_90a alone")
        families = (family,)
        if family == "fa3" and not problem.arch.has_wgmma:
            families = ("fa3", "fa4")
        entries = [entry for entry in self.entries if entry.direction is problem.direction]
        if family is None:
            return [entry for entry in entries if problem.arch in (*entry.archs, *entry.expected)]
        return [entry for entry in entries if entry.family in families]


def _in_bf16(problem: Problem) -> Problem:
    others: dict[str, Any] = dict.fromkeys(("dtype_k", "dtype_v"))
    if isinstance(problem, AttentionProblem):
        descales = ("q_descale", "k_descale", "v_descale", "k_block_descale", "v_block_descale")
        descales += ("k_row_descale", "v_row_descale")
        others |= {"out_dtype": None, "v_layout": "head_dim"} | dict.fromkeys(descales, False)
    return replace(problem, dtype=DType.BF16, **others)


@cache
def _load(target: str) -> type[AttentionKernel]:
    module, name = target.split(":")
    return getattr(importlib.import_module(module), name)


_ANY: dict[str, Any] = {"archs": tuple(SmArch)}
_WGMMA: dict[str, Any] = {"archs": (SmArch.SM_90A,), "arch_rule": "WGMMA exists on sm_90a alone"}
_TCGEN05: dict[str, Any] = {
    "archs": (SmArch.SM_100A, SmArch.SM_103A),
    "arch_rule": "tcgen05 exists on sm_100a and sm_103a alone",
    "expected": (SmArch.SM_120A,),  # Blackwell, too
}

TABLE = DispatchTable(
    (
        Entry("fa4_fwd", "fa4", Direction.FORWARD, target="fa4_sm100.forward.entry:Fa4Forward", **_TCGEN05),
        Entry("fa3_fwd", "fa3", Direction.FORWARD, target="fa3_sm90.forward.entry:Fa3Forward", **_WGMMA),
        Entry("fa3_decode", "fa3", Direction.FORWARD, target="fa3_sm90.decode.entry:Fa3Decode", **_WGMMA),
        Entry("fa2_fwd", "fa2", Direction.FORWARD, target="fa2_sm80.forward.entry:Fa2Forward", **_ANY),
        Entry("fa2_split", "fa2", Direction.FORWARD, target="fa2_sm80.split.entry:Fa2Split", **_ANY),
        Entry("fa4_bwd", "fa4", Direction.BACKWARD, missing="no fa4_sm100 backward exists yet", **_TCGEN05),
        Entry("fa3_bwd", "fa3", Direction.BACKWARD, target="fa3_sm90.backward.entry:Fa3Backward", **_WGMMA),
        Entry(
            "fa3_bwd_split",
            "fa3",
            Direction.BACKWARD,
            target="fa3_sm90.backward_split.entry:Fa3SplitBackward",
            **_WGMMA,
        ),
        Entry("fa2_append", "fa2", Direction.APPEND, target="fa2_sm80.append.entry:Fa2Append", **_ANY),
        Entry("fa2_ranges", "fa2", Direction.PLAN, target="fa2_sm80.ranges.entry:RangeWalks", **_ANY),
        Entry("fa2_bwd", "fa2", Direction.BACKWARD, target="fa2_sm80.backward.entry:Fa2Backward", **_ANY),
    )
)

# What the support table asks about are changes of these; the features' declarations hold the changes.
_ATTENTION = {"dtype": DType.BF16, "batch": 1, "seqlen_q": 1, "seqlen_k": 1, "num_heads": 1, "num_heads_kv": 1}
_ATTENTION |= {"head_dim": 128, "head_dim_v": 128, "softmax_scale": 1.0}
_APPEND = {"dtype": DType.BF16, "batch": 1, "tokens_k": 1, "num_heads_kv": 1, "head_dim": 128, "head_dim_v": 128}
