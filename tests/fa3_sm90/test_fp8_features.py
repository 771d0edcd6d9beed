"""The FA3 forward in fp8, simulated, against the fp32 reference: types, head_dims, masks, scores and layouts in pairs,
pages, what lies outside the lengths."""

import dataclasses

import pytest
import torch

from cute_fa.semantics.problem import LiteralWindow
from cute_fa.semantics.reference import expected
from cute_fa.semantics.types import DType, SmArch
from cute_fa.tools.inputs import Inputs, InputSpec, make_inputs
from cute_fa.tools.trial import problem_of_spec
from fa3_sm90.forward.config import Fa3ForwardConfig
from fa3_sm90.forward.entry import Fa3Forward
from tests.testing.cases import spec_name, spec_of
from tests.testing.grid import in_turns, pairwise
from tests.testing.loads import recorded_loads
from tests.testing.simulated import call

E4M3, E5M2 = DType.E4M3, DType.E5M2
# As many levels as shape the code or the control flow differently; some stand for several values, taken in turns.
DTYPES = {
    "e4m3": [(E4M3, E4M3, E4M3)],
    "e5m2": [(E5M2, E5M2, E5M2)],
    "mixed": [(E4M3, E5M2, E4M3), (E5M2, E4M3, E4M3), (E4M3, E4M3, E5M2), (E5M2, E4M3, E5M2)],
}
HEAD_DIMS = {
    "narrow": [(64, None), (48, None), (16, 112), (80, None), (128, 16), (112, None), (32, 96)],
    "128": [(128, None)],
    "256": [(256, None)],
    "wide": [(192, 128), (64, 256), (176, 208), (160, None), (256, 64), (240, 176), (144, 224), (208, 144), (48, 240)],
}
MASKS = {
    "none": [{}],
    "causal": [{"causal": True}],
    "window": [
        {"window": (137, 11)},
        {"window": LiteralWindow(None, -5)},
        {"window": LiteralWindow(-20, 90)},
        {"window": (0, None)},
        {"window": LiteralWindow(-4, None)},
    ],
    "sink": [
        {"window": (60, 0), "sink_tokens": 5},
        {"window": LiteralWindow(-12, 60), "sink_tokens": 30},
        {"window": (70, None), "sink_tokens": 90},
    ],
}
LENGTHS = {
    "dense": [{}],
    "packed": [
        {"varlen_q": True, "varlen_k": True},
        {"varlen_q": True, "varlen_k": True, "seqused_q": True, "seqused_k": True},
        {"varlen_k": True},
    ],
    "used": [
        {"seqused_q": True, "seqused_k": True},
        {"cache_leftpad": True},
        {"varlen_q": True, "seqused_k": True},
        {"cache_batch_idx": True, "cache_leftpad": True},
    ],
    "paged": [
        {"varlen_q": True, "page_size": 16},
        {"page_size": 8},
        {"cache_batch_idx": True, "page_size": 64},
        {"seqused_q": True, "page_size": 32},
        {"page_size": 128},
        {"varlen_q": True, "seqused_q": True, "page_size": 256},
    ],
}
FEATURES = {
    "dtypes": list(DTYPES),
    "out_dtype": [torch.bfloat16, torch.float16],
    "head_dims": list(HEAD_DIMS),
    "mask": list(MASKS),
    "alibi": [{}, {"alibi": True}, {"alibi_per_batch": True}],
    "softcap": [0.0, 15.0],
    "learnable_sink": [False, True],
    "lengths": list(LENGTHS),
    "heads": [(2, 2), (2, 1), (3, 1)],
    "pack_gqa": [None, False, True],
    "ctas": [("off", 132), ("on", 2), ("on", 1)],
    "layout": ["padded", "transposed", "expanded"],
    "seqlens": [(70, 301), (200, 77), (1, 150)],
    "descales": [True, True, False],
    "inputs": ["peaked", "random"],
    "schedule": [
        {"late": True, "schedule_seed": 1},
        {"late": True, "schedule_seed": 2, "race": True},
        {"schedule_seed": 3, "race": True},
    ],
}


def cases() -> list[dict]:
    """Pairs of the levels, each level that stands for several values having its next one."""
    turns = {"dtypes": DTYPES, "head_dims": HEAD_DIMS, "mask": MASKS, "lengths": LENGTHS}
    return in_turns(pairwise(FEATURES, seed=1), **turns)


def spec_of_case(case: dict, scale: int = 1) -> InputSpec:
    """``scale``: factor of the lengths and of the window."""
    dtype, dtype_k, dtype_v = case["dtypes"]
    spec = spec_of(case | {"dtype": dtype}, scale)
    return dataclasses.replace(spec, dtype_k=dtype_k, dtype_v=dtype_v, descales=case["descales"])


def case_name(case: dict) -> str:
    return f"{spec_name(spec_of_case(case))}-pack={case['pack_gqa']}-{case['ctas']}-{case['inputs']}"


SIMULATION = ("num_sms", "late", "schedule_seed", "race", "fp8_bits")


def launch(given: Inputs, **options):
    """(out, lse) of one call; ``options``: those of the simulation and of the public function."""
    simulation = {name: options.pop(name) for name in SIMULATION if name in options}
    if given.spec.is_cache:
        options.pop("persistent", None)  # the function for caches takes none
    out, lse, _ = call(given, "sm_90a", simulation, family="fa3", **options)
    return out, lse


def run(spec: InputSpec, inputs: str = "peaked", **options):
    """(out, lse) of one call, compared with the reference."""
    given = make_inputs(spec, inputs)
    out, lse = launch(given, **options)
    result = expected(given.q, given.k, given.v, out_dtype=out.dtype, **given.options()).check(out, lse)
    assert result.ok, result
    return out, lse


def config_of(spec: InputSpec) -> Fa3ForwardConfig:
    return Fa3Forward.configure(problem_of_spec(spec, SmArch.SM_90A))


@pytest.mark.parametrize("case", cases(), ids=case_name)
def test_features_in_pairs(case):
    persistent, num_sms = case["ctas"]
    options = {"pack_gqa": case["pack_gqa"], "persistent": persistent, "num_sms": num_sms}
    out, _ = run(spec_of_case(case), case["inputs"], out_dtype=case["out_dtype"], **options, **case["schedule"])
    assert out.dtype is case["out_dtype"]


@pytest.mark.gpu
@pytest.mark.parametrize("case", cases(), ids=case_name)
def test_features_in_pairs_on_the_gpu(case):
    """The same pairs with 800 to 3300 keys."""
    given = make_inputs(spec_of_case(case, scale=11), case["inputs"], device="cuda")
    options = {"pack_gqa": case["pack_gqa"], "out_dtype": case["out_dtype"], "family": "fa3"}
    if not given.spec.is_cache:
        options["persistent"] = case["ctas"][0]
    out, lse = given.run(return_lse=True, **options)
    result = expected(given.q, given.k, given.v, out_dtype=out.dtype, **given.options()).check(out, lse)
    assert result.ok, result


PAGED = InputSpec(3, 100, 300, 2, 1, 64, dtype=E4M3, causal=True, seqused_k=True, lengths_k=(300, 129, 0))


@pytest.fixture(scope="module")
def contiguous():
    """(out, lse) of contiguous keys, in blocks of as many keys as paged ones have."""
    spec = dataclasses.replace(PAGED, head_dim_v=96)
    assert config_of(spec).tile_n == config_of(dataclasses.replace(spec, seqused_k=False, page_size=8)).tile_n
    return run(spec, pack_gqa=False)


@pytest.mark.parametrize("page_size", [8, 16, 32, 64, 128, 256])
def test_pages_give_the_bits_of_contiguous_keys(page_size, contiguous):
    """And of the pages only those in use are read, where the others' numbers in the table are beyond the cache."""
    given = make_inputs(dataclasses.replace(PAGED, head_dim_v=96, seqused_k=False, page_size=page_size), "peaked")
    used = [-(-length // page_size) for length in PAGED.lengths_k]
    for row, count in zip(given.page_table, used, strict=True):
        row[count:] = 2**30
    with recorded_loads() as loads:
        out, lse = launch(given, pack_gqa=False, late=True)
    assert torch.equal(out, contiguous[0]) and torch.equal(lse, contiguous[1])
    # (columns, rows of a box, heads, pages, page_size + 1); a box that starts beyond its rows reads nothing
    boxes = [load for load in loads if len(load.extents) == 5]
    listed = {page for row, count in zip(given.page_table.tolist(), used, strict=True) for page in row[:count]}
    assert {load.start[3] for load in boxes if load.start[1] < load.extents[1]} == listed


def test_same_bits_under_every_schedule_and_on_any_number_of_sms():
    given = make_inputs(InputSpec(2, 130, 150, 1, 1, 256, dtype=E4M3, causal=True), "peaked")
    first, first_lse = launch(given, persistent="off", pack_gqa=False)
    for options in ({"num_sms": 1, "late": True, "schedule_seed": 1}, {"num_sms": 3, "schedule_seed": 3}):
        out, lse = launch(given, pack_gqa=False, persistent="on", **options)
        assert torch.equal(out, first) and torch.equal(lse, first_lse)


def test_scores_beyond_the_digits_of_fp32():
    """From 2^27 on 8 is no digit of a score in log2 units; each query sees its best key alone."""
    given = make_inputs(InputSpec(1, 64, 300, 1, 1, 64, dtype=E4M3, descales=False), "random")
    descales = dict.fromkeys(("q_descale", "k_descale"), torch.full((1, 1), 1e4))
    out, lse = launch(dataclasses.replace(given, **descales))
    scores = torch.einsum("bqhd,bkhd->bhqk", given.q.double(), given.k.double()) * 1e8 / 8.0
    assert scores.max() > 2.0**27
    torch.testing.assert_close(lse.double(), scores.amax(-1), rtol=1e-6, atol=0.0)
    best = given.v[0, scores[0, 0].argmax(-1)]
    torch.testing.assert_close(out[0].float(), best.float(), rtol=0.0, atol=0.0)
