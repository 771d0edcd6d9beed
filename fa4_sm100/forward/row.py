"""The row of a tile that one thread has, as a query."""

from typing import Optional

import cutlass.cute as cute
from cutlass import Boolean, Int32, const_expr

from fa4_sm100.forward.config import Fa4ForwardConfig


class Row:
    """Where packed, row = token · pack_gqa + head: the heads of a token are neighbours; the last rows may be none.

    ``token``: of the tile's tokens, which one; ``head``: which head of those that share the tile.
    """

    def __init__(self, config: Fa4ForwardConfig, row: Int32):
        self.config = config
        pack = config.pack_gqa
        self.token = row // pack if const_expr(pack > 1) else row
        self.head = row % pack if const_expr(pack > 1) else Int32(0)

    def exists(self) -> Boolean:
        """Whether the row is a query at all."""
        return self.token < self.config.tokens

    def per_head(self, values: Optional[cute.Tensor], first_head: Int32):
        """A per-head number for the row; None without any. A row that does not exist reads its group's first."""
        return None if const_expr(values is None) else values[first_head + self.head]
