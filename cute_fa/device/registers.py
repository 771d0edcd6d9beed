"""Registers: what to keep in one, and how to convert them two at a time."""

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Uint32
from cutlass.cute.arch import inline_ptx


def opaque(value):
    """The same value, of unknown origin: the compiler then keeps it in a register instead of computing it again."""
    width = 32 if isinstance(value, Int32) else 64
    return inline_ptx(f"mov.b{width} {{$w0}}, {{$r0}};", write_only_types=[type(value)], read_only_args=[value])


def narrow(source: cute.Tensor, target: cute.Tensor):
    """fp32 fragment to an fp16 or bf16 one of the same layout, rounded to nearest, a pair an instruction: the DSL's own
    conversion of a vector falls back to single elements unless their number is a power of 2."""
    name = "bf16x2" if target.element_type is cutlass.BFloat16 else "f16x2"
    pairs = cute.recast_tensor(target, Uint32)
    for i in range(cute.size(pairs)):
        pairs[i] = inline_ptx(
            f"cvt.rn.{name}.f32 {{$w0}}, {{$r1}}, {{$r0}};",
            write_only_types=[Uint32],
            read_only_args=[source[2 * i], source[2 * i + 1]],
        )
