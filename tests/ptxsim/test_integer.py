"""Integer arithmetic, bit fields, logic and shifts against Python's and NumPy's integers (PTX ISA 9.7.1, 9.7.8)."""

from __future__ import annotations

import numpy as np
import pytest

from tests.testing.ptx import elementwise, same_bits

COUNT = 256
WIDTHS = {"16": np.uint16, "32": np.uint32, "64": np.uint64}
EDGES = [0, 1, 2, -1, -2, 5]


def values(bits, seed, small=False):
    """Random bit patterns with the edges of the range among them."""
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 2**bits, COUNT, dtype=np.uint64, endpoint=False)
    if small:
        x %= np.uint64(small)
    else:
        edges = EDGES + [1 << (bits - 1), (1 << (bits - 1)) - 1, (1 << (bits - 1)) + 1]
        places = rng.permutation(COUNT)[: 4 * len(edges)]
        x[places] = np.array([e % 2**bits for e in edges] * 4, np.uint64)
    return x.astype(f"u{bits // 8}")


def by_python(function, bits, signed, *arrays, out_bits=None):
    """Apply a function of Python integers elementwise and wrap the result."""
    out_bits = out_bits or bits
    readers = [[int(v) - (2**bits if signed and v >> (bits - 1) else 0) for v in x.tolist()] for x in arrays]
    return np.array([function(*args) % 2**out_bits for args in zip(*readers, strict=True)], f"u{out_bits // 8}")


def truncated(a, b):
    if b == 0:
        return -1
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


TWO_OPERANDS = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul.lo": lambda a, b: a * b,
    "min": min,
    "max": max,
    "div": truncated,
    "rem": lambda a, b: a if b == 0 else a - truncated(a, b) * b,
}


@pytest.mark.parametrize("kind", ["u16", "s16", "u32", "s32", "u64", "s64"])
@pytest.mark.parametrize("opcode", TWO_OPERANDS)
def test_two_operands(opcode, kind):
    bits, signed = int(kind[1:]), kind[0] == "s"
    a, b = values(bits, 1), values(bits, 2)
    got = elementwise(f"{opcode}.{kind} {{d}}, {{a}}, {{b}};", [a, b], a.dtype)
    same_bits(got, by_python(TWO_OPERANDS[opcode], bits, signed, a, b))


@pytest.mark.parametrize("kind", ["u16", "s16", "u32", "s32", "u64", "s64"])
def test_high_half_of_products(kind):
    bits, signed = int(kind[1:]), kind[0] == "s"
    a, b, c = values(bits, 1), values(bits, 2), values(bits, 3)
    got = elementwise(f"mul.hi.{kind} {{d}}, {{a}}, {{b}};", [a, b], a.dtype)
    same_bits(got, by_python(lambda x, y: x * y >> bits, bits, signed, a, b))
    got = elementwise(f"mad.hi.{kind} {{d}}, {{a}}, {{b}}, {{c}};", [a, b, c], a.dtype)
    same_bits(got, by_python(lambda x, y, z: (x * y >> bits) + z, bits, signed, a, b, c))
    got = elementwise(f"mad.lo.{kind} {{d}}, {{a}}, {{b}}, {{c}};", [a, b, c], a.dtype)
    same_bits(got, by_python(lambda x, y, z: x * y + z, bits, signed, a, b, c))


@pytest.mark.parametrize("kind", ["u16", "s16", "u32", "s32"])
def test_wide_products(kind):
    bits, signed = int(kind[1:]), kind[0] == "s"
    a, b, c = values(bits, 1), values(bits, 2), values(2 * bits, 3)
    wide = by_python(lambda x, y: x * y, bits, signed, a, b, out_bits=2 * bits)
    same_bits(elementwise(f"mul.wide.{kind} {{d}}, {{a}}, {{b}};", [a, b], c.dtype), wide)
    same_bits(elementwise(f"mad.wide.{kind} {{d}}, {{a}}, {{b}}, {{c}};", [a, b, c], c.dtype), wide + c)


@pytest.mark.parametrize("opcode", ["add", "sub"])
def test_saturating_sum(opcode):
    a, b = values(32, 1), values(32, 2)
    sign = 1 if opcode == "add" else -1
    expected = by_python(lambda x, y: max(-(2**31), min(2**31 - 1, x + sign * y)), 32, True, a, b)
    same_bits(elementwise(f"{opcode}.sat.s32 {{d}}, {{a}}, {{b}};", [a, b], np.uint32), expected)


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_sign(bits):
    a = values(bits, 1)
    same_bits(elementwise(f"neg.s{bits} {{d}}, {{a}};", [a], a.dtype), by_python(lambda x: -x, bits, True, a))
    same_bits(elementwise(f"abs.s{bits} {{d}}, {{a}};", [a], a.dtype), by_python(abs, bits, True, a))


def test_relu_extremes():
    a, b = values(32, 1), values(32, 2)
    got = elementwise("max.relu.s32 {d}, {a}, {b};", [a, b], np.uint32)
    same_bits(got, by_python(lambda x, y: max(x, y, 0), 32, True, a, b))


@pytest.mark.parametrize("bits", [32, 64])
def test_bit_counts(bits):
    a = values(bits, 1)
    cases = {
        f"popc.b{bits}": lambda x: x.bit_count(),
        f"clz.b{bits}": lambda x: bits - x.bit_length(),
        f"bfind.u{bits}": lambda x: x.bit_length() - 1,
        f"bfind.shiftamt.u{bits}": lambda x: bits - x.bit_length() if x else -1,
    }
    for opcode, function in cases.items():
        got = elementwise(f"{opcode} {{d}}, {{a}};", [a], np.uint32)
        same_bits(got, by_python(function, bits, False, a, out_bits=32))
    got = elementwise(f"bfind.s{bits} {{d}}, {{a}};", [a], np.uint32)
    same_bits(got, by_python(lambda x: (x if x >= 0 else ~x).bit_length() - 1, bits, True, a, out_bits=32))
    got = elementwise(f"brev.b{bits} {{d}}, {{a}};", [a], a.dtype)
    same_bits(got, by_python(lambda x: int(f"{x:0{bits}b}"[::-1], 2), bits, False, a))


def extract(x, position, length, bits, signed):
    """bfe as the manual's pseudo-code writes it."""
    top = bits - 1
    sign = 0 if not signed or length == 0 else x >> min(position + length - 1, top) & 1
    result = 0
    for i in range(bits):
        bit = x >> (position + i) & 1 if i < length and position + i <= top else sign
        result |= bit << i
    return result


@pytest.mark.parametrize("kind", ["u32", "s32", "u64", "s64"])
def test_bit_field_extract(kind):
    bits, signed = int(kind[1:]), kind[0] == "s"
    a, position, length = values(bits, 1), values(32, 2, small=bits + 6), values(32, 3, small=bits + 6)
    got = elementwise(f"bfe.{kind} {{d}}, {{a}}, {{b}}, {{c}};", [a, position, length], a.dtype)
    triples = zip(a.tolist(), position.tolist(), length.tolist(), strict=True)
    same_bits(got, np.array([extract(x, p, n, bits, signed) for x, p, n in triples], a.dtype))


@pytest.mark.parametrize("bits", [32, 64])
def test_bit_field_insert(bits):
    a, b = values(bits, 1), values(bits, 4)
    position, length = values(32, 2, small=bits + 6), values(32, 3, small=bits + 6)

    def insert(x, y, p, n):
        for i in range(n):
            if p + i < bits:
                y = y & ~(1 << (p + i)) | (x >> i & 1) << (p + i)
        return y

    got = elementwise(f"bfi.b{bits} {{d}}, {{a}}, {{b}}, {{c}}, {{e}};", [a, b, position, length], a.dtype)
    rows = zip(a.tolist(), b.tolist(), position.tolist(), length.tolist(), strict=True)
    same_bits(got, np.array([insert(*row) for row in rows], a.dtype))


@pytest.mark.parametrize("mode", ["wrap", "clamp"])
def test_masks_and_extension(mode):
    a, position, length = values(32, 1), values(32, 2, small=40), values(32, 3, small=40)

    def limited(n):
        return n % 32 if mode == "wrap" else min(n, 32)

    got = elementwise(f"bmsk.{mode}.b32 {{d}}, {{a}}, {{b}};", [position, length], np.uint32)
    pairs = zip(position.tolist(), length.tolist(), strict=True)
    same_bits(got, np.array([((1 << limited(n)) - 1 << limited(p)) % 2**32 for p, n in pairs], np.uint32))

    for kind in ("u32", "s32"):

        def extend(x, n, signed=kind == "s32"):
            n = limited(n)
            low = x & ((1 << n) - 1)
            return low - (1 << n) if signed and n and low >> (n - 1) else low

        got = elementwise(f"szext.{mode}.{kind} {{d}}, {{a}}, {{b}};", [a, length], np.uint32)
        pairs = zip(a.tolist(), length.tolist(), strict=True)
        same_bits(got, np.array([extend(x, n) % 2**32 for x, n in pairs], np.uint32))


@pytest.mark.parametrize("a_type", ["u32", "s32"])
@pytest.mark.parametrize("b_type", ["u32", "s32"])
def test_dot_products(a_type, b_type):
    a, b, c = values(32, 1), values(32, 2), values(32, 3)
    a8, b8 = (x.view("i1" if t == "s32" else "u1").reshape(-1, 4).astype(int) for x, t in ((a, a_type), (b, b_type)))
    got = elementwise(f"dp4a.{a_type}.{b_type} {{d}}, {{a}}, {{b}}, {{c}};", [a, b, c], np.uint32)
    same_bits(got, ((a8 * b8).sum(1) + c.astype(int)).astype(np.uint32))
    a16 = a.view("i2" if a_type == "s32" else "u2").reshape(-1, 2).astype(int)
    for half, columns in (("lo", b8[:, :2]), ("hi", b8[:, 2:])):
        got = elementwise(f"dp2a.{half}.{a_type}.{b_type} {{d}}, {{a}}, {{b}}, {{c}};", [a, b, c], np.uint32)
        same_bits(got, ((a16 * columns).sum(1) + c.astype(int)).astype(np.uint32))


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_logic(bits):
    a, b = values(bits, 1), values(bits, 2)
    for opcode, expected in (("and", a & b), ("or", a | b), ("xor", a ^ b)):
        same_bits(elementwise(f"{opcode}.b{bits} {{d}}, {{a}}, {{b}};", [a, b], a.dtype), expected)
    same_bits(elementwise(f"not.b{bits} {{d}}, {{a}};", [a], a.dtype), ~a)


def test_logic_of_predicates():
    a, b = values(32, 1, small=2), values(32, 2, small=2)
    snippet = "setp.ne.u32 %p2, {a}, 0; setp.ne.u32 %p3, {b}, 0; "
    for opcode, expected in (("and", a & b), ("or", a | b), ("xor", a ^ b)):
        got = elementwise(f"{snippet}{opcode}.pred {{d}}, %p2, %p3;", [a, b], bool)
        np.testing.assert_array_equal(got, expected.astype(bool))
    np.testing.assert_array_equal(elementwise(f"{snippet}not.pred {{d}}, %p2;", [a, b], bool), a == 0)


@pytest.mark.parametrize("table", [0x00, 0x96, 0xE8, 0xCA, 0x1B, 0xFF])
def test_lookup_table(table):
    a, b, c = values(32, 1), values(32, 2), values(32, 3)
    expected = np.zeros(COUNT, np.uint32)
    for bit in range(32):
        index = (a >> bit & 1) << 2 | (b >> bit & 1) << 1 | (c >> bit & 1)
        expected |= ((table >> index) & 1).astype(np.uint32) << np.uint32(bit)
    got = elementwise(f"lop3.b32 {{d}}, {{a}}, {{b}}, {{c}}, {table};", [a, b, c], np.uint32)
    same_bits(got, expected)


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_shifts(bits):
    a, n = values(bits, 1), values(32, 2, small=bits + 8)
    pairs = list(zip(a.tolist(), n.tolist(), strict=True))
    got = elementwise(f"shl.b{bits} {{d}}, {{a}}, {{b}};", [a, n], a.dtype)
    same_bits(got, np.array([(x << k) % 2**bits for x, k in pairs], a.dtype))
    got = elementwise(f"shr.u{bits} {{d}}, {{a}}, {{b}};", [a, n], a.dtype)
    same_bits(got, np.array([x >> k for x, k in pairs], a.dtype))
    signed = [x - (2**bits if x >> (bits - 1) else 0) for x in a.tolist()]
    expected = np.array([(x >> k) % 2**bits for x, k in zip(signed, n.tolist(), strict=True)], a.dtype)
    same_bits(elementwise(f"shr.s{bits} {{d}}, {{a}}, {{b}};", [a, n], a.dtype), expected)
    for amount in (0, 3, bits - 1, bits, bits + 5):
        got = elementwise(f"shl.b{bits} {{d}}, {{a}}, {amount};", [a], a.dtype)
        same_bits(got, np.array([(x << amount) % 2**bits for x in a.tolist()], a.dtype))
        got = elementwise(f"shr.s{bits} {{d}}, {{a}}, {amount};", [a], a.dtype)
        same_bits(got, np.array([(x >> amount) % 2**bits for x in signed], a.dtype))


@pytest.mark.parametrize("mode", ["wrap", "clamp"])
@pytest.mark.parametrize("side", ["l", "r"])
def test_funnel_shifts(side, mode):
    a, b, n = values(32, 1), values(32, 2), values(32, 3, small=40)
    expected = []
    for low, high, k in zip(a.tolist(), b.tolist(), n.tolist(), strict=True):
        k = k % 32 if mode == "wrap" else min(k, 32)
        word = high << 32 | low
        expected.append((word << k >> 32 if side == "l" else word >> k) % 2**32)
    got = elementwise(f"shf.{side}.{mode}.b32 {{d}}, {{a}}, {{b}}, {{c}};", [a, b, n], np.uint32)
    same_bits(got, np.array(expected, np.uint32))


def test_byte_permutation():
    a, b, selector = values(32, 1), values(32, 2), values(32, 3)
    pool = np.concatenate([a.view("u1").reshape(-1, 4), b.view("u1").reshape(-1, 4)], axis=1)
    expected = np.zeros((COUNT, 4), np.uint8)
    for i in range(4):
        nibble = selector >> (4 * i) & 15
        byte = pool[np.arange(COUNT), nibble & 7]
        expected[:, i] = np.where(nibble & 8, np.where(byte & 0x80, 0xFF, 0), byte)
    got = elementwise("prmt.b32 {d}, {a}, {b}, {c};", [a, b, selector], np.uint32)
    same_bits(got, expected.view(np.uint32).ravel())


# PTX ISA 9.7.9.7, table of modes: selectors of d.b3 d.b2 d.b1 d.b0 for c[1:0] = 0, 1, 2, 3
PERMUTE_MODES = {
    "f4e": ["3210", "4321", "5432", "6543"],
    "b4e": ["5670", "6701", "7012", "0123"],
    "rc8": ["0000", "1111", "2222", "3333"],
    "ecl": ["3210", "3211", "3222", "3333"],
    "ecr": ["0000", "1110", "2210", "3210"],
    "rc16": ["1010", "3232", "1010", "3232"],
}


@pytest.mark.parametrize("mode", PERMUTE_MODES)
def test_byte_permutation_modes(mode):
    a, b, c = values(32, 1), values(32, 2), values(32, 3)
    pool = np.concatenate([a.view("u1").reshape(-1, 4), b.view("u1").reshape(-1, 4)], axis=1)
    picks = np.array([[int(d) for d in reversed(row)] for row in PERMUTE_MODES[mode]])[c & 3]
    expected = np.take_along_axis(pool, picks, 1)
    got = elementwise(f"prmt.b32.{mode} {{d}}, {{a}}, {{b}}, {{c}};", [a, b, c], np.uint32)
    same_bits(got, np.ascontiguousarray(expected).view(np.uint32).ravel())
