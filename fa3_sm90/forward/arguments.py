"""What the compiled kernel takes, and how both roles read where a tile lies in it."""

from typing import NamedTuple

import cutlass
from cutlass import Int32

from cute_fa.device.arguments import CommonArguments
from cute_fa.device.block_range import BlockRange, block_range
from cute_fa.device.seqlen import SeqlenInfo, seqlen_info
from cute_fa.device.tile_scheduler import TileGrid, WorkTile, make_scheduler
from cute_fa.device.tma_boxes import TmaTensor
from fa3_sm90.forward.config import Fa3ForwardConfig


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


class Extents(NamedTuple):
    """Lengths that the dense tensors themselves have, 0 where packed; ``keys``: what a sequence's pages can hold."""

    queries: Int32
    keys: Int32


class TileWork(NamedTuple):
    """A tile of queries and its key blocks. ``first_token``: position of its first query in the sequence."""

    tile: WorkTile
    info: SeqlenInfo
    first_token: Int32
    blocks: BlockRange


def dense_extents(args: ForwardArguments) -> Extents:
    """Lengths of the tensors."""
    return Extents(*(Int32(rows) for rows in args.common.dense))


def kv_head(args: ForwardArguments, config: Fa3ForwardConfig, head: Int32) -> Int32:
    """The kv head of a tile's ``head``."""
    if config.pack_gqa > 1:
        return head
    return head // (args.common.q.shape[-2] // args.common.k.shape[-2])


def scheduler_of(args: ForwardArguments, config: Fa3ForwardConfig):
    """The tile scheduler: each role makes its own and gets the same tiles."""
    return make_scheduler(
        args.grid,
        longest_first=config.window_right,
        persistent=config.persistent,
        cu_seqlens_q=args.common.lengths.cu_seqlens_q,
        tile_tokens=config.tile_tokens,
    )


def tile_work(args: ForwardArguments, config: Fa3ForwardConfig, extents: Extents, tile: WorkTile) -> TileWork:
    """What there is to do for a tile: at least one key block, all hidden where there is no visible key.

    Not zero, since a branch around the main loop makes ptxas serialise every wgmma (C7512: the accumulators of both
    sides meet behind it, and it finds too few registers).
    """
    info = seqlen_info(args.common.lengths, tile.batch, extents.queries, extents.keys)
    first_token = tile.m_block * config.tile_tokens
    blocks = block_range(
        args.common.window, info.seqlen_q, info.seqlen_k, first_token, config.tile_tokens, config.tile_n
    )
    blocks = blocks._replace(last_block=cutlass.max(blocks.last_block, 0), total=cutlass.max(blocks.total, 1))
    return TileWork(tile, info, first_token, blocks)
