"""How TMA addresses keys and values."""

from typing import NamedTuple, Optional

from cutlass import const_expr
from cutlass.cute.nvgpu import cpasync

from cute_fa.device.arguments import CommonArguments
from cute_fa.device.key_copies import KeyTensor
from cute_fa.device.tma_boxes import BoxShape, TmaTensor, panel_bytes, tma_tensor
from fa3_sm90.decode.config import Fa3DecodeConfig


class TmaTensors(NamedTuple):
    """k and v as TMA addresses them."""

    k: TmaTensor
    v: TmaTensor

    @classmethod
    def of(cls, config: Fa3DecodeConfig, common: CommonArguments) -> Optional["TmaTensors"]:
        """Descriptors, made on the host; None where rows are copied one by one."""
        if const_expr(config.by_rows):
            return None
        load, (k, v) = cpasync.CopyBulkTensorTileG2SOp(), boxes(config)
        packed = config.cu_seqlens_k
        return cls(tma_tensor(load, common.k, k, packed), tma_tensor(load, common.v, v, packed))

    def tiles(self, config: Fa3DecodeConfig) -> dict[str, KeyTensor]:
        """Both with their tiles in shared memory, by the names of their rings."""
        parts = zip(self, boxes(config), loaded_columns(config), strict=True)
        names = ("k_codes", "v_codes") if config.widens else ("k", "v")
        tensors = (KeyTensor(tma, box, config.tile_n, width) for tma, box, width in parts)
        return dict(zip(names, tensors, strict=True))


def loaded_columns(config: Fa3DecodeConfig) -> tuple[int, int]:
    """Of the tiles that TMA fills."""
    return config.code_columns if config.widens else (config.head_dim_padded, config.value_columns)


def boxes(config: Fa3DecodeConfig) -> tuple[BoxShape, BoxShape]:
    """What one TMA instruction moves of k and of v."""
    c, size = config, config.dtype_k.bytes
    widths = (panel_bytes(columns * size) // size for columns in loaded_columns(c))
    return tuple(BoxShape(1, c.key_rows, width, c.ragged_keys) for width in widths)
