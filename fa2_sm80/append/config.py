"""How the append kernel is built."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cute_fa.engine.contract import KernelConfig
from cute_fa.semantics.names import kind_of_code
from cute_fa.semantics.types import DType

NUM_THREADS = 128
CHUNK = 8  # elements of fp16 or bf16 that a thread moves: 16 bytes
MAX_ROWS = 2**31 - 1
ROTARY_STEP = 16  # of rotary_dim: two halves in 16-byte chunks of fp16 or bf16


@dataclass(frozen=True, kw_only=True)
class AppendConfig(KernelConfig):
    """Everything that shapes the machine code. ``page_size`` None: contiguous sequences. ``rotary_dim``: how many of a
    head's first elements rotate, 0 for none; ``rotary_dtype``: fp16, bf16 or fp32, of cosine and sine. ``query``: q
    rotates too. ``rotary_seqlens``: rotations start elsewhere than the new rows. ``packed_*``: with
    cu_seqlens; ``used_*``: with seqused."""

    kernel_module: ClassVar[str] = "fa2_sm80.append.kernel"

    dtype: DType
    head_dim: int
    head_dim_v: int
    page_size: int | None = None
    cache_batch_idx: bool = False
    query: bool = False
    packed_q: bool = False
    packed_k: bool = False
    used_q: bool = False
    used_k: bool = False
    rotary_dim: int = 0
    rotary_dtype: str = "fp32"
    rotary_interleaved: bool = False
    rotary_seqlens: bool = False

    @property
    def compile_name(self) -> str:
        flags = {
            f"page{self.page_size}": self.page_size is not None,
            "index": self.cache_batch_idx,
            "query": self.query,
            "cuq": self.packed_q,
            "cuk": self.packed_k,
            "usedq": self.used_q,
            "usedk": self.used_k,
            f"rotary{self.rotary_dim}": self.rotary_dim > 0,
            self.rotary_dtype: self.rotary_dim > 0,
            "interleaved": self.rotary_interleaved,
            "shifted": self.rotary_seqlens,
        }
        tokens = (token for token, on in flags.items() if on)
        return "_".join(["append", kind_of_code(self), *tokens])


def rows_per_cta(head_dim: int) -> int:
    """Rows, each one head of one token, that a CTA moves."""
    return NUM_THREADS // (head_dim // CHUNK)
