"""cp.async: copies of a few bytes from global to shared memory, issued by threads and waited for in groups."""

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, const_expr
from cutlass.cute.arch import inline_ptx

CHUNK_BYTES = 16


@cute.jit
def copy_async(
    target: Int32,
    target_offset: int,
    source: Int64,
    source_offset: int,
    inside,
    size: cutlass.Constexpr[int] = CHUNK_BYTES,
):
    """cp.async of ``size`` bytes, 4, 8 or 16: past L1 (.cg), since a CTA reads each tile once, which there is for 16
    alone. Not ``inside``: zeros, nothing is read."""
    path = "cg" if const_expr(size == CHUNK_BYTES) else "ca"
    places = f"cp.async.{path}.shared.global [{{$r0}}+{target_offset}], [{{$r1}}+{source_offset}], {size}"
    if const_expr(inside is None):
        inline_ptx(f"{places};", read_only_args=[target, source])
    else:
        copied = Int32(size) if inside else Int32(0)
        inline_ptx(f"{places}, {{$r2}};", read_only_args=[target, source, copied])
