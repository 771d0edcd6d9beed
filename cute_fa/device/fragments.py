"""Views of mma.sync accumulators (PTX ISA, "Matrix fragments for mma.m16n8k16").

The accumulator of a tile is ((2, 2), MMA_M, MMA_N): two neighbouring columns, two rows eight apart, then the repeats.
"""

import cutlass.cute as cute


def rows_and_columns(acc: cute.Tensor) -> cute.Tensor:
    """The same registers as a matrix (rows, columns) of what one thread holds: ((2, MMA_M), (2, MMA_N))."""
    shape, stride = acc.layout.shape, acc.layout.stride
    layout = cute.make_layout(
        ((shape[0][1], shape[1]), (shape[0][0], shape[2])),
        stride=((stride[0][1], stride[1]), (stride[0][0], stride[2])),
    )
    return cute.make_tensor(acc.iterator, layout)


def as_operand_a(p: cute.Tensor) -> cute.Tensor:
    """An accumulator-shaped fragment seen as operand A of the next m16n8k16: two n8 blocks make one k16 block, so P
    goes from Q·Kᵀ to P·V without leaving registers."""
    layout = cute.logical_divide(p.layout, (None, None, 2))
    shape, stride = layout.shape, layout.stride
    layout = cute.make_layout(
        ((shape[0][0], shape[0][1], shape[2][0]), shape[1], shape[2][1]),
        stride=((stride[0][0], stride[0][1], stride[2][0]), stride[1], stride[2][1]),
    )
    return cute.make_tensor(p.iterator, layout)
