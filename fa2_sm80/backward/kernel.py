"""The kernels of one FA2 backward, launched one after the other on one stream."""

import cutlass.cute as cute
from cutlass import const_expr

from cute_fa.device.backward_arguments import BackwardArguments, backward_fakes
from cute_fa.device.backward_preprocess import PreprocessKernel
from cute_fa.device.backward_sums import PartialSums
from fa2_sm80.backward.config import Fa2BackwardConfig
from fa2_sm80.backward.key_gradients import KeyGradientKernel
from fa2_sm80.backward.postprocess import QueryGradientConversion
from fa2_sm80.backward.query_gradients import QueryGradientKernel


class Fa2BackwardKernels:
    """Host code of one :class:`Fa2BackwardConfig`."""

    def __init__(self, config: Fa2BackwardConfig):
        self.config = config

    @cute.jit
    def __call__(self, args: BackwardArguments, stream):
        c = self.config
        heads, heads_kv, batches = args.common.q.shape[-2], args.common.k.shape[-2], args.common.batches
        query_tiles = (args.m_blocks(c.tile_m) * heads * batches, 1, 1)
        key_tiles = (cute.ceil_div(args.seqlen_k, c.tile_n) * heads_kv * batches, 1, 1)
        preprocess, main = PreprocessKernel(c), KeyGradientKernel(c)
        preprocess.kernel(args).launch(grid=query_tiles, block=(preprocess.num_threads, 1, 1), smem=64, stream=stream)
        main.kernel(args).launch(grid=key_tiles, block=(c.num_threads, 1, 1), smem=c.smem_bytes, stream=stream)
        if const_expr(c.deterministic):
            tiles = c.query_kernel
            QueryGradientKernel(c).kernel(args).launch(
                grid=(args.m_blocks(tiles.tile_m) * heads * batches, 1, 1),
                block=(tiles.num_threads, 1, 1),
                smem=c.query_kernel_smem_bytes,
                stream=stream,
            )
        else:
            convert = QueryGradientConversion(c)
            convert.kernel(args).launch(
                grid=query_tiles, block=(convert.num_threads, 1, 1), smem=convert.smem_bytes, stream=stream
            )
        sums = PartialSums()
        for parts, target in ((args.scratch.dsink, args.dsink), (args.scratch.dslopes, args.dalibi)):
            if const_expr(parts is not None):
                sums.kernel(parts, target).launch(
                    grid=(target.shape[0], heads, 1), block=(sums.num_threads, 1, 1), stream=stream
                )


def build(config: Fa2BackwardConfig):
    """The callable and its fake arguments for ``cute.compile``."""
    stream = cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True)
    return Fa2BackwardKernels(config), (backward_fakes(config), stream)
