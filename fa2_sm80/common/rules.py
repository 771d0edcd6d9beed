"""What the FA2 kernels do not serve."""

from __future__ import annotations

from collections.abc import Callable

from cute_fa.engine.contract import common_objections
from cute_fa.semantics.names import dtypes_of_code
from cute_fa.semantics.problem import AttentionProblem
from cute_fa.semantics.types import Direction, PersistentMode

MAX_CTAS = 2**31 - 1  # of a grid in x
# Of a thread's 255 registers, those of the products that a CTA sums up over its whole loop.
MAX_ACCUMULATORS = 128


def objections(
    problem: AttentionProblem, grids: Callable[[], dict[str, int]] = dict, *, rows_of_any_head: bool = False
) -> list[str]:
    """Reasons why an FA2 kernel does not serve the problem.

    ``grids``: CTAs of its launches, by what they are one of, asked where nothing else stands against the problem;
    ``rows_of_any_head``: whether its tiles hold single rows, of any query head and any page, and the keys of a tile may
    be split.
    """
    reasons = []
    if problem.has_codes and not rows_of_any_head:
        reasons.append(f"dtype {dtypes_of_code(problem)}: this kernel takes fp16 and bf16, and widens no codes")
    reasons += common_objections(problem, "16-byte copies", decodes=rows_of_any_head)
    if not rows_of_any_head:
        if problem.page_size is not None:
            reasons.append(f"page_size {problem.page_size}: this kernel reads contiguous K and V only")
        if problem.pack_gqa and problem.gqa_ratio > 1:
            reasons.append("pack_gqa: this kernel's tiles hold the queries of one head")
    elif problem.ranges:
        reasons.append("a range plan: its masks are of whole tiles of queries, this kernel's tiles hold any rows")
    if problem.direction is Direction.BACKWARD:
        indexed = {"cache_batch_idx": problem.cache_batch_idx, "cache_leftpad": problem.cache_leftpad}
        reasons += [f"{name}: a cache has no gradient" for name, given in indexed.items() if given]
    if problem.persistent is PersistentMode.ON and problem.num_splits:
        reasons.append("persistent: this kernel launches one CTA for each tile")
    if reasons:
        return reasons
    return [f"{ctas} {name}: a grid has at most {MAX_CTAS} CTAs" for name, ctas in grids().items() if ctas > MAX_CTAS]


def accumulator_objection(registers: int, what: str) -> str | None:
    """Why a thread cannot hold so many ``registers`` for ``what``; None if it can."""
    if registers <= MAX_ACCUMULATORS:
        return None
    return f"registers: {registers} a thread for {what}, at most {MAX_ACCUMULATORS} of 255 beside scores and operands"
