"""Results of the tiles of queries that see no key under a range plan, which no kernel walks over."""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr

from cute_fa.device.arguments import CommonArguments
from cute_fa.device.dtypes import CUTE_DTYPE
from cute_fa.device.range_walk import poisoned
from cute_fa.device.tile_work import walk_of

CHUNK_BITS = 128  # that a thread stores at once


@cute.jit
def write_unseen_tiles(
    common: CommonArguments, config: cutlass.Constexpr, thread: Int32, num_threads: cutlass.Constexpr[int]
):
    """O = 0, and LSE = −inf or learnable_sink; NaN where the plan had no room for a tile's blocks. By ``num_threads``
    threads of each CTA, which share the tiles of all heads. ``config``: of the kernel, with tile_tokens, head_dim_v,
    out_dtype and learnable_sink."""
    walk, rows_q = walk_of(common, config), Int32(common.dense[0])
    dtype, heads = CUTE_DTYPE[config.out_dtype], common.q.shape[-2]
    chunk = CHUNK_BITS // dtype.width
    chunks = config.head_dim_v // chunk
    store = cute.make_copy_atom(cute.nvgpu.CopyUniversalOp(), dtype, num_bits_per_copy=CHUNK_BITS)
    out, lse, sinks = common.out, common.lse, common.learnable_sink
    filled = walk.filled
    blocks_of, tile_of = walk.blocks, walk.tile
    first, step = cute.arch.block_idx()[0], cute.arch.grid_dim()[0]
    for index in cutlass.range(first, (walk.tiles - filled) * heads, step, unroll=1):
        tile, head = tile_of(filled + index // heads), index % heads
        nothing = Float32(poisoned(blocks_of(tile)))
        first_row = tile * config.tile_tokens
        rows = cutlass.min(rows_q - first_row, config.tile_tokens)
        values = cute.make_rmem_tensor(chunk, dtype)
        values.fill(dtype(nothing))
        for i in cutlass.range(thread, rows * chunks, num_threads, unroll=1):
            row = out[0, first_row + i // chunks, head, None]
            cute.copy(store, values, cute.local_tile(row, (chunk,), (i % chunks,)))
        logit = -Float32.inf
        if const_expr(sinks is not None):
            logit = sinks[head]
        for row in cutlass.range(thread, rows, num_threads, unroll=1):
            lse[0, head, first_row + row] = logit + nothing
