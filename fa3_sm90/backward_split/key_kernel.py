"""The kernel for dK and dV: one CTA a tile of keys of one kv head, over the query blocks of all its query heads."""

import cutlass.cute as cute
from cutlass import Int32, const_expr
from cutlass.cute.nvgpu import cpasync

from cute_fa.device.backward_arguments import BackwardArguments
from cute_fa.device.ring import Ring, rings
from cute_fa.device.score import Score
from fa3_sm90.backward.config import CONSUMERS, REGISTERS
from fa3_sm90.backward.epilogue import Epilogue
from fa3_sm90.backward.loader import Loader
from fa3_sm90.backward.work import KeyWork, key_work
from fa3_sm90.backward_split.arguments import Boxes, TmaTensors
from fa3_sm90.backward_split.config import TILE, Fa3SplitBackwardConfig
from fa3_sm90.backward_split.key_gradients import KeyGradients, ValueGradients
from fa3_sm90.backward_split.storage import KeyStorage
from fa3_sm90.common.products import SumProduct
from fa3_sm90.common.wgmma import WARPGROUP

# Named barriers: 0 is the CTA's own; all consumers; then each warpgroup's.
_ALL, _OWN = 1, 2


class KeyGradientKernel:
    """Device code. The first warpgroup produces, with few registers; the second has dV, the third dK."""

    def __init__(self, config: Fa3SplitBackwardConfig):
        self.config = config

    @cute.kernel
    def kernel(self, args: BackwardArguments, tma: TmaTensors):
        c = self.config
        index, _, _ = cute.arch.block_idx()
        storage = KeyStorage.allocate(c)
        pipelines = rings(c.key_pipelines, storage.barriers)
        load, values, keys = self.load, self.values, self.keys
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        if warp == 0:
            prepare(tma, pipelines)
        meet(c.cluster)
        work = key_work(c, args, index)
        if work.n_block // c.cluster * (c.cluster * TILE) < work.rows_k:
            if warp < 4:
                cute.arch.setmaxregister_decrease(REGISTERS[0])
                if warp == 0:
                    load(args, tma, storage, pipelines, work)
            else:
                cute.arch.setmaxregister_increase(REGISTERS[1])
                if warp < 8:
                    values(args, tma, storage, pipelines, work)
                else:
                    keys(args, tma, storage, pipelines, work)
            if const_expr(c.cluster > 1):  # neither ends while the other may still release a stage in it
                meet(c.cluster)

    def load(self, args, tma: TmaTensors, storage: KeyStorage, pipelines: dict[str, Ring], work: KeyWork):
        """The loading warp."""
        boxes = Boxes.of(self.config, self.config.cluster)
        Loader(self.config, args, tma, storage, pipelines, boxes).run(work)

    def values(self, args, tma: TmaTensors, storage: KeyStorage, pipelines: dict[str, Ring], work: KeyWork):
        """The warpgroup of dV."""
        thread = cute.arch.thread_idx()[0] % WARPGROUP
        consumer = ValueGradients(self.config, args, storage, pipelines, thread)
        consumer.run(work)
        consumer.sums.acc.store(consumer.sums.acc.load() * 2.0**-self.config.probability_shift)
        self.store("dv", consumer.sums, tma, storage, work, thread)

    def keys(self, args, tma: TmaTensors, storage: KeyStorage, pipelines: dict[str, Ring], work: KeyWork):
        """The warpgroup of dK."""
        thread = cute.arch.thread_idx()[0] % WARPGROUP
        consumer = KeyGradients(self.config, args, storage, pipelines, thread)
        consumer.run(work)
        scale = Score.of(args.common.softmax_scale, args.common.softcap).gradient_scale
        consumer.sums.acc.store(consumer.sums.acc.load() * scale)
        self.store("dk", consumer.sums, tma, storage, work, thread)

    @cute.jit
    def store(self, name, sums: SumProduct, tma: TmaTensors, storage: KeyStorage, work: KeyWork, thread: Int32):
        """A gradient over the tile that both warpgroups have read to the end."""
        c = self.config
        place, columns, own = (
            (storage.v, c.head_dim_v_padded, _OWN)
            if const_expr(name == "dv")
            else (storage.k, c.head_dim_padded, _OWN + 1)
        )
        epilogue = Epilogue(c, tma, storage, Int32(0), thread)
        to_global = epilogue.to_global
        cute.arch.barrier(barrier_id=_ALL, number_of_threads=WARPGROUP * CONSUMERS)
        epilogue.to_smem(sums.acc, sums.mma, place, columns)
        cute.arch.fence_proxy("async.shared", space="cta")
        cute.arch.barrier(barrier_id=own, number_of_threads=WARPGROUP)
        if thread < 32:
            to_global(name, place, columns, work)
            cute.arch.cp_async_bulk_commit_group()
            cute.arch.cp_async_bulk_wait_group(0, read=True)


def meet(ctas: int):
    """All threads of a cluster of ``ctas``."""
    if ctas == 1:
        cute.arch.sync_threads()
    else:
        cute.arch.cluster_arrive()
        cute.arch.cluster_wait()


def prepare(tma: TmaTensors, pipelines: dict[str, Ring]):
    """Descriptors on their way, barriers initialised and known to TMA."""
    for tensor in tma:
        cpasync.prefetch_descriptor(tensor.atom)
    with cute.arch.elect_one():
        for ring in pipelines.values():
            ring.initialize()
    cute.arch.mbarrier_init_fence()
