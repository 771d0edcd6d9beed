"""Third-party kernels, unmodified, through the simulator: FlashAttention-4's forward and quack's softmax.

They are right on hardware, so a wrong number here is the simulator's fault. Every case runs in the default schedule, in
an adversarial one, and with asynchronous work as late as legal, in both orders; and with the race detector, which has
nothing to report.
"""

import pytest

from tests.testing.peers import run_once

# (late, schedule seed, race)
MODES = [
    (False, None, False),
    (False, 5, False),
    (True, None, False),
    (True, 1, False),
    (False, None, True),
    (False, 5, True),
]
# batch, seqlen_q, seqlen_k, heads, heads_kv, head_dim, causal, dtype
ATTENTION = {
    "d64-causal-fp16": (2, 200, 200, 2, 2, 64, True, "float16"),
    "d128-full": (1, 256, 256, 2, 2, 128, False, "bfloat16"),
    "d128-causal": (1, 256, 256, 2, 2, 128, True, "bfloat16"),
    "d128-gqa4-odd": (1, 200, 333, 4, 1, 128, False, "bfloat16"),
    "d64-gqa2-causal-odd": (1, 113, 500, 2, 1, 64, True, "bfloat16"),
}
CASES = {
    "sm_80": [*ATTENTION, "softmax"],
    "sm_90a": [*ATTENTION, "softmax"],
    "sm_100a": ["d128-full", "d128-causal", "softmax"],
}
KERNEL = {"sm_80": "FlashAttentionForwardSm80", "sm_90a": "ForwardSm90", "sm_100a": "ForwardSm100"}
NAMES = ("batch", "seqlen_q", "seqlen_k", "heads", "heads_kv", "head_dim", "causal", "dtype")


def job(case):
    if case == "softmax":
        # Rows in whole tiles: for missing ones quack reads shared memory that nothing wrote (and drops it).
        return {"job": "softmax", "modes": MODES, "rows": 8, "columns": 1000, "dtype": "bfloat16"}
    return {"job": "attention", "modes": MODES, **dict(zip(NAMES, ATTENTION[case], strict=True))}


@pytest.fixture(scope="session")
def results(tmp_path_factory):
    return lambda arch: run_once(tmp_path_factory, "peers", arch, [job(case) for case in CASES[arch]])


@pytest.mark.parametrize(
    ("arch", "case"),
    [
        pytest.param(arch, case, marks=pytest.mark.xdist_group(f"peers-{arch}"))
        for arch, cases in CASES.items()
        for case in cases
    ],
)
def test_peer(results, arch, case):
    result = results(arch)[CASES[arch].index(case)]
    assert "raised" not in result, result["raised"]
    assert len(result["launches"]) == len(result["errors"]) == len(MODES)
    if case == "softmax":
        assert all("quacksoftmaxSoftmax" in name for name in result["launches"])
        assert max(result["errors"]) < 2**-8  # half a unit of bf16 below 1
    else:
        assert all(KERNEL[arch] in name for name in result["launches"])
        out, lse = map(max, zip(*result["errors"], strict=True))
        assert out < (0.004 if job(case)["dtype"] == "float16" else 0.02)
        assert lse < 2e-3
