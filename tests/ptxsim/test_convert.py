"""Conversions, comparisons and selection (PTX ISA 9.7.9 cvt, 9.7.6, 9.7.7)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.testing.ptx import elementwise, same_bits

COUNT = 256
INT = {"u8": np.uint8, "s8": np.int8, "u16": np.uint16, "s16": np.int16, "u32": np.uint32, "s32": np.int32,
       "u64": np.uint64, "s64": np.int64}  # fmt: skip


def bits(kind, seed):
    rng = np.random.default_rng(seed)
    dtype = np.dtype(INT[kind])
    x = rng.integers(0, 256, COUNT * dtype.itemsize, dtype=np.uint8).view(dtype).copy()
    info = np.iinfo(dtype)
    x[:5] = [0, 1, info.min, info.max, info.max // 2]
    return x


def floats(seed, spread=4.0):
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal(COUNT) * np.exp(spread * rng.standard_normal(COUNT))).astype(np.float32)
    x[:16] = [0.0, -0.0, 0.5, 1.5, 2.5, -0.5, -1.5, np.inf, -np.inf, np.nan, 3e9, -3e9, 1e20, -1e20, 254.5, 1e-40]
    return x


@pytest.mark.parametrize("source", INT)
def test_integers(source):
    x = bits(source, 1)
    for target, dtype in INT.items():
        wide = max(np.dtype(dtype).itemsize, 2)
        out = np.dtype(f"{'i' if target[0] == 's' else 'u'}{wide}")
        body = f"cvt.{target}.{source} {{d}}, {{a}};"
        got = elementwise(body, [x], out)
        same_bits(got, x.astype(dtype).astype(out))
        info, own = np.iinfo(dtype), np.iinfo(x.dtype)
        if info.min <= own.min and info.max >= own.max:
            continue  # .sat exists only where something can be cut off
        clipped = np.array([min(max(int(v), info.min), info.max) for v in x], dtype).astype(out)
        same_bits(elementwise(f"cvt.sat.{target}.{source} {{d}}, {{a}};", [x], out), clipped)


@pytest.mark.parametrize("source", ["f16", "bf16", "f32", "f64"])
@pytest.mark.parametrize("target", ["u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64"])
def test_float_to_integer(source, target):
    x = floats(1)
    if source == "f16":
        with np.errstate(over="ignore"):
            operand = x.astype(np.float16)
        value = operand.astype(np.float64)
    elif source == "bf16":
        operand = (x.view(np.uint32) >> 16).astype(np.uint16)
        value = (operand.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    else:
        operand = x if source == "f32" else x.astype(np.float64)
        value = operand.astype(np.float64)
    info = np.iinfo(INT[target])
    wide = max(np.dtype(INT[target]).itemsize, 2)
    out = np.dtype(f"{'i' if target[0] == 's' else 'u'}{wide}")
    for mode, function in (("rni", np.rint), ("rzi", np.trunc), ("rmi", np.floor), ("rpi", np.ceil)):
        expected = []
        for v in function(value):
            if np.isnan(v):
                expected.append(0 if wide < 8 else 1 << 63)
            else:
                expected.append(info.min if v <= info.min else info.max if v >= info.max else int(v))
        expected = np.array([e % 2 ** (8 * wide) for e in expected], f"u{wide}").view(out)
        same_bits(elementwise(f"cvt.{mode}.{target}.{source} {{d}}, {{a}};", [operand], out), expected)


@pytest.mark.parametrize("source", INT)
def test_integer_to_float(source):
    x = bits(source, 2)
    same_bits(elementwise(f"cvt.rn.f32.{source} {{d}}, {{a}};", [x], np.float32), x.astype(np.float32))
    same_bits(elementwise(f"cvt.rn.f64.{source} {{d}}, {{a}};", [x], np.float64), x.astype(np.float64))
    with np.errstate(over="ignore"):
        expected = x.astype(np.float64).astype(np.float16)
    same_bits(elementwise(f"cvt.rn.f16.{source} {{d}}, {{a}};", [x], np.uint16), expected.view(np.uint16))


def test_between_floats():
    x = floats(1)
    double = np.random.default_rng(3).standard_normal(COUNT)
    same_bits(elementwise("cvt.f64.f32 {d}, {a};", [x], np.float64), x.astype(np.float64))
    single = double.astype(np.float32)
    same_bits(elementwise("cvt.rn.f32.f64 {d}, {a};", [double], np.float32), single)
    down = np.where(single > double, np.nextafter(single, np.float32(-np.inf)), single)
    same_bits(elementwise("cvt.rm.f32.f64 {d}, {a};", [double], np.float32), down)
    up = np.where(single < double, np.nextafter(single, np.float32(np.inf)), single)
    same_bits(elementwise("cvt.rp.f32.f64 {d}, {a};", [double], np.float32), up)
    same_bits(elementwise("cvt.rz.f32.f64 {d}, {a};", [double], np.float32), np.where(double > 0, down, up))
    for mode, function in (("rni", np.rint), ("rzi", np.trunc), ("rmi", np.floor), ("rpi", np.ceil)):
        same_bits(elementwise(f"cvt.{mode}.f32.f32 {{d}}, {{a}};", [x], np.float32), function(x))
    saturated = elementwise("cvt.sat.f32.f32 {d}, {a};", [x], np.float32)
    np.testing.assert_array_equal(saturated, np.clip(np.nan_to_num(x, nan=0.0), 0, 1))
    flushed = elementwise("cvt.ftz.f64.f32 {d}, {a};", [x], np.float64)
    assert flushed[15] == 0 and x[15] != 0
    with np.errstate(over="ignore"):
        half = x.astype(np.float16)
    same_bits(elementwise("cvt.f32.f16 {d}, {a};", [half], np.float32), half.astype(np.float32))
    brain = (x.view(np.uint32) >> 16).astype(np.uint16)
    same_bits(
        elementwise("cvt.f32.bf16 {d}, {a};", [brain], np.float32), (brain.astype(np.uint32) << 16).view(np.float32)
    )


def to_bits(x, dtype):
    return torch.from_numpy(x).to(dtype).view(torch.uint16).numpy()


@pytest.mark.parametrize(("name", "dtype"), [("f16", torch.float16), ("bf16", torch.bfloat16)])
def test_narrowing(name, dtype):
    """Scalars and pairs, to nearest even and towards zero, with relu."""
    x, y = floats(1, spread=2.0), floats(2, spread=2.0)

    def same(got, expected):
        a, b = (torch.from_numpy(v.view(np.int16).copy()).view(dtype).float().numpy() for v in (got, expected))
        np.testing.assert_array_equal(a, b)

    same(elementwise(f"cvt.rn.{name}.f32 {{d}}, {{a}};", [x], np.uint16), to_bits(x, dtype))
    packed = elementwise(f"cvt.rn.{name}x2.f32 {{d}}, {{a}}, {{b}};", [x, y], np.uint32)
    same((packed >> 16).astype(np.uint16), to_bits(x, dtype))
    same(packed.astype(np.uint16), to_bits(y, dtype))
    relu = elementwise(f"cvt.rn.relu.{name}x2.f32 {{d}}, {{a}}, {{b}};", [x, y], np.uint32)
    same(relu.astype(np.uint16), to_bits(np.where(y < 0, np.float32(0), y), dtype))
    truncated = elementwise(f"cvt.rz.{name}x2.f32 {{d}}, {{a}}, {{b}};", [x, y], np.uint32).astype(np.uint16)
    values = torch.from_numpy(truncated.view(np.int16).copy()).view(dtype).double().numpy()
    finite = np.isfinite(y)
    assert (np.abs(values[finite]) <= np.abs(y[finite].astype(np.float64))).all()
    nearest = torch.from_numpy(y).to(dtype).double().numpy()
    inside = finite & np.isfinite(nearest) & (np.abs(nearest) <= np.abs(y.astype(np.float64)))
    np.testing.assert_array_equal(values[inside], nearest[inside])


@pytest.mark.parametrize(("name", "dtype", "largest"),
                         [("e4m3", torch.float8_e4m3fn, 448.0), ("e5m2", torch.float8_e5m2, 57344.0)])  # fmt: skip
def test_fp8(name, dtype, largest):
    x, y = floats(1, spread=1.5), floats(2, spread=1.5)

    def expected(v):
        clipped = np.where(np.isnan(v), v, np.clip(v, -largest, largest))
        code = torch.from_numpy(clipped).to(dtype).view(torch.uint8).numpy().copy()
        code[np.isnan(v)] = 0x7F
        return code

    got = elementwise(f"cvt.rn.satfinite.{name}x2.f32 {{d}}, {{a}}, {{b}};", [x, y], np.uint16)
    np.testing.assert_array_equal(got >> 8, expected(x))
    np.testing.assert_array_equal(got & 0xFF, expected(y))
    codes = np.arange(256, dtype=np.uint16) | np.arange(256, dtype=np.uint16)[::-1] << 8
    back = elementwise(f"cvt.rn.f16x2.{name}x2 {{d}}, {{a}};", [codes], np.uint32)
    table = torch.arange(256, dtype=torch.uint8).view(dtype).half().numpy()
    np.testing.assert_array_equal(back.astype(np.uint16).view(np.float16), table)
    np.testing.assert_array_equal((back >> 16).astype(np.uint16).view(np.float16), table[::-1])
    with np.errstate(over="ignore"):
        half = np.stack([y, x], 1).astype(np.float16)
    got = elementwise(f"cvt.rn.satfinite.{name}x2.f16x2 {{d}}, {{a}};", [half.view(np.uint32).ravel()], np.uint16)
    np.testing.assert_array_equal(got >> 8, expected(half[:, 1].astype(np.float32)))


def test_tf32():
    x = floats(1)
    for mode in ("rna", "rn", "rz"):
        got = elementwise(f"cvt.{mode}.tf32.f32 {{d}}, {{a}};", [x], np.float32, target="sm_100a")
        finite = np.isfinite(x) & (x != 0) & (np.abs(x) > 1e-30)
        assert (got.view(np.uint32)[finite] & 0x1FFF == 0).all() and np.isnan(got[9])
        error = (got[finite].astype(np.float64) - x[finite]) / np.abs(x[finite])
        assert np.abs(error).max() <= 2.0**-10 if mode == "rz" else np.abs(error).max() <= 2.0**-11
    ties = np.array([1 + 2.0**-11, 1 + 3 * 2.0**-11, -1 - 2.0**-11] * 32, np.float32)
    away = elementwise("cvt.rna.tf32.f32 {d}, {a};", [ties], np.float32)
    even = elementwise("cvt.rn.tf32.f32 {d}, {a};", [ties], np.float32, target="sm_100a")
    np.testing.assert_array_equal(away[:3], np.array([1 + 2.0**-10, 1 + 2.0**-9, -1 - 2.0**-10], np.float32))
    np.testing.assert_array_equal(even[:3], np.array([1, 1 + 2.0**-9, -1], np.float32))


ORDER = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}


@pytest.mark.parametrize("kind", ["u16", "s16", "u32", "s32", "u64", "s64"])
def test_integer_comparisons(kind):
    a, b = bits(kind, 1), bits(kind, 2)
    b[::5] = a[::5]
    for name, function in ORDER.items():
        got = elementwise(f"setp.{name}.{kind} {{d}}, {{a}}, {{b}};", [a, b], bool)
        np.testing.assert_array_equal(got, function(a, b))
    if kind[0] == "u":
        for name, other in (("lo", "lt"), ("ls", "le"), ("hi", "gt"), ("hs", "ge")):
            got = elementwise(f"setp.{name}.{kind} {{d}}, {{a}}, {{b}};", [a, b], bool)
            np.testing.assert_array_equal(got, ORDER[other](a, b))


@pytest.mark.parametrize("kind", ["f32", "f64", "f16", "bf16"])
def test_float_comparisons(kind):
    a, b = floats(1), floats(2)
    b[::5] = a[::5]
    b[20:24] = np.nan
    if kind == "bf16":
        operands = [(v.view(np.uint32) >> 16).astype(np.uint16) for v in (a, b)]
        x, y = ((v.astype(np.uint32) << 16).view(np.float32) for v in operands)
    else:
        with np.errstate(over="ignore"):
            x, y = (v.astype({"f32": np.float32, "f64": np.float64, "f16": np.float16}[kind]) for v in (a, b))
        operands = [x, y]
    missing = np.isnan(x) | np.isnan(y)
    for name, function in ORDER.items():
        plain = function(x, y) & ~missing
        got = elementwise(f"setp.{name}.{kind} {{d}}, {{a}}, {{b}};", operands, bool)
        np.testing.assert_array_equal(got, plain)
        got = elementwise(f"setp.{name}u.{kind} {{d}}, {{a}}, {{b}};", operands, bool)
        np.testing.assert_array_equal(got, plain | missing)
    np.testing.assert_array_equal(elementwise(f"setp.num.{kind} {{d}}, {{a}}, {{b}};", operands, bool), ~missing)
    np.testing.assert_array_equal(elementwise(f"setp.nan.{kind} {{d}}, {{a}}, {{b}};", operands, bool), missing)


def test_combined_predicates():
    a, b = bits("s32", 1), bits("s32", 2)
    first, second = a < 0, b < 0
    for name, function in (("and", np.logical_and), ("or", np.logical_or), ("xor", np.logical_xor)):
        got = elementwise(f"setp.lt.s32 %p2, {{b}}, 0; setp.lt.{name}.s32 {{d}}|%p3, {{a}}, 0, %p2;", [a, b], bool)
        np.testing.assert_array_equal(got, function(first, second))
        got = elementwise(f"setp.lt.s32 %p2, {{b}}, 0; setp.lt.{name}.s32 %p3|{{d}}, {{a}}, 0, !%p2;", [a, b], bool)
        np.testing.assert_array_equal(got, function(~first, ~second))


def test_selection():
    a, b, c = bits("s32", 1), bits("s32", 2), bits("s32", 3)
    got = elementwise("setp.lt.s32 %p2, {c}, 0; selp.b32 {d}, {a}, {b}, %p2;", [a, b, c], np.int32)
    same_bits(got, np.where(c < 0, a, b))
    same_bits(elementwise("slct.s32.s32 {d}, {a}, {b}, {c};", [a, b, c], np.int32), np.where(c >= 0, a, b))
    same_bits(elementwise("set.gt.u32.s32 {d}, {a}, {b};", [a, b], np.int32), np.where(a > b, -1, 0).astype(np.int32))
    same_bits(elementwise("set.gt.f32.s32 {d}, {a}, {b};", [a, b], np.float32), (a > b).astype(np.float32))
