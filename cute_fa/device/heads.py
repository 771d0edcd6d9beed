"""One head of one sequence in the caller's tensors."""

import cutlass.cute as cute
from cutlass import Int32, const_expr


def head_matrix(
    tensor: cute.Tensor, head: Int32, batch: Int32, offset: Int32, packed: bool, padded: bool = False
) -> cute.Tensor:
    """(rows, head_dim) of one head of one sequence; ``padded``: ``offset`` rows of a dense one do not count."""
    matrix = tensor[None, head, None] if const_expr(packed) else tensor[batch, None, head, None]
    return cute.domain_offset((offset, 0), matrix) if const_expr(packed or padded) else matrix


def head_row(lse: cute.Tensor, head: Int32, batch: Int32, offset: Int32, packed: bool) -> cute.Tensor:
    """LSE (rows) of one head of one sequence."""
    if const_expr(packed):
        return cute.domain_offset((offset,), lse[head, None])
    return lse[batch, head, None]
