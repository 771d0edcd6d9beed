"""What the forwards that walk over tiles of queries by TMA take, and how TMA addresses it."""

from typing import NamedTuple

import cutlass.cute as cute
from cutlass import Int32, const_expr
from cutlass.cute.nvgpu import cpasync

from cute_fa.device.arguments import CommonArguments
from cute_fa.device.fake_arguments import common_fakes
from cute_fa.device.tile_scheduler import TileGrid
from cute_fa.device.tma_boxes import BoxShape, TmaTensor, panel_bytes, tma_tensor
from cute_fa.semantics.types import DType


class ForwardArguments(NamedTuple):
    """``grid``: what the tile scheduler is told of the tiles; ``num_ctas``: the grid of the launch."""

    common: CommonArguments
    grid: TileGrid
    num_ctas: Int32

    @classmethod
    def fakes(cls, config) -> "ForwardArguments":
        """For ``cute.compile``."""
        return cls(common_fakes(config), TileGrid(Int32(0), Int32(0), Int32(0), Int32(0)), Int32(0))


class Boxes(NamedTuple):
    """What one TMA instruction moves of each tensor."""

    q: BoxShape
    k: BoxShape
    v: BoxShape
    out: BoxShape

    @classmethod
    def of(cls, config) -> "Boxes":
        """For a kernel's config: ``key_rows`` and ``value_rows``, keys, of K and V, ``pack_gqa`` heads of ``tokens`` of
        Q and O. O is ragged in packed tensors, where the rows behind a sequence are the next one's."""
        c = config

        def panel(columns: int, dtype: DType) -> int:
            return panel_bytes(columns * dtype.bytes) // dtype.bytes

        columns, columns_v = panel(c.head_dim_padded, c.dtype), panel(c.value_columns, c.dtype)
        v = BoxShape(1, c.value_rows, columns_v, c.ragged_keys)
        if c.key_major_v:  # its rows are columns of V
            v = BoxShape(1, c.head_dim_v, panel(c.tile_n, c.dtype_v), False)
        return cls(
            q=BoxShape(c.pack_gqa, c.tokens, columns, False),
            k=BoxShape(1, c.key_rows, columns, c.ragged_keys),
            v=v,
            out=BoxShape(c.pack_gqa, c.tokens, panel(c.head_dim_v_padded, c.out_dtype), c.cu_seqlens_q),
        )


class TmaTensors(NamedTuple):
    """q, k, v and out as TMA addresses them."""

    q: TmaTensor
    k: TmaTensor
    v: TmaTensor
    out: TmaTensor

    @classmethod
    def of(cls, config, common: CommonArguments, load, load_keys=None) -> "TmaTensors":
        """``load``: the operation that brings q, k and v; ``load_keys``: k and v, if that is another one."""
        load_keys = load_keys or load
        c, boxes, store, v = config, Boxes.of(config), cpasync.CopyBulkTensorTileS2GOp(), common.v
        if const_expr(c.key_major_v):  # (batch, head_dim_v, heads, keys)
            v = cute.make_tensor(v.iterator, cute.select(v.layout, mode=[0, 3, 2, 1]))
        return cls(
            q=tma_tensor(load, common.q, boxes.q, c.cu_seqlens_q),
            k=tma_tensor(load_keys, common.k, boxes.k, c.cu_seqlens_k),
            v=tma_tensor(load_keys, v, boxes.v, c.cu_seqlens_k),
            out=tma_tensor(store, common.out, boxes.out, c.cu_seqlens_q),
        )
