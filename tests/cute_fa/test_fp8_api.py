"""fp8 through the public functions: descales of every kind, output dtypes, operators, requests, errors."""

import math
from dataclasses import replace

import pytest
import torch
from torch.library import opcheck

import cute_fa
from cute_fa import compat, errors
from cute_fa.engine import plan as plans
from cute_fa.semantics import reference
from cute_fa.semantics.call import Call
from cute_fa.semantics.types import DType
from cute_fa.tools.inputs import InputSpec, make_inputs

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
SPEC = InputSpec(2, 70, 130, 4, 2, 64, dtype=DType.E4M3, causal=True)
GIVEN = make_inputs(SPEC, "peaked", seed=1)
DESCALES = {name: getattr(GIVEN, name) for name in ("q_descale", "k_descale", "v_descale")}
PAGED = make_inputs(replace(SPEC, page_size=16, seqused_k=True), "peaked", seed=2)
Q, K, V = GIVEN.q, GIVEN.k, GIVEN.v


@pytest.fixture
def arch():
    return "sm_90a"


@pytest.fixture(autouse=True)
def simulated(arch):
    with cute_fa.simulate(arch, num_sms=2):
        yield


@pytest.fixture
def nothing_runs(monkeypatch):
    """Nothing may be launched, nor compiled."""
    monkeypatch.setattr(plans, "compiled", None)


def run(**options):
    return cute_fa.flash_attn_func(Q, K, V, causal=True, **options, return_lse=True)


def agree(ours, theirs):
    return all(torch.equal(*pair) for pair in zip(ours, theirs, strict=True))


def test_descales_of_any_strides():
    """Transposed, expanded over the heads, and as a view of bytes: the same numbers."""
    wanted = run(**DESCALES)
    assert reference.check(*wanted, Q, K, V, causal=True, **DESCALES).ok
    transposed = {name: descale.t().contiguous().t() for name, descale in DESCALES.items()}
    assert transposed["q_descale"].stride() == (1, 2)
    assert agree(run(**transposed), wanted)
    by_bytes = [t.view(torch.uint8).clone().view(E4M3) for t in (Q, K, V)]
    assert agree(cute_fa.flash_attn_func(*by_bytes, causal=True, **DESCALES, return_lse=True), wanted)


def test_one_number_for_all():
    """A number, a tensor of one element and an expanded one are alike; None is 1."""
    filled = {"k_descale": torch.full((2, 2), 0.75), "v_descale": torch.full((2, 2), 1.5)}
    wanted = run(q_descale=1.0, **filled)
    assert reference.check(*wanted, Q, K, V, causal=True, **filled).ok
    assert agree(run(**filled), wanted)
    for shape in ((), (1,), (1, 1)):
        ones = {name: descale[0, 0].reshape(shape) for name, descale in filled.items()}
        assert agree(run(q_descale=torch.ones(shape), **ones), wanted)
    expanded = {name: descale[:1, :1].expand(2, 2) for name, descale in filled.items()}
    assert agree(run(q_descale=1, **expanded), wanted)
    assert not agree(run(**filled | {"k_descale": 0.7}), wanted)
    assert not agree(run(**filled | {"v_descale": 1.4}), wanted)


def test_the_output_is_what_is_asked_for():
    half = run(**DESCALES, out_dtype=torch.float16)
    assert half[0].dtype == torch.float16 and reference.check(*half, Q, K, V, causal=True, **DESCALES).ok
    assert torch.equal(run(**DESCALES, out_dtype=torch.bfloat16)[0], run(**DESCALES)[0])
    out = torch.full(Q.shape, math.nan, dtype=torch.float16)
    assert cute_fa.flash_attn_func(Q, K, V, causal=True, **DESCALES, out=out) is out
    assert torch.equal(out, half[0])


def test_every_function():
    options = {"causal": True, **DESCALES}
    wanted = cute_fa.flash_attn_func(Q, K, V, **options)
    assert torch.equal(compat.fa3.flash_attn_func(Q, K, V, None, True, None, *DESCALES.values()), wanted)
    offsets = [torch.arange(3, dtype=torch.int32) * rows for rows in (70, 130)]
    packed = cute_fa.flash_attn_varlen_func(*(t.flatten(0, 1) for t in (Q, K, V)), *offsets, 70, 130, **options)
    assert torch.equal(packed.view(wanted.shape), wanted)
    assert torch.equal(cute_fa.flash_attn_with_kvcache(Q, K, V, **options), wanted)
    request = cute_fa.Fa3FwdFp8Request(Q, K, V, mask=cute_fa.MaskKind.CAUSAL, **DESCALES)
    assert torch.equal(request.run()[0], wanted)
    assert request.kernel_name() == "fa3_fwd_sm90a_e4m3_hd64_causal_gqa2"
    assert request.dispatch_key().dtype is DType.E4M3 and request.dispatch_key().out_dtype is DType.BF16
    assert (request.reference()[0] - wanted).abs().max() < 0.1


def test_pages():
    descales = {name: getattr(PAGED, name) for name in DESCALES}
    lengths = {"page_table": PAGED.page_table, "seqused_k": PAGED.seqused_k}
    out, lse = PAGED.run(return_lse=True)
    assert reference.check(out, lse, PAGED.q, PAGED.k, PAGED.v, causal=True, **lengths, **descales).ok
    cached = cute_fa.flash_attn_with_kvcache(
        PAGED.q, PAGED.k, PAGED.v, cache_seqlens=PAGED.seqused_k, page_table=PAGED.page_table, causal=True, **descales
    )
    assert torch.equal(cached, out)
    request = cute_fa.PagedAttentionRequest(
        PAGED.q,
        cute_fa.PagedKvCache(PAGED.k, PAGED.v),
        PAGED.page_table,
        PAGED.seqused_k,
        mask=cute_fa.MaskKind.CAUSAL,
        **descales,
    )
    assert torch.equal(request.run()[0], out)


def test_operator():
    # test_schema multiplies the inputs, which torch does not do in fp8 on the CPU.
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    call = Call.made(Q, K, V, window_right=0, **DESCALES)
    opcheck(torch.ops.cute_fa.attention.default, call.flat(), test_utils=checks)
    out = torch.empty(Q.shape, dtype=torch.bfloat16)
    opcheck(torch.ops.cute_fa.attention_out.default, (*call.flat(), out), test_utils=checks)


def test_compiled_by_torch():
    def layer(q, k, v, descale):
        return cute_fa.flash_attn_func(q, k, v, causal=True, k_descale=descale, out_dtype=torch.float16) * 2

    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    descale = DESCALES["k_descale"]
    assert torch.equal(compiled(Q, K, V, descale), layer(Q, K, V, descale))


HALVES = [t.to(torch.bfloat16) for t in (Q, K, V)]


@pytest.mark.parametrize(
    ("tensors", "options", "error", "message"),
    [
        (
            (Q, K, V),
            {"q_descale": torch.ones(2, 4)},
            errors.ShapeError,
            r"q_descale \(2, 4\): \(2, 2\) is needed, or one",
        ),
        ((Q, K, V), {"k_descale": torch.ones(2)}, errors.ShapeError, r"k_descale \(2,\): \(2, 2\) is needed"),
        ((Q, K, V), {"v_descale": torch.ones(2, 2).double()}, errors.DTypeError, "v_descale is float64: float32"),
        (
            (Q, K, V),
            {"v_descale": torch.ones(2, 2, device="meta")},
            errors.DeviceError,
            "v_descale is on meta and q on",
        ),
        ((Q, K, V), {"q_descale": "1"}, errors.ArgumentError, "q_descale='1': a number is needed"),
        ((Q, K, V), {"q_descale": True}, errors.ArgumentError, "q_descale=True: a number is needed"),
        ((Q, K, V), {"k_descale": 0.0}, errors.ArgumentError, r"k_descale=0: between 2\^-32 and 2\^32"),
        ((Q, K, V), {"k_descale": torch.tensor([[1.0, 1], [-1, 1]])}, errors.ArgumentError, r"k_descale\[1, 0\]=-1"),
        ((Q, K, V), {"v_descale": math.nan}, errors.ArgumentError, "v_descale=nan: between"),
        (
            (Q, K, V),
            {"out_dtype": torch.float32},
            errors.DTypeError,
            "out_dtype is float32: torch.float16 or torch.bfloat16",
        ),
        ((Q, K, V), {"out_dtype": "fp16"}, errors.DTypeError, "out_dtype is fp16: torch.float16 or torch.bfloat16"),
        ((Q, K, V), {"num_splits": 2}, errors.Fp8Error, "num_splits 2: this kernel does not split"),
        ((Q, K, V), {"family": "fa2"}, errors.Fp8Error, "e4m3 input on sm_90a: no kernel offers fp8 here"),
        ((Q, K, HALVES[2]), {}, errors.DTypeError, "v is bfloat16: q is float8_e4m3fn, k and v must be fp8, too"),
        ((Q, K.view(torch.uint8), V), {}, errors.DTypeError, r"k is uint8: .* tensor.view\(torch.float8_e4m3fn\)"),
        ((Q.view(torch.uint8), K, V), {}, errors.DTypeError, r"q is uint8: one of .* tensor.view"),
        ((HALVES[0], K, HALVES[2]), {}, errors.DTypeError, "k is float8_e4m3fn: q is bfloat16, k and v must be too"),
        ((HALVES[0], K, V), {}, errors.Fp8Error, "bf16ke4m3ve4m3 input on sm_90a: .*k and v in fp8 with q in 16 bits"),
        ((HALVES[0], K, V), {"q_descale": 2.0}, errors.Fp8Error, "q_descale with q in bfloat16: only fp8 codes"),
        (HALVES, {"k_descale": 2.0}, errors.Fp8Error, "k_descale with k in bfloat16: only fp8 codes have descales"),
        (
            HALVES,
            {"out_dtype": torch.float16},
            errors.UnsupportedKeyError,
            "out_dtype fp16: the output has the dtype of q",
        ),
    ],
)
def test_errors(nothing_runs, tensors, options, error, message):
    with pytest.raises(error, match=message) as caught:
        cute_fa.flash_attn_func(*tensors, causal=True, **options)
    assert type(caught.value) is error


def test_no_gradients(nothing_runs):
    for name in ("q", "k", "v"):
        given = {"q": Q, "k": K, "v": V}
        given[name] = given[name].clone().requires_grad_()
        with pytest.raises(errors.Fp8Error, match="q is float8_e4m3fn: attention in fp8 has no gradient"):
            cute_fa.flash_attn_func(**given)
    with pytest.raises(errors.Fp8Error, match="attention in fp8 has no gradient"):
        cute_fa.flash_attn_func(Q, K, V, k_descale=torch.ones(2, 2, requires_grad=True))


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_89", "sm_100a", "sm_120a"])
def test_other_architectures(nothing_runs, arch):
    with pytest.raises(errors.Fp8Error, match=f"e4m3 input on {arch}: no kernel offers fp8 here"):
        cute_fa.flash_attn_func(Q, K, V)


def test_requests_of_one_kind_each(nothing_runs):
    with pytest.raises(errors.Fp8Error, match="q, k and v in bf16, bf16, bf16: Fa3FwdFp8Request takes fp8 alone"):
        cute_fa.Fa3FwdFp8Request(*HALVES)
    offsets = cute_fa.CumulativeSeqlens((0, 70, 140)), cute_fa.CumulativeSeqlens((0, 130, 260))
    packed = [t.flatten(0, 1) for t in (Q, K, V)]
    for make in (
        lambda: cute_fa.Fa2FwdRequest(Q, K, V),
        lambda: cute_fa.Fa3FwdRequest(Q, K, V),
        lambda: cute_fa.VarlenFwdRequest(*packed, *offsets),
    ):
        with pytest.raises(errors.Fp8Error, match=r"q, k and v in e4m3, e4m3, e4m3: .*Fa3FwdFp8Request fp8"):
            make()
    with pytest.raises(errors.Fa3ArchError):
        cute_fa.Fa3FwdFp8Request(Q, K, V, arch=cute_fa.SmArch.SM_80)
