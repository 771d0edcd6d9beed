"""Functions of FlashInfer that append to a paged cache (page.py) and merge attention states (cascade.py).

LSEs of attention states are of base 2 there. What gives them here is the natural logarithm of ``cute_fa``'s functions
times log2(e); a merge of states that are all of one base is right in either (``cute_fa.merge_states(lse_base=)``).
"""

from __future__ import annotations

import torch

from cute_fa.api.append_by_position import append_rows
from cute_fa.api.merge import merge_states as _merge_states
from cute_fa.semantics.errors import ArgumentError, ShapeError
from cute_fa.semantics.tensors import check_like, check_vector

_LAYOUTS = ("NHD", "HND")


def get_seq_lens(kv_indptr: torch.Tensor, kv_last_page_len: torch.Tensor, page_size: int) -> torch.Tensor:
    """(batch), tokens of each sequence: all its pages are full but the last. kv_indptr: (batch + 1)."""
    return (kv_indptr.diff() - 1).clamp(min=0) * page_size + kv_last_page_len


def get_batch_indices_positions(
    append_indptr: torch.Tensor,
    seq_lens: torch.Tensor,
    nnz: int,
    batch_indices: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """int32 (nnz) each: to which sequence each new row belongs, and where it goes when the new rows are the sequence's
    last ones. append_indptr: int32 (batch + 1), offsets of the sequences' new rows; seq_lens: (batch), with the new
    rows. Rows beyond append_indptr[-1] are padding: −1 and 0. Written to the tensors given, or to new ones."""
    rows = torch.arange(nnz, dtype=append_indptr.dtype, device=append_indptr.device)
    sequence = torch.searchsorted(append_indptr, rows, right=True).sub(1).clamp(0, append_indptr.shape[0] - 2)
    inside = rows < append_indptr[-1]
    places = seq_lens[sequence] - append_indptr[sequence + 1] + rows
    results = []
    for name, given, values, otherwise in (
        ("batch_indices", batch_indices, sequence, -1),
        ("positions", positions, places, 0),
    ):
        values = values.int().where(inside, otherwise)
        if given is not None:
            check_vector(name, given, torch.int32, (nnz,))
            values = given.copy_(values)
        results.append(values)
    return results[0], results[1]


def append_paged_kv_cache(
    append_key: torch.Tensor,
    append_value: torch.Tensor,
    batch_indices: torch.Tensor,
    positions: torch.Tensor,
    paged_kv_cache: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
    kv_indices: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_last_page_len: torch.Tensor,
    kv_layout: str = "NHD",
) -> None:
    """:func:`cute_fa.append_rows` with FlashInfer's arguments.

    paged_kv_cache: (pages, 2, page_size, heads_kv, head_dim) or a pair of (pages, page_size, heads_kv, head_dim); with
    "HND" heads before page_size. page_size is a power of two from 1 to 1024.
    kv_last_page_len: int32 (batch); nothing here needs it, positions say where rows go."""
    if kv_layout not in _LAYOUTS:
        raise ArgumentError(f"kv_layout={kv_layout!r}: one of {', '.join(_LAYOUTS)}")
    if isinstance(paged_kv_cache, torch.Tensor):
        if paged_kv_cache.dim() != 5 or paged_kv_cache.shape[1] != 2:
            raise ShapeError(f"paged_kv_cache {tuple(paged_kv_cache.shape)}: (pages, 2, …) of 5 dimensions is needed")
        k_cache, v_cache = paged_kv_cache.unbind(1)
    else:
        k_cache, v_cache = paged_kv_cache
    if kv_layout == "HND":
        k_cache, v_cache = k_cache.transpose(1, 2), v_cache.transpose(1, 2)
    check_vector("kv_last_page_len", kv_last_page_len, torch.int32, (kv_indptr.shape[0] - 1,))
    pages = {"page_indices": kv_indices, "page_indptr": kv_indptr}
    append_rows(append_key, append_value, k_cache, v_cache, batch_indices, positions, **pages)


def merge_state(
    v_a: torch.Tensor, s_a: torch.Tensor, v_b: torch.Tensor, s_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The state over both parts of the keys. v: (seq_len, heads, head_dim); s: (seq_len, heads), base 2."""
    return _merge_states((v_a, v_b), (s_a.float(), s_b.float()), layout="flashinfer", lse_base=2)


def merge_state_in_place(
    v: torch.Tensor, s: torch.Tensor, v_other: torch.Tensor, s_other: torch.Tensor, mask: torch.Tensor | None = None
) -> None:
    """``merge_state`` written to v and s (fp32); where ``mask`` (seq_len) is False a row stays as it is."""
    check_like("s", s, v.shape[:-1], torch.float32)
    merged, lse = merge_state(v, s, v_other, s_other)
    if mask is not None:
        check_like("mask", mask, v.shape[:1], torch.bool)
        merged, lse = merged.where(mask[:, None, None], v), lse.where(mask[:, None], s)
    v.copy_(merged)
    s.copy_(lse)


def merge_states(v: torch.Tensor, s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The state over all parts. v: (seq_len, num_states, heads, head_dim); s: (seq_len, num_states, heads), base 2."""
    return _merge_states(v, s.float(), layout="flashinfer", lse_base=2)
