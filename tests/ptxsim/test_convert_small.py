"""Conversions to and from pairs of 8, 6 and 4 bits and scale factors (PTX ISA 9.7.9 cvt), against tables of values
(PTX ISA 5.2.3)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.ptxsim.test_convert import floats
from tests.testing.ptx import elementwise, same_bits

VALUES = {
    "e2m1": [0, 0.5, 1, 1.5, 2, 3, 4, 6],
    "e2m3": [m / 8 for m in range(8)] + [(1 + m / 8) * 2.0**e for e in range(3) for m in range(8)],
    "e3m2": [m / 16 for m in range(4)] + [(1 + m / 4) * 2.0 ** (e - 3) for e in range(1, 8) for m in range(4)],
}


def codes(x, kind):
    """To nearest, ties to even codes, saturating; NaN to the largest number. The sign is above the magnitude."""
    table = np.array(VALUES[kind])
    out = []
    for value in np.asarray(x, np.float64):
        distance = np.abs(table - min(abs(value), table[-1]))
        best = np.flatnonzero(distance == distance.min())
        code = len(table) - 1 if np.isnan(value) else int(best[best % 2 == 0][0] if len(best) > 1 else best[0])
        out.append(code | (len(table) if np.signbit(value) and not np.isnan(value) else 0))
    return np.array(out)


def samples(seed):
    x = floats(seed, spread=1.5)
    table = np.array(VALUES["e2m1"] + VALUES["e2m3"] + VALUES["e3m2"], np.float32)
    x[16:216] = np.resize(np.concatenate([table, -table, (table[1:] + table[:-1]) / 2]), 200)  # numbers and ties
    return x


def half_words(kind, x):
    """Floats that the 16-bit type holds, and its bits."""
    dtype = torch.float16 if kind == "f16x2" else torch.bfloat16
    t = torch.from_numpy(x).to(dtype)
    return t.float().numpy(), t.view(torch.int16).numpy().view(np.uint16)


@pytest.mark.parametrize("kind", VALUES)
@pytest.mark.parametrize("source", ["f32", "f16x2", "bf16x2"])
@pytest.mark.parametrize("relu", [False, True])
def test_to_small(kind, source, relu):
    high, low = samples(1), samples(2)
    operands, names = [high, low], "{a}, {b}"
    if source != "f32":
        (high, upper), (low, lower) = (half_words(source, v) for v in (high, low))
        operands, names = [upper.astype(np.uint32) << np.uint32(16) | lower], "{a}"
    convert = f"cvt.rn.satfinite{'.relu' if relu else ''}.{kind}x2.{source}"
    if kind == "e2m1":
        body = f"{{{{ .reg .b8 b0, b1; {convert} b0, {names}; cvt.u8.u16 b1, 0; mov.b16 {{d}}, {{{{b0, b1}}}}; }}}}"
    else:
        body = f"{convert} {{d}}, {names};"
    got = elementwise(body, operands, np.uint16, target="sm_100a")
    if relu:
        high, low = (np.where(np.isnan(v), v, np.maximum(v, np.float32(0))) for v in (high, low))
    same_bits(got, (codes(low, kind) | codes(high, kind) << (4 if kind == "e2m1" else 8)).astype(np.uint16))


@pytest.mark.parametrize("kind", VALUES)
def test_from_small(kind):
    shift, count = (4, 16) if kind == "e2m1" else (8, 64)
    low = np.arange(256) % count
    high = np.arange(256)[::-1] * 7 % count
    operand = (low | high << shift).astype(np.uint16)
    body = f"cvt.rn.f16x2.{kind}x2 {{d}}, {{a}};"
    if kind == "e2m1":
        body = f"{{{{ .reg .b8 b0, b1; mov.b16 {{{{b0, b1}}}}, {{a}}; cvt.rn.f16x2.{kind}x2 {{d}}, b0; }}}}"
    got = elementwise(body, [operand], np.uint32, target="sm_100a").view(np.float16).reshape(-1, 2)
    table = np.array(VALUES[kind] + [-v for v in VALUES[kind]], np.float16)
    np.testing.assert_array_equal(got, np.stack([table[low], table[high]], 1))


@pytest.mark.parametrize("kind", ["e4m3", "e5m2"])
def test_bf16_to_8_bits(kind):
    (high, upper), (low, lower) = (half_words("bf16x2", samples(v)) for v in (3, 4))
    dtype, largest = (torch.float8_e4m3fn, 448.0) if kind == "e4m3" else (torch.float8_e5m2, 57344.0)
    wanted = [torch.from_numpy(np.clip(v, -largest, largest)).to(dtype).view(torch.uint8).numpy() for v in (low, high)]
    wanted = [np.where(np.isnan(v), 0x7F, w.astype(np.uint16)) for v, w in zip((low, high), wanted, strict=True)]
    operand = upper.astype(np.uint32) << np.uint32(16) | lower
    got = elementwise(f"cvt.rn.satfinite.{kind}x2.bf16x2 {{d}}, {{a}};", [operand], np.uint16, target="sm_100a")
    same_bits(got, (wanted[0] | wanted[1] << 8).astype(np.uint16))


def exponents(x, mode, finite):
    """Code of the nearest power of two that is not above (rz) or not below (rp)."""
    out = []
    for value in np.asarray(x, np.float64):
        if np.isnan(value) or value < 0:
            out.append(255)
            continue
        code = 0
        while code < 255 and (2.0 ** (code - 126) <= value if mode == "rz" else 2.0 ** (code - 127) < value):
            code += 1
        out.append(code if code < 255 else 254 if finite else 255)
    return np.array(out)


@pytest.mark.parametrize("mode", ["rz", "rp"])
@pytest.mark.parametrize("source", ["f32", "bf16x2"])
def test_scale_factors(mode, source):
    high, low = np.abs(floats(5, 20.0)), np.abs(floats(6, 20.0))
    low[16:80] = 2.0 ** np.arange(-32, 32)
    operands, names = [high, low], "{a}, {b}"
    if source == "bf16x2":
        (high, upper), (low, lower) = (half_words(source, v) for v in (high, low))
        operands, names = [upper.astype(np.uint32) << np.uint32(16) | lower], "{a}"
    for finite in ("", ".satfinite"):
        got = elementwise(f"cvt.{mode}{finite}.ue8m0x2.{source} {{d}}, {names};", operands, np.uint16, target="sm_100a")
        wanted = [exponents(v, mode, bool(finite)) for v in (low, high)]
        same_bits(got, (wanted[0] | wanted[1] << 8).astype(np.uint16))


def test_from_scale_factors():
    codes = np.arange(256)
    operand = (codes | codes[::-1] << 8).astype(np.uint16)
    got = elementwise("cvt.rn.bf16x2.ue8m0x2 {d}, {a};", [operand], np.uint32, target="sm_100a")
    table = torch.arange(256, dtype=torch.uint8).view(torch.float8_e8m0fnu).float()
    wanted = table.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    for bits, mine in ((got & 0xFFFF, wanted), (got >> 16, wanted[::-1])):
        same_bits(*((x.astype(np.uint32) << 16).view(np.float32) for x in (bits, mine)))


# ---- stochastic rounding -------------------------------------------------------------------------------------------
def rounded_away(x, mantissa, least, random, bits):
    """|x| on its grid, in exact integers: the random bits are added to the highest ones that are cut off."""
    numerator, denominator = abs(x).as_integer_ratio()
    if not numerator:
        return 0.0
    exponent = max(numerator.bit_length() - denominator.bit_length(), least)  # the denominator is a power of two
    shift = mantissa - exponent
    scaled = numerator << shift + bits if shift + bits >= 0 else numerator >> -(shift + bits)
    units = (scaled // denominator + random) >> bits
    return float(units * 2.0**-shift)


def stochastic(x, kind, random, relu=False):
    """Number on the grid of a type, saturating; NaN stays."""
    bits, mantissa, least, largest = {"f16": (13, 10, -14, 65504), "bf16": (16, 7, -126, (2 - 2**-7) * 2.0**127),
                                      "e2m1": (16, 1, 0, 6)}[kind]  # fmt: skip
    if np.isnan(x):
        return x
    if relu and x <= 0:
        return 0.0
    magnitude = largest if abs(x) >= largest else rounded_away(float(x), mantissa, least, int(random), bits)
    return float(np.copysign(magnitude, x))


def random_bits(seed, count):
    random = np.random.default_rng(seed).integers(0, 2**32, count, dtype=np.uint32)
    random[:64:2], random[1:64:2] = 0, 0xFFFFFFFF
    return random


def ranges(seed):
    """Numbers of every magnitude, among them subnormal ones of each type, exact ones, the largest, infinity and NaN."""
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal(1024) * 2.0 ** rng.integers(-30, 20, 1024)).astype(np.float32)
    x[100:200] = (rng.standard_normal(100) * 2.0**-130).astype(np.float32)
    x[200:300] = rng.integers(-2048, 2048, 100) / 1024
    x[:16] = [
        0,
        -0.0,
        np.inf,
        -np.inf,
        np.nan,
        65504,
        65519,
        -65520,
        3.4e38,
        -3.4e38,
        6,
        5.9,
        -6.5,
        2**-24,
        2**-25,
        0.25,
    ]
    return x


@pytest.mark.parametrize("kind", ["f16", "bf16"])
@pytest.mark.parametrize("suffix", [".satfinite", ".satfinite.relu", ".relu.satfinite"])
def test_stochastic_pairs(kind, suffix):
    high, low, random = ranges(31), ranges(32)[::-1].copy(), random_bits(33, 1024)
    got = elementwise(f"cvt.rs{suffix}.{kind}x2.f32 {{d}}, {{a}}, {{b}}, {{c}};", [high, low, random], np.uint32)
    mask = 0x1FFF if kind == "f16" else 0xFFFF
    for x, at in ((high, 16), (low, 0)):
        exact = [stochastic(v, kind, r >> at & mask, "relu" in suffix) for v, r in zip(x, random.tolist(), strict=True)]
        value = torch.tensor(exact, dtype=torch.float64).to(torch.float16 if kind == "f16" else torch.bfloat16)
        bits = np.where(np.isnan(x), np.uint16(0x7FFF), value.view(torch.uint16).numpy())
        np.testing.assert_array_equal((got >> np.uint32(at)).astype(np.uint16), bits)


def test_stochastic_rounding_to_infinity():
    """bf16 without .satfinite: the carry may lead to infinity."""
    x = np.array([3.4e38, 3.4e38, np.inf, -3.4e38, np.nan], np.float32)
    random = np.array([0, 0xFFFF, 0xFFFF, 0xFFFF, 0xFFFF], np.uint32)
    got = elementwise("cvt.rs.bf16x2.f32 {d}, {a}, {a}, {b};", [x, random], np.uint32) & np.uint32(0xFFFF)
    np.testing.assert_array_equal(got, [0x7F7F, 0x7F80, 0x7F80, 0xFF80, 0x7FFF])


# highest bit first, where the 16 random bits of each of four are: measured with one bit at a time on a B200
FOURS = [[*range(8, 16), *range(24, 32)], [*range(31, 23, -1), *range(15, 7, -1)], [*range(8), *range(16, 24)],
         [*range(23, 15, -1), *range(7, -1, -1)]]  # fmt: skip


@pytest.mark.parametrize("relu", ["", ".relu"])
def test_stochastic_fours(relu):
    """Half of the numbers lie between 1 and 1.5, where the lowest random bit decides."""
    values, random = [ranges(40 + i)[:512] / (1 + i) for i in range(4)], random_bits(44, 512)
    mine = [[sum((word >> at & 1) << 15 - weight for weight, at in enumerate(places)) for word in random.tolist()]
            for places in FOURS]  # fmt: skip
    for x, slices in zip(values, mine, strict=True):
        x[256:] = 1 + (2**16 - np.array(slices)[256:] - np.arange(256) % 2) / 2**17
    instruction = f"cvt.rs{relu}.satfinite.e2m1x4.f32 {{d}}, {{{{{{a}}, {{b}}, {{c}}, {{e}}}}}}, {{f}};"
    got = elementwise(instruction, [*(v.astype(np.float32) for v in values), random], np.uint16)
    for i, x in enumerate(values):
        for j in range(512):
            value = stochastic(np.float32(x[j]), "e2m1", mine[i][j], bool(relu))
            code = 7 if np.isnan(value) else VALUES["e2m1"].index(abs(value)) | 8 * bool(np.signbit(value))
            assert got[j] >> 12 - 4 * i & 15 == code, (i, j, x[j], hex(random[j]))
