"""The FA2 backward, simulated, against the fp32 reference: features in pairs, edges of the mask, costs, big strides."""

import dataclasses

import pytest
import torch

import cute_fa
from cute_fa.engine import autograd
from cute_fa.semantics import reference
from cute_fa.semantics.types import DType
from cute_fa.tools.inputs import InputSpec, make_inputs, output_gradients
from tests.testing.cases import FA2_FEATURES, FA2_LENGTHS, fa2_cases, spec_name, spec_of
from tests.testing.gradients import assert_right, call_of, gradients_of, same_bits

FEATURES = {
    **FA2_FEATURES,
    "lse_gradient": [False, True],
    "lengths": FA2_LENGTHS,
    "heads": [(2, 2), (4, 2), (3, 1)],
    "layout": ["contiguous", "padded", "transposed", "expanded"],
    "seqlens": [(130, 130), (70, 211), (200, 77), (1, 150)],
    "inputs": ["random", "peaked"],
    "deterministic": [False, True],
    "schedule": [{}, {"late": True, "schedule_seed": 1}, {"late": True, "schedule_seed": 2}],
}
CHOICES = ("inputs", "deterministic", "lse_gradient")


def case_name(case: dict) -> str:
    return "-".join([spec_name(spec_of(case)), *(f"{name}={case[name]}" for name in CHOICES)])


@pytest.mark.parametrize("case", fa2_cases(FEATURES), ids=case_name)
def test_features_in_pairs(case):
    assert_right(spec_of(case), race=True, **{name: case[name] for name in CHOICES}, **case["schedule"])


@pytest.mark.gpu
@pytest.mark.parametrize("case", fa2_cases(FEATURES), ids=case_name)
def test_features_in_pairs_on_the_gpu(case):
    given = make_inputs(spec_of(case), case["inputs"], device="cuda").requiring_gradients()
    dout, dlse = output_gradients(given, seed=1)
    variables = given.variables()
    out, lse = given.run(return_lse=True, family="fa2", deterministic=case["deterministic"])
    results = ((out, lse), (dout, dlse)) if case["lse_gradient"] else ((out,), (dout,))
    grads = reference.Gradients.of(variables, torch.autograd.grad(results[0], list(variables.values()), results[1]))
    tensors = (t.detach() for t in (given.q, given.k, given.v))
    dlse = dlse if case["lse_gradient"] else None
    errors = reference.check_gradients(grads, *tensors, dout, dlse, **given.options())
    assert all(error.ok for error in errors.values()), errors


# the widths of panels, and how warps share dQ, that the pairs leave out
@pytest.mark.parametrize("head_dim", [16, 32, 48, 80, 96, 104, 112, 136, 200])
def test_other_head_dims(head_dim):
    assert_right(InputSpec(1, 70, 130, 1, 1, head_dim, causal=True), "peaked")


@pytest.mark.parametrize("head_dims", [(8, 256), (256, 8), (64, 96), (40, 24)], ids=str)
def test_head_dim_v_of_its_own(head_dims):
    head_dim, head_dim_v = head_dims
    assert_right(InputSpec(1, 70, 130, 2, 1, head_dim, head_dim_v=head_dim_v), "peaked", deterministic=True)
    assert_right(InputSpec(1, 70, 130, 2, 1, head_dim, head_dim_v=head_dim_v), "peaked")


# tiles are 128 keys by 32 queries at head_dim 64
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("sink_tokens", [1, 29, 127, 128, 129, 320, 10_000])
def test_sink_inside_touching_and_beyond_the_tile(sink_tokens, deterministic):
    spec = InputSpec(1, 192, 320, 1, 1, 64, window=(100, 0), sink_tokens=sink_tokens)
    assert_right(spec, "peaked", deterministic=deterministic)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("window", [(0, 0), (1, 64), (127, 0), (300, 2**31 - 2), (2**31 - 2, 0)], ids=str)
def test_window_edges(window, deterministic):
    assert_right(InputSpec(1, 150, 260, 1, 1, 64, window=window), "peaked", deterministic=deterministic)


@pytest.mark.parametrize("residue", [-2, -1, 0, 1, 2])
@pytest.mark.parametrize("window", [(None, 0), (128, 0), (64, 64)], ids=str)
def test_mask_edges_that_meet_tile_edges(window, residue):
    """The diagonal and the window's sides pass within two keys of the corner of a tile, on either side."""
    assert_right(InputSpec(1, 128, 256 + residue, 1, 1, 64, window=window), "peaked")


@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(32, 128), (33, 127), (31, 129), (129, 1), (300, 31), (1, 1)])
@pytest.mark.parametrize("causal", [False, True])
def test_lengths_around_the_tiles(seqlen_q, seqlen_k, causal):
    assert_right(InputSpec(1, seqlen_q, seqlen_k, 1, 1, 64, causal=causal), "peaked", lse_gradient=False)


def test_hidden_rows_and_keys_have_no_gradient():
    """Causal with more queries than keys: the first 130 queries see nothing; a window hides the first keys."""
    grads = assert_right(InputSpec(1, 200, 70, 2, 2, 64, causal=True))
    assert (grads.dq[:, :130] == 0).all() and grads.dq[:, 130:].abs().amin((0, 2, 3)).shape == (70,)
    grads = assert_right(InputSpec(1, 64, 300, 2, 2, 64, window=(20, 0)))
    assert (grads.dk[:, :216] == 0).all() and (grads.dv[:, :216] == 0).all() and (grads.dv[:, 216] != 0).any()


def test_gradients_of_rows_without_keys_ignore_what_comes_in():
    """dLSE of rows that see nothing may be NaN, as the gradient of a logarithm of 0 is; dO anything finite."""
    given = make_inputs(InputSpec(1, 100, 40, 1, 1, 64, causal=True))
    dout, dlse = output_gradients(given)
    out, lse = reference.attention(given.q, given.k, given.v, **given.options())
    dout[:, :60], dlse[..., :60] = 1e4, torch.nan
    with cute_fa.simulate("sm_80"):
        grads = autograd.attention_backward(dout, dlse, out.bfloat16(), lse, call_of(given))
    assert (grads.dq[:, :60] == 0).all() and all(grad.isfinite().all() for grad in grads[:3])


@pytest.mark.parametrize("arch", ["sm_86", "sm_89", "sm_90a", "sm_100a", "sm_103a", "sm_120a"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_later_archs_run_the_same_source(arch, head_dim):
    spec = InputSpec(1, 100, 140, 2, 1, head_dim, causal=True)
    assert_right(spec, "peaked", arch=arch, deterministic=head_dim == 128)


def test_deterministic_under_every_schedule():
    """More CTAs than run at once (64), all features that sum over CTAs."""
    spec = InputSpec(9, 70, 140, 4, 2, 64, causal=True, alibi=True, learnable_sink=True)
    first, _ = gradients_of(spec, deterministic=True)
    for seed in range(2):
        again, _ = gradients_of(spec, deterministic=True, schedule_seed=seed, late=True)
        assert same_bits(first, again)


def test_dq_by_atomic_additions_depends_on_the_order():
    """What deterministic=True is there for: without it another schedule gives other bits, of dQ alone."""
    spec = InputSpec(1, 130, 1000, 4, 4, 64, dtype=DType.FP16)
    first, _ = gradients_of(spec)
    others = [gradients_of(spec, schedule_seed=seed)[0] for seed in range(3)]
    assert any(not torch.equal(first.dq, other.dq) for other in others)
    assert all(torch.equal(first.dk, other.dk) and torch.equal(first.dv, other.dv) for other in others)


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_offsets_beyond_32_bits(dim):
    """Elements more than 2^31 apart, along the batch, the sequence or the heads; what lies between is never touched."""
    given = make_inputs(InputSpec(2, 40, 72, 2, 2, 64))
    dout, dlse = output_gradients(given)
    out, lse = reference.attention(given.q, given.k, given.v)
    expected = reference.expected_gradients(given.q, given.k, given.v, dout, dlse)
    q, k, v, out, dout = (far_apart(t, dim) for t in (given.q, given.k, given.v, out.bfloat16(), dout))
    for deterministic in (False, True):
        call = call_of(dataclasses.replace(given, q=q, k=k, v=v), deterministic=deterministic)
        with cute_fa.simulate("sm_80"):
            grads = autograd.attention_backward(dout, dlse, out, lse, call)
        assert all(error.ok for error in expected.check(grads).values())


def far_apart(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    """The same numbers with more than 2^31 elements between the first and the last of a dimension."""
    strides = list(tensor.stride())
    strides[dim] = (2**31 + 64) // (tensor.shape[dim] - 1) // 8 * 8 + 8
    reach = 1 + sum(stride * (size - 1) for stride, size in zip(strides, tensor.shape, strict=True))
    assert reach > 2**31
    return torch.empty(reach, dtype=tensor.dtype).as_strided(tensor.shape, strides).copy_(tensor)
