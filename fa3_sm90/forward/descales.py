"""Descales that blocks of keys have of their own: from the loader, which reads them, to the consumers."""

from typing import NamedTuple, Optional

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr

from cute_fa.device.forward_arguments import ForwardArguments
from cute_fa.device.tile_work import TileWork, kv_head
from cute_fa.semantics.problem import DESCALE_BLOCK
from fa3_sm90.forward.config import Fa3ForwardConfig
from fa3_sm90.forward.storage import Storage


class BlockFactors(NamedTuple):
    """``key``: descale of a block of k; ``ratio``: what takes O from the unit of the tile's block of v before, its
    descale, to that of this one, 1 for the first. 1 where all blocks share a descale."""

    key: Float32
    ratio: Float32


class BlockDescales:
    """Those of a CTA's tiles.

    The loader puts both factors beside the block of K that they come with: in the consumers' loop addresses in global
    memory would take five registers, and 7 more instructions an iteration.
    """

    def __init__(self, config: Fa3ForwardConfig, args: ForwardArguments, storage: Storage):
        self.config, self.args, self.slots = config, args, storage.factors

    def factors(self, work: TileWork, iteration: Int32) -> BlockFactors:
        """Of the block of an iteration."""
        k, v = self.config.k_block_descale, self.config.v_block_descale
        descales, one = self.args.common.descales, Float32(1.0)
        key = self.load(descales.k, work, iteration) if const_expr(k) else one
        if const_expr(not v):
            return BlockFactors(key, one)
        before = self.load(descales.v, work, cutlass.max(iteration - 1, 0))
        return BlockFactors(key, before * cute.arch.rcp_approx(self.load(descales.v, work, iteration)))

    def last_unit(self, work: TileWork) -> Optional[Float32]:
        """Unit of O after the last block, or None if v's blocks have no descales."""
        if const_expr(not self.config.v_block_descale):
            return None
        return self.load(self.args.common.descales.v, work, work.blocks.total - 1)

    def load(self, descale: cute.Tensor, work: TileWork, iteration: Int32) -> Float32:
        """Of the block of an iteration; 1 for that of an empty sequence."""
        block = work.blocks.block(iteration, self.args.common.window) // (DESCALE_BLOCK // self.config.tile_n)
        factor = descale[work.tile.batch, kv_head(self.args.common, self.config.pack_gqa, work.tile.head), block]
        return cutlass.select_(work.info.seqlen_k > 0, factor, Float32(1.0))

    def put(self, factors: BlockFactors, stage: Int32):
        """By one thread, before the stage is handed to the consumers."""
        slot = self.slot(stage)
        slot[0], slot[1] = factors

    def take(self, stage: Int32) -> BlockFactors:
        """By a consumer, before it releases the stage."""
        pair = self.slot(stage).load()
        return BlockFactors(pair[0], pair[1])

    def slot(self, stage: Int32) -> cute.Tensor:
        """The two numbers of a stage."""
        return cute.make_tensor(self.slots + 2 * stage, cute.make_layout(2))
