"""``append_kv``: the cache after it, bit for bit, against plain torch."""

import dataclasses

import pytest
import torch
from torch import library
from torch._subclasses import FakeTensorMode

import cute_fa
from cute_fa import append_kv
from cute_fa.semantics.call import AppendCall
from cute_fa.semantics.errors import LengthError
from cute_fa.semantics.types import DType
from cute_fa.tools.inputs import InputSpec, make_inputs
from tests.testing.caches import Rotary, assert_rotated, rotated_queries, scattered, take_last
from tests.testing.grid import pairwise
from tests.testing.simulated import unwritten_is_nan

FEATURES = {
    "dtype": [DType.BF16, DType.FP16],
    "head_dim": [(64, 64), (128, 128), (80, 48), (32, 8), (256, 128)],
    "heads": [(4, 2), (3, 3)],
    "page_size": [None, 1, 4, 16, 64, 512],
    "index": [False, True],
    "packed": [False, True],
    "transposed": [False, True],
    "rotary": [None, "halves", "interleaved", "partial", "partial interleaved"],
    "tables": [torch.float32, torch.float16, torch.bfloat16],
    "pairs": [False, True],
    "each": [True, False],
    "shifted": [False, True],
    "schedule": [{}, {"late": True, "schedule_seed": 1}],
}


def make(case: dict):
    """(inputs, index of the cache, rotary) of a case: three sequences, whose new tokens straddle pages."""
    heads, heads_kv = case["heads"]
    head_dim, head_dim_v = case["head_dim"]
    lengths = (41, 9, 70)
    spec = InputSpec(
        *(3, 6, 72, heads, heads_kv, head_dim),
        head_dim_v=head_dim_v,
        dtype=case["dtype"],
        varlen_q=case["packed"],
        page_size=case["page_size"],
        seqused_k=case["page_size"] is None,
        lengths_q=(5, 0, 6) if case["packed"] else None,
        lengths_k=lengths,
    )
    given = make_inputs(spec)
    if case["transposed"]:  # heads before rows in memory
        k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (given.k, given.v))
        given = dataclasses.replace(given, k=k, v=v)
    index = None
    if case["index"]:
        index = torch.tensor([2, 0, 1], dtype=torch.int32)
    if case["index"] and case["page_size"] is None:
        inverse = index.argsort()
        given = dataclasses.replace(given, k=given.k[inverse], v=given.v[inverse])
    rotary = None
    if case["rotary"]:
        dim = 16 if "partial" in case["rotary"] else head_dim
        rotary = Rotary.random(80, dim, case["tables"], "interleaved" in case["rotary"], case["pairs"])
    return given, index, rotary


def run(case: dict, arch: str = "sm_80", device: str = "cpu") -> None:
    given, index, rotary = make(case)
    new = [5, 0, 6] if case["packed"] else [6, 6, 6]
    shift = 3 if case["shifted"] and rotary else 0
    keys = rotary
    if shift:
        keys = lambda rows, positions: rotary(rows, positions + shift)  # noqa: E731
    expected = take_last(given, new, case["packed"], keys, index)
    moved = {name: t.to(device) for name, t in vars(expected).items() if isinstance(t, torch.Tensor)}
    page_table = given.page_table
    if index is not None and page_table is not None:
        page_table = scattered(page_table, index, 5)
    options = {"page_table": page_table, "cache_batch_idx": index, "q": given.q}
    if case["packed"]:
        options |= {"cu_seqlens_k_new": expected.cu_seqlens_k_new, "max_seqlen_k_new": 6}
        options |= {"cu_seqlens_q": given.cu_seqlens_q, "max_seqlen_q": 6}
    if rotary:
        options |= {**rotary.arguments(), "rotate_each": case["each"]}
        if shift:
            options["rotary_seqlens"] = expected.cache_seqlens + shift
    options = {name: t.to(device) if isinstance(t, torch.Tensor) else t for name, t in options.items()}
    tensors = [moved[name] for name in ("k", "v", "k_cache", "v_cache", "cache_seqlens")]
    q, seqused_k = append_kv(*tensors, **options)
    dataclasses.replace(expected, k_cache=moved["k_cache"].cpu(), v_cache=moved["v_cache"].cpu()).check()
    assert seqused_k.tolist() == given.seqused_k.tolist()
    starts = (expected.cache_seqlens + shift).tolist()
    if rotary:
        assert_rotated(q.cpu(), rotated_queries(given, rotary, starts, case["each"]))
    else:
        assert q is options["q"]


def case_name(case: dict) -> str:
    cache = f"page{case['page_size']}" if case["page_size"] else "contiguous"
    index = "-index" if case["index"] else ""
    return f"{case['dtype'].value}-hd{case['head_dim'][0]}-{cache}{index}-{case['rotary']}"


CASES = pairwise(FEATURES, seed=1)


@pytest.mark.sampled
@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_features_in_pairs(case):
    with cute_fa.simulate("sm_80", race=True, **case["schedule"]), unwritten_is_nan():
        run(case)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_features_in_pairs_on_the_gpu(case):
    run(case, device="cuda")


BASE = {name: values[0] for name, values in FEATURES.items()} | {"rotary": "halves"}


@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a", "sm_120a"])
def test_later_archs_run_the_same_source(arch):
    with cute_fa.simulate(arch, race=True):
        run({**BASE, "page_size": 16})


def generate(**changes):
    """One new token for each of four sequences, two of which are padding; (arguments, options, expected)."""
    given = make_inputs(InputSpec(4, 1, 40, 4, 2, 64, page_size=8, lengths_k=(17, 1, 40, 3)))
    expected = take_last(given, [1, 0, 1, 0])
    counts = torch.tensor([1, 0, 1, 0], dtype=torch.int32)
    # padding's positions and pages may be anything that is a number
    options = {"page_table": given.page_table, "q": given.q, "seqused_q": counts, "seqused_k_new": counts}
    arguments = [expected.k, expected.v, expected.k_cache, expected.v_cache, expected.cache_seqlens]
    return arguments, {**options, **changes}, expected, given


def test_strides_of_dimensions_of_size_1_mean_nothing():
    """One token, one head, one sequence: whatever these strides are, in both calls of one plan."""
    new, shape = torch.randn(2, 64).bfloat16(), (1, 1, 1, 64)
    cos, sin = torch.zeros(8, 32), torch.ones(8, 32)  # a quarter turn
    for row in new:
        odd = torch.cat((row, torch.zeros(8).bfloat16())).as_strided(shape, (3, 5, 7, 1))
        caches = [torch.zeros(1, 8, 1, 64).bfloat16().as_strided((1, 8, 1, 64), (9, 64, 11, 1)) for _ in "kv"]
        with cute_fa.simulate("sm_80"):
            length = torch.tensor([3], dtype=torch.int32)
            q, total = append_kv(odd, odd, *caches, length, q=odd, rotary_cos=cos, rotary_sin=sin)
        turned = torch.cat((-row[32:], row[:32]))
        assert total.tolist() == [4]
        assert torch.equal(q.flatten(), turned)
        for cache, expected in zip(caches, (turned, row), strict=True):
            assert torch.equal(cache[0, 3, 0], expected)
            assert cache.count_nonzero() == expected.count_nonzero()


def test_sequences_without_tokens_write_nothing():
    """Generate-only, some sequences being the padding of a captured graph."""
    rotary = Rotary.random(41, 64)
    arguments, options, _, given = generate(**rotary.arguments())
    with cute_fa.simulate("sm_80", race=True), unwritten_is_nan():
        q, seqused_k = append_kv(*arguments, **options)
    after = take_last(given, [1, 0, 1, 0], rotary=rotary)
    dataclasses.replace(after, k_cache=arguments[2], v_cache=arguments[3]).check()
    assert seqused_k.tolist() == [17, 1, 40, 3]
    expected = rotated_queries(given, rotary, [16, 1, 39, 3])
    assert_rotated(q[[0, 2]], expected[[0, 2]])
    assert q[[1, 3]].isnan().all()


def test_no_new_tokens_at_all():
    arguments, options, expected, given = generate()
    arguments[:2] = (t[:, :0] for t in arguments[:2])
    del options["seqused_k_new"]
    before = [t.clone() for t in arguments[2:4]]
    with cute_fa.simulate("sm_80"), unwritten_is_nan():
        q, seqused_k = append_kv(*arguments, **options)
    assert q is given.q and torch.equal(seqused_k, expected.cache_seqlens)
    for cache, unchanged in zip(arguments[2:4], before, strict=True):
        torch.testing.assert_close(cache, unchanged, atol=0, rtol=0, equal_nan=True)


@pytest.mark.parametrize("page_size", [None, 8])
def test_tokens_beyond_the_cache_are_not_written(page_size, monkeypatch):
    """Where values are not checked: the four tokens that fit are written, no other byte."""
    given = make_inputs(InputSpec(2, 1, 40, 2, 2, 64, page_size=page_size, seqused_k=not page_size, lengths_k=(40, 40)))
    expected = take_last(given, [4, 4])
    k, v = (torch.cat((t, torch.ones_like(t)), 1) for t in (expected.k, expected.v))
    arguments = [k, v, expected.k_cache, expected.v_cache, expected.cache_seqlens]
    with cute_fa.simulate("sm_80"), pytest.raises(LengthError, match=r"cache_seqlens\[0\]=36 and 8 new .* room for 40"):
        append_kv(*arguments, page_table=given.page_table)
    assert expected.k_cache.isnan().any()  # nothing written yet
    monkeypatch.setattr("cute_fa.engine.append._check_values", lambda call: None)
    with cute_fa.simulate("sm_80"):
        append_kv(*arguments, page_table=given.page_table)
    expected.check()


def test_operator():
    rotary = Rotary.random(41, 64, pairs=True)
    given = make_inputs(InputSpec(2, 3, 40, 4, 2, 64, page_size=8, lengths_k=(17, 30)))
    tensors = take_last(given, [3, 3])
    options = {"q": given.q, "page_table": given.page_table, **rotary.arguments()}
    call = AppendCall(
        tensors.k_cache,
        tensors.v_cache,
        tensors.k,
        tensors.v,
        tensors.cache_seqlens,
        q=given.q,
        page_table=given.page_table,
        rotary_cos=rotary.cos,
        rotary_sin=rotary.sin,
    )
    with cute_fa.simulate("sm_80"):
        library.opcheck(torch.ops.cute_fa.append_kv.default, tuple(call))
        torch._dynamo.reset()
        new = (tensors.k, tensors.v, tensors.k_cache, tensors.v_cache, tensors.cache_seqlens)
        q, seqused_k = torch.compile(append_kv, fullgraph=True, backend="aot_eager")(*new, **options)
    expected = take_last(given, [3, 3], rotary=rotary)
    dataclasses.replace(expected, k_cache=tensors.k_cache, v_cache=tensors.v_cache).check()
    assert_rotated(q, rotated_queries(given, rotary, [14, 27]))
    assert seqused_k.tolist() == [17, 30]
    with FakeTensorMode(allow_non_fake_inputs=True):
        q, seqused_k = append_kv(*new, **options)
    assert q.shape == given.q.shape and (seqused_k.shape, seqused_k.dtype) == ((2,), torch.int32)
