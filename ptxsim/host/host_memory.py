"""Memory that the DSL's host code and the arguments of launches lie in, read and made by address."""

from __future__ import annotations

import ctypes
import struct

import numpy as np


def integers(address: int, code: str, count: int) -> tuple[int, ...]:
    """``count`` integers of a struct ``code`` at an address."""
    size = struct.calcsize("<" + code)
    return struct.unpack(f"<{count}{code}", ctypes.string_at(address, size * count)) if count > 0 else ()


def merged(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """(address, bytes) ranges with those that overlap made one; neighbours stay apart, an access must not cross."""
    merged: list[tuple[int, int]] = []
    for address, size in sorted(ranges):
        if merged and address < sum(merged[-1]):
            start = merged[-1][0]
            merged[-1] = start, max(sum(merged[-1]), address + size) - start
        elif size:
            merged.append((address, size))
    return merged


def aligned_bytes(size: int, alignment: int = 64) -> np.ndarray:
    """Zeros whose address is a multiple of ``alignment``."""
    array = np.zeros(size + alignment, np.uint8)
    start = -array.ctypes.data % alignment
    return array[start : start + size]


def extent(array: np.ndarray) -> tuple[int, int]:
    """(start, end) of an array."""
    return array.ctypes.data, array.ctypes.data + array.nbytes
