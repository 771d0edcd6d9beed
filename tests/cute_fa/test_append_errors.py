"""Appends that break a rule: an error of its own kind with the value, and not a byte of the cache changes."""

import pytest
import torch

import cute_fa
from cute_fa import append_kv
from cute_fa.semantics.errors import (
    ArgumentError,
    CacheIndexError,
    CumulativeSeqlensError,
    CuteFaError,
    DeviceError,
    DTypeError,
    EmptyBatchError,
    EmptyCacheError,
    LengthError,
    PagedHeadDimError,
    PageSizeError,
    PageTableError,
    ShapeError,
    StrideError,
)

BF16 = torch.bfloat16


def rows(*shape, dtype=BF16):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


# Two sequences of three pages each, with 40 and 5 of 48 tokens; 3 new ones.
PAGED = {
    "k": rows(2, 3, 2, 64),
    "v": rows(2, 3, 2, 64),
    "k_cache": rows(7, 16, 2, 64),
    "v_cache": rows(7, 16, 2, 64),
    "cache_seqlens": ints(40, 5),
    "page_table": ints(4, 0, 6, 1, 2, 3).reshape(2, 3),
}
CONTIGUOUS = {**PAGED, "k_cache": rows(4, 48, 2, 64), "v_cache": rows(4, 48, 2, 64), "cache_batch_idx": ints(3, 1)}
del CONTIGUOUS["page_table"]
PACKED = {**PAGED, "k": rows(6, 2, 64), "v": rows(6, 2, 64), "cu_seqlens_k_new": ints(0, 4, 6)}
ROTARY = {"rotary_cos": rows(48, 32), "rotary_sin": rows(48, 32), "q": rows(2, 3, 4, 64)}


def both(name, *shape, dtype=BF16):
    """k and v, or both caches, of one shape."""
    return {name.format(tensor): rows(*shape, dtype=dtype) for tensor in "kv"}


def refused(arguments, error, message):
    """The call raises just this and leaves every tensor as it was."""
    before = {name: t.clone() for name, t in arguments.items() if isinstance(t, torch.Tensor)}
    with cute_fa.simulate("sm_80") as simulation, pytest.raises(CuteFaError, match=message) as caught:
        append_kv(**arguments)
    assert type(caught.value) is error
    assert not simulation.launches
    for name, tensor in before.items():
        if tensor.device.type == "cpu":
            now = arguments[name].contiguous().view(torch.uint8)
            assert now.equal(tensor.contiguous().view(torch.uint8)), name


def test_the_unchanged_arguments_are_good():
    for arguments in (PAGED, CONTIGUOUS, PACKED, {**PAGED, **ROTARY}, {**CONTIGUOUS, **ROTARY}):
        arguments = {name: t.clone() for name, t in arguments.items()}
        with cute_fa.simulate("sm_80"):
            _, seqlens = append_kv(**arguments)
        assert seqlens.tolist() == ([44, 7] if arguments["k"].dim() == 3 else [43, 8])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        # nothing there
        (both("{}", 0, 3, 2, 64), ShapeError, r"page_table \(2, 3\): one row for each of 0 sequences"),
        (
            {**both("{}", 0, 3, 2, 64), "page_table": PAGED["page_table"][:0], "cache_seqlens": ints()},
            EmptyBatchError,
            r"page_table \(0, 3\): a paged cache of at least one sequence",
        ),
        (both("{}_cache", 0, 16, 2, 64), EmptyCacheError, r"\(0, 16, 2, 64\).*the cache has no pages"),
        ({"page_table": PAGED["page_table"][:, :0]}, EmptyCacheError, r"page_table \(2, 0\): the cache has no pages"),
        # pages
        (both("{}_cache", 7, 12, 2, 64), PageSizeError, "page_size=12: a power of two from 1 to 1024"),
        (both("{}_cache", 7, 2048, 2, 64), PageSizeError, "page_size=2048"),
        (both("{}_cache", 7, 16, 2, 128), PagedHeadDimError, "128 and the new k 64"),
        (both("{}", 2, 3, 2, 128), PagedHeadDimError, "64 and the new k 128"),
        ({"v": rows(2, 3, 2, 32)}, ShapeError, r"v \(2, 3, 2, 32\): \(2, 3, 2, 64\) is needed"),
        (both("{}", 2, 3, 4, 64), ShapeError, r"k \(2, 3, 4, 64\): \(2, 3, 2, 64\) is needed"),
        ({"page_table": PAGED["page_table"][:1]}, ShapeError, "one row for each of 2 sequences"),
        ({"page_table": PAGED["page_table"].long()}, DTypeError, "page_table is int64: int32"),
        ({"page_table": ints(4, 0, 7, 1, 2, 3).reshape(2, 3)}, PageTableError, r"page_table\[0\] lists page 7: .* 7 p"),
        ({"page_table": ints(4, 0, 6, -1, 2, 3).reshape(2, 3)}, PageTableError, r"page_table\[1\] lists page -1"),
        # places
        ({"cache_seqlens": ints(46, 5)}, LengthError, r"cache_seqlens\[0\]=46 and 3 new tokens: .* room for 48"),
        ({"cache_seqlens": ints(40, -1)}, LengthError, r"cache_seqlens\[1\]=-1 and 3 new tokens"),
        ({"cache_seqlens": ints(2**31 - 1, 5)}, LengthError, r"cache_seqlens\[0\]=2147483647"),
        ({"cache_seqlens": ints(40)}, ShapeError, r"cache_seqlens \(1,\): \(2,\) is needed"),
        ({"cache_seqlens": torch.tensor([40.0, 5.0])}, DTypeError, "cache_seqlens is float32: int32"),
        ({"seqused_k_new": ints(4, 0)}, LengthError, r"seqused_k_new\[0\]=4: between 0 and the 3 tokens"),
        ({"cache_seqlens": ints(46, 5), "seqused_k_new": ints(3, 0)}, LengthError, "46 and 3 new tokens"),
        ({"cache_batch_idx": ints(0, 1, 1)}, ShapeError, r"cache_batch_idx \(3,\): \(2,\)"),
        ({"cache_batch_idx": ints(0, 2)}, CacheIndexError, r"cache_batch_idx\[1\]=2: page_table has 2 rows"),
        (
            {"cache_batch_idx": ints(1, 1), "page_table": PAGED["page_table"][:0]},
            EmptyCacheError,
            "the cache has no pages",
        ),
        (
            {"cache_batch_idx": ints(1, 0), "page_table": ints(4, 0, 6, 1, 7, 3).reshape(2, 3)},
            PageTableError,
            r"page_table\[1\] lists page 7",
        ),
        # tensors
        ({"k_cache": PAGED["k_cache"].half()}, DTypeError, "k_cache is float16: bfloat16, .* is needed, for k"),
        ({"v": PAGED["v"].float()}, DTypeError, "v is float32: bfloat16 is needed, as k is"),
        (both("{}", 2, 3, 2, 64, dtype=torch.float32), DTypeError, "k is float32: float16, bfloat16, .* is needed"),
        (
            both("{}", 2, 3, 2, 64, dtype=torch.float8_e4m3fn),
            DTypeError,
            "k_cache is bfloat16: float8_e4m3fn is needed",
        ),
        ({"v_cache": rows(6, 16, 2, 64)}, ShapeError, r"v_cache .*\(6, 16, 2, 64\)|v \(6, 16, 2, 64\) and k"),
        ({"k_cache": rows(7, 16, 2, 68)[..., :64]}, StrideError, "k_cache has strides .* multiple of 16 bytes"),
        (
            {"k_cache": rows(1, 16, 2, 64).expand(7, -1, -1, -1)},
            StrideError,
            "k_cache has strides .* cannot be written",
        ),
        ({"k": rows(2, 3, 64, 2).transpose(2, 3)}, StrideError, "k has strides .* last dimension must be contiguous"),
        ({"k": PAGED["k_cache"][:2, :3]}, ArgumentError, "k_cache shares its memory with k"),
        ({"k": PAGED["k"].to("meta")}, DeviceError, "k is on meta"),
    ],
)
def test_paged(changes, error, message):
    refused({**PAGED, **changes}, error, message)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (both("{}_cache", 0, 48, 2, 64), EmptyCacheError, "the cache has no sequences"),
        (both("{}_cache", 4, 48, 2, 128), ShapeError, "128 and the new k 64"),
        (both("{}_cache", 3, 48, 2, 64), CacheIndexError, r"cache_batch_idx\[0\]=3: the cache has 3 sequences"),
        ({"cache_batch_idx": ints(3, -1)}, CacheIndexError, r"cache_batch_idx\[1\]=-1"),
        ({"cache_batch_idx": None}, ShapeError, "its first size is the batch, the 2 sequences"),
        ({"cache_batch_idx": ints(3, 1, 0)}, ShapeError, r"cache_batch_idx \(3,\): \(2,\)"),
        ({"cache_seqlens": ints(46, 5)}, LengthError, r"cache_seqlens\[0\]=46 and 3 new tokens: .* room for 48"),
    ],
)
def test_contiguous(changes, error, message):
    refused({**CONTIGUOUS, **changes}, error, message)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"cu_seqlens_k_new": ints()}, EmptyBatchError, r"cu_seqlens_k_new \(0,\): .* offset 0"),
        ({"cu_seqlens_k_new": ints(0)}, ShapeError, r"page_table \(2, 3\): one row for each of 0 sequences"),
        ({"cu_seqlens_k_new": ints(0, 4, 7)}, CumulativeSeqlensError, "cu_seqlens_k_new ends at 7: .* has 6 rows"),
        ({"cu_seqlens_k_new": ints(0, 4, 3)}, CumulativeSeqlensError, "cu_seqlens_k_new goes from 4 to 3"),
        ({"cu_seqlens_k_new": ints(1, 4, 6)}, CumulativeSeqlensError, r"cu_seqlens_k_new\[0\]=1"),
        ({"max_seqlen_k_new": 3}, LengthError, "max_seqlen_k_new=3: a sequence has 4 tokens"),
        ({"max_seqlen_k_new": -1}, ArgumentError, "max_seqlen_k_new=-1"),
        ({"cache_seqlens": ints(45, 5)}, LengthError, r"cache_seqlens\[0\]=45 and 4 new tokens: .* room for 48"),
        ({"k": rows(2, 3, 2, 64)}, ShapeError, r"k has shape \(2, 3, 2, 64\): \(total, heads_kv, head_dim\) with"),
    ],
)
def test_packed(changes, error, message):
    refused({**PACKED, **changes}, error, message)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"rotary_sin": None}, ArgumentError, "rotary_cos and rotary_sin: give both or neither"),
        ({"rotary_cos": None, "rotary_sin": None, "rotary_seqlens": ints(0, 0)}, ArgumentError, "nothing rotates"),
        ({"rotary_sin": rows(48, 24)}, ShapeError, r"rotary_sin \(48, 24\): \(48, 32\)"),
        ({"rotary_sin": rows(48, 32).half()}, DTypeError, "rotary_sin is float16: bfloat16"),
        (
            {"rotary_cos": rows(42, 32), "rotary_sin": rows(42, 32)},
            LengthError,
            "positions 40 to 42: rotary_cos has 42",
        ),
        ({"rotary_seqlens": ints(46, 0)}, LengthError, "sequence 0 rotates by positions 46 to 48: rotary_cos has 48"),
        ({"rotary_seqlens": ints(0, -1)}, LengthError, "sequence 1 rotates by positions -1 to 1"),
        ({"rotary_cos": rows(0, 32), "rotary_sin": rows(0, 32)}, ShapeError, "at least one position"),
        ({"rotary_cos": rows(48, 40), "rotary_sin": rows(48, 40)}, ShapeError, "rotates 80 of 64 elements"),
        ({"q": rows(3, 3, 4, 64)}, ShapeError, r"q \(3, 3, 4, 64\) is of 3 sequences, the new keys of 2"),
        ({"q": rows(2, 3, 4, 128)}, ShapeError, r"q \(2, 3, 4, 128\): \(2, 3, 4, 64\)"),
        ({"q": ROTARY["q"].half()}, DTypeError, "q is float16: bfloat16"),
        ({"q": rows(2, 9, 4, 64)}, LengthError, "positions 40 to 48: rotary_cos has 48"),
    ],
)
def test_rotary(changes, error, message):
    refused({**PAGED, **ROTARY, **changes}, error, message)
