"""The Hopper decode (flash decoding on wgmma): two producer warps load, two consumer warpgroups compute, every CTA has
a share of all key blocks (``cute_fa.device.split_walk``); a second kernel merges the tiles that were cut."""

from typing import Optional

import cutlass
import cutlass.cute as cute
from cutlass import const_expr
from cutlass.cute.nvgpu import cpasync

from cute_fa.device.ring import Ring, rings
from cute_fa.device.split_arguments import SplitArguments
from cute_fa.device.split_parts import ROWS, THREADS, CombineKernel
from fa3_sm90.common.wgmma import WARPGROUP
from fa3_sm90.decode.arguments import TmaTensors
from fa3_sm90.decode.config import REGISTERS, WIDENERS, Fa3DecodeConfig
from fa3_sm90.decode.consumer import Consumer
from fa3_sm90.decode.key_loader import KeyLoader
from fa3_sm90.decode.query_loader import QueryLoader
from fa3_sm90.decode.row_loader import RowLoader
from fa3_sm90.decode.storage import Storage
from fa3_sm90.decode.widener import Widener


class Fa3DecodeKernel:
    """Device code of one :class:`Fa3DecodeConfig`."""

    def __init__(self, config: Fa3DecodeConfig):
        self.config = config

    @cute.jit
    def __call__(self, args: SplitArguments, stream):
        c = self.config
        self.kernel(args, TmaTensors.of(c, args.common)).launch(
            grid=(args.grid.ctas, 1, 1),
            block=(c.num_threads, 1, 1),
            smem=c.smem_bytes,
            min_blocks_per_mp=1,
            stream=stream,
        )
        if args.grid.merges > 0:
            CombineKernel(c).kernel(args.common, args.parts, args.grid).launch(
                grid=(args.grid.merges, c.tile_m // ROWS, 1), block=(THREADS, 1, 1), stream=stream
            )

    @cute.kernel
    def kernel(self, args: SplitArguments, tma: Optional[TmaTensors]):
        """The first warpgroup produces, with few registers; the others consume, with many."""
        c = self.config
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        storage = Storage.allocate(c)
        pipelines = rings(c.pipelines, storage.barriers)
        prepare, load_keys, load_queries = self.prepare, self.load_keys, self.load_queries
        load_rows, widen, consume = self.load_rows, self.widen, self.consume
        if warp == 0:
            prepare(tma, pipelines)
        cute.arch.sync_threads()
        if warp < 4:
            if const_expr(c.consumers > 1):  # beside one there are registers for all
                cute.arch.setmaxregister_decrease(REGISTERS[0])
            if const_expr(c.by_rows):
                for index in cutlass.range_constexpr(c.row_loaders):
                    if warp == (index and 1 + index):
                        load_rows(args, storage, pipelines, index)
            else:
                if warp == 0:
                    load_keys(args, tma, storage, pipelines)
            if warp == 1:
                load_queries(args, storage, pipelines)
            if const_expr(c.widens):
                for index in cutlass.range_constexpr(WIDENERS):
                    if warp == 2 + index:
                        widen(args, storage, pipelines, index)
        else:
            if const_expr(c.consumers > 1):
                cute.arch.setmaxregister_increase(REGISTERS[1])
            consume(args, storage, pipelines)

    def prepare(self, tma: Optional[TmaTensors], pipelines: dict[str, Ring]):
        """Descriptors on their way; barriers initialised, and known to TMA where that brings rows."""
        if const_expr(tma is not None):
            for tensor in tma:
                cpasync.prefetch_descriptor(tensor.atom)
        with cute.arch.elect_one():
            for ring in pipelines.values():
                ring.initialize()
        if const_expr(tma is not None):
            cute.arch.mbarrier_init_fence()

    def load_keys(self, args: SplitArguments, tma: TmaTensors, storage: Storage, pipelines: dict[str, Ring]):
        """The producer warp of K and V."""
        KeyLoader(self.config, args, tma, storage, pipelines).run()

    def load_rows(self, args: SplitArguments, storage: Storage, pipelines: dict[str, Ring], index: int):
        """A producer warp of K and V by rows."""
        RowLoader(self.config, args, storage, pipelines, index).run()

    def load_queries(self, args: SplitArguments, storage: Storage, pipelines: dict[str, Ring]):
        """The producer warp of Q."""
        QueryLoader(self.config, args, storage, pipelines["q"]).run()

    def widen(self, args: SplitArguments, storage: Storage, pipelines: dict[str, Ring], index: int):
        """A producer warp that widens fp8 codes."""
        Widener(self.config, args, storage, pipelines, index).run()

    def consume(self, args: SplitArguments, storage: Storage, pipelines: dict[str, Ring]):
        """A consumer warpgroup."""
        tidx, _, _ = cute.arch.thread_idx()
        index = cute.arch.make_warp_uniform(tidx // WARPGROUP) - 1
        Consumer(self.config, args, storage, pipelines, index, tidx % WARPGROUP).run()


def build(config: Fa3DecodeConfig):
    """The callable and its fake arguments for ``cute.compile``."""
    stream = cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True)
    return Fa3DecodeKernel(config), (SplitArguments.fakes(config), stream)
