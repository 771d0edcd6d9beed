"""How TMA addresses the tensors of the Hopper backward."""

from typing import NamedTuple

from cutlass.cute.nvgpu import cpasync

from cute_fa.device.backward_arguments import BackwardArguments
from cute_fa.device.tma_boxes import BoxShape, TmaTensor, panel_bytes, tma_tensor
from fa3_sm90.backward.config import Fa3BackwardConfig
from fa3_sm90.common.wgmma import WGMMA_M


class Boxes(NamedTuple):
    """What one TMA instruction moves: of K and V a tile's rows, of their gradients those of a warpgroup."""

    q: BoxShape
    dout: BoxShape
    k: BoxShape
    v: BoxShape
    dk: BoxShape
    dv: BoxShape

    @classmethod
    def of(cls, config: Fa3BackwardConfig) -> "Boxes":
        """Rows behind a sequence are zeros where they are read: a key that is hidden still takes part in products with
        zeros, which NaN does not survive."""
        c = config
        columns, columns_v = (
            panel_bytes(width * c.dtype.bytes) // c.dtype.bytes for width in (c.head_dim_padded, c.head_dim_v_padded)
        )
        return cls(
            q=BoxShape(1, c.tile_m, columns, c.ragged_queries),
            dout=BoxShape(1, c.tile_m, columns_v, c.ragged_queries),
            k=BoxShape(1, c.tile_n, columns, c.ragged_keys),
            v=BoxShape(1, c.tile_n, columns_v, c.ragged_keys),
            dk=BoxShape(1, WGMMA_M, columns, c.cu_seqlens_k),
            dv=BoxShape(1, WGMMA_M, columns_v, c.cu_seqlens_k),
        )


class TmaTensors(NamedTuple):
    """The tensors as TMA addresses them."""

    q: TmaTensor
    dout: TmaTensor
    k: TmaTensor
    v: TmaTensor
    dk: TmaTensor
    dv: TmaTensor

    @classmethod
    def of(cls, config: Fa3BackwardConfig, args: BackwardArguments) -> "TmaTensors":
        """Descriptors, made on the host."""
        c, boxes, common = config, Boxes.of(config), args.common
        load, store = cpasync.CopyBulkTensorTileG2SOp(), cpasync.CopyBulkTensorTileS2GOp()
        return cls(
            q=tma_tensor(load, common.q, boxes.q, c.cu_seqlens_q),
            dout=tma_tensor(load, args.dout, boxes.dout, c.cu_seqlens_q),
            k=tma_tensor(load, common.k, boxes.k, c.cu_seqlens_k),
            v=tma_tensor(load, common.v, boxes.v, c.cu_seqlens_k),
            dk=tma_tensor(store, args.dk, boxes.dk, c.cu_seqlens_k),
            dv=tma_tensor(store, args.dv, boxes.dv, c.cu_seqlens_k),
        )
