"""Floating point: PTX ISA 9.7.3 (f32, f64), 9.7.4 (f16, bf16 and their pairs), 9.7.5 (mixed precision).

Roundings are IEEE's: rn, and rz, rm, rp where a form has them. A sum or fma is evaluated in binary64 together with its
exact error, so that the result is rounded once. Functions that the hardware approximates (ex2, lg2, sin, cos, tanh,
rcp, rsqrt, div.full) are NumPy's: closer to the true value than the hardware, never bitwise equal to it. ``.ftz``
flushes subnormal inputs and results to zero of the same sign. NaN results keep NumPy's payload, which may depend on
where in an array they lie; nothing else does.
"""

from __future__ import annotations

import functools
from fractions import Fraction

import numpy as np

from . import numerics
from .forms import KIND, form


def _in_order(function):
    """NumPy's function of elements that lie one after the other: where they lie backwards it takes another routine,
    of another precision."""
    return lambda x: function(np.asarray(x, order="C"))


_EXP2, _LOG2, _SIN, _COS, _TANH = map(_in_order, (np.exp2, np.log2, np.sin, np.cos, np.tanh))
_TINY = {np.dtype(np.float32): np.float32(2.0**-126), np.dtype(np.float64): 2.0**-126}


# ---- single precision and packed pairs of it ------------------------------------------------------
def flush(x):
    """Subnormal single-precision values become zeros of the same sign."""
    small = np.abs(x) < _TINY[np.dtype(np.float32)]
    return np.where(small, np.copysign(np.float32(0), x), x) if np.any(small) else x


def saturate(x):
    """Clamp to [0, 1]; NaN becomes 0."""
    return np.clip(np.where(np.isnan(x), x.dtype.type(0), x), x.dtype.type(0), x.dtype.type(1))


def _sum_and_error(a, b):
    """Knuth's two-sum in binary64: rounded sum and exact error (0 where not finite)."""
    s = a + b
    t = s - a
    error = (a - (s - t)) + (b - t)
    return s, np.where(np.isfinite(s), error, 0.0)


def _round_once(s, error, mode):
    """float32 value of s + error (|error| below half a unit of s) in the given rounding mode."""
    r = s.astype(np.float32)
    if mode == "rn":
        # rounding twice differs from rounding once only where s lies half-way between two float32 values
        half_way = (np.asarray(s).view(np.uint64) & np.uint64(0x1FFFFFFF)) == np.uint64(0x10000000)
        if not np.any(half_way):
            return r
        nudged = np.nextafter(s, np.where(error > 0, np.inf, -np.inf)).astype(np.float32)
        return np.where(half_way & (error != 0), nudged, r)
    wide = r.astype(np.float64)
    beyond = np.sign(wide - s)
    beyond = np.where(beyond == 0, -np.sign(error), beyond)  # +1: r above the exact value, -1: below
    down, up = np.float32(-np.inf), np.float32(np.inf)
    if mode == "rz":
        towards = np.where(wide > 0, beyond > 0, beyond < 0)
        return np.where(towards & np.isfinite(s), np.nextafter(r, np.float32(0)), r)
    if mode == "rm":
        return np.where((beyond > 0) & np.isfinite(s), np.nextafter(r, down), r)
    return np.where((beyond < 0) & np.isfinite(s), np.nextafter(r, up), r)


def _add_rounded(a, b, mode):
    return _round_once(*_sum_and_error(a.astype(np.float64), b.astype(np.float64)), mode)


def _multiply_rounded(a, b, mode):
    return _round_once(a.astype(np.float64) * b.astype(np.float64), np.float64(0), mode)


def fma32(a, b, c):
    """Fused multiply-add, rounded to nearest once."""
    product = a.astype(np.float64) * b.astype(np.float64)
    wide = c.astype(np.float64)
    s = product + wide
    r = s.astype(np.float32)
    half_way = (np.asarray(s).view(np.uint64) & np.uint64(0x1FFFFFFF)) == np.uint64(0x10000000)
    return _round_once(*_sum_and_error(product, wide), "rn") if np.any(half_way) else r


def _fma_rounded(a, b, c, mode):
    return _round_once(*_sum_and_error(a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)), mode)


@functools.cache
def single_function(name: str, mode: str, ftz: bool, sat: bool):
    """The NumPy function for add, sub, mul or fma on float32 arrays."""
    nearest = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "fma": fma32}
    directed = {
        "add": lambda a, b: _add_rounded(a, b, mode),
        "sub": lambda a, b: _add_rounded(a, -b, mode),
        "mul": lambda a, b: _multiply_rounded(a, b, mode),
        "fma": lambda a, b, c: _fma_rounded(a, b, c, mode),
    }
    core = (nearest if mode == "rn" else directed)[name]

    def function(*operands):
        if ftz:
            operands = [flush(x) for x in operands]
        result = core(*operands)
        if ftz:
            result = flush(result)
        return saturate(result) if sat else result

    return function if ftz or sat else core


@functools.cache
def pair_function(function):
    """Lift a float32 function to f32x2: 64-bit registers hold two values, the first in the low half."""

    def paired(*operands):
        shape = np.broadcast_shapes(*[np.shape(x) for x in operands]) or (1,)
        halves = [np.ascontiguousarray(np.broadcast_to(x, shape)).view(np.float32) for x in operands]
        return np.ascontiguousarray(function(*halves)).view(np.uint64)

    return paired


def _arity(root: str) -> int:
    return 3 if root in ("fma", "mad") else 2


def _write_single(gen, args, mods, name):
    count = _arity(gen.root)
    mode, ftz, sat = mods.rnd or "rn", bool(mods.ftz), bool(getattr(mods, "sat", None))
    packed = mods.type == "f32x2"
    kind = KIND[mods.type]
    operands = [gen.read(x, kind) for x in args[1 : 1 + count]]
    if not packed and not ftz and not sat and mode == "rn" and name != "fma":
        sign = {"add": "+", "sub": "-", "mul": "*"}[name]
        gen.write(args[0], f"{operands[0]} {sign} {operands[1]}", kind)
        return
    function = single_function(name, mode, ftz, sat)
    gen.write(args[0], f"{gen.fn(pair_function(function) if packed else function)}({', '.join(operands)})", kind)


@form("add[.{rnd}][.{ftz}][.{sat}].{type}", type="f32")
@form("sub[.{rnd}][.{ftz}][.{sat}].{type}", type="f32")
@form("mul[.{rnd}][.{ftz}][.{sat}].{type}", type="f32")
@form("fma.{rnd}[.{ftz}][.{sat}].{type}", type="f32")
@form("add[.{rnd}][.{ftz}].{type}", type="f32x2")
@form("sub[.{rnd}][.{ftz}].{type}", type="f32x2")
@form("mul[.{rnd}][.{ftz}].{type}", type="f32x2")
@form("fma.{rnd}[.{ftz}].{type}", type="f32x2")
def single_arithmetic(gen, args, mods):
    _write_single(gen, args, mods, gen.root)


@form("mad.{rnd}[.{ftz}][.{sat}].{type}", type="f32")
def single_mad(gen, args, mods):
    _write_single(gen, args, mods, "fma")


def fma64(a, b, c):
    """Fused multiply-add in binary64, by exact fractions."""

    def exact(x, y, z):
        if not (np.isfinite(x) and np.isfinite(y) and np.isfinite(z)):
            return x * y + z
        value = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        return float(value) if value else float(x) * float(y) + float(z)

    return np.asarray(np.frompyfunc(exact, 3, 1)(a, b, c)).astype(np.float64)


@form("add[.rn].f64")
@form("sub[.rn].f64")
@form("mul[.rn].f64")
def double_arithmetic(gen, args, mods):
    sign = {"add": "+", "sub": "-", "mul": "*"}[gen.root]
    gen.write(args[0], f"{gen.read(args[1], 'f8')} {sign} {gen.read(args[2], 'f8')}", "f8")


@form("fma.rn.f64")
@form("mad.rn.f64")
def double_fma(gen, args, mods):
    gen.write(args[0], f"{gen.fn(fma64)}({', '.join(gen.read(x, 'f8') for x in args[1:4])})", "f8")


# ---- half precision -------------------------------------------------------------------------------
def _fma_exact(a, b, c):
    """Operands of 16-bit types: product and sum in binary64."""
    return a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)


# core function, and whether its result is binary64 (fma) rather than float32; float32 holds every sum, difference and
# product of two 16-bit floats closely enough that rounding it again to 16 bits gives the correctly rounded result
_HALF_CORE = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "fma": _fma_exact,
    "ex2": _EXP2,
    "tanh": _TANH,
    **numerics.EXTREMES,
}


def _flush_half(bits, tiny):
    """Flush subnormals in 16-bit encodings: ``tiny`` is the encoding of the smallest normal number."""
    return np.where((bits & np.uint16(0x7FFF)) < np.uint16(tiny), bits & np.uint16(0x8000), bits)


@functools.cache
def half_function(name: str, element: str, packed: bool, ftz: bool = False, sat: bool = False, relu: bool = False):
    """The function on 16-bit encodings (``packed``: on pairs in 32 bits) for an operation of f16 or bf16."""
    core = _HALF_CORE[name]
    decode = numerics.f16_to_f32 if element == "f16" else numerics.bf16_to_f32
    encode = numerics.round_to_f16 if element == "f16" else numerics.round_to_bf16
    tiny = 0x0400 if element == "f16" else 0x0080

    def function(*operands):
        if packed:
            shape = np.broadcast_shapes(*[np.shape(x) for x in operands]) or (1,)
            operands = [np.ascontiguousarray(np.broadcast_to(x, shape)).view(np.uint16) for x in operands]
        if ftz:
            operands = [_flush_half(x, tiny) for x in operands]
        result = core(*[decode(x) for x in operands])
        if sat:
            result = saturate(result)
        if relu:
            result = numerics.EXTREMES["max.NaN"](result, result.dtype.type(0))
        bits = encode(result)
        if ftz:
            bits = _flush_half(bits, tiny)
        return np.ascontiguousarray(bits).view(np.uint32) if packed else bits

    return function


def _write_half(gen, args, mods, name, count):
    kind = KIND[mods.type]
    flags = [bool(getattr(mods, m, None)) for m in ("ftz", "sat", "relu")]
    function = half_function(name, mods.type.removesuffix("x2"), mods.type.endswith("x2"), *flags)
    gen.write(args[0], f"{gen.fn(function)}({', '.join(gen.read(x, kind) for x in args[1 : 1 + count])})", kind)


@form("add[.rn][.{ftz}][.{sat}].{type}", type="f16|f16x2")
@form("sub[.rn][.{ftz}][.{sat}].{type}", type="f16|f16x2")
@form("mul[.rn][.{ftz}][.{sat}].{type}", type="f16|f16x2")
@form("add[.rn].{type}", type="bf16|bf16x2")
@form("sub[.rn].{type}", type="bf16|bf16x2")
@form("mul[.rn].{type}", type="bf16|bf16x2")
@form("fma.rn[.{ftz}][.{sat}].{type}", type="f16|f16x2")
@form("fma.rn[.{ftz}].{relu}.{type}", type="f16|f16x2")
@form("fma.rn[.{relu}].{type}", type="bf16|bf16x2")
def half_arithmetic(gen, args, mods):
    _write_half(gen, args, mods, gen.root, _arity(gen.root))


@form("max[.{ftz}][.{nan}].{type}", type="f16|f16x2|bf16|bf16x2")
@form("min[.{ftz}][.{nan}].{type}", type="f16|f16x2|bf16|bf16x2")
def half_extremes(gen, args, mods):
    _write_half(gen, args, mods, gen.root + (".NaN" if mods.nan else ""), 2)


@form("ex2.approx.{type}", type="f16|f16x2")
@form("ex2.approx.{ftz}.{type}", type="bf16|bf16x2")
@form("tanh.approx.{type}", type="f16|f16x2|bf16|bf16x2")
def half_functions(gen, args, mods):
    _write_half(gen, args, mods, gen.root, 1)


@form("neg[.{ftz}].{type}", type="f16|f16x2|bf16|bf16x2")
@form("abs[.{ftz}].{type}", type="f16|f16x2|bf16|bf16x2")
def half_sign(gen, args, mods):
    kind = KIND[mods.type]
    x = gen.read(args[1], kind)
    if mods.ftz:
        x = f"{gen.fn(_flush_bits)}({x}, {0x0400 if mods.type.startswith('f16') else 0x0080})"
    mask = {"neg": 0x80008000, "abs": 0x7FFF7FFF}[gen.root] & (0xFFFFFFFF if kind == "u4" else 0xFFFF)
    gen.write(args[0], f"{x} {'^' if gen.root == 'neg' else '&'} {kind}({mask})", kind)


def _flush_bits(bits, tiny):
    shaped = np.ascontiguousarray(bits)
    return _flush_half(shaped.view(np.uint16), tiny).view(shaped.dtype)


# ---- mixed precision ------------------------------------------------------------------------------
@form("fma.{rnd}[.{sat}].f32.{source}", source="f16|bf16")
@form("add[.{rnd}][.{sat}].f32.{source}", source="f16|bf16")
@form("sub[.{rnd}][.{sat}].f32.{source}", source="f16|bf16")
def mixed_arithmetic(gen, args, mods):
    """16-bit multiplicands (fma) or first operand (add, sub); the last operand is single precision."""
    decode = gen.fn(numerics.f16_to_f32 if mods.source == "f16" else numerics.bf16_to_f32)
    narrow = [f"{decode}({gen.read(x, 'u2')})" for x in args[1:-1]]
    function = single_function(gen.root, mods.rnd or "rn", False, bool(mods.sat))
    gen.write(args[0], f"{gen.fn(function)}({', '.join(narrow)}, {gen.read(args[-1], 'f4')})", "f4")


# ---- extremes, division, roots, transcendental functions ------------------------------------------
@form("max[.{ftz}][.{nan}].{type}", type="f32")
@form("min[.{ftz}][.{nan}].{type}", type="f32")
@form("max.{type}", type="f64")
@form("min.{type}", type="f64")
def extremes(gen, args, mods):
    """Two operands, or three (sm_100). Without .NaN a NaN operand loses."""
    kind = KIND[mods.type]
    function = gen.fn(numerics.EXTREMES[gen.root + (".NaN" if getattr(mods, "nan", None) else "")])
    operands = [gen.read(x, kind) for x in args[1:]]
    if getattr(mods, "ftz", None):
        operands = [f"{gen.fn(flush)}({x})" for x in operands]
    result = operands[0]
    for x in operands[1:]:
        result = f"{function}({result}, {x})"
    gen.write(args[0], result, kind)


@form("neg[.{ftz}].{type}", type="f32")
@form("abs[.{ftz}].{type}", type="f32")
@form("neg.{type}", type="f64")
@form("abs.{type}", type="f64")
def sign(gen, args, mods):
    kind = KIND[mods.type]
    x = gen.read(args[1], kind)
    if getattr(mods, "ftz", None):
        x = f"{gen.fn(flush)}({x})"
    gen.write(args[0], f"-{x}" if gen.root == "neg" else f"np.abs({x})", kind)


def _reciprocal(x):
    return x.dtype.type(1) / x


def _reciprocal_root(x):
    return x.dtype.type(1) / np.sqrt(x)


_UNARY = {
    "ex2": _EXP2,
    "lg2": _LOG2,
    "sqrt": np.sqrt,
    "sin": _SIN,
    "cos": _COS,
    "tanh": _TANH,
    "rcp": _reciprocal,
    "rsqrt": _reciprocal_root,
}


@functools.cache
def _with_flush(function):
    def flushed(*operands):
        return flush(function(*[flush(x) for x in operands]))

    return flushed


@functools.cache
def _directed(name, mode):
    """Quotients and roots in binary64, rounded again: where such a one is a float32 number it is exact, since what it
    lacks would be at least 2^-48 of it."""

    def quotient(a, b):
        return _round_once(a.astype(np.float64) / b.astype(np.float64), np.float64(0), mode)

    return {
        "div": quotient,
        "rcp": lambda x: quotient(np.ones_like(x), x),
        "sqrt": lambda x: _round_once(np.sqrt(x.astype(np.float64)), np.float64(0), mode),
    }[name]


@form("sqrt.{rnd}[.{ftz}].{type}", rnd="rz|rm|rp", type="f32")
@form("rcp.{rnd}[.{ftz}].{type}", rnd="rz|rm|rp", type="f32")
@form("div.{rnd}[.{ftz}].{type}", rnd="rz|rm|rp", type="f32")
def directed_functions(gen, args, mods):
    function = _directed(gen.root, mods.rnd)
    function = _with_flush(function) if mods.ftz else function
    gen.write(args[0], f"{gen.fn(function)}({', '.join(gen.read(x, 'f4') for x in args[1:])})", "f4")


@form("ex2.approx[.{ftz}].{type}", type="f32")
@form("lg2.approx[.{ftz}].{type}", type="f32")
@form("sin.approx[.{ftz}].{type}", type="f32")
@form("cos.approx[.{ftz}].{type}", type="f32")
@form("tanh.approx.{type}", type="f32")
@form("sqrt.{how}[.{ftz}].{type}", how="approx|rn", type="f32")
@form("rcp.{how}[.{ftz}].{type}", how="approx|rn", type="f32")
@form("rsqrt.approx[.{ftz}].{type}", type="f32")
@form("sqrt.rn.{type}", type="f64")
@form("rcp.rn.{type}", type="f64")
@form("rsqrt.approx.{type}", type="f64")
def functions_of_one(gen, args, mods):
    kind = KIND[mods.type]
    function = _UNARY[gen.root]
    if getattr(mods, "ftz", None):
        function = _with_flush(function)
    gen.write(args[0], f"{gen.fn(function)}({gen.read(args[1], kind)})", kind)


@form("div.{how}[.{ftz}].{type}", how="rn|full|approx", type="f32")
@form("div.rn.{type}", type="f64")
def quotient(gen, args, mods):
    kind = KIND[mods.type]
    function = _with_flush(np.divide) if getattr(mods, "ftz", None) else np.divide
    gen.write(args[0], f"{gen.fn(function)}({gen.read(args[1], kind)}, {gen.read(args[2], kind)})", kind)


@form("copysign.{type}", type="f32|f64")
def copy_sign(gen, args, mods):
    """The sign of the first operand on the magnitude of the second."""
    kind = KIND[mods.type]
    gen.write(args[0], f"np.copysign({gen.read(args[2], kind)}, {gen.read(args[1], kind)})", kind)


_PROPERTIES = {
    "finite": np.isfinite,
    "infinite": np.isinf,
    "number": lambda x: ~np.isnan(x),
    "notanumber": np.isnan,
    "normal": lambda x: np.isfinite(x) & (np.abs(x) >= np.finfo(x.dtype).tiny),
    "subnormal": lambda x: (np.abs(x) < np.finfo(x.dtype).tiny) & (x != 0),
}


@form("testp.{what}.{type}", what="finite|infinite|number|notanumber|normal|subnormal", type="f32|f64")
def test_property(gen, args, mods):
    gen.write(args[0], f"{gen.fn(_PROPERTIES[mods.what])}({gen.read(args[1], KIND[mods.type])})", "b")
