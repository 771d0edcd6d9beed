"""Structured sparse matrices: PTX ISA 9.7.14.6.1 (mma.sp), 9.7.15.6.1 (wgmma.sp) and 9.7.16.10.8 (tcgen05.mma.sp).

A row of A is cut into chunks, of which half is stored. Four bits of metadata for each chunk are two indices, the first
in the lower bits: where in the chunk the stored parts lie, in quarters of the chunk. A quarter is an element of 16 or
8 bits, a pair of elements of 4 bits, and half of an element of 32 bits.
"""

from __future__ import annotations

import numpy as np

from ..errors import PtxError


def chunk_width(element):
    """Elements in a chunk: 2 of tf32, 8 of 4-bit types that are stored in pairs, otherwise 4."""
    return {"tf32": 2, "s4": 8, "u4": 8, "e2m1x2": 8}.get(element, 4)


def metadata_threads(element, k):
    """How many of four threads hold the metadata of their two rows: one for every 4 chunks of K."""
    return k // chunk_width(element) // 4


def metadata_codes(words):
    """Words (unsigned) [..., n] as their 4-bit codes, lowest first [..., n * codes of a word]."""
    size = words.dtype.itemsize
    shifts = words.dtype.type(4) * np.arange(2 * size, dtype=words.dtype)
    return (words[..., None] >> shifts & words.dtype.type(15)).reshape(*words.shape[:-1], -1)


def expand(stored, codes, element, ordered=False):
    """The whole matrix from what is stored of it.

    ``stored`` [..., rows, K / 2] are elements; ``codes`` [..., rows, chunks] the 4 bits of each chunk; ``ordered``: the
    first index must be the smaller one. Returns [..., rows, K], zero where nothing is stored. PtxError for codes that
    mean nothing.
    """
    width = chunk_width(element)
    first, second = codes & 3, codes >> 2
    wrong = (first >= second) if ordered else (first == second)
    if width == 2:
        wrong = (codes != 0b0100) & (codes != 0b1110)
    if wrong.any():
        rule = "halves of one element" if width == 2 else "ascending indices" if ordered else "indices"
        raise PtxError(f"sparsity metadata 0b{int(codes[wrong].ravel()[0]):04b} for {element}: not two {rule}")
    whole = np.zeros((*codes.shape, width), stored.dtype)
    if width == 2:
        np.put_along_axis(whole, (first >> 1)[..., None].astype(np.intp), stored[..., None], -1)
    else:
        part = width // 4  # elements of a quarter
        at = np.stack([first, second], -1)[..., None] * part + np.arange(part)
        np.put_along_axis(whole, at.reshape(*codes.shape, -1).astype(np.intp), stored.reshape(*codes.shape, -1), -1)
    return whole.reshape(*codes.shape[:-1], -1)
