"""Where one sequence of the batch lies and how much of it counts."""

from typing import NamedTuple, Optional

import cutlass.cute as cute
from cutlass import Int32, const_expr


class LengthTensors(NamedTuple):
    """Run-time lengths, all int32 on the device or absent: cu_seqlens (batch + 1), seqused (batch), leftpad (batch):
    rows of dense keys before a sequence's first one, which seqused counts."""

    cu_seqlens_q: Optional[cute.Tensor]
    cu_seqlens_k: Optional[cute.Tensor]
    seqused_q: Optional[cute.Tensor]
    seqused_k: Optional[cute.Tensor]
    cache_leftpad: Optional[cute.Tensor]


class SeqlenInfo(NamedTuple):
    """``offset_*``: first row in a packed tensor, or behind the left padding of a dense one. ``rows_q``: rows of q and
    out that belong to the sequence, of which the first ``seqlen_q`` count; ``seqlen_k``: keys that count."""

    offset_q: Int32
    offset_k: Int32
    rows_q: Int32
    seqlen_q: Int32
    seqlen_k: Int32


def seqlen_info(lengths: LengthTensors, batch: Int32, dense_q: Int32, dense_k: Int32) -> SeqlenInfo:
    """Lengths of sequence ``batch``; ``dense_*`` are the tensors' own lengths, used without cu_seqlens."""
    offset_q, rows_q = _extent(lengths.cu_seqlens_q, batch, dense_q)
    offset_k, seqlen_k = _extent(lengths.cu_seqlens_k, batch, dense_k)
    seqlen_q = rows_q
    if const_expr(lengths.seqused_q is not None):
        seqlen_q = lengths.seqused_q[batch]
    if const_expr(lengths.seqused_k is not None):
        seqlen_k = lengths.seqused_k[batch]
    if const_expr(lengths.cache_leftpad is not None):
        offset_k = lengths.cache_leftpad[batch]
        seqlen_k = seqlen_k - offset_k
    return SeqlenInfo(offset_q, offset_k, rows_q, seqlen_q, seqlen_k)


def key_rows(lengths: LengthTensors, batch: Int32, dense_k: Int32) -> Int32:
    """Rows of k and v that belong to sequence ``batch``, whether or not they count."""
    return _extent(lengths.cu_seqlens_k, batch, dense_k)[1]


def _extent(cu_seqlens: Optional[cute.Tensor], batch: Int32, dense: Int32):
    if const_expr(cu_seqlens is None):
        return Int32(0), Int32(dense)
    start = cu_seqlens[batch]
    return start, cu_seqlens[batch + 1] - start
