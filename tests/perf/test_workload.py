"""The sweep's problems: what they count as arithmetic and traffic, and the tensors they stand for."""

from __future__ import annotations

import pytest
import torch

from cute_fa.semantics.errors import ArgumentError
from cute_fa.semantics.ranges import HostRanges
from cute_fa.semantics.types import Direction, DType
from cute_fa.tools.inputs import make_inputs
from perf.plans import PLANS
from perf.workload import LENGTHS, Workload, grid


def test_flops_follow_flash_attention_with_exact_pairs():
    full = Workload(head_dim=64, head_dim_v=64, heads=4, heads_kv=4, seqlen=1024, tokens=4096)
    assert full.work.flops == 4 * 4 * 4 * 1024 * 1024 * 64  # 4·b·h·sq·sk·d
    causal = Workload(head_dim=64, head_dim_v=64, heads=4, heads_kv=4, seqlen=1024, tokens=4096, causal=True)
    assert causal.work.flops == 4 * 4 * 4 * (1024 * 1025 // 2) * 64
    back = Workload(Direction.BACKWARD, head_dim=64, head_dim_v=64, heads=4, heads_kv=4, seqlen=1024, tokens=4096)
    assert back.work.flops == 2.5 * full.work.flops
    unequal = Workload(Direction.BACKWARD, head_dim=192, head_dim_v=128, heads=1, heads_kv=1, seqlen=8, tokens=8)
    # S, dQ, dK over head_dim; dP, dV over head_dim_v
    assert unequal.work.flops == 2 * 64 * (3 * 192 + 2 * 128)


def test_bytes_count_each_element_once_and_hidden_keys_never():
    sizes = dict(head_dim=64, head_dim_v=32, heads=8, heads_kv=2)
    work = Workload(**sizes, seqlen=512, tokens=1024).work
    assert work.bytes == 2 * 1024 * (8 * 64 + 2 * (64 + 32) + 8 * 32)
    back = Workload(Direction.BACKWARD, **sizes, seqlen=512, tokens=1024).work
    assert back.bytes == 2 * work.bytes + 4 * 8 * 1024
    decode = Workload(**sizes, seqlen=512, tokens=1024, decode=True).work
    assert (decode.pairs, decode.bytes) == (1024, 2 * (2 * 8 * 96 + 1024 * 2 * 96))
    windowed = Workload(**sizes, seqlen=512, tokens=1024, decode=True, window=99).work
    assert (windowed.pairs, windowed.bytes) == (200, 2 * (2 * 8 * 96 + 200 * 2 * 96))
    # the first of 8 queries sees 505 keys, the last 512
    drafts = Workload(**sizes, seqlen=512, tokens=1024, decode=True, query_tokens=8).work
    assert (drafts.pairs, drafts.bytes) == (2 * 8 * (505 + 512) // 2, 2 * (16 * 8 * 96 + 1024 * 2 * 96))
    codes = Workload(**sizes, seqlen=512, tokens=1024, decode=True, dtype_kv=DType.E4M3)
    assert codes.work.bytes == decode.bytes - 1024 * 2 * 96
    inputs = codes.inputs("random")
    assert [t.dtype for t in (inputs.q, inputs.k, inputs.v)] == [torch.bfloat16, *[torch.float8_e4m3fn] * 2]
    fp8 = Workload(dtype=DType.E4M3, **sizes, seqlen=512, tokens=1024).work
    assert fp8.bytes == 1024 * (8 * 64 + 2 * (64 + 32)) + 2 * 1024 * 8 * 32


@pytest.mark.parametrize("lengths", LENGTHS)
def test_tokens_are_constant(lengths):
    for seqlen in (16, 100, 1024):
        workload = Workload(seqlen=seqlen, tokens=4096, lengths=lengths)
        assert workload.lengths_k == Workload(seqlen=seqlen, tokens=4096, lengths=lengths).lengths_k
        assert max(workload.lengths_k) == seqlen
        if lengths in ("dense", "equal"):
            assert workload.batch == 4096 // seqlen
        else:
            assert sum(workload.lengths_k) == 4096


def test_skewed_lengths_are_mostly_short():
    skewed = sorted(Workload(seqlen=4096, tokens=2**22, lengths="skewed").lengths_k)
    uniform = sorted(Workload(seqlen=4096, tokens=2**22, lengths="uniform").lengths_k)
    # medians: the geometric mean of 16 and 4096, and the arithmetic one
    assert skewed[len(skewed) // 2] == pytest.approx(256, rel=0.2)
    assert uniform[len(uniform) // 2] == pytest.approx(2048, rel=0.1)


@pytest.mark.parametrize("decode", [False, True])
@pytest.mark.parametrize("page_size", [None, 16])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_tensors_have_the_lengths_that_were_counted(lengths, page_size, decode):
    sizes = dict(head_dim=16, head_dim_v=16, heads=2, heads_kv=1)
    workload = Workload(**sizes, seqlen=50, tokens=160, lengths=lengths, page_size=page_size, decode=decode)
    inputs = make_inputs(workload.spec())
    if inputs.seqused_k is not None:
        lengths_k = inputs.seqused_k.tolist()
    elif inputs.cu_seqlens_k is not None:
        lengths_k = inputs.cu_seqlens_k.diff().tolist()
    else:
        lengths_k = [inputs.k.shape[1]] * inputs.k.shape[0]
    assert tuple(lengths_k) == workload.lengths_k
    rows = inputs.q.shape[0] if inputs.cu_seqlens_q is not None else inputs.q.shape[0] * inputs.q.shape[1]
    assert rows == sum(workload.lengths_q)
    assert (inputs.page_table is None) == (page_size is None)
    assert (inputs.cu_seqlens_q is None) == (lengths == "dense" or decode)


def test_grid_leaves_out_what_means_nothing():
    workloads = grid(
        direction=[Direction.FORWARD, Direction.BACKWARD],
        head_dims=[(64, 64), (192, 128)],
        heads=[(8, 2)],
        seqlen=[512, 4096, 32768],
        tokens=[16384],
        causal=[False, True],
        window=[None, 1024],
        page_size=[None, 64],
        decode=[False, True],
    )
    assert len(workloads) == len(set(workloads))
    assert {w.seqlen for w in workloads} == {512, 4096}
    assert {w.seqlen for w in workloads if w.window} == {4096}
    assert not any(w.causal for w in workloads if w.decode)
    assert not any(w.decode or w.page_size for w in workloads if w.direction is Direction.BACKWARD)
    # 2 head dims × (512: 1, 4096: 2 windows) × (prefill fwd: 2 masks × 2 stores, decode: 2 stores, bwd: 2 masks)
    assert len(workloads) == 2 * 3 * (4 + 2 + 2)
    assert {(w.heads, w.heads_kv, w.head_dim, w.head_dim_v) for w in workloads} == {(8, 2, 64, 64), (8, 2, 192, 128)}


@pytest.mark.parametrize("plan", PLANS)
def test_plans_are_counted_and_name_no_pair_twice(plan):
    workload = Workload(head_dim=64, head_dim_v=32, heads=4, heads_kv=2, seqlen=700, tokens=700, plan=plan)
    ranges, mask = workload.ranges, workload.ranges.mask()
    one_by_one = [
        HostRanges(ranges.q_ranges[i : i + 1], ranges.k_ranges[i : i + 1], ranges.types[i : i + 1], 700, 700)
        for i in range(len(ranges))
    ]
    assert sum(one.area() for one in one_by_one) == mask.sum() == workload.work.pairs > 0
    assert workload.work.flops == 2 * 4 * mask.sum() * 96
    assert workload.work.bytes == 2 * (700 * 4 * 96 + mask.any(0).sum() * 2 * 96)
    assert str(workload) == f"fwd bf16 1×700 d64v32 h4/2 {plan}"
    inputs = workload.inputs("peaked")
    assert inputs.q_ranges.numpy().tolist() == ranges.q_ranges.tolist() and inputs.spec.ranges == len(ranges)


def test_plans_in_a_grid_stand_alone():
    choices = dict(causal=[False, True], window=[None, 8], lengths=["dense", "equal"], plan=[None, "random-10"])
    workloads = grid(**choices, decode=[False, True], page_size=[None, 16], seqlen=[64, 128], tokens=[64])
    planned = [w for w in workloads if w.plan]
    assert [(w.seqlen, w.tokens, w.batch) for w in planned] == [(64, 64, 1), (128, 128, 1)]
    assert {w.seqlen for w in workloads if not w.plan} == {64}


def test_caches_and_queries_in_a_grid():
    choices = dict(dtype=[DType.BF16, DType.E4M3], dtype_kv=[None, DType.E4M3], query_tokens=[1, 8, 65], seqlen=[64])
    directions = [Direction.FORWARD, Direction.BACKWARD]
    workloads = grid(**choices, decode=[False, True], direction=directions, tokens=[64])
    cached = [(w.decode, w.query_tokens, w.dtype) for w in workloads if w.dtype_kv]
    assert cached == [(False, 1, DType.BF16), (True, 1, DType.BF16), (True, 8, DType.BF16)]
    plain = [(w.direction, w.decode, w.query_tokens, w.dtype) for w in workloads if not w.dtype_kv]
    assert len(plain) == 2 * (1 + 2) + 2 and len(set(workloads)) == len(workloads) == len(cached) + len(plain)


def test_windows_of_columns_and_name():
    sliding = Workload(causal=True, window=1024, lengths="uniform", page_size=64, heads_kv=4)
    assert (sliding.columns()["window_left"], sliding.columns()["window_right"]) == (1024, 0)
    assert Workload(window=1024).window_size == (1024, 1024)
    assert Workload(decode=True, window=1024).window_size == (1024, 0)
    name = f"fwd bf16 {sliding.batch}×4096 d128 h16/4 causal window 1024 uniform pages of 64"
    assert str(sliding) == name
    assert str(Workload(decode=True, head_dim=192)) == "fwd bf16 4×4096 decode d192v128 h16/16"
    drafts = Workload(decode=True, query_tokens=8, dtype_kv=DType.E5M2, page_size=16)
    assert str(drafts) == "fwd bf16 4×4096 decode of 8 d128 h16/16 pages of 16 cache in e5m2"
    assert (drafts.columns()["seqlen_q"], drafts.window_size) == (8, (None, 0))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lengths": "zipf"}, "lengths='zipf'"),
        ({"seqlen": 8192, "tokens": 4096}, "seqlen=8192: between 1 and tokens=4096"),
        ({"decode": True, "direction": Direction.BACKWARD}, "no gradient"),
        ({"page_size": 64, "direction": Direction.BACKWARD}, "page_size=64"),
        ({"plan": "documents"}, "plan='documents': of one sequence"),
        ({"plan": "documents", "tokens": 4096, "causal": True}, "plan='documents': of one sequence"),
        ({"plan": "documents", "tokens": 4096, "dtype_kv": DType.E4M3}, "plan='documents': of one sequence"),
        ({"plan": "documentz"}, "plan='documentz': one of documents,"),
        ({"query_tokens": 2}, "query_tokens=2: between 1 and seqlen=4096, of a decode"),
        ({"query_tokens": 17, "decode": True, "seqlen": 16}, "query_tokens=17: between 1 and seqlen=16, of a decode"),
        ({"dtype_kv": DType.BF16}, "dtype_kv='bf16' fwd: an fp8 cache's, forward"),
        ({"dtype_kv": DType.E4M3, "direction": Direction.BACKWARD}, "dtype_kv='e4m3' bwd: an fp8 cache's, forward"),
    ],
)
def test_refusals(fields, message):
    with pytest.raises(ArgumentError, match=message):
        Workload(**fields)
