"""Tiles of keys add to dQ in order, the last keys first, so that its bits depend on nothing else."""

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, const_expr
from cutlass.cute.arch import inline_ptx

from cute_fa.device.backward_arguments import BackwardArguments
from cute_fa.device.query_range import earlier_tiles
from cute_fa.device.visibility import Window
from fa3_sm90.backward.config import Fa3BackwardConfig
from fa3_sm90.backward.work import KeyWork


class Turns:
    """Of a block of queries of a head, ``scratch.turns`` counts the tiles of keys that have added to its dQ. A tile
    waits until all of later keys that meet the block have.

    A CTA waits only for tiles that were begun before its own (:func:`take_ticket`), of which at least one waits for
    nobody: whatever the order of CTAs and however few run at a time, none waits for ever.
    """

    def __init__(self, config: Fa3BackwardConfig, args: BackwardArguments, work: KeyWork):
        self.config, self.args, self.work = config, args, work

    def wait(self, head: Int32, block: Int32):
        """By the storing warp: until it is the tile's turn at a block of queries."""
        c, info = self.config, self.work.info
        rank = later_tiles(
            self.args.common.window, info.seqlen_q, info.seqlen_k, self.work.n_block, block, c.tile_m, c.tile_n
        )
        wait_until(self._address(head, block), rank)
        cute.arch.fence_proxy("async.global")

    def pass_on(self, head: Int32, block: Int32):
        """By the lane that has issued the additions, as a group not yet committed: once they are done, the next one's
        turn."""
        with cute.arch.elect_one():
            cute.arch.cp_async_bulk_commit_group()
            cute.arch.cp_async_bulk_wait_group(0, read=False)
            inline_ptx(
                "red.release.gpu.global.add.u32 [{$r0}], {$r1};",
                read_only_args=[self._address(head, block), Int32(1)],
            )

    def _address(self, head: Int32, block: Int32) -> Int64:
        turns, heads = self.args.scratch.turns, self.args.common.q.shape[-2]
        return turns.iterator.toint() + Int64((self.work.first_tile + block) * heads + head) * 4


def later_tiles(
    window: Window, seqlen_q: Int32, seqlen_k: Int32, n_block: Int32, block: Int32, tile_m: int, tile_n: int
) -> Int32:
    """How many tiles of keys behind ``n_block``, which meets the query block, meet it too: up to that of the last key
    which the block's queries see, a sink token where their windows hold no key."""

    def met_before(end: Int32) -> Int32:
        return earlier_tiles(window, seqlen_q, seqlen_k, end, block, tile_m, tile_n)

    diagonal, last_key = seqlen_k - seqlen_q, seqlen_k - 1
    if const_expr(window.right is not None):
        last_query = cutlass.min((block + 1) * tile_m, seqlen_q) - 1
        last_key = cutlass.min(last_key, window.keys(last_query + diagonal).last)
    if const_expr(window.sink_tokens is not None):
        sinks_alone = window.keys(block * tile_m + diagonal).first > last_key
        if const_expr(window.right is not None):
            sinks_alone = sinks_alone | window.empty
        last_key = cutlass.select_(sinks_alone, cutlass.min(last_key, window.sink_tokens - 1), last_key)
    return met_before(last_key // tile_n + 1) - met_before(n_block) - 1


@cute.jit
def wait_until(address: Int64, value: Int32):
    """Until the number at ``address`` is ``value``."""
    found = load_acquire(address)
    while found != value:
        found = load_acquire(address)


def load_acquire(address: Int64) -> Int32:
    """What lies there, and all that was written before it was."""
    return inline_ptx("ld.acquire.gpu.global.b32 {$w0}, [{$r0}];", write_only_types=[Int32], read_only_args=[address])


@cute.jit
def take_ticket(turns: cute.Tensor, ticket: cute.Pointer):
    """By one warp: which tile of keys is the CTA's, the next that nobody has begun."""
    with cute.arch.elect_one():
        counter = turns.iterator.toint() + Int64(cute.size(turns) - 1) * 4
        taken = inline_ptx(
            "atom.relaxed.gpu.global.add.u32 {$w0}, [{$r0}], {$r1};",
            write_only_types=[Int32],
            read_only_args=[counter, Int32(1)],
        )
        ticket.store(taken)
