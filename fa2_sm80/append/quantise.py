"""fp32 to codes: rounded to nearest even, beyond the largest finite value that one; NaN to NaN, in int8 to 0."""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Uint32
from cutlass.cute.arch import inline_ptx

from cute_fa.semantics.types import SmArch

_LARGEST = {cutlass.Float8E4M3FN: 448.0, cutlass.Float8E5M2: 57344.0, cutlass.Int8: 127.0}  # codes


def quantised(values: cute.Tensor, descale: Float32, dtype, arch: SmArch) -> cute.Tensor:
    """Codes of values / descale, four to a register; the number of values is a multiple of 4."""
    codes = cute.make_rmem_tensor(cute.size(values), dtype)
    words = cute.recast_tensor(codes, Uint32)
    pack = _converted if arch.number >= 89 else _assembled  # sm_89 is the first to convert to fp8 in hardware
    if dtype is cutlass.Int8:
        pack = _integers
    for i in range(cute.size(words)):
        words[i] = pack([values[4 * i + j] / descale for j in range(4)], dtype)
    return codes


@cute.jit
def own_descale(values: cute.Tensor, lanes: cutlass.Constexpr[int], dtype: cutlass.Constexpr) -> Float32:
    """What takes the largest finite element of a row to the largest code of ``dtype``, between 2^-32 and 2^32. The row
    lies in ``lanes`` neighbouring threads of a warp, a power of two of them."""
    largest = Float32(0.0)
    for i in cutlass.range_constexpr(cute.size(values)):
        magnitude = cute.math.absf(values[i])
        largest = cute.arch.fmax(largest, cutlass.select_(magnitude < Float32.inf, magnitude, Float32(0.0)))
    for step in cutlass.range_constexpr(lanes.bit_length() - 1):
        largest = cute.arch.fmax(largest, cute.arch.shuffle_sync_bfly(largest, offset=1 << step))
    descale = largest / Float32(_LARGEST[dtype])
    return cute.arch.fmin(cute.arch.fmax(descale, Float32(2.0**-32)), Float32(2.0**32))


def _converted(values: list, dtype) -> Uint32:
    kind = "e4m3x2" if dtype is cutlass.Float8E4M3FN else "e5m2x2"
    return inline_ptx(
        f"{{ .reg .b16 low, high; cvt.rn.satfinite.{kind}.f32 low, {{$r1}}, {{$r0}}; "
        f"cvt.rn.satfinite.{kind}.f32 high, {{$r3}}, {{$r2}}; mov.b32 {{$w0}}, {{low, high}}; }}",
        write_only_types=[Uint32],
        read_only_args=values,
    )


def _integers(values: list, dtype) -> Uint32:
    """Saturated by fp32 minima and maxima, of which NaN is the other operand: it becomes 0 before."""
    bounded = [cutlass.select_(value == value, value, Float32(0.0)) for value in values]
    bounded = [cute.arch.fmin(cute.arch.fmax(value, Float32(-127.0)), Float32(127.0)) for value in bounded]
    return inline_ptx(
        "{ .reg .b32 a, b, c, d; cvt.rni.s32.f32 a, {$r0}; cvt.rni.s32.f32 b, {$r1}; cvt.rni.s32.f32 c, {$r2}; "
        "cvt.rni.s32.f32 d, {$r3}; prmt.b32 a, a, b, 0x0040; prmt.b32 c, c, d, 0x0040; prmt.b32 {$w0}, a, c, 0x5410; }",
        write_only_types=[Uint32],
        read_only_args=bounded,
    )


def _assembled(values: list, dtype) -> Uint32:
    word = _code(values[0], dtype)
    for i in range(1, 4):
        word = word | (_code(values[i], dtype) << (8 * i))
    return word


def _code(value: Float32, dtype) -> Uint32:
    """In the arithmetic of fp32. For values of exponent e, which is that of the smallest normal code or higher, codes
    are multiples of 2^(e − m) with m bits of mantissa: adding and subtracting 1.5 · 2^(e − m + 23) rounds to these.
    Scaled by the difference of the biases, the highest bits of an fp32 behind its sign are the code's, those of
    subnormal ones too."""
    mantissa, bias, largest = (3, 7, 0x43E00000) if dtype is cutlass.Float8E4M3FN else (2, 15, 0x47600000)
    least = (128 - bias) << 23  # exponent of the smallest normal value, 1 − bias, in fp32
    magic = ((23 - mantissa) << 23) + (1 << 22)
    scale = bias << 23  # 2^(bias − 127)
    return inline_ptx(
        "{ .reg .f32 x, m; .reg .b32 bits, sign; .reg .pred nan; "
        f"min.f32 x, {{$r0}}, 0f{largest:08X}; max.f32 x, x, 0f{largest | 1 << 31:08X}; "
        "mov.b32 bits, x; shr.u32 sign, bits, 24; and.b32 sign, sign, 128; and.b32 bits, bits, 0x7F800000; "
        f"max.u32 bits, bits, {least}; add.u32 bits, bits, {magic}; mov.b32 m, bits; "
        f"add.rn.f32 x, x, m; sub.rn.f32 x, x, m; mul.rn.f32 x, x, 0f{scale:08X}; "
        f"mov.b32 bits, x; shr.u32 bits, bits, {23 - mantissa}; and.b32 bits, bits, 127; or.b32 bits, bits, sign; "
        "setp.nan.f32 nan, {$r0}, {$r0}; selp.b32 {$w0}, 127, bits, nan; }",
        write_only_types=[Uint32],
        read_only_args=[value],
    )
