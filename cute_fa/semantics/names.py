"""Names of kernels: the one place that fixes which tokens there are and their order."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cute_fa.engine.contract import AttentionKernel
    from cute_fa.semantics.problem import AttentionProblem


def canonical_name(kernel: type[AttentionKernel], problem: AttentionProblem) -> str:
    """What ran, run-time values included, e.g. ``fa3_fwd_sm90a_bf16_hd128_causal_varlen_sw4096_sink4_gqa8``: the
    kernel's family, then :func:`problem_name`."""
    return f"{kernel.family}_{problem_name(problem)}"


def problem_name(problem: AttentionProblem) -> str:
    """The problem in tokens: direction, architecture, dtype, ``hd`` head_dim (``v`` head_dim_v if it differs),
    ``causal``, ``varlen``, ``sw`` window left, ``wr`` window right (where not causal; ``wr-1`` if literally −1),
    ``alibi``, ``sink`` sink tokens, ``softcap`` cap (``p`` for the point), ``lsink`` learnable sink, ``page`` page
    size, ``split`` number of splits, ``gqa`` query heads per kv head; of a backward ``dlse`` where the gradient of LSE
    is given, ``dalibi`` where that of the slopes is wanted, ``det`` deterministic. What a problem does not use has no
    token.
    """
    head_dim = f"hd{problem.head_dim}"
    if problem.head_dim_v != problem.head_dim:
        head_dim += f"v{problem.head_dim_v}"
    window_right = None if problem.causal else problem.window_right
    tokens = {
        problem.direction.value: True,
        problem.arch.short: True,
        problem.dtype.value: True,
        head_dim: True,
        "causal": problem.causal,
        "varlen": problem.varlen,
        f"sw{problem.window_left}": problem.window_left is not None,
        f"wr{window_right}": window_right is not None,
        "alibi": problem.alibi,
        f"sink{problem.sink_tokens}": problem.sink_tokens > 0,
        f"softcap{_digits(problem.softcap)}": problem.softcap > 0.0,
        "lsink": problem.learnable_sink,
        f"page{problem.page_size}": problem.page_size is not None,
        f"split{problem.num_splits}": problem.num_splits > 1,
        f"gqa{problem.gqa_ratio}": problem.gqa_ratio > 1,
        "dlse": problem.lse_gradient,
        "dalibi": problem.slopes_gradient,
        "det": problem.deterministic,
    }
    return "_".join(token for token, present in tokens.items() if present)


def _digits(value: float) -> str:
    """The fewest digits that tell the value from every other, ``p`` for the point."""
    return repr(float(value)).removesuffix(".0").replace(".", "p")
