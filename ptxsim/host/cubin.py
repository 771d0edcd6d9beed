"""What the simulator reads from machine code: the registers of each kernel, and whether setmaxnreg is left in it.

A cubin is an ELF file. Its section ``.nv.info`` is a list of attributes: uint8 format, uint8 attribute, uint16 value,
or for format 4 a uint16 size and as many bytes. Attribute 0x2f (EIATTR_REGCOUNT) holds the number of a kernel's symbol
and its registers a thread, both uint32. The code of a kernel is the section ``.text.<name>``, 16 bytes an instruction;
the low 12 bits are the opcode, 0x9c8 for USETMAXREG (sm_90a to sm_120a, as nvdisasm says).
"""

from __future__ import annotations

import struct

import numpy as np

from ..errors import SimError

_SIZED, _REGISTER_COUNT = 4, 0x2F
_USETMAXREG = 0x9C8


def register_counts(cubin: bytes) -> dict[str, int]:
    """Registers a thread of each kernel in a cubin, by the kernel's name; SimError if it is not a 64-bit ELF file."""
    headers, sections = _sections(cubin)
    if ".nv.info" not in sections:
        return {}
    symbols = sections[".symtab"]
    strings = headers[symbols[6]][4]
    found, at = {}, sections[".nv.info"][4]
    end = at + sections[".nv.info"][5]
    while at < end:
        form, attribute, value = struct.unpack_from("<BBH", cubin, at)
        if (form, attribute) == (_SIZED, _REGISTER_COUNT):
            symbol, registers = struct.unpack_from("<II", cubin, at + 4)
            (name,) = struct.unpack_from("<I", cubin, symbols[4] + symbols[9] * symbol)
            found[_string(cubin, strings + name)] = registers
        at += 4 + (value if form == _SIZED else 0)
    return found


def resizing_kernels(cubin: bytes) -> frozenset[str]:
    """The kernels whose code has a setmaxnreg. ptxas drops it where it cannot tell the registers at entry (C7508: PTX
    without .minnctapersm and .maxnreg), among other reasons; then it does nothing. SimError as ``register_counts``."""
    _, sections = _sections(cubin)
    found = set()
    for name, header in sections.items():
        if name.startswith(".text."):
            words = np.frombuffer(cubin, np.uint32, header[5] // 4, header[4])[::4]
            if (words & 0xFFF == _USETMAXREG).any():
                found.add(name.removeprefix(".text."))
    return frozenset(found)


def code_sections(cubin: bytes) -> dict[str, bytes]:
    """The machine code of each kernel and function, by its name. SimError as ``register_counts``."""
    _, sections = _sections(cubin)
    text = {name: header for name, header in sections.items() if name.startswith(".text.")}
    return {name.removeprefix(".text."): bytes(cubin[h[4] : h[4] + h[5]]) for name, h in text.items()}


def _sections(cubin):
    """All section headers, and by name: name, type, flags, address, offset, size, link, info, alignment, entry size."""
    if cubin[:5] != b"\x7fELF\x02":
        raise SimError("not a cubin (a 64-bit ELF file)")
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<HHH", cubin, 0x3A)
    headers = [struct.unpack_from("<IIQQQQIIQQ", cubin, table + size * i) for i in range(count)]
    return headers, {_string(cubin, headers[names][4] + h[0]): h for h in headers}


def _string(data: bytes, start: int) -> str:
    return data[start : data.index(b"\0", start)].decode()
