"""Images of machine code: which PTX belongs to a cubin, found by its bytes; what else is known of its kernels.

Kernel names are of no use for that: they are built from argument types and cut off, so that different kernels share
them.
"""

from __future__ import annotations

import ctypes
import hashlib
import struct
from dataclasses import dataclass

from ..errors import SimError
from .cubin import register_counts, resizing_kernels
from .host_memory import integers


@dataclass(frozen=True)
class Image:
    """A cubin with its PTX: the registers a thread of each kernel, and the kernels that keep setmaxnreg."""

    ptx: str
    cubin: bytes
    registers: dict[str, int]
    resizing: frozenset[str]


_images: dict[bytes, Image] = {}  # by the hash of the cubin


def register_ptx(cubin: bytes, ptx: str) -> None:
    """Make the PTX known of a cubin that an exported object contains.

    Functions compiled inside a simulation register themselves. Loaded objects hold only the machine code, so the PTX
    must come from where it was kept when the object was made; it is found by the cubin's bytes.
    """
    cubin = bytes(cubin)
    _images[_hash(cubin)] = Image(ptx, cubin, register_counts(cubin), resizing_kernels(cubin))


def image_at(address: int) -> Image:
    """The image at an address: a bare cubin, or a fat binary with one entry. SimError if its PTX is not known."""
    image = _images.get(_hash_at(address))
    if image is None:
        raise SimError(
            "no PTX is known for the machine code that is being loaded: it was compiled outside a simulation or "
            "comes from an exported object; compile it inside, or call ptxsim.register_ptx(cubin, ptx) first"
        )
    return image


def cubin_of(ptx: str) -> bytes | None:
    """The machine code of a PTX module whose image is known; None if there is none."""
    return next((image.cubin for image in _images.values() if image.ptx == ptx), None)


def _hash(cubin: bytes) -> bytes:
    """Hash of a cubin, up to the end of the ELF file (what embeds it may pad it)."""
    return hashlib.sha256(cubin[: _elf_size(cubin)]).digest()


def _hash_at(address: int) -> bytes:
    """Hash of the cubin of the image at an address: the bare ELF file, or a fat binary with one entry.

    A fat binary is uint32 magic, uint16 version, uint16 header size, uint64 size, then entries of uint16 kind (2 is
    machine code), uint16 version, uint32 header size, uint64 payload size …
    """
    if ctypes.string_at(address, 4) == b"\x50\xed\x55\xba":
        (header,) = integers(address + 6, "H", 1)
        kind, _ = integers(address + header, "H", 2)
        (entry_header,) = integers(address + header + 4, "I", 1)
        (size,) = integers(address + header + 8, "Q", 1)
        if kind != 2:
            raise SimError(f"the fat binary that is being loaded begins with an entry of kind {kind}, not machine code")
        return _hash(ctypes.string_at(address + header + entry_header, size))
    headers = ctypes.string_at(address, 64)
    if headers[:4] == b"\x7fELF":
        (table,) = struct.unpack_from("<Q", headers, 0x28)
        entry_size, entries = struct.unpack_from("<HH", headers, 0x3A)
        headers = ctypes.string_at(address, table + entry_size * entries)
    return _hash(ctypes.string_at(address, _elf_size(headers)))


def _elf_size(elf: bytes) -> int:
    """Bytes from the start of a 64-bit ELF file to the end of its last section, segment or table."""
    if elf[:5] != b"\x7fELF\x02":
        raise SimError("the machine code that is being loaded is not a cubin (a 64-bit ELF file)")
    segments, sections = struct.unpack_from("<QQ", elf, 0x20)
    segment_size, n_segments, section_size, n_sections = struct.unpack_from("<HHHH", elf, 0x36)
    ends = [sections + section_size * n_sections, segments + segment_size * n_segments]
    for i in range(n_sections):
        kind, _, _, offset, size = struct.unpack_from("<IQQQQ", elf, sections + section_size * i + 4)
        ends.append(offset + (0 if kind == 8 else size))  # SHT_NOBITS takes no room in the file
    return max(ends)
