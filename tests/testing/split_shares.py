"""A kernel that only walks over the shares of a cut of key blocks, and what it wrote as Python lists."""

from functools import cache
from typing import NamedTuple

import cutlass.cute as cute
import torch
from cutlass import Int32

import ptxsim
from cute_fa.device.fake_arguments import fake_vector
from cute_fa.device.split_arguments import SplitArguments
from cute_fa.device.split_forward import Launch
from cute_fa.device.split_walk import SplitWalk
from fa2_sm80.split.config import Fa2SplitConfig


class Share(NamedTuple):
    """A piece of a CTA's share, as of ``cute_fa.device.split_walk.Piece``."""

    cta: int
    batch: int
    head: int
    tile: int
    start: int
    stop: int
    whole: bool
    slot: int


class Shares:
    """``records[cta, i]`` = (1, batch, head, tile, start, stop, whole, slot) of the i-th piece of the CTA."""

    def __init__(self, config: Fa2SplitConfig):
        self.config = config

    @cute.jit
    def __call__(self, args: SplitArguments, records: cute.Tensor, stream):
        self.kernel(args, records).launch(grid=(args.grid.ctas, 1, 1), block=(32, 1, 1), stream=stream)

    @cute.kernel
    def kernel(self, args: SplitArguments, records: cute.Tensor):
        cta, _, _ = cute.arch.block_idx()
        walk = SplitWalk(self.config, args.common, args.grid)
        valid, piece_at, advance = walk.valid, walk.piece, walk.next
        state, i = walk.first(cta), Int32(0)
        while valid(state):
            piece = piece_at(state)
            records[cta, i, 0] = 1
            records[cta, i, 1] = piece.batch
            records[cta, i, 2] = piece.head
            records[cta, i, 3] = piece.tile
            records[cta, i, 4] = piece.start
            records[cta, i, 5] = piece.stop
            records[cta, i, 6] = Int32(piece.whole)
            records[cta, i, 7] = piece.slot
            state = advance(state, piece)
            i += 1


@cache
def _compiled(config: Fa2SplitConfig):
    stream = cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True)
    given = SplitArguments.fakes(config), fake_vector(Int32, 3)
    return cute.compile(Shares(config), *given, stream, options="--enable-tvm-ffi")


def shares(simulation: ptxsim.Simulation, config: Fa2SplitConfig, launch: Launch, pieces: int) -> list[Share]:
    """What each CTA computes, in its order, CTA after CTA; ``pieces``: as many as one may have."""
    records = torch.zeros((launch.grid.ctas, pieces + 1, 8), dtype=torch.int32)
    simulation.call(_compiled(config), launch, records)
    assert not records[:, pieces].any()
    return [
        Share(cta, *fields[:5], bool(fields[5]), fields[6])
        for cta, of_cta in enumerate(records.tolist())
        for there, *fields in of_cta
        if there
    ]
