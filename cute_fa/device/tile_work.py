"""What there is to do for a tile of queries: which keys, in blocks. Kernels of sm_90 and sm_100 share it."""

from typing import NamedTuple, Optional

import cutlass
import cutlass.cute as cute
from cutlass import Int32, const_expr

from cute_fa.device.arguments import CommonArguments
from cute_fa.device.block_range import BlockRange, block_range
from cute_fa.device.range_walk import BlockList, RangeWalk
from cute_fa.device.seqlen import SeqlenInfo, seqlen_info
from cute_fa.device.tile_handout import Handout
from cute_fa.device.tile_scheduler import TileGrid, WorkTile, make_scheduler


class Extents(NamedTuple):
    """Lengths that the dense tensors themselves have, 0 where packed; ``keys``: what a sequence's pages can hold."""

    queries: Int32
    keys: Int32


class TileWork(NamedTuple):
    """A tile of queries and its key blocks. ``first_token``: position of its first query in the sequence."""

    tile: WorkTile
    info: SeqlenInfo
    first_token: Int32
    blocks: BlockRange | BlockList


def dense_extents(common: CommonArguments) -> Extents:
    """Lengths of the tensors."""
    return Extents(*(Int32(rows) for rows in common.dense))


def kv_head(common: CommonArguments, pack_gqa: int, head: Int32) -> Int32:
    """The kv head of a tile's ``head``; ``pack_gqa``: query heads that share a tile."""
    if pack_gqa > 1:
        return head
    return head // (common.q.shape[-2] // common.k.shape[-2])


def walk_of(common: CommonArguments, config) -> RangeWalk:
    """A range plan's lists of blocks for the kernel's tiles of queries."""
    return RangeWalk.of(common.query_walk, dense_extents(common).queries, config.tile_tokens)


def scheduler_of(common: CommonArguments, grid: TileGrid, config, handout: Optional[Handout] = None, ctas: int = 1):
    """The tile scheduler: each role makes its own and gets the same tiles. ``config``: of the kernel, with
    window_right, ranges, persistent and tile_tokens; ``ctas``: of a cluster that walks together. Under a range plan an
    m_block says which tile of rows by its place among those that have blocks, the last one being the longest."""
    if const_expr(config.ranges):
        grid = grid._replace(m_blocks=cute.arch.make_warp_uniform(walk_of(common, config).filled))
    return make_scheduler(
        grid,
        longest_first=config.window_right or config.ranges,
        persistent=config.persistent,
        cu_seqlens_q=common.lengths.cu_seqlens_q,
        tile_tokens=config.tile_tokens,
        ctas=ctas,
        handout=handout,
    )


def tile_work(common: CommonArguments, config, extents: Extents, tile: WorkTile) -> TileWork:
    """What there is to do for a tile: at least one key block, all hidden where there is no visible key. ``config``: of
    the kernel, with ranges, tile_tokens and tile_n.

    Not zero, since a branch around the main loop makes ptxas serialise every wgmma (C7512: the accumulators of both
    sides meet behind it, and it finds too few registers), and spares the roles of sm_100 a case of its own.
    """
    info = seqlen_info(common.lengths, tile.batch, extents.queries, extents.keys)
    if const_expr(config.ranges):
        walk = walk_of(common, config)
        m_block = walk.tile(walk.filled - 1 - tile.m_block)
        return TileWork(tile._replace(m_block=m_block), info, m_block * config.tile_tokens, walk.blocks(m_block))
    first_token = tile.m_block * config.tile_tokens
    blocks = block_range(common.window, info.seqlen_q, info.seqlen_k, first_token, config.tile_tokens, config.tile_n)
    blocks = blocks._replace(last_block=cutlass.max(blocks.last_block, 0), total=cutlass.max(blocks.total, 1))
    return TileWork(tile, info, first_token, blocks)
