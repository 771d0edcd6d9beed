"""Products of matrices that are the same bits in whatever company they are computed.

BLAS chooses its order of summation by the sizes of the whole product and by the number of threads, so that an element
would depend on which warps happen to run together. Here (products.c) it is the sum over k from 0 up, in float32 with
each product and each sum rounded, on every machine. The hardware has another order and less internal precision.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import numpy as np

from ..compiled import compiled

_f4 = np.float32
_SIZES = ("matrices", "rows", "columns", "depth", "right_matrix", "right_column", "right_depth",
          "out_matrix", "out_eight", "out_row", "out_block", "out_half", "even_first")  # fmt: skip
# the first element of a writable array, several times as quick as ``array.ctypes``
_float, _double, _int = (kind.from_buffer for kind in (ctypes.c_float, ctypes.c_double, ctypes.c_int64))


class _Sizes(ctypes.Structure):
    """``struct sizes`` of products.c."""

    _fields_ = [(name, ctypes.c_int64) for name in _SIZES]


@functools.cache
def _library():
    source = Path(__file__).with_name("products.c")
    options = ["-O3", "-ffp-contract=off", "-lm"]
    library = ctypes.CDLL(str(compiled(source, "products.so", options, "the library of matrix products")))
    floats, doubles = ctypes.POINTER(ctypes.c_float), ctypes.POINTER(ctypes.c_double)
    library.ptxsim_products.argtypes = [ctypes.POINTER(_Sizes), floats, floats, ctypes.POINTER(ctypes.c_int64), floats]
    library.ptxsim_double_products.argtypes = [*[ctypes.c_int64] * 4, doubles, doubles, doubles]
    library.ptxsim_products.restype = library.ptxsim_double_products.restype = None
    return library


@functools.lru_cache(maxsize=1024)
def _sizes(matrices, rows, columns, depth, rows_first, fragments):
    right = (depth, 1) if rows_first else (1, columns)
    if fragments:  # [block of 8 columns, half of 16 rows, odd column, matrix, (row, t)]
        plane = 32 * matrices
        out = (32, 2 * plane, 4, rows // 4 * plane, plane, 1)
    else:
        out = (rows * columns, 8 * columns, columns, 8, 4, 0)
    return _Sizes(matrices, rows, columns, depth, columns * depth, *right, *out)


def _ready(array, kind=_f4):
    return array if array.flags.carray and array.dtype == kind else np.array(array, kind, order="C")


def products(left, right, right_of=None, fragments=False):
    """left[i] · right[right_of[i]]ᵀ for each i, as float32; without ``right_of`` right[i]. NaNs are 0x7fffffff.

    ``left`` [n, rows, K], ``right`` [matrices, columns, K]; rows in fours, columns in eights. The result is
    [n, rows, columns], or with ``fragments`` as the accumulators of mma and wgmma hold it, rows in eights:
    [columns / 8 * rows / 8 * 2, n, 32], registers ordered (block of 8 columns, eight of rows, odd column), lane =
    4 * row + half of the column.
    """
    n, rows, depth = left.shape
    columns = right.shape[1]
    transposed = right.swapaxes(1, 2)
    rows_first = not transposed.flags.carray
    left, right = _ready(left), _ready(right if rows_first else transposed)
    out = np.empty((rows * columns // 32, n, 32) if fragments else (n, rows, columns), _f4)
    sizes = _sizes(n, rows, columns, depth, rows_first, fragments)
    which = None if right_of is None else _int(np.array(right_of, np.int64))
    _library().ptxsim_products(sizes, _float(left), _float(right), which, _float(out))
    return out


def double_products(left, right):
    """left[i] · right[i]ᵀ for each i in float64, a chain of fma: ``left`` [n, rows, K], ``right`` [n, columns, K]."""
    left, right = _ready(left, np.float64), _ready(right, np.float64)
    out = np.empty((*left.shape[:2], right.shape[1]))
    sizes = (*left.shape[:2], right.shape[1], left.shape[2])
    _library().ptxsim_double_products(*sizes, _double(left), _double(right), _double(out))
    return out


def in_fragments(product):
    """A product [n, rows, columns] as ``products`` gives it with ``fragments``."""
    n, rows, columns = product.shape
    product = product.reshape(n, rows // 8, 8, columns // 8, 4, 2).transpose(3, 1, 5, 0, 2, 4)
    return np.ascontiguousarray(product).reshape(-1, n, 32)


def from_fragments(registers, rows):
    """Registers [count, n, 32] of accumulators with so many rows as [n, rows, columns]: ``in_fragments`` undone."""
    n = registers.shape[1]
    return registers.reshape(-1, rows // 8, 2, n, 8, 4).transpose(3, 1, 4, 0, 5, 2).reshape(n, rows, -1)


def sum_of_blocks(partial, row_scales, column_scales):
    """The sum over blocks of products [blocks, ..., rows, columns], each times the float64 scale factors of its rows
    [blocks, ..., rows] and columns [blocks, ..., columns]; from the first to the last in float64, then as float32."""
    return sum(
        product * rows[..., :, None] * columns[..., None, :]
        for product, rows, columns in zip(partial, row_scales, column_scales, strict=True)
    ).astype(_f4)
