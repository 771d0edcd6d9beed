"""The load warp: brings Q, K and V into shared memory by TMA."""

import cutlass
import cutlass.cute as cute
from cutlass import Int32, const_expr

from cute_fa.device.forward_arguments import Boxes
from cute_fa.device.key_copies import KeyCopies, KeyTensor
from cute_fa.device.ring import RingState, ring_next, ring_start
from cute_fa.device.tile_work import TileWork, kv_head
from cute_fa.device.tma_boxes import BoxCopy
from fa4_sm100.forward.config import TILE_M
from fa4_sm100.forward.cta import Cta


class Loader:
    """One warp. Order of the copies: K0, Q of each tile, then V0, K1, V1 …, as the products need them."""

    def __init__(self, cta: Cta):
        self.cta, self.config, self.tma = cta, cta.config, cta.tma
        self.storage, self.rings = cta.storage, cta.rings
        self.boxes = Boxes.of(cta.config)
        self.copies = KeyCopies(cta.config, cta.common)
        c, boxes = cta.config, self.boxes
        self.k = KeyTensor(cta.tma.k, boxes.k, c.tile_keys, c.head_dim_padded)
        self.v = KeyTensor(cta.tma.v, boxes.v, c.tile_n, c.loaded_columns, c.key_major_v)
        if c.ctas > 1:
            self.k = self.k._replace(first_key=cta.rank * c.tile_keys)
            self.v = self.v._replace(first_panel=cta.rank * (c.value_columns // boxes.v.columns))

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
        if const_expr(self.config.ctas > 1):
            self.wait_for_last_releases(queries, keys)

    def wait_for_last_releases(self, queries: RingState, keys: RingState):
        """Of a pair neither CTA may end before what the other one's products release has arrived at its barriers."""
        if self.config.own_output:
            for q_tile in range(self.config.q_tiles):
                self.rings[f"q{q_tile}"].wait_free(queries)
        for _ in range(self.config.stages):
            self.rings["kv"].wait_free(keys)
            keys = ring_next(keys, self.config.stages)

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
            barrier = self.acquire(f"q{q_tile}", state, self.rings[f"q{q_tile}"].spec.stage_bytes)
            row = work.info.offset_q + self.cta.first_token(work, q_tile)
            copy.load(self.storage.q[q_tile], 0, row, Int32(c.tokens), barrier)

    def load_k(self, work: TileWork, iteration: Int32, state: RingState):
        """One block of K into its stage."""
        c = self.config
        barrier = self.acquire("kv", state, c.k_bytes)
        target = self.storage.k + state.stage * (c.stage_bytes // c.dtype_k.bytes)
        self.copies.load(self.k, target, work, self.head(work), iteration, barrier)

    def load_v(self, work: TileWork, iteration: Int32, state: RingState):
        """One block of V into its stage."""
        c = self.config
        barrier = self.acquire("kv", state, c.v_bytes)
        target = self.storage.v + state.stage * (c.stage_bytes // c.dtype_v.bytes)
        self.copies.load(self.v, target, work, self.head(work), iteration, barrier)

    def head(self, work: TileWork) -> Int32:
        """The tile's kv head."""
        return kv_head(self.cta.common, self.config.pack_gqa, work.tile.head)

    @cute.jit
    def acquire(self, ring: cutlass.Constexpr[str], state: RingState, stage_bytes: cutlass.Constexpr[int]):
        """Wait until the CTA's own stage is free; the barrier that copies of ``stage_bytes`` count on, which is the
        first CTA's of a pair, for both."""
        barriers, ctas, rank = self.rings[ring], self.config.ctas, self.cta.rank
        wait_free, expect = barriers.wait_free, barriers.expect
        wait_free(state)
        if const_expr(ctas == 1):
            expect(state.stage, stage_bytes)
        else:
            if rank == 0:
                expect(state.stage, ctas * stage_bytes)
        return barriers.full + state.stage
