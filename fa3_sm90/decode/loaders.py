"""The producer warps: one brings K and V into shared memory by TMA, the other the rows of Q, which lie anywhere."""

import cutlass
import cutlass.cute as cute
from cutlass import Int32, const_expr

from cute_fa.device.dtypes import CUTE_DTYPE
from cute_fa.device.key_copies import KeyCopies
from cute_fa.device.ring import Ring, RingState, ring_next, ring_start
from cute_fa.device.split_arguments import SplitArguments
from cute_fa.device.split_parts import row_place
from cute_fa.device.split_walk import Piece, SplitWalk
from fa3_sm90.common.products import tiles
from fa3_sm90.common.wgmma import WGMMA_M
from fa3_sm90.decode.arguments import TmaTensors
from fa3_sm90.decode.config import Fa3DecodeConfig
from fa3_sm90.decode.storage import Storage

_CHUNK = 8  # elements, 16 bytes


class KeyLoader:
    """One warp: K and V of every block of the CTA's share. It runs ahead of the consumers, over the ends of tiles."""

    def __init__(
        self, config: Fa3DecodeConfig, args: SplitArguments, tma: TmaTensors, storage: Storage, rings: dict[str, Ring]
    ):
        self.config, self.args, self.storage, self.rings = config, args, storage, rings
        self.k, self.v = tma.tiles(config)
        self.copies = KeyCopies(config, args.common)

    @cute.jit
    def run(self):
        """Walk over the CTA's share."""
        walk = SplitWalk(self.config, self.args.common, self.args.grid)
        valid, piece_at, advance, load_piece = walk.valid, walk.piece, walk.next, self.load_piece
        keys = ring_start()
        state = walk.first(cute.arch.block_idx()[0])
        while valid(state):
            piece = piece_at(state)
            keys = load_piece(piece, keys)
            state = advance(state, piece)

    @cute.jit
    def load_piece(self, piece: Piece, keys: RingState) -> RingState:
        """The blocks of a piece, from this state of the rings on; returns the next one."""
        load, stages = self.load, self.config.stages
        for iteration in cutlass.range(piece.start, piece.stop, unroll=1):
            load("k", piece, iteration, keys)
            load("v", piece, iteration, keys)
            keys = ring_next(keys, stages)
        return keys

    def load(self, name: str, piece: Piece, iteration: Int32, state: RingState):
        """A block of K or V into its stage."""
        tensor = getattr(self, name)
        barrier = self.rings[name].acquire(state)
        target = getattr(self.storage, name) + state.stage * (tensor.rows * tensor.columns)
        self.copies.load(tensor, target, piece.work(), piece.head, iteration, barrier)


class QueryLoader:
    """One warp: the rows of a tile's queries, of all query heads of the kv head."""

    def __init__(self, config: Fa3DecodeConfig, args: SplitArguments, storage: Storage, ring: Ring):
        self.config, self.args, self.ring = config, args, ring
        dtype = CUTE_DTYPE[config.dtype]
        self.tiles = tiles(storage.q, dtype, WGMMA_M, config.head_dim_padded, config.row_groups)
        self.copy = cute.make_copy_atom(cute.nvgpu.CopyUniversalOp(), dtype, num_bits_per_copy=128)
        self.chunk = cute.make_rmem_tensor(_CHUNK, dtype)

    @cute.jit
    def run(self):
        """Walk over the CTA's share."""
        walk = SplitWalk(self.config, self.args.common, self.args.grid)
        valid, piece_at, advance = walk.valid, walk.piece, walk.next
        load_rows, wait_free, publish, gqa_ratio = (
            self.load_rows,
            self.ring.wait_free,
            self.ring.publish,
            walk.gqa_ratio,
        )
        queries = ring_start()
        state = walk.first(cute.arch.block_idx()[0])
        while valid(state):
            piece = piece_at(state)
            wait_free(queries)
            load_rows(piece, gqa_ratio)
            publish(queries.stage)
            queries = ring_next(queries, 1)
            state = advance(state, piece)

    @cute.jit
    def load_rows(self, piece: Piece, gqa_ratio: Int32):
        """Rows of those warps that have any, zeros where there is no query that counts. What the other rows hold is not
        looked at."""
        c, load_chunk = self.config, self.load_chunk
        rows = cutlass.min(c.tile_m, (piece.info.rows_q * gqa_ratio - piece.first_row + 15) // 16 * 16)
        chunks = c.head_dim_padded // _CHUNK
        for i in cutlass.range(cute.arch.lane_idx(), rows * chunks, 32, unroll=4):
            load_chunk(piece, gqa_ratio, i // chunks, i % chunks)

    @cute.jit
    def load_chunk(self, piece: Piece, gqa_ratio: Int32, row: Int32, chunk: Int32):
        """16 bytes of a row."""
        c, place = self.config, row_place(piece, gqa_ratio, row)
        values = cute.make_rmem_tensor_like(self.chunk)
        values.fill(0)
        if place.counts & (chunk * _CHUNK < c.head_dim):
            q = self.args.common.q
            if const_expr(c.cu_seqlens_q):
                source = q[piece.info.offset_q + place.query, place.head, None]
            else:
                source = q[piece.batch, place.query, place.head, None]
            cute.copy(self.copy, cute.local_tile(source, (_CHUNK,), (chunk,)), values)
        target = self.tiles[row % WGMMA_M, None, row // WGMMA_M]
        cute.copy(self.copy, values, cute.local_tile(target, (_CHUNK,), (chunk,)))
