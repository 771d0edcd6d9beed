"""The FA2 backward under range plans, simulated: features in pairs, and all head dims; a dense mask decides."""

import itertools

import pytest
import torch

from cute_fa.api.ranges import range_attention
from tests.testing.grid import pairwise
from tests.testing.range_gradients import assert_right
from tests.testing.range_reference import RangeInputs
from tests.testing.range_walks import Ranges

ALIBI = {"none": {}, "alibi": {"alibi": True}, "positions": {"alibi": True, "positions": True}}
FEATURES = {
    "dtype": [torch.bfloat16, torch.float16],
    "alibi": list(ALIBI),
    "softcap": [0.0, 15.0],
    "sink": [False, True],
    "lse_gradient": [False, True],
    "deterministic": [False, True],
    "heads": [(2, 2), (3, 1)],
    "peaked": [False, True],
    "plan": [(6, None), (40, 60)],
    "totals": [(130, 170), (200, 90)],
    "schedule": [{}, {"late": True, "schedule_seed": 1}],
}
# compiles take seconds: pairs at one head_dim, each other one with one of them; a GPU runs pairs of all
HEAD_DIMS = [(8, 8), (72, 40), (96, 96), (128, 128), (192, 128), (256, 256)]
PAIRS = [case | {"head_dims": (64, 64)} for case in pairwise(FEATURES, seed=3)]
CASES = PAIRS + [
    case | {"head_dims": head_dims, "deterministic": bool(i % 2)}
    for i, (case, head_dims) in enumerate(zip(itertools.cycle(PAIRS), HEAD_DIMS))
]


def case_name(case: dict) -> str:
    return "-".join(str(value).replace(" ", "") for name, value in case.items() if name not in ("plan", "schedule"))


def problem_of(case: dict) -> tuple[Ranges, RangeInputs]:
    """Of a case of FEATURES and head_dims."""
    n, longest = case["plan"]
    ranges = Ranges.random(n, *case["totals"], seed=n, longest=longest)
    names = ("heads", "head_dims", "dtype", "softcap", "sink", "peaked", "lse_gradient")
    return ranges, RangeInputs.make(ranges, **{name: case[name] for name in names}, **ALIBI[case["alibi"]])


@pytest.mark.sampled
@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_features_and_head_dims(case):
    assert_right(*problem_of(case), deterministic=case["deterministic"], **case["schedule"])


@pytest.mark.gpu
@pytest.mark.parametrize("case", pairwise(FEATURES | {"head_dims": [(64, 64), *HEAD_DIMS]}, seed=3), ids=case_name)
def test_features_in_pairs_on_the_gpu(case):
    ranges, inputs = problem_of(case)
    inputs = inputs.on("cuda").requiring_gradients()
    choices = {"deterministic": case["deterministic"], "return_lse": True, "family": "fa2"}
    given = (t.cuda() for t in (ranges.q, ranges.k, ranges.types))
    out, lse = range_attention(inputs.q, inputs.k, inputs.v, *given, **choices, **inputs.options())
    results, incoming = ([out], [inputs.dout]) if inputs.dlse is None else ([out, lse], [inputs.dout, inputs.dlse])
    grads = torch.autograd.grad(results, list(inputs.variables().values()), incoming)
    errors = inputs.check_gradients(dict(zip(inputs.variables(), grads, strict=True)))
    assert all(error.ok for error in errors.values()), errors
