"""Matrix operands in shared memory: PTX ISA 9.7.15.5.1 and 9.7.16.10 (canonical layouts, swizzling, descriptors)."""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np

from ..errors import MemoryFault, PtxError
from ..ops.numerics import DECODE, ELEMENT_BYTES
from .shared_memory import SHARED_BASE, WRITTEN

_WGMMA_SPAN = {0: 0, 1: 128, 2: 64, 3: 32}  # descriptor bits 62-63
_TCGEN05_SWIZZLE = {0: (0, 16), 1: (128, 32), 2: (128, 16), 4: (64, 16), 6: (32, 16)}  # descriptor bits 61-63
_RAW = {1: np.uint8, 2: np.uint16, 4: np.uint32}
_SHIFT = {16: 3, 32: 2, 64: 1}


class OperandLayout(NamedTuple):
    """Where an operand lies in shared memory, as its descriptor says; all in bytes."""

    start: int
    leading: int  # with ``absolute`` the address of the line where K goes on after 128 bytes
    stride: int
    span: int  # of the swizzle, 0 for none
    atom: int = 16  # what the swizzle keeps together
    absolute: bool = False


def swizzle(address, span, atom=16):
    """The swizzle of TMA and descriptors on absolute byte addresses (PTX ISA 5.5.7): span in 0, 32, 64, 128 bytes, of
    which atoms of 16, for a span of 128 also of 32 and 64 bytes, stay together."""
    mask = span - atom if span else 0
    return address ^ ((address >> _SHIFT[atom]) & mask)


def _layout(d, span, atom=16, absolute=False):
    return OperandLayout((d & 0x3FFF) << 4, (d >> 16 & 0x3FFF) << 4, (d >> 32 & 0x3FFF) << 4, span, atom, absolute)


def wgmma_descriptor(descriptor):
    """``OperandLayout`` of a wgmma matrix descriptor.

    PtxError unless the start lies in the first line of the swizzle's pattern, which repeats every 1024, 512 or 256
    bytes for spans of 128, 64 and 32: elsewhere the ISA asks for a base offset.
    """
    d = int(descriptor)
    if d >> 49 & 7:
        raise PtxError(f"wgmma descriptor 0x{d:x}: a base offset is not simulated")
    if d >> 14 & 3 or d >> 30 & 3 or d >> 46 & 7 or d >> 52 & 0x3FF:
        raise PtxError(f"wgmma descriptor 0x{d:x} has bits set that mean nothing")
    found = _layout(d, _WGMMA_SPAN[d >> 62 & 3])
    start, span = found.start, found.span
    if span and start % (8 * span) >= 128:
        raise PtxError(
            f"wgmma descriptor 0x{d:x}: the start 0x{start:x} lies in line {start % (8 * span) // 128} of a "
            f"{span}-byte swizzle pattern, which repeats every {8 * span} bytes; that takes a base offset"
        )
    return found


def tcgen05_descriptor(descriptor):
    """The same for a tcgen05 shared-memory descriptor (PTX ISA 9.7.16.4.1). The start may lie in any line of the
    swizzle's pattern, which begins at multiples of its length: tutorials of the DSL align operands to 128 bytes and
    give no base offset."""
    d = int(descriptor)
    if d >> 61 & 7 not in _TCGEN05_SWIZZLE or d >> 49 & 7:
        raise PtxError(f"tcgen05 descriptor 0x{d:x}: base offsets are not simulated, nor do other swizzles exist")
    found = _layout(d, *_TCGEN05_SWIZZLE[d >> 61 & 7], bool(d >> 52 & 1))
    if found.absolute and ((found.span, found.atom) != (128, 16) or found.leading % 128):
        raise PtxError(f"tcgen05 descriptor 0x{d:x}: an absolute leading address (0x{found.leading:x}) exists for "
                       "128-byte swizzles of 16-byte atoms, and is simulated for multiples of 128")  # fmt: skip
    return found


def operand_addresses(layout, mn_major, row, k, element_bytes):
    """Byte addresses of elements (row, k) of an operand; all distances in bytes.

    K-major: groups of 8 rows ``stride`` apart; within a group rows are ``span`` bytes apart (16 without swizzle, where
    ``leading`` is the distance to the next 16-byte column of K). With an absolute leading address what goes beyond the
    line of 128 bytes in which the operand starts lies in such lines from there on (PTX ISA 9.7.16.3.1.2; CUTLASS's
    SM103 mma_unpack gives the next buffer's).
    MN-major: runs of ``span`` bytes along M or N; 8 lines of K ``span`` bytes apart form a core, or 4 where atoms are
    of 32 bytes; ``leading`` is the distance to the next run along M or N, ``stride`` to the next core along K; without
    swizzle these two change roles.
    """
    start, leading, stride, span, atom, absolute = layout
    if absolute:
        b = start % 128 + k * element_bytes
        line = np.where(b < 128, start - start % 128, leading)
        return swizzle(line + (row % 8) * 128 + (row // 8) * stride + b % 128, span)
    if not mn_major:
        b = k * element_bytes
        if span == 0:
            offset = (row % 8) * 16 + (row // 8) * stride + (b // 16) * leading + b % 16
        else:
            offset = (row % 8) * span + (row // 8) * stride + (b // span) * leading + b % span
    else:
        b = row * element_bytes
        lines = 128 // atom
        if span == 0:
            offset = b % 16 + (b // 16) * stride + (k % 8) * 16 + (k // 8) * leading
        else:
            offset = b % span + (b // span) * leading + (k % lines) * span + (k // lines) * stride
    return swizzle(start + offset, span, atom)


@functools.lru_cache(maxsize=8192)
def _chunk_numbers(layout, mn_major, rows, depth, element_bytes):
    """Numbers of the 16-byte chunks of an operand [lines, chunks of a line]: a line runs along K, or along M or N."""
    per_chunk = 16 // element_bytes
    along = np.arange(0, rows if mn_major else depth, per_chunk)[None, :]
    across = np.arange(depth if mn_major else rows)[:, None]
    row, k = (along, across) if mn_major else (across, along)
    return np.ascontiguousarray(operand_addresses(layout, mn_major, row, k, element_bytes) >> 4)


class Operands:
    """Matrix operands in shared memory."""

    def __init__(self, shared):
        self.shared = shared

    def chunks(self, layout, mn_major, rows, depth, element):
        """Numbers of the 16-byte chunks of an operand in its CTA's shared memory [lines, chunks of a line]."""
        return self._chunks_of(layout, mn_major, rows, depth, ELEMENT_BYTES[element])

    def _chunks_of(self, layout, mn_major, rows, depth, size):
        if mn_major and rows * size % 16:
            raise PtxError(f"an MN-major operand of {rows} elements of {size} bytes is not simulated")
        return _chunk_numbers(layout, bool(mn_major), rows, depth, size)

    def tile(self, cta, layout, mn_major, rows, depth, element):
        """An operand [rows, depth] of a CTA's shared memory as float32; ``layout`` as the descriptors give it."""
        return self.tiles([cta], layout, mn_major, rows, depth, element)[0]

    def tiles(self, ctas, layout, mn_major, rows, depth, element):
        """The operands [CTAs, rows, depth] at the same place of several CTAs: at once, which takes a third of the time
        of 32 CTAs one by one."""
        size = ELEMENT_BYTES[element]
        tiles = DECODE[element](self._bytes(ctas, layout, mn_major, rows, depth, size).view(_RAW[size]))
        return tiles.swapaxes(1, 2) if mn_major else tiles

    def bytes(self, cta, layout, mn_major, rows, depth, size):
        """The bytes of an operand with elements of ``size`` bytes [lines, bytes of a line]; a line runs along K, or
        along M or N."""
        return self._bytes([cta], layout, mn_major, rows, depth, size)[0]

    def _bytes(self, ctas, layout, mn_major, rows, depth, size):
        numbers = self._chunks_of(layout, mn_major, rows, depth, size)
        if int(numbers.min()) * 16 < SHARED_BASE or int(numbers.max()) * 16 + 16 > self.shared.limit:
            raise MemoryFault(
                f"matrix operand outside shared memory: start 0x{layout.start:x}, offsets 0x{layout.leading:x} and "
                f"0x{layout.stride:x}, legal 0x{SHARED_BASE:x} to 0x{self.shared.limit:x}"
            )
        chunks = numbers + (np.asarray(ctas) * (self.shared.stride >> 4))[:, None, None]
        if not self.shared.rows_are_written(chunks):
            for found in (chunks[..., None] * 16 + np.arange(16)).reshape(len(chunks), -1):
                unwritten = found[self.shared.states[found] != WRITTEN]
                if unwritten.size:
                    self.shared.unwritten_operand(unwritten)
        return self.shared.rows[chunks].reshape(*chunks.shape[:2], -1).view(np.uint8)
