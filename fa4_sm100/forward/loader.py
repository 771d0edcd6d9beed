"""The load warp: brings Q, K and V into shared memory by TMA."""

import cutlass
import cutlass.cute as cute
from cutlass import Int32, const_expr

from cute_fa.device.key_copies import KeyCopies, KeyTensor
from cute_fa.device.ring import Ring, RingState, ring_next, ring_start
from cute_fa.device.tile_work import Extents, TileWork, scheduler_of, tile_work
from cute_fa.device.tma_boxes import BoxCopy
from fa4_sm100.forward.arguments import ForwardArguments, TmaTensors
from fa4_sm100.forward.config import TILE_M, Fa4ForwardConfig
from fa4_sm100.forward.storage import Boxes, Storage


class Loader:
    """One warp. Order of the copies: K0, Q of each tile, then V0, K1, V1 …, as the products need them."""

    def __init__(
        self,
        config: Fa4ForwardConfig,
        args: ForwardArguments,
        tma: TmaTensors,
        extents: Extents,
        storage: Storage,
        rings: dict[str, Ring],
    ):
        self.config, self.args, self.extents = config, args, extents
        self.tma, self.storage, self.rings = tma, storage, rings
        self.boxes = Boxes.of(config)
        self.copies = KeyCopies(config, args.common)
        self.k = KeyTensor(tma.k, self.boxes.k, config.head_dim_padded, False)
        self.v = KeyTensor(tma.v, self.boxes.v, config.loaded_columns, config.key_major_v)

    @cute.jit
    def run(self):
        """Walk over the CTA's tiles."""
        common, config, extents = self.args.common, self.config, self.extents
        scheduler = scheduler_of(common, self.args.grid, config)
        valid, tile, advance, load_tile = scheduler.valid, scheduler.tile, scheduler.next, self.load_tile
        queries, keys = ring_start(), ring_start()
        state = scheduler.first()
        while valid(state):
            keys = load_tile(tile_work(common, config, extents, tile(state)), queries, keys)
            queries = ring_next(queries, 1)
            state = advance(state)

    @cute.jit
    def load_tile(self, work: TileWork, queries: RingState, keys: RingState) -> RingState:
        """All loads of one tile, from these states of the rings on; returns the next one of K and V."""
        load_k, load_v, stages = self.load_k, self.load_v, self.config.stages
        load_k(work, Int32(0), keys)
        self.load_q(work, queries)
        keys = ring_next(keys, stages)
        load_v(work, Int32(0), keys)
        for iteration in cutlass.range(1, work.blocks.total, unroll=1):
            keys = ring_next(keys, stages)
            load_k(work, iteration, keys)
            keys = ring_next(keys, stages)
            load_v(work, iteration, keys)
        return ring_next(keys, stages)

    @cute.jit
    def load_q(self, work: TileWork, state: RingState):
        """Each tile's queries, on a barrier of their own. Rows beyond the sequence are whatever lies there: they take
        no part in other rows and are not stored."""
        c = self.config
        head, batch = work.tile.head * c.pack_gqa, work.tile.batch
        outer = () if const_expr(c.cu_seqlens_q) else (batch,)
        copy = BoxCopy(self.tma.q, self.boxes.q, TILE_M, head, outer)
        for q_tile in cutlass.range_constexpr(c.q_tiles):
            barrier = self.rings[f"q{q_tile}"].acquire(state)
            row = work.info.offset_q + work.first_token + q_tile * c.tokens
            copy.load(self.storage.q[q_tile], 0, row, Int32(c.tokens), barrier)

    def load_k(self, work: TileWork, iteration: Int32, state: RingState):
        """One block of K into its stage."""
        c = self.config
        barrier = self.rings["kv"].acquire(state, c.k_bytes)
        target = self.storage.k + state.stage * (c.stage_bytes // c.dtype_k.bytes)
        self.copies.load(self.k, target, work, iteration, barrier)

    def load_v(self, work: TileWork, iteration: Int32, state: RingState):
        """One block of V into its stage."""
        c = self.config
        barrier = self.rings["kv"].acquire(state, c.v_bytes)
        target = self.storage.v + state.stage * (c.stage_bytes // c.dtype_v.bytes)
        self.copies.load(self.v, target, work, iteration, barrier)
