"""Descales that blocks of keys have of their own."""

from typing import NamedTuple, Optional

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32

from cute_fa.device.arguments import CommonArguments
from cute_fa.device.score import Score
from cute_fa.device.tile_work import TileWork, kv_head
from cute_fa.semantics.problem import DESCALE_BLOCK
from fa4_sm100.forward.config import Fa4ForwardConfig

# Values that are all zero may have a descale of 0, whose log2 is of no use.
_LEAST = 2.0**-64


class Unit(NamedTuple):
    """Descale of a block of v, which P takes on: its log2 is added to the exponents, and taken out of their sum by the
    ``inverse``. O is then in no block's unit, and is not rescaled from one to the next; what a row's reference follows
    is the largest product of P and the descale."""

    log2: Float32
    inverse: Float32


class BlockDescales:
    """Those of the tiles of a softmax warpgroup, read by each thread while it waits for the block's scores."""

    def __init__(self, config: Fa4ForwardConfig, common: CommonArguments):
        self.config, self.common = config, common

    def of_block(self, work: TileWork, iteration: Int32, score: Score) -> tuple[Score, Optional[Unit]]:
        """The score formula for the block of an iteration, and the unit of its values; None for 1."""
        unit, descales = None, self.common.descales
        if self.config.k_block_descale:
            score = score.scaled(self.load(descales.k, work, iteration))
        if self.config.v_block_descale:
            descale = cute.arch.fmax(self.load(descales.v, work, iteration), Float32(_LEAST))
            unit = Unit(cute.math.log2(descale, fastmath=True), cute.arch.rcp_approx(descale))
        return score, unit

    def load(self, descale: cute.Tensor, work: TileWork, iteration: Int32) -> Float32:
        """Of the block of an iteration; 1 for that of an empty sequence."""
        c = self.config
        block = work.blocks.block(iteration, self.common.window) // (DESCALE_BLOCK // c.tile_n)
        head = kv_head(self.common, c.pack_gqa, work.tile.head)
        factor = descale[work.tile.batch, head, block]
        return cutlass.select_(work.info.seqlen_k > 0, factor, Float32(1.0))
