"""The FA3 forward on sm_90a (FlashAttention-3, arXiv 2407.08608): a producer warp loads by TMA, consumer warpgroups
compute on wgmma, CTAs walk over tiles of queries."""

import cutlass.cute as cute
from cutlass import const_expr, range_constexpr
from cutlass.cute.nvgpu import cpasync

from cute_fa.device.forward_arguments import ForwardArguments, TmaTensors
from cute_fa.device.ring import Ring, rings
from cute_fa.device.tile_work import dense_extents
from fa3_sm90.common.wgmma import WARPGROUP
from fa3_sm90.forward.cluster import meet
from fa3_sm90.forward.config import Fa3ForwardConfig
from fa3_sm90.forward.consumer import Consumer
from fa3_sm90.forward.loader import Loader
from fa3_sm90.forward.storage import Storage, allocate
from fa3_sm90.forward.transposer import Transposer


class Fa3ForwardKernel:
    """Device code of one :class:`Fa3ForwardConfig`."""

    def __init__(self, config: Fa3ForwardConfig):
        self.config = config

    @cute.jit
    def __call__(self, args: ForwardArguments, stream):
        c, load = self.config, cpasync.CopyBulkTensorTileG2SOp()
        load_keys = load if const_expr(c.cluster == 1) else cpasync.CopyBulkTensorTileG2SMulticastOp()
        tma = TmaTensors.of(c, args.common, load, load_keys)
        self.kernel(args, tma).launch(
            grid=(args.num_ctas, 1, 1),
            block=(c.num_threads, 1, 1),
            cluster=(c.cluster, 1, 1) if c.cluster > 1 else None,
            smem=c.smem_bytes,
            min_blocks_per_mp=1,
            stream=stream,
        )

    @cute.kernel
    def kernel(self, args: ForwardArguments, tma: TmaTensors):
        """The first warpgroup produces, with few registers; the others consume, with many."""
        c = self.config
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        storage = allocate(c)
        pipelines = rings(c.pipelines, storage.barriers)
        prepare, load, consume, transpose = self.prepare, self.load, self.consume, self.transpose
        if warp == 0:
            prepare(tma, pipelines)
        meet(c)

        producer_registers, consumer_registers = c.registers
        if warp < 4:
            cute.arch.setmaxregister_decrease(producer_registers)
            if warp == 0:
                load(args, tma, storage, pipelines)
            for index in range_constexpr(c.transposers):
                if warp == 1 + index:
                    transpose(args, storage, pipelines, index)
        else:
            cute.arch.setmaxregister_increase(consumer_registers)
            consume(args, tma, storage, pipelines)
        if const_expr(c.cluster > 1):  # neither ends while the other may still release a stage in it
            meet(c)

    def prepare(self, tma: TmaTensors, pipelines: dict[str, Ring]):
        """Descriptors on their way, barriers initialised and known to TMA."""
        for tensor in tma:
            cpasync.prefetch_descriptor(tensor.atom)
        with cute.arch.elect_one():
            for ring in pipelines.values():
                ring.initialize()
        cute.arch.mbarrier_init_fence()

    def load(self, args: ForwardArguments, tma: TmaTensors, storage: Storage, pipelines: dict[str, Ring]):
        """The producer warp."""
        Loader(self.config, args, tma, dense_extents(args.common), storage, pipelines).run()

    def transpose(self, args: ForwardArguments, storage: Storage, pipelines: dict[str, Ring], index: int):
        """A producer warp that transposes V."""
        Transposer(self.config, args, dense_extents(args.common), storage, pipelines, index).run()

    def consume(self, args: ForwardArguments, tma: TmaTensors, storage: Storage, pipelines: dict[str, Ring]):
        """A consumer warpgroup."""
        tidx, _, _ = cute.arch.thread_idx()
        index = cute.arch.make_warp_uniform(tidx // WARPGROUP) - 1
        extents = dense_extents(args.common)
        Consumer(self.config, args, tma, extents, storage, pipelines, index, tidx % WARPGROUP).run()


def build(config: Fa3ForwardConfig):
    """The callable and its fake arguments for ``cute.compile``."""
    stream = cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True)
    return Fa3ForwardKernel(config), (ForwardArguments.fakes(config), stream)
