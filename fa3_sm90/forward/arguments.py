"""What the compiled kernel takes."""

from typing import NamedTuple

from cutlass import Int32

from cute_fa.device.arguments import CommonArguments
from cute_fa.device.tile_scheduler import TileGrid
from cute_fa.device.tma_boxes import TmaTensor


class ForwardArguments(NamedTuple):
    """``grid``: what the tile scheduler is told of the tiles; ``num_ctas``: the grid of the launch."""

    common: CommonArguments
    grid: TileGrid
    num_ctas: Int32


class TmaTensors(NamedTuple):
    """q, k, v and out as TMA addresses them."""

    q: TmaTensor
    k: TmaTensor
    v: TmaTensor
    out: TmaTensor
