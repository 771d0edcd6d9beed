"""The kernels of one Hopper backward, launched one after the other on one stream."""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, const_expr
from cutlass.cute.nvgpu import cpasync

from cute_fa.device.backward_arguments import BackwardArguments, backward_fakes
from cute_fa.device.backward_preprocess import PreprocessKernel
from cute_fa.device.backward_sums import PartialSums
from cute_fa.device.ring import Ring, rings
from cute_fa.device.score import Score
from fa3_sm90.backward.arguments import Boxes, TmaTensors
from fa3_sm90.backward.config import REGISTERS, Fa3BackwardConfig
from fa3_sm90.backward.consumer import Consumer
from fa3_sm90.backward.conversion import QueryGradientConversion
from fa3_sm90.backward.epilogue import Epilogue
from fa3_sm90.backward.loader import Loader
from fa3_sm90.backward.query_sums import QuerySums, QuerySumsWriter
from fa3_sm90.backward.storage import Storage, allocate
from fa3_sm90.backward.turns import Turns, take_ticket
from fa3_sm90.backward.work import KeyWork, key_work
from fa3_sm90.common.wgmma import WARPGROUP


class Fa3BackwardKernels:
    """Host code of one :class:`Fa3BackwardConfig`."""

    def __init__(self, config: Fa3BackwardConfig):
        self.config = config

    @cute.jit
    def __call__(self, args: BackwardArguments, stream):
        c = self.config
        heads, heads_kv, batches = args.common.q.shape[-2], args.common.k.shape[-2], args.common.batches
        query_tiles = (args.m_blocks(c.tile_m) * heads * batches, 1, 1)
        key_tiles = (cute.ceil_div(args.seqlen_k, c.tile_n) * heads_kv * batches, 1, 1)
        preprocess, main, convert = PreprocessKernel(c), KeyGradientKernel(c), QueryGradientConversion(c)
        preprocess.kernel(args).launch(grid=query_tiles, block=(preprocess.num_threads, 1, 1), smem=64, stream=stream)
        main.kernel(args, TmaTensors.of(c, args)).launch(
            grid=key_tiles, block=(c.num_threads, 1, 1), smem=c.smem_bytes, min_blocks_per_mp=1, stream=stream
        )
        convert.kernel(args).launch(
            grid=query_tiles, block=(convert.num_threads, 1, 1), smem=convert.smem_bytes, stream=stream
        )
        sums = PartialSums()
        for parts, target in ((args.scratch.dsink, args.dsink), (args.scratch.dslopes, args.dalibi)):
            if const_expr(parts is not None):
                sums.kernel(parts, target).launch(
                    grid=(target.shape[0], heads, 1), block=(sums.num_threads, 1, 1), stream=stream
                )


class KeyGradientKernel:
    """Device code of the main kernel: one CTA a tile of keys of one kv head. It walks over the query blocks of all
    query heads of the kv head, so that dK and dV of a group are summed in registers."""

    def __init__(self, config: Fa3BackwardConfig):
        self.config = config

    @cute.kernel
    def kernel(self, args: BackwardArguments, tma: TmaTensors):
        """The first warpgroup produces, with few registers; the others consume, with many."""
        c = self.config
        index, _, _ = cute.arch.block_idx()
        storage = allocate(c)
        pipelines = rings(c.pipelines, storage.barriers)
        prepare, load, sum_up, consume, skip = self.prepare, self.load, self.sum_up, self.consume, self.skip
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        if warp == 0:
            prepare(tma, pipelines)
            if const_expr(c.turns):
                take_ticket(args.scratch.turns, storage.ticket)
        cute.arch.sync_threads()
        if const_expr(c.turns):
            index = storage.ticket.load()
        work = key_work(c, args, index)
        if work.first_key(c) < work.rows_k:
            if warp < 4:
                cute.arch.setmaxregister_decrease(REGISTERS[0])
                if warp == 0:
                    load(args, tma, storage, pipelines, work)
                if warp == 1:
                    sum_up(args, storage, work)
            else:
                cute.arch.setmaxregister_increase(REGISTERS[1])
                consume(args, tma, storage, pipelines, work)
        elif const_expr(c.slopes_gradient):
            skip(args, work)

    @cute.jit
    def skip(self, args: BackwardArguments, work: KeyWork):
        """A tile behind its sequence: its parts of the slopes' gradients are added up like all others."""
        parts, count = args.scratch.dslopes, self.config.slope_parts
        tidx, _, _ = cute.arch.thread_idx()
        for place in cutlass.range(tidx, work.heads * count, self.config.num_threads, unroll=1):
            head, part = work.first_head + place // count, work.n_block * count + place % count
            parts[work.batch, head, part] = Float32(0.0)

    def prepare(self, tma: TmaTensors, pipelines: dict[str, Ring]):
        """Descriptors on their way, barriers initialised and known to TMA."""
        for tensor in tma:
            cpasync.prefetch_descriptor(tensor.atom)
        with cute.arch.elect_one():
            for ring in pipelines.values():
                ring.initialize()
        cute.arch.mbarrier_init_fence()

    def load(
        self, args: BackwardArguments, tma: TmaTensors, storage: Storage, pipelines: dict[str, Ring], work: KeyWork
    ):
        """The loading warp."""
        Loader(self.config, args, tma, storage, pipelines, Boxes.of(self.config)).run(work)

    def sum_up(self, args: BackwardArguments, storage: Storage, work: KeyWork):
        """The warp that adds to dQ."""
        turns = Turns(self.config, args, work) if const_expr(self.config.turns) else None
        QuerySums(self.config, storage).run(args, work, turns)

    def consume(
        self, args: BackwardArguments, tma: TmaTensors, storage: Storage, pipelines: dict[str, Ring], work: KeyWork
    ):
        """A consumer warpgroup."""
        c = self.config
        tidx, _, _ = cute.arch.thread_idx()
        index, thread = cute.arch.make_warp_uniform(tidx // WARPGROUP) - 1, tidx % WARPGROUP
        sums = QuerySumsWriter(QuerySums(c, storage), index, thread)
        consumer = Consumer(c, args, storage, pipelines, sums, index, thread)
        consumer.run(work)
        scale = Score.of(args.common.softmax_scale, args.common.softcap).gradient_scale
        Epilogue(c, tma, storage, index, thread).store(consumer.products, work, scale)


def build(config: Fa3BackwardConfig):
    """The callable and its fake arguments for ``cute.compile``."""
    stream = cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True)
    return Fa3BackwardKernels(config), (backward_fakes(config), stream)
