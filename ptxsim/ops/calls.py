"""Calls (PTX ISA 9.7.12, call): only of vprintf, which is what cute.printf becomes.

CUDA's vprintf takes a format and the address of the arguments, packed one after the other, each aligned to its size; it
gives the number of arguments. What it prints appears at once, lane by lane.
"""

from __future__ import annotations

import ctypes
import re
import struct

from ..arrays import active_threads, full_width
from ..errors import PtxError
from .forms import form

_CONVERSION = re.compile(r"%([-+ #0]*)(\d*|\*)(?:\.(\d+))?(hh|h|ll|l|z|j|t)?([a-zA-Z%])")
_LONG = ("l", "ll", "z", "j", "t")


def formatted(text: str, address: int) -> tuple[str, int]:
    """(the text with its conversions filled in from the arguments packed at an address, how many there were)."""
    offset = count = 0

    def take(code):
        nonlocal offset, count
        size = struct.calcsize(code)
        offset = -(-offset // size) * size + size
        count += 1
        return struct.unpack(code, ctypes.string_at(address + offset - size, size))[0]

    def convert(match):
        flags, width, precision, length, kind = match.groups()
        if kind == "%":
            return "%"
        if width == "*":
            raise PtxError(f"the conversion {match.group()} of printf is not simulated")
        spec = f"%{flags}{width}" + (f".{precision}" if precision is not None else "")
        if kind in "diouxXc":
            value = take(("<q" if kind in "di" else "<Q") if length in _LONG else "<i" if kind in "dic" else "<I")
            return (spec + kind.replace("u", "d")) % (value & 0xFF if kind == "c" else value)
        if kind in "eEfFgG":
            return (spec + kind) % take("<d")
        if kind == "p":
            return f"0x{take('<Q'):x}"
        if kind == "s":
            return (spec + "s") % ctypes.string_at(take("<Q")).decode(errors="replace")
        raise PtxError(f"the conversion {match.group()} of printf is not simulated")

    return _CONVERSION.sub(convert, text), count


def vprintf(w, text, arguments, M):
    """Print for the active lanes; gives the number of arguments."""
    text, arguments, count = full_width(text, len(w)), full_width(arguments, len(w)), 0
    for j, lane in active_threads(w, M):
        form_of = ctypes.string_at(int(text[j, lane])).decode(errors="replace")
        printed, count = formatted(form_of, int(arguments[j, lane]))
        print(printed, end="")
    return count


@form("call[.uni]", effect=True)
def call(gen, args, mods):
    """(result), vprintf, (format, arguments). The parser has made registers of the parameters of calls."""
    if len(args) != 3 or args[1] != "vprintf":
        raise PtxError("calls are not simulated, other than of vprintf")
    (result,), _, (text, arguments) = args
    call_of = f"{gen.fn(vprintf)}(w, {gen.read(text, 'u8')}, {gen.read(arguments, 'u8')}, {gen.mask()})"
    gen.write(result, f"np.full((len(w), 32), {call_of}, u4)", "u4")
