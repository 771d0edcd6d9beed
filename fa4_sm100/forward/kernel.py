"""The FA4 forward on sm_100a and sm_103a (FlashAttention-4): warps for the loads and the products, a softmax warpgroup
for each of a CTA's tiles, one for the output; CTAs walk over tiles of queries."""

import cutlass.cute as cute
from cutlass import Int32, const_expr
from cutlass.cute.nvgpu import cpasync
from cutlass.cute.nvgpu.tcgen05 import CtaGroup

from cute_fa.device import tensor_memory
from cute_fa.device.forward_arguments import ForwardArguments, TmaTensors
from cute_fa.device.ring import Ring, rings
from cute_fa.device.tile_handout import hand_out
from fa4_sm100.forward.config import WARP, WARPGROUP, Fa4ForwardConfig
from fa4_sm100.forward.cta import Cta
from fa4_sm100.forward.epilogue import Epilogue
from fa4_sm100.forward.loader import Loader
from fa4_sm100.forward.products import Products
from fa4_sm100.forward.softmax import Softmax
from fa4_sm100.forward.storage import allocate

_CTA_GROUPS = {1: CtaGroup.ONE, 2: CtaGroup.TWO}


class Fa4ForwardKernel:
    """Device code of one :class:`Fa4ForwardConfig`."""

    def __init__(self, config: Fa4ForwardConfig):
        self.config = config

    @cute.jit
    def __call__(self, args: ForwardArguments, stream):
        c = self.config
        tma = TmaTensors.of(c, args.common, cpasync.CopyBulkTensorTileG2SOp(_CTA_GROUPS[c.ctas]))
        self.kernel(args, tma).launch(
            grid=(args.num_ctas, 1, 1),
            block=(c.num_threads, 1, 1),
            cluster=(c.ctas, 1, 1) if c.ctas > 1 else None,
            smem=c.smem_bytes,
            min_blocks_per_mp=1,
            stream=stream,
        )

    @cute.kernel
    def kernel(self, args: ForwardArguments, tma: TmaTensors):
        """Softmax warpgroups first, one for each tile, then the epilogue's, then the MMA, load and scheduler warps."""
        c = self.config
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        storage = allocate(c)
        pipelines = rings(c.pipelines, storage.barriers)
        first_epilogue = c.softmax_threads // WARP
        mma_warp = first_epilogue + WARPGROUP // WARP
        prepare, load, multiply, schedule = self.prepare, self.load, self.multiply, self.schedule
        normalise, store, free = self.normalise, self.store, self.free
        if warp == mma_warp:
            prepare(tma, pipelines)
            tensor_memory.allocate(storage.tensor, c.tensor_columns, c.ctas)
        self.meet(c.ctas)
        rank = cute.arch.block_idx_in_cluster() if const_expr(c.ctas > 1) else Int32(0)
        cta = Cta(c, args, tma, storage, pipelines, rank)

        if warp < first_epilogue:
            _set_registers(c, c.registers.softmax)
            normalise(cta)
        elif warp < mma_warp:
            _set_registers(c, c.registers.epilogue)
            store(cta)
        else:
            _set_registers(c, c.registers.others)
            if warp == mma_warp:
                if rank == 0:
                    multiply(cta)
                if const_expr(c.ctas == 1):
                    free(cta)
            elif warp == mma_warp + 1:
                load(cta)
            elif warp == mma_warp + 2:
                if const_expr(c.handed):
                    schedule(cta)
        if const_expr(c.ctas > 1):  # neither ends, or gives tensor memory back, while the other may still use it
            self.meet(c.ctas)
            if warp == mma_warp:
                free(cta)

    def meet(self, ctas: int):
        """All threads of the CTA, or of a pair."""
        if ctas == 1:
            cute.arch.sync_threads()
        else:
            cute.arch.cluster_arrive()
            cute.arch.cluster_wait()

    def prepare(self, tma: TmaTensors, pipelines: dict[str, Ring]):
        """Descriptors on their way, barriers initialised and known to TMA."""
        for tensor in tma:
            cpasync.prefetch_descriptor(tensor.atom)
        with cute.arch.elect_one():
            for ring in pipelines.values():
                ring.initialize()
        cute.arch.mbarrier_init_fence()

    def free(self, cta: Cta):
        """Tensor memory, by the warp that allocated it."""
        tensor_memory.free(cta.tensor, self.config.tensor_columns, self.config.ctas)

    def load(self, cta: Cta):
        """The load warp."""
        Loader(cta).run()

    def multiply(self, cta: Cta):
        """The MMA warp."""
        Products(cta).run()

    def schedule(self, cta: Cta):
        """The scheduler warp."""
        hand_out(cta.scheduler())

    def normalise(self, cta: Cta):
        """A softmax warpgroup."""
        tidx, _, _ = cute.arch.thread_idx()
        Softmax(cta, cute.arch.make_warp_uniform(tidx // WARPGROUP), tidx % WARPGROUP).run()

    def store(self, cta: Cta):
        """The epilogue's warpgroup."""
        tidx, _, _ = cute.arch.thread_idx()
        Epilogue(cta, tidx % WARPGROUP).run()


def _set_registers(config: Fa4ForwardConfig, registers: int):
    """setmaxnreg, up or down from what a thread has at launch."""
    if registers * config.num_threads > 65536:
        cute.arch.setmaxregister_increase(registers)
    else:
        cute.arch.setmaxregister_decrease(registers)


def build(config: Fa4ForwardConfig):
    """The callable and its fake arguments for ``cute.compile``."""
    stream = cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True)
    return Fa4ForwardKernel(config), (ForwardArguments.fakes(config), stream)
