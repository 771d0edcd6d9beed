"""Names of kernels: the one place that fixes which tokens there are and their order."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from cute_fa.semantics.options import options_of
from cute_fa.semantics.problem import AttentionProblem
from cute_fa.semantics.types import DType
from cute_fa.semantics.walk_problem import WalkProblem

if TYPE_CHECKING:
    from cute_fa.semantics.append_problem import AppendProblem

# Of attention; an append's are in the order of its fields.
_ORDER = "out causal varlen ranges tree sw wr alibi sink softcap lsink page split chunk gqa dlse dalibi det".split()


class _OfFamily(Protocol):
    family: str


def canonical_name(kernel: _OfFamily, problem: AttentionProblem | AppendProblem) -> str:
    """What ran, run-time values included, e.g. ``fa3_fwd_sm90a_bf16_hd128_causal_varlen_sw4096_sink4_gqa8``: the
    kernel's family, then :func:`problem_name`."""
    return f"{kernel.family}_{problem_name(problem)}"


def problem_name(problem: AttentionProblem | AppendProblem | WalkProblem) -> str:
    """The problem in tokens: direction, architecture, dtype (``k`` and ``v`` with k's and v's if they differ), ``hd``
    head_dim (``v`` head_dim_v if it differs), then

    of attention ``out`` the output's dtype (where not the usual one), ``causal``, ``varlen``, ``ranges`` under a range
    plan, ``tree`` under a tree mask, ``sw`` window left, ``wr`` window right (where not causal; ``wr-1`` if literally
    −1), ``alibi``, ``sink`` sink tokens, ``softcap`` cap (``p`` for the point), ``lsink`` learnable sink, ``page`` page
    size, ``split`` number of splits (0: cut evenly between CTAs), ``chunk`` keys of a chunk in batch-invariant mode,
    ``gqa`` query heads per kv head; of a backward ``dlse`` where the gradient of LSE is given, ``dalibi`` where that of
    the slopes is wanted, ``det`` deterministic;

    of an append ``page`` page size, ``index``, ``query``, ``cuq``, ``cuk``, ``usedq``, ``usedk``, ``rotary``
    rotary_dim, ``interleaved``, ``shifted``.

    What a problem does not use has no token. A walk of a range plan has its tiles: ``plan_sm90a_rows128_columns64``.
    """
    if isinstance(problem, WalkProblem):
        return f"{problem.direction.value}_{problem.arch.short}_rows{problem.tile_rows}_columns{problem.tile_columns}"
    tokens = {
        option.token: option.token + _digits(getattr(problem, name))
        for name, option in options_of(problem).items()
        if option.token and getattr(problem, name) != problem.__dataclass_fields__[name].default
    }
    if isinstance(problem, AttentionProblem):
        derived = {"causal": problem.causal, "varlen": problem.varlen, f"gqa{problem.gqa_ratio}": problem.gqa_ratio > 1}
        tokens |= {token.rstrip("0123456789"): token for token, present in derived.items() if present}
        if problem.dtype.is_fp8 and problem.out_dtype is DType.FP16:
            tokens["out"] = "outfp16"
        if problem.causal:
            del tokens["wr"]
        tokens = {token: tokens[token] for token in _ORDER if token in tokens}
    return "_".join([problem.direction.value, kind_of_code(problem), *tokens.values()])


def kind_of_code(sized: Any) -> str:
    """Architecture, dtypes and head_dims of a problem or a config."""
    head_dim = f"hd{sized.head_dim}" + (f"v{sized.head_dim_v}" if sized.head_dim_v != sized.head_dim else "")
    return f"{sized.arch.short}_{dtypes_of_code(sized)}_{head_dim}"


def dtypes_of_code(sized: Any) -> str:
    """q's dtype, then ``k`` and ``v`` with theirs where these are others: ``e4m3``, ``bf16ke4m3ve4m3``."""
    others = (("k", getattr(sized, "dtype_k", sized.dtype)), ("v", getattr(sized, "dtype_v", sized.dtype)))
    return sized.dtype.value + "".join(name + dtype.value for name, dtype in others if dtype is not sized.dtype)


def _digits(value: bool | float) -> str:
    """The fewest digits that tell the value from every other, ``p`` for the point; none for what is only there."""
    return "" if value is True else repr(float(value)).removesuffix(".0").replace(".", "p")
