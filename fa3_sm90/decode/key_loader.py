"""The producer warp that brings K and V into shared memory by TMA."""

import cutlass
import cutlass.cute as cute
from cutlass import Int32, const_expr

from cute_fa.device.chunk_walk import make_walk
from cute_fa.device.key_copies import KeyCopies
from cute_fa.device.ring import Ring, RingState, ring_next, ring_start
from cute_fa.device.split_arguments import SplitArguments
from cute_fa.device.split_walk import Piece
from fa3_sm90.decode.arguments import TmaTensors
from fa3_sm90.decode.config import Fa3DecodeConfig
from fa3_sm90.decode.descales import DescaleCopies
from fa3_sm90.decode.storage import Storage


class KeyLoader:
    """One warp: K and V of every block of the CTA's share. It runs ahead of the consumers, over the ends of tiles."""

    def __init__(
        self, config: Fa3DecodeConfig, args: SplitArguments, tma: TmaTensors, storage: Storage, rings: dict[str, Ring]
    ):
        self.config, self.args, self.storage, self.rings = config, args, storage, rings
        self.tensors = tma.tiles(config)
        self.copies = KeyCopies(config, args.common)
        self.descales = None
        if const_expr(config.row_descales):
            self.descales = DescaleCopies(config, args.common, storage)

    @cute.jit
    def run(self):
        """Walk over the CTA's share."""
        walk = make_walk(self.config, self.args.common, self.args.grid)
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
        c, load = self.config, self.load
        names, stages = tuple(self.tensors), c.code_stages if c.widens else c.stages
        for iteration in cutlass.range(piece.start, piece.stop, unroll=1):
            for name in names:
                load(name, piece, iteration, keys)
            keys = ring_next(keys, stages)
        return keys

    def load(self, name: str, piece: Piece, iteration: Int32, state: RingState):
        """A block of K or V, or of their codes, into its stage; with those of K descales of the keys' rows."""
        tensor = self.tensors[name]
        barrier = self.rings[name].acquire(state)
        target = getattr(self.storage, name) + state.stage * (tensor.rows * tensor.columns)
        self.copies.load(tensor, target, piece.work(), piece.head, iteration, barrier)
        if name == "k_codes" and self.descales is not None:
            block = piece.blocks.block(iteration, self.args.common.window)
            self.descales.start(piece, block * self.config.tile_n, state.stage)
            self.rings[name].signal_behind_copies(state.stage)
