"""What lies where in shared memory, and which boxes TMA moves there."""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64
from cutlass.memory import SmemAllocator

from cute_fa.device.dtypes import CUTE_DTYPE
from cute_fa.device.pipeline_spec import HANDOUT_STAGES
from cute_fa.device.ring import barrier_count
from cute_fa.device.tma_boxes import tile_layout
from fa4_sm100.forward.config import TILE_ALIGNMENT, TILE_M, Fa4ForwardConfig


class Storage(NamedTuple):
    """Shared memory of a CTA: pointers, swizzled like their tiles. ``q`` and ``out`` have one for each tile (where O
    has memory of its own, both tiles use the same), ``k`` and ``v`` are the ring's memory as tiles of either. ``stats``
    fp32 (tiles, 2, 128): each row's sum of exponentials and reference; ``tensor``: where the address of tensor memory
    is; ``responses``: what the hardware says of the next tiles."""

    barriers: cute.Pointer
    q: tuple[cute.Pointer, ...]
    out: tuple[cute.Pointer, ...]
    k: cute.Pointer
    v: cute.Pointer
    stats: cute.Pointer
    tensor: cute.Pointer
    responses: cute.Pointer


def allocate(config: Fa4ForwardConfig) -> Storage:
    """The CTA's shared memory; the same pointers wherever it is called once."""
    c = config
    allocator = SmemAllocator()
    dtype_q, dtype_k, dtype_v, out_dtype = (CUTE_DTYPE[d] for d in (c.dtype, c.dtype_k, c.dtype_v, c.out_dtype))

    def memory(size: int) -> cute.Pointer:
        return allocator.allocate_tensor(cutlass.Uint8, cute.make_layout(size), TILE_ALIGNMENT).iterator

    def tile(raw: cute.Pointer, dtype, rows: int, columns: int) -> cute.Pointer:
        return cute.recast_ptr(raw, tile_layout(dtype, rows, columns, 1).inner, dtype=dtype)

    q_raw = tuple(memory(c.q_bytes) for _ in range(c.q_tiles))
    kv_raw = memory(c.stages * c.stage_bytes)
    out_raw = (memory(c.o_bytes),) * c.q_tiles if c.own_output else q_raw
    v_shape = (c.head_dim_v_padded, c.tile_n) if c.key_major_v else (c.tile_n, c.value_columns)
    return Storage(
        barriers=allocator.allocate_array(Int64, barrier_count(c.pipelines)),
        q=tuple(tile(raw, dtype_q, TILE_M, c.head_dim_padded) for raw in q_raw),
        out=tuple(tile(raw, out_dtype, TILE_M, c.head_dim_v_padded) for raw in out_raw),
        k=tile(kv_raw, dtype_k, c.tile_keys, c.head_dim_padded),
        v=tile(kv_raw, dtype_v, *v_shape),
        stats=allocator.allocate_array(Float32, c.stats_bytes // 4),
        tensor=allocator.allocate_array(Int32, 1),
        responses=allocator.allocate_array(cutlass.Int128, HANDOUT_STAGES),
    )
