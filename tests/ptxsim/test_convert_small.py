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
