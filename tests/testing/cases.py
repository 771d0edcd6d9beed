"""What the kernels' test grids share: from the levels of a case to its spec, and a problem to vary."""

import dataclasses

from cute_fa.engine.contract import AttentionKernel
from cute_fa.semantics.problem import AttentionProblem, LiteralWindow
from cute_fa.semantics.types import DType, SmArch
from cute_fa.tools.inputs import InputSpec
from tests.testing.grid import in_turns, pairwise

# Levels of what the FA2 kernels' grids vary, as many as shape the code or the control flow differently. Those of masks
# stand for several values each, which the cases take in turns: usual windows, and ones with a negative bound.
FA2_MASKS = {
    "none": [{}],
    "causal": [{"causal": True}],
    "window": [{"window": (37, 11)}, {"window": LiteralWindow(-9, 40)}, {"window": LiteralWindow(30, -7)}],
    "window and sink": [
        {"window": (20, 0), "sink_tokens": 5},
        {"window": LiteralWindow(-12, 60), "sink_tokens": 30},
        {"window": LiteralWindow(40, -3), "sink_tokens": 90},
    ],
    "left": [{"window": (70, None), "sink_tokens": 90}, {"window": LiteralWindow(-6, None), "sink_tokens": 20}],
    "right": [{"window": (None, 9)}, {"window": LiteralWindow(None, -5)}],
}
FA2_FEATURES = {
    "dtype": [DType.BF16, DType.FP16],
    "head_dims": [(64, None), (128, None), (8, None), (72, 40), (192, 128), (256, None)],
    "mask": list(FA2_MASKS),
    "alibi": [{}, {"alibi": True}, {"alibi_per_batch": True}],
    "softcap": [0.0, 15.0],
    "learnable_sink": [False, True],
}
FA2_LENGTHS = [
    {},
    {"varlen_q": True, "varlen_k": True},
    {"seqused_q": True, "seqused_k": True},
    {"varlen_q": True, "seqused_k": True},
    {"varlen_q": True, "varlen_k": True, "seqused_q": True, "seqused_k": True},
]


def fa2_cases(features: dict[str, list]) -> list[dict]:
    """Cases with every pair of these levels, FA2_FEATURES among them."""
    return in_turns(pairwise(features, seed=1), mask=FA2_MASKS)


def spec_of(case: dict, scale: int = 1) -> InputSpec:
    """``scale``: factor of the lengths and of the window."""
    head_dim, head_dim_v = case["head_dims"]
    heads, heads_kv = case["heads"]
    seqlen_q, seqlen_k = (length * scale if length > 1 else length for length in case["seqlens"])
    mask = dict(case["mask"])
    if "window" in mask:
        window = (bound and bound * scale for bound in mask["window"])
        mask["window"] = LiteralWindow(*window) if isinstance(mask["window"], LiteralWindow) else tuple(window)
    return InputSpec(
        batch=3 if case["lengths"] else 1 + bool(case["alibi"].get("alibi_per_batch")),
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        heads=heads,
        heads_kv=heads_kv,
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        dtype=case["dtype"],
        softcap=case["softcap"],
        learnable_sink=case["learnable_sink"],
        layout=case["layout"],
        **mask,
        **case["alibi"],
        **case["lengths"],
    )


def spec_name(spec: InputSpec) -> str:
    """The fields that differ from their defaults."""
    changed = (f for f in dataclasses.fields(spec) if getattr(spec, f.name) != f.default)
    return "-".join(f"{f.name}={getattr(spec, f.name)}" for f in changed)


def small_problem(arch: SmArch, **changes) -> AttentionProblem:
    """A bf16 forward of one short sequence with two heads of 64, with changes."""
    base = dict(
        dtype=DType.BF16,
        batch=1,
        seqlen_q=128,
        seqlen_k=128,
        num_heads=2,
        num_heads_kv=2,
        head_dim=64,
        head_dim_v=64,
        softmax_scale=0.125,
    )
    return AttentionProblem(arch=arch, **{**base, **changes})


def refusals(kernel: type[AttentionKernel], problem: AttentionProblem) -> list[str]:
    """Why a heuristic refuses what it prefers to its choice, which must come last and be what ``configure`` gives."""
    *refused, last = kernel.candidates(problem)
    assert last.config == kernel.configure(problem) and last.reason is None
    assert all(candidate.reason for candidate in refused)
    return [candidate.reason for candidate in refused]
