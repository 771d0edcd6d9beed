"""``flash_attn_with_kvcache`` against the reference over the cache as it should be after the append."""

import dataclasses

import pytest
import torch

import cute_fa
from cute_fa import flash_attn_with_kvcache
from cute_fa.compat import fa2, fa3
from cute_fa.engine import plan as plans
from cute_fa.semantics.errors import (
    AlignmentError,
    ArgumentError,
    CuteFaError,
    DTypeError,
    LengthError,
    NoBackwardError,
    PageTableError,
    ShapeError,
    UnsupportedArgumentError,
)
from cute_fa.semantics.reference import expected
from cute_fa.semantics.types import DType
from cute_fa.tools.inputs import InputSpec, make_inputs
from fa2_sm80.split.entry import Fa2Split
from fa3_sm90.decode.entry import Fa3Decode
from tests.testing.caches import Rotary, after, places, rotated_queries, scattered, take_last
from tests.testing.grid import pairwise
from tests.testing.simulated import unwritten_is_nan

FEATURES = {
    "arch": ["sm_80", "sm_90a", "sm_100a"],
    "dtype": [DType.BF16, DType.FP16],
    "head_dim": [(64, 64), (128, 128), (64, 32)],
    "heads": [(4, 2), (8, 1), (2, 2)],
    "page_size": [None, 2, 8, 1024],
    # new tokens of each of two sequences; None: all are in the cache
    "new": [None, [1, 1], [4, 0], [37, 37], [5, 30]],
    "used_q": [False, True],
    "rotary": [None, "halves", "interleaved"],
    "window": [(None, None), (None, 0), (16, 0), (9, 3)],
    "sink_tokens": [0, 3],
    "alibi": [False, True],
    "softcap": [0.0, 3.0],
    "learnable_sink": [False, True],
    "num_splits": [0, 1, 3],
    "inputs": ["peaked", "random"],
    "schedule": [{}, {"schedule_seed": 1, "late": True}],
}


@pytest.fixture(autouse=True)
def fresh_plans(monkeypatch):
    """Whatever ran before in this process, the last plan is that of the last call."""
    monkeypatch.setattr(plans, "PLANS", {})


def case_name(case: dict) -> str:
    cache = f"page{case['page_size']}" if case["page_size"] else "contiguous"
    return f"{case['arch']}-hd{case['head_dim'][0]}-{cache}-new{case['new']}-{case['rotary']}-{case['num_splits']}"


def spec_of(case: dict) -> InputSpec:
    new, (head_dim, head_dim_v) = case["new"] or [1, 3], case["head_dim"]
    packed, lengths_q = new[0] != new[1], tuple(new)
    if not packed:
        lengths_q = (new[0], new[0] // 2) if case["used_q"] else None
    return InputSpec(
        *(2, max(new), 150, *case["heads"], head_dim),
        head_dim_v=head_dim_v,
        dtype=case["dtype"],
        varlen_q=packed,
        seqused_q=case["used_q"],
        seqused_k=case["page_size"] is None,
        page_size=case["page_size"],
        lengths_q=lengths_q,
        lengths_k=(150, 77),
        window=case["window"],
        **{name: case[name] for name in ("sink_tokens", "alibi", "softcap", "learnable_sink")},
    )


def run(case: dict, device: str = "cpu") -> None:
    given = make_inputs(spec_of(case), case["inputs"])
    options = given.options()
    packed = {name: options.pop(name) for name in ("cu_seqlens_q", "seqused_k", "cu_seqlens_k", "seqused_q")}
    if packed["cu_seqlens_q"] is not None:
        options |= {"cu_seqlens_q": packed["cu_seqlens_q"], "max_seqlen_q": given.spec.seqlen_q}
    options["seqused_q"] = packed["seqused_q"]
    reads, cache, new = given, {"k_cache": given.k, "v_cache": given.v, "cache_seqlens": given.seqused_k}, {}
    if case["new"] is not None:
        rotary = None
        if case["rotary"]:
            rotary = Rotary.random(160, 32, interleaved=case["rotary"] == "interleaved")
            new = rotary.arguments()
        append = take_last(given, case["new"], packed["cu_seqlens_q"] is not None, rotary)
        starts = append.cache_seqlens.tolist()
        each = case["window"] != (None, None)
        reads = after(given, append, rotated_queries(given, rotary, starts, each) if rotary else None)
        cache = {name: getattr(append, name) for name in cache}
        new |= {"k": append.k, "v": append.v, "cu_seqlens_k_new": append.cu_seqlens_k_new}
    moved = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in {"q": given.q, **cache, **new, **options}.items()
    }
    out, lse = flash_attn_with_kvcache(**moved, num_splits=case["num_splits"], return_softmax_lse=True)
    result = expected(reads.q, reads.k, reads.v, **reads.options()).check(out.cpu(), lse.cpu())
    assert result.ok, result
    if case["new"] is not None:
        dataclasses.replace(append, k_cache=moved["k_cache"].cpu(), v_cache=moved["v_cache"].cpu()).check()


CASES = pairwise(FEATURES, seed=3)


@pytest.mark.sampled
@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_features_in_pairs(case):
    with cute_fa.simulate(case["arch"], race=True, **case["schedule"]), unwritten_is_nan():
        run(case)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_features_in_pairs_on_the_gpu(case):
    run(case, "cuda")


SPEC = InputSpec(2, 4, 60, 4, 2, 64, page_size=8, lengths_k=(60, 33), causal=True)


def decode(
    spec: InputSpec = SPEC, function=flash_attn_with_kvcache, rotary=None, new=(4, 4), expected_rotary=None, **changes
):
    """((out, lse), inputs as the reference reads them, the append) of a call that appends; ``expected_rotary``: another
    rotation of what the reference reads."""
    given = make_inputs(spec, "peaked")
    append = take_last(given, list(new), rotary=rotary)
    options = {"causal": spec.causal, "page_table": given.page_table, "cache_seqlens": append.cache_seqlens}
    options |= {"return_softmax_lse": True, **(rotary.arguments() if rotary else {}), **changes}
    with cute_fa.simulate("sm_80"):
        result = function(given.q, append.k_cache, append.v_cache, append.k, append.v, **options)
    return result, given, append


def check(result, given, append, rotary=None, each=True) -> None:
    q = rotated_queries(given, rotary, append.cache_seqlens.tolist(), each) if rotary else given.q
    reads = after(given, append, q)
    compared = expected(reads.q, reads.k, reads.v, **reads.options()).check(*result)
    assert compared.ok, compared
    append.check()


def differs(result, given, append, **rotation) -> bool:
    """Whether another rotation would give something else by far."""
    q = rotated_queries(given, starts=append.cache_seqlens.tolist(), **rotation)
    reads = after(given, append, q)
    return not expected(reads.q, reads.k, reads.v, **reads.options()).check(*result).ok


def test_queries_rotate_by_their_own_places_if_causal():
    rotary = Rotary.random(60, 64, interleaved=True)
    done = decode(rotary=rotary)
    check(*done, rotary)
    assert differs(*done, rotary=rotary, each=False)


def test_queries_rotate_by_their_own_places_with_a_window():
    rotary = Rotary.random(60, 64, interleaved=True)
    spec = dataclasses.replace(SPEC, causal=False, window=(20, 2))
    done = decode(spec, rotary=rotary, window_size=(20, 2))
    check(*done, rotary)
    assert differs(*done, rotary=rotary, each=False)


def test_queries_rotate_by_the_first_place_otherwise():
    rotary = Rotary.random(60, 64, interleaved=True)
    done = decode(dataclasses.replace(SPEC, causal=False), rotary=rotary)
    check(*done, rotary, each=False)
    assert differs(*done, rotary=rotary, each=True)


def test_neighbours_are_pairs_by_default():
    """Here and in FA2's and FA3's orders; halves are asked for."""
    for function in (flash_attn_with_kvcache, fa2.flash_attn_with_kvcache, fa3.flash_attn_with_kvcache):
        rotary = Rotary.random(60, 64, interleaved=True)
        table = "block_table" if function is fa2.flash_attn_with_kvcache else "page_table"
        arguments = {"rotary_cos": rotary.cos, "rotary_sin": rotary.sin}
        given = make_inputs(SPEC, "peaked")
        append = take_last(given, [4, 4], rotary=rotary)
        with cute_fa.simulate("sm_80"):
            result = function(
                *(given.q, append.k_cache, append.v_cache, append.k, append.v),
                **{table: given.page_table, "cache_seqlens": append.cache_seqlens, **arguments},
                causal=True,
                return_softmax_lse=True,
            )
        check(result, given, append, rotary)
    rotary = dataclasses.replace(rotary, interleaved=False)
    check(*decode(rotary=rotary), rotary)


def test_lengths_are_those_before_the_append_with_new_keys_and_in_all_without():
    result, given, append = decode()
    check(result, given, append)
    with cute_fa.simulate("sm_80"):
        again = flash_attn_with_kvcache(
            *(given.q, append.k_cache, append.v_cache),
            cache_seqlens=append.cache_seqlens + 4,
            page_table=given.page_table,
            causal=True,
            return_lse=True,
        )
    assert torch.equal(result[0], again[0]) and torch.equal(result[1], again[1])


def test_rotary_seqlens_move_the_angles_alone():
    rotary = Rotary.random(60, 64, interleaved=True)
    shift = torch.tensor([-3, 5], dtype=torch.int32)
    given = make_inputs(SPEC, "peaked")
    starts = given.seqused_k - 4 + shift
    result, given, append = decode(rotary=rotary, rotary_seqlens=starts)
    moved = take_last(given, [4, 4], rotary=lambda rows, places: rows)
    k_after = moved.k_after.clone()
    for b, start in enumerate(starts.tolist()):
        tokens = torch.arange(4) + int(append.cache_seqlens[b])
        at = given.page_table[b].long()[tokens // 8], tokens % 8
        k_after[at] = rotary(given.k[at], start + torch.arange(4))
    append = dataclasses.replace(append, k_after=k_after)
    reads = after(given, append, rotated_queries(given, rotary, starts.tolist()))
    compared = expected(reads.q, reads.k, reads.v, **reads.options()).check(*result)
    assert compared.ok, compared
    append.check()


def test_one_length_for_all_sequences_and_none():
    given = make_inputs(InputSpec(2, 3, 40, 4, 2, 64, causal=True), "peaked")
    compare = lambda inputs: expected(inputs.q, inputs.k, inputs.v, **inputs.options())  # noqa: E731
    with cute_fa.simulate("sm_80"):
        options = {"causal": True, "return_lse": True}
        whole = flash_attn_with_kvcache(given.q, given.k, given.v, **options)
        part = flash_attn_with_kvcache(given.q, given.k, given.v, cache_seqlens=21, **options)
    assert compare(given).check(*whole).ok
    shorter = dataclasses.replace(given, k=given.k[:, :21], v=given.v[:, :21])
    assert compare(shorter).check(*part).ok and not compare(shorter).check(*whole).ok


def test_cache_batch_idx_appends_where_it_reads():
    given = make_inputs(InputSpec(3, 2, 40, 4, 2, 64, seqused_k=True, lengths_k=(40, 13, 25), causal=True), "peaked")
    index = torch.tensor([2, 0, 1], dtype=torch.int32)
    inverse = index.argsort()
    stored = dataclasses.replace(given, k=given.k[inverse], v=given.v[inverse])
    append = take_last(stored, [2, 2, 2], index=index)
    with cute_fa.simulate("sm_80"):
        result = flash_attn_with_kvcache(
            *(given.q, append.k_cache, append.v_cache, append.k, append.v),
            cache_seqlens=append.cache_seqlens,
            cache_batch_idx=index,
            causal=True,
            return_lse=True,
        )
    assert expected(given.q, given.k, given.v, **given.options()).check(*result).ok
    append.check()


@pytest.mark.sampled
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_cache_batch_idx_is_the_row_of_the_page_table(arch):
    """As in FA3, whose page_table has a row for each sequence of the cache."""
    given = make_inputs(dataclasses.replace(SPEC, seqlen_q=2), "peaked")
    append = take_last(given, [2, 2])
    index = torch.tensor([3, 1], dtype=torch.int32)
    with cute_fa.simulate(arch, race=True):
        result = fa3.flash_attn_with_kvcache(
            *(given.q, append.k_cache, append.v_cache, append.k, append.v),
            cache_seqlens=append.cache_seqlens,
            cache_batch_idx=index,
            page_table=scattered(given.page_table, index, 4),
            causal=True,
            return_softmax_lse=True,
        )
    check(result, given, append)


@pytest.mark.sampled
@pytest.mark.parametrize("page_size", [None, 8])
def test_cache_leftpad_counts_for_places_alone(page_size):
    """New keys rotate by their row in the cache; the padding, NaN here, is no key, and sink tokens lie behind it."""
    spec = InputSpec(2, 3, 60, 4, 2, 64, page_size=page_size, seqused_k=page_size is None, lengths_k=(60, 33))
    spec = dataclasses.replace(spec, causal=True, window=(12, 0), sink_tokens=2, alibi=True)
    given = make_inputs(spec, "peaked")
    pads = [11, 0]
    rotary = Rotary.random(60, 32, interleaved=True)
    append = take_last(given, [3, 3], rotary=rotary)
    append.k_cache[places(given, 0, range(pads[0]))] = append.k_after[places(given, 0, range(pads[0]))] = torch.nan
    append.v_cache[places(given, 0, range(pads[0]))] = append.v_after[places(given, 0, range(pads[0]))] = torch.nan
    options = {"cache_seqlens": append.cache_seqlens, "cache_leftpad": torch.tensor(pads, dtype=torch.int32)}
    masks = {"window_size": (12, 0), "sink_tokens": 2, "alibi_slopes": given.alibi_slopes}
    with cute_fa.simulate("sm_80", race=True):
        out, lse = flash_attn_with_kvcache(
            *(given.q, append.k_cache, append.v_cache, append.k, append.v),
            **{**options, **masks, **rotary.arguments(), "page_table": given.page_table, "return_lse": True},
        )
    append.check()
    q = rotated_queries(given, rotary, append.cache_seqlens.tolist())
    for b, (pad, length) in enumerate(zip(pads, given.seqused_k.tolist(), strict=True)):
        at = places(given, b, range(pad, length))
        keys, values = (t[at][None] for t in (append.k_after, append.v_after))
        result = expected(q[b : b + 1], keys, values, **masks).check(out[b : b + 1], lse[b : b + 1])
        assert result.ok, result


def test_out_is_written_in_place():
    given = make_inputs(SPEC, "peaked")
    out = torch.full_like(given.q, torch.nan)
    result, given, append = decode(out=out)
    assert result[0] is out
    check(result, given, append)


@pytest.mark.sampled
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("seqlen_q", [1, 8])
def test_decoding_splits_the_keys(arch, seqlen_q):
    """One sequence of one kv head on many SMs; each key is read once for its eight query heads."""
    given = make_inputs(InputSpec(1, seqlen_q, 700, 8, 1, 64, page_size=16, causal=True), "peaked")
    with cute_fa.simulate(arch, race=True) as simulation:
        result = flash_attn_with_kvcache(
            *(given.q, given.k, given.v),
            cache_seqlens=given.seqused_k,
            page_table=given.page_table,
            causal=True,
            return_lse=True,
        )
    plan = list(plans.PLANS.values())[-1]
    assert plan.kernel is {"sm_80": Fa2Split, "sm_90a": Fa3Decode}[arch] and plan.problem.num_splits == 0
    assert simulation.launches[0].grid == (6, 1, 1)  # 11 blocks of keys, two a CTA
    assert expected(given.q, given.k, given.v, **given.options()).check(*result).ok


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_caches_beyond_int32(dim):
    """Pages, rows or heads more than 2^31 elements apart; what lies between is never touched."""
    given = make_inputs(InputSpec(1, 2, 24, 4, 2, 64, page_size=8, causal=True), "peaked")

    def far(cache):
        strides = list(cache.contiguous().stride())
        strides[dim] = (2**31 + 64) // (cache.shape[dim] - 1) // 8 * 8 + 8
        reach = 1 + sum(s * (n - 1) for s, n in zip(strides, cache.shape, strict=True))
        assert reach > 2**31
        return torch.empty(reach, dtype=cache.dtype).as_strided(cache.shape, strides).copy_(cache)

    append = take_last(given, [2])
    append = dataclasses.replace(append, k_cache=far(append.k_cache), v_cache=far(append.v_cache))
    with cute_fa.simulate("sm_80"):
        result = flash_attn_with_kvcache(
            *(given.q, append.k_cache, append.v_cache, append.k, append.v),
            cache_seqlens=append.cache_seqlens,
            page_table=given.page_table,
            causal=True,
            return_lse=True,
        )
    check(result, given, append)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"v": None}, ArgumentError, "k and v: give both or neither"),
        ({"cache_seqlens": None}, ArgumentError, "k and v without cache_seqlens"),
        ({"cache_seqlens": 1.5}, ArgumentError, "cache_seqlens=1.5"),
        ({"cache_seqlens": 61}, LengthError, r"cache_seqlens\[0\]=61 and 4 new tokens: .* 64"),
        ({"k": None, "v": None, "cu_seqlens_k_new": torch.zeros(3)}, ArgumentError, "cu_seqlens_k_new without new k"),
        ({"k": None, "v": None, "rotary_cos": torch.zeros(60, 8)}, ArgumentError, "rotary_cos without new k"),
        ({"rotary_cos": torch.zeros(60, 8)}, ArgumentError, "rotary_cos and rotary_sin"),
        ({"rotary_cos": torch.zeros(60, 36), "rotary_sin": torch.zeros(60, 36)}, ShapeError, "rotates 72 of 64"),
        ({"rotary_cos": torch.zeros(60, 4), "rotary_sin": torch.zeros(60, 4)}, ShapeError, "rotates 8 of 64"),
        ({"rotary_cos": torch.zeros(59, 8), "rotary_sin": torch.zeros(59, 8)}, LengthError, "rotary_cos has 59"),
        ({"rotary_interleaved": 2}, ArgumentError, "rotary_interleaved=2"),
        ({"cache_leftpad": torch.zeros(2)}, DTypeError, "cache_leftpad is float32"),
        ({"cache_leftpad": torch.tensor([9, 60], dtype=torch.int32)}, LengthError, r"cache_leftpad\[1\]=60: .* 29"),
        ({"seqused_q": torch.zeros(2)}, DTypeError, "seqused_q is float32: int32 is needed"),
        ({"seqused_q": torch.zeros(3, dtype=torch.int32)}, ShapeError, r"seqused_q \(3,\): \(2,\) is needed"),
        ({"seqused_q": torch.tensor([4, 5], dtype=torch.int32)}, LengthError, r"seqused_q\[1\]=5: .* the 4 tokens"),
        ({"tree_mask": torch.zeros(2, 4, 0, dtype=torch.int32)}, ShapeError, r"tree_mask \(2, 4, 0\)"),
        ({"qv": torch.zeros(2)}, UnsupportedArgumentError, "qv"),
        ({"nonsense": 1}, ArgumentError, "nonsense: no such argument"),
        ({"window_size": (-3, 0)}, CuteFaError, "window_size left=-3"),
        ({"learnable_sink": torch.zeros(5)}, ShapeError, r"learnable_sink \(5,\)"),
        ({"out": torch.zeros(2, 4, 4, 32)}, ShapeError, "out"),
        ({"num_splits": -1}, ArgumentError, "num_splits=-1"),
        (
            {"q": torch.zeros(2 * 4 * 4 * 64 + 4, dtype=torch.bfloat16)[4:].view(2, 4, 4, 64)},
            AlignmentError,
            "q starts",
        ),
        ({"block_table": torch.zeros(2, 8, dtype=torch.int32)}, ArgumentError, "two names of one argument"),
    ],
)
def test_bad_calls_write_nothing(changes, error, message):
    given = make_inputs(SPEC)
    append = take_last(given, [4, 4])
    before = append.k_cache.clone(), append.v_cache.clone()
    arguments = {"q": given.q, "k_cache": append.k_cache, "v_cache": append.v_cache, "k": append.k, "v": append.v}
    arguments |= {"cache_seqlens": append.cache_seqlens, "page_table": given.page_table, "causal": True}
    with cute_fa.simulate("sm_80") as simulation, pytest.raises(error, match=message):
        flash_attn_with_kvcache(**{**arguments, **changes})
    assert not simulation.launches
    for cache, unchanged in zip((append.k_cache, append.v_cache), before, strict=True):
        torch.testing.assert_close(cache, unchanged, atol=0, rtol=0, equal_nan=True)


def test_pages_of_new_tokens_are_checked():
    given = make_inputs(SPEC)
    table = given.page_table.clone()
    table[1, 4] = given.k.shape[0]  # token 32, the last of the second sequence
    with pytest.raises(PageTableError, match=r"page_table\[1\] lists page"):
        decode(page_table=table)


def test_there_is_no_gradient():
    given = make_inputs(SPEC)
    with pytest.raises(NoBackwardError, match="flash_attn_with_kvcache has no gradient"):
        flash_attn_with_kvcache(given.q.requires_grad_(), given.k, given.v, page_table=given.page_table)


def test_compiles_as_one_graph():
    torch._dynamo.reset()
    traced = torch.compile(flash_attn_with_kvcache, fullgraph=True, backend="aot_eager")
    rotary = Rotary.random(60, 64, interleaved=True)
    result, given, append = decode(function=traced, rotary=rotary)
    check(result, given, append, rotary)


@torch._dynamo.config.patch(capture_scalar_outputs=True)
@pytest.mark.parametrize("rotates", [False, True])
def test_compiles_with_lengths_known_at_run_time(rotates):
    """Of packed queries and new tokens: while tracing, ints without a value."""
    numbers = torch.Generator().manual_seed(0)
    q, new, cache = (
        torch.randn(shape, generator=numbers).to(torch.bfloat16) for shape in ((9, 4, 64), (9, 2, 64), (3, 96, 2, 64))
    )
    offsets, before = torch.tensor([0, 3, 4, 9], dtype=torch.int32), torch.tensor([5, 0, 30], dtype=torch.int32)
    cos, sin = torch.randn(2, 96, 32, generator=numbers) if rotates else (None, None)

    def step(k_cache, v_cache):
        longest = offsets.diff().max().item()
        lengths = {"cu_seqlens_q": offsets, "cu_seqlens_k_new": offsets, "cache_seqlens": before}
        lengths |= {"max_seqlen_q": longest, "max_seqlen_k_new": longest}
        return flash_attn_with_kvcache(
            q, k_cache, v_cache, new, new, **lengths, rotary_cos=cos, rotary_sin=sin, causal=True, return_lse=True
        )

    torch._dynamo.reset()
    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        caches = cache.clone(), cache.clone()
        with cute_fa.simulate("sm_80"):
            results.append((*function(*caches), *caches))
    torch.testing.assert_close(*results, atol=0, rtol=0)
    assert not results[1][2].equal(cache)


@pytest.mark.gpu
def test_decode_step_in_a_cuda_graph():
    """A captured step, replayed with other lengths in the same tensors."""
    given = make_inputs(dataclasses.replace(SPEC, seqlen_q=1), "peaked", device="cuda")
    append = take_last(given, [1, 1])
    tensors = {name: getattr(append, name).cuda() for name in ("k_cache", "v_cache", "k", "v", "cache_seqlens")}

    def step():
        return flash_attn_with_kvcache(given.q, **tensors, page_table=given.page_table, causal=True, return_lse=True)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    graph.replay()
    assert expected(given.q, given.k, given.v, **given.options()).check(*result).ok
    tensors["cache_seqlens"].sub_(1)
    graph.replay()
    shorter = dataclasses.replace(given, seqused_k=given.seqused_k - 1, k=tensors["k_cache"], v=tensors["v_cache"])
    assert expected(shorter.q, shorter.k, shorter.v, **shorter.options()).check(*result).ok
