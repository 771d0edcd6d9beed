"""Conversions: PTX ISA 9.7.9 cvt.

Integers to integers (with .sat), floats to integers (saturating, NaN gives 0, or the most negative value's bits for
64 bits), integers to floats, floats to floats, the packed forms to f16x2, bf16x2 and pairs of 8, 6 and 4 bits and back,
tf32. Refused: s2f6, and of stochastic rounding (.rs) f16 without .satfinite, and fours of 8 and 6 bits, of whose random
bits two measurements say different things.
"""

from __future__ import annotations

import numpy as np

from ..errors import PtxError
from . import numerics
from .floating import flush, saturate
from .forms import KIND, NUMPY, form

_INT = "u8|u16|u32|u64|s8|s16|s32|s64"
_ROUND = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
_DECODE = {"f16": numerics.f16_to_f32, "bf16": numerics.bf16_to_f32}


def float_to_int(x, kind, rounding):
    """Round, then saturate; NaN gives 0 (64-bit results: the bits 0x8000000000000000)."""
    wide = _ROUND[rounding](np.asarray(x).astype(np.float64))
    limits = np.iinfo(NUMPY[kind])
    missing = np.isnan(wide)
    low, high = float(limits.min), float(limits.max)
    inside = np.where(missing | (wide >= high), 0.0, np.clip(wide, low, high)).astype(NUMPY[kind])
    result = np.where(wide >= high, NUMPY[kind](limits.max), inside)
    if kind[1] == "8" and np.any(missing):
        result = np.where(missing, np.uint64(1 << 63).astype(NUMPY[kind]), result)
    return result


def saturate_int(x, kind):
    limits = np.iinfo(NUMPY[kind])
    own = np.iinfo(x.dtype)
    return np.clip(x, max(limits.min, own.min), min(limits.max, own.max)).astype(NUMPY[kind])


@form("cvt[.{sat}].{to}.{src}", to=_INT, src=_INT)
def integers(gen, args, mods):
    source, target = KIND[mods.src], KIND[mods.to]
    x = gen.read(args[1], source)
    if mods.sat:
        gen.write(args[0], f"{gen.fn(saturate_int)}({x}, {target!r})", target)
        return
    gen.write(args[0], f"{x}.astype({target})" if source != target else x, target)


def _float_operand(gen, token, type_name, ftz):
    """Expression for a scalar float operand as float32 or float64."""
    if type_name in _DECODE:
        return f"{gen.fn(_DECODE[type_name])}({gen.read(token, 'u2')})"
    x = gen.read(token, KIND[type_name])
    return f"{gen.fn(flush)}({x})" if ftz and type_name == "f32" else x


@form("cvt.{rnd}[.{ftz}][.{sat}].{to}.{src}", rnd="rni|rzi|rmi|rpi", to=_INT, src="f16|bf16|f32|f64")
def float_to_integer(gen, args, mods):
    target = KIND[mods.to]  # .sat changes nothing: these conversions always saturate
    x = _float_operand(gen, args[1], mods.src, mods.ftz)
    gen.write(args[0], f"{gen.fn(float_to_int)}({x}, {target!r}, {mods.rnd!r})", target)


def int_to_single(x, mode):
    """Integers to float32 with directed rounding; the host's long double (x86) holds 64-bit integers exactly."""
    exact = x.astype(np.longdouble)
    r = exact.astype(np.float32)
    wide = r.astype(np.longdouble)
    if mode == "rz":
        return np.where(np.abs(wide) > np.abs(exact), np.nextafter(r, np.float32(0)), r)
    if mode == "rm":
        return np.where(wide > exact, np.nextafter(r, np.float32(-np.inf)), r)
    return np.where(wide < exact, np.nextafter(r, np.float32(np.inf)), r)


@form("cvt.{rnd}.{to}.{src}", to="f32", rnd="rz|rm|rp", src=_INT)
@form("cvt.rn.{to}.{src}", to="f16|bf16|f32|f64", src=_INT)
def integer_to_float(gen, args, mods):
    x = gen.read(args[1], KIND[mods.src])
    if getattr(mods, "rnd", None):
        gen.write(args[0], f"{gen.fn(int_to_single)}({x}, {mods.rnd!r})", "f4")
        return
    if mods.to in ("f16", "bf16"):
        encode = gen.fn(numerics.round_to_f16 if mods.to == "f16" else numerics.round_to_bf16)
        gen.write(args[0], f"{encode}({x}.astype(f8))", "u2")
        return
    gen.write(args[0], f"{x}.astype({KIND[mods.to]})", KIND[mods.to])


def narrow_directed(x, mode):
    """float64 to float32 with directed rounding."""
    r = x.astype(np.float32)
    wide = r.astype(np.float64)
    if mode == "rz":
        return np.where(np.abs(wide) > np.abs(x), np.nextafter(r, np.float32(0)), r)
    if mode == "rm":
        return np.where(wide > x, np.nextafter(r, np.float32(-np.inf)), r)
    return np.where(wide < x, np.nextafter(r, np.float32(np.inf)), r)


@form("cvt[.{rnd}][.{ftz}][.{sat}].{to}.{src}", rnd="rni|rzi|rmi|rpi|rn|rz|rm|rp", to="f32|f64", src="f16|bf16|f32|f64")
def float_to_float(gen, args, mods):
    """Widening and same-size conversions, rounding to an integer (same size), and f64 to f32."""
    same = mods.to == mods.src
    integral = mods.rnd in _ROUND
    narrowing = mods.to == "f32" and mods.src == "f64"
    if (integral and not same) or (mods.rnd and not integral and not narrowing) or (narrowing and not mods.rnd):
        raise PtxError(f"rounding modifier {mods.rnd} does not fit a conversion from {mods.src} to {mods.to}")
    target = KIND[mods.to]
    x = _float_operand(gen, args[1], mods.src, mods.ftz)
    if integral:
        x = f"{gen.fn(_ROUND[mods.rnd])}({x})"
    elif narrowing and mods.rnd != "rn":
        x = f"{gen.fn(narrow_directed)}({x}, {mods.rnd!r})"
    elif not same:
        x = f"{x}.astype({target})"
    if mods.ftz and narrowing:
        x = f"{gen.fn(flush)}({x})"
    if mods.sat:
        x = f"{gen.fn(saturate)}({x})"
    gen.write(args[0], x, target)


def _rectify(x, relu):
    return numerics.EXTREMES["max.NaN"](x, x.dtype.type(0)) if relu else x


def encode_half(x, to, mode, relu, sat, finite=False):
    """float32 or float64 to the bits of f16 or bf16; ``finite``: the largest number instead of infinity."""
    x = _rectify(x, relu)
    if sat:
        x = saturate(x)
    if mode in ("rm", "rp"):
        bits = numerics.directed_half(x, to, mode)
    elif mode == "rz":
        bits = numerics.truncate_to_f16(x) if to == "f16" else numerics.truncate_to_bf16(x)
    else:
        bits = numerics.round_to_f16(x) if to == "f16" else numerics.round_to_bf16(x)
    return numerics.finite_half(bits, to) if finite else bits


@form("cvt.{rnd}[.{ftz}][.{sat}].{to}.{src}", rnd="rn|rz|rm|rp", to="f16", src="f32|f64")
@form("cvt.{rnd}[.{relu}][.{satfinite}].{to}.{src}", rnd="rn|rz", satfinite="satfinite", to="f16|bf16", src="f32|f64")
@form("cvt.{rnd}.{satfinite}.{relu}.{to}.{src}", rnd="rn|rz", satfinite="satfinite", to="f16|bf16", src="f32")
@form("cvt.{rnd}.{to}.{src}", rnd="rm|rp", to="bf16", src="f32")
@form("cvt.{rnd}.{to}.{src}", rnd="rn", to="bf16", src="f16")
def float_to_half(gen, args, mods):
    x = _float_operand(gen, args[1], mods.src, getattr(mods, "ftz", None))
    relu, sat, finite = (bool(getattr(mods, m, None)) for m in ("relu", "sat", "satfinite"))
    gen.write(args[0], f"{gen.fn(encode_half)}({x}, {mods.to!r}, {mods.rnd!r}, {relu}, {sat}, {finite})", "u2")


@form("cvt.{rnd}.f16.{to}", rnd="rni|rzi|rmi|rpi", to="f16")
def half_to_integral(gen, args, mods):
    x = f"{gen.fn(numerics.f16_to_f32)}({gen.read(args[1], 'u2')})"
    gen.write(args[0], f"{gen.fn(numerics.round_to_f16)}({gen.fn(_ROUND[mods.rnd])}({x}))", "u2")


def pack_bf16(high, low, truncate, relu):
    encode = numerics.f32_to_bf16_rz if truncate else numerics.f32_to_bf16
    return encode(_rectify(low, relu)) | (encode(_rectify(high, relu)) << np.uint32(16))


def pack_f16(high, low, truncate, relu):
    encode = numerics.truncate_to_f16 if truncate else numerics.round_to_f16
    low, high = (encode(_rectify(x, relu)).astype(np.uint32) for x in (low, high))
    return low | (high << np.uint32(16))


def pack_finite(high, low, to, mode, relu):
    low, high = (encode_half(x, to, mode, relu, False, True).astype(np.uint32) for x in (low, high))
    return low | (high << np.uint32(16))


@form("cvt.{rnd}[.{relu}][.{satfinite}].{to}.f32", rnd="rn|rz", satfinite="satfinite", to="f16x2|bf16x2")
@form("cvt.{rnd}.{satfinite}.{relu}.{to}.f32", rnd="rn|rz", satfinite="satfinite", to="f16x2|bf16x2")
def pack_halves(gen, args, mods):
    """Two f32 operands: the first goes to the upper half."""
    high, low = gen.read(args[1], "f4"), gen.read(args[2], "f4")
    if mods.satfinite:
        call = f"({high}, {low}, {mods.to[:-2]!r}, {mods.rnd!r}, {bool(mods.relu)})"
        gen.write(args[0], gen.fn(pack_finite) + call, "u4")
        return
    function = pack_bf16 if mods.to == "bf16x2" else pack_f16
    gen.write(args[0], f"{gen.fn(function)}({high}, {low}, {mods.rnd == 'rz'}, {bool(mods.relu)})", "u4")


def pack_fp8(high, low, to, relu):
    encode = numerics.f32_to_e4m3 if to == "e4m3x2" else numerics.f32_to_e5m2
    low, high = (encode(_rectify(x, relu)) for x in (low, high))
    return (low | (high << np.uint32(8))).astype(np.uint16)


@form("cvt.rn.satfinite[.{relu}].{to}.f32", to="e4m3x2|e5m2x2")
def pack_fp8_from_single(gen, args, mods):
    high, low = gen.read(args[1], "f4"), gen.read(args[2], "f4")
    gen.write(args[0], f"{gen.fn(pack_fp8)}({high}, {low}, {mods.to!r}, {bool(mods.relu)})", "u2")


@form("cvt.rn.satfinite[.{relu}].{to}.{src}", to="e4m3x2|e5m2x2", src="f16x2|bf16x2")
def pack_fp8_from_half(gen, args, mods):
    x, decode = gen.read(args[1], "u4"), gen.fn(_DECODE[mods.src[:-2]])
    halves = f"{decode}({x} >> u4(16)), {decode}({x} & u4(0xffff))"
    gen.write(args[0], f"{gen.fn(pack_fp8)}({halves}, {mods.to!r}, {bool(mods.relu)})", "u2")


def unpack_fp8(x, src, relu):
    table = numerics.E4M3 if src == "e4m3x2" else numerics.E5M2
    low, high = (_rectify(table[v], relu) for v in (x & np.uint16(0xFF), x >> np.uint16(8)))
    return numerics.f32_to_f16(low) | (numerics.f32_to_f16(high) << np.uint32(16))


@form("cvt.rn[.{relu}].f16x2.{src}", src="e4m3x2|e5m2x2")
def unpack_fp8_to_half(gen, args, mods):
    gen.write(args[0], f"{gen.fn(unpack_fp8)}({gen.read(args[1], 'u2')}, {mods.src!r}, {bool(mods.relu)})", "u4")


# ---- pairs of 6 and 4 bits, ue8m0 -----------------------------------------------------------------
_SMALL = {"e2m1x2": numerics.E2M1, "e2m3x2": numerics.E2M3, "e3m2x2": numerics.E3M2}
_SMALL_TYPES = "|".join(_SMALL)


def _halves(x, src):
    """(upper, lower) of f16x2 or bf16x2 as float32."""
    return (_DECODE[src[:-2]](v) for v in (x >> np.uint32(16), x & np.uint32(0xFFFF)))


def pack_small(high, low, to, relu):
    """Pairs of e2m1 in a byte, of e2m3 and e3m2 in two."""
    low, high = (numerics.f32_to_small(_rectify(x, relu), _SMALL[to]) for x in (low, high))
    return (low | high << np.uint32(4 if to == "e2m1x2" else 8)).astype(np.uint16)


def pack_small_halves(x, src, to, relu):
    return pack_small(*_halves(x, src), to, relu)


@form("cvt.rn.satfinite[.{relu}].{to}.f32", to=_SMALL_TYPES)
def pack_small_from_single(gen, args, mods):
    high, low = gen.read(args[1], "f4"), gen.read(args[2], "f4")
    gen.write(args[0], f"{gen.fn(pack_small)}({high}, {low}, {mods.to!r}, {bool(mods.relu)})", "u2")


@form("cvt.rn.satfinite[.{relu}].{to}.{src}", to=_SMALL_TYPES, src="f16x2|bf16x2")
def pack_small_from_half(gen, args, mods):
    call = f"({gen.read(args[1], 'u4')}, {mods.src!r}, {mods.to!r}, {bool(mods.relu)})"
    gen.write(args[0], gen.fn(pack_small_halves) + call, "u2")


def unpack_small(x, src, relu):
    bits = 4 if src == "e2m1x2" else 8
    mask = np.uint16(15 if bits == 4 else 63)
    low, high = (_rectify(_SMALL[src][v & mask], relu) for v in (x, x >> np.uint16(bits)))
    return numerics.f32_to_f16(low) | (numerics.f32_to_f16(high) << np.uint32(16))


@form("cvt.rn[.{relu}].f16x2.{src}", src=_SMALL_TYPES)
def unpack_small_to_half(gen, args, mods):
    gen.write(args[0], f"{gen.fn(unpack_small)}({gen.read(args[1], 'u2')}, {mods.src!r}, {bool(mods.relu)})", "u4")


def pack_scales(high, low, mode, finite):
    low, high = (numerics.f32_to_ue8m0(x, mode == "rp", finite) for x in (low, high))
    return (low | high << np.uint32(8)).astype(np.uint16)


def pack_scales_of_halves(x, mode, finite):
    return pack_scales(*_halves(x, "bf16x2"), mode, finite)


@form("cvt.{rnd}[.{satfinite}].ue8m0x2.{src}", rnd="rz|rp", satfinite="satfinite", src="f32|bf16x2")
def to_scales(gen, args, mods):
    options = f"{mods.rnd!r}, {bool(mods.satfinite)}"
    if mods.src == "f32":
        call = f"{gen.fn(pack_scales)}({gen.read(args[1], 'f4')}, {gen.read(args[2], 'f4')}, {options})"
    else:
        call = f"{gen.fn(pack_scales_of_halves)}({gen.read(args[1], 'u4')}, {options})"
    gen.write(args[0], call, "u2")


def unpack_scales(x):
    low, high = (numerics.f32_to_bf16(numerics.ue8m0_to_f64(v)) for v in (x & np.uint16(0xFF), x >> np.uint16(8)))
    return low | (high << np.uint32(16))


@form("cvt.rn.bf16x2.ue8m0x2")
def from_scales(gen, args, mods):
    gen.write(args[0], f"{gen.fn(unpack_scales)}({gen.read(args[1], 'u2')})", "u4")


# ---- stochastic rounding ---------------------------------------------------------------------------
# type -> (random bits of a number, bits after the point, least exponent, largest number, encoder)
_STOCHASTIC = {
    "f16x2": (13, 10, -14, 65504.0, numerics.round_to_f16),
    "bf16x2": (16, 7, -126, float.fromhex("0x1.fep127"), numerics.f32_to_bf16),
    "e2m1x4": (16, 1, 0, 6.0, lambda x: numerics.f32_to_small(x, numerics.E2M1)),
}
_REVERSED = np.array([int(f"{byte:08b}"[::-1], 2) for byte in range(256)], np.uint32)


def _stochastic(x, random, to, relu, finite):
    bits, mantissa, least, largest, encode = _STOCHASTIC[to]
    largest = largest if finite else np.inf
    rounded = numerics.round_stochastically(_rectify(x, relu), random, bits, mantissa, least, largest)
    codes = encode(rounded).astype(np.uint32)
    return codes if to == "e2m1x4" else np.where(np.isnan(x), np.uint32(0x7FFF), codes)


def pack_stochastic_pair(high, low, random, to, relu, finite):
    """The upper 16 bits are for the upper half; of f16 the lowest 13 of each (PTX ISA 9.7.9.21)."""
    mask = np.uint32((1 << _STOCHASTIC[to][0]) - 1)
    high, low = (_stochastic(x, random >> np.uint32(at) & mask, to, relu, finite) for x, at in ((high, 16), (low, 0)))
    return low | high << np.uint32(16)


def pack_stochastic_four(values, random, relu):
    """e2m1x4 of four, the first in the highest bits. Bytes 1 and 3 of the random bits are for the first two, 0 and 2
    for the others (PTX ISA 9.7.9.21); their order as measured on a B200 and, the upper 8 bits of each 16, on a B300:
    two numbers share 16 bits, of which one has them the other way round."""
    byte = [random >> np.uint32(8 * i) & np.uint32(255) for i in range(4)]
    turned = [_REVERSED[x] for x in byte]
    order = (turned[1], turned[3]), (byte[3], byte[1]), (turned[0], turned[2]), (byte[2], byte[0])
    word = np.uint32(0)
    for x, (upper, lower) in zip(values, order, strict=True):
        word = word << np.uint32(4) | _stochastic(x, upper << np.uint32(8) | lower, "e2m1x4", relu, True)
    return word.astype(np.uint16)


@form("cvt.rs[.{relu}][.{satfinite}].{to}.f32", satfinite="satfinite", to="bf16x2")
@form("cvt.rs[.{relu}].{satfinite}.{to}.f32", satfinite="satfinite", to="f16x2")
@form("cvt.rs.{satfinite}.{relu}.{to}.f32", satfinite="satfinite", to="f16x2|bf16x2")
def pair_stochastically(gen, args, mods):
    operands = f"{gen.read(args[1], 'f4')}, {gen.read(args[2], 'f4')}, {gen.read(args[3], 'u4')}"
    options = f"{mods.to!r}, {bool(mods.relu)}, {bool(mods.satfinite)}"
    gen.write(args[0], f"{gen.fn(pack_stochastic_pair)}({operands}, {options})", "u4")


@form("cvt.rs[.{relu}].satfinite.e2m1x4.f32")
@form("cvt.rs.satfinite.{relu}.e2m1x4.f32")
def four_stochastically(gen, args, mods):
    values = ", ".join(gen.read(x, "f4") for x in args[1])
    call = f"(({values}), {gen.read(args[2], 'u4')}, {bool(mods.relu)})"
    gen.write(args[0], gen.fn(pack_stochastic_four) + call, "u2")


def round_to_tf32(x, mode, relu, finite):
    """float32 bits to tf32 (13 low bits cleared), ties away from zero (rna), to even (rn) or truncated (rz)."""
    bits = np.where(x.view(np.float32) < 0, np.uint32(0), x) if relu else x
    if mode == "rna":
        rounded = bits + np.uint32(0x1000)
    elif mode == "rn":
        rounded = bits + np.uint32(0xFFF) + ((bits >> np.uint32(13)) & np.uint32(1))
    else:
        rounded = bits
    rounded = rounded & np.uint32(0xFFFFE000)
    if finite:
        infinite = (rounded & np.uint32(0x7FFFFFFF)) == np.uint32(0x7F800000)
        rounded = np.where(infinite, rounded - np.uint32(0x2000), rounded)
    missing = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    return np.where(missing, np.uint32(0x7FFFFFFF), rounded)


@form("cvt.{rnd}[.{satfinite}].tf32.f32", rnd="rna", satfinite="satfinite")
@form("cvt.{rnd}[.{relu}][.{satfinite}].tf32.f32", rnd="rn|rz", satfinite="satfinite")
@form("cvt.{rnd}.{satfinite}.{relu}.tf32.f32", rnd="rn|rz", satfinite="satfinite")
def to_tf32(gen, args, mods):
    relu, finite = bool(getattr(mods, "relu", None)), bool(mods.satfinite)
    gen.write(args[0], f"{gen.fn(round_to_tf32)}({gen.read(args[1], 'u4')}, {mods.rnd!r}, {relu}, {finite})", "u4")
