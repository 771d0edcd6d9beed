"""Windows whose bounds are meant as they are, negative ones too: FlashAttention 4's, in every kernel and direction."""

import dataclasses
import itertools
import math

import pytest
import torch

import cute_fa
from cute_fa.compat import fa4
from cute_fa.semantics import reference
from cute_fa.semantics.errors import WindowError
from cute_fa.semantics.problem import LiteralWindow
from cute_fa.tools.inputs import InputSpec, make_inputs, output_gradients
from fa2_sm80.split.entry import Fa2Split
from tests.testing.cases import small_problem
from tests.testing.gradients import assert_right
from tests.testing.simulated import call

SPEC = InputSpec(1, 70, 211, 4, 2, 64)
# (window, causal): what FlashAttention 4 makes of it (flash_attn/cute/interface.py, _resolve_causal_local_window)
RESOLVED = {
    ((None, -1), False): (None, -1),
    ((-1, None), False): (-1, None),
    ((-1, 3), False): (-1, 3),
    ((3, -1), False): (3, -1),
    ((None, -5), False): (None, -5),
    ((-4, None), False): (-4, None),
    ((-1, 0), False): (-1, 0),
    ((-1, -1), False): (None, None),
    ((-4, -7), False): (None, None),
    ((12, 5), False): (12, 5),
    ((None, None), True): (None, 0),
    ((-1, -1), True): (None, 0),
    ((3, -1), True): (3, 0),
    ((-4, None), True): (-4, 0),
    ((None, -5), True): (None, 0),
}


def attention(q, k, v, left, right):
    """(out, lse) in fp64, one sequence after the other, straight from what the bounds say: query i sees key j iff
    i + D − left ≤ j ≤ i + D + right, D = seqlen_k − seqlen_q; 0 and −inf where it sees none."""
    q, k, v = (t.double().transpose(1, 2) for t in (q, k, v))
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    i, j = torch.arange(q.shape[2])[:, None] + k.shape[2] - q.shape[2], torch.arange(k.shape[2])
    hidden = torch.zeros(q.shape[2], k.shape[2], dtype=torch.bool)
    if left is not None:
        hidden |= j < i - left
    if right is not None:
        hidden |= j > i + right
    scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(hidden, -torch.inf)
    nothing = hidden.all(1)
    p = scores.masked_fill(nothing[:, None], 0.0).softmax(-1).masked_fill(nothing[:, None], 0.0)
    return (p @ v).transpose(1, 2), scores.logsumexp(-1)


@pytest.mark.parametrize(("given", "resolved"), RESOLVED.items(), ids=str)
def test_the_reference_is_literal(given, resolved):
    inputs = make_inputs(dataclasses.replace(SPEC, seqlen_q=150, seqlen_k=40), "peaked")
    tensors = inputs.q, inputs.k, inputs.v
    out, lse = reference.attention(*tensors, window_size=LiteralWindow(*resolved), dtype=torch.float64)
    exact, exact_lse = attention(*tensors, *resolved)
    torch.testing.assert_close(out, exact)
    torch.testing.assert_close(lse, exact_lse)
    q, k, v = (t.double().requires_grad_() for t in tensors)
    dout = output_gradients(inputs)[0]
    grads = reference.gradients(*tensors, dout, window_size=LiteralWindow(*resolved), dtype=torch.float64)
    for ours, theirs in zip(
        grads[:3], torch.autograd.grad(attention(q, k, v, *resolved)[0], (q, k, v), dout.double()), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.sampled
@pytest.mark.parametrize(("given", "resolved"), RESOLVED.items(), ids=str)
def test_flash_attention_4_is_followed(given, resolved):
    """out, lse and, where there are some, gradients; the second sequence has fewer keys than queries."""
    window, causal = given
    inputs = make_inputs(SPEC, "peaked").requiring_gradients()
    tensors = inputs.q, inputs.k, inputs.v
    dout, _ = output_gradients(inputs)
    with cute_fa.simulate("sm_80"):
        out, lse = fa4.flash_attn_func(*tensors, window_size=window, causal=causal)
        grads = torch.autograd.grad(out, tensors, dout)
    literal = {"window_size": LiteralWindow(*resolved)}
    tensors = [t.detach() for t in tensors]
    result = reference.expected(*tensors, **literal).check(out, lse)
    assert result.ok, result
    errors = reference.check_gradients(reference.Gradients.of("qkv", grads), *tensors, dout, **literal)
    assert len(errors) == 3 and all(error.ok for error in errors.values()), errors


def test_packed_sequences_follow_too():
    """With a CPU tensor for the window, as peers' tests pass it."""
    spec = dataclasses.replace(
        SPEC, batch=3, varlen_q=True, varlen_k=True, lengths_q=(70, 33, 9), lengths_k=(211, 5, 9)
    )
    inputs = make_inputs(spec, "peaked")
    lengths = (inputs.cu_seqlens_q, inputs.cu_seqlens_k, 70, 211)
    literal = {**inputs.options(), "window_size": LiteralWindow(-1, 3)}
    with cute_fa.simulate("sm_80"):
        out, lse = fa4.flash_attn_varlen_func(
            *(inputs.q, inputs.k, inputs.v), None, *lengths, window_size=torch.tensor([-1, 3]), return_lse=True
        )
    result = reference.expected(inputs.q, inputs.k, inputs.v, **literal).check(out, lse)
    assert result.ok, result


@pytest.mark.parametrize("window", [(1.5, 0), (1, 2, 3), 7, (True, 0)], ids=str)
def test_bad_windows_name_the_argument(window):
    inputs = make_inputs(SPEC)
    with cute_fa.simulate("sm_80"), pytest.raises(WindowError, match="window_size"):
        fa4.flash_attn_func(inputs.q, inputs.k, inputs.v, window_size=window)


# Both bounds and sink tokens in each, so that a kernel is compiled once.
BOUNDED = [
    (LiteralWindow(-1, 3), 0),
    (LiteralWindow(3, -1), 5),
    (LiteralWindow(-1, 0), 190),
    (LiteralWindow(-20, 10), 90),
    (LiteralWindow(-30, 100), 90),
    (LiteralWindow(100, -30), 200),
    (LiteralWindow(-300, 400), 190),  # begins behind the last key
    (LiteralWindow(400, -250), 90),  # ends before the first key
]
windows = pytest.mark.parametrize(("window", "sink_tokens"), [(w, s) for w, s in BOUNDED if s], ids=str)


def bounded(window, sink_tokens, **changes) -> list[tuple[InputSpec, str]]:
    """More keys than queries, and fewer. Random ones too: beside the peaks of the others, keys beyond the end, which
    arrive as zeros, would not be seen."""
    spec = dataclasses.replace(SPEC, window=window, sink_tokens=sink_tokens, **changes)
    specs = spec, dataclasses.replace(spec, seqlen_q=200, seqlen_k=77)
    return list(itertools.product(specs, ("peaked", "random")))


@pytest.mark.sampled
@windows
@pytest.mark.parametrize(
    ("arch", "choices"),
    [("sm_80", {"family": "fa2"}), ("sm_90a", {"family": "fa3"}), ("sm_100a", {"family": "fa4"})],
    ids=str,
)
def test_forward(arch, choices, window, sink_tokens):
    for spec, kind in bounded(window, sink_tokens):
        inputs = make_inputs(spec, kind)
        out, lse, _ = call(inputs, arch, **choices)
        result = reference.expected(inputs.q, inputs.k, inputs.v, **inputs.options()).check(out, lse)
        assert result.ok, result


@windows
def test_split(window, sink_tokens):
    for spec, kind in bounded(window, sink_tokens, page_size=16, heads=8):
        inputs = make_inputs(spec, kind)
        out, lse, _ = call(inputs, "sm_80", num_splits=3)
        result = reference.expected(inputs.q, inputs.k, inputs.v, **inputs.options()).check(out, lse)
        assert result.ok, result


@pytest.mark.sampled
@windows
@pytest.mark.parametrize("deterministic", [False, True])
def test_backward(deterministic, window, sink_tokens):
    for spec, kind in bounded(window, sink_tokens):
        assert_right(spec, kind, deterministic=deterministic)


@pytest.mark.parametrize("window", [(-1, 0), (30, -2000), (-2000, None), (None, -2000)], ids=str)
def test_the_host_counts_no_keys_where_none_are_visible(window):
    left, right = window
    sizes = {"seqlen_q": 1, "seqlen_k": 1000, "num_heads": 8, "num_heads_kv": 1}
    problem = small_problem(cute_fa.SmArch.SM_80, window_left=left, window_right=right, **sizes)
    config = Fa2Split.configure(problem)
    assert Fa2Split.supports(problem) == [] and Fa2Split.units(problem, config) == 1
