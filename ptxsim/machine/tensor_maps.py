"""Tensor maps: PTX ISA 5.5 (tensors), and the CUDA driver's cuTensorMapEncodeTiled, whose rules for addresses, strides,
extents and boxes hold here.

The DSL's host code writes the hardware's descriptor itself; 64 of its 128 bytes are used. Its layout, as probed, in
32-bit words:

  0-1    global address
  2      bits 4-6 rank - 1, 7-10 element type, 13-14 swizzle (0 none, 1 32B, 2 64B, 3 128B), 16 tf32, 18 always 1,
         19-20 atom of the 128B swizzle (0 16B, 1 32B, 2 32B with 8B flipped, 3 64B), 21 tensor of 128 KB or more
  3-6    byte strides of dimensions 1 to 4, shifted right by 4; 7: their bits 36-39, 4 bits each
  8-12   extents - 1
  13     bits 0-14 element strides - 1 (3 bits each), 24-31 box[0] - 1;  14: box[1..4] - 1, 8 bits each
"""

from __future__ import annotations

import functools
import struct
from dataclasses import dataclass

import numpy as np

from ..errors import PtxError

# element type code of the descriptor -> (bytes, NumPy type or "bf16")
ELEMENTS = {
    0: (1, np.uint8),
    1: (2, np.uint16),
    2: (4, np.uint32),
    3: (4, np.int32),
    4: (8, np.uint64),
    5: (8, np.int64),
    6: (2, np.float16),
    7: (4, np.float32),
    8: (4, np.float32),
    9: (8, np.float64),
    10: (2, "bf16"),
}
# elements of 4 or 6 bits: code -> (elements that belong together, their bytes in global memory, and in shared memory)
PACKED = {11: (2, 1, 1), 12: (16, 8, 16), 13: (16, 12, 16)}
# CUtensorMapDataType -> code of the descriptor
_DRIVER_ELEMENT = {0: 0, 1: 1, 2: 2, 3: 3, 4: 4, 5: 5, 6: 6, 7: 7, 8: 9, 9: 10, 10: 8, 11: 7, 12: 7, 13: 11, 14: 12,
                   15: 13}  # fmt: skip
_SPAN = {0: 0, 1: 32, 2: 64, 3: 128}
_ATOM = {0: 16, 1: 32, 3: 64}
# CUtensorMapSwizzle -> (swizzle, atom) of the descriptor
_DRIVER_SWIZZLE = {**{mode: (mode, 0) for mode in _SPAN}, 4: (3, 1), 6: (3, 3)}
_MAX_RANK, _MAX_BOX = 5, 256


@dataclass(frozen=True)
class TensorMap:
    """A tiled tensor in global memory; dimension 0 is the innermost; strides in bytes, of dimensions 1 and up.

    Elements of 4 or 6 bits are taken together, ``group`` of them, as one element, which has ``padding`` bytes more in
    shared memory than in global memory.
    """

    address: int
    extents: tuple
    strides: tuple
    box: tuple
    element_bytes: int
    element: object
    span: int  # of the swizzle in bytes, 0 for none
    atom: int = 16  # bytes that the swizzle keeps together
    group: int = 1
    padding: int = 0

    @property
    def rank(self):
        return len(self.extents)

    @property
    def box_shape(self):
        """Shape of a box as bytes of shared memory, outermost dimension first."""
        return tuple(reversed(self.box[1:])) + (self.box[0] * (self.element_bytes + self.padding),)

    def start(self, coordinates):
        """The first element of a box; PtxError for coordinates within a group."""
        if coordinates[0] % self.group:
            raise PtxError(
                f"coordinate {coordinates[0]} of a tensor map whose elements are taken {self.group} at a time"
            )
        return [coordinates[0] // self.group, *coordinates[1:]]


def encode(dtype, rank, address, extents, strides, box, element_strides, interleave, swizzle_mode, fill):
    """cuTensorMapEncodeTiled: 128 bytes. ``strides`` are byte strides of dimensions 1 and up."""
    if interleave or fill or any(e != 1 for e in element_strides):
        raise PtxError("tensor maps with interleave, NaN fill or element strides are not simulated")
    if dtype not in _DRIVER_ELEMENT or swizzle_mode not in _DRIVER_SWIZZLE:
        raise PtxError(f"tensor map of data type {dtype} and swizzle {swizzle_mode} is not simulated")
    if not 1 <= rank <= _MAX_RANK:
        raise PtxError(f"tensor map of rank {rank}, not in 1..{_MAX_RANK}")
    for i, stride in enumerate(strides):
        if stride % 16 or not 0 <= stride < 1 << 40:
            raise PtxError(
                f"tensor map: the stride of {stride} bytes of dimension {i + 1} is not a multiple of 16 below 2^40"
            )
    for i, (extent, size) in enumerate(zip(extents, box, strict=True)):
        if not 1 <= extent <= 1 << 32:
            raise PtxError(f"tensor map: {extent} elements in dimension {i}, not in 1..2^32")
        if not 1 <= size <= _MAX_BOX:
            raise PtxError(f"tensor map: a box of {size} elements in dimension {i}, not in 1..{_MAX_BOX}")
    words = [0] * 32
    words[0], words[1] = address & 0xFFFFFFFF, address >> 32
    swizzle_mode, atom = _DRIVER_SWIZZLE[swizzle_mode]
    words[2] = 2 | (rank - 1) << 4 | _DRIVER_ELEMENT[dtype] << 7 | swizzle_mode << 13 | 1 << 18 | atom << 19
    for i, stride in enumerate(strides):
        words[3 + i] = stride >> 4 & 0xFFFFFFFF
        words[7] |= (stride >> 36 & 15) << 4 * i
    for i, extent in enumerate(extents):
        words[8 + i] = extent - 1 & 0xFFFFFFFF
    words[13] = box[0] - 1 << 24
    for i, size in enumerate(box[1:]):
        words[14] |= size - 1 << 8 * i
    raw = struct.pack("<32I", *words)
    decode(raw)  # the rules that hold for descriptors made elsewhere, too
    return raw


@functools.lru_cache(maxsize=256)
def decode(raw: bytes) -> TensorMap:
    """A descriptor of 128 bytes; PtxError for modes that are not simulated."""
    words = struct.unpack("<16I", raw[:64])
    flags = words[2]
    code = flags >> 7 & 15
    if flags & 0xF != 2 or code not in (*ELEMENTS, *PACKED) or not flags >> 18 & 1:
        raise PtxError(f"not a tensor map: {raw[:64].hex(' ', 4)}")
    if flags >> 11 & 3 or flags >> 15 & 1 or words[13] & 0x7FFF:
        raise PtxError(f"tensor map with flags 0x{flags:x} and element strides 0x{words[13] & 0x7FFF:x}: "
                       "interleave, fill and element strides are not simulated")  # fmt: skip
    span, atom = _SPAN[flags >> 13 & 3], _ATOM.get(flags >> 19 & 3, 0)
    if atom != 16 and (not atom or span != 128):
        raise PtxError(f"tensor map with flags 0x{flags:x}: swizzle atoms of 32 bytes with 8 flipped are not "
                       "simulated; only a 128-byte swizzle has others than of 16")  # fmt: skip
    rank = (flags >> 4 & 7) + 1
    extents = [words[8 + i] + 1 for i in range(rank)]
    box = [(words[13] >> 24) + 1] + [(words[14] >> 8 * i & 255) + 1 for i in range(rank - 1)]
    group, padding = 1, 0
    if code in PACKED:
        group, element_bytes, in_shared = PACKED[code]
        element, padding = None, in_shared - element_bytes
        if extents[0] % group or box[0] % group:
            raise PtxError(f"tensor map: an extent of {extents[0]} and a box of {box[0]} elements, which are taken "
                           f"{group} at a time")  # fmt: skip
        extents[0], box[0] = extents[0] // group, box[0] // group
    else:
        element_bytes, element = ELEMENTS[code]
    found = TensorMap(
        address=words[0] | words[1] << 32,
        extents=tuple(extents),
        strides=tuple((words[3 + i] | (words[7] >> 4 * i & 15) << 32) << 4 for i in range(rank - 1)),
        box=tuple(box),
        element_bytes=element_bytes,
        element=element,
        span=span,
        atom=atom,
        group=group,
        padding=padding,
    )
    if found.rank > _MAX_RANK:
        raise PtxError(f"tensor map of rank {found.rank}, not in 1..{_MAX_RANK}")
    if found.address % 16:
        raise PtxError(f"tensor map: the address 0x{found.address:x} is not a multiple of 16")
    row = found.box_shape[-1]
    if row % 16:
        raise PtxError(f"tensor map: a box row of {row} bytes is not a multiple of 16")
    if found.span and row > found.span:
        raise PtxError(f"tensor map: a box row of {row} bytes exceeds the swizzle of {found.span}")
    return found
