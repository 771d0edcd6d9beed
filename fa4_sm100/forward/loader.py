"""The load warp: brings Q, K and V into shared memory by TMA."""

import cutlass
import cutlass.cute as cute
from cutlass import Int32, const_expr

from cute_fa.device.key_copies import KeyCopies, KeyTensor
from cute_fa.device.ring import RingState, ring_next, ring_start
from cute_fa.device.tile_work import TileWork
from cute_fa.device.tma_boxes import BoxCopy
from fa4_sm100.forward.config import TILE_M
from fa4_sm100.forward.cta import Cta
from fa4_sm100.forward.storage import Boxes


class Loader:
    """One warp. Order of the copies: K0, Q of each tile, then V0, K1, V1 …, as the products need them."""

    def __init__(self, cta: Cta):
        self.cta, self.config, self.tma = cta, cta.config, cta.tma
        self.storage, self.rings = cta.storage, cta.rings
        self.boxes = Boxes.of(cta.config)
        self.copies = KeyCopies(cta.config, cta.common)
        self.k = KeyTensor(cta.tma.k, self.boxes.k, cta.config.head_dim_padded, False)
        self.v = KeyTensor(cta.tma.v, self.boxes.v, cta.config.loaded_columns, cta.config.key_major_v)

    @cute.jit
    def run(self):
        """Walk over the CTA's tiles."""
        work, load_tile, scheduler = self.cta.work, self.load_tile, self.cta.scheduler()
        valid, tile, advance = scheduler.valid, scheduler.tile, scheduler.next
        queries, keys = ring_start(), ring_start()
        state = scheduler.first()
        while valid(state):
            keys = load_tile(work(tile(state)), queries, keys)
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
            row = work.info.offset_q + self.cta.first_token(work, q_tile)
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
