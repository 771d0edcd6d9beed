"""A kernel that only asks which tile of keys each CTA of the Hopper backward has, and what it said as a Python list."""

from functools import cache
from types import SimpleNamespace
from typing import NamedTuple, Optional

import cutlass.cute as cute
import torch
from cutlass import Int32

import ptxsim
from fa3_sm90.backward.config import Fa3BackwardConfig
from fa3_sm90.backward.work import key_tile


class Args(NamedTuple):
    records: cute.Tensor  # int32 (CTAs, 3)
    seqlen_k: Int32
    heads_kv: Int32
    batches: Int32
    head_group: Optional[Int32]


class KeyTiles:
    """``records[cta]`` = (n_block, head_kv, batch) of a CTA."""

    def __init__(self, config: Fa3BackwardConfig):
        self.config = config

    @cute.jit
    def __call__(self, args: Args, stream):
        self.kernel(args).launch(grid=(args.records.shape[0], 1, 1), block=(32, 1, 1), stream=stream)

    @cute.kernel
    def kernel(self, args: Args):
        cta, _, _ = cute.arch.block_idx()
        common = SimpleNamespace(k=SimpleNamespace(shape=(args.heads_kv, 1)), batches=args.batches)
        given = SimpleNamespace(seqlen_k=args.seqlen_k, head_group=args.head_group, common=common)
        n_block, head_kv, batch = key_tile(self.config, given, cta)
        args.records[cta, 0] = n_block
        args.records[cta, 1] = head_kv
        args.records[cta, 2] = batch


@cache
def _compiled(config: Fa3BackwardConfig):
    records = cute.runtime.make_fake_tensor(Int32, (cute.sym_int(), 3), stride=(3, 1))
    args = Args(records, *[Int32(1)] * 3, Int32(1) if config.longest_first else None)
    stream = cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True)
    return cute.compile(KeyTiles(config), args, stream, options="--enable-tvm-ffi")


def key_tiles(
    simulation: ptxsim.Simulation,
    config: Fa3BackwardConfig,
    seqlen_k: int,
    heads_kv: int,
    batches: int,
    head_group: int | None,
) -> list[tuple[int, int, int]]:
    """(n_block, head_kv, batch) of each CTA in the order in which they are handed out; ``head_group``: as of
    ``cute_fa.device.backward_arguments.BackwardArguments``."""
    tiles = -(-seqlen_k // config.tile_n) * heads_kv * batches
    records = torch.full((tiles, 3), -1, dtype=torch.int32)
    simulation.call(_compiled(config), (records, seqlen_k, heads_kv, batches, head_group))
    return [tuple(tile) for tile in records.tolist()]
