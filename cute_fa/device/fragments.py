"""Views of mma.sync accumulators (PTX ISA, "Matrix fragments for mma.m16n8k16") and of wgmma's ("Register fragments
and shared memory matrix layouts").

The accumulator of a tile is ((2, 2), MMA_M, MMA_N) for mma.sync: two neighbouring columns, two rows eight apart, then
the repeats. One wgmma m64nN holds the same for all of N: ((2, 2, N / 8), 1, 1).
"""

import cutlass
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


def warpgroup_rows_and_columns(acc: cute.Tensor) -> cute.Tensor:
    """A wgmma accumulator as a matrix (2 rows, (2, N / 8) columns) of what one thread holds."""
    shape, stride = acc.layout.shape[0], acc.layout.stride[0]
    layout = cute.make_layout((shape[1], (shape[0], shape[2])), stride=(stride[1], (stride[0], stride[2])))
    return cute.make_tensor(acc.iterator, layout)


def share_of_columns(acc: cute.Tensor, i: int, n: int) -> cute.Tensor:
    """Share i of n of a wgmma accumulator's columns, as :func:`warpgroup_rows_and_columns` has them."""
    if n == 1:
        return warpgroup_rows_and_columns(acc)
    shape, stride = acc.layout.shape[0], acc.layout.stride[0]
    first, last = (share * shape[2] // n for share in (i, i + 1))
    layout = cute.make_layout((shape[1], (shape[0], last - first)), stride=(stride[1], (stride[0], stride[2])))
    return cute.make_tensor(acc.iterator + first * stride[2], layout)


def as_warpgroup_operand_a(p: cute.Tensor) -> cute.Tensor:
    """A wgmma accumulator-shaped fragment seen as operand A in registers of the next m64nNk16, ((2, 2, 2), 1, N / 16):
    two neighbouring blocks of 8 columns are one k16 step."""
    shape, stride = p.layout.shape[0], p.layout.stride[0]
    layout = cute.make_layout(
        ((shape[0], shape[1], 2), 1, shape[2] // 2), stride=((stride[0], stride[1], stride[2]), 0, 2 * stride[2])
    )
    return cute.make_tensor(p.iterator, layout)


def e4m3_operand_a(p: cute.Tensor) -> cute.Tensor:
    """Registers for an accumulator-shaped fragment as operand A of m64nNk32, ((4, 2, 2), 1, N / 32).

    Of 16 columns a thread t of a row holds 2t, 2t + 1, 8 + 2t and 9 + 2t, in one register; the instruction takes what
    is there for columns 4t … 4t + 3. Operand B has its rows in that order: place 4t + 2u + e is row 8u + 2t + e of 16.
    """
    columns = p.layout.shape[0][2]
    layout = cute.make_layout(((4, 2, 2), 1, columns // 4), stride=((1, 4, 8), 0, 16))
    return cute.make_rmem_tensor(layout, cutlass.Float8E4M3FN)
