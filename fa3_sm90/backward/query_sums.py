"""dQ on its way to global memory: consumers leave it in shared memory, a warp of its own adds it up there."""

from typing import Optional

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, const_expr
from cutlass.cute.arch import inline_ptx

from cute_fa.device.backward_arguments import BackwardArguments, scratch_address
from fa3_sm90.backward.config import CONSUMERS, Fa3BackwardConfig
from fa3_sm90.backward.storage import Storage
from fa3_sm90.backward.turns import Turns
from fa3_sm90.backward.work import KeyWork
from fa3_sm90.common.wgmma import WARPGROUP

# Named barriers, a pair for each consumer warpgroup: dQ is there, its place is free. 0 is the CTA's own, 1 the
# consumers'.
_FULL, _FREE = 2, 2 + CONSUMERS
_THREADS = WARPGROUP + 32


class QuerySums:
    """The place of one step's dQ in shared memory, and both sides of it."""

    def __init__(self, config: Fa3BackwardConfig, storage: Storage):
        self.config, self.storage = config, storage

    @cute.jit
    def run(self, args: BackwardArguments, work: KeyWork, turns: Optional[Turns]):
        """The storing warp: all steps of a tile, with ``turns`` each when it is its turn."""
        add = self.add
        for index in cutlass.range(work.heads, unroll=1):
            for iteration in cutlass.range(work.blocks.total, unroll=1):
                add(args, work, work.first_head + index, work.blocks.block(iteration), turns)
        if const_expr(turns is None):
            cute.arch.cp_async_bulk_wait_group(0, read=True)

    def add(self, args: BackwardArguments, work: KeyWork, head: Int32, block: Int32, turns: Optional[Turns]):
        """One step's dQ. Behind a turn nothing reads dQ's place any more: it was passed on when all had been added."""
        c = self.config
        target = scratch_address(args.scratch.dq, work.first_tile + block, head)
        for wg in range(CONSUMERS):
            if const_expr(turns is None):
                cute.arch.cp_async_bulk_wait_group(CONSUMERS - 1 - wg, read=True)
            self.hand_back(wg)
        if const_expr(turns is not None):
            turns.wait(head, block)
        for wg in range(CONSUMERS):
            self.receive(wg)
            with cute.arch.elect_one():
                add_bulk(target + wg * c.dq_bytes, self.place(wg), c.dq_bytes)
                if const_expr(turns is None):
                    cute.arch.cp_async_bulk_commit_group()
        if const_expr(turns is not None):
            turns.pass_on(head, block)

    def place(self, wg: int | Int32) -> cute.Pointer:
        """Of a warpgroup's dQ."""
        return self.storage.dq + wg * (self.config.dq_bytes // 4)

    def hand_back(self, wg: int):
        """Storing warp: the place is free."""
        cute.arch.barrier_arrive(barrier_id=_FREE + wg, number_of_threads=_THREADS)

    def receive(self, wg: int):
        """Storing warp: wait until dQ is there."""
        cute.arch.barrier(barrier_id=_FULL + wg, number_of_threads=_THREADS)


class QuerySumsWriter:
    """The consumers' side, of one warpgroup."""

    def __init__(self, sums: QuerySums, index: Int32, thread: Int32):
        self.full = cute.arch.make_warp_uniform(_FULL + index)
        self.free = cute.arch.make_warp_uniform(_FREE + index)
        self.address = cute.arch.make_warp_uniform(sums.place(index).toint()) + thread * 16

    def put(self, acc: cute.Tensor):
        """Quad e of thread t at (e · 128 + t) · 16 bytes."""
        cute.arch.barrier(barrier_id=self.free, number_of_threads=_THREADS)
        for quad in range(cute.size(acc) // 4):
            inline_ptx(
                f"st.shared.v4.f32 [{{$r0}}+{quad * 16 * WARPGROUP}], {{{{$r1}}, {{$r2}}, {{$r3}}, {{$r4}}}};",
                read_only_args=[self.address, *(acc[4 * quad + e] for e in range(4))],
            )
        cute.arch.fence_proxy("async.shared", space="cta")
        cute.arch.barrier_arrive(barrier_id=self.full, number_of_threads=_THREADS)


def add_bulk(target: Int64, source: cute.Pointer, size: int):
    """Add ``size`` bytes of fp32 to global memory, by one thread."""
    inline_ptx(
        f"cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [{{$r0}}], [{{$r1}}], {size};",
        read_only_args=[target, source.toint()],
    )
