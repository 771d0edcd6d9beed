"""What the append kernel takes."""

from typing import NamedTuple, Optional

import cutlass.cute as cute
from cutlass import BFloat16, Float16, Float32, Int32, const_expr

from cute_fa.device.arguments import Descales
from cute_fa.device.dtypes import CUTE_DTYPE
from cute_fa.device.fake_arguments import fake_activations, fake_strided, fake_vector, optional
from cute_fa.device.pages import page_place
from fa2_sm80.append.config import AppendConfig


class NewRows(NamedTuple):
    """A tensor (batch, rows, heads, d), or (total, heads, d) with ``cu_seqlens``; ``seqused`` (batch): how many rows of
    each sequence count; ``longest``: rows of the longest sequence, which sizes the grid."""

    tensor: cute.Tensor
    cu_seqlens: Optional[cute.Tensor]
    seqused: Optional[cute.Tensor]
    longest: Int32

    @property
    def heads(self):
        return self.tensor.shape[-2]

    def extent(self, batch: Int32):
        """(first row in the packed tensor, rows that count)."""
        start, rows = Int32(0), Int32(self.tensor.shape[1])
        if const_expr(self.cu_seqlens is not None):
            start = self.cu_seqlens[batch]
            rows = self.cu_seqlens[batch + 1] - start
        if const_expr(self.seqused is not None):
            rows = self.seqused[batch]
        return start, rows

    def row(self, batch: Int32, start: Int32, token: Int32, head: Int32) -> cute.Tensor:
        """The elements of one head of one token."""
        if const_expr(self.cu_seqlens is not None):
            return self.tensor[start + token, head, None]
        return self.tensor[batch, token, head, None]


class Cache(NamedTuple):
    """k and v (batch_cache, seqlen_cache, heads_kv, d), or pages (num_pages, page_size, heads_kv, d) with
    ``page_table`` (batch, max_pages). ``cache_batch_idx`` (batch): which sequence of the cache, or row of the table, is
    that of the batch."""

    k: cute.Tensor
    v: cute.Tensor
    page_table: Optional[cute.Tensor]
    cache_batch_idx: Optional[cute.Tensor]

    @property
    def capacity(self):
        """Tokens that a sequence has room for."""
        rows = self.k.shape[1]
        return rows if const_expr(self.page_table is None) else rows * self.page_table.shape[1]

    def slot(self, batch: Int32, position: Int32, page_size):
        """(page or sequence, row in it) of a position inside the capacity."""
        if const_expr(self.cache_batch_idx is not None):
            batch = self.cache_batch_idx[batch]
        if const_expr(self.page_table is not None):
            index, row = page_place(position, page_size)
            return self.page_table[batch, index], row
        return batch, position


class Rotary(NamedTuple):
    """Cosine and sine (positions, rotary_dim / 2), any strides. ``seqlens`` (batch): position of a sequence's first new
    row, where that is not its place in the cache. ``query_step``: 1 if each query has a position of its own, 0 if all
    have that of the first."""

    cos: cute.Tensor
    sin: cute.Tensor
    seqlens: Optional[cute.Tensor]
    query_step: Int32


class AppendArguments(NamedTuple):
    """``cache_seqlens`` (batch): tokens in the cache before; ``seqused_k`` (batch), written: and after. ``q_rotated``:
    like q's tensor, written. ``descales``: of k and v where rows are rounded to fp8, (batch, heads_kv), or
    (sequences or pages, rows, heads_kv, 1), written where they are the rows' own."""

    q: Optional[NewRows]
    q_rotated: Optional[cute.Tensor]
    k: NewRows
    v: cute.Tensor
    cache: Cache
    cache_seqlens: cute.Tensor
    seqused_k: cute.Tensor
    rotary: Optional[Rotary]
    descales: Optional[Descales]


def append_fakes(config: AppendConfig) -> AppendArguments:
    """Arguments for ``cute.compile``."""
    c, dtype = config, CUTE_DTYPE[config.dtype]

    def rows(packed: bool, used: bool) -> NewRows:
        lengths = (optional(given, lambda: fake_vector(Int32)) for given in (packed, used))
        return NewRows(fake_activations(dtype, packed, c.head_dim), *lengths, Int32(0))

    def table() -> cute.Tensor:
        element = {"fp16": Float16, "bf16": BFloat16, "fp32": Float32}[c.rotary_dtype]
        stride = (cute.sym_int64(), cute.sym_int64())
        return cute.runtime.make_fake_tensor(element, (cute.sym_int(), c.rotary_dim // 2), stride=stride)

    def rotary() -> Rotary:
        return Rotary(table(), table(), optional(c.rotary_seqlens, lambda: fake_vector(Int32)), Int32(0))

    def descale(of_cache: bool) -> cute.Tensor:
        return fake_strided(Float32, 4 if of_cache else 2)

    def descales() -> Descales:
        of_cache = (c.k_page_descale or c.k_row_descale, c.v_page_descale or c.v_row_descale)
        return Descales(None, *map(descale, of_cache))

    return AppendArguments(
        q=optional(c.query, lambda: rows(c.packed_q, c.used_q)),
        q_rotated=optional(c.query, lambda: fake_activations(dtype, c.packed_q, c.head_dim)),
        k=rows(c.packed_k, c.used_k),
        v=fake_activations(CUTE_DTYPE[c.dtype_new_v], c.packed_k, c.head_dim_v),
        cache=Cache(
            fake_activations(CUTE_DTYPE[c.dtype_k], False, c.head_dim),
            fake_activations(CUTE_DTYPE[c.dtype_v], False, c.head_dim_v),
            optional(c.page_size is not None, lambda: fake_vector(Int32, 2)),
            optional(c.cache_batch_idx, lambda: fake_vector(Int32)),
        ),
        cache_seqlens=fake_vector(Int32),
        seqused_k=fake_vector(Int32),
        rotary=optional(c.rotary_dim > 0, rotary),
        descales=optional(c.quantises, descales),
    )
