"""What the compiled kernel takes, and how both roles read where a tile lies in it."""

from typing import NamedTuple, Optional

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr

from cute_fa.device.block_range import BlockRange, Window, block_range
from cute_fa.device.seqlen import LengthTensors, SeqlenInfo, seqlen_info
from cute_fa.device.tile_scheduler import TileGrid, WorkTile, make_scheduler
from fa3_sm90.config import Fa3ForwardConfig
from fa3_sm90.tiles import TmaTensor


class ForwardArguments(NamedTuple):
    """Arguments of the launch. Dense q, out (batch, seqlen_q, heads, d), k, v (batch, seqlen_k, heads_kv, d) or,
    paged, (num_pages, page_size, heads_kv, d), lse fp32 (batch, heads, seqlen_q); packed without the batch dimension,
    lse (heads, total_q). page_table int32 (batch, max_pages), alibi_slopes fp32 (batch or stride 0, heads),
    learnable_sink fp32 (heads). ``num_ctas``: the grid."""

    q: cute.Tensor
    k: cute.Tensor
    v: cute.Tensor
    out: cute.Tensor
    lse: cute.Tensor
    lengths: LengthTensors
    window: Window
    alibi_slopes: Optional[cute.Tensor]
    learnable_sink: Optional[cute.Tensor]
    softmax_scale: Float32
    softcap: Optional[Float32]
    page_table: Optional[cute.Tensor]
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


def dense_extents(args: ForwardArguments, config: Fa3ForwardConfig) -> Extents:
    """Lengths of the tensors."""
    queries = Int32(0) if const_expr(config.cu_seqlens_q) else args.q.shape[1]
    keys = Int32(0) if const_expr(config.cu_seqlens_k) else args.k.shape[1]
    if const_expr(config.page_size is not None):
        keys = args.page_table.shape[1] * config.page_size
    return Extents(queries, keys)


def scheduler_of(args: ForwardArguments, config: Fa3ForwardConfig):
    """The tile scheduler: each role makes its own and gets the same tiles."""
    return make_scheduler(
        args.grid,
        longest_first=config.window_right,
        persistent=config.persistent,
        cu_seqlens_q=args.lengths.cu_seqlens_q,
        tile_tokens=config.tile_tokens,
    )


def tile_work(args: ForwardArguments, config: Fa3ForwardConfig, extents: Extents, tile: WorkTile) -> TileWork:
    """What there is to do for a tile: at least one key block, all hidden where there is no visible key.

    Not zero, since a branch around the main loop makes ptxas serialise every wgmma (C7512: the accumulators of both
    sides meet behind it, and it finds too few registers).
    """
    info = seqlen_info(args.lengths, tile.batch, extents.queries, extents.keys)
    first_token = tile.m_block * config.tile_tokens
    blocks = block_range(args.window, info.seqlen_q, info.seqlen_k, first_token, config.tile_tokens, config.tile_n)
    blocks = blocks._replace(last_block=cutlass.max(blocks.last_block, 0), total=cutlass.max(blocks.total, 1))
    return TileWork(tile, info, first_token, blocks)
