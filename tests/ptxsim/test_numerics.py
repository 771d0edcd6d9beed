"""Roundings, saturation, flushing and the errors of approximate functions (PTX ISA 9.7.3, 9.7.9 cvt)."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

from tests.ptxsim.test_floating import rounded
from tests.testing.ptx import elementwise, same_bits

COUNT = 256
MODES = ["rn", "rz", "rm", "rp"]


def numbers(seed, spread=4.0):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(COUNT) * np.exp(spread * rng.standard_normal(COUNT))).astype(np.float32)


# ---- directed rounding ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_quotients(mode):
    a, b = numbers(1), numbers(2)
    a[:64] = (b[:64].astype(np.float64) * np.arange(1, 65)).astype(np.float32)  # quotients close to whole numbers
    b[64:72] = 2.0**-20  # exact ones
    expected = [rounded(Fraction(float(x)) / Fraction(float(y)), mode) for x, y in zip(a, b, strict=True)]
    same_bits(elementwise(f"div.{mode}.f32 {{d}}, {{a}}, {{b}};", [a, b], np.float32), np.array(expected, np.float32))
    expected = [rounded(1 / Fraction(float(x)), mode) for x in b]
    same_bits(elementwise(f"rcp.{mode}.f32 {{d}}, {{a}};", [b], np.float32), np.array(expected, np.float32))


def root(x, mode):
    """sqrt of a float32, rounded: by whole numbers of 24 and more bits."""
    value = Fraction(float(x)) * 2**400
    near = Fraction(math.isqrt(int(value)), 2**200)
    exact = near * near == Fraction(float(x))
    return rounded(near if exact else near + Fraction(1, 2**201), mode)


@pytest.mark.parametrize("mode", MODES)
def test_roots(mode):
    x = np.abs(numbers(3))
    x[:32] = np.arange(32, dtype=np.float32) ** 2  # exact ones
    expected = np.array([root(v, mode) if v else 0.0 for v in x], np.float32)
    same_bits(elementwise(f"sqrt.{mode}.f32 {{d}}, {{a}};", [x], np.float32), expected)


def test_directed_overflow():
    """Beyond the largest number: that number towards zero, infinity away from it."""
    a, b = np.full(4, 3e38, np.float32) * np.array([1, -1, 1, -1], np.float32), np.full(4, 0.5, np.float32)
    top = np.finfo(np.float32).max
    for mode, expected in (
        ("rz", (top, -top)),
        ("rm", (top, -np.inf)),
        ("rp", (np.inf, -top)),
        ("rn", (np.inf, -np.inf)),
    ):
        for instruction in ("div", "add"):
            c = b if instruction == "div" else a
            got = elementwise(f"{instruction}.{mode}.f32 {{d}}, {{a}}, {{b}};", [a, c], np.float32)
            np.testing.assert_array_equal(got, np.array(expected * 2, np.float32))


@pytest.mark.parametrize("mode", ["rz", "rm", "rp"])
@pytest.mark.parametrize("source", [np.uint32, np.int32, np.uint64, np.int64])
def test_integers_to_floats(source, mode):
    info = np.iinfo(source)
    x = np.random.default_rng(0).integers(info.min, info.max, COUNT, source, endpoint=True)
    x[:6] = [0, 1, info.min, info.max, 1 << 24, (1 << 24) + 1]
    expected = np.array([rounded(Fraction(int(v)), mode) if v else 0.0 for v in x], np.float32)
    kind = np.dtype(source).kind.replace("i", "s") + str(8 * np.dtype(source).itemsize)
    same_bits(elementwise(f"cvt.{mode}.f32.{kind} {{d}}, {{a}};", [x], np.float32), expected)


# ---- halves --------------------------------------------------------------------------------------------------------


def half_values(element):
    """All finite numbers of a type in order, as float64."""
    bits = np.arange(0x7C00 if element == "f16" else 0x7F80, dtype=np.uint16)
    return decode_half(bits, element)


def decode_half(bits, element):
    if element == "f16":
        return bits.view(np.float16).astype(np.float64)
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def half_inputs(element):
    x = numbers(4, spread=2.0)
    x[:12] = [0.0, -0.0, 1.0, -1.0, 65504.0, 65519.0, 65536.0, -65536.0, 3.4e38, -3.4e38, 2.0**-24, -(2.0**-26)]
    x[12:15] = [np.inf, -np.inf, np.nan]
    return x


@pytest.mark.parametrize("element", ["f16", "bf16"])
@pytest.mark.parametrize("mode", ["rm", "rp"])
def test_halves_towards_infinities(element, mode):
    x, table = half_inputs(element), half_values(element)
    table = np.concatenate([[-np.inf], -table[::-1], table, [np.inf]])
    got = decode_half(elementwise(f"cvt.{mode}.{element}.f32 {{d}}, {{a}};", [x], np.uint16), element)
    for value, result in zip(x.astype(np.float64), got, strict=True):
        if np.isnan(value):
            assert np.isnan(result)
        else:
            assert result == (table[table <= value].max() if mode == "rm" else table[table >= value].min())


@pytest.mark.parametrize("element", ["f16", "bf16"])
@pytest.mark.parametrize("mode", ["rn", "rz"])
def test_halves_that_saturate(element, mode):
    """.satfinite: what is beyond the largest number, infinities too, becomes it; NaN stays."""
    x, largest = half_inputs(element), half_values(element).max()
    plain = decode_half(elementwise(f"cvt.{mode}.{element}.f32 {{d}}, {{a}};", [x], np.uint16), element)
    assert np.isinf(plain).any()
    expected = np.clip(plain, -largest, largest)
    got = elementwise(f"cvt.{mode}.satfinite.{element}.f32 {{d}}, {{a}};", [x], np.uint16)
    np.testing.assert_array_equal(decode_half(got, element), expected)
    pair = elementwise(
        f"cvt.{mode}.relu.satfinite.{element}x2.f32 {{d}}, {{a}}, {{b}};", [x, x[::-1].copy()], np.uint32
    )
    rectified = np.where(np.isnan(expected), np.nan, np.maximum(expected, 0))
    np.testing.assert_array_equal(decode_half((pair >> 16).astype(np.uint16), element), rectified)
    np.testing.assert_array_equal(decode_half(pair.astype(np.uint16), element), rectified[::-1])


def test_tf32_that_saturates():
    x = np.array([3.4028235e38, -np.inf, np.inf, np.nan, 1.0, -3.4028235e38, 1e30, 0.0], np.float32)
    got = elementwise("cvt.rna.satfinite.tf32.f32 {d}, {a};", [x], np.float32)
    top = np.uint32(0x7F7FE000).view(np.float32)
    np.testing.assert_array_equal(got[[0, 1, 2, 5]], [top, -top, top, -top])
    assert np.isnan(got[3]) and got[4] == 1 and got[7] == 0
    assert np.isinf(elementwise("cvt.rna.tf32.f32 {d}, {a};", [x], np.float32)[0])


# ---- approximate functions -----------------------------------------------------------------------------------------

# opcode -> (function, inputs, largest relative error, largest absolute error), as PTX ISA 9.7.3 states them
EXPONENTS = np.linspace(-126, 127.9, 1024).astype(np.float32)
NORMAL = (2.0 ** np.linspace(-125.9, 125.9, 1024)).astype(np.float32)
TURN = np.linspace(-2 * np.pi, 2 * np.pi, 1024).astype(np.float32)
APPROXIMATE = {
    "ex2.approx.f32": (np.exp2, EXPONENTS, 2.0**-22, 0),
    "ex2.approx.ftz.f32": (np.exp2, EXPONENTS, 2.0**-22, 0),
    "rcp.approx.f32": (lambda x: 1 / x, NORMAL, 2.0**-23, 0),
    "rcp.approx.ftz.f32": (lambda x: 1 / x, NORMAL, 2.0**-23, 0),
    "rsqrt.approx.f32": (lambda x: 1 / np.sqrt(x), NORMAL, 2.0**-22.9, 0),
    "sqrt.approx.f32": (np.sqrt, NORMAL, 2.0**-23, 0),
    "lg2.approx.f32": (np.log2, NORMAL, 2.0**-22, 2.0**-22),
    "sin.approx.f32": (np.sin, TURN, 0, 2.0**-20.5),
    "cos.approx.f32": (np.cos, TURN, 0, 2.0**-20.5),
    "tanh.approx.f32": (np.tanh, TURN, 2.0**-11, 0),
}


@pytest.mark.parametrize("opcode", APPROXIMATE)
def test_errors_of_approximations(opcode):
    function, x, relative, absolute = APPROXIMATE[opcode]
    got = elementwise(f"{opcode} {{d}}, {{a}};", [x], np.float32).astype(np.float64)
    exact = function(x.astype(np.float64))
    assert (np.abs(got - exact) <= np.maximum(relative * np.abs(exact), absolute)).all()


def test_error_of_approximate_division():
    """Two units in the last place, for divisors between 2^-126 and 2^126."""
    a, b = NORMAL[:512], NORMAL[512:][::-1].copy()
    exact = a.astype(np.float64) / b
    keep = (np.abs(exact) > 2.0**-126) & (np.abs(exact) < 2.0**127)
    for how in ("approx", "full"):
        got = elementwise(f"div.{how}.f32 {{d}}, {{a}}, {{b}};", [a, b], np.float32)[keep].astype(np.float64)
        assert (np.abs(got - exact[keep]) <= 2 * np.spacing(exact[keep].astype(np.float32))).all()


@pytest.mark.parametrize(
    ("instruction", "value", "plain", "flushed"),
    [
        ("ex2.approx{}.f32 {{d}}, {{a}};", -127.0, 2.0**-127, 0.0),
        ("rcp.approx{}.f32 {{d}}, {{a}};", 2.0**127, 2.0**-127, 0.0),
        ("rcp.approx{}.f32 {{d}}, {{a}};", -(2.0**-127), -(2.0**127), -np.inf),
        ("rcp.rz{}.f32 {{d}}, {{a}};", -(2.0**127), -(2.0**-127), -0.0),
        ("sqrt.rn{}.f32 {{d}}, {{a}};", 2.0**-128, 2.0**-64, 0.0),
        ("lg2.approx{}.f32 {{d}}, {{a}};", 2.0**-127, -127.0, -np.inf),
        ("rsqrt.approx{}.f32 {{d}}, {{a}};", 2.0**-128, 2.0**64, np.inf),
        ("div.rn{}.f32 {{d}}, {{a}}, {{a}};", 2.0**-127, 1.0, np.nan),
        ("mul.rn{}.f32 {{d}}, {{a}}, 0f00000001;", 2.0**126, 2.0**-23, 0.0),
        ("fma.rn{}.f32 {{d}}, {{a}}, 0f3f000000, 0f80000000;", -(2.0**-126), -(2.0**-127), -0.0),
        ("max{}.f32 {{d}}, {{a}}, 0f00000000;", 2.0**-127, 2.0**-127, 0.0),
        ("abs{}.f32 {{d}}, {{a}};", -(2.0**-127), 2.0**-127, 0.0),
        ("add{}.f32 {{d}}, {{a}}, 0f00000000;", -(2.0**-127), -(2.0**-127), 0.0),
    ],
)
def test_flushing(instruction, value, plain, flushed):
    """.ftz makes zeros of the same sign of subnormal operands and results; without it they are there."""
    x = np.full(32, value, np.float32)
    for suffix, expected in (("", plain), (".ftz", flushed)):
        text = instruction.replace("{}", suffix).format(d="{d}", a="{a}")
        same_bits(elementwise(text, [x], np.float32), np.full(32, expected, np.float32))
