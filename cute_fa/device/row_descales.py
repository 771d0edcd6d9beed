"""fp8 caches whose rows have descales of their own, one for each key and kv head, in registers: the keys' multiply the
columns of the scores, the values' those of P, since a key's V is codes × descale.

P goes to the product in 16 bits, so that its columns are multiplied relative to a unit: a power of two that is as large
as the largest descale of V among the keys that a row has seen, less than a factor of two below it. O is in that unit
and follows it. A row's unit depends on nothing but the keys that it sees, in their order: not on its neighbours, nor on
how the keys came, as batch-invariant mode asks.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, const_expr

from cute_fa.device.registers import rounded_product
from cute_fa.device.softmax import quad_max, scale_row

# Of a row that has seen no key: below all descales, which are at least 2^-32, and its inverse is a number.
_LEAST_UNIT = 2.0**-64
_EXPONENT, _TWICE_BIAS = 0x7F800000, 254 << 23  # bits of fp32


def column_factors(block: cute.Tensor, columns: cute.Tensor, column: Int32) -> cute.Tensor:
    """What a thread's columns of an accumulator are multiplied by. ``block`` (keys): the descales of a block in shared
    memory; ``columns``: static (row, column) of each register of thread 0, whose columns ``column`` is added to: two
    and two are neighbours."""
    count = cute.size(columns, mode=[1])
    factors = cute.make_rmem_tensor(count, Float32)
    for c in range(0, count, 2):
        pair = cute.make_tensor((block.iterator + columns[0, c][1] + column).align(8), cute.make_layout(2))
        target = cute.make_tensor(factors.iterator + c, cute.make_layout(2))
        cute.autovec_copy(pair, target)
    return factors


def scale_columns(scores: cute.Tensor, factors: cute.Tensor):
    """scores[r, c] *= factors[c], rounded there, on the (rows, columns) view of an accumulator."""
    for r in range(cute.size(scores, mode=[0])):
        for c in range(cute.size(scores, mode=[1])):
            scores[r, c] = rounded_product(scores[r, c], factors[c])


class ValueUnits:
    """The units of the rows that a thread holds."""

    def __init__(self, num_rows: int):
        self.num_rows = num_rows
        self.units = cute.make_rmem_tensor(num_rows, Float32)
        self.reset()

    def reset(self):
        """For rows that have seen no key."""
        self.units.fill(_LEAST_UNIT)

    @cute.jit
    def grow(self, scores: cute.Tensor, acc: cute.Tensor, factors: cute.Tensor, masked: cutlass.Constexpr[bool]):
        """Units and ``acc`` (rows, columns) follow a block whose values have the descales ``factors``. ``scores``: of
        the block, −inf where hidden, which is so nowhere unless ``masked``."""
        units, wanted = self.units, cute.make_rmem_tensor(self.num_rows, Float32)
        for r in cutlass.range_constexpr(self.num_rows):
            if const_expr(masked or r == 0):
                largest = Float32(_LEAST_UNIT)
                for c in cutlass.range_constexpr(cute.size(factors)):
                    factor = factors[c]
                    if const_expr(masked):
                        factor = cutlass.select_(scores[r, c] == -Float32.inf, largest, factor)
                    largest = cute.arch.fmax(largest, factor)
                wanted[r] = _power_below(quad_max(largest))
            else:
                wanted[r] = wanted[0]
        while cute.arch.vote_any_sync(_above(wanted, units)):  # a loop that runs once, see OnlineSoftmax.update()
            for r in cutlass.range_constexpr(self.num_rows):
                unit = cute.arch.fmax(units[r], wanted[r])
                scale_row(acc, r, units[r] * _inverse(unit))
                units[r] = unit

    def scale(self, probabilities: cute.Tensor, factors: cute.Tensor):
        """probabilities[r, c] *= factors[c] in the row's unit."""
        for r in range(self.num_rows):
            inverse = _inverse(self.units[r])
            for c in range(cute.size(factors)):
                own = rounded_product(factors[c], inverse)
                probabilities[r, c] = rounded_product(probabilities[r, c], own)

    def leave(self, acc: cute.Tensor):
        """``acc`` (rows, columns) in units of 1."""
        for r in range(self.num_rows):
            scale_row(acc, r, self.units[r])


def _power_below(value: Float32) -> Float32:
    """The power of two of a positive number's exponent."""
    return (value.bitcast(Int32) & _EXPONENT).bitcast(Float32)


def _inverse(power: Float32) -> Float32:
    """1 / power, exactly."""
    return (_TWICE_BIAS - power.bitcast(Int32)).bitcast(Float32)


def _above(wanted: cute.Tensor, units: cute.Tensor) -> Boolean:
    above = wanted[0] > units[0]
    for r in range(1, cute.size(units)):
        above = above | (wanted[r] > units[r])
    return above
