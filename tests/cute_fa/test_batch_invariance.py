"""Batch-invariant mode: the bits of a token's O and LSE are those of its prompt, whatever it is computed with."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import cute_fa
from cute_fa import auto_deploy, compat, reference
from cute_fa.api import attention
from cute_fa.engine.compiler import compile_artifacts
from cute_fa.engine.table import TABLE
from cute_fa.errors import ArgumentError, Fp8Error
from cute_fa.semantics.problem import AttentionProblem
from cute_fa.semantics.ranges import HostRanges
from cute_fa.semantics.types import DType, KvLayout, MaskKind, SmArch
from cute_fa.tools.cli import main
from cute_fa.tools.inputs import draw_tree, tree_words
from fa3_sm90.decode.entry import Fa3Decode

KEYS, CHUNK, HEADS, HEADS_KV, HEAD_DIM = 300, 128, 4, 2, 64
ARCHS = ("sm_80", "sm_90a")
# Options of calls whose queries are a sequence's last tokens.
FEATURES = {
    "plain": {},
    "window": {"window_size": (150, 0)},
    "window and sink": {"window_size": (40, 0), "sink_tokens": 5},
    "softcap": {"softcap": 20.0},
    "slopes": {"alibi_slopes": torch.tensor([0.5, 0.05, 0.003, 0.7])},
    "learnable sink": {"learnable_sink": torch.tensor([1.0, -2.0, 8.0, 30.0])},
}
FEATURES["all"] = {name: value for options in FEATURES.values() for name, value in options.items()}


def tensors(seed: int, sequences: int = 1, head_dim: int = HEAD_DIM, dtype=torch.bfloat16) -> tuple[torch.Tensor, ...]:
    """Q, K and V of whole sequences, with scores up to about ±40, so that references move, in each row elsewhere."""
    torch.manual_seed(seed)
    q = torch.randn(sequences, KEYS, HEADS, head_dim) * 5
    k, v = (torch.randn(sequences, KEYS, HEADS_KV, head_dim) for _ in range(2))
    return tuple(tensor.to(dtype) for tensor in (q, k, v))


def bits(out: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """O and LSE as integers: 0 and −0 are different."""
    return out.contiguous().view(torch.int16), lse.contiguous().view(torch.int32)


def assert_same(result: tuple[torch.Tensor, torch.Tensor], whole: tuple[torch.Tensor, torch.Tensor], places) -> None:
    """``result``: (batch, queries, heads, …) and (batch, heads, queries), at ``places`` of ``whole``."""
    (out, lse), (all_out, all_lse) = bits(*result), bits(*whole)
    assert torch.equal(out, all_out[:, places]) and torch.equal(lse, all_lse[:, :, places])


def paged(tensor: torch.Tensor, page_size: int, seed: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows of sequences (batch, KEYS, heads, columns) in shuffled pages, NaN elsewhere, and the page table."""
    batch, rows = tensor.shape[:2]
    pages = -(-rows // page_size)
    order = torch.randperm(2 * batch * pages, generator=torch.Generator().manual_seed(seed))[: batch * pages]
    cache = torch.full((2 * batch * pages, page_size, *tensor.shape[2:]), float("nan")).to(tensor.dtype)
    padded = torch.full((batch, pages * page_size, *tensor.shape[2:]), float("nan")).to(tensor.dtype)
    padded[:, :rows] = tensor
    cache[order] = padded.reshape(batch * pages, page_size, *tensor.shape[2:])
    return cache, order.reshape(batch, pages).int()


def prompt(q, k, v, **options):
    """Of whole sequences."""
    return cute_fa.flash_attn_func(q, k, v, causal=True, return_lse=True, seqlen_k_per_split=CHUNK, **options)


def decoded(q, k, v, lengths, table=None, **options):
    """Of a sequence's last tokens, from a cache."""
    return cute_fa.flash_attn_with_kvcache(
        q, k, v, cache_seqlens=lengths, page_table=table, causal=True, return_lse=True, batch_invariant=True,
        seqlen_k_per_split=CHUNK, **options,
    )  # fmt: skip


@pytest.mark.sampled
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("arch", ARCHS)
def test_one_token_and_chunks_as_in_the_prompt(arch, feature):
    """With few SMs the chunks of a tile are one CTA's, with many each CTA's own."""
    q, k, v = tensors(1)
    options = FEATURES[feature]
    with cute_fa.simulate(arch, num_sms=2):
        whole = prompt(q, k, v, **options)
    expected, lse = reference.attention(q, k, v, **{"window_size": (None, 0), **options})
    assert (whole[0].double() - expected).abs().max() < 0.03 and (whole[1] - lse).abs().max() < 1e-4
    for sms in (1, 132):
        with cute_fa.simulate(arch, num_sms=sms):
            for first, last in ((299, 300), (120, 121), (128, 129), (60, 190)):
                places = slice(first, last)
                assert_same(decoded(q[:, places], k, v, last, **options), whole, places)


@pytest.mark.sampled
@pytest.mark.parametrize("arch", ARCHS)
def test_in_any_batch(arch):
    """Beside other sequences, packed, in pages of 1, 16 and 64, with left padding and by index."""
    q, k, v = tensors(2, 3)
    with cute_fa.simulate(arch, num_sms=4):
        whole = prompt(q, k, v)
        for sequence in range(3):
            alone = prompt(*(tensor[sequence : sequence + 1] for tensor in (q, k, v)))
            assert_same(alone, tuple(tensor[sequence : sequence + 1] for tensor in whole), slice(None))
        lengths = torch.tensor([7, 300, 129], dtype=torch.int32)
        last = torch.stack([q[b, length - 1 : length] for b, length in enumerate(lengths.tolist())])
        ways = [decoded(last, k, v, lengths)]
        for page_size in (1, 16, 64):
            (k_pages, table), (v_pages, _) = paged(k, page_size), paged(v, page_size)
            ways.append(decoded(last, k_pages, v_pages, lengths, table))
        padding = torch.tensor([5, 0, 70], dtype=torch.int32)
        padded = [torch.full((3, KEYS + 70, HEADS_KV, HEAD_DIM), float("nan")).to(q.dtype) for _ in range(2)]
        for b, rows in enumerate(padding.tolist()):
            for cache, tensor in zip(padded, (k, v), strict=True):
                cache[b, rows : rows + KEYS] = tensor[b]
        ways.append(decoded(last, *padded, lengths + padding, cache_leftpad=padding))
        index = torch.tensor([2, 0, 1], dtype=torch.int32)
        of_index = [tensor[[1, 2, 0]] for tensor in (k, v)]
        ways.append(decoded(last, *of_index, lengths, cache_batch_idx=index))
    for out, lse in ways:
        for b, length in enumerate(lengths.tolist()):
            of_sequence = tuple(tensor[b : b + 1] for tensor in whole)
            assert_same((out[b : b + 1], lse[b : b + 1]), of_sequence, slice(length - 1, length))


@pytest.mark.parametrize("sms", [1, 132])
@pytest.mark.parametrize("arch", ARCHS)
def test_chunks_and_their_sums_are_ordered(arch, sms):
    """By the race detector: a chunk's part in scratch memory, then who adds the next one to it, with one SM the same
    CTA."""
    q, k, v = tensors(7, head_dim=72)  # columns of a row are two warps' of an FA2 CTA
    with cute_fa.simulate(arch, num_sms=sms, race=True):
        raced = decoded(q[:, -9:], k, v, KEYS)
    with cute_fa.simulate(arch, num_sms=3):
        assert_same(raced, decoded(q[:, -9:], k, v, KEYS), slice(None))


@pytest.mark.sampled
@pytest.mark.parametrize("arch", ARCHS)
def test_packed_prompts(arch):
    """Sequences of other lengths in one batch, a chunk of a prompt among them."""
    q, k, v = tensors(4, 3)
    queries, keys = [300, 1, 77], [300, 200, 140]
    cu_q, cu_k = (torch.tensor([0, *lengths]).cumsum(0).int() for lengths in (queries, keys))
    with cute_fa.simulate(arch, num_sms=5):
        whole = prompt(q, k, v)
        packed_q = torch.cat([q[b, keys[b] - queries[b] : keys[b]] for b in range(3)])
        packed = [torch.cat([tensor[b, : keys[b]] for b in range(3)]) for tensor in (k, v)]
        out, lse = cute_fa.flash_attn_varlen_func(
            packed_q, *packed, cu_q, cu_k, 300, 300, causal=True, return_lse=True, seqlen_k_per_split=CHUNK
        )
    for b, (start, stop) in enumerate(pairwise(cu_q.tolist())):
        of_sequence = tuple(tensor[b : b + 1] for tensor in whole)
        places = slice(keys[b] - queries[b], keys[b])
        assert_same((out[None, start:stop], lse[None, :, start:stop]), of_sequence, places)


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("arch", "head_dim", "dtype"), [("sm_80", 256, torch.float16), ("sm_90a", 256, torch.bfloat16)]
)
def test_wide_heads(arch, head_dim, dtype):
    """Blocks have as many keys in tiles of few rows as of many."""
    q, k, v = tensors(5, head_dim=head_dim, dtype=dtype)
    with cute_fa.simulate(arch, num_sms=3):
        whole = prompt(q[:, -140:], k, v)
        places = slice(139, 140)
        assert_same(decoded(q[:, -1:], k, v, KEYS), whole, places)
        assert_same(decoded(q[:, -20:], k, v, KEYS), whole, slice(120, 140))


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("arch", "dtype", "head_dim"),
    [
        ("sm_80", torch.float8_e4m3fn, 64),
        ("sm_89", torch.float8_e5m2, 64),
        ("sm_89", torch.float8_e4m3fn, 256),
        ("sm_90a", torch.float8_e4m3fn, 64),
        ("sm_90a", torch.float8_e5m2, 256),
        ("sm_80", torch.int8, 64),
        ("sm_90a", torch.int8, 64),
    ],
)
def test_caches_of_codes(arch, dtype, head_dim):
    q, k, v = tensors(6, head_dim=head_dim)
    codes = [tensor.to(dtype) for tensor in (k, v)]
    descales = {f"{name}_descale": torch.rand(1, HEADS_KV) + 0.5 for name in "kv"}
    with cute_fa.simulate(arch, num_sms=3):
        whole = decoded(q[:, 100:], *codes, KEYS, **descales)
        for first, last in ((299, 300), (250, 300), (127, 130)):
            result = decoded(q[:, first:last], *codes, last, **descales)
            assert_same(result, whole, slice(first - 100, last - 100))


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("arch", "dtype"),
    [("sm_80", torch.float8_e4m3fn), ("sm_89", torch.float8_e5m2), ("sm_90a", torch.float8_e4m3fn)],
)
def test_descales_of_rows(arch, dtype):
    """Over so many orders of magnitude that it shows in the bits of P which keys a row's unit is of: with other tokens,
    in pages, and behind padding, by index, beside other sequences."""
    q, k, v = tensors(6, 3)
    caches = [tensor.to(dtype) for tensor in (k, v)]
    caches.append(torch.exp2(24 * torch.rand(3, KEYS, HEADS_KV, 1) - 24))
    # values of the keys from 240 on, hidden in the middle of a block, leave the others' P hardly a digit
    of_values = torch.where(torch.arange(KEYS) < 240, 2.0**-12, 2.0**12)
    caches.append(of_values[:, None, None] * torch.exp2(4 * torch.rand(3, KEYS, HEADS_KV, 1) - 2))

    def decode(queries, given, lengths, table=None, **options):
        *codes, k_descale, v_descale = given
        return decoded(queries, *codes, lengths, table, k_descale=k_descale, v_descale=v_descale, **options)

    with cute_fa.simulate(arch, num_sms=2):
        whole = decode(q[:, 200:], caches, KEYS)
        of_first = [tensor[:1] for tensor in caches]
        for first, last in ((299, 300), (250, 300), (227, 230)):
            result = decode(q[:1, first:last], of_first, last)
            assert_same(result, tuple(tensor[:1] for tensor in whole), slice(first - 200, last - 200))
    lengths, padding = (torch.tensor(rows, dtype=torch.int32) for rows in ([207, 300, 229], [5, 0, 70]))
    last = torch.stack([q[b, length - 1 : length] for b, length in enumerate(lengths.tolist())])
    *pages, (v_descales, table) = (paged(tensor, 16) for tensor in caches)
    pages = [*(cache for cache, _ in pages), v_descales]
    index = torch.tensor([2, 0, 1], dtype=torch.int32)
    behind = [torch.full((3, KEYS + 70, *tensor.shape[2:]), float("nan")).to(tensor.dtype) for tensor in caches]
    for b, rows in enumerate(padding.tolist()):
        for cache, tensor in zip(behind, caches, strict=True):
            cache[index[b], rows : rows + KEYS] = tensor[b]
    with cute_fa.simulate(arch, num_sms=132):  # a CTA for each chunk
        in_pages = decode(last, pages, lengths, table)
        padded = decode(last, behind, lengths + padding, cache_leftpad=padding, cache_batch_idx=index)
    for out, lse in (in_pages, padded):
        for b, length in enumerate(lengths.tolist()):
            of_sequence = tuple(tensor[b : b + 1] for tensor in whole)
            assert_same((out[b : b + 1], lse[b : b + 1]), of_sequence, slice(length - 201, length - 200))


E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("arch", "dtypes", "head_dim"),
    [
        ("sm_80", (E4M3, E4M3, E4M3), 64),
        ("sm_80", (E5M2, E4M3, E5M2), 64),
        ("sm_89", (E4M3, E4M3, E5M2), 64),
        ("sm_90a", (E4M3, E4M3, E4M3), 64),
        ("sm_90a", (E5M2, E5M2, E4M3), 256),
    ],
)
def test_fp8_queries(arch, dtypes, head_dim):
    """A prompt, chunks and single tokens, dense, in pages, packed beside others."""
    numbers = tensors(6, head_dim=head_dim)
    q, k, v = (tensor.to(dtype) for tensor, dtype in zip(numbers, dtypes, strict=True))
    descales = {f"{name}_descale": torch.rand(1, HEADS_KV) + 0.5 for name in "qkv"}
    (k_pages, table), (v_pages, _) = (paged(t.bfloat16(), 16) for t in (k, v))
    pages = k_pages.to(dtypes[1]), v_pages.to(dtypes[2])
    with cute_fa.simulate(arch, num_sms=3):
        whole = prompt(q[:, 190:], k, v, **descales)
        comparison = reference.check(*whole, q[:, 190:], k, v, causal=True, **descales)
        assert comparison.ok, comparison
        for first, last in ((299, 300), (250, 300), (190, 194)):
            places, queries = slice(first - 190, last - 190), q[:, first:last]
            assert_same(decoded(queries, k, v, last, **descales), whole, places)
        last = torch.tensor([KEYS], dtype=torch.int32)
        assert_same(decoded(q[:, 299:], *pages, last, table, **descales), whole, slice(109, 110))
        offsets = torch.tensor([0, 20, 21]).int(), torch.tensor([0, 300, 600]).int()
        twice = {name: descale.expand(2, HEADS_KV) for name, descale in descales.items()}
        out, lse = cute_fa.flash_attn_varlen_func(
            *(torch.cat(pair) for pair in ((q[0, 280:], q[0, 299:]), (k[0], k[0]), (v[0], v[0]))),
            *(*offsets, 20, 300),
            **{"causal": True, "return_lse": True, "seqlen_k_per_split": CHUNK, **twice},
        )
        for start, stop, first in ((0, 20, 90), (20, 21, 109)):
            result = out[None, start:stop], lse[None, :, start:stop]
            assert_same(result, whole, slice(first, first + stop - start))


@pytest.mark.sampled
@pytest.mark.parametrize("arch", ARCHS)
def test_drafts_of_a_tree(arch):
    """Alone, beside other trees, packed, in pages, with other SMs; a chain of drafts is a prompt's end."""
    q, k, v = tensors(9, 3)
    drafts = (5, 40, 33)
    trees = [draw_tree(count, seed=count) for count in drafts]
    trees[2] = torch.ones(33, 33).tril().bool()
    words = torch.zeros(3, max(drafts), 2, dtype=torch.int32)
    for of_sequence, tree in zip(words, trees, strict=True):
        of_sequence[: len(tree), : -(-len(tree) // 32)] = tree_words(tree)
    options = {"return_lse": True, "batch_invariant": True, "seqlen_k_per_split": CHUNK}
    of_all = {"tree_mask": torch.cat([own[:count] for own, count in zip(words, drafts, strict=True)]), **options}
    packed = torch.cat([q[b, KEYS - count :] for b, count in enumerate(drafts)])
    offsets = torch.tensor([0, *drafts]).cumsum(0).int()
    rows = {"cu_seqlens_q": offsets, "max_seqlen_q": max(drafts), "cache_seqlens": torch.full((3,), KEYS).int()}
    (k_pages, table), (v_pages, _) = paged(k, 16), paged(v, 16)
    with cute_fa.simulate(arch, num_sms=3):
        batch = cute_fa.flash_attn_with_kvcache(packed, k, v, **rows, **of_all)
    with cute_fa.simulate(arch, num_sms=132):
        in_pages = cute_fa.flash_attn_with_kvcache(packed, k_pages, v_pages, page_table=table, **rows, **of_all)
        assert all(map(torch.equal, in_pages, batch))
        for b, (start, stop) in enumerate(pairwise(offsets.tolist())):
            own, keys, values = (t[b : b + 1] for t in (q[:, KEYS - drafts[b] :], k, v))
            masked = {"tree_mask": words[b : b + 1, : drafts[b]].contiguous(), **options}
            alone = cute_fa.flash_attn_with_kvcache(own, keys, values, **masked)
            comparison = reference.check(*alone, own, keys, values, tree_mask=masked["tree_mask"])
            assert comparison.ok, comparison
            assert_same(alone, (batch[0][None, start:stop], batch[1][None, :, start:stop]), slice(None))
        assert_same(alone, prompt(q[2:], k[2:], v[2:]), slice(KEYS - drafts[2], KEYS))


def test_each_instruction_rounds_in_its_own_way():
    """Where mma.sync and wgmma differ, each kernel still agrees with itself, and no longer with the other one."""
    q, k, v = tensors(7)
    places = slice(299, 300)
    of_family = {}
    for family in ("fa2", "fa3"):
        with cute_fa.simulate("sm_90a", num_sms=3, arithmetic="distinct"):
            of_family[family] = prompt(q[:, 250:], k, v, family=family)
            assert_same(decoded(q[:, places], k, v, KEYS, family=family), of_family[family], slice(49, 50))
    assert not torch.equal(of_family["fa2"][0], of_family["fa3"][0])


FUSED = re.compile(r"\s*(?:@!?%p\d+\s+)?(\S+)\s+(.*);")


def may_be_fused(ptx: str) -> list[str]:
    """Additions of which a term is a product that ptxas may leave unrounded: one without a rounding of its own."""
    found, products = [], set()
    for operation, operands in FUSED.findall(ptx):
        target, *sources = (operand.strip() for operand in operands.split(","))
        copies = operation in ("mov.f32", "mov.b32", "neg.f32", "selp.f32")
        if operation in ("add.f32", "sub.f32") and not products.isdisjoint(sources):
            found.append(f"{operation} {operands}")
        if operation == "mul.f32" or (copies and not products.isdisjoint(sources)):
            products.add(target)
        else:
            products.discard(target)
    return found


ALL = {"window_left": 40, "sink_tokens": 5, "softcap": 20.0, "alibi": True, "learnable_sink": True}
OF_ROWS = {f"{name}_{of}": True for name in "kv" for of in ("descale", "row_descale")}
OF_ROWS |= {"dtype_k": DType.E4M3, "dtype_v": DType.E4M3}


@pytest.mark.sampled
@pytest.mark.parametrize("features", [{}, ALL, OF_ROWS], ids=["plain", "all", "descales of rows"])
@pytest.mark.parametrize("arch", ARCHS)
def test_no_sum_is_left_to_the_compiler(arch, features):
    asked = of_tokens(SmArch(arch), 9, **features)
    for changes, fused in (({"seqlen_k_per_split": CHUNK}, False), ({}, True)):
        chosen, kernel = TABLE.choose(replace(asked, **changes), None, 132, 0)
        assert bool(may_be_fused(compile_artifacts(kernel.configure(chosen))[0])) == fused


def of_tokens(arch: SmArch, tokens: int, **features) -> AttentionProblem:
    sizes = {"batch": 1, "seqlen_q": tokens, "seqlen_k": 5000, "num_heads": HEADS, "num_heads_kv": HEADS_KV}
    dims = {"head_dim": HEAD_DIM, "head_dim_v": HEAD_DIM, "softmax_scale": 0.1}
    return AttentionProblem(arch, DType.BF16, **sizes, **dims, window_right=0, **features)


def test_by_the_environment(monkeypatch):
    """``CUTE_FA_BATCH_INVARIANT=1`` is read at import; a call may still say no."""
    monkeypatch.setattr(attention, "BATCH_INVARIANT", True)
    q, k, v = tensors(8)
    k_pages, table = paged(k, 64)
    lengths = torch.tensor([KEYS], dtype=torch.int32)
    with cute_fa.simulate("sm_90a", num_sms=3):
        whole = cute_fa.flash_attn_func(q, k, v, causal=True, return_lse=True)
        asked = cute_fa.flash_attn_func(q, k, v, causal=True, return_lse=True, batch_invariant=True)
        assert_same(whole, asked, slice(None))
        free = cute_fa.flash_attn_func(q, k, v, causal=True, batch_invariant=False)
        assert not torch.equal(free, whole[0])
        cache = cute_fa.PagedKvCache(k_pages, paged(v, 64)[0], KvLayout.NHD)
        request = cute_fa.PagedAttentionRequest(q[:, -1:], cache, table, lengths, mask=MaskKind.CAUSAL)
        assert_same(request.run(), whole, slice(299, 300))
        leaves = [tensor.clone().requires_grad_() for tensor in (q, k, v)]
        out = cute_fa.flash_attn_func(*leaves, causal=True)
        assert torch.equal(out, whole[0])
        dout = torch.randn_like(q)
        grads = reference.Gradients(*torch.autograd.grad(out, leaves, dout), None, None)
        errors = reference.check_gradients(grads, q, k, v, dout, causal=True)
        assert all(error.ok for error in errors.values()), errors


def test_other_signatures_by_the_environment(monkeypatch):
    """FlashAttention's, and TensorRT-LLM's operator that appends on the way."""
    q, k, v = tensors(8)
    lengths = torch.tensor([KEYS - 1], dtype=torch.int32)
    with cute_fa.simulate("sm_80", num_sms=3):
        whole = cute_fa.flash_attn_func(q, k, v, causal=True, batch_invariant=True)
        last = whole[:, KEYS - 1 :]
        assert not torch.equal(compat.fa2.flash_attn_with_kvcache(q[:, -1:], k, v, causal=True), last)
        monkeypatch.setattr(attention, "BATCH_INVARIANT", True)
        assert torch.equal(compat.fa3.flash_attn_with_kvcache(q[:, -1:], k, v, causal=True), last)
        assert torch.equal(compat.fa2.flash_attn_func(q[:, 280:], k, v, causal=True), whole[:, 280:])
        new = [tensor[:, -1:].flatten(2) for tensor in (q, k, v)]
        caches = [tensor.clone() for tensor in (k, v)]
        for cache in caches:
            cache[:, -1] = torch.nan
        out = auto_deploy.fused_mha_with_cache(*new, lengths, *caches)
        assert torch.equal(out, last.flatten(2))


def test_range_plans_by_the_environment(monkeypatch):
    """What they leave to kernels for whole sequences is computed in the mode, the rest raises and names the switch."""
    monkeypatch.setattr(attention, "BATCH_INVARIANT", True)
    q, k, v = (tensor[0] for tensor in tensors(8))
    halves = np.array([[0, 100], [100, 300]])
    sequences = HostRanges(halves, halves, np.array([1, 1]), 300, 300)
    others = HostRanges(np.array([[0, 300], [7, 90]]), np.array([[0, 60], [80, 300]]), np.array([0, 1]), 300, 300)
    offsets = torch.tensor([0, 100, 300], dtype=torch.int32)
    options = {"causal": True, "return_lse": True, "batch_invariant": True}
    with cute_fa.simulate("sm_90a", num_sms=3) as simulation:
        plan = cute_fa.RangePlan.build(sequences)
        assert plan.path == "simple"
        found = cute_fa.range_attention(q, k, v, plan=plan, return_lse=True)
        wanted = cute_fa.flash_attn_varlen_func(q, k, v, offsets, offsets, 200, 200, **options)
        assert all(map(torch.equal, found, wanted))
        launches = len(simulation.launches)
        with pytest.raises(ArgumentError, match="CUTE_FA_BATCH_INVARIANT=1 with a range plan on path native: sums"):
            cute_fa.range_attention(q, k, v, plan=cute_fa.RangePlan.build(others, path="native"))
        assert len(simulation.launches) == launches


def test_explained_on_the_command_line(monkeypatch):
    """What is explained is what runs, with the option and by the environment: the kernel for decoding, for a prompt,
    too."""
    sizes = ["--arch", "sm_90a", "--batch", "1", "--seqlen-q", "140", "--seqlen-k", "150"]
    sizes += ["--heads", "1", "--head-dim", "64", "--num-splits", "0"]
    for chunk, arguments in ((128, ["--seqlen-k-per-split", "128"]), (1024, [])):
        monkeypatch.setattr(attention, "BATCH_INVARIANT", not arguments)
        done = CliRunner().invoke(main, ["run", *sizes, *arguments, "--explain", "--json"])
        assert done.exit_code == 0, done.output
        told = json.loads(done.stdout)
        assert told["canonical_name"] == f"fa3_fwd_sm90a_bf16_hd64_chunk{chunk}"
        assert told["compile_name"] == "fa3_decode_sm90a_bf16_hd64_inv"
        [forward] = [line for line in done.stderr.splitlines() if "fa3_fwd" in line]
        assert "batch_invariant: this kernel's sums depend on its tiles" in forward
        [decode] = [line for line in done.stderr.splitlines() if "fa3_decode" in line]
        assert "serves the problem" in decode and "a prompt's" not in done.stderr
        assert "Fa3Decode" in done.stderr and "chosen" in done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("feature", FEATURES)
def test_on_a_gpu(feature, head_dim):
    options = {name: t.cuda() if torch.is_tensor(t) else t for name, t in FEATURES[feature].items()}
    q, k, v = (tensor.cuda() for tensor in tensors(10, 3, head_dim))
    whole = prompt(q, k, v, **options)
    for sequence in range(3):
        of_sequence = tuple(tensor[sequence : sequence + 1] for tensor in whole)
        alone = [tensor[sequence : sequence + 1] for tensor in (k, v)]
        for first, last in ((299, 300), (120, 121), (128, 129), (60, 190)):
            places = slice(first, last)
            result = decoded(q[sequence : sequence + 1, places], *alone, last, **options)
            assert_same(result, of_sequence, places)


@pytest.mark.gpu
def test_a_decode_step_in_a_cuda_graph():
    """Replayed with other queries, lengths and pages, it gives the bits of the prompt."""
    q, k, v = (tensor.cuda() for tensor in tensors(11, 2))
    whole = prompt(q, k, v)
    (k_pages, table), (v_pages, _) = (paged(tensor.cpu(), 16) for tensor in (k, v))
    pages, table = (k_pages.cuda(), v_pages.cuda()), table.cuda()
    token, lengths = q[:, :1].clone(), torch.ones(2, dtype=torch.int32, device="cuda")
    decoded(token, *pages, lengths, table)  # compiled outside
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = decoded(token, *pages, lengths, table)
    for of_sequences in ((300, 1), (129, 300), (64, 257)):
        lengths.copy_(torch.tensor(of_sequences))
        for b, length in enumerate(of_sequences):
            token[b] = q[b, length - 1 : length]
        graph.replay()
        for b, length in enumerate(of_sequences):
            own, of_prompt = (tuple(tensor[b : b + 1] for tensor in pair) for pair in (result, whole))
            assert_same(own, of_prompt, slice(length - 1, length))


def test_chunks_change_bits():
    """What the mode fixes: other chunks are other sums, and without it there are none."""
    q, k, v = tensors(1)
    with cute_fa.simulate("sm_90a", num_sms=4):
        chunked, _ = prompt(q, k, v)
        others, _ = cute_fa.flash_attn_func(q, k, v, causal=True, return_lse=True, seqlen_k_per_split=64)
        free, _ = cute_fa.flash_attn_func(q, k, v, causal=True, return_lse=True)
    assert not torch.equal(chunked, others) and not torch.equal(chunked, free)


def test_by_which_kernel():
    served = {"sm_80": "Fa2Split", "sm_89": "Fa2Split", "sm_90a": "Fa3Decode", "sm_100a": "Fa2Split"}
    for arch, kernel in served.items():
        for tokens in (1, 5000):
            asked = of_tokens(SmArch(arch), tokens, seqlen_k_per_split=1024)
            for splits in (0, 1):
                chosen, found = TABLE.choose(asked, None, 132, splits)
                assert (found.__name__, chosen.num_splits) == (kernel, 1)


def test_arguments():
    q = torch.zeros(1, 4, 2, 64, dtype=torch.bfloat16)
    with cute_fa.simulate("sm_90a"):
        with pytest.raises(ArgumentError, match="seqlen_k_per_split=100: a multiple of 64"):
            cute_fa.flash_attn_func(q, q, q, seqlen_k_per_split=100)
        with pytest.raises(ArgumentError, match="64 with batch_invariant=False: there are no chunks"):
            cute_fa.flash_attn_func(q, q, q, seqlen_k_per_split=64, batch_invariant=False)
        with pytest.raises(ArgumentError, match="0 with batch_invariant=True: the mode needs chunks"):
            cute_fa.flash_attn_func(q, q, q, seqlen_k_per_split=0, batch_invariant=True)
        with pytest.raises(ArgumentError, match="num_splits=3 in batch-invariant mode: the chunks of 1024 keys"):
            cute_fa.flash_attn_func(q, q, q, batch_invariant=True, num_splits=3)
        fp8 = q.to(torch.float8_e4m3fn)
        with pytest.raises(Fp8Error, match=r"fa3_fwd: batch_invariant: .*fa3_decode: descales of blocks of keys"):
            cute_fa.flash_attn_func(fp8, fp8, fp8, k_descale=torch.ones(1, 2, 1), batch_invariant=True)


@pytest.mark.parametrize(("keys", "parts", "slots"), [(128 * 1024, 128, 32 * 128), (1024 * 1024, 1, 2 * 32)])
def test_scratch_memory_of_chunks_is_bounded(keys, parts, slots):
    """128 tokens of 8 query heads a kv head: a CTA for each chunk of 32 tiles takes 0.25 GiB at 128k keys, and would
    take 2.02 at 1M."""
    sizes = {"batch": 1, "seqlen_q": 128, "seqlen_k": keys, "num_heads": 32, "num_heads_kv": 4}
    dims = {"head_dim": 128, "head_dim_v": 128, "softmax_scale": 0.1}
    problem = AttentionProblem(SmArch.SM_90A, DType.BF16, **sizes, **dims, seqlen_k_per_split=1024)
    config = Fa3Decode.configure(problem)
    assert Fa3Decode.grid(problem, config, 132).parts == parts
    out, lse = Fa3Decode.scratch(problem, config, None, 132)
    assert (out.shape, lse.shape) == ((slots, 128, 128), (slots, 128))


@pytest.mark.parametrize("dims", [(64, 64), (176, 240), (192, 256), (256, 160), (256, 256)])
@pytest.mark.parametrize(("arch", "dtype_k"), [("sm_80", DType.BF16), ("sm_90a", DType.BF16), ("sm_90a", DType.E4M3)])
def test_blocks_of_as_many_keys_for_any_number_of_tokens(arch, dtype_k, dims):
    """Of fp8 codes a tile of 64 rows would leave room for blocks of 64 keys where one of 128 does not, as at head_dim
    192 and 256 columns of V."""
    sizes = {"batch": 1, "seqlen_k": 5000, "num_heads": 1, "num_heads_kv": 1}
    options = {"head_dim": dims[0], "head_dim_v": dims[1], "dtype_k": dtype_k, "dtype_v": dtype_k}
    options |= {"softmax_scale": 0.1, "seqlen_k_per_split": 1024}
    found = set()
    for tokens in (1, 64, 65, 5000):
        problem = AttentionProblem(SmArch(arch), DType.BF16, seqlen_q=tokens, **sizes, **options)
        found.add(TABLE.lookup(problem).configure(problem).tile_n)
    assert len(found) == 1
