"""Append to a KV cache: new keys and values go to their slots, keys and queries are rotated on the way. Caches in fp8
get rows in fp8 as they are, others divided by the descale and rounded, once, behind the rotation. The descale is given,
or the row's own, which is written to its place beside the cache.

Rotary position embedding (RoFormer, arXiv 2104.09864, section 3.4.2): the pair (x, y) of angle θ becomes
(x·cos θ − y·sin θ, x·sin θ + y·cos θ). Pairs are neighbours if interleaved (GPT-J), else element i and i + rotary_dim/2
(GPT-NeoX).
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr

from cute_fa.semantics.types import DType
from fa2_sm80.append.arguments import AppendArguments, NewRows, append_fakes
from fa2_sm80.append.config import NUM_THREADS, AppendConfig, chunk_of
from fa2_sm80.append.quantise import own_descale, quantised


class AppendKernel:
    """A thread moves 16 bytes of one head of one token, as rows hold them; a CTA works on queries, keys or values
    alone."""

    def __init__(self, config: AppendConfig):
        self.config = config
        self.chunk = chunk_of(config.dtype)

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
        rows, rows_per_cta = args.k.longest * args.k.heads, [NUM_THREADS // lanes for lanes in c.row_lanes]
        tiles_q = 0
        if const_expr(c.query):
            tiles_q = cute.ceil_div(args.q.longest * args.q.heads, rows_per_cta[0])
        # one at least, for the CTA that writes the length
        tiles_k = cutlass.max(cute.ceil_div(rows, rows_per_cta[0]), 1)
        return tiles_q, tiles_k, cute.ceil_div(rows, rows_per_cta[1])

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
        token, head, chunk, inside = place(tile, tidx, c.head_dim, c.dtype, c.row_lanes[0], args.k.heads, length)
        # what lies beyond the cache is not written, whatever the caller promised
        inside = inside & (position + token < args.cache.capacity)
        if const_expr(c.k_row_descale):
            values = self.zeros()
            if inside:
                source = args.k.row(batch, start, token, head)
                values.store(load(source, chunk, self.chunk).load().to(Float32))
                self.rotate(args, source, values, batch, chunk, position, token)
            cache, descales, lanes = args.cache.k, args.descales.k, c.row_lanes[0]
            self.store_measured(args, values, cache, descales, batch, position + token, head, chunk, inside, lanes)
        elif inside:
            source = args.k.row(batch, start, token, head)
            slot, row = args.cache.slot(batch, position + token, c.page_size)
            target, descale = args.cache.k[slot, row, head, None], None
            if const_expr(c.quantises):
                descale = given_descale(args.descales.k, batch, slot, row, head)
            self.move_rotated(args, source, target, batch, chunk, position, token, descale)

    @cute.jit
    def move_values(self, args: AppendArguments, batch, tile, start, length, position, tidx):
        """New values to their slots."""
        c = self.config
        token, head, chunk, inside = place(tile, tidx, c.head_dim_v, c.dtype, c.row_lanes[1], args.k.heads, length)
        inside = inside & (position + token < args.cache.capacity)
        rows = args.k._replace(tensor=args.v)
        if const_expr(c.v_row_descale):
            values = self.zeros()
            if inside:
                values.store(load(rows.row(batch, start, token, head), chunk, self.chunk).load().to(Float32))
            cache, descales, lanes = args.cache.v, args.descales.v, c.row_lanes[1]
            self.store_measured(args, values, cache, descales, batch, position + token, head, chunk, inside, lanes)
        elif inside:
            source = rows.row(batch, start, token, head)
            slot, row = args.cache.slot(batch, position + token, c.page_size)
            values, target = load(source, chunk, self.chunk), args.cache.v[slot, row, head, None]
            if const_expr(c.quantises):
                descale = given_descale(args.descales.v, batch, slot, row, head)
                values = quantised(widened(values), descale, target.element_type, c.arch)
            store(values, target, chunk)

    def zeros(self) -> cute.Tensor:
        """A chunk in fp32."""
        values = cute.make_rmem_tensor(self.chunk, Float32)
        values.fill(0.0)
        return values

    @cute.jit
    def store_measured(
        self,
        args: AppendArguments,
        values,
        cache,
        descales,
        batch,
        position,
        head,
        chunk,
        inside,
        lanes: cutlass.Constexpr[int],
    ):
        """A chunk of a row, which has so many ``lanes``, to its slot, as codes for the row's own descale, and that to
        its place. All threads come here: ``values`` of those that are not ``inside`` are 0."""
        c = self.config
        descale = own_descale(values, lanes, cache.element_type)
        if inside:
            slot, row = args.cache.slot(batch, position, c.page_size)
            if chunk == 0:
                descales[slot, row, head, 0] = descale
            store(quantised(values, descale, cache.element_type, c.arch), cache[slot, row, head, None], chunk)

    @cute.jit
    def rotate_queries(self, args: AppendArguments, batch, tile, position, tidx):
        """Queries to a tensor of their own, rotated."""
        q: NewRows = args.q
        start, length = q.extent(batch)
        c = self.config
        token, head, chunk, inside = place(tile, tidx, c.head_dim, c.dtype, c.row_lanes[0], q.heads, length)
        if inside:
            target = q._replace(tensor=args.q_rotated).row(batch, start, token, head)
            steps = args.rotary.query_step * token
            self.move_rotated(args, q.row(batch, start, token, head), target, batch, chunk, position, steps, None)

    @cute.jit
    def move_rotated(self, args: AppendArguments, source, target, batch, chunk, position, steps, descale):
        """One chunk of a row whose angle is that of ``steps`` behind the sequence's first new row; with a descale to an
        fp8 cache."""
        values = load(source, chunk, self.chunk)
        if const_expr(descale is not None):
            values = widened(values)
        self.rotate(args, source, values, batch, chunk, position, steps)
        if const_expr(descale is not None):
            values = quantised(values, descale, target.element_type, self.config.arch)
        store(values, target, chunk)

    @cute.jit
    def rotate(self, args: AppendArguments, source, values, batch, chunk, position, steps):
        """``values``: the chunk of ``source``, in any precision, in place; see :meth:`move_rotated`."""
        c = self.config
        if const_expr(c.rotary_dim > 0):
            if chunk < c.rotary_dim // self.chunk:
                if const_expr(c.rotary_seqlens):
                    position = args.rotary.seqlens[batch]
                # inside the tables, whatever the caller promised
                angle = cutlass.min(position + steps, args.rotary.cos.shape[0] - 1)
                cos, sin = args.rotary.cos[angle, None], args.rotary.sin[angle, None]
                if const_expr(c.rotary_interleaved):
                    self.rotate_neighbours(values, chunk, cos, sin)
                else:
                    self.rotate_halves(values, source, chunk, cos, sin)

    @cute.jit
    def rotate_neighbours(self, values, chunk, cos, sin):
        first = chunk * (self.chunk // 2)
        for i in cutlass.range_constexpr(self.chunk // 2):
            x, y = Float32(values[2 * i]), Float32(values[2 * i + 1])
            cosine, sine = Float32(cos[first + i]), Float32(sin[first + i])
            values[2 * i] = (x * cosine - y * sine).to(values.element_type)
            values[2 * i + 1] = (x * sine + y * cosine).to(values.element_type)

    @cute.jit
    def rotate_halves(self, values, source, chunk, cos, sin):
        half = self.config.rotary_dim // 2 // self.chunk
        is_first = chunk < half
        others = load(source, cutlass.select_(is_first, chunk + half, chunk - half), self.chunk)
        sign = cutlass.select_(is_first, Float32(-1.0), Float32(1.0))
        first = cutlass.select_(is_first, chunk, chunk - half) * self.chunk
        for i in cutlass.range_constexpr(self.chunk):
            cosine, sine = Float32(cos[first + i]), Float32(sin[first + i])
            values[i] = (Float32(values[i]) * cosine + sign * Float32(others[i]) * sine).to(values.element_type)


def place(tile: Int32, tidx: Int32, head_dim: int, dtype: DType, lanes: int, heads: Int32, length: Int32):
    """(token, head, chunk, whether there is such a row and chunk) of a thread; ``lanes``: of a row."""
    rows_per_cta = NUM_THREADS // lanes
    row = tile * rows_per_cta + tidx // lanes
    inside = (tidx // lanes < rows_per_cta) & (row < length * heads)
    if const_expr(lanes * chunk_of(dtype) > head_dim):
        inside = inside & (tidx % lanes * chunk_of(dtype) < head_dim)
    return row // heads, row % heads, tidx % lanes, inside


def given_descale(descales: cute.Tensor, batch: Int32, slot: Int32, row: Int32, head: Int32) -> Float32:
    """Of a row of the sequence, or of the row of the cache where it goes."""
    if const_expr(cute.rank(descales) == 2):
        return descales[batch, head]
    return descales[slot, row, head, 0]


def load(row: cute.Tensor, chunk: Int32, size: int) -> cute.Tensor:
    """A chunk of that many elements of a row in registers."""
    values = cute.make_rmem_tensor(size, row.element_type)
    cute.copy(_copy(values), cute.local_tile(row, (size,), (chunk,)), values)
    return values


def widened(values: cute.Tensor) -> cute.Tensor:
    """The same numbers in fp32."""
    wide = cute.make_rmem_tensor(values.layout, Float32)
    wide.store(values.load().to(Float32))
    return wide


def store(values: cute.Tensor, row: cute.Tensor, chunk: Int32):
    """Those to a row."""
    cute.copy(_copy(values), values, cute.local_tile(row, (cute.size(values),), (chunk,)))


def _copy(values: cute.Tensor):
    """All of these in one instruction."""
    bits = cute.size(values) * values.element_type.width
    return cute.make_copy_atom(cute.nvgpu.CopyUniversalOp(), values.element_type, num_bits_per_copy=bits)


def build(config: AppendConfig):
    """Callable and fake arguments for ``cute.compile``."""
    kernel = AppendKernel(config)
    stream = cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True)
    return kernel, (append_fakes(config), stream)
