"""Exponentials of sm_100's softmax: pairs, and a share of them on the FMA pipe."""

import cutlass.cute as cute
from cutlass import Float32
from cutlass.cute.arch import inline_ptx

# 2^f = 1 + f·(c1 + f·(c2 + f·c3)) on [0, 1), to 8.6e-5 relative: minimax with the constant fixed, so that 2^0 is 1.
_COEFFICIENTS = (0.07706703990697861, 0.22764499485492706, 0.6951167583465576, 1.0)
# Adding it leaves the whole part of a number, rounded down, in the lowest bits.
_WHOLE = float(2**23 + 2**22)
_LOWEST = -127.0


def emulated_exp2(x: tuple[Float32, Float32]) -> tuple[Float32, Float32]:
    """2^x of two numbers up to 127, without the MUFU: x = n + f, 2^n through the exponent's bits, 2^f a polynomial
    (Cody and Waite; FlashAttention-4). Below −127 it is 2^−127."""
    x = tuple(cute.arch.fmax(value, _LOWEST) for value in x)
    whole = cute.arch.add_packed_f32x2(x, (_WHOLE, _WHOLE), rnd="rm")
    floor = cute.arch.add_packed_f32x2(whole, (-_WHOLE, -_WHOLE))
    fraction = cute.arch.fma_packed_f32x2(floor, (-1.0, -1.0), x)
    power = (_COEFFICIENTS[0],) * 2
    for coefficient in _COEFFICIENTS[1:]:
        power = cute.arch.fma_packed_f32x2(power, fraction, (coefficient, coefficient))
    return tuple(_times_power_of_two(p, n) for p, n in zip(power, whole, strict=True))


def _times_power_of_two(x: Float32, whole: Float32) -> Float32:
    """x · 2^n, n in the lowest bits of ``whole``."""
    return inline_ptx(
        "{ .reg .b32 n; shl.b32 n, {$r1}, 23; add.s32 {$w0}, n, {$r0}; }",
        write_only_types=[Float32],
        read_only_args=[x, whole],
    )


def max_with_nan(a: Float32, b: Float32, c: Float32) -> Float32:
    """The largest of three, NaN if one is."""
    return inline_ptx("max.NaN.f32 {$w0}, {$r0}, {$r1}, {$r2};", write_only_types=[Float32], read_only_args=[a, b, c])
