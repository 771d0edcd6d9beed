"""How TMA addresses the tensors: of all of them a box has 64 rows of one head."""

from typing import NamedTuple

from cutlass.cute.nvgpu import cpasync

from cute_fa.device.backward_arguments import BackwardArguments
from cute_fa.device.tma_boxes import BoxShape, TmaTensor, panel_bytes, tma_tensor
from fa3_sm90.backward_split.config import TILE, Fa3SplitBackwardConfig


class Boxes(NamedTuple):
    """What one TMA instruction moves."""

    q: BoxShape
    dout: BoxShape
    k: BoxShape
    v: BoxShape
    dq: BoxShape
    dk: BoxShape
    dv: BoxShape

    @classmethod
    def of(cls, config: Fa3SplitBackwardConfig, ctas: int) -> "Boxes":
        """``ctas``: of a cluster, of which each brings its part of the queries to all. Rows behind a sequence are zeros
        where they are read: what is hidden still takes part in products with zeros, which NaN does not survive."""
        c, size = config, config.dtype.bytes
        columns, columns_v = (panel_bytes(width * size) // size for width in (c.head_dim_padded, c.head_dim_v_padded))
        return cls(
            q=BoxShape(1, TILE // ctas, columns, c.ragged_queries),
            dout=BoxShape(1, TILE // ctas, columns_v, c.ragged_queries),
            k=BoxShape(1, TILE, columns, c.ragged_keys),
            v=BoxShape(1, TILE, columns_v, c.ragged_keys),
            dq=BoxShape(1, TILE, columns, c.cu_seqlens_q),
            dk=BoxShape(1, TILE, columns, c.cu_seqlens_k),
            dv=BoxShape(1, TILE, columns_v, c.cu_seqlens_k),
        )


class TmaTensors(NamedTuple):
    """The tensors as TMA addresses them."""

    q: TmaTensor
    dout: TmaTensor
    k: TmaTensor
    v: TmaTensor
    dq: TmaTensor
    dk: TmaTensor
    dv: TmaTensor

    @classmethod
    def of(cls, config: Fa3SplitBackwardConfig, args: BackwardArguments, ctas: int) -> "TmaTensors":
        """Descriptors, made on the host; ``ctas`` as in :class:`Boxes`."""
        c, boxes, common = config, Boxes.of(config, ctas), args.common
        load, store = cpasync.CopyBulkTensorTileG2SOp(), cpasync.CopyBulkTensorTileS2GOp()
        shared = load if ctas == 1 else cpasync.CopyBulkTensorTileG2SMulticastOp()
        return cls(
            q=tma_tensor(shared, common.q, boxes.q, c.cu_seqlens_q),
            dout=tma_tensor(shared, args.dout, boxes.dout, c.cu_seqlens_q),
            k=tma_tensor(load, common.k, boxes.k, c.cu_seqlens_k),
            v=tma_tensor(load, common.v, boxes.v, c.cu_seqlens_k),
            dq=tma_tensor(store, args.dq, boxes.dq, c.cu_seqlens_q),
            dk=tma_tensor(store, args.dk, boxes.dk, c.cu_seqlens_k),
            dv=tma_tensor(store, args.dv, boxes.dv, c.cu_seqlens_k),
        )
