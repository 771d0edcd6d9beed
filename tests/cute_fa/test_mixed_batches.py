"""Prefill and decoding in one packed call over a paged cache, with a window and sink tokens: right, and no work on the
keys between the two."""

import dataclasses

import pytest
import torch

import cute_fa
from cute_fa import CumulativeSeqlens, MaskKind, PagedAttentionRequest, PagedKvCache
from cute_fa.semantics.reference import expected
from cute_fa.tools.inputs import InputSpec, make_inputs
from tests.testing.caches import places
from tests.testing.simulated import unwritten_is_nan

# Decoding far into a text and near its start, a chunk behind a prefix, a slot without queries, a first token.
LENGTHS_Q, LENGTHS_K = (1, 1, 37, 0, 1), (700, 33, 300, 120, 1)
WINDOW, SINK = 64, 4
ARCHS = ["sm_80", "sm_90a", "sm_100a"]


def inputs(further: int = 0):
    """``further``: keys more in each sequence that the window leaves behind."""
    lengths_k = tuple(length + further * (length > 100) for length in LENGTHS_K)
    lengths = {"seqlen_q": 37, "seqlen_k": max(lengths_k), "lengths_q": LENGTHS_Q, "lengths_k": lengths_k}
    mask = {"window": (WINDOW, 0), "sink_tokens": SINK}
    return make_inputs(InputSpec(5, heads=8, heads_kv=2, page_size=16, varlen_q=True, **lengths, **mask), "peaked")


def run(given, arch, num_splits=0, **simulation):
    """(result, warp instructions of the attention kernel)."""
    with cute_fa.simulate(arch, **simulation) as simulated, unwritten_is_nan():
        request = PagedAttentionRequest(
            given.q,
            PagedKvCache(given.k, given.v),
            given.page_table,
            given.seqused_k,
            cu_seqlens_q=CumulativeSeqlens.from_tensor(given.cu_seqlens_q),
            mask=MaskKind.SLIDING_CAUSAL,
            window=(WINDOW, 0),
            sink_tokens=SINK,
            num_splits=num_splits,
        )
        result = request.run()
    return result, simulated.launches[0].warp_instrs


@pytest.mark.sampled
@pytest.mark.parametrize(("arch", "num_splits"), [("sm_80", 0), ("sm_80", 3), ("sm_90a", 0), ("sm_100a", 0)])
def test_against_the_reference(arch, num_splits):
    given = inputs()
    out, lse = run(given, arch, num_splits)[0]
    comparison = expected(given.q, given.k, given.v, **given.options()).check(out, lse)
    assert comparison.ok, comparison
    assert out.shape[0] == 40


@pytest.mark.sampled
@pytest.mark.parametrize("arch", ARCHS)
def test_the_gap_costs_nothing(arch):
    """As many instructions whether 500 keys or 1920 more, whole blocks of all kernels, lie between the sink tokens and
    the window. All scores are alike, since rescaling depends on them."""
    near, far = (inputs(further) for further in (0, 1920))
    alike = (
        dataclasses.replace(i, **{name: torch.zeros_like(getattr(i, name)) for name in "qkv"}) for i in (near, far)
    )
    near, far = (run(given, arch, num_sms=1)[1] for given in alike)
    assert far == near


@pytest.mark.parametrize("arch", ARCHS)
def test_the_gap_is_not_read(arch):
    """Masking would leave a trace: 0 · NaN is NaN. A block of keys on either side may hold some of the gap."""
    given, block = inputs(), 128
    right = run(given, arch)[0]
    k, v = given.k.clone(), given.v.clone()
    for b, (length_q, length_k) in enumerate(zip(LENGTHS_Q, LENGTHS_K, strict=True)):
        gap = range(SINK + block, length_k - length_q - WINDOW - block) if length_q else range(length_k)
        at = places(given, b, gap)
        k[at] = v[at] = torch.nan
    assert k.isnan().sum() > given.k.isnan().sum()
    assert all(map(torch.equal, run(dataclasses.replace(given, k=k, v=v), arch)[0], right))
