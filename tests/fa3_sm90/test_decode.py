"""The Hopper decode, simulated, against the fp32 reference: features in pairs, shares of CTAs, pages, what is read."""

import dataclasses

import pytest
import torch

import cute_fa
from cute_fa.device import softmax
from cute_fa.device.registers import placed_fma
from cute_fa.engine import attention as engine
from cute_fa.engine import plan as plans
from cute_fa.engine.table import DispatchTable, Entry
from cute_fa.semantics.reference import expected
from cute_fa.semantics.types import Direction, DType, SmArch
from cute_fa.tools.inputs import InputSpec, make_inputs
from fa3_sm90.decode.config import Fa3DecodeConfig
from fa3_sm90.decode.entry import Fa3Decode
from tests.testing.cases import FA2_FEATURES, fa2_cases, small_problem, spec_name, spec_of
from tests.testing.simulated import unwritten_is_nan

DECODE = Entry("fa3_decode", "fa3", Direction.FORWARD, (SmArch.SM_90A,), "fa3_sm90.decode.entry:Fa3Decode")
ONLY_DECODE = DispatchTable((DECODE,))


FEATURES = {
    **FA2_FEATURES,
    "lengths": [
        {},
        {"seqused_k": True},
        {"varlen_q": True, "varlen_k": True},
        {"seqused_k": True, "tree": True},
        {"varlen_q": True, "page_size": 32, "tree": True},
        {"seqused_q": True, "page_size": 8},
        {"varlen_q": True, "page_size": 64},
        {"varlen_q": True, "seqused_q": True, "page_size": 16},
    ],
    "heads": [(2, 2), (8, 2), (3, 1)],
    "layout": ["contiguous", "padded", "transposed", "expanded"],
    # tiles of 64 and 128 rows, of one row and of many, and tiles that end inside a query's group of heads
    "seqlens": [(1, 300), (5, 211), (40, 77), (90, 150)],
    # evenly between so many SMs, or in parts
    "cut": [(0, 1), (0, 3), (0, 8), (0, 132), (1, 132), (3, 132)],
    "inputs": ["random", "peaked"],
    "schedule": [{}, {"late": True, "schedule_seed": 1}, {"late": True, "schedule_seed": 2}],
}


def case_name(case: dict) -> str:
    return f"{spec_name(spec_of(case))}-{case['cut']}-{case['inputs']}"


@pytest.fixture(autouse=True)
def only_decode(monkeypatch):
    """Problems that other kernels are preferred for, too."""
    monkeypatch.setattr(engine, "TABLE", ONLY_DECODE)
    plans.PLANS.clear()
    yield
    plans.PLANS.clear()


def run(spec: InputSpec, inputs: str = "random", splits: int = 0, num_sms: int = 132, **simulation):
    """(out, lse, simulation) of one call, after comparison with the reference."""
    given = make_inputs(spec, inputs)
    with cute_fa.simulate("sm_90a", num_sms=num_sms, **simulation) as simulated, unwritten_is_nan():
        out, lse = engine.attention(given.call(num_splits=splits))
    result = expected(given.q, given.k, given.v, **given.options()).check(out, lse)
    assert result.ok, result
    return out, lse, simulated


@pytest.mark.parametrize("case", fa2_cases(FEATURES), ids=case_name)
def test_features_in_pairs(case):
    run(spec_of(case), case["inputs"], *case["cut"], race=True, **case["schedule"])


@pytest.mark.parametrize("page_size", [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024])
def test_page_sizes(page_size):
    """Pages shorter than, as long as, and longer than a block of 64 keys; unlisted pages and unused slots are NaN."""
    run(InputSpec(2, 2, 300, 4, 2, 64, page_size=page_size, causal=True), "peaked", num_sms=5)


ROWS = [
    {"page_size": 1, "head_dim": 128},
    {"page_size": 2, "head_dim": 256, "seqlen_q": 40},
    {"page_size": 4, "head_dim": 8, "head_dim_v": 72, "varlen_q": True},
    {"page_size": 16, "head_dim": 72, "head_dim_v": 192, "cache_leftpad": True},
    {"page_size": 1, "head_dim": 128, "dtype_k": DType.E4M3, "dtype_v": DType.E5M2},
    {"page_size": 64, "head_dim": 80, "cache_leftpad": True, "dtype_k": DType.E4M3, "dtype_v": DType.E4M3},
]


@pytest.mark.parametrize("changes", ROWS, ids=str)
@pytest.mark.parametrize(
    "simulation", [{}, {"late": True, "schedule_seed": 1}, {"late": True, "schedule_seed": 2}], ids=str
)
def test_keys_by_rows(changes, simulation):
    """From pages that TMA cannot cut blocks from."""
    spec = dataclasses.replace(InputSpec(3, 2, 300, 4, 2, 64, causal=True), **changes)
    run(spec, "peaked", num_sms=7, race=True, **simulation)


@pytest.mark.parametrize("num_sms", [1, 2, 5, 132])
def test_a_sequence_without_keys(num_sms):
    spec = InputSpec(2, 1, 330, 4, 1, 64, page_size=16, lengths_k=(330, 0), learnable_sink=True)
    out, lse, _ = run(spec, "peaked", num_sms=num_sms)
    sink = make_inputs(spec, "peaked").learnable_sink
    assert (out[1] == 0).all() and torch.allclose(lse[1, :, 0], sink, atol=1e-6)
    spec = dataclasses.replace(spec, learnable_sink=False)
    out, lse, _ = run(spec, "peaked", num_sms=num_sms)
    assert (out[1] == 0).all() and (lse[1] == -torch.inf).all()


@pytest.mark.parametrize("splits", [1, 2, 5, 6, 300])
def test_parts_without_keys(splits):
    """More parts than a sequence has blocks."""
    run(InputSpec(2, 1, 330, 4, 1, 64, page_size=16, lengths_k=(330, 0), learnable_sink=True), "peaked", splits)


@pytest.mark.parametrize("seqlen_q", [4, 33, 64, 128])
def test_trees(seqlen_q):
    """Drafts of one block of keys, of several, and as many as there may be; more than one word of each row."""
    run(InputSpec(2, seqlen_q, 300, 6, 2, 64, tree=True, seqused_k=True), "peaked", num_sms=6, race=True)


@pytest.mark.parametrize("codes", ["e4m3", "e5m2"])
@pytest.mark.parametrize("dtype", [DType.BF16, DType.FP16])
@pytest.mark.parametrize(
    "sizes",
    [
        {"seqlen_q": 1, "head_dim": 128, "page_size": 16},
        {"seqlen_q": 40, "head_dim": 64, "causal": True, "softcap": 15.0},
        {"seqlen_q": 9, "head_dim": 256, "window": (100, 0), "sink_tokens": 3, "learnable_sink": True},
        {"seqlen_q": 3, "head_dim": 80, "head_dim_v": 48, "alibi": True, "varlen_q": True, "page_size": 64},
    ],
    ids=str,
)
def test_fp8_caches(codes, dtype, sizes):
    spec = InputSpec(
        2, seqlen_k=500, heads=8, heads_kv=2, dtype=dtype, dtype_k=DType(codes), dtype_v=DType(codes), **sizes
    )
    for simulation in ({"race": True}, {"late": True, "schedule_seed": 1}):
        run(spec, "peaked", num_sms=8, **simulation)


def test_same_bits_under_every_schedule():
    spec = InputSpec(2, 3, 300, 4, 2, 64, causal=True, page_size=16)
    first, first_lse, _ = run(spec)
    for seed in range(2):
        out, lse, _ = run(spec, schedule_seed=seed, late=True)
        assert torch.equal(out, first) and torch.equal(lse, first_lse)


def test_every_pair_of_head_dims_fits_shared_memory():
    for head_dim in range(8, 257, 8):
        for head_dim_v in range(8, 257, 8):
            for seqlen_q in (1, 17, 100):
                sizes = {"head_dim": head_dim, "head_dim_v": head_dim_v, "seqlen_q": seqlen_q}
                config = Fa3Decode.configure(small_problem(SmArch.SM_90A, num_heads_kv=1, **sizes))
                assert config.smem_bytes <= config.arch.smem_bytes and config.stages >= 2


class FusedConfig(Fa3DecodeConfig):
    """A class of its own, by which the caches tell its kernels from the others."""


def test_scores_beyond_the_digits_of_fp32(monkeypatch):
    """From 2^28 on 8 is no digit of a score in log2 units. ptxas makes an fma of what the simulator rounds twice; that
    says for ever that the row has outgrown its reference."""
    configure = Fa3Decode.configure

    def fused(problem):
        config = configure(problem)
        return FusedConfig(**{field.name: getattr(config, field.name) for field in dataclasses.fields(config)})

    def beyond(maximum, scale, running, exponents):
        return placed_fma(maximum, scale, -running) > exponents.limit

    monkeypatch.setattr(Fa3Decode, "configure", fused)
    monkeypatch.setattr(softmax, "_beyond", beyond)
    given = make_inputs(InputSpec(2, 1, 300, 4, 2, 64), "random")
    given = dataclasses.replace(given, q=given.q * 1e8, k=given.k * 10)
    with cute_fa.simulate("sm_90a", num_sms=2):
        out, lse = engine.attention(given.call(num_splits=0))
    keys, values = (t.repeat_interleave(2, 2) for t in (given.k, given.v))
    scores = torch.einsum("bqhd,bkhd->bhqk", given.q.double(), keys.double()) / 8.0
    largest, best = scores.max(-1)
    assert largest.min() > 2.0**28
    torch.testing.assert_close(lse.double(), largest, rtol=1e-6, atol=0.0)
    index = best.transpose(1, 2)[..., None].expand(-1, -1, -1, 64)
    torch.testing.assert_close(out, values.gather(1, index), rtol=0.0, atol=0.0)
