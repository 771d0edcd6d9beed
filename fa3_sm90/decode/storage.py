"""What lies where in shared memory."""

from typing import NamedTuple, Optional

import cutlass.cute as cute
from cutlass import Float32, Int64
from cutlass.memory import SmemAllocator

from cute_fa.device.dtypes import CUTE_DTYPE
from cute_fa.device.ring import barrier_count
from cute_fa.device.tma_boxes import allocate_tiles
from fa3_sm90.common.wgmma import WGMMA_M
from fa3_sm90.decode.config import Fa3DecodeConfig


class Storage(NamedTuple):
    """Shared memory of a CTA: pointers, swizzled like their tiles. ``q``: 64 rows for each row group; the others are
    the first stages, ``*_codes`` None without codes; ``exchange``: fp32, as a warpgroup's threads hold their columns,
    or None; ``row_factors``: fp32, what each row of Q was divided by, or None; ``descales``, ``code_descales``: those
    of the keys' rows, fp32, for each stage of k and of k_codes, or None."""

    barriers: cute.Pointer
    q: cute.Pointer
    k: cute.Pointer
    v: cute.Pointer
    k_codes: Optional[cute.Pointer]
    v_codes: Optional[cute.Pointer]
    exchange: Optional[cute.Pointer]
    row_factors: Optional[cute.Pointer]
    descales: Optional[cute.Pointer]
    code_descales: Optional[cute.Pointer]

    @classmethod
    def allocate(cls, config: Fa3DecodeConfig) -> "Storage":
        """The CTA's shared memory."""
        c, dtype, allocator = config, CUTE_DTYPE[config.product_dtype], SmemAllocator()

        def codes(dtype, columns: int) -> Optional[cute.Pointer]:
            return allocate_tiles(allocator, CUTE_DTYPE[dtype], c.tile_n, columns, c.code_stages) if c.widens else None

        def numbers(count: int) -> Optional[cute.Pointer]:
            return allocator.allocate_tensor(Float32, cute.make_layout(count), 128).iterator if count else None

        return cls(
            q=allocate_tiles(allocator, dtype, WGMMA_M, c.head_dim_padded, c.row_groups),
            k=allocate_tiles(allocator, dtype, c.tile_n, c.head_dim_padded, c.stages),
            v=allocate_tiles(allocator, dtype, c.tile_n, c.value_columns, c.stages),
            k_codes=codes(c.dtype_k, c.code_columns[0]),
            v_codes=codes(c.dtype_v, c.code_columns[1]),
            exchange=numbers(c.exchange_bytes // 4),
            row_factors=numbers(c.tile_m if c.scales_rows else 0),
            descales=numbers(c.row_descales * c.tile_n * c.stages),
            code_descales=numbers(c.row_descales * c.tile_n * c.code_stages),
            barriers=allocator.allocate_array(Int64, barrier_count(c.pipelines)),
        )
