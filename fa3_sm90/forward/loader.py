"""The producer warp: brings Q, K and V into shared memory by TMA."""

import cutlass
import cutlass.cute as cute
from cutlass import Int32, const_expr

from cute_fa.device.ring import Ring, RingState, ring_next, ring_start
from cute_fa.device.tma_boxes import BoxCopy
from fa3_sm90.forward.arguments import Extents, ForwardArguments, TileWork, TmaTensors, kv_head, scheduler_of, tile_work
from fa3_sm90.forward.config import WGMMA_M, Fa3ForwardConfig
from fa3_sm90.forward.descales import BlockDescales
from fa3_sm90.forward.storage import Boxes, Storage


class Loader:
    """One warp. Order of the copies: K0, Q, then K1, V0, K2, V1 …: each is needed about when it arrives."""

    def __init__(
        self,
        config: Fa3ForwardConfig,
        args: ForwardArguments,
        tma: TmaTensors,
        extents: Extents,
        storage: Storage,
        rings: dict[str, Ring],
    ):
        self.config, self.args, self.tma, self.extents = config, args, tma, extents
        self.storage, self.rings = storage, rings
        self.boxes = Boxes.of(config)
        self.block_descales = BlockDescales(config, args, storage)

    @cute.jit
    def run(self):
        """Walk over the CTA's tiles."""
        args, config, extents = self.args, self.config, self.extents
        scheduler = scheduler_of(args, config)
        valid, tile, advance, load_tile = scheduler.valid, scheduler.tile, scheduler.next, self.load_tile
        queries, keys = ring_start(), ring_start()
        state = scheduler.first()
        while valid(state):
            keys = load_tile(tile_work(args, config, extents, tile(state)), queries, keys)
            queries = ring_next(queries, 1)
            state = advance(state)

    @cute.jit
    def load_tile(self, work: TileWork, queries: RingState, keys: RingState) -> RingState:
        """All loads of one tile, from these states of the rings on; returns the next one of K and V."""
        load_k, load_v, stages = self.load_k, self.load_v, self.config.stages
        load_k(work, Int32(0), keys)
        self.load_q(work, queries)
        for iteration in cutlass.range(1, work.blocks.total, unroll=1):
            values, keys = keys, ring_next(keys, stages)
            load_k(work, iteration, keys)
            load_v(work, iteration - 1, values)
        load_v(work, work.blocks.total - 1, keys)
        return ring_next(keys, stages)

    @cute.jit
    def load_q(self, work: TileWork, state: RingState):
        """Each warpgroup's queries, on a barrier of their own. Rows beyond the sequence are whatever lies there: they
        take no part in other rows and are not stored."""
        c = self.config
        head, batch = work.tile.head * c.pack_gqa, work.tile.batch
        outer = () if const_expr(c.cu_seqlens_q) else (batch,)
        copy = BoxCopy(self.tma.q, self.boxes.q, WGMMA_M, head, outer)
        for wg in cutlass.range_constexpr(c.warpgroups):
            barrier = self.rings[f"q{wg}"].acquire(state)
            row = work.info.offset_q + work.first_token + wg * c.tokens
            copy.load(self.storage.q[wg], 0, row, Int32(c.tokens), barrier)

    def load_k(self, work: TileWork, iteration: Int32, state: RingState):
        """One block of K, and what its keys' descales make of scores and O."""
        if const_expr(self.config.block_descales):
            factors = self.block_descales.factors(work, iteration)
            self.rings["k"].wait_free(state)
            with cute.arch.elect_one():
                self.block_descales.put(factors, state.stage)
        self.load_keys("k", work, iteration, state)

    def load_v(self, work: TileWork, iteration: Int32, state: RingState):
        """One block of V."""
        if const_expr(self.config.key_major_v):
            self.load_key_major(work, iteration, state)
        else:
            self.load_keys("v", work, iteration, state)

    @cute.jit
    def load_key_major(self, work: TileWork, iteration: Int32, state: RingState):
        """One block of V whose keys are contiguous; zeros beyond the tensor's last key."""
        c, box = self.config, self.boxes.v
        head = kv_head(self.args, c, work.tile.head)
        barrier = self.rings["v"].acquire(state)
        target = self.storage.v + state.stage * (c.tile_n * c.head_dim_v_padded)
        panels = c.tile_n // box.columns
        first_panel = work.blocks.block(iteration, self.args.common.window) * panels
        copy = BoxCopy(self.tma.v, box, c.head_dim_v_padded, head, (work.tile.batch,), panels)
        copy.load(target, 0, Int32(0), Int32(c.head_dim_v), barrier, first_panel)

    @cute.jit
    def load_keys(self, name: cutlass.Constexpr[str], work: TileWork, iteration: Int32, state: RingState):
        """One block of K or V into its stage. What lies beyond the sequence's last key arrives as zeros: hidden scores
        are replaced, but 0 · NaN of V would not be 0."""
        c, info = self.config, work.info
        tma, box = getattr(self.tma, name), getattr(self.boxes, name)
        columns = c.head_dim_padded if const_expr(name == "k") else c.value_columns
        head = kv_head(self.args, c, work.tile.head)
        barrier = self.rings[name].acquire(state)
        target = getattr(self.storage, name) + state.stage * (c.tile_n * columns)
        first_key = work.blocks.block(iteration, self.args.common.window) * c.tile_n
        if const_expr(c.page_size is None):
            outer = () if const_expr(c.cu_seqlens_k) else (self.args.common.key_batch(work.tile.batch),)
            copy = BoxCopy(tma, box, c.tile_n, head, outer)
            copy.load(target, 0, info.offset_k + first_key, info.seqlen_k - first_key, barrier)
        else:
            self.load_pages(tma, box, target, head, first_key, work, barrier)

    @cute.jit
    def load_pages(self, tma, box, target, head, first_key: Int32, work: TileWork, barrier):
        """A block from its pages, one box a piece. Each lane looks one page up; pages beyond the sequence are not: all
        of their rows are out of bounds, so that TMA reads nothing and writes zeros."""
        c = self.config
        lane = cute.arch.lane_idx()
        seqlen_k = work.info.seqlen_k
        pieces = c.tile_n // c.key_rows
        sequence = self.args.common.key_batch(work.tile.batch)
        own = first_key + lane * c.key_rows
        page = Int32(0)
        if lane < pieces and own < seqlen_k:
            page = self.args.common.page_table[sequence, own // c.page_size]
        for piece in cutlass.range_constexpr(pieces):
            key = first_key + piece * c.key_rows
            listed = cute.arch.shuffle_sync(page, piece)
            copy = BoxCopy(tma, box, c.tile_n, head, (listed,))
            copy.load(target, piece * c.key_rows, key % c.page_size, seqlen_k - key, barrier)
