"""The grid on which AMD's composable_kernel validates its batch prefill with sink tokens: packed queries over a paged
cache; no mask, causal, sliding window; 0, 1, 8, 128 sink tokens; fp16, bf16; with and without LSE; 512 to 4096 tokens;
windows of 32 to 1024; GQA; pages of 16 and 32; head_dim 128 and 256. The whole of it on a GPU; simulated, pairs of
values, at a sixteenth of the lengths."""

import itertools
from dataclasses import replace

import pytest

import cute_fa
from cute_fa.semantics.reference import expected
from cute_fa.semantics.types import DType
from cute_fa.tools.inputs import Inputs, InputSpec, make_inputs
from tests.testing.grid import pairwise
from tests.testing.simulated import unwritten_is_nan

# What machine code depends on: of sink tokens, whether there are any left of a window.
KERNELS = {
    "mask": ("none", "causal", "window"),
    "dtype": (DType.FP16, DType.BF16),
    "page_size": (16, 32),
    "head_dim": (128, 256),
}
# What it does not depend on.
RUNS = {
    "seqlen": (512, 1024, 2048, 4096),
    "window": (32, 128, 512, 1024),
    "sink": (1, 8, 128),
    "heads": ((1, 1), (2, 1), (4, 2), (8, 1)),
    "lse": (False, True),
}
CHUNK = 528
SCALE = 16
SIMULATED = pairwise(
    {**KERNELS, "mask": (*KERNELS["mask"], "window and sink"), "arch": ("sm_80", "sm_90a", "sm_100a")}, seed=39
)


def inputs_of(kernel: dict, run: dict, scale: int = 1, device: str = "cpu") -> Inputs:
    """A prompt from its start, and a chunk behind a prefix."""
    seqlen, window, chunk = run["seqlen"] // scale, run["window"] // scale, CHUNK // scale
    masks = {"none": {}, "causal": {"causal": True}}
    spec = InputSpec(
        batch=2,
        seqlen_q=max(seqlen, chunk),
        seqlen_k=seqlen + chunk,
        heads=run["heads"][0],
        heads_kv=run["heads"][1],
        head_dim=kernel["head_dim"],
        dtype=kernel["dtype"],
        sink_tokens=run["sink"],
        varlen_q=True,
        lengths_q=(seqlen, chunk),
        lengths_k=(seqlen, seqlen + chunk),
        page_size=kernel["page_size"],
        **masks.get(kernel["mask"], {"window": (window, 0)}),
    )
    return make_inputs(spec, "peaked", device=device)


def assert_right(given: Inputs, lse: bool, **choices) -> None:
    arguments = given.arguments() | {"return_lse": lse, **choices}
    result = cute_fa.flash_attn_varlen_func(given.q, given.k, given.v, **arguments)
    comparison = expected(given.q, given.k, given.v, **given.options()).check(*(result if lse else (result,)))
    assert comparison.ok, f"{given.spec}: {comparison}"


def name(kernel: dict) -> str:
    return "-".join(str(getattr(value, "value", value)) for value in kernel.values())


@pytest.mark.sampled
@pytest.mark.parametrize("kernel", SIMULATED, ids=name)
def test_pairs_simulated(kernel):
    runs = pairwise(RUNS)[SIMULATED.index(kernel) % 4 :: 4]
    # heuristics that know of no lengths, for one compile
    choices = {"max_seqlen_q": max(RUNS["seqlen"]) // SCALE, "pack_gqa": False}
    with cute_fa.simulate(kernel["arch"]), unwritten_is_nan():
        for run in runs:
            given = inputs_of(kernel, run if kernel["mask"] != "window" else {**run, "sink": 0}, SCALE)
            assert_right(given, run["lse"], **choices)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "kernel", [dict(zip(KERNELS, values, strict=False)) for values in itertools.product(*KERNELS.values())], ids=name
)
def test_all_on_the_gpu(kernel):
    windows = RUNS["window"] if kernel["mask"] == "window" else (0,)
    for seqlen, window, heads in itertools.product(RUNS["seqlen"], windows, RUNS["heads"]):
        given = inputs_of(kernel, {"seqlen": seqlen, "window": window, "sink": 8, "heads": heads}, device="cuda")
        for sink, lse in itertools.product((0, *RUNS["sink"]), RUNS["lse"]):
            assert_right(replace(given, spec=replace(given.spec, sink_tokens=sink)), lse)
