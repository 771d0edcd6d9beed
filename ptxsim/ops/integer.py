"""Integer arithmetic: PTX ISA 9.7.1 (add, sub, mul, mad, div, rem, abs, neg, min, max, popc, clz, bfind, brev, bfe,
bfi, szext, bmsk, dp4a, dp2a)."""

from __future__ import annotations

import numpy as np

from .forms import KIND, SIZE, form, width_of

_WORDS = "u32|u64|s32|s64"


def _wide(kind: str) -> str:
    return kind[0] + str(2 * SIZE[kind])


@form("add.{type}", type="u16|u32|u64|s16|s32|s64")
@form("sub.{type}", type="u16|u32|u64|s16|s32|s64")
def add_sub(gen, args, mods):
    kind = "u" + KIND[mods.type][1]
    sign = "+" if gen.root == "add" else "-"
    gen.write(args[0], f"{gen.read(args[1], kind)} {sign} {gen.read(args[2], kind)}", kind)


@form("add.sat.s32")
@form("sub.sat.s32")
def add_sub_saturating(gen, args, mods):
    sign = "+" if gen.root == "add" else "-"
    exact = f"{gen.read(args[1], 'i4')}.astype(i8) {sign} {gen.read(args[2], 'i4')}.astype(i8)"
    gen.write(args[0], f"np.clip({exact}, -0x80000000, 0x7fffffff).astype(i4)", "i4")


def multiply_high_64(a, b, signed):
    """Upper 64 bits of a 128-bit product, through Python's integers."""
    product = np.frompyfunc(lambda x, y: (int(x) * int(y)) >> 64 & 0xFFFFFFFFFFFFFFFF, 2, 1)
    result = np.asarray(product(a, b)).astype(np.uint64)
    return result.view(np.int64) if signed else result


def _product_high(gen, x, y, kind):
    if SIZE[kind] == 8:
        return f"{gen.fn(multiply_high_64)}({x}, {y}, {kind[0] == 'i'})"
    wide = _wide(kind)
    return f"(({x}.astype({wide}) * {y}.astype({wide})) >> {8 * SIZE[kind]}).astype({kind})"


@form("mul.{mode}.{int}", mode="lo|hi")
@form("mul.{mode}.{int}", mode="wide", int="u16|s16|u32|s32")
def multiply(gen, args, mods):
    kind = KIND[mods.int]
    if mods.mode == "lo":
        kind = "u" + kind[1]
    x, y = gen.read(args[1], kind), gen.read(args[2], kind)
    if mods.mode == "lo":
        gen.write(args[0], f"{x} * {y}", kind)
    elif mods.mode == "hi":
        gen.write(args[0], _product_high(gen, x, y, kind), kind)
    else:
        wide = _wide(kind)
        gen.write(args[0], f"{x}.astype({wide}) * {y}.astype({wide})", wide)


@form("mad.{mode}.{int}", mode="lo|hi")
@form("mad.{mode}.{int}", mode="wide", int="u16|s16|u32|s32")
def multiply_add(gen, args, mods):
    kind = KIND[mods.int]
    if mods.mode == "lo":
        kind = "u" + kind[1]
    x, y = gen.read(args[1], kind), gen.read(args[2], kind)
    if mods.mode == "lo":
        gen.write(args[0], f"{x} * {y} + {gen.read(args[3], kind)}", kind)
    elif mods.mode == "hi":
        gen.write(args[0], f"{_product_high(gen, x, y, kind)} + {gen.read(args[3], kind)}", kind)
    else:
        wide = _wide(kind)
        gen.write(args[0], f"{x}.astype({wide}) * {y}.astype({wide}) + {gen.read(args[3], wide)}", wide)


def divide(a, b):
    """Quotient rounded towards zero; all ones where the divisor is zero."""
    a, b = np.broadcast_arrays(a, b)
    safe = np.where(b == 0, b.dtype.type(1), b)
    if a.dtype.kind == "u":
        return np.where(b == 0, ~a.dtype.type(0), a // safe)
    magnitude = f"u{a.dtype.itemsize}"  # |most negative value| fits the unsigned type
    quotient = np.abs(a).view(magnitude) // np.abs(safe).view(magnitude)
    quotient = np.where((a < 0) ^ (safe < 0), -quotient, quotient).view(a.dtype)
    return np.where(b == 0, a.dtype.type(-1), quotient)


def remainder(a, b):
    """Remainder with the sign of the dividend; the dividend where the divisor is zero."""
    return np.where(b == 0, a, a - divide(a, b) * b).astype(a.dtype)


@form("div.{int}")
@form("rem.{int}")
def divide_remainder(gen, args, mods):
    kind = KIND[mods.int]
    function = divide if gen.root == "div" else remainder
    gen.write(args[0], f"{gen.fn(function)}({gen.read(args[1], kind)}, {gen.read(args[2], kind)})", kind)


@form("abs.{int}", int="s16|s32|s64")
def absolute(gen, args, mods):
    kind = KIND[mods.int]
    gen.write(args[0], f"np.abs({gen.read(args[1], kind)})", kind)


@form("neg.{int}", int="s16|s32|s64")
def negate(gen, args, mods):
    kind = KIND[mods.int]
    gen.write(args[0], f"-{gen.read(args[1], kind)}", kind)


@form("min.{int}")
@form("max.{int}")
@form("min.{relu}.{int}", int="s32")
@form("max.{relu}.{int}", int="s32")
def minimum_maximum(gen, args, mods):
    kind = KIND[mods.int]
    function = "np.minimum" if gen.root == "min" else "np.maximum"
    result = f"{function}({gen.read(args[1], kind)}, {gen.read(args[2], kind)})"
    if getattr(mods, "relu", None):
        result = f"np.maximum({result}, {kind}(0))"
    gen.write(args[0], result, kind)


@form("popc.{type}", type="b32|b64")
def population_count(gen, args, mods):
    gen.write(args[0], f"np.bitwise_count({gen.read(args[1], KIND[mods.type])}).astype(u4)", "u4")


def leading_zeros(a, bits):
    """Number of zero bits above the highest one; ``bits`` if there is none."""
    rest = a.astype(np.uint64)
    top = np.zeros(np.shape(rest), np.int64)
    for step in (32, 16, 8, 4, 2, 1):
        big = rest >= (np.uint64(1) << np.uint64(step))
        top = top + np.where(big, step, 0)
        rest = np.where(big, rest >> np.uint64(step), rest)
    return np.where(a == 0, bits, bits - 1 - top).astype(np.uint32)


@form("clz.{type}", type="b32|b64")
def count_leading_zeros(gen, args, mods):
    x = gen.read(args[1], KIND[mods.type])
    gen.write(args[0], f"{gen.fn(leading_zeros)}({x}, {width_of(mods.type)})", "u4")


def find_top_bit(a, bits, shift_amount):
    """Position of the highest bit that is not a copy of the sign; -1 if there is none."""
    if a.dtype.kind == "i":
        a = np.where(a < 0, ~a, a)
    zeros = leading_zeros(a, bits)
    result = zeros if shift_amount else np.uint32(bits - 1) - zeros
    return np.where(zeros == bits, np.uint32(0xFFFFFFFF), result)


@form("bfind[.{shiftamt}].{type}", shiftamt="shiftamt", type=_WORDS)
def bit_find(gen, args, mods):
    x = gen.read(args[1], KIND[mods.type])
    gen.write(args[0], f"{gen.fn(find_top_bit)}({x}, {width_of(mods.type)}, {bool(mods.shiftamt)})", "u4")


def reverse_bits(a):
    bits = 8 * a.dtype.itemsize
    unit = a.dtype.type
    result = np.zeros_like(a)
    for i in range(bits):
        result = result | (((a >> unit(i)) & unit(1)) << unit(bits - 1 - i))
    return result


@form("brev.{type}", type="b32|b64")
def bit_reverse(gen, args, mods):
    kind = KIND[mods.type]
    gen.write(args[0], f"{gen.fn(reverse_bits)}({gen.read(args[1], kind)})", kind)


def extract_field(a, position, length, bits, signed):
    """bfe: ``length`` bits from ``position``; beyond the top the sign (signed) or zero."""
    position = (position & np.uint32(0xFF)).astype(np.int64)
    length = (length & np.uint32(0xFF)).astype(np.int64)
    wide = a.astype(np.int64) if signed else a.astype(np.uint64)
    shifted = (wide >> np.minimum(position, 63).astype(wide.dtype)).astype(np.int64)
    if not signed:
        shifted = np.where(position > 63, 0, shifted)
    mask = np.where(length >= 64, -1, (np.int64(1) << np.minimum(length, 63)) - 1)
    field = shifted & mask
    if signed:
        top = np.maximum(np.minimum(length, bits) - 1, 0)
        negative = (length > 0) & (length < bits) & (((field >> top) & 1) == 1)
        field = np.where(negative, field | ~mask, field)
    return field.astype(a.dtype)


@form("bfe.{type}", type=_WORDS)
def bit_field_extract(gen, args, mods):
    kind = KIND[mods.type]
    x, position, length = gen.read(args[1], kind), gen.read(args[2], "u4"), gen.read(args[3], "u4")
    gen.write(args[0], f"{gen.fn(extract_field)}({x}, {position}, {length}, {8 * SIZE[kind]}, {kind[0] == 'i'})", kind)


def insert_field(a, b, position, length):
    """bfi: the low ``length`` bits of a placed into b at ``position``."""
    bits = 8 * a.dtype.itemsize
    position = (position & np.uint32(0xFF)).astype(np.uint64)
    length = (length & np.uint32(0xFF)).astype(np.uint64)
    ones = np.uint64(0xFFFFFFFFFFFFFFFF)
    mask = np.where(length >= 64, ones, (np.uint64(1) << np.minimum(length, np.uint64(63))) - np.uint64(1))
    shift = np.minimum(position, np.uint64(63))
    outside = position >= bits
    mask = np.where(outside, np.uint64(0), mask << shift)
    value = np.where(outside, np.uint64(0), a.astype(np.uint64) << shift)
    return ((b.astype(np.uint64) & ~mask) | (value & mask)).astype(a.dtype)


@form("bfi.{type}", type="b32|b64")
def bit_field_insert(gen, args, mods):
    kind = KIND[mods.type]
    operands = ", ".join([gen.read(args[1], kind), gen.read(args[2], kind)] + [gen.read(x, "u4") for x in args[3:5]])
    gen.write(args[0], f"{gen.fn(insert_field)}({operands})", kind)


def extend_sign_or_zero(a, length, wrap):
    """szext: keep the low ``length`` bits and extend them by sign (signed) or zero."""
    length = (length & np.uint32(31)) if wrap else np.minimum(length, np.uint32(32))
    keep = length.astype(np.int64)
    mask = (np.int64(1) << keep) - 1
    low = a.astype(np.int64) & mask
    if a.dtype.kind == "i":
        negative = (keep > 0) & (((low >> np.maximum(keep - 1, 0)) & 1) == 1)
        low = np.where(negative, low | ~mask, low)
    return low.astype(a.dtype)


@form("szext.{mode}.{type}", mode="wrap|clamp", type="u32|s32")
def sign_zero_extend(gen, args, mods):
    kind = KIND[mods.type]
    x, n = gen.read(args[1], kind), gen.read(args[2], "u4")
    gen.write(args[0], f"{gen.fn(extend_sign_or_zero)}({x}, {n}, {mods.mode == 'wrap'})", kind)


def bit_mask(position, length, wrap):
    """bmsk: ``length`` ones from ``position``."""
    limit = (lambda x: x & np.uint32(31)) if wrap else (lambda x: np.minimum(x, np.uint32(32)))
    position, length = limit(position).astype(np.uint64), limit(length).astype(np.uint64)
    return (((np.uint64(1) << length) - np.uint64(1)) << position).astype(np.uint32)


@form("bmsk.{mode}.b32", mode="wrap|clamp")
def make_bit_mask(gen, args, mods):
    x, n = gen.read(args[1], "u4"), gen.read(args[2], "u4")
    gen.write(args[0], f"{gen.fn(bit_mask)}({x}, {n}, {mods.mode == 'wrap'})", "u4")


def _field(x, position, bits, signed):
    value = ((x >> np.uint32(position)) & np.uint32((1 << bits) - 1)).astype(np.int64)
    return np.where(value >> (bits - 1) & 1, value - (1 << bits), value) if signed else value


def dot_product(a, b, c, count, high, a_signed, b_signed):
    """dp4a (count 4: bytes with bytes) and dp2a (count 2: 16-bit fields with the low or high bytes of b)."""
    result = c.astype(np.int64)
    for j in range(count):
        x = _field(a, 32 // count * j, 32 // count, a_signed)
        result = result + x * _field(b, 8 * j + (16 if high else 0), 8, b_signed)
    return result.astype(np.uint32)


@form("dp4a.{a}.{b}", a="u32|s32", b="u32|s32")
@form("dp2a.{half}.{a}.{b}", half="lo|hi", a="u32|s32", b="u32|s32")
def dot_products(gen, args, mods):
    operands = ", ".join(gen.read(x, "u4") for x in args[1:4])
    high = getattr(mods, "half", None) == "hi"
    gen.write(
        args[0],
        f"{gen.fn(dot_product)}({operands}, {int(gen.root[2])}, {high}, {mods.a == 's32'}, {mods.b == 's32'})",
        "u4",
    )
