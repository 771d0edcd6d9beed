"""What lies where in the shared memory of both kernels."""

from typing import NamedTuple

import cutlass.cute as cute
from cutlass import Float32, Int64, Uint32
from cutlass.memory import SmemAllocator

from cute_fa.device.dtypes import CUTE_DTYPE
from cute_fa.device.ring import barrier_count
from cute_fa.device.tma_boxes import allocate_tiles
from fa3_sm90.backward.config import CONSUMERS
from fa3_sm90.backward_split.config import TILE, Fa3SplitBackwardConfig


class KeyStorage(NamedTuple):
    """Of the kernel for dK and dV: pointers, swizzled like their tiles. ``k`` and ``v`` become dK and dV; ``p``: Pᵀ of
    every stage, words of 16-bit pairs as threads hold them; ``lse`` and ``delta``: LSE and D of every stage."""

    barriers: cute.Pointer
    k: cute.Pointer
    v: cute.Pointer
    q: cute.Pointer
    dout: cute.Pointer
    p: cute.Pointer
    lse: cute.Pointer
    delta: cute.Pointer

    @classmethod
    def allocate(cls, config: Fa3SplitBackwardConfig) -> "KeyStorage":
        """The CTA's shared memory."""
        c, dtype, allocator = config, CUTE_DTYPE[config.dtype], SmemAllocator()

        def tiles(columns: int, count: int) -> cute.Pointer:
            return allocate_tiles(allocator, dtype, TILE, columns, count)

        def numbers(element, count: int) -> cute.Pointer:
            return allocator.allocate_tensor(element, cute.make_layout(count), 128).iterator

        return cls(
            k=tiles(c.head_dim_padded, 1),
            v=tiles(c.head_dim_v_padded, 1),
            q=tiles(c.head_dim_padded, c.stages),
            dout=tiles(c.head_dim_v_padded, c.stages),
            p=numbers(Uint32, TILE * TILE // 2 * c.stages),
            lse=numbers(Float32, TILE * c.stages),
            delta=numbers(Float32, TILE * c.stages),
            barriers=allocator.allocate_array(Int64, barrier_count(c.key_pipelines)),
        )


class QueryStorage(NamedTuple):
    """Of the kernel for dQ: pointers, swizzled like their tiles. ``q`` and ``dout``: a tile for each warpgroup; ``q``
    becomes dQ."""

    barriers: cute.Pointer
    q: cute.Pointer
    dout: cute.Pointer
    k: cute.Pointer
    v: cute.Pointer

    @classmethod
    def allocate(cls, config: Fa3SplitBackwardConfig) -> "QueryStorage":
        """The CTA's shared memory."""
        c, dtype, allocator = config, CUTE_DTYPE[config.dtype], SmemAllocator()

        def tiles(columns: int, count: int) -> cute.Pointer:
            return allocate_tiles(allocator, dtype, TILE, columns, count)

        return cls(
            q=tiles(c.head_dim_padded, CONSUMERS),
            dout=tiles(c.head_dim_v_padded, CONSUMERS),
            k=tiles(c.head_dim_padded, c.k_stages),
            v=tiles(c.head_dim_v_padded, c.v_stages),
            barriers=allocator.allocate_array(Int64, barrier_count(c.query_pipelines)),
        )
