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

    @property
    def row_lanes(self) -> tuple[int, int]:
        """Threads of a row of keys, or queries, and of one of values."""
        return (
            lanes_of_row(self.head_dim, self.dtype, self.k_row_descale),
            lanes_of_row(self.head_dim_v, self.dtype, self.v_row_descale),
        )


def chunk_of(dtype: DType) -> int:
    """Elements of a row that a thread moves: 16 bytes."""
    return 16 // dtype.bytes


def lanes_of_row(head_dim: int, dtype: DType, measured: bool = False) -> int:
    """Threads that move a row; a power of two of them, which a warp has together, where its largest element is
    ``measured``."""
    chunks = head_dim // chunk_of(dtype)
    return 1 << (chunks - 1).bit_length() if measured else chunks
