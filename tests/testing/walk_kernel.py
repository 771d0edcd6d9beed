"""A kernel that only walks the tiles of a scheduler and writes them down, and what it wrote as Python lists."""

from functools import cache
from typing import NamedTuple, Optional

import cutlass
import cutlass.cute as cute
import numpy as np
import torch
from cutlass import Int32, const_expr

import ptxsim
from cute_fa.device.tile_scheduler import TileGrid, TileState, VarlenState, make_scheduler

TILE_TOKENS = 16
THREADS = 64  # two warps, which walk by themselves as the roles of a kernel do


class Args(NamedTuple):
    grid: TileGrid
    records: cute.Tensor  # (CTAs, tiles of a CTA, threads, 3)
    cu_seqlens_q: Optional[cute.Tensor]
    starts: Optional[cute.Tensor]  # (CTAs): begin with what follows this tile index instead of with ``first``
    num_ctas: Int32


class Walk:
    """``records[cta, i, thread]`` = (m_block, head, batch) of the i-th tile of the CTA. ``cluster``: CTAs that walk
    together."""

    def __init__(self, longest_first: bool, persistent: bool, cluster: int):
        self.longest_first, self.persistent, self.cluster = longest_first, persistent, cluster

    @cute.jit
    def __call__(self, args: Args, stream):
        self.kernel(args).launch(grid=(args.num_ctas, 1, 1), block=(THREADS, 1, 1), stream=stream)

    @cute.kernel
    def kernel(self, args: Args):
        thread, _, _ = cute.arch.thread_idx()
        cta, _, _ = cute.arch.block_idx()
        scheduler = make_scheduler(
            args.grid,
            longest_first=self.longest_first,
            persistent=self.persistent,
            cu_seqlens_q=args.cu_seqlens_q,
            tile_tokens=TILE_TOKENS,
            ctas=self.cluster,
        )
        valid, tile_of, following, records = scheduler.valid, scheduler.tile, scheduler.next, args.records
        state = scheduler.first()
        if const_expr(args.starts is not None):
            start = args.starts[cta]
            packed = args.cu_seqlens_q is not None
            state = following(VarlenState(start, Int32(0), Int32(0)) if packed else TileState(start))
        i = Int32(0)
        while valid(state):
            m_block, head, batch = tile_of(state)
            records[cta, i, thread, 0] = m_block
            records[cta, i, thread, 1] = head
            records[cta, i, thread, 2] = batch
            state = following(state)
            i += 1


@cache
def compiled(longest_first: bool, persistent: bool, packed: bool, started: bool, cluster: int):
    """The kernel for tensors of any size, called as ``function(args)``."""

    def vector():
        return cute.runtime.make_fake_tensor(cutlass.Int32, (cute.sym_int(),), stride=(1,), assumed_align=4)

    shape = (cute.sym_int(), cute.sym_int(), THREADS, 3)
    records = cute.runtime.make_fake_tensor(cutlass.Int32, shape, stride=(cute.sym_int64(), THREADS * 3, 3, 1))
    grid = TileGrid(*[Int32(0)] * 4)
    args = Args(grid, records, vector() if packed else None, vector() if started else None, Int32(0))
    stream = cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True)
    return cute.compile(Walk(longest_first, persistent, cluster), args, stream, options="--enable-tvm-ffi")


def walk(
    simulation: ptxsim.Simulation,
    grid: tuple[int, int, int, int],
    num_ctas: int,
    capacity: int,
    *,
    longest_first: bool,
    persistent: bool,
    lengths: list[int] | None = None,
    starts: list[int] | None = None,
    cluster: int = 1,
) -> list[list[tuple[int, int, int]]]:
    """For each CTA its tiles (m_block, head, batch) in order; all its threads agree on them.

    ``grid``: the fields of TileGrid; ``capacity``: most tiles of a CTA, beyond it the simulator stops the kernel;
    ``lengths``: of packed sequences; ``starts``: for each CTA the tile index, as int32, after which it begins;
    ``cluster``: CTAs that walk together.
    """

    def int32(values):
        return None if values is None else torch.tensor(values, dtype=torch.int32)

    cu_seqlens = None if lengths is None else np.cumsum([0, *lengths])
    records = torch.full((num_ctas, capacity, THREADS, 3), -1, dtype=torch.int32)
    function = compiled(longest_first, persistent, lengths is not None, starts is not None, cluster)
    simulation.call(function, (grid, records, int32(cu_seqlens), int32(starts), num_ctas))
    assert (records == records[:, :, :1]).all(), "threads of a CTA differ"
    return [[tuple(tile) for tile in cta if tile[0] != -1] for cta in records[:, :, 0].tolist()]
