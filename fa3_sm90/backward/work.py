"""What a CTA does: one tile of keys of one kv head, with the queries of all heads of its group."""

from typing import NamedTuple, Union

import cutlass.cute as cute
from cutlass import Int32, const_expr

from cute_fa.device.backward_arguments import BackwardArguments
from cute_fa.device.block_range import MaskedRange
from cute_fa.device.query_range import QueryRange, query_range
from cute_fa.device.seqlen import SeqlenInfo, key_rows
from cute_fa.device.tile_scheduler import tile_longest_first
from fa3_sm90.backward.config import Fa3BackwardConfig


class FirstQueriesFirst(NamedTuple):
    """The blocks of a :class:`QueryRange`, from the first to the last."""

    backwards: QueryRange

    @property
    def total(self) -> Int32:
        """Iterations."""
        return self.backwards.total

    def ranges(self, left_bound: bool) -> list[MaskedRange]:
        """As of the range that they are of, the other way round."""
        return [
            MaskedRange(self.total - stop, self.total - start, *masks)
            for start, stop, *masks in reversed(self.backwards.ranges(left_bound))
        ]

    def block(self, iteration: Int32) -> Int32:
        """Query block of an iteration."""
        return self.backwards.block(self.total - 1 - iteration)


class KeyWork(NamedTuple):
    """``first_head``: of the ``heads`` query heads of ``head_kv``; ``first_tile``: of the sequence in the scratch
    memory; ``rows_k``: rows of k that belong to the sequence, whether or not they count."""

    n_block: Int32
    head_kv: Int32
    batch: Int32
    info: SeqlenInfo
    blocks: Union[QueryRange, FirstQueriesFirst]
    heads: Int32
    first_head: Int32
    first_tile: Int32
    rows_k: Int32

    def first_key(self, config: Fa3BackwardConfig) -> Int32:
        """Of the tile."""
        return self.n_block * config.tile_n


def key_tile(config: Fa3BackwardConfig, args: BackwardArguments, index: Int32):
    """(n_block, head_kv, batch) of the tile of this index.

    The tiles of a head are neighbours, for its Q, dO and sums of dQ in L2. Under a right bound the first one has the
    most queries: head by head, the last heads' would begin late and end after all others. There heads are taken in
    groups whose Q, dO and sums stay in L2 together, and of a group the first tiles of all heads go first.

    Where tiles take turns, too, so that few of those that begin together wait for each other; there the last tiles go
    first, which a tile waits for. Under a right bound they have the fewest queries: of a head they are done before
    the longer ones come to their last blocks, and with the next one they do not wait for the longest. Under a mask
    such a tile begins with its first queries, which the one before it in the order does not meet."""
    n_blocks, heads_kv = cute.ceil_div(args.seqlen_k, config.tile_n * config.cluster), args.common.k.shape[-2]
    if const_expr(config.longest_first):
        n_block, row = tile_longest_first(index, n_blocks, heads_kv * args.common.batches, args.head_group)
        if const_expr(not config.turns):
            n_block = n_blocks - 1 - n_block
        return n_block, row % heads_kv, row // heads_kv
    return index % n_blocks, index // n_blocks % heads_kv, index // n_blocks // heads_kv


def key_work(config: Fa3BackwardConfig, args: BackwardArguments, index: Int32) -> KeyWork:
    """All of the tile of a CTA of this index; those of a cluster have neighbours, and walk over the queries of all."""
    c, common = config, args.common
    block, head_kv, batch = key_tile(c, args, index // c.cluster)
    rank = cute.arch.block_idx_in_cluster() if const_expr(c.cluster > 1) else 0
    first_key, keys = block * (c.cluster * c.tile_n), c.cluster * c.tile_n
    info = common.info(batch)
    heads = common.q.shape[-2] // common.k.shape[-2]
    blocks = query_range(common.window, info.seqlen_q, info.seqlen_k, first_key, c.tile_m, keys)
    # not without a mask: the loop that comes second in the code has more instructions (522 instead of 496 at 64)
    if const_expr(c.turns and (c.window_left or c.window_right)):
        blocks = FirstQueriesFirst(blocks)
    dense_k = common.dense[1] if const_expr(not c.cu_seqlens_k) else Int32(0)
    return KeyWork(
        n_block=block * c.cluster + rank,
        head_kv=head_kv,
        batch=batch,
        info=info,
        blocks=blocks,
        heads=heads,
        first_head=head_kv * heads,
        first_tile=args.first_tile(info, batch, c.tile_m),
        rows_k=key_rows(common.lengths, batch, dense_k),
    )
