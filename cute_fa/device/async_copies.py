"""cp.async: copies of 16 bytes from global to shared memory, issued by threads and waited for in groups."""

import cutlass.cute as cute
from cutlass import Int32, Int64, const_expr
from cutlass.cute.arch import inline_ptx

CHUNK_BYTES = 16


@cute.jit
def copy_async(target: Int32, target_offset: int, source: Int64, source_offset: int, inside):
    """cp.async.cg of 16 bytes: past L1, since a CTA reads each tile once. Not ``inside``: zeros, nothing is read."""
    if const_expr(inside is None):
        inline_ptx(
            f"cp.async.cg.shared.global [{{$r0}}+{target_offset}], [{{$r1}}+{source_offset}], 16;",
            read_only_args=[target, source],
        )
    else:
        size = Int32(CHUNK_BYTES) if inside else Int32(0)
        inline_ptx(
            f"cp.async.cg.shared.global [{{$r0}}+{target_offset}], [{{$r1}}+{source_offset}], 16, {{$r2}};",
            read_only_args=[target, source, size],
        )
