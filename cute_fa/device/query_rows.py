"""Rows of Q from global memory to registers, a row by a power of two of neighbouring lanes; and those of bf16, or of
fp8 codes, in fp16."""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Uint32, const_expr

from cute_fa.device.arguments import CommonArguments
from cute_fa.device.registers import narrow_pair, widen_codes
from cute_fa.device.split_parts import RowPlace
from cute_fa.device.split_walk import Piece

QUERY_CHUNK = 8  # elements that a lane has: 16 bytes, or 8 of codes
# A scaled row's largest element is between 2^14 and 2^15: fp16 ends at 2^16, and holds multiples of 2^-24.
_TOP = 14
_BIAS = 127  # of the exponent of fp32


def lanes_of_row(columns: int) -> int:
    """Lanes that bring a row of so many columns: a power of two."""
    return 1 << (columns // QUERY_CHUNK - 1).bit_length()


@cute.jit
def query_chunk(
    common: CommonArguments, piece: Piece, place: RowPlace, chunk: Int32, head_dim: cutlass.Constexpr[int]
) -> cute.Tensor:
    """QUERY_CHUNK elements of a row; zeros beyond head_dim, and of a row that does not count."""
    q, dtype = common.q, common.q.element_type
    copy = cute.make_copy_atom(cute.nvgpu.CopyUniversalOp(), dtype, num_bits_per_copy=QUERY_CHUNK * dtype.width)
    values = cute.make_rmem_tensor(QUERY_CHUNK, dtype)
    cute.recast_tensor(values, Uint32).fill(0)
    if place.counts & (chunk * QUERY_CHUNK < head_dim):
        if const_expr(common.lengths.cu_seqlens_q is not None):
            source = q[piece.info.offset_q + place.query, place.head, None]
        else:
            source = q[piece.batch, place.query, place.head, None]
        cute.copy(copy, cute.local_tile(source, (QUERY_CHUNK,), (chunk,)), values)
    return values


def widened_chunk(codes: cute.Tensor, dtype, shifted: bool = False) -> cute.Tensor:
    """QUERY_CHUNK fp8 codes in ``dtype``, fp16; ``shifted``: see :func:`cute_fa.device.registers.widen_codes`."""
    widened = cute.make_rmem_tensor(QUERY_CHUNK, dtype)
    words, pairs = cute.recast_tensor(codes, Uint32), cute.recast_tensor(widened, Uint32)
    for i in range(QUERY_CHUNK // 4):
        pairs[2 * i], pairs[2 * i + 1] = widen_codes(words[i], codes.element_type, shifted=shifted)
    return widened


@cute.jit
def scaled_row(
    values: cute.Tensor, lanes: cutlass.Constexpr[int], dtype: cutlass.Constexpr
) -> tuple[cute.Tensor, Float32]:
    """A row whose ``lanes`` have a chunk each, in fp16, and the power of two that it was divided by: elements down to
    2^-28 of its largest keep all digits of bf16, and all are exact to 2^-38 of it."""
    largest = Float32(0.0)
    for i in cutlass.range_constexpr(QUERY_CHUNK):
        largest = cute.arch.fmax(largest, cute.math.absf(Float32(values[i])))
    for step in cutlass.range_constexpr(lanes.bit_length() - 1):
        largest = cute.arch.fmax(largest, cute.arch.shuffle_sync_bfly(largest, offset=1 << step))
    # its exponent with the bias; at least what leaves room for the factor's own
    exponent = cutlass.max(_bits(largest) >> 23, _TOP + 1)
    scale = _float((2 * _BIAS + _TOP - exponent) << 23)
    narrowed = cute.make_rmem_tensor(QUERY_CHUNK, dtype)
    words = cute.recast_tensor(narrowed, Uint32)
    for i in cutlass.range_constexpr(QUERY_CHUNK // 2):
        pair = (Float32(values[2 * i + j]) * scale for j in range(2))
        words[i] = narrow_pair(*pair, dtype)
    return narrowed, _float((exponent - _TOP) << 23)


def _bits(value: Float32) -> Int32:
    return value.bitcast(Int32)


def _float(bits: Int32) -> Float32:
    return bits.bitcast(Float32)
