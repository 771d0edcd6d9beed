"""How the append kernel is built."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from cute_fa.engine.contract import KernelConfig, flags_class
from cute_fa.semantics.append_problem import AppendProblem
from cute_fa.semantics.names import kind_of_code
from cute_fa.semantics.options import flag_tokens
from cute_fa.semantics.types import DType

NUM_THREADS = 128
MAX_ROWS = 2**31 - 1


_AppendFlags: Any = flags_class(AppendProblem)


@dataclass(frozen=True, kw_only=True)
class AppendConfig(_AppendFlags, KernelConfig):
    """Everything that shapes the machine code: beside the flags that ``AppendProblem`` declares the dtypes, of rows and
    of both caches, and the head_dims."""

    kernel_module: ClassVar[str] = "fa2_sm80.append.kernel"

    dtype: DType
    dtype_k: DType
    dtype_v: DType
    head_dim: int
    head_dim_v: int

    @property
    def compile_name(self) -> str:
        return "_".join(["append", kind_of_code(self), *flag_tokens(self, AppendProblem)])

    @property
    def quantises(self) -> bool:
        """Whether rows in fp16 or bf16 are rounded to fp8."""
        return self.dtype is not self.dtype_k

    @property
    def dtype_new_v(self) -> DType:
        """Of new values."""
        return self.dtype if self.quantises else self.dtype_v


def chunk_of(dtype: DType) -> int:
    """Elements of a row that a thread moves: 16 bytes."""
    return 16 // dtype.bytes


def rows_per_cta(head_dim: int, dtype: DType) -> int:
    """Rows, each one head of one token, that a CTA moves."""
    return NUM_THREADS // (head_dim // chunk_of(dtype))
