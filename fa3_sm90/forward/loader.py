"""The producer warp: brings Q, K and V into shared memory by TMA."""

import cutlass
import cutlass.cute as cute
from cutlass import Int32, const_expr

from cute_fa.device.forward_arguments import Boxes, ForwardArguments, TmaTensors
from cute_fa.device.key_copies import KeyCopies, KeyTensor
from cute_fa.device.ring import Ring, RingState, ring_next, ring_start
from cute_fa.device.tile_work import Extents, TileWork, kv_head, scheduler_of, tile_work
from cute_fa.device.tma_boxes import BoxCopy
from fa3_sm90.common.wgmma import WGMMA_M
from fa3_sm90.forward.cluster import cluster_rank, place_of
from fa3_sm90.forward.config import Fa3ForwardConfig
from fa3_sm90.forward.descales import BlockDescales
from fa3_sm90.forward.storage import Storage


class Loader:
    """One warp. Order of the copies: K0, Q, then K1, V0, K2, V1 …: each is needed about when it arrives. In a cluster
    each CTA's brings its own Q, and of every block the keys that are its part, to all CTAs."""

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
        self.copies = KeyCopies(config, args.common)
        self.tensors = {
            "k": KeyTensor(tma.k, self.boxes.k, config.tile_n, config.head_dim_padded),
            "v": KeyTensor(tma.v, self.boxes.v, config.tile_n, config.loaded_columns, config.key_major_v),
        }
        if config.cluster > 1:
            part = {"first_key": cluster_rank(config) * config.key_rows, "ctas": config.cluster}
            self.tensors = {name: tensor._replace(**part) for name, tensor in self.tensors.items()}
        self.block_descales = BlockDescales(config, args, storage)

    @cute.jit
    def run(self):
        """Walk over the CTA's tiles."""
        args, config, extents = self.args, self.config, self.extents
        scheduler = scheduler_of(args.common, args.grid, config, ctas=config.cluster)
        valid, tile, advance, load_tile = scheduler.valid, scheduler.tile, scheduler.next, self.load_tile
        queries, keys = ring_start(), ring_start()
        state = scheduler.first()
        while valid(state):
            keys = load_tile(tile_work(args.common, config, extents, tile(state)), queries, keys)
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
            row = work.info.offset_q + work.first_token + place_of(c, wg) * c.tokens
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
        self.load_keys("v", work, iteration, state)

    @cute.jit
    def load_keys(self, name: cutlass.Constexpr[str], work: TileWork, iteration: Int32, state: RingState):
        """One block of K or V into its stage."""
        c, tensor = self.config, self.tensors[name]
        barrier = self.rings[name].acquire(state)
        target = getattr(self.storage, name) + state.stage * (c.tile_n * tensor.columns)
        if const_expr(c.cluster > 1):
            target += tensor.first_key * tensor.box.columns
        head = kv_head(self.args.common, c.pack_gqa, work.tile.head)
        self.copies.load(tensor, target, work, head, iteration, barrier)
