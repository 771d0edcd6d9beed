"""What users of peers pass: numbers in other clothes, nothing at all, head_dims of any size, and autocast."""

import numpy as np
import pytest
import torch

import cute_fa
from cute_fa import append_kv, flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from cute_fa.compat import fa2
from cute_fa.engine import plan as plans
from cute_fa.semantics.errors import DTypeError, EmptyBatchError, UnsupportedKeyError, ZeroLengthError
from cute_fa.semantics.reference import Gradients, check_gradients, expected
from cute_fa.tools.inputs import InputSpec, make_inputs
from tests.testing.calls import calls, ints, rows

CALLS = calls()


@pytest.fixture
def simulated():
    with cute_fa.simulate("sm_80") as simulation:
        yield simulation


# ---- numbers and flags -----------------------------------------------------------------------------------------------

PLAIN = {"max_seqlen_q": 28, "max_seqlen_k": 50, "softmax_scale": 0.5, "causal": True, "softcap": 0.0, "sink_tokens": 0}
OTHERS = {
    "tensors": {name: torch.tensor(value) for name, value in PLAIN.items() if name != "causal"},
    "tensors of other dtypes": {
        "max_seqlen_q": torch.tensor(28, dtype=torch.int32),
        "softmax_scale": torch.tensor(0.5),
    },
    "numpy": {
        "max_seqlen_q": np.int32(28),
        "max_seqlen_k": np.int64(50),
        "softmax_scale": np.float32(0.5),
        "causal": np.True_,
        "deterministic": np.False_,
        "softcap": np.float64(0.0),
        "sink_tokens": np.int64(0),
        "num_splits": np.int64(1),
        "return_lse": np.True_,
        "window_size": (np.int64(-1), np.int64(0)),
    },
    "0 and 1": {"causal": 1, "deterministic": 0, "return_lse": 1, "return_attn_probs": 0},
    "None": {"softcap": None},
}


@pytest.mark.parametrize("others", list(OTHERS))
def test_numbers_in_other_clothes(simulated, monkeypatch, others):
    """The call is the very same one: its plan is found again."""
    arguments = {**CALLS["varlen"].arguments, "v": rows(80, 2, 64), **PLAIN, "return_lse": True}
    del arguments["alibi_slopes"], arguments["learnable_sink"]
    result = flash_attn_varlen_func(**arguments)
    known = len(plans.PLANS)
    again = flash_attn_varlen_func(**{**arguments, **OTHERS[others]})
    assert all(map(torch.equal, result, again))
    assert len(plans.PLANS) == known


def test_a_number_in_a_tensor_is_read_at_every_call(simulated):
    """A tensor's hash does not follow its number."""
    q, scale = rows(1, 24, 2, 64), torch.tensor(0.0)
    for value in (0.125, 1.5):
        scale.fill_(value)
        assert flash_attn_func(q, q, q, softmax_scale=scale).equal(flash_attn_func(q, q, q, softmax_scale=value))


def test_kvcache_takes_them_too(simulated):
    call = CALLS["kvcache"]
    result = call(causal=True, cache_seqlens=30)
    others = {"causal": 1, "softcap": None, "cache_seqlens": np.int64(30), "return_lse": np.True_}
    assert all(map(torch.equal, result, call(**others, softmax_scale=torch.tensor(0.125))))


# ---- nothing at all --------------------------------------------------------------------------------------------------

EMPTY = {
    "dense": lambda: (flash_attn_func, {"q": rows(0, 24, 4, 64), "k": rows(0, 40, 2, 64), "v": rows(0, 40, 2, 32)}),
    "packed, no sequences": lambda: (flash_attn_varlen_func, packed(0, 0, ints(0), ints(0))),
    "packed, empty sequences": lambda: (flash_attn_varlen_func, packed(0, 0, ints(0, 0, 0), ints(0, 0, 0))),
    "packed, no queries": lambda: (flash_attn_varlen_func, packed(0, 80, ints(0, 0, 0), ints(0, 30, 80))),
    "packed, no keys": lambda: (flash_attn_varlen_func, packed(48, 0, ints(0, 20, 48), ints(0, 0, 0))),
    "rows of no sequence": lambda: (flash_attn_varlen_func, packed(5, 7, ints(0), ints(0)) | {"max_seqlen_q": 5}),
}


def packed(total_q, total_k, cu_seqlens_q, cu_seqlens_k):
    tensors = {"q": rows(total_q, 4, 64), "k": rows(total_k, 2, 64), "v": rows(total_k, 2, 32)}
    lengths = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    longest = {"max_seqlen_q": 28 if total_q else 0, "max_seqlen_k": 50 if total_k else 0}
    return {**tensors, **lengths, **longest}


@pytest.mark.parametrize("case", list(EMPTY))
def test_nothing_gives_nothing(simulated, case):
    function, arguments = EMPTY[case]()
    inputs = [arguments[name].requires_grad_() for name in "qkv"]
    sink = torch.zeros(4, requires_grad=True)
    out, lse = function(**arguments, causal=True, learnable_sink=sink, return_lse=True)
    q = arguments["q"]
    assert out.shape == (*q.shape[:-1], 32) and not out.isnan().any() and not out.any()
    assert lse.shape == ((4, q.shape[0]) if q.dim() == 3 else (0, 4, 24))
    inputs.append(sink)
    for grad, tensor in zip(torch.autograd.grad(out.sum(), inputs), inputs, strict=True):
        assert grad.shape == tensor.shape and not grad.any()
    assert not simulated.launches


def test_a_longest_length_of_0_is_for_no_tokens_alone(simulated):
    for name, q, k in (("max_seqlen_q", 48, 0), ("max_seqlen_k", 0, 80)):
        arguments = packed(q, k, ints(0, 0, 0), ints(0, 0, 0)) | {name: 0}
        with pytest.raises(ZeroLengthError, match=f"{name}=0 for {q + k} tokens"):
            flash_attn_varlen_func(**arguments)


def test_a_cache_of_no_sequences(simulated):
    """A contiguous one gives nothing, and appends nothing; a paged one is an error."""
    cache = {"k_cache": rows(0, 48, 2, 64), "v_cache": rows(0, 48, 2, 32), "cache_seqlens": ints()}
    new = {"k": rows(0, 3, 2, 64), "v": rows(0, 3, 2, 32)}
    rotary = {"rotary_cos": rows(48, 16), "rotary_sin": rows(48, 16)}
    q = rows(0, 3, 4, 64)
    out = flash_attn_with_kvcache(q, **cache, **new, **rotary, causal=True)
    assert out.shape == (0, 3, 4, 32)
    rotated, lengths = append_kv(**cache, **new, **rotary, q=q)
    assert rotated.shape == q.shape and lengths.shape == (0,)
    assert not simulated.launches
    pages = CALLS["kvcache"].arguments | {"q": q, "cache_seqlens": ints(), "page_table": ints().reshape(0, 3)}
    with pytest.raises(EmptyBatchError, match=r"page_table \(0, 3\): a paged cache of at least one sequence"):
        flash_attn_with_kvcache(**pages)


# ---- FA2's head_dims -------------------------------------------------------------------------------------------------


def strided(tensor):
    """The same numbers with a last dimension that is not contiguous."""
    return torch.stack([tensor, tensor], -1)[..., 0].detach()


@pytest.mark.sampled
@pytest.mark.parametrize(("head_dim", "head_dim_v"), [(20, 20), (64, 60)])
def test_fa2_pads_head_dims(simulated, head_dim, head_dim_v):
    given = make_inputs(InputSpec(2, 20, 30, 4, 2, head_dim, head_dim_v=head_dim_v, causal=True), "peaked")
    inputs = [strided(t).requires_grad_() for t in (given.q, given.k, given.v)]
    out, lse, mask = fa2.flash_attn_func(*inputs, causal=True, return_attn_probs=True)
    assert out.shape == (2, 20, 4, head_dim_v) and mask.numel() == 0
    result = expected(given.q, given.k, given.v, causal=True).check(out.detach(), lse)
    assert result.ok, result
    dout = rows(*out.shape)
    grads = Gradients(*torch.autograd.grad(out, inputs, dout), None, None)
    errors = check_gradients(grads, given.q, given.k, given.v, dout, causal=True)
    assert len(errors) == 3 and all(error.ok for error in errors.values()), errors


def test_fa2_pads_caches_and_fills_them(simulated):
    """In FA2, too, whole caches are padded and copied back."""
    given = make_inputs(InputSpec(2, 3, 40, 4, 2, 36, page_size=8, causal=True), "peaked")
    whole = fa2.flash_attn_with_kvcache(
        *(given.q, given.k, given.v), cache_seqlens=given.seqused_k, block_table=given.page_table, causal=True
    )
    assert expected(given.q, given.k, given.v, **given.options()).check(whole).ok
    caches = [given.k.clone(), given.v.clone()]
    new = [torch.empty(2, 3, 2, 36, dtype=t.dtype) for t in caches]
    for b, length in enumerate(given.seqused_k.tolist()):
        for t in range(3):
            token = length - 3 + t
            place = given.page_table[b, token // 8], token % 8
            for cache, rows_ in zip(caches, new, strict=True):
                rows_[b, t] = cache[place]
                cache[place] = torch.nan
    appended = fa2.flash_attn_with_kvcache(
        *(given.q, *caches, *new), cache_seqlens=given.seqused_k - 3, block_table=given.page_table, causal=True
    )
    assert appended.equal(whole)
    torch.testing.assert_close(caches, [given.k, given.v], atol=0, rtol=0, equal_nan=True)


def test_fa2_pads_no_more_than_a_kernel_serves(simulated):
    q = rows(1, 8, 2, 260)
    with pytest.raises(UnsupportedKeyError, match="head_dim 260: a multiple of 8 from 8 to 256"):
        fa2.flash_attn_func(q, q, q)


# ---- autocast --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["kvcache", "kvcache, block_table, append"])
def test_autocast_takes_the_dtype_of_the_cache(simulated, name, autocast):
    """Whatever autocast's dtype is: the cache is written in place, and a copy of it would be lost."""
    call = CALLS[name]
    caches = ("k_cache", "v_cache")
    plain = {cache: call.arguments[cache].clone() for cache in caches}
    result = call(**plain)
    cast = {cache: call.arguments[cache].clone() for cache in caches}
    wide = {name: call.arguments[name].float() for name in ("q", "k", "v") if name in call.arguments}
    with torch.autocast("cpu", dtype=autocast):
        assert all(map(torch.equal, result, call(**cast, **wide)))
    assert all(cast[cache].equal(plain[cache]) for cache in caches)
    with pytest.raises(DTypeError):
        call(**wide)


def test_autocast_of_an_append(simulated):
    call = CALLS["append_kv"]
    caches = [{name: call.arguments[name].clone() for name in ("k_cache", "v_cache")} for _ in range(2)]
    q, _ = call(**caches[0])
    with torch.autocast("cpu", dtype=torch.float16):
        rotated, _ = call(**caches[1], **{name: call.arguments[name].float() for name in ("q", "k", "v")})
    assert rotated.equal(q)
    assert all(caches[0][name].equal(caches[1][name]) for name in caches[0])
