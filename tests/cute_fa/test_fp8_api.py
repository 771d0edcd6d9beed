"""fp8 through the public functions: descales of every kind, output dtypes, operators, requests, errors."""

import math
from dataclasses import replace

import pytest
import torch
from torch import library

import cute_fa
from cute_fa import compat, errors
from cute_fa.engine import plan as plans
from cute_fa.semantics import reference
from cute_fa.semantics.call import Call
from cute_fa.semantics.types import DType
from cute_fa.tools.inputs import InputSpec, make_inputs
from fa3_sm90.forward.entry import Fa3Forward
from fa4_sm100.forward.entry import Fa4Forward

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


def test_how_often_sums_are_promoted():
    """A choice of how, not what: after each wgmma the blocks have 32 keys."""
    out, lse = run(**DESCALES, promote_every=1)
    assert reference.check(out, lse, Q, K, V, causal=True, **DESCALES).ok
    problem = cute_fa.DispatchKey(cute_fa.SmArch.SM_90A, DType.E4M3, 64).problem()
    for every, keys in ((None, 128), (1, 32), (2, 64), (5, 160)):
        config = Fa3Forward.configure(replace(problem, promote_every=every))
        assert config.tile_n == keys and config.promote_every == keys // 32


def test_blackwell_keeps_sums_in_fp32():
    """Whatever is asked for: the same kernel."""
    problem = cute_fa.DispatchKey(cute_fa.SmArch.SM_100A, DType.E4M3, 64).problem()
    asked = [replace(problem, promote_every=every) for every in (None, 1, 6)]
    assert {cute_fa.TABLE.lookup(problem) for problem in asked} == {Fa4Forward}
    assert len({Fa4Forward.configure(problem) for problem in asked}) == 1


@pytest.mark.sampled
@pytest.mark.parametrize(("arch", "family"), [("sm_90a", "fa3"), ("sm_100a", "fa4"), ("sm_103a", "fa4")])
def test_every_function(arch, family):
    options = {"causal": True, **DESCALES}
    wanted = cute_fa.flash_attn_func(Q, K, V, **options)
    assert torch.equal(compat.fa3.flash_attn_func(Q, K, V, None, True, None, *DESCALES.values()), wanted)
    offsets = [torch.arange(3, dtype=torch.int32) * rows for rows in (70, 130)]
    packed = cute_fa.flash_attn_varlen_func(*(t.flatten(0, 1) for t in (Q, K, V)), *offsets, 70, 130, **options)
    assert torch.equal(packed.view(wanted.shape), wanted)
    assert torch.equal(cute_fa.flash_attn_with_kvcache(Q, K, V, num_splits=1, **options), wanted)
    cached = cute_fa.flash_attn_with_kvcache(Q, K, V, return_lse=True, **options)  # by the kernel for decoding
    assert reference.check(*cached, Q, K, V, **options).ok and not torch.equal(cached[0], wanted)
    request = cute_fa.Fa3FwdFp8Request(Q, K, V, mask=cute_fa.MaskKind.CAUSAL, **DESCALES)
    assert torch.equal(request.run()[0], wanted)
    assert request.kernel_name() == f"{family}_fwd_{arch.replace('_', '')}_e4m3_hd64_causal_gqa2"
    assert request.dispatch_key().dtype is DType.E4M3 and request.dispatch_key().out_dtype is DType.BF16
    assert (request.reference()[0] - wanted).abs().max() < 0.1


@pytest.mark.sampled
@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
def test_pages(arch):
    descales = {name: getattr(PAGED, name) for name in DESCALES}
    lengths = {"page_table": PAGED.page_table, "seqused_k": PAGED.seqused_k}
    out, lse = PAGED.run(return_lse=True)
    assert reference.check(out, lse, PAGED.q, PAGED.k, PAGED.v, causal=True, **lengths, **descales).ok
    cache = {"cache_seqlens": PAGED.seqused_k, "page_table": PAGED.page_table, "causal": True, **descales}
    assert torch.equal(cute_fa.flash_attn_with_kvcache(PAGED.q, PAGED.k, PAGED.v, num_splits=1, **cache), out)
    decoded = cute_fa.flash_attn_with_kvcache(PAGED.q, PAGED.k, PAGED.v, return_lse=True, **cache)
    assert reference.check(*decoded, PAGED.q, PAGED.k, PAGED.v, causal=True, **lengths, **descales).ok
    request = cute_fa.PagedAttentionRequest(
        PAGED.q,
        cute_fa.PagedKvCache(PAGED.k, PAGED.v),
        PAGED.page_table,
        PAGED.seqused_k,
        mask=cute_fa.MaskKind.CAUSAL,
        **descales,
    )
    assert torch.equal(request.run()[0], decoded[0])
    assert torch.equal(replace(request, num_splits=1).run()[0], out)


def test_operator():
    # test_schema multiplies the inputs, which torch does not do in fp8 on the CPU.
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    call = Call.made(Q, K, V, window_right=0, **DESCALES)
    library.opcheck(torch.ops.cute_fa.attention.default, call.flat(), test_utils=checks)
    out = torch.empty(Q.shape, dtype=torch.bfloat16)
    library.opcheck(torch.ops.cute_fa.attention_out.default, (*call.flat(), out), test_utils=checks)


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
        (
            (Q, K, V),
            {"num_splits": 2, "promote_every": 2},
            errors.UnsupportedKeyError,
            r"num_splits 2: this kernel does not split[\s\S]*promote_every 2: this kernel's products are of fp16",
        ),
        (
            (Q, K, V),
            {"promote_every": 6},
            errors.UnsupportedKeyError,
            "promote_every 6: 1 to 5, of blocks of up to 160 keys",
        ),
        ((Q, K, V), {"promote_every": 0}, errors.ArgumentError, "promote_every=0: at least 1"),
        (HALVES, {"promote_every": 2}, errors.UnsupportedKeyError, "promote_every 2 with q in bf16: of fp8 alone"),
        (
            (Q, K[:, :128], V[:, :128].permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)),
            {"family": "fa2", "v_layout": "key_major"},
            errors.Fp8Error,
            "e4m3 input on sm_90a: no kernel serves it in 8 bits.*fa2_split: v_layout key_major: this kernel reads V",
        ),
        ((Q, K, HALVES[2]), {}, errors.DTypeError, "v is bfloat16: q is float8_e4m3fn, k and v must be fp8, too"),
        ((Q, K, V.view(torch.int8)), {}, errors.DTypeError, "v is int8: q is float8_e4m3fn, k and v must be fp8, too"),
        ((HALVES[0], V.view(torch.int8), HALVES[2]), {}, errors.DTypeError, "k is int8: q is bfloat16, .* or both fp8"),
        ((Q.view(torch.int8), K, V), {}, errors.DTypeError, "q is int8: one of float16, bfloat16, .*e5m2 is needed"),
        ((Q, K.view(torch.uint8), V), {}, errors.DTypeError, r"k is uint8: .* tensor.view\(torch.float8_e4m3fn\)"),
        ((Q.view(torch.uint8), K, V), {}, errors.DTypeError, r"q is uint8: one of .* tensor.view"),
        ((HALVES[0], K, HALVES[2]), {}, errors.DTypeError, "k is float8_e4m3fn: q is bfloat16, k and v must be too"),
        ((HALVES[0], K, V), {"q_descale": 2.0}, errors.Fp8Error, "q_descale with q in bfloat16: only fp8 and int8"),
        (
            HALVES,
            {"k_descale": 2.0},
            errors.Fp8Error,
            "k_descale with k in bfloat16: only fp8 and int8 codes have descales",
        ),
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
        with pytest.raises(errors.Fp8Error, match=f"^{name} requires a gradient: attention with fp8 or int8 has none"):
            cute_fa.flash_attn_func(**given)
    with pytest.raises(errors.Fp8Error, match=r"^k_descale requires a gradient: attention with fp8 or int8 has none"):
        cute_fa.flash_attn_func(Q, K, V, k_descale=torch.ones(2, 2, requires_grad=True))


@pytest.mark.sampled
@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_89", "sm_120a"])
def test_other_architectures(arch):
    """By FA2's kernel that widens codes, what is of fp8 products alone refused."""
    for options in ({}, {"num_splits": 3, "out_dtype": torch.float16}):
        assert reference.check(*run(**DESCALES, **options), Q, K, V, causal=True, **DESCALES).ok
    with pytest.raises(errors.UnsupportedKeyError, match="promote_every 2: this kernel's products are of fp16"):
        run(promote_every=2)
    blocks = {"k_descale": torch.ones(2, 2, 2)}
    with pytest.raises(errors.Fp8Error, match=f"e4m3 input on {arch}: .*fa2_split: descales of blocks of keys"):
        run(**blocks)


@pytest.mark.parametrize(
    ("arch", "prompt", "few"),
    [
        ("sm_80", "Fa2Split", "Fa2Split"),
        ("sm_90a", "Fa3Forward", "Fa3Decode"),
        ("sm_100a", "Fa4Forward", "Fa2Split"),
    ],
)
def test_by_which_kernel(arch, prompt, few):
    """As in 16 bits: that of the decoding up to 128 tokens where splits are left open, unless something is asked that
    it does not serve; elsewhere that of fp8 products."""
    problem = replace(cute_fa.DispatchKey(cute_fa.SmArch(arch), DType.E4M3, 64).problem(), seqlen_k=5000)
    for tokens, splits, kernel in ((1, 0, few), (128, 0, few), (129, 0, prompt), (1, 1, prompt), (1, 2, few)):
        chosen, found = cute_fa.TABLE.choose(
            replace(problem, seqlen_q=tokens, num_splits=splits or 1), None, 132, splits
        )
        assert found.__name__ == kernel, tokens
        assert chosen.num_splits == (0 if not splits and tokens <= 128 else splits or 1)
    if prompt != few:
        blocks = replace(problem, k_descale=True, k_block_descale=True)
        assert cute_fa.TABLE.choose(blocks, None, 132, 0)[1].__name__ == prompt


def test_requests_of_one_kind_each(nothing_runs):
    with pytest.raises(errors.Fp8Error, match="q, k and v in bf16, bf16, bf16: Fa3FwdFp8Request takes fp8 alone"):
        cute_fa.Fa3FwdFp8Request(*HALVES)
    with pytest.raises(errors.Fp8Error, match="q, k and v in bf16, e4m3, e4m3: Fa3FwdFp8Request takes fp8 alone"):
        cute_fa.Fa3FwdFp8Request(HALVES[0], K, V)
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


class Cache:
    """A paged cache in fp8 with descales, and the values that its tokens should have."""

    def __init__(self, batch: int, pages: int, heads_kv: int, head_dim: int):
        rng = torch.Generator().manual_seed(5)
        shape = (batch * pages, 16, heads_kv, head_dim)
        self.k, self.v = (torch.full(shape, 0x7F, dtype=torch.uint8).view(E4M3) for _ in range(2))  # NaN
        self.table = torch.randperm(batch * pages, generator=rng).int().view(batch, pages)
        self.k_descale, self.v_descale = (0.02 + 0.02 * torch.rand(batch, heads_kv, generator=rng) for _ in range(2))
        self.lengths = torch.zeros(batch, dtype=torch.int32)
        self.values = [torch.zeros(batch, 0, heads_kv, head_dim) for _ in range(2)]

    @property
    def descales(self) -> dict[str, torch.Tensor]:
        return {"k_descale": self.k_descale, "v_descale": self.v_descale}

    def append(self, k: torch.Tensor, v: torch.Tensor):
        """What tokens behind those in the cache become."""
        for i, (new, descale) in enumerate(((k, self.k_descale), (v, self.v_descale))):
            descale = descale[:, None, :, None]
            codes = (new.float() / descale).clamp(-448, 448).to(E4M3)
            self.values[i] = torch.cat([self.values[i], codes.float() * descale], 1)

    def expected(self, q: torch.Tensor, q_descale: torch.Tensor):
        """O and LSE in fp64 of the last queries, causal."""
        values = self.values[0].to(torch.float64), self.values[1].to(torch.float64)
        heads = q.shape[2] // q_descale.shape[1]
        q = q.double() * q_descale.repeat_interleave(heads, 1)[:, None, :, None]
        return reference.attention(q, *values, causal=True, dtype=torch.float64)


def test_serving():
    """16-bit rows appended, decoding with new rows as values and as codes, a chunk of a prefill, all on one cache."""
    rng = torch.Generator().manual_seed(9)
    cache = Cache(2, 8, 2, 64)

    def rows(tokens: int, heads: int) -> torch.Tensor:
        return torch.randn(2, tokens, heads, 64, generator=rng).bfloat16()

    k, v = rows(61, 2), rows(61, 2)
    _, lengths = cute_fa.append_kv(k, v, cache.k, cache.v, cache.lengths, page_table=cache.table, **cache.descales)
    cache.append(k, v)
    for tokens, as_codes in ((1, False), (1, True), (17, False), (3, True)):
        q, q_descale = cute_fa.fp8.quantize_per_head(rows(tokens, 4), heads_kv=2)
        k, v = rows(tokens, 2), rows(tokens, 2)
        cache.append(k, v)
        if as_codes:
            k, v = (cute_fa.fp8.quantize(t, d) for t, d in zip((k, v), cache.descales.values(), strict=True))
        out, lse = cute_fa.flash_attn_with_kvcache(
            *(q, cache.k, cache.v, k, v),
            cache_seqlens=lengths,
            page_table=cache.table,
            causal=True,
            q_descale=q_descale,
            **cache.descales,
            return_lse=True,
        )
        lengths = lengths + tokens
        exact, exact_lse = cache.expected(q, q_descale)
        assert (out - exact).abs().max() < 0.03 * exact.abs().max(), tokens
        assert (lse - exact_lse).abs().max() < 1e-3
    assert lengths.tolist() == [83, 83]


def test_caches_without_descales_hold_values_themselves():
    cache = Cache(1, 2, 1, 64)
    k, v = (torch.randn(1, 5, 1, 64).bfloat16() for _ in range(2))
    q = torch.randn(1, 5, 1, 64).to(E4M3)
    cute_fa.flash_attn_with_kvcache(
        q, cache.k, cache.v, k, v, cache_seqlens=cache.lengths[:1], page_table=cache.table, causal=True
    )
    written = cache.k[cache.table[0, 0], :5]
    assert torch.equal(written.view(torch.uint8), k[0].to(E4M3).view(torch.uint8))


def test_rotation_of_codes_is_refused():
    cache, angles = Cache(1, 2, 1, 64), torch.ones(32, 32)
    rows = torch.zeros(1, 1, 1, 64)
    for k, name in ((rows.to(E4M3), "k"), (rows.bfloat16(), "q")):
        with pytest.raises(errors.Fp8Error, match=f"rotary_cos with {name} in e4m3: rows in fp16 or bf16 rotate"):
            cute_fa.flash_attn_with_kvcache(
                *(rows.to(E4M3), cache.k, cache.v, k, k),
                cache_seqlens=cache.lengths[:1],
                page_table=cache.table,
                rotary_cos=angles,
                rotary_sin=angles,
            )
