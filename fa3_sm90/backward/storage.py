"""What lies where in shared memory."""

from typing import NamedTuple, Optional

import cutlass.cute as cute
from cutlass import Float32, Int32, Int64
from cutlass.memory import SmemAllocator

from cute_fa.device.dtypes import CUTE_DTYPE
from cute_fa.device.ring import barrier_count
from cute_fa.device.tma_boxes import allocate_tiles
from fa3_sm90.backward.config import SCORE_STAGES, Fa3BackwardConfig


class Storage(NamedTuple):
    """Shared memory of a CTA: pointers, swizzled like their tiles. ``k`` and ``v`` become dK and dV; ``ds``: dSᵀ, rows
    are keys; ``dq``: fp32, quads of a thread's registers; ``lse`` and ``delta``: LSE and D of every stage;
    ``ticket``: which tile of keys is the CTA's, or None."""

    barriers: cute.Pointer
    k: cute.Pointer
    v: cute.Pointer
    q: cute.Pointer
    dout: cute.Pointer
    ds: cute.Pointer
    dq: cute.Pointer
    lse: cute.Pointer
    delta: cute.Pointer
    ticket: Optional[cute.Pointer]


def allocate(config: Fa3BackwardConfig) -> Storage:
    """The CTA's shared memory."""
    c, dtype, allocator = config, CUTE_DTYPE[config.dtype], SmemAllocator()

    def tiles(rows: int, columns: int, count: int) -> cute.Pointer:
        return allocate_tiles(allocator, dtype, rows, columns, count)

    def numbers(count: int) -> cute.Pointer:
        return allocator.allocate_tensor(Float32, cute.make_layout(count), 128).iterator

    return Storage(
        k=tiles(c.tile_n, c.head_dim_padded, 1),
        v=tiles(c.tile_n, c.head_dim_v_padded, 1),
        q=tiles(c.tile_m, c.head_dim_padded, c.stages),
        dout=tiles(c.tile_m, c.head_dim_v_padded, c.stages),
        ds=tiles(c.tile_n, c.tile_m, SCORE_STAGES),
        dq=numbers(c.tile_m * c.head_dim_padded),
        lse=numbers(c.tile_m * c.stages),
        delta=numbers(c.tile_m * c.stages),
        barriers=allocator.allocate_array(Int64, barrier_count(c.pipelines)),
        ticket=allocator.allocate_array(Int32, 1) if c.turns else None,
    )
