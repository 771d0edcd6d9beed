"""Appending rows that each say where they go: the operator ``cute_fa::append_rows``.

FlashInfer and servers built on it describe new tokens by a sequence and a position each, in any order. The append
kernel (``cute_fa.api.append``) takes sequences with consecutive rows; here each row is a sequence of one row, in the
one page where it goes, which torch's operators look up on the device. Nothing is read by the host.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch

from cute_fa.api import values
from cute_fa.api.append import with_written_descales
from cute_fa.engine import append, worlds
from cute_fa.engine.operators import define, schema
from cute_fa.semantics.call import AppendCall
from cute_fa.semantics.errors import (
    ArgumentError,
    CacheIndexError,
    EmptyCacheError,
    LengthError,
    PageTableError,
    ShapeError,
)
from cute_fa.semantics.tensors import check_descale, check_devices, check_dims, check_integers, check_vector, has_rows


class RowsCall(NamedTuple):
    """Arguments of the operator, in the schema's order; meanings as for :func:`append_rows`."""

    k_cache: torch.Tensor
    v_cache: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    batch_indices: torch.Tensor
    positions: torch.Tensor
    page_table: torch.Tensor | None = None
    page_indices: torch.Tensor | None = None
    page_indptr: torch.Tensor | None = None
    k_descale: torch.Tensor | None = None
    v_descale: torch.Tensor | None = None
    k_row_descale: torch.Tensor | None = None
    v_row_descale: torch.Tensor | None = None

    @property
    def pages(self) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None:
        """``page_table``, or ``page_indices`` and ``page_indptr``, which come together; None for contiguous caches."""
        if self.page_indices is not None and self.page_indptr is not None:
            return self.page_indices, self.page_indptr
        return self.page_table


def append_rows(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch_indices: torch.Tensor,
    positions: torch.Tensor,
    *,
    page_table: torch.Tensor | None = None,
    page_indices: torch.Tensor | None = None,
    page_indptr: torch.Tensor | None = None,
    k_descale: torch.Tensor | float | None = None,
    v_descale: torch.Tensor | float | None = None,
) -> None:
    """Write each new key and value to the sequence and the position that it names, in place.

    k, v: (rows, heads_kv, head_dim | head_dim_v), in dtypes that :func:`cute_fa.append_kv` takes for the caches'.
    batch_indices, positions: int32 (rows): row r becomes token positions[r] of sequence batch_indices[r]. Rows come in
    any order; one with a negative batch index is padding and is not written; of two for one place, either stays.
    k_cache, v_cache: (batch, seqlen_cache, heads_kv, …); or pages (num_pages, page_size, heads_kv, …) with
    ``page_table`` int32 (batch, max_pages), or with FlashInfer's ``page_indices`` int32 and ``page_indptr`` int32
    (batch + 1): page p of sequence b is page_indices[page_indptr[b] + p]. Strides as for :func:`cute_fa.append_kv`.
    k_descale, v_descale: fp32 (batch, heads_kv), one number, or of four dimensions as the caches have them, of which
    those of rows are written, as for :func:`cute_fa.append_kv`.

    A place outside of the cache is an error where values are checked (``CUTE_FA_CHECK=1``, simulating), else the row is
    not written. Raises a subclass of ``cute_fa.errors.CuteFaError`` before anything is written.
    """
    descales = values.descale("k_descale", k_descale, k_cache), values.descale("v_descale", v_descale, k_cache)
    places = batch_indices, positions, page_table, page_indices, page_indptr
    call = RowsCall(k_cache, v_cache, k, v, *places, *descales)
    for name, tensor in zip(RowsCall._fields, call, strict=True):
        if not isinstance(tensor, torch.Tensor) and not (tensor is None and name in RowsCall._field_defaults):
            raise ArgumentError(f"{name} is {type(tensor).__name__}: a torch.Tensor is needed")
    if (page_indices is None) != (page_indptr is None):
        raise ArgumentError("page_indices and page_indptr: give both or neither")
    if page_table is not None and page_indices is not None:
        raise ArgumentError("page_table and page_indices: two ways to list pages, give one")
    torch.ops.cute_fa.append_rows(*with_written_descales(call))


def _append_rows(*arguments: Any) -> None:
    call = RowsCall._make(arguments)
    _check(call)
    if call.k.shape[0] == 0:
        return
    if worlds.checks_values():
        _check_values(call)
    append.append_kv(*_sequences_of_one_row(call))


def _sequences_of_one_row(call: RowsCall) -> AppendCall:
    batch, positions = call.batch_indices, call.positions
    sequence = batch.clamp(0, max(_batch(call) - 1, 0))
    place = positions
    present = (batch >= 0) & (batch < _batch(call)) & (positions >= 0)
    pages, page = call.pages, None
    if pages is not None:
        column, place = positions // call.k_cache.shape[1], positions % call.k_cache.shape[1]
        page, listed = _page(pages, sequence, column)
        present, page = present & listed, page[:, None]
    else:
        present = present & (positions < call.k_cache.shape[1])
    return AppendCall(
        k_cache=call.k_cache,
        v_cache=call.v_cache,
        k=call.k[:, None],
        v=call.v[:, None],
        cache_seqlens=place * present,
        page_table=page,
        cache_batch_idx=None if page is not None else sequence,
        seqused_k_new=present.int(),
        k_descale=_of_rows(call.k_descale, sequence),
        v_descale=_of_rows(call.v_descale, sequence),
        k_row_descale=call.k_row_descale,
        v_row_descale=call.v_row_descale,
    )


def _of_rows(descale: torch.Tensor | None, sequence: torch.Tensor) -> torch.Tensor | None:
    """Those of each row's sequence, (rows, heads_kv); one number is that of all, and those of pages are as they are."""
    return descale if descale is None or descale.numel() == 1 or has_rows(descale) else descale[sequence]


def _page(
    pages: torch.Tensor | tuple[torch.Tensor, torch.Tensor], sequence: torch.Tensor, column: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(the column-th page of the sequence, whether it lists one), each (rows)."""
    if isinstance(pages, torch.Tensor):
        last = pages.shape[1] - 1
        return pages[sequence, column.clamp(0, last)], column <= last
    indices, starts = pages
    index = starts[sequence] + column
    inside = (index < starts[sequence + 1]) & (index < indices.shape[0])
    return indices[index.clamp(0, indices.shape[0] - 1)], inside


def _batch(call: RowsCall) -> int:
    if call.page_indptr is not None:
        return call.page_indptr.shape[0] - 1
    return (call.k_cache if call.page_table is None else call.page_table).shape[0]


def _check(call: RowsCall) -> None:
    """The rules that rows and lists of pages can break; those of keys, values and caches are the append's."""
    check_devices(call._asdict(), "k_cache")
    check_dims("k", call.k, 3, "(rows, heads_kv, head_dim)")
    check_dims("v", call.v, 3, "(rows, heads_kv, head_dim_v)")
    for name in ("batch_indices", "positions"):
        check_vector(name, getattr(call, name), torch.int32, (call.k.shape[0],))
    for name in ("k_descale", "v_descale"):
        descale, shape = getattr(call, name), (_batch(call), call.k.shape[1])
        if descale is not None and not has_rows(descale):
            check_descale(name, descale, shape, f"{shape[0]} sequences and {shape[1]} heads of k")
    if call.page_table is not None:
        check_dims("page_table", call.page_table, 2, "(batch, max_pages)")
        check_integers("page_table", call.page_table)
        if call.page_table.numel() == 0:
            raise EmptyCacheError(f"page_table {tuple(call.page_table.shape)}: it lists no page")
    if isinstance(call.pages, tuple):
        for name, tensor in zip(("page_indices", "page_indptr"), call.pages, strict=True):
            check_dims(name, tensor, 1, "one dimension")
            check_vector(name, tensor, torch.int32, (tensor.numel(),))
        indices, starts = call.pages
        if starts.shape[0] < 2:
            raise ShapeError(f"page_indptr {tuple(starts.shape)}: (batch + 1) is needed")
        if indices.shape[0] == 0:
            raise EmptyCacheError("page_indices (0,): it lists no page")


def _check_values(call: RowsCall) -> None:
    """Check the numbers in tensors: host synchronisations. Raises CacheIndexError, LengthError or PageTableError."""
    batch = _batch(call)
    rows = call.k_cache.shape[1]
    capacity, pages = [rows] * batch, None
    if isinstance(call.pages, tuple):
        listed, starts = (tensor.tolist() for tensor in call.pages)
        pages = [listed[start:end] for start, end in itertools.pairwise(starts)]
    elif call.pages is not None:
        pages = call.pages.tolist()
    if pages is not None:
        capacity = [rows * len(of_sequence) for of_sequence in pages]
    for r, (b, position) in enumerate(zip(call.batch_indices.tolist(), call.positions.tolist(), strict=True)):
        if b < 0:
            continue
        if b >= batch:
            raise CacheIndexError(f"batch_indices[{r}]={b}: the cache has {batch} sequences")
        if not 0 <= position < capacity[b]:
            raise LengthError(f"positions[{r}]={position}: sequence {b} has room for {capacity[b]}")
        if pages is not None and not 0 <= pages[b][position // rows] < call.k_cache.shape[0]:
            page = pages[b][position // rows]
            raise PageTableError(f"sequence {b} lists page {page}: the cache has {call.k_cache.shape[0]} pages")


def _fake(*arguments: Any) -> None:
    _check(RowsCall._make(arguments))


define("append_rows", schema(RowsCall, written=append.WRITTEN), "()", _append_rows, _fake)
