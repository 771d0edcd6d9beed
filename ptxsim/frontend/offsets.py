"""Offsets into global memory that are computed in 32 bits, and overflow.

``offset_products`` finds in the text of a kernel the 32-bit products (mul.lo, mad.lo, shl) that reach the address of an
access to global memory through sums and one widening to 64 bits (cvt, mul.wide, mad.wide). The generated code checks
them where they are executed: a product that does not fit leads to a wrong place, even if that is legal memory. Products
with large constants are left out: divisions by constants wrap on purpose.
"""

from __future__ import annotations

import re

from ..ops.instruction import Mem

_ACCESSES = ("ld", "st", "atom", "red", "cp")
_ELSEWHERE = {"shared", "shared::cta", "shared::cluster", "param", "local", "const", "tensor"}
_LARGEST_FACTOR = 1 << 24


def _bases(body):
    """Registers with the addresses of accesses to global memory."""
    for i in body:
        spaces = set(i.parts)
        if i.root in _ACCESSES and ("global" in spaces or not spaces & _ELSEWHERE) and "tensor" not in spaces:
            yield from (x.base for x in i.args if isinstance(x, Mem))


def _constant(token):
    return int(token.rstrip("U"), 0) if re.match(r"-?(0x[0-9a-fA-F]+|\d+)U?$", token) else None


def offset_products(body) -> dict[int, bool]:
    """Identity of each instruction to check -> whether the widening that follows is a signed one."""
    definitions = {}
    for i in body:
        if i.args and isinstance(i.args[0], str):
            definitions.setdefault(i.args[0], []).append(i)
    found, seen = {}, set()
    todo = [(base, 64, None) for base in _bases(body)]
    while todo:
        name, width, signed = todo.pop()
        if not isinstance(name, str) or (name, width, signed) in seen:
            continue
        seen.add((name, width, signed))
        for i in definitions.get(name, ()):
            todo += _sources(i, width, signed, found)
    return found


def _sources(i, width, signed, found):
    """(register, bits, signedness) of the operands through which an offset goes on; notes products of 32 bits."""
    kind, operands = i.parts[-1], i.args[1:]
    if width == 64:
        if i.root in ("mul", "mad") and i.parts[1] == "wide" and kind in ("s32", "u32"):
            narrow = [(x, 32, kind == "s32") for x in operands[:2]]
            return narrow + [(x, 64, None) for x in operands[2:]]
        if i.root == "cvt" and kind in ("s32", "u32"):
            return [(operands[0], 32, kind == "s32")]
        if i.root in ("add", "sub", "mul", "mad", "mov", "cvta", "selp", "shl"):
            return [(x, 64, None) for x in operands]
        return []
    if i.root in ("add", "sub", "mov", "selp"):
        return [(x, 32, signed) for x in operands]
    product = (i.root in ("mul", "mad") and i.parts[1] == "lo") or i.root == "shl"
    if not product or kind not in ("s32", "u32", "b32"):
        return []
    constants = [c for c in map(_constant, operands[:2]) if c is not None]
    if any(abs(c) > _LARGEST_FACTOR for c in constants) or (i.root == "shl" and (not constants or constants[-1] > 24)):
        return []
    found[id(i)] = found.get(id(i), True) and signed
    return [(x, 32, signed) for x in (operands[:1] if i.root == "shl" else operands)]
