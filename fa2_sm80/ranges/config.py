"""How the kernel that makes walks is built."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cute_fa.engine.contract import KernelConfig
from cute_fa.semantics.walk_layout import mask_words

NUM_THREADS = 128
# Blocks of columns are marked in bit sets in shared memory, 16 KB each.
MAX_BLOCKS = 2**17
# Ranges are sorted by class, the power of two that their rows reach, and by their first row within it.
CLASSES = 32


@dataclass(frozen=True)
class RangeWalkConfig(KernelConfig):
    """``tile_rows``, ``tile_columns``: of the kernel that will walk."""

    kernel_module: ClassVar[str] = "fa2_sm80.ranges.kernel"

    tile_rows: int
    tile_columns: int

    @property
    def words(self) -> int:
        """Of a row of a mask."""
        return mask_words(self.tile_columns)

    @property
    def rows_per_thread(self) -> int:
        return -(-self.tile_rows // NUM_THREADS)

    @property
    def compile_name(self) -> str:
        return f"ranges_{self.arch.short}_rows{self.tile_rows}_columns{self.tile_columns}"
