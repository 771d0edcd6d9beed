"""Append to a KV cache: new keys and values go to their slots, keys and queries are rotated on the way.

Rotary position embedding (RoFormer, arXiv 2104.09864, section 3.4.2): the pair (x, y) of angle θ becomes
(x·cos θ − y·sin θ, x·sin θ + y·cos θ). Pairs are neighbours if interleaved (GPT-J), else element i and i + rotary_dim/2
(GPT-NeoX).
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr

from cute_fa.device.dtypes import CUTE_DTYPE
from fa2_sm80.append.arguments import AppendArguments, NewRows, append_fakes
from fa2_sm80.append.config import CHUNK, NUM_THREADS, AppendConfig, rows_per_cta


class AppendKernel:
    """A thread moves 16 bytes of one head of one token; a CTA works on queries, keys or values alone."""

    def __init__(self, config: AppendConfig):
        self.config = config
        self.dtype = CUTE_DTYPE[config.dtype]

    @cute.jit
    def __call__(self, args: AppendArguments, stream):
        tiles = self.tiles(args)
        self.kernel(args).launch(
            grid=((tiles[0] + tiles[1] + tiles[2]) * args.cache_seqlens.shape[0], 1, 1),
            block=(NUM_THREADS, 1, 1),
            stream=stream,
        )

    def tiles(self, args: AppendArguments):
        """CTAs of one sequence: for queries, keys, values."""
        c = self.config
        rows = args.k.longest * args.k.heads
        tiles_q = 0
        if const_expr(c.query):
            tiles_q = cute.ceil_div(args.q.longest * args.q.heads, rows_per_cta(c.head_dim))
        # one at least, for the CTA that writes the length
        tiles_k = cutlass.max(cute.ceil_div(rows, rows_per_cta(c.head_dim)), 1)
        return tiles_q, tiles_k, cute.ceil_div(rows, rows_per_cta(c.head_dim_v))

    @cute.kernel
    def kernel(self, args: AppendArguments):
        """One CTA: some rows of one sequence, a row being one head of one token."""
        tidx, _, _ = cute.arch.thread_idx()
        index, _, _ = cute.arch.block_idx()
        tiles_q, tiles_k, tiles_v = self.tiles(args)
        tiles = tiles_q + tiles_k + tiles_v
        batch, tile = index // tiles, index % tiles
        position = args.cache_seqlens[batch]
        if tile < tiles_k:
            start, length = args.k.extent(batch)
            if tile == 0 and tidx == 0:
                args.seqused_k[batch] = position + length
            self.move_keys(args, batch, tile, start, length, position, tidx)
        elif tile < tiles_k + tiles_v:
            start, length = args.k.extent(batch)
            self.move_values(args, batch, tile - tiles_k, start, length, position, tidx)
        elif const_expr(self.config.query):
            self.rotate_queries(args, batch, tile - tiles_k - tiles_v, position, tidx)

    @cute.jit
    def move_keys(self, args: AppendArguments, batch, tile, start, length, position, tidx):
        """New keys to their slots, rotated."""
        c = self.config
        token, head, chunk, inside = place(tile, tidx, c.head_dim, args.k.heads, length)
        # what lies beyond the cache is not written, whatever the caller promised
        if inside and position + token < args.cache.capacity:
            source = args.k.row(batch, start, token, head)
            slot, row = args.cache.slot(batch, position + token, c.page_size)
            self.move_rotated(args, source, args.cache.k[slot, row, head, None], batch, chunk, position, token)

    @cute.jit
    def move_values(self, args: AppendArguments, batch, tile, start, length, position, tidx):
        """New values to their slots."""
        c = self.config
        token, head, chunk, inside = place(tile, tidx, c.head_dim_v, args.k.heads, length)
        if inside and position + token < args.cache.capacity:
            source = args.k._replace(tensor=args.v).row(batch, start, token, head)
            slot, row = args.cache.slot(batch, position + token, c.page_size)
            store(load(source, chunk), args.cache.v[slot, row, head, None], chunk)

    @cute.jit
    def rotate_queries(self, args: AppendArguments, batch, tile, position, tidx):
        """Queries to a tensor of their own, rotated."""
        q: NewRows = args.q
        start, length = q.extent(batch)
        token, head, chunk, inside = place(tile, tidx, self.config.head_dim, q.heads, length)
        if inside:
            target = q._replace(tensor=args.q_rotated).row(batch, start, token, head)
            steps = args.rotary.query_step * token
            self.move_rotated(args, q.row(batch, start, token, head), target, batch, chunk, position, steps)

    @cute.jit
    def move_rotated(self, args: AppendArguments, source, target, batch, chunk, position, steps):
        """One chunk of a row whose angle is that of ``steps`` behind the sequence's first new row."""
        c = self.config
        values = load(source, chunk)
        if const_expr(c.rotary_dim > 0):
            if chunk < c.rotary_dim // CHUNK:
                if const_expr(c.rotary_seqlens):
                    position = args.rotary.seqlens[batch]
                # inside the tables, whatever the caller promised
                angle = cutlass.min(position + steps, args.rotary.cos.shape[0] - 1)
                cos, sin = args.rotary.cos[angle, None], args.rotary.sin[angle, None]
                if const_expr(c.rotary_interleaved):
                    self.rotate_neighbours(values, chunk, cos, sin)
                else:
                    self.rotate_halves(values, source, chunk, cos, sin)
        store(values, target, chunk)

    @cute.jit
    def rotate_neighbours(self, values, chunk, cos, sin):
        first = chunk * (CHUNK // 2)
        for i in cutlass.range_constexpr(CHUNK // 2):
            x, y = Float32(values[2 * i]), Float32(values[2 * i + 1])
            cosine, sine = Float32(cos[first + i]), Float32(sin[first + i])
            values[2 * i] = (x * cosine - y * sine).to(self.dtype)
            values[2 * i + 1] = (x * sine + y * cosine).to(self.dtype)

    @cute.jit
    def rotate_halves(self, values, source, chunk, cos, sin):
        half = self.config.rotary_dim // 2 // CHUNK
        is_first = chunk < half
        others = load(source, cutlass.select_(is_first, chunk + half, chunk - half))
        sign = cutlass.select_(is_first, Float32(-1.0), Float32(1.0))
        first = cutlass.select_(is_first, chunk, chunk - half) * CHUNK
        for i in cutlass.range_constexpr(CHUNK):
            cosine, sine = Float32(cos[first + i]), Float32(sin[first + i])
            values[i] = (Float32(values[i]) * cosine + sign * Float32(others[i]) * sine).to(self.dtype)


def place(tile: Int32, tidx: Int32, head_dim: int, heads: Int32, length: Int32):
    """(token, head, chunk, whether there is such a row) of a thread."""
    chunks = head_dim // CHUNK
    row = tile * rows_per_cta(head_dim) + tidx // chunks
    inside = (tidx // chunks < rows_per_cta(head_dim)) & (row < length * heads)
    return row // heads, row % heads, tidx % chunks, inside


def load(row: cute.Tensor, chunk: Int32) -> cute.Tensor:
    """16 bytes of a row in registers."""
    values = cute.make_rmem_tensor(CHUNK, row.element_type)
    cute.copy(_copy(row.element_type), cute.local_tile(row, (CHUNK,), (chunk,)), values)
    return values


def store(values: cute.Tensor, row: cute.Tensor, chunk: Int32):
    """Those to a row."""
    cute.copy(_copy(row.element_type), values, cute.local_tile(row, (CHUNK,), (chunk,)))


def _copy(dtype):
    return cute.make_copy_atom(cute.nvgpu.CopyUniversalOp(), dtype, num_bits_per_copy=8 * 16)


def build(config: AppendConfig):
    """Callable and fake arguments for ``cute.compile``."""
    kernel = AppendKernel(config)
    stream = cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True)
    return kernel, (append_fakes(config), stream)
