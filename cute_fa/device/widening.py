"""What the forwards have in common that read caches in fp8 or int8, and queries in 16 bits or in fp8: every code of
e4m3, e5m2 and int8 is a number of fp16, so that codes widen exactly and descales are factors of sums, in fp32. No DSL.
"""

from __future__ import annotations

from cute_fa.engine.contract import FeatureConfig
from cute_fa.semantics.problem import AttentionProblem
from cute_fa.semantics.types import DType


class WideningConfig(FeatureConfig):
    """A config whose keys and values may be codes, and if these are fp8 also its queries."""

    @property
    def widens(self) -> bool:
        """Whether keys and values are codes, which become fp16."""
        return self.dtype_k.is_codes

    @property
    def product_dtype(self) -> DType:
        """Of the matrix products' operands."""
        return DType.FP16 if self.widens else self.dtype

    @property
    def converts_queries(self) -> bool:
        """Whether Q is of another type than the products' operands: bf16, or codes."""
        return self.product_dtype is not self.dtype

    @property
    def keeps_small_probabilities(self) -> bool:
        """Whether P in fp16 is to have all bits of small probabilities: of queries in other types, and of keys whose
        values have a small descale beside a large one."""
        return self.converts_queries or self.v_row_descale

    @property
    def scales_rows(self) -> bool:
        """Whether rows of Q are brought into the range of fp16, each by a power of two of its own."""
        return self.converts_queries and self.dtype is DType.BF16


def code_objections(problem: AttentionProblem, head_dim_rule: str) -> list[str]:
    """Reasons why a kernel that widens codes does not serve the problem: rows that are no multiples of 16 bytes
    (``head_dim_rule`` says what asks for them), descales of blocks, what is asked of fp8 products alone."""
    reasons = []
    if problem.has_codes:
        sizes = {name: getattr(problem, name) for name in ("head_dim", "head_dim_v")}
        reasons += [
            f"{name} {size} in 8 bits: a multiple of 16 is needed ({head_dim_rule})"
            for name, size in sizes.items()
            if size % 16
        ]
        if problem.k_block_descale or problem.v_block_descale:
            reasons.append("descales of blocks of keys: this kernel takes those of sequences, of pages and of rows")
    if problem.promote_every is not None and problem.dtype.is_fp8:
        reasons.append(f"promote_every {problem.promote_every}: this kernel's products are of fp16, not of fp8")
    if problem.v_layout != "head_dim":
        reasons.append(f"v_layout {problem.v_layout}: this kernel reads V by rows")
    return reasons
