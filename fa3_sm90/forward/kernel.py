"""The FA3 forward on sm_90a (FlashAttention-3, arXiv 2407.08608): a producer warp loads by TMA, consumer warpgroups
compute on wgmma, CTAs walk over tiles of queries."""

import cutlass.cute as cute
from cutlass import Int32, const_expr, range_constexpr
from cutlass.cute.nvgpu import cpasync

from cute_fa.device.fake_arguments import common_fakes
from cute_fa.device.ring import Ring, rings
from cute_fa.device.tile_scheduler import TileGrid
from cute_fa.device.tile_work import dense_extents
from cute_fa.device.tma_boxes import tma_tensor
from fa3_sm90.forward.arguments import ForwardArguments, TmaTensors
from fa3_sm90.forward.config import WARPGROUP, Fa3ForwardConfig
from fa3_sm90.forward.consumer import Consumer
from fa3_sm90.forward.loader import Loader
from fa3_sm90.forward.storage import Boxes, Storage, allocate
from fa3_sm90.forward.transposer import Transposer


class Fa3ForwardKernel:
    """Device code of one :class:`Fa3ForwardConfig`."""

    def __init__(self, config: Fa3ForwardConfig):
        self.config = config

    @cute.jit
    def __call__(self, args: ForwardArguments, stream):
        c = self.config
        boxes = Boxes.of(c)
        load, store = cpasync.CopyBulkTensorTileG2SOp(), cpasync.CopyBulkTensorTileS2GOp()
        v = args.common.v
        if const_expr(c.key_major_v):  # (batch, head_dim_v, heads, keys)
            v = cute.make_tensor(v.iterator, cute.select(v.layout, mode=[0, 3, 2, 1]))
        tma = TmaTensors(
            q=tma_tensor(load, args.common.q, boxes.q, c.cu_seqlens_q),
            k=tma_tensor(load, args.common.k, boxes.k, c.cu_seqlens_k),
            v=tma_tensor(load, v, boxes.v, c.cu_seqlens_k),
            out=tma_tensor(store, args.common.out, boxes.out, c.cu_seqlens_q),
        )
        self.kernel(args, tma).launch(
            grid=(args.num_ctas, 1, 1),
            block=(c.num_threads, 1, 1),
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
        cute.arch.sync_threads()

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
    arguments = ForwardArguments(
        common_fakes(config),
        grid=TileGrid(Int32(0), Int32(0), Int32(0), Int32(0)),
        num_ctas=Int32(0),
    )
    stream = cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True)
    return Fa3ForwardKernel(config), (arguments, stream)
