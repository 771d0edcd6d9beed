"""Logic and shifts: PTX ISA 9.7.8 (and, or, xor, not, lop3, shl, shr, shf, prmt)."""

from __future__ import annotations

import numpy as np

from .forms import KIND, SIZE, form

_LOGIC = "pred|b16|b32|b64"


@form("and.{type}", type=_LOGIC)
@form("or.{type}", type=_LOGIC)
@form("xor.{type}", type=_LOGIC)
def two_operands(gen, args, mods):
    kind = KIND[mods.type]
    sign = {"and": "&", "or": "|", "xor": "^"}[gen.root]
    gen.write(args[0], f"{gen.read(args[1], kind)} {sign} {gen.read(args[2], kind)}", kind)


@form("not.{type}", type=_LOGIC)
def complement(gen, args, mods):
    kind = KIND[mods.type]
    x = gen.read(args[1], kind)
    gen.write(args[0], f"np.logical_not({x})" if kind == "b" else f"~{x}", kind)


def lookup_table(a, b, c, table):
    """lop3: bit i of the table is the result where (a, b, c) = the bits of i."""
    result = np.uint32(0)
    for i in range(8):
        if table >> i & 1:
            result = result | ((a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c))
    return result


@form("lop3.b32")
def three_operands(gen, args, mods):
    operands = ", ".join(gen.read(x, "u4") for x in args[1:4])
    gen.write(args[0], f"{gen.fn(lookup_table)}({operands}, {int(args[4], 0)})", "u4")


def shift_left(a, n, bits):
    """shl: amounts of ``bits`` and more give zero."""
    return np.where(n >= bits, a.dtype.type(0), a << np.minimum(n, np.uint32(bits - 1)).astype(a.dtype))


def shift_right(a, n, bits):
    """shr: amounts of ``bits`` and more give the sign (signed) or zero."""
    limited = np.minimum(n, np.uint32(bits - 1)).astype(a.dtype)
    return a >> limited if a.dtype.kind == "i" else np.where(n >= bits, a.dtype.type(0), a >> limited)


@form("shl.{type}", type="b16|b32|b64")
@form("shr.{type}", type="b16|b32|b64|u16|u32|u64|s16|s32|s64")
def shift(gen, args, mods):
    kind = KIND[mods.type]
    x, bits = gen.read(args[1], kind), 8 * SIZE[kind]
    if not args[2].isdigit():
        function = shift_left if gen.root == "shl" else shift_right
        gen.write(args[0], f"{gen.fn(function)}({x}, {gen.read(args[2], 'u4')}, {bits})", kind)
        return
    amount = int(args[2])
    if amount >= bits and kind[0] == "i":
        gen.write(args[0], f"{x} >> {kind}({bits - 1})", kind)
    elif amount >= bits:
        gen.write(args[0], f"{x} & {kind}(0)", kind)
    else:
        gen.write(args[0], f"{x} {'<<' if gen.root == 'shl' else '>>'} {kind}({amount})", kind)


def funnel_shift(low, high, n, left, wrap):
    """shf: a 64-bit value high:low shifted; its upper (left) or lower (right) half."""
    n = ((n & np.uint32(31)) if wrap else np.minimum(n, np.uint32(32))).astype(np.uint64)
    value = low.astype(np.uint64) | (high.astype(np.uint64) << np.uint64(32))
    return (((value << n) >> np.uint64(32)) if left else (value >> n)).astype(np.uint32)


@form("shf.{side}.{mode}.b32", side="l|r", mode="wrap|clamp")
def funnel(gen, args, mods):
    operands = ", ".join(gen.read(x, "u4") for x in args[1:4])
    gen.write(args[0], f"{gen.fn(funnel_shift)}({operands}, {mods.side == 'l'}, {mods.mode == 'wrap'})", "u4")


# prmt's named modes: for each value of c[1:0] the four selectors, lowest byte first
_PERMUTE_MODES = {
    "f4e": [[i + j for j in range(4)] for i in range(4)],
    "b4e": [[(i - j) % 8 for j in range(4)] for i in range(4)],
    "rc8": [[i] * 4 for i in range(4)],
    "ecl": [[max(i, j) for j in range(4)] for i in range(4)],
    "ecr": [[min(i, j) for j in range(4)] for i in range(4)],
    "rc16": [[0, 1, 0, 1], [2, 3, 2, 3]] * 2,
}


def permute_bytes(a, b, selector, mode):
    """prmt: bytes of b:a picked by nibbles of the selector; bit 3 of a nibble replicates the byte's sign."""
    if mode is not None:
        words = [sum(s << 4 * j for j, s in enumerate(row)) for row in _PERMUTE_MODES[mode]]
        selector = np.array(words, np.uint32)[selector & np.uint32(3)]
    value = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
    result = np.uint32(0)
    for i in range(4):
        pick = (selector >> np.uint32(4 * i)) & np.uint32(15)
        byte = (value >> ((pick & np.uint32(7)).astype(np.uint64) * np.uint64(8))).astype(np.uint32) & np.uint32(0xFF)
        sign = np.where(byte & np.uint32(0x80), np.uint32(0xFF), np.uint32(0))
        byte = np.where(pick & np.uint32(8), sign, byte)
        result = result | (byte << np.uint32(8 * i))
    return result


@form("prmt.b32[.{mode}]", mode="f4e|b4e|rc8|ecl|ecr|rc16")
def permute(gen, args, mods):
    operands = ", ".join(gen.read(x, "u4") for x in args[1:4])
    gen.write(args[0], f"{gen.fn(permute_bytes)}({operands}, {mods.mode!r})", "u4")
