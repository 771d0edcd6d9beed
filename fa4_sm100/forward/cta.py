"""What the roles of a CTA share."""

from typing import Optional

import cutlass.cute as cute
from cutlass import Int32, const_expr

from cute_fa.device.forward_arguments import ForwardArguments, TmaTensors
from cute_fa.device.ring import Ring
from cute_fa.device.tile_handout import Handout
from cute_fa.device.tile_scheduler import WorkTile
from cute_fa.device.tile_work import TileWork, dense_extents, scheduler_of, tile_work
from fa4_sm100.forward.config import Fa4ForwardConfig
from fa4_sm100.forward.storage import Storage


class Cta:
    """``rank``: which one of a pair it is."""

    def __init__(
        self,
        config: Fa4ForwardConfig,
        args: ForwardArguments,
        tma: TmaTensors,
        storage: Storage,
        rings: dict[str, Ring],
        rank: Int32,
    ):
        self.config, self.args, self.common, self.tma = config, args, args.common, tma
        self.storage, self.rings, self.rank = storage, rings, rank

    @property
    def tensor(self) -> Int32:
        """Address of its tensor memory, once all threads have met. Each role reads it anew: kept from before the roles
        part, it is spilled in the loop of the MMA warp at head_dim 256, by the compiler for CUDA 13."""
        return cute.make_tensor(self.storage.tensor, cute.make_layout(1))[0]

    @property
    def handout(self) -> Optional[Handout]:
        """Where the next tiles come from; None where the scheduler knows them."""
        if const_expr(not self.config.handed):
            return None
        return Handout(self.rings["tiles"], self.storage.responses, self.config.ctas)

    def scheduler(self):
        """Each role makes its own and gets the same tiles."""
        return scheduler_of(self.common, self.args.grid, self.config, self.handout)

    def work(self, tile: WorkTile) -> TileWork:
        """What there is to do for a tile."""
        return tile_work(self.common, self.config, dense_extents(self.common), tile)

    def first_token(self, work: TileWork, q_tile: int | Int32) -> Int32:
        """Position of the first query of one of the CTA's tiles of 128 rows."""
        c = self.config
        if c.ctas > 1:
            q_tile = q_tile * c.ctas + self.rank
        return work.first_token + q_tile * c.tokens
