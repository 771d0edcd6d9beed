"""P on its way from the accumulator of Q·Kᵀ to operand A of P·V: its type, and the exponents that suit it."""

import cutlass.cute as cute

from cute_fa.device.dtypes import CUTE_DTYPE
from cute_fa.device.fragments import as_warpgroup_operand_a, e4m3_operand_a
from cute_fa.device.registers import narrow, narrow_to_e4m3, narrow_to_e4m3_in_order
from cute_fa.device.softmax import E4M3, WIDE
from cute_fa.semantics.types import DType


def probability_type(dtype: DType):
    """P's type for inputs of a dtype: e4m3, whichever fp8 type they have."""
    return CUTE_DTYPE[DType.E4M3 if dtype.is_fp8 else dtype]


class SixteenBits:
    """P in fp16 or bf16."""

    exponents = WIDE

    def __init__(self, acc: cute.Tensor, dtype):
        """``acc``: the accumulator, in which the exponentials are."""
        self.acc = acc
        self.registers = cute.make_rmem_tensor_like(acc, dtype)
        self.operand = as_warpgroup_operand_a(self.registers)

    def narrow(self):
        """Exponentials to P."""
        narrow(self.acc, self.registers)


class EightBits:
    """P in e4m3."""

    exponents = E4M3

    def __init__(self, acc: cute.Tensor, key_major: bool, parts: int):
        """``acc``: the accumulator, in which the exponentials are; ``key_major``: V has its keys in their own order,
        not in that of the accumulator's registers; ``parts``: of P·V."""
        self.acc, self.operand = acc, e4m3_operand_a(acc)
        self.key_major = key_major
        # In one or two parts that costs more instructions, in four there are no registers for less: 2 spilled accesses.
        self.anew = parts > 2

    def narrow(self):
        """Exponentials to P."""
        if self.key_major:
            narrow_to_e4m3_in_order(self.acc, self.operand, self.anew)
        else:
            narrow_to_e4m3(self.acc, self.operand)
