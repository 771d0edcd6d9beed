"""Every provider's call means what the problem says: on the CPU with torch's own kernels, ours in the simulator, the
reference behind the signatures of what needs a GPU."""

from __future__ import annotations

import dataclasses
import inspect
import sys
import types

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel, varlen

import cute_fa
from cute_fa import RangePlan
from cute_fa.compat import fa3
from cute_fa.semantics import reference
from cute_fa.tools.inputs import make_inputs
from perf.providers import PROVIDERS, Unavailable
from perf.workload import Workload

SMALL = dict(head_dim=32, head_dim_v=32, heads=4, heads_kv=2, seqlen=40, tokens=80)
WORKLOADS = {
    "dense": Workload(**SMALL),
    "causal": Workload(**SMALL, causal=True),
    "window": Workload(**SMALL, window=7),
    "causal window": Workload(**SMALL, causal=True, window=7),
    "packed": Workload(**SMALL, lengths="uniform"),
    "packed window": Workload(**SMALL, lengths="uniform", window=7),
    "packed causal window": Workload(**SMALL, lengths="uniform", causal=True, window=7),
    "paged": Workload(**SMALL, page_size=16, causal=True),
    "paged packed": Workload(**SMALL, page_size=16, causal=True, lengths="uniform"),
    "decode": Workload(**SMALL, decode=True),
    "decode window": Workload(**SMALL, decode=True, window=7),
    "decode lengths": Workload(**SMALL, decode=True, lengths="uniform"),
    "decode paged": Workload(**SMALL, decode=True, lengths="uniform", page_size=16),
    "decode drafts": Workload(**SMALL, decode=True, query_tokens=5),
}
# One packed sequence under a range plan; queries of the second one may see nothing.
PLANNED = {plan: Workload(**SMALL | {"seqlen": 80}, plan=plan) for plan in ("window-global", "random-10")}


def agrees(name: str, workload: Workload) -> bool:
    """Whether the provider's output is within the project's tolerance, with inputs that show every wrong key."""
    inputs = workload.inputs("peaked")
    attention = PROVIDERS[name].prepare(inputs)
    tensors = [attention.layout.adapt(t) for t in (inputs.q, inputs.k, inputs.v)]
    out = attention.layout.restore(attention.forward(*tensors))
    return reference.expected(inputs.q, inputs.k, inputs.v, **inputs.options()).check(out).ok


def test_names_are_unique_and_ours_comes_first():
    assert list(PROVIDERS) == ["cute-fa", "FA4", "FA3", "FA2", "cuDNN", "FlexAttention", "MagiAttention", "Triton"]
    taking = [name for name, provider in PROVIDERS.items() if provider.takes_ranges]
    assert taking == ["cute-fa", "FlexAttention", "MagiAttention"]
    assert [name for name, provider in PROVIDERS.items() if provider.takes_codes] == ["cute-fa"]
    assert PROVIDERS["cute-fa"].version().startswith(cute_fa.__version__)


def with_signature(function, real):
    """``function``, called only with what ``real`` would take."""
    signature = inspect.signature(real)

    def call(*arguments, **options):
        signature.bind(*arguments, **options)
        return function(*arguments, **options)

    return call


def flash_attn(
    q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, cache_seqlens=None, **options
):
    """What FlashAttention 3 and 4 compute, on the reference."""
    assert (cu_seqlens_q is None) or max(cu_seqlens_q.diff()) == max_seqlen_q
    lengths = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    if cache_seqlens is not None:
        lengths["seqused_k"] = cache_seqlens
    return reference.attention(q, k, v, **lengths, **options, dtype=q.dtype)


@pytest.mark.parametrize("case", WORKLOADS)
def test_flash_attention_4(case, monkeypatch):
    from flash_attn.cute import interface

    names = ("flash_attn_func", "flash_attn_varlen_func")
    functions = {name: with_signature(flash_attn, getattr(interface, name)) for name in names}
    monkeypatch.setattr(PROVIDERS["FA4"], "module", lambda: types.SimpleNamespace(**functions))
    assert agrees("FA4", WORKLOADS[case])


@pytest.mark.parametrize(
    ("capability", "case", "splits"),
    [((10, 0), "decode", 0), ((9, 0), "decode", None), ((12, 0), "decode", None), ((10, 0), "dense", None)],
)
def test_flash_attention_4_splits_keys_where_it_can(capability, case, splits, monkeypatch):
    given = make_inputs(WORKLOADS[case].spec())
    asked = []
    module = types.SimpleNamespace(flash_attn_func=lambda q, k, v, **options: asked.append(options))
    monkeypatch.setattr(PROVIDERS["FA4"], "module", lambda: module)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    query = types.SimpleNamespace(is_cuda=True, device="cuda")
    PROVIDERS["FA4"].prepare(dataclasses.replace(given, q=query)).forward(given.q, given.k, given.v)
    assert asked[0].get("num_splits") == splits


@pytest.mark.parametrize("case", WORKLOADS)
def test_flash_attention_3(case, monkeypatch):
    """Returns out alone, as lately, or with LSE; decodes through the function that splits keys by itself."""
    called = []

    def with_kvcache(*arguments, **options):
        called.append("cache")
        return flash_attn(*arguments, **options)[0]

    names = ("flash_attn_func", "flash_attn_varlen_func")
    functions = {name: with_signature(flash_attn, getattr(fa3, name)) for name in names}
    module = types.SimpleNamespace(**functions, flash_attn_with_kvcache=with_kvcache)
    monkeypatch.setattr(PROVIDERS["FA3"], "module", lambda: module)
    assert agrees("FA3", WORKLOADS[case])
    assert bool(called) == ("decode" in case or "paged" in case)


@pytest.mark.sampled
@pytest.mark.parametrize("case", ["causal", "packed window", "decode paged"])
def test_our_kernels(case):
    with cute_fa.simulate("sm_90a"):
        assert agrees("cute-fa", WORKLOADS[case])


@pytest.mark.sampled
@pytest.mark.without_races
@pytest.mark.parametrize("case", PLANNED)
def test_our_kernels_under_a_plan(case):
    """Building it anew makes the walks that calls have taken."""
    inputs = PLANNED[case].inputs("peaked")
    with cute_fa.simulate("sm_80"):
        assert agrees("cute-fa", PLANNED[case])
        attention, made = PROVIDERS["cute-fa"].prepare(inputs), []
        attention.build()
        attention.forward(inputs.q, inputs.k, inputs.v)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(RangePlan, "_make_walk", lambda plan, *of: made.append(of) or torch.zeros(8).int())
            attention.build()
    assert made == [("queries", (128, 64))]


@pytest.mark.parametrize("case", PLANNED)
def test_magi_attention(case, monkeypatch):
    """Behind its own signature, as its documentation has it."""

    def flex_flash_attn_func(q, k, v, q_ranges, k_ranges, attn_type_map=None):
        ranges = {"q_ranges": q_ranges, "k_ranges": k_ranges, "attn_type_map": attn_type_map}
        out, lse = reference.attention(q[None], k[None], v[None], **ranges, dtype=q.dtype)
        return out[0], types.SimpleNamespace(lse=lse)

    module = types.SimpleNamespace(flex_flash_attn_func=flex_flash_attn_func)
    monkeypatch.setitem(sys.modules, "magi_attention.functional", module)
    assert agrees("MagiAttention", PLANNED[case])
    with pytest.raises(Unavailable, match="compared where there are ranges"):
        PROVIDERS["MagiAttention"].prepare(WORKLOADS["dense"].inputs("random"))


@pytest.mark.parametrize("case", ["dense", "causal", "decode"])
def test_flash_attention_2_behind_sdpa(case):
    assert agrees("FA2", WORKLOADS[case])


def varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, *, window_size=(-1, -1), enable_gqa=False, **cache):
    """torch's function of that name on the reference; its rules as its documentation has them."""
    assert q.dim() == 3 and (q.shape[1] != k.shape[-2]) == enable_gqa
    assert max(cu_q.diff()) == max_q
    pages = cache.get("block_table")
    assert (cu_k is None) == (pages is not None)
    used = cache.get("seqused_k")
    assert max(used if used is not None else cu_k.diff()) == max_k
    lengths = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "seqused_k": used, "page_table": pages}
    return reference.attention(q, k, v, **lengths, window_size=window_size, dtype=q.dtype)[0]


@pytest.mark.parametrize("case", [case for case in WORKLOADS if case not in ("dense", "causal", "decode")])
def test_flash_attention_2_behind_varlen_attn(case, monkeypatch):
    monkeypatch.setattr(varlen, "varlen_attn", with_signature(varlen_attn, varlen.varlen_attn))
    assert agrees("FA2", WORKLOADS[case])


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(
    "case", [case for case in WORKLOADS if case not in ("paged", "paged packed", "decode lengths", "decode paged")]
)
def test_flex_attention(case):
    assert agrees("FlexAttention", WORKLOADS[case])


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("case", PLANNED)
def test_flex_attention_under_a_plan(case):
    """Its mask is the plan's, made again by ``build``."""
    assert agrees("FlexAttention", PLANNED[case])
    mask = PROVIDERS["FlexAttention"].prepare(PLANNED[case].inputs("random")).build()
    query, key = torch.meshgrid(torch.arange(80), torch.arange(80), indexing="ij")
    assert mask.mask_mod(0, 0, query, key).equal(torch.from_numpy(PLANNED[case].ranges.mask()))


def tutorial(q, k, v, causal, scale, warp_specialise):
    assert q.is_contiguous() and k.is_contiguous() and v.is_contiguous()
    assert not warp_specialise
    with sdpa_kernel(SDPBackend.MATH):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)


@pytest.mark.parametrize("causal", [False, True])
def test_tutorial_of_triton(causal, monkeypatch):
    monkeypatch.setitem(sys.modules, "06-fused-attention", types.SimpleNamespace(attention=tutorial))
    assert agrees("Triton", Workload(**SMALL | {"heads_kv": 4}, causal=causal))


@pytest.mark.parametrize(
    ("name", "case", "reason"),
    [
        ("cuDNN", "window", "a window"),
        ("cuDNN", "causal window", "a window"),
        ("cuDNN", "packed", "different lengths"),
        ("cuDNN", "paged", "different lengths"),
        ("FlexAttention", "paged", "pages"),
        ("FlexAttention", "decode lengths", "lengths"),
        ("Triton", "window", "no windows, fewer kv heads"),
        ("Triton", "decode", "seqlen_q ≠ seqlen_k"),
        ("Triton", "packed", "packed sequences"),
    ],
)
def test_what_a_provider_does_not_do_it_says(name, case, reason, monkeypatch):
    monkeypatch.setitem(sys.modules, "06-fused-attention", types.SimpleNamespace(attention=tutorial))
    with pytest.raises(Unavailable, match=reason):
        PROVIDERS[name].prepare(make_inputs(WORKLOADS[case].spec()))


def test_what_is_not_installed_it_says(monkeypatch):
    for name in ("flash_attn_interface", "flash_attn_3", "06-fused-attention", "magi_attention"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: False)
    reasons = {"FA3": "flash_attn_interface", "Triton": "06-fused-attention.py", "cuDNN": "no cuDNN"}
    for name, reason in (reasons | {"MagiAttention": "magi_attention"}).items():
        with pytest.raises(Unavailable, match=reason):
            PROVIDERS[name].version()


def test_versions_of_what_is_installed():
    assert PROVIDERS["FA4"].version() == "4.0.0b36"
    assert PROVIDERS["FA2"].version() == PROVIDERS["FlexAttention"].version() == f"torch {torch.__version__}"
