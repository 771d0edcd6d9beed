"""Floating point against exact arithmetic and NumPy (PTX ISA 9.7.3, 9.7.4, 9.7.5)."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

from tests.testing.ptx import elementwise, same_bits

COUNT = 256
SPECIALS = [0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, 1e-40, -1e-40, 3.4e38, 1.17549435e-38]


def floats(seed, dtype=np.float32, specials=True, spread=3.0):
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal(COUNT) * np.exp(spread * rng.standard_normal(COUNT))).astype(dtype)
    if specials:
        places = rng.permutation(COUNT)[: 4 * len(SPECIALS)]
        with np.errstate(over="ignore"):
            x[places] = np.array(SPECIALS * 4).astype(dtype)
    return x


def halves(seed, element):
    """Bits of random f16 or bf16 numbers."""
    with np.errstate(over="ignore"):
        x = floats(seed, spread=1.0)
        return x.astype(np.float16).view(np.uint16) if element == "f16" else (x.view(np.uint32) >> 16).astype(np.uint16)


def decode(bits, element):
    return bits.view(np.float16).astype(np.float64) if element == "f16" else (bits.astype(np.uint32) << 16).view(
        np.float32).astype(np.float64)  # fmt: skip


def encode(x, element):
    """float64 to 16 bits, to nearest even, by searching the neighbours."""
    if element == "f16":
        with np.errstate(over="ignore"):
            return x.astype(np.float16).view(np.uint16)
    out = np.zeros(x.shape, np.uint16)
    for i, v in enumerate(x):
        if math.isnan(v):
            out[i] = 0x7FFF
            continue
        with np.errstate(over="ignore"):
            below = int(np.float32(v).view(np.uint32)) >> 16
        codes = [c for c in (below - 1, below, below + 1) if 0 <= c & 0x7FFF <= 0x7F80 and c >> 15 == below >> 15]
        top = float(2**128)  # the neighbour of the largest number, for rounding

        def value(c, top=top):
            if c & 0x7FFF == 0x7F80:
                return math.copysign(top, -1 if c >> 15 else 1)
            return float(np.uint32(c << 16).view(np.float32))

        if math.isinf(v):
            out[i] = 0x7F80 | below & 0x8000
        else:
            out[i] = min(codes, key=lambda c: (abs(Fraction(value(c)) - Fraction(v)), c & 1))
    return out


def neighbours(exact):
    """The float32 numbers around a fraction: (largest not above, smallest not below)."""
    near = np.float32(float(exact))
    around = sorted(float(np.nextafter(near, np.float32(s))) for s in (-np.inf, np.inf)) + [float(near)]
    return max(x for x in around if Fraction(x) <= exact), min(x for x in around if Fraction(x) >= exact)


def rounded(exact, mode):
    low, high = neighbours(exact)
    if mode == "rm":
        return low
    if mode == "rp":
        return high
    if mode == "rz":
        return low if exact > 0 else high
    return min((low, high), key=lambda x: (abs(Fraction(x) - exact), int(np.float32(x).view(np.uint32)) & 1))


EXACT = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "fma": lambda a, b, c: a * b + c,
}


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
@pytest.mark.parametrize("opcode", EXACT)
def test_roundings_of_single(opcode, mode):
    """Against exact fractions, with operands far apart and close to ties."""
    rng = np.random.default_rng(5)
    a, b, c = (floats(s, specials=False) for s in (1, 2, 3))
    c[:64] = (-(a[:64].astype(np.float64) * b[:64])).astype(np.float32)  # cancellation
    a[64:96], b[64:96], c[64:96] = 1.0, np.float32(2.0**-24) * rng.choice([1, 3, 5], 32), np.float32(2.0**-60)
    operands = [a, b, c][: 3 if opcode == "fma" else 2]
    expected = np.zeros(COUNT, np.float32)
    for i, row in enumerate(zip(*operands, strict=True)):
        exact = EXACT[opcode](*[Fraction(float(x)) for x in row])
        expected[i] = rounded(exact, mode)
    names = ", ".join("{" + n + "}" for n in "abc"[: len(operands)])
    got = elementwise(f"{opcode}.{mode}.f32 {{d}}, {names};", operands, np.float32)
    keep = expected != 0  # the sign of an exact zero depends on the mode
    same_bits(got[keep], expected[keep])
    assert (got[~keep] == 0).all()
    pairs = [np.stack([x, x[::-1]], 1).copy().view(np.uint64).ravel() for x in operands]
    packed = elementwise(f"{opcode}.{mode}.f32x2 {{d}}, {names};", pairs, np.uint64, target="sm_100a")
    packed = packed.view(np.float32).reshape(-1, 2)
    same_bits(packed[:, 0][keep], expected[keep])
    same_bits(packed[:, 1][keep[::-1]], expected[::-1][keep[::-1]])


@pytest.mark.parametrize("opcode", ["add", "sub", "mul"])
def test_specials_of_single(opcode):
    a, b = floats(1), floats(2)
    function = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[opcode]
    with np.errstate(all="ignore"):
        expected = function(a, b)
    same_bits(elementwise(f"{opcode}.f32 {{d}}, {{a}}, {{b}};", [a, b], np.float32), expected)
    tiny = np.float32(2.0**-126)

    def flush(x):
        return np.where(np.abs(x) < tiny, np.copysign(np.float32(0), x), x)

    with np.errstate(all="ignore"):
        flushed = flush(function(flush(a), flush(b)))
        saturated = np.clip(np.where(np.isnan(expected), 0, expected), 0, 1).astype(np.float32)
    same_bits(elementwise(f"{opcode}.ftz.f32 {{d}}, {{a}}, {{b}};", [a, b], np.float32), flushed)
    got = elementwise(f"{opcode}.sat.f32 {{d}}, {{a}}, {{b}};", [a, b], np.float32)
    assert (got == saturated).all()


@pytest.mark.parametrize("opcode", ["add", "sub", "mul", "fma"])
def test_double(opcode):
    a, b, c = (floats(s, np.float64, specials=False) for s in (1, 2, 3))
    operands = [a, b, c][: 3 if opcode == "fma" else 2]
    names = ", ".join("{" + n + "}" for n in "abc"[: len(operands)])
    expected = [float(EXACT[opcode](*[Fraction(float(x)) for x in row])) for row in zip(*operands, strict=True)]
    same_bits(elementwise(f"{opcode}.rn.f64 {{d}}, {names};", operands, np.float64), np.array(expected))


@pytest.mark.parametrize("suffix", ["", "x2"])
@pytest.mark.parametrize("element", ["f16", "bf16"])
@pytest.mark.parametrize("opcode", EXACT)
def test_half(opcode, element, suffix):
    operands = [halves(s, element) for s in (1, 2, 3)][: 3 if opcode == "fma" else 2]
    with np.errstate(all="ignore"):
        expected = encode(EXACT[opcode](*[decode(x, element) for x in operands]), element)
    names = ", ".join("{" + n + "}" for n in "abc"[: len(operands)])
    rounding = ".rn"
    if suffix:
        pairs = [np.ascontiguousarray(x).view(np.uint32) for x in operands]
        got = elementwise(f"{opcode}{rounding}.{element}x2 {{d}}, {names};", pairs, np.uint32).view(np.uint16)
    else:
        got = elementwise(f"{opcode}{rounding}.{element} {{d}}, {names};", operands, np.uint16)
    missing = np.isnan(decode(expected, element))
    assert (np.isnan(decode(got, element)) == missing).all()
    same_bits(got[~missing], expected[~missing])


@pytest.mark.parametrize("element", ["f16", "bf16"])
def test_half_relu_and_extremes(element):
    a, b, c = (halves(s, element) for s in (1, 2, 3))
    x, y, z = (decode(v, element) for v in (a, b, c))
    with np.errstate(all="ignore"):
        expected = np.maximum(x * y + z, 0)
    got = decode(elementwise(f"fma.rn.relu.{element} {{d}}, {{a}}, {{b}}, {{c}};", [a, b, c], np.uint16), element)
    missing = np.isnan(expected)
    assert (np.isnan(got) == missing).all() and (got[~missing] >= 0).all()
    same_bits(encode(got[~missing], element), encode(np.abs(expected[~missing]), element))
    for opcode, plain, strict in (("max", np.fmax, np.maximum), ("min", np.fmin, np.minimum)):
        for modifier, function in (("", plain), (".NaN", strict)):
            got = elementwise(f"{opcode}{modifier}.{element} {{d}}, {{a}}, {{b}};", [a, b], np.uint16)
            np.testing.assert_array_equal(decode(got, element), function(x, y))


def test_extremes():
    a, b, c = floats(1), floats(2), floats(3)
    for opcode, plain, strict in (("max", np.fmax, np.maximum), ("min", np.fmin, np.minimum)):
        for modifier, function in (("", plain), (".NaN", strict)):
            got = elementwise(f"{opcode}{modifier}.f32 {{d}}, {{a}}, {{b}};", [a, b], np.float32)
            np.testing.assert_array_equal(got, function(a, b))
            got = elementwise(f"{opcode}{modifier}.f32 {{d}}, {{a}}, {{b}}, {{c}};", [a, b, c], np.float32,
                              target="sm_100a")  # fmt: skip
            np.testing.assert_array_equal(got, function(function(a, b), c))


def test_sign():
    a = floats(1)
    same_bits(elementwise("neg.f32 {d}, {a};", [a], np.float32).view(np.uint32), a.view(np.uint32) ^ 0x80000000)
    same_bits(elementwise("abs.f32 {d}, {a};", [a], np.float32).view(np.uint32), a.view(np.uint32) & 0x7FFFFFFF)
    b = floats(2)
    got = elementwise("copysign.f32 {d}, {a}, {b};", [a, b], np.uint32)
    same_bits(got, (a.view(np.uint32) & 0x80000000) | (b.view(np.uint32) & 0x7FFFFFFF))
    h = halves(1, "bf16")
    same_bits(elementwise("neg.bf16 {d}, {a};", [h], np.uint16), h ^ np.uint16(0x8000))
    same_bits(elementwise("abs.f16x2 {d}, {a};", [h.view(np.uint32)], np.uint32), h.view(np.uint32) & 0x7FFF7FFF)


@pytest.mark.parametrize(
    ("opcode", "function"),
    [
        ("ex2.approx.f32", np.exp2),
        ("lg2.approx.f32", np.log2),
        ("sqrt.rn.f32", np.sqrt),
        ("rcp.rn.f32", lambda x: 1 / x),
        ("rcp.approx.f32", lambda x: 1 / x),
        ("rsqrt.approx.f32", lambda x: 1 / np.sqrt(x)),
        ("sin.approx.f32", np.sin),
        ("cos.approx.f32", np.cos),
        ("tanh.approx.f32", np.tanh),
    ],
)
def test_functions(opcode, function):
    a = floats(1, specials=False, spread=1.0)
    a[:4] = [0.0, np.inf, np.nan, 1.0]
    with np.errstate(all="ignore"):
        expected = function(a.astype(np.float64)).astype(np.float32)
    np.testing.assert_allclose(elementwise(f"{opcode} {{d}}, {{a}};", [a], np.float32), expected, rtol=1e-6, atol=1e-7)


def test_flushed_exponential():
    a = np.linspace(-150, 130, COUNT).astype(np.float32)
    got = elementwise("ex2.approx.ftz.f32 {d}, {a};", [a], np.float32)
    with np.errstate(over="ignore"):
        expected = np.exp2(a.astype(np.float64))
    expected[expected < 2.0**-126] = 0
    with np.errstate(over="ignore"):
        np.testing.assert_allclose(got, expected.astype(np.float32), rtol=1e-6)
    assert (got[a < -126.01] == 0).all() and (
        elementwise("ex2.approx.f32 {d}, {a};", [a], np.float32)[a < -127] != 0
    ).any()


@pytest.mark.parametrize("element", ["f16", "bf16"])
def test_half_functions(element):
    a = halves(1, element)
    flush = ".ftz" if element == "bf16" else ""
    for opcode, function in ((f"ex2.approx{flush}", np.exp2), ("tanh.approx", np.tanh)):
        got = decode(elementwise(f"{opcode}.{element} {{d}}, {{a}};", [a], np.uint16), element)
        with np.errstate(all="ignore"):
            expected = decode(encode(function(decode(a, element)), element), element)
        with np.errstate(all="ignore"):
            np.testing.assert_allclose(got, expected, rtol=2.0**-7 if element == "bf16" else 2.0**-10, atol=1e-38)


def test_division():
    a, b = floats(1), floats(2)
    with np.errstate(all="ignore"):
        for how in ("rn", "full", "approx"):
            same_bits(elementwise(f"div.{how}.f32 {{d}}, {{a}}, {{b}};", [a, b], np.float32), a / b)
        x, y = a.astype(np.float64), b.astype(np.float64)
        same_bits(elementwise("div.rn.f64 {d}, {a}, {b};", [x, y], np.float64), x / y)


@pytest.mark.parametrize("element", ["f16", "bf16"])
def test_mixed_precision(element):
    a, b = halves(1, element), halves(2, element)
    c = floats(3)
    x, y = (decode(v, element).astype(np.float32) for v in (a, b))
    with np.errstate(all="ignore"):
        exact = (x.astype(np.float64) * y + c).astype(np.float32)
        got = elementwise(f"fma.rn.f32.{element} {{d}}, {{a}}, {{b}}, {{c}};", [a, b, c], np.float32, target="sm_100a")
        np.testing.assert_allclose(got, exact, rtol=1e-7)
        got = elementwise(f"add.f32.{element} {{d}}, {{a}}, {{b}};", [a, c], np.float32, target="sm_100a")
        same_bits(got, x + c)
        got = elementwise(f"sub.f32.{element} {{d}}, {{a}}, {{b}};", [a, c], np.float32, target="sm_100a")
        same_bits(got, x - c)


def test_properties():
    a = floats(1)
    tiny = np.finfo(np.float32).tiny
    expected = {
        "finite": np.isfinite(a),
        "infinite": np.isinf(a),
        "number": ~np.isnan(a),
        "notanumber": np.isnan(a),
        "normal": np.isfinite(a) & (np.abs(a) >= tiny),
        "subnormal": (a != 0) & (np.abs(a) < tiny),
    }
    for name, truth in expected.items():
        np.testing.assert_array_equal(elementwise(f"testp.{name}.f32 {{d}}, {{a}};", [a], bool), truth)


def test_fma_rounds_once():
    """Exact results so close to a tie that binary64 (or float32, for bf16) would land on the tie itself."""
    ulp = 2.0**-23
    a, b, c = (np.full(32, x, np.float32) for x in (1 + ulp, 2.0**-24 * (1 - ulp), 1 + ulp))
    got = elementwise("fma.rn.f32 {d}, {a}, {b}, {c};", [a, b, c], np.float32)
    np.testing.assert_array_equal(got, np.float32(1 + ulp))  # just below the tie, whose even neighbour is above
    a, c = (np.full(32, np.float32(x).view(np.uint32) >> 16, np.uint16) for x in (1.0625, 2.0**-40))
    got = elementwise("fma.rn.bf16 {d}, {a}, {b}, {c};", [a, a, c], np.uint16)
    np.testing.assert_array_equal(decode(got, "bf16"), 1.1328125)  # just above the tie, whose even neighbour is below
