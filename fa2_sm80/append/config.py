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
CHUNK = 8  # elements of fp16 or bf16 that a thread moves: 16 bytes
MAX_ROWS = 2**31 - 1


_AppendFlags: Any = flags_class(AppendProblem)


@dataclass(frozen=True, kw_only=True)
class AppendConfig(_AppendFlags, KernelConfig):
    """Everything that shapes the machine code: beside the flags that ``AppendProblem`` declares the head_dims."""

    kernel_module: ClassVar[str] = "fa2_sm80.append.kernel"

    dtype: DType
    head_dim: int
    head_dim_v: int

    @property
    def compile_name(self) -> str:
        return "_".join(["append", kind_of_code(self), *flag_tokens(self, AppendProblem)])


def rows_per_cta(head_dim: int) -> int:
    """Rows, each one head of one token, that a CTA moves."""
    return NUM_THREADS // (head_dim // CHUNK)
