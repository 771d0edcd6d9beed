"""The kernels of one Hopper backward for wide head_dims, launched one after the other on one stream."""

import cutlass.cute as cute
from cutlass import const_expr

from cute_fa.device.backward_arguments import BackwardArguments, backward_fakes
from cute_fa.device.backward_preprocess import PreprocessKernel
from cute_fa.device.backward_sums import PartialSums
from fa3_sm90.backward_split.arguments import TmaTensors
from fa3_sm90.backward_split.config import TILE, Fa3SplitBackwardConfig
from fa3_sm90.backward_split.key_kernel import KeyGradientKernel
from fa3_sm90.backward_split.query_kernel import QueryGradientKernel


class Fa3SplitBackwardKernels:
    """Host code of one :class:`Fa3SplitBackwardConfig`."""

    def __init__(self, config: Fa3SplitBackwardConfig):
        self.config = config

    @cute.jit
    def __call__(self, args: BackwardArguments, stream):
        c, pair = self.config, TILE * self.config.cluster
        heads, heads_kv, batches = args.common.q.shape[-2], args.common.k.shape[-2], args.common.batches
        preprocess, keys, queries = PreprocessKernel(c), KeyGradientKernel(c), QueryGradientKernel(c)
        preprocess.kernel(args).launch(
            grid=(args.m_blocks(TILE) * heads * batches, 1, 1),
            block=(preprocess.num_threads, 1, 1),
            smem=64,
            stream=stream,
        )
        keys.kernel(args, TmaTensors.of(c, args, c.cluster)).launch(
            grid=(cute.ceil_div(args.seqlen_k, pair) * c.cluster * heads_kv * batches, 1, 1),
            block=(c.num_threads, 1, 1),
            cluster=(c.cluster, 1, 1) if c.cluster > 1 else None,
            smem=c.smem_bytes,
            min_blocks_per_mp=1,
            stream=stream,
        )
        queries.kernel(args, TmaTensors.of(c, args, 1)).launch(
            grid=(args.m_blocks(c.query_rows) * heads * batches, 1, 1),
            block=(c.num_threads, 1, 1),
            smem=c.query_kernel_smem_bytes,
            min_blocks_per_mp=1,
            stream=stream,
        )
        sums = PartialSums()
        for parts, target in ((args.scratch.dsink, args.dsink), (args.scratch.dslopes, args.dalibi)):
            if const_expr(parts is not None):
                sums.kernel(parts, target).launch(
                    grid=(target.shape[0], heads, 1), block=(sums.num_threads, 1, 1), stream=stream
                )


def build(config: Fa3SplitBackwardConfig):
    """The callable and its fake arguments for ``cute.compile``."""
    stream = cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True)
    return Fa3SplitBackwardKernels(config), (backward_fakes(config), stream)
