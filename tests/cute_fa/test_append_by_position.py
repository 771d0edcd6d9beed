"""``append_rows`` and FlashInfer's append: every byte of the caches after it."""

import itertools

import pytest
import torch
from torch._subclasses import FakeTensorMode

import cute_fa
from cute_fa import append_rows
from cute_fa.compat import flashinfer
from cute_fa.semantics.errors import (
    ArgumentError,
    CacheIndexError,
    CuteFaError,
    DTypeError,
    LengthError,
    PageSizeError,
    PageTableError,
    ShapeError,
)

PAGES = [[9, 2, 5], [0], [7, 3]]  # of each sequence
# sequence and position of each row: any order, ends of pages, padding
ROWS = [(2, 15), (0, 16), (1, 7), (-1, 99), (0, 0), (0, 23), (2, 8), (1, 0), (-1, -3), (2, 7), (0, 15)]


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def rows_of(pairs=ROWS):
    return [ints(*column) for column in zip(*pairs, strict=True)]


def new(rows=11, heads=3, head_dim=64, head_dim_v=32):
    generator = torch.Generator().manual_seed(0)
    packed = torch.randn(rows, heads, head_dim + head_dim_v, generator=generator).half()
    return packed[..., :head_dim], packed[..., head_dim:]  # not contiguous


def caches(*leading, heads=3):
    return [torch.full((*leading, heads, head_dim), -5.0, dtype=torch.float16) for head_dim in (64, 32)]


def page_arguments(kind):
    if kind == "table":
        width = max(map(len, PAGES))
        return {"page_table": ints(*[page for row in PAGES for page in row + [10**6] * (width - len(row))]).view(3, -1)}
    ends = [sum(map(len, PAGES[:b])) for b in range(4)]
    return {"page_indices": ints(*itertools.chain(*PAGES)), "page_indptr": ints(*ends)}


@pytest.mark.parametrize("kind", ["contiguous", "table", "indptr"])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_every_byte(arch, kind):
    (k, v), (batch, positions) = new(), rows_of()
    page_size = 8
    given = caches(3, 24) if kind == "contiguous" else caches(10, page_size)
    expected = [cache.clone() for cache in given]
    for r, (b, position) in enumerate(ROWS):
        if b >= 0:
            place = (b, position)
            if kind != "contiguous":
                place = (PAGES[b][position // page_size], position % page_size)
            for cache, rows in zip(expected, (k, v), strict=True):
                cache[place] = rows[r]
    with cute_fa.simulate(arch):
        append_rows(k, v, *given, batch, positions, **({} if kind == "contiguous" else page_arguments(kind)))
    assert all(map(torch.equal, given, expected))


@pytest.mark.parametrize("kind", ["contiguous", "table", "indptr"])
def test_unchecked_rows_outside_are_not_written(kind, monkeypatch):
    """Of sequences that there are not, and beyond a sequence's room."""
    monkeypatch.setattr("cute_fa.api.append_by_position._check_values", lambda call: None)
    pairs = [(5, 0), (1, 0), (0, 24), (1, 10**6), (0, -1)]
    (k, v), (batch, positions) = new(len(pairs)), rows_of(pairs)
    given = caches(3, 24) if kind == "contiguous" else caches(10, 8)
    with cute_fa.simulate("sm_80"):
        append_rows(k, v, *given, batch, positions, **({} if kind == "contiguous" else page_arguments(kind)))
    for cache, rows in zip(given, (k, v), strict=True):
        place = (1, 0) if kind == "contiguous" else (PAGES[1][0], 0)
        assert torch.equal(cache[place], rows[1])
        cache[place] = -5.0
        assert (cache == -5.0).all()


def test_no_rows():
    given = caches(10, 8)
    with cute_fa.simulate("sm_80"):
        append_rows(*new(0), *given, ints(), ints(), **page_arguments("table"))
    assert all((cache == -5.0).all() for cache in given)


def test_shapes_without_data():
    with FakeTensorMode():
        (k, v), rows = new(), (torch.zeros(len(ROWS), dtype=torch.int32),) * 2
        append_rows(k, v, *caches(3, 24), *rows)
        with pytest.raises(ShapeError, match=r"positions \(4,\)"):
            append_rows(k, v, *caches(3, 24), rows[0], rows[1][:4])


@pytest.mark.parametrize("kv_layout", ["NHD", "HND"])
@pytest.mark.parametrize("paired", [True, False])
def test_flashinfer(kv_layout, paired):
    """New tokens of a prompt, none, and one of decoding, behind what the cache holds."""
    lengths, new_lengths = [20, 8, 13], [9, 0, 1]
    indptr = ints(0, 9, 9, 10)
    pages = page_arguments("indptr")
    last = ints(*[(length - 1) % 8 + 1 for length in lengths])
    seq_lens = flashinfer.get_seq_lens(pages["page_indptr"], last, 8)
    assert seq_lens.tolist() == [20, 8, 13]
    batch, positions = flashinfer.get_batch_indices_positions(indptr, seq_lens, 12)
    assert batch.tolist() == [0] * 9 + [2] + [-1] * 2
    assert positions.tolist() == [*range(11, 20), 12, 0, 0]
    kept = torch.full((12,), 77, dtype=torch.int32), torch.full((12,), 77, dtype=torch.int32)
    flashinfer.get_batch_indices_positions(indptr, seq_lens, 12, *kept)
    assert torch.equal(kept[0], batch)
    assert torch.equal(kept[1], positions)
    k, v = (t[..., :32] for t in new(12))
    shape = (10, 2, 8, 3, 32) if kv_layout == "NHD" else (10, 2, 3, 8, 32)
    cache = torch.full(shape, -5.0, dtype=torch.float16)
    given = cache.unbind(1) if paired else cache
    with cute_fa.simulate("sm_80"):
        flashinfer.append_paged_kv_cache(k, v, batch, positions, given, *pages.values(), last, kv_layout)
    nhd = cache if kv_layout == "NHD" else cache.transpose(2, 3)
    written = 0
    for b, (length, count) in enumerate(zip(lengths, new_lengths, strict=True)):
        held = nhd[PAGES[b]].transpose(0, 1).flatten(1, 2)[:, :length]  # (2, length, heads, head_dim)
        rows = slice(indptr[b], indptr[b + 1])
        assert torch.equal(held[0, length - count :], k[rows])
        assert torch.equal(held[1, length - count :], v[rows])
        written += 2 * count * 3 * 32
    assert (cache != -5.0).sum() == written


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"batch_indices": ints(0, 3)}, CacheIndexError, r"batch_indices\[1\]=3: the cache has 3 sequences"),
        ({"positions": ints(0, 24)}, LengthError, r"positions\[1\]=24: sequence 1 has room for 8"),
        ({"positions": ints(-1, 0)}, LengthError, r"positions\[0\]=-1"),
        ({"page_indices": ints(9, 2, 5, 10, 7, 3)}, PageTableError, "sequence 1 lists page 10: the cache has 10 pages"),
        ({"positions": ints(0)}, ShapeError, r"positions \(1,\): \(2,\) is needed"),
        ({"positions": torch.zeros(2)}, DTypeError, "positions is float32: int32"),
        ({"page_indptr": None}, ArgumentError, "page_indices and page_indptr: give both or neither"),
        ({"page_table": ints(0).view(1, 1)}, ArgumentError, "page_table and page_indices: two ways"),
        ({"k": torch.zeros(2, 1, 3, 64)}, ShapeError, r"k has shape \(2, 1, 3, 64\): \(rows, heads_kv, head_dim\)"),
        ({"v": 3}, ArgumentError, "v is int"),
        (
            {"k_cache": torch.zeros(10, 6, 3, 64).half(), "v_cache": torch.zeros(10, 6, 3, 32).half()},
            PageSizeError,
            "page_size=6",
        ),
    ],
)
def test_errors(change, error, message):
    k, v = new(2)
    k_cache, v_cache = caches(10, 8)
    given = {
        "k": k,
        "v": v,
        "k_cache": k_cache,
        "v_cache": v_cache,
        "batch_indices": ints(0, 1),
        "positions": ints(0, 0),
    }
    with cute_fa.simulate("sm_80"), pytest.raises(CuteFaError, match=message) as caught:
        append_rows(**{**given, **page_arguments("indptr"), **change})
    assert type(caught.value) is error
    assert (k_cache == -5.0).all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"kv_layout": "DNH"}, ArgumentError, "kv_layout='DNH': one of NHD, HND"),
        ({"paged_kv_cache": torch.zeros(10, 3, 8, 3, 32)}, ShapeError, r"paged_kv_cache \(10, 3, 8, 3, 32\)"),
        ({"kv_last_page_len": ints(1)}, ShapeError, r"kv_last_page_len \(1,\): \(3,\)"),
    ],
)
def test_errors_of_flashinfer(change, error, message):
    k, v = (t[..., :32] for t in new(2))
    pages = {"kv_indices": ints(0, 1, 2), "kv_indptr": ints(0, 1, 2, 3), "kv_last_page_len": ints(1, 1, 1)}
    given = {"append_key": k, "append_value": v, "batch_indices": ints(0, 1), "positions": ints(0, 0), **pages}
    cache = torch.zeros(10, 2, 8, 3, 32)
    with pytest.raises(CuteFaError, match=message) as caught:
        flashinfer.append_paged_kv_cache(**{**given, "paged_kv_cache": cache, **change})
    assert type(caught.value) is error
