"""Registers: what to keep in one, and how to convert them two at a time."""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Uint32
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


def narrow_to_e4m3(source: cute.Tensor, target: cute.Tensor):
    """fp32 accumulator of a wgmma to e4m3 in the registers of operand A, saturating: see
    :func:`cute_fa.device.fragments.e4m3_operand_a`."""
    words = cute.recast_tensor(target, Uint32)
    for word in range(cute.size(words)):
        row, first = word % 2, 8 * (word // 2)  # two blocks of 8 columns, 4 registers each
        columns = [source[first + 4 * block + 2 * row + c] for block in range(2) for c in range(2)]
        words[word] = inline_ptx(
            "{ .reg .b16 low, high; cvt.rn.satfinite.e4m3x2.f32 low, {$r1}, {$r0}; "
            "cvt.rn.satfinite.e4m3x2.f32 high, {$r3}, {$r2}; mov.b32 {$w0}, {low, high}; }",
            write_only_types=[Uint32],
            read_only_args=columns,
        )


def placed_fma(a: Float32, b: Float32, c: Float32) -> Float32:
    """a · b + c where it stands: NVVM moves what it understands to the use of the result, over what writes c."""
    return inline_ptx("fma.rn.f32 {$w0}, {$r0}, {$r1}, {$r2};", write_only_types=[Float32], read_only_args=[a, b, c])


def rounded_product(a: Float32, b: Float32) -> Float32:
    """a · b, rounded before anything is added: never part of an fma."""
    return inline_ptx("mul.rn.f32 {$w0}, {$r0}, {$r1};", write_only_types=[Float32], read_only_args=[a, b])


def sum_rounded_up(a: Float32, b: Float32) -> Float32:
    """a + b, rounded towards +inf."""
    return inline_ptx("add.rp.f32 {$w0}, {$r0}, {$r1};", write_only_types=[Float32], read_only_args=[a, b])
