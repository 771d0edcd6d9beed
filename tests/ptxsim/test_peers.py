"""Third-party kernels, unmodified, through the simulator: FlashAttention-4's forward and backward, and quack's softmax,
RMS norm, cross entropy and GEMM.

They are right on hardware, so a wrong number here is the simulator's fault. Every case runs in the default schedule, in
an adversarial one, and with asynchronous work as late as legal, in both orders; and with the race detector, which has
nothing to report but for the findings at the end, which the PTX ISA calls wrong.
"""

import pytest

from tests.testing.peers import run_once

# (late, schedule seed, race)
MODES = [(False, None, False), (False, None, True), (False, 5, True), (True, None, True), (True, 1, True)]
# batch, seqlen_q, seqlen_k, heads, heads_kv, head_dim, causal, dtype
ATTENTION = {
    "d64-causal-fp16": (2, 200, 200, 2, 2, 64, True, "float16"),
    "d128-full": (1, 256, 256, 2, 2, 128, False, "bfloat16"),
    "d128-causal": (1, 256, 256, 2, 2, 128, True, "bfloat16"),
    "d128-gqa4-odd": (1, 200, 333, 4, 1, 128, False, "bfloat16"),
    "d64-gqa2-causal-odd": (1, 113, 500, 2, 1, 64, True, "bfloat16"),
}
BACKWARD = {
    "backward-d64-causal": (1, 200, 200, 2, 2, 64, True, "bfloat16"),
    "backward-d128-gqa2-odd": (1, 113, 300, 2, 1, 128, False, "bfloat16"),
}
# of which torch's autograd calls the backward
TRAINING = {"training": BACKWARD["backward-d64-causal"]}
# kernel, shape, tolerance of each result: half a unit of bf16 in its largest element, or rounding of fp32
QUACK = {
    "softmax": ("softmax", dict(rows=8, columns=1000), (2**-9, 2**-9)),
    "softmax-cluster": ("softmax", dict(rows=2, columns=20000), (2**-9, 2**-9)),
    "rmsnorm": ("rmsnorm", dict(rows=8, columns=1024), (2**-5, 2**-5, 1e-4)),
    "rmsnorm-cluster": ("rmsnorm", dict(rows=2, columns=20000), (2**-5, 2**-5, 1e-4)),
    "cross-entropy": ("cross_entropy", dict(rows=8, columns=1000), (1e-4, 2**-9)),
    "cross-entropy-cluster": ("cross_entropy", dict(rows=2, columns=20000), (1e-4, 2**-9)),
    "gemm": ("gemm", dict(m=256, n=256, k=192), (2**-3,)),
}
CASES = {
    "sm_80": [*ATTENTION, "softmax"],
    "sm_90a": [*ATTENTION, *BACKWARD, *TRAINING, *QUACK],
    "sm_100a": ["d128-full", "d128-causal", *BACKWARD, "softmax-cluster", "rmsnorm", "cross-entropy", "gemm"],
}
NAMES = ("batch", "seqlen_q", "seqlen_k", "heads", "heads_kv", "head_dim", "causal", "dtype")
QUACK_CASES = {arch: [case for case in cases if case in QUACK] for arch, cases in CASES.items()}
BITS = (1, 200, 300, 2, 1, 64, True, "bfloat16")
# SMs, late, schedule seed
BITS_MODES = [(4, False, None), (1, False, 1), (2, True, None), (132, False, 2), (3, True, 1)]
FINDINGS = {
    "missing-rows": {"job": "quack", "kernel": "softmax", "rows": 7, "columns": 1000, "dtype": "bfloat16"},
    "backward": {"job": "backward", **dict(zip(NAMES, BACKWARD["backward-d64-causal"], strict=True))},
}


def job(arch, case):
    if case in QUACK:
        kernel, shape, _ = QUACK[case]
        return {"job": "quack", "kernel": kernel, "modes": MODES, "dtype": "bfloat16", **shape}
    if case == "bits":
        return {"job": "bits", "modes": BITS_MODES, **dict(zip(NAMES, BITS, strict=True))}
    if case in FINDINGS:
        return {**FINDINGS[case], "modes": MODES}
    problem = dict(zip(NAMES, (ATTENTION | BACKWARD | TRAINING)[case], strict=True))
    if case in ATTENTION:
        return {"job": "attention", "modes": MODES, **problem}
    if case in TRAINING:
        return {"job": "training", "modes": MODES[:1], **problem}
    return {"job": "backward", "modes": MODES, "repaired": arch == "sm_100a", **problem}


def listed(arch):
    return CASES[arch] + {"sm_80": [], "sm_90a": ["missing-rows"], "sm_100a": ["backward", "bits"]}[arch]


@pytest.fixture(scope="session")
def results(tmp_path_factory):
    def of(arch, case):
        jobs = [job(arch, case) for case in listed(arch)]
        result = run_once(tmp_path_factory, "peers", arch, jobs)[listed(arch).index(case)]
        assert "raised" not in result, result["raised"]
        return result

    return of


def over(cases):
    return [
        pytest.param(arch, case, marks=pytest.mark.xdist_group(f"peers-{arch}"))
        for arch, selected in cases.items()
        for case in selected
    ]


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("arch", "case"), over({arch: [c for c in cases if c in ATTENTION] for arch, cases in CASES.items()})
)
def test_forward(results, arch, case):
    result = results(arch, case)
    kernel = {"sm_80": "FlashAttentionForwardSm80", "sm_90a": "ForwardSm90", "sm_100a": "ForwardSm100"}[arch]
    assert all(kernel in name for name in result["launches"])
    assert len(result["launches"]) == len(result["errors"]) == len(MODES)
    out, lse = map(max, zip(*result["errors"], strict=True))
    assert out < (0.004 if "fp16" in case else 0.02)
    assert lse < 2e-3


@pytest.mark.parametrize(("arch", "case"), over({"sm_90a": BACKWARD, "sm_100a": BACKWARD}))
def test_backward(results, arch, case):
    """dQ, dK and dV; for sm_100a with the two findings below repaired."""
    result = results(arch, case)
    assert sum("BackwardSm" + arch[3:-1] in name for name in result["launches"]) == len(result["errors"]) == len(MODES)
    for errors in result["errors"]:
        assert len(errors) == 3
        assert max(errors) < 0.04


@pytest.mark.parametrize(("arch", "case"), over({"sm_90a": TRAINING}))
def test_training(results, arch, case):
    """O, dQ, dK and dV of the public function and of ``out.backward()``."""
    result = results(arch, case)
    assert sum("ForwardSm90" in name for name in result["launches"]) == 1
    assert sum("BackwardSm90" in name for name in result["launches"]) == 1
    ((out, *gradients),) = result["errors"]
    assert out < 0.02
    assert len(gradients) == 3 and max(gradients) < 0.04


@pytest.mark.parametrize(("arch", "case"), over(QUACK_CASES))
def test_quack(results, arch, case):
    result = results(arch, case)
    assert all("quack" in name for name in result["launches"])
    assert len(result["errors"]) == len(MODES)
    for errors in result["errors"]:
        assert len(errors) == len(QUACK[case][2])
        assert all(error < limit for error, limit in zip(errors, QUACK[case][2], strict=True)), errors


@pytest.mark.parametrize(("arch", "case"), over({"sm_90a": ["missing-rows"]}))
def test_quack_reads_rows_that_are_missing(results, arch, case):
    """From shared memory that nothing wrote; what it computes from them is dropped."""
    assert {error.split(":")[0] for error in results(arch, case)["errors"]} == {"UninitializedRead"}


@pytest.mark.parametrize(("arch", "case"), over({"sm_100a": ["backward"]}))
def test_findings_in_the_backward(results, arch, case):
    """Warps of a warpgroup execute different setmaxnreg; nothing waits for the last bulk stores of shared memory."""
    plain, *racing = results(arch, case)["errors"]
    assert plain.startswith("SyncError: setmaxnreg by some of the warps of warpgroup 3")
    for error in racing:
        assert error.startswith("RaceError: race: the warp ends without cp.async.bulk.wait_group, while shared memory")


@pytest.mark.parametrize(("arch", "case"), over({"sm_100a": ["bits"]}))
def test_bits(results, arch, case):
    """O, LSE and the deterministic dQ, dK and dV: the same in every mode, and right."""
    result = results(arch, case)
    assert len(result["bits"]) == len(BITS_MODES) and len(result["bits"][0]) == 5
    assert all(found == result["bits"][0] for found in result["bits"])
    assert max(result["errors"]) < 0.04
