"""What lies where in shared memory, and which boxes TMA moves there."""

from typing import NamedTuple, Optional

import cutlass.cute as cute
from cutlass import Float32, Int64
from cutlass.memory import SmemAllocator

from cute_fa.device.dtypes import CUTE_DTYPE
from cute_fa.device.ring import barrier_count
from cute_fa.device.tma_boxes import TILE_ALIGNMENT, tile_layout
from fa3_sm90.common.wgmma import WGMMA_M
from fa3_sm90.forward.config import Fa3ForwardConfig


class Storage(NamedTuple):
    """Shared memory of a CTA: pointers, swizzled like their tiles. ``q`` and ``out`` have one for each warpgroup (the
    same ones if O has no memory of its own), ``k`` and ``v`` are the first stages, ``vt`` of V transposed, or None;
    ``factors``: two numbers for each stage of K (:class:`fa3_sm90.forward.descales.BlockFactors`), or None."""

    barriers: cute.Pointer
    q: tuple[cute.Pointer, ...]
    out: tuple[cute.Pointer, ...]
    k: cute.Pointer
    v: cute.Pointer
    vt: Optional[cute.Pointer]
    factors: Optional[cute.Pointer]


def allocate(config: Fa3ForwardConfig) -> Storage:
    """The CTA's shared memory; the same pointers wherever it is called once."""
    c = config
    allocator = SmemAllocator()
    dtypes = (c.dtype, c.dtype_k, c.dtype_v, c.out_dtype)
    dtype_q, dtype_k, dtype_v, out_dtype = (CUTE_DTYPE[dtype] for dtype in dtypes)

    def tiles(dtype, rows: int, columns: int, count: int, elements: int = 0) -> cute.Pointer:
        layout = tile_layout(dtype, rows, columns, count)
        elements = max(elements, cute.cosize(layout.outer))
        raw = allocator.allocate_tensor(dtype, cute.make_layout(elements), TILE_ALIGNMENT).iterator
        return cute.recast_ptr(raw, layout.inner, dtype=dtype)

    def per_warpgroup(dtype, columns: int, elements: int = 0) -> tuple[cute.Pointer, ...]:
        return tuple(tiles(dtype, WGMMA_M, columns, 1, elements) for _ in range(c.warpgroups))

    q = per_warpgroup(dtype_q, c.head_dim_padded, c.q_bytes // c.dtype.bytes)
    k = tiles(dtype_k, c.tile_n, c.head_dim_padded, c.stages)
    v_shape = (c.head_dim_v_padded, c.tile_n) if c.key_major_v else (c.tile_n, c.value_columns)
    v = tiles(dtype_v, *v_shape, c.stages)
    vt = tiles(dtype_v, c.head_dim_v_padded, c.tile_n, c.stages) if c.transposers else None
    if c.own_output:
        out = per_warpgroup(out_dtype, c.head_dim_v_padded)
    else:
        swizzle = tile_layout(out_dtype, WGMMA_M, c.head_dim_v_padded, 1).inner
        out = tuple(cute.recast_ptr(pointer, swizzle, dtype=out_dtype) for pointer in q)
    barriers = allocator.allocate_array(Int64, barrier_count(c.pipelines))
    factors = allocator.allocate_array(Float32, 2 * c.stages, byte_alignment=8) if c.block_descales else None
    return Storage(barriers, q, out, k, v, vt, factors)
