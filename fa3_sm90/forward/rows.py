"""The two rows of a warpgroup's 64 whose scores one thread holds, as queries."""

from typing import Optional

import cutlass.cute as cute
from cutlass import Boolean, Int32, const_expr

from fa3_sm90.forward.config import Fa3ForwardConfig

ROWS = 2


class Rows:
    """Where packed, row = token · pack_gqa + head: the heads of a token are neighbours; the last rows may be none.

    ``tokens``: of the warpgroup's tokens, which one; ``heads``: which head of those that share the tile; ``column``:
    the thread's first column in a block of scores.
    """

    def __init__(self, config: Fa3ForwardConfig, coordinates: cute.Tensor):
        """``coordinates`` (rows, columns) of what the thread holds."""
        self.config = config
        pack = config.pack_gqa
        rows = [coordinates[r, 0][0] for r in range(ROWS)]
        self.column = coordinates[0, 0][1]
        self.tokens = [row // pack if const_expr(pack > 1) else row for row in rows]
        self.heads = [row % pack if const_expr(pack > 1) else Int32(0) for row in rows]

    def exists(self, r: int) -> Boolean:
        """Whether the row is a query at all."""
        return self.tokens[r] < self.config.tokens

    def per_head(self, values: Optional[cute.Tensor], first_head: Int32):
        """A per-head number for each row; None without any. Rows that do not exist read their group's first."""
        if const_expr(values is None):
            return None
        return tuple(values[first_head + head] for head in self.heads)
