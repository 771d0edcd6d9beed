"""What lies where in shared memory."""

from typing import NamedTuple, Optional

import cutlass.cute as cute
from cutlass import Float32, Int64
from cutlass.memory import SmemAllocator

from cute_fa.device.dtypes import CUTE_DTYPE
from cute_fa.device.ring import barrier_count
from cute_fa.device.tma_boxes import allocate_tiles
from fa3_sm90.common.wgmma import WGMMA_M
from fa3_sm90.decode.config import EXCHANGED_COLUMNS, Fa3DecodeConfig


class Storage(NamedTuple):
    """Shared memory of a CTA: pointers, swizzled like their tiles. ``q``: 64 rows for each row group; ``k`` and ``v``:
    the first stages; ``exchange``: fp32, as a warpgroup's threads hold their columns, or None."""

    barriers: cute.Pointer
    q: cute.Pointer
    k: cute.Pointer
    v: cute.Pointer
    exchange: Optional[cute.Pointer]

    @classmethod
    def allocate(cls, config: Fa3DecodeConfig) -> "Storage":
        """The CTA's shared memory."""
        c, dtype, allocator = config, CUTE_DTYPE[config.dtype], SmemAllocator()
        exchange = None
        q = allocate_tiles(allocator, dtype, WGMMA_M, c.head_dim_padded, c.row_groups)
        k = allocate_tiles(allocator, dtype, c.tile_n, c.head_dim_padded, c.stages)
        v = allocate_tiles(allocator, dtype, c.tile_n, c.value_columns, c.stages)
        if c.exchange_bytes:
            layout = cute.make_layout(WGMMA_M * EXCHANGED_COLUMNS)
            exchange = allocator.allocate_tensor(Float32, layout, 128).iterator
        return cls(allocator.allocate_array(Int64, barrier_count(c.pipelines)), q, k, v, exchange)
