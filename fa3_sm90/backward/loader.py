"""The producer warp: brings K and V, then for every step Q, dO and their statistics, by TMA."""

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, const_expr
from cutlass.cute.arch import inline_ptx

from cute_fa.device.backward_arguments import BackwardArguments, scratch_address
from cute_fa.device.ring import Ring, RingState, ring_next, ring_start
from cute_fa.device.tma_boxes import BoxCopy
from fa3_sm90.backward.arguments import Boxes, TmaTensors
from fa3_sm90.backward.config import Fa3BackwardConfig
from fa3_sm90.backward.storage import Storage
from fa3_sm90.backward.work import KeyWork


class Loader:
    """One warp."""

    def __init__(
        self,
        config: Fa3BackwardConfig,
        args: BackwardArguments,
        tma: TmaTensors,
        storage: Storage,
        rings: dict[str, Ring],
        boxes: Boxes,
    ):
        self.config, self.args, self.tma, self.storage, self.rings = config, args, tma, storage, rings
        self.boxes = boxes

    @cute.jit
    def run(self, work: KeyWork):
        """All loads of a tile of keys."""
        load_keys, load_step, c = self.load_keys, self.load_step, self.config
        load_keys(work)
        state = ring_start()
        for index in cutlass.range(work.heads, unroll=1):
            for iteration in cutlass.range(work.blocks.total, unroll=1):
                before = index + iteration  # 0: no step
                load_step(work, work.first_head + index, work.blocks.block(iteration), before, state)
                state = ring_next(state, c.stages)

    def load_keys(self, work: KeyWork):
        """K and V of the tile."""
        c, info = self.config, work.info
        outer = () if const_expr(c.cu_seqlens_k) else (work.batch,)
        first = work.first_key(c)
        for name, columns in (("k", c.head_dim_padded), ("v", c.head_dim_v_padded)):
            box = getattr(self.boxes, name)
            copy = BoxCopy(getattr(self.tma, name), box, c.tile_n, work.head_kv, outer, columns // box.columns)
            barrier = self.rings[name].acquire(ring_start())
            copy.load(getattr(self.storage, name), 0, info.offset_k + first, info.seqlen_k - first, barrier)

    @cute.jit
    def load_step(self, work: KeyWork, head: Int32, block: Int32, before: Int32, state: RingState):
        """Q and dO of a block of queries of a head. dO first, whose stage is released before Q's; but a tile begins
        with Q, which it needs first."""
        load = self.load
        if before == 0:
            load(work, "q", head, block, state)
        load(work, "dout", head, block, state)
        if before > 0:
            load(work, "q", head, block, state)

    def load(self, work: KeyWork, name: str, head: Int32, block: Int32, state: RingState):
        """Q with its LSE, or dO with D. In a cluster each CTA brings its part of the rows to all."""
        c, info, storage = self.config, work.info, self.storage
        columns, numbers, offset = (
            (c.head_dim_padded, storage.lse, 0) if name == "q" else (c.head_dim_v_padded, storage.delta, c.tile_m)
        )
        part = 0
        if const_expr(c.cluster > 1):
            part = cute.arch.block_idx_in_cluster() * (c.tile_m // c.cluster)
        outer = () if const_expr(c.cu_seqlens_q) else (work.batch,)
        row = block * c.tile_m + part
        statistics = scratch_address(self.args.scratch.stats, work.first_tile + block, head) + 4 * offset
        box = getattr(self.boxes, name)
        copy = BoxCopy(getattr(self.tma, name), box, c.tile_m, head, outer, columns // box.columns)
        barrier = self.rings[name].acquire(state)
        target = getattr(storage, name) + state.stage * (c.tile_m * columns) + part * box.columns
        copy.load(target, 0, info.offset_q + row, info.seqlen_q - row, barrier, ctas=c.cluster)
        with cute.arch.elect_one():
            load_numbers(numbers + state.stage * c.tile_m, statistics, 4 * c.tile_m, barrier)


def load_numbers(target: cute.Pointer, source: Int64, size: int, barrier: cute.Pointer):
    """Bulk copy of ``size`` bytes, by one thread."""
    inline_ptx(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [{$r0}], [{$r1}], " + f"{size}, [{{$r2}}];",
        read_only_args=[target.toint(), source, barrier.toint()],
    )
