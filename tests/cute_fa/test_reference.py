"""The reference against torch's own attention, against loops, and against its own rules."""

import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from cute_fa.semantics import reference
from cute_fa.semantics.errors import ArgumentError
from cute_fa.semantics.types import DType
from cute_fa.tools.inputs import InputSpec, make_inputs


def by_loops(inputs, b, h, i):
    """O and LSE of one dense query, one key at a time, in float64; written from the formula alone."""
    spec = inputs.spec
    seqlen_q = spec.seqlen_q if inputs.seqused_q is None else int(inputs.seqused_q[b])
    seqlen_k = spec.seqlen_k if inputs.seqused_k is None else int(inputs.seqused_k[b])
    left, right = (None if w in (None, -1) else w for w in spec.window)
    if spec.causal:
        right = 0
    scale = spec.softmax_scale or 1 / math.sqrt(spec.head_dim)
    q, group = inputs.q[b, i, h].double(), h // (spec.heads // spec.heads_kv)
    weights, values = [], []
    for j in range(seqlen_k):
        diagonal = i + seqlen_k - seqlen_q
        if right is not None and j > diagonal + right:
            continue
        if left is not None and j < diagonal - left and j >= spec.sink_tokens:
            continue
        s = scale * float(q @ inputs.k[b, j, group].double())
        if spec.softcap:
            s = spec.softcap * math.tanh(s / spec.softcap)
        if inputs.alibi_slopes is not None:
            slopes = inputs.alibi_slopes
            s -= float(slopes[b, h] if slopes.dim() == 2 else slopes[h]) * abs(diagonal - j)
        weights.append(math.exp(s))
        values.append(inputs.v[b, j, group].double())
    total = sum(weights) + (math.exp(float(inputs.learnable_sink[h])) if inputs.learnable_sink is not None else 0.0)
    if i >= seqlen_q or total == 0.0:
        return torch.zeros(inputs.v.shape[-1], dtype=torch.float64), -math.inf
    out = sum((w * v for w, v in zip(weights, values, strict=True)), torch.zeros_like(inputs.v[0, 0, 0]).double())
    return out / total, math.log(total)


@pytest.mark.parametrize("kind", ["random", "peaked"])
@pytest.mark.parametrize(
    "spec",
    [
        InputSpec(seqlen_q=9, seqlen_k=14, causal=True, head_dim=16, heads=4),
        InputSpec(seqlen_q=14, seqlen_k=9, causal=True, head_dim=16, learnable_sink=True),
        InputSpec(seqlen_q=20, seqlen_k=20, window=(3, 2), sink_tokens=2, head_dim=16, heads=4, heads_kv=1, alibi=True),
        InputSpec(seqlen_q=11, seqlen_k=17, window=(4, -1), softcap=5.0, head_dim=8, head_dim_v=24),
        InputSpec(seqlen_q=11, seqlen_k=17, seqused_q=True, seqused_k=True, causal=True, head_dim=8, batch=3),
        InputSpec(seqlen_q=7, seqlen_k=9, alibi_per_batch=True, learnable_sink=True, softmax_scale=0.3, head_dim=8),
        InputSpec(seqlen_q=30, seqlen_k=30, causal=True, window=(2, None), sink_tokens=4, layout="padded", head_dim=8),
        InputSpec(seqlen_q=6, seqlen_k=9, layout="expanded", heads=6, heads_kv=3, head_dim=8),
    ],
    ids=lambda spec: "-".join(f"{k}={v}" for k, v in vars(spec).items() if v != getattr(InputSpec, k)),
)
def test_formula(spec, kind):
    inputs = make_inputs(spec, kind, seed=3)
    out, lse = reference.attention(inputs.q, inputs.k, inputs.v, **inputs.options(), dtype=torch.float64)
    for b in range(spec.batch):
        for h in range(spec.heads):
            for i in range(spec.seqlen_q):
                o, l = by_loops(inputs, b, h, i)
                torch.testing.assert_close(out[b, i, h], o, atol=1e-9, rtol=1e-9)
                assert lse[b, h, i].item() == pytest.approx(l, abs=1e-9)


def test_against_torch():
    inputs = make_inputs(InputSpec(seqlen_q=40, seqlen_k=40, heads=4, heads_kv=2, causal=True), seed=1)
    q, k, v = (t.float().transpose(1, 2) for t in (inputs.q, inputs.k, inputs.v))
    expected = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
    out, _ = reference.attention(inputs.q, inputs.k, inputs.v, causal=True)
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=1e-5)


def test_packed_and_paged_equal_dense():
    spec = {"batch": 4, "seqlen_q": 21, "seqlen_k": 33, "heads": 4, "causal": True, "window": (9, -1)}
    packed = make_inputs(InputSpec(**spec, varlen_q=True, varlen_k=True, seqused_q=True, seqused_k=True), seed=5)
    out, lse = reference.attention(packed.q, packed.k, packed.v, **packed.options())
    cu_q, cu_k = packed.cu_seqlens_q.tolist(), packed.cu_seqlens_k.tolist()
    for b in range(4):
        used_q, used_k = int(packed.seqused_q[b]), int(packed.seqused_k[b])
        rows, keys = slice(cu_q[b], cu_q[b] + used_q), slice(cu_k[b], cu_k[b] + used_k)
        one, one_lse = reference.attention(
            packed.q[None, rows], packed.k[None, keys], packed.v[None, keys], causal=True, window_size=(9, -1)
        )
        torch.testing.assert_close(out[rows], one[0])
        torch.testing.assert_close(lse[:, rows], one_lse[0])
        assert out[cu_q[b] + used_q : cu_q[b + 1]].eq(0).all()
        assert lse[:, cu_q[b] + used_q : cu_q[b + 1]].eq(-math.inf).all()

    paged = make_inputs(InputSpec(**spec, page_size=8), seed=5)
    out, lse = reference.attention(paged.q, paged.k, paged.v, **paged.options())
    for b in range(4):
        used = int(paged.seqused_k[b])
        pages = paged.page_table[b].long()
        k, v = (t[pages].flatten(0, 1)[None, :used] for t in (paged.k, paged.v))
        one, one_lse = reference.attention(paged.q[b : b + 1], k, v, causal=True, window_size=(9, -1))
        torch.testing.assert_close(out[b], one[0])
        torch.testing.assert_close(lse[b], one_lse[0])


def test_exact_is_computed_in_that_type():
    inputs = make_inputs(InputSpec(1, 20, 30, 2, 2, 64, learnable_sink=True, alibi=True))
    tensors, options = (inputs.q, inputs.k, inputs.v), inputs.options()
    dout, single = torch.ones(1, 20, 2, 64), reference.expected(*tensors, **options)
    double = reference.expected(*tensors, exact=torch.float64, **options)
    right, lse = reference.attention(*tensors, dtype=torch.float64, **options)
    assert torch.equal(double.out, right) and torch.equal(double.lse, lse) and double.out.dtype == torch.float64
    assert 0.0 < (single.out - double.out).abs().max() < 1e-5
    assert double.out_allowed == pytest.approx(single.out_allowed, rel=1e-3) and double.out_allowed > 0.0
    gradients = reference.expected_gradients(*tensors, dout, exact=torch.float64, **options)
    for ours, theirs in zip(gradients.gradients, reference.gradients(*tensors, dout, **options), strict=True):
        assert ours.dtype == torch.float64 and 0.0 < (ours - theirs).abs().max() < 1e-4


def test_long_rows_in_pieces(monkeypatch):
    inputs = make_inputs(InputSpec(seqlen_q=50, seqlen_k=70, causal=True, alibi=True), seed=2)
    whole = reference.attention(inputs.q, inputs.k, inputs.v, **inputs.options())
    monkeypatch.setattr(reference, "_MAX_SCORES", 7 * 2 * 70)
    pieces = reference.attention(inputs.q, inputs.k, inputs.v, **inputs.options())
    torch.testing.assert_close(pieces, whole)


def test_rows_without_keys():
    inputs = make_inputs(InputSpec(seqlen_q=8, seqlen_k=3, causal=True, learnable_sink=True), seed=0)
    out, lse = reference.attention(inputs.q, inputs.k, inputs.v, **inputs.options())
    assert out[:, :5].eq(0).all()
    torch.testing.assert_close(lse[:, :, :5], inputs.learnable_sink[None, :, None].expand(2, -1, 5))
    out, lse = reference.attention(inputs.q, inputs.k, inputs.v, causal=True)
    assert out[:, :5].eq(0).all()
    assert lse[:, :, :5].eq(-math.inf).all()
    assert lse[:, :, 5:].isfinite().all()


def test_tolerance_accepts_rounding_and_no_more():
    inputs = make_inputs(InputSpec(seqlen_q=64, seqlen_k=64, causal=True), "peaked", seed=4)
    expected = reference.expected(inputs.q, inputs.k, inputs.v, causal=True)
    rounded = expected.out.to(torch.bfloat16)
    assert expected.check(rounded, expected.lse).ok
    assert expected.out_allowed < 0.05

    too_much = reference.attention(inputs.q, inputs.k, inputs.v, window_size=(-1, 1))[0]
    assert expected.check(too_much, expected.lse).out_error > 0.5
    assert not expected.check(rounded, expected.lse + 2e-3).ok
    assert not expected.check(rounded, expected.lse.masked_fill(expected.lse > 3.0, -math.inf)).ok
    broken = rounded.clone()
    broken[0, 0, 0, 0] = math.nan
    assert expected.check(broken, expected.lse).out_error == math.inf
    assert not expected.check(rounded[:1], expected.lse).ok
    assert reference.check(rounded, None, inputs.q, inputs.k, inputs.v, causal=True).ok


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ({"causal": True}, {"window_size": (-1, 1)}),
        ({"window_size": (8, -1)}, {"window_size": (9, -1)}),
        ({"window_size": (8, -1)}, {"window_size": (7, -1)}),
        ({"window_size": (8, 0), "sink_tokens": 4}, {"window_size": (8, 0), "sink_tokens": 5}),
        ({"window_size": (8, 0), "sink_tokens": 4}, {"window_size": (8, 0), "sink_tokens": 3}),
    ],
)
def test_peaked_inputs_show_one_wrong_key(right, wrong):
    spec = InputSpec(
        seqlen_q=80,
        seqlen_k=96,
        causal=right.get("causal", False),
        window=right.get("window_size", (None, None)),
        sink_tokens=right.get("sink_tokens", 0),
    )
    inputs = make_inputs(spec, "peaked", seed=7)
    a, _ = reference.attention(inputs.q, inputs.k, inputs.v, **right)
    b, _ = reference.attention(inputs.q, inputs.k, inputs.v, **wrong)
    assert (a - b).abs().max() > 0.9


@pytest.mark.parametrize("layout", ["contiguous", "padded", "transposed", "expanded"])
def test_layouts_change_memory_and_not_values(layout):
    plain = make_inputs(InputSpec(heads=4, heads_kv=1 if layout == "expanded" else 4), seed=9)
    other = make_inputs(InputSpec(heads=4, heads_kv=4, layout=layout), seed=9)
    for name in ("q", "k", "v"):
        a, b = getattr(plain, name), getattr(other, name)
        assert b.eq(a.expand_as(b)).all()
    strides = {t.stride() for t in (other.q, other.k, other.v)}
    assert (other.k.stride(2) == 0) == (layout == "expanded")
    assert (len(strides) > 1) == (layout != "contiguous")


def test_poison_and_shapes():
    spec = InputSpec(batch=4, varlen_q=True, varlen_k=True, seqused_q=True, seqused_k=True, dtype=DType.FP16)
    inputs = make_inputs(spec, seed=11)
    assert inputs.q.dtype is torch.float16
    assert inputs.seqused_k.tolist()[:3] == [64, 41, 0]
    for tensor, cu, used in (
        (inputs.q, inputs.cu_seqlens_q, inputs.seqused_q),
        (inputs.k, inputs.cu_seqlens_k, inputs.seqused_k),
    ):
        row = torch.arange(tensor.shape[0])
        sequence = torch.searchsorted(cu[1:], row, right=True)
        counts = row - cu[sequence] < used[sequence]
        assert not counts.all()
        assert tensor[counts].isfinite().all()
        assert tensor[~counts].isnan().all()
    paged = make_inputs(InputSpec(batch=3, page_size=16), seed=1)
    assert paged.page_table.shape == (3, 4)
    assert paged.k.isnan().any(dim=(1, 2, 3)).sum() >= 2
    again = make_inputs(spec, seed=11)
    assert again.q.nan_to_num().eq(inputs.q.nan_to_num()).all()
    assert not make_inputs(spec, seed=12).q[:10].eq(inputs.q[:10]).all()


def test_bad_specs():
    with pytest.raises(ArgumentError, match="random or peaked"):
        make_inputs(InputSpec(), "white")
    with pytest.raises(ArgumentError, match="layout='blocked'"):
        InputSpec(layout="blocked")
    with pytest.raises(ArgumentError, match=r"lengths=\(65, 1\)"):
        make_inputs(InputSpec(varlen_q=True, lengths_q=(65, 1)))
    with pytest.raises(ArgumentError, match="heads=3, heads_kv=2"):
        make_inputs(InputSpec(heads=3, heads_kv=2))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_tolerance_is_that_of_rounded_probabilities(dtype):
    """A kernel that rounds its exponentials to e4m3 passes; one that also rounds the scores does not."""
    rng = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(1, 64, 2, 64, generator=rng).to(dtype) for _ in range(3))
    wanted = reference.expected(q, k, v)
    assert wanted.out_allowed < 0.2 * wanted.out.abs().max()
    scores = torch.einsum("bqhd,bkhd->bhqk", q.float(), k.float()) / 8

    def result(scores):
        p = torch.exp(scores - scores.amax(-1, keepdim=True)) * 2**8
        rounded = p.to(torch.float8_e4m3fn).float()
        return (torch.einsum("bhqk,bkhd->bqhd", rounded, v.float()) / p.sum(-1).transpose(1, 2)[..., None]).bfloat16()

    assert wanted.check(result(scores)).ok
    assert not wanted.check(result(scores.to(torch.float8_e5m2).float())).ok
