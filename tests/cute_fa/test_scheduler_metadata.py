"""FlashAttention-3's ``get_scheduler_metadata`` and ``rotary_seqlens``, as its callers and vLLM use them."""

import inspect

import pytest
import torch

import cute_fa
from cute_fa import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from cute_fa.compat import fa3, fa4
from cute_fa.semantics.errors import (
    ArgumentError,
    CuteFaError,
    DeviceError,
    DTypeError,
    EmptyBatchError,
    LengthError,
    ShapeError,
    UnsupportedArgumentError,
)
from cute_fa.semantics.reference import expected
from cute_fa.tools.inputs import InputSpec, make_inputs

SPEC = InputSpec(2, 3, 100, 4, 2, 64, page_size=16, lengths_k=(100, 37), causal=True)
PACKED = InputSpec(2, 3, 100, 4, 2, 64, varlen_q=True, page_size=16, lengths_q=(3, 1), lengths_k=(100, 37), causal=True)


def metadata_of(given, **changes):
    problem = (2, 3, 112, 4, 2, 64, given.seqused_k, given.q.dtype)
    return fa3.get_scheduler_metadata(*problem, page_size=16, causal=True, num_splits=0, **changes)


@pytest.mark.parametrize("num_splits", [0, 1, 3])
def test_a_cache(num_splits):
    given = make_inputs(SPEC, "peaked")
    metadata = metadata_of(given)
    assert (metadata.dtype, metadata.tolist()) == (torch.int32, [0, 0, 0])
    with cute_fa.simulate("sm_80"):
        result = fa3.flash_attn_with_kvcache(
            *(given.q, given.k, given.v),
            cache_seqlens=given.seqused_k,
            page_table=given.page_table,
            rotary_seqlens=given.seqused_k,  # nothing rotates
            scheduler_metadata=metadata,
            causal=True,
            num_splits=num_splits,
            return_softmax_lse=True,
        )
    assert expected(given.q, given.k, given.v, **given.options()).check(*result).ok


def test_a_buffer_of_vllm():
    """Packed queries, and metadata that lie in a longer buffer."""
    given = make_inputs(PACKED, "peaked")
    buffer = torch.full((40,), 7, dtype=torch.int32)
    metadata = metadata_of(given, cu_seqlens_q=given.cu_seqlens_q)
    buffer[: metadata.shape[0]] = metadata
    with cute_fa.simulate("sm_80"):
        result = flash_attn_varlen_func(
            *(given.q, given.k, given.v, given.cu_seqlens_q, None, 3, 100),
            seqused_k=given.seqused_k,
            page_table=given.page_table,
            scheduler_metadata=buffer[: metadata.shape[0]],
            causal=True,
            num_splits=0,
            return_lse=True,
        )
    assert expected(given.q, given.k, given.v, **given.options()).check(*result).ok


@pytest.mark.parametrize("name", ["seqused_k", "cu_seqlens_q"])
def test_fa4(name):
    given = make_inputs(PACKED, "peaked")
    metadata = fa4.get_scheduler_metadata(3, 100, 4, 2, 64, 0, causal=True, **{name: getattr(given, name)})
    assert (metadata.dtype, metadata.tolist()) == (torch.int32, [0, 0, 0])
    lengths = {"cu_seqlens_q": given.cu_seqlens_q, "seqused_k": given.seqused_k}
    options = {"page_table": given.page_table, "causal": True, "num_splits": 0, "return_lse": True}
    with cute_fa.simulate("sm_80"):
        result = fa4.flash_attn_varlen_func(
            given.q, given.k, given.v, **lengths, **options, scheduler_metadata=metadata
        )
    assert expected(given.q, given.k, given.v, **given.options()).check(*result).ok


def test_fa4_without_lengths():
    with pytest.raises(ArgumentError, match="seqused_k, seqused_q, cu_seqlens_k or cu_seqlens_q is needed"):
        fa4.get_scheduler_metadata(3, 100, 4, 2, 64, 0)


@pytest.mark.parametrize(
    ("metadata", "error", "message"),
    [
        (torch.zeros(4, dtype=torch.int32), ShapeError, r"scheduler_metadata \(4,\): \(3,\) is needed"),
        (torch.zeros(3), DTypeError, "scheduler_metadata is float32: int32"),
        (torch.zeros(3, dtype=torch.int32, device="meta"), DeviceError, "scheduler_metadata is on meta and q on cpu"),
        ((0, 0, 0), ArgumentError, "scheduler_metadata is tuple"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_what_is_not_of_this_batch(packed, metadata, error, message):
    given = make_inputs(PACKED if packed else SPEC)
    options = {"page_table": given.page_table, "scheduler_metadata": metadata}
    with cute_fa.simulate("sm_80"), pytest.raises(CuteFaError, match=message) as caught:
        if packed:
            flash_attn_varlen_func(given.q, given.k, given.v, given.cu_seqlens_q, None, 3, 100, **options)
        else:
            flash_attn_with_kvcache(given.q, given.k, given.v, cache_seqlens=given.seqused_k, **options)
    assert type(caught.value) is error


def test_dense_attention_takes_none():
    q = torch.zeros(1, 2, 1, 16, dtype=torch.float16)
    with pytest.raises(UnsupportedArgumentError, match="scheduler_metadata=tensor of shape"):
        flash_attn_func(q, q, q, scheduler_metadata=torch.zeros(2, dtype=torch.int32))


@pytest.mark.parametrize(
    ("batch_size", "cache_seqlens", "error", "message"),
    [
        (3, torch.zeros(2, dtype=torch.int32), ShapeError, r"cache_seqlens \(2,\): \(3,\)"),
        (0, torch.zeros(0, dtype=torch.int32), EmptyBatchError, "batch_size=0"),
        (1.0, torch.zeros(1, dtype=torch.int32), ArgumentError, "batch_size=1.0"),
        (1, [4], ArgumentError, "cache_seqlens is list"),
        (1, torch.zeros(1), DTypeError, "cache_seqlens is float32"),
    ],
)
def test_errors(batch_size, cache_seqlens, error, message):
    with pytest.raises(CuteFaError, match=message) as caught:
        fa3.get_scheduler_metadata(batch_size, 1, 64, 4, 2, 64, cache_seqlens)
    assert type(caught.value) is error


def test_order():
    names = (
        "batch_size max_seqlen_q max_seqlen_k num_heads_q num_heads_kv headdim cache_seqlens qkv_dtype headdim_v "
        "cu_seqlens_q cu_seqlens_k_new cache_leftpad page_size max_seqlen_k_new causal window_size attention_chunk "
        "has_softcap num_splits pack_gqa sm_margin"
    )
    assert list(inspect.signature(fa3.get_scheduler_metadata).parameters) == names.split()


def test_callers_of_extensions_catch_runtime_errors():
    """What FlashAttention 2 and 3 check in their extensions is a RuntimeError there."""
    given = make_inputs(SPEC)
    lengths = torch.tensor([113, 5], dtype=torch.int32)
    options = {"cache_seqlens": lengths, "block_table": given.page_table}
    message = r"cache_seqlens\[0\]=113: between 0 and the 112 tokens that a row of block_table holds"
    with cute_fa.simulate("sm_80"):
        for kind in (RuntimeError, ValueError):
            with pytest.raises(kind, match=message) as caught:
                flash_attn_with_kvcache(given.q, given.k, given.v, **options)
            assert type(caught.value) is LengthError
