"""Matrix operands in shared memory: PTX ISA 9.7.15.5.1 and 9.7.16.10 (canonical layouts, swizzling, descriptors)."""

from __future__ import annotations

import functools

import numpy as np

from .errors import MemoryFault, PtxError
from .memory import SHARED_BASE, WRITTEN
from .numerics import DECODE, ELEMENT_BYTES

_WGMMA_SPAN = {0: 0, 1: 128, 2: 64, 3: 32}  # descriptor bits 62-63
_TCGEN05_SPAN = {0: 0, 2: 128, 4: 64, 6: 32}  # descriptor bits 61-63
_RAW = {1: np.uint8, 2: np.uint16, 4: np.uint32}


def swizzle(address, span):
    """The swizzle of TMA and descriptors on absolute byte addresses; span in 0, 32, 64, 128 bytes."""
    mask = {0: 0, 32: 0x10, 64: 0x30, 128: 0x70}[span]
    return address ^ ((address >> 3) & mask)


def _layout(d, span):
    """(start, leading offset, stride offset, span)."""
    return (d & 0x3FFF) << 4, (d >> 16 & 0x3FFF) << 4, (d >> 32 & 0x3FFF) << 4, span


def wgmma_descriptor(descriptor):
    """(start, leading offset, stride offset, swizzle span) in bytes of a wgmma matrix descriptor.

    PtxError unless the start lies in the first line of the swizzle's pattern, which repeats every 1024, 512 or 256
    bytes for spans of 128, 64 and 32: elsewhere the ISA asks for a base offset.
    """
    d = int(descriptor)
    if d >> 49 & 7:
        raise PtxError(f"wgmma descriptor 0x{d:x}: a base offset is not simulated")
    if d >> 14 & 3 or d >> 30 & 3 or d >> 46 & 7 or d >> 52 & 0x3FF:
        raise PtxError(f"wgmma descriptor 0x{d:x} has bits set that mean nothing")
    found = _layout(d, _WGMMA_SPAN[d >> 62 & 3])
    start, span = found[0], found[3]
    if span and start % (8 * span) >= 128:
        raise PtxError(
            f"wgmma descriptor 0x{d:x}: the start 0x{start:x} lies in line {start % (8 * span) // 128} of a "
            f"{span}-byte swizzle pattern, which repeats every {8 * span} bytes; that takes a base offset"
        )
    return found


def tcgen05_descriptor(descriptor):
    """The same for a tcgen05 shared-memory descriptor. The start may lie in any line of the swizzle's pattern, which
    begins at multiples of its length: tutorials of the DSL align operands to 128 bytes and give no base offset."""
    d = int(descriptor)
    if d >> 61 & 7 not in _TCGEN05_SPAN or d >> 49 & 7 or d >> 52 & 1:
        raise PtxError(f"tcgen05 descriptor 0x{d:x}: base offsets, absolute leading addresses and 128-byte swizzles "
                       "of 32-byte atoms are not simulated")  # fmt: skip
    return _layout(d, _TCGEN05_SPAN[d >> 61 & 7])


def operand_addresses(start, leading, stride, span, mn_major, row, k, element_bytes):
    """Byte addresses of elements (row, k) of an operand; all distances in bytes.

    K-major: groups of 8 rows ``stride`` apart; within a group rows are ``span`` bytes apart (16 without swizzle, where
    ``leading`` is the distance to the next 16-byte column of K).
    MN-major: runs of ``span`` bytes along M or N; 8 lines of K ``span`` bytes apart form a core; ``leading`` is the
    distance to the next run along M or N, ``stride`` to the next 8 lines of K; without swizzle these two change roles.
    """
    if not mn_major:
        b = k * element_bytes
        if span == 0:
            offset = (row % 8) * 16 + (row // 8) * stride + (b // 16) * leading + b % 16
        else:
            offset = (row % 8) * span + (row // 8) * stride + (b // span) * leading + b % span
    else:
        b = row * element_bytes
        if span == 0:
            offset = b % 16 + (b // 16) * stride + (k % 8) * 16 + (k // 8) * leading
        else:
            offset = b % span + (b // span) * leading + (k % 8) * span + (k // 8) * stride
    return swizzle(start + offset, span)


@functools.lru_cache(maxsize=8192)
def _chunk_numbers(layout, mn_major, rows, depth, element_bytes):
    """Numbers of the 16-byte chunks of an operand [lines, chunks of a line]: a line runs along K, or along M or N."""
    per_chunk = 16 // element_bytes
    along = np.arange(0, rows if mn_major else depth, per_chunk)[None, :]
    across = np.arange(depth if mn_major else rows)[:, None]
    row, k = (along, across) if mn_major else (across, along)
    return np.ascontiguousarray(operand_addresses(*layout, mn_major, row, k, element_bytes) >> 4)


class OperandMixin:
    """Matrix operands of ``Machine``. Needs ``MemoryMixin``; owns nothing."""

    def operand_chunks(self, layout, mn_major, rows, depth, element):
        """Numbers of the 16-byte chunks of an operand in its CTA's shared memory [lines, chunks of a line]."""
        return self._chunks_of(layout, mn_major, rows, depth, ELEMENT_BYTES[element])

    def _chunks_of(self, layout, mn_major, rows, depth, size):
        if mn_major and rows * size % 16:
            raise PtxError(f"an MN-major operand of {rows} elements of {size} bytes is not simulated")
        return _chunk_numbers(layout, bool(mn_major), rows, depth, size)

    def operand_tile(self, cta, layout, mn_major, rows, depth, element):
        """An operand [rows, depth] of a CTA's shared memory as float32; ``layout`` as the descriptors give it."""
        size = ELEMENT_BYTES[element]
        tile = DECODE[element](self.operand_bytes(cta, layout, mn_major, rows, depth, size).view(_RAW[size]))
        return tile.T if mn_major else tile

    def operand_bytes(self, cta, layout, mn_major, rows, depth, size):
        """The bytes of an operand with elements of ``size`` bytes [lines, bytes of a line]; a line runs along K, or
        along M or N."""
        chunks = self._chunks_of(layout, mn_major, rows, depth, size)
        if int(chunks.min()) * 16 < SHARED_BASE or int(chunks.max()) * 16 + 16 > self.smem_limit:
            raise MemoryFault(f"matrix operand outside shared memory: start 0x{layout[0]:x}, offsets "
                              f"0x{layout[1]:x} and "
                              f"0x{layout[2]:x}, legal 0x{SHARED_BASE:x} to 0x{self.smem_limit:x}")  # fmt: skip
        chunks = chunks + cta * (self.smem_stride >> 4)
        if not self.rows_are_written(chunks):
            found = (chunks[..., None] * 16 + np.arange(16)).ravel()
            self.unwritten_operand(found[self.shadow1[found] != WRITTEN])
        return self.shared_rows[chunks].reshape(len(chunks), -1).view(np.uint8)
