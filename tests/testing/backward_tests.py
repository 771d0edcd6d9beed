"""Tests that the backwards have in common: a family's test class inherits them."""

import dataclasses
from typing import Any, ClassVar

import pytest
import torch

import cute_fa
from cute_fa.engine import autograd
from cute_fa.engine.contract import AttentionKernel
from cute_fa.engine.table import TABLE
from cute_fa.semantics import reference
from cute_fa.semantics.types import Direction, SmArch
from cute_fa.tools.inputs import InputSpec, make_inputs, output_gradients
from cute_fa.tools.trial import problem_of_spec
from tests.testing.cases import FA2_FEATURES, FA2_LENGTHS, spec_name, spec_of
from tests.testing.gradients import assert_right, call_of, gradients_of, same_bits
from tests.testing.simulated import ctas_at_a_time

_CHOICES = ("inputs", "deterministic", "lse_gradient")


def features(head_dims: list, ways: tuple[bool, ...]) -> dict[str, list]:
    """Levels of a family's grid; those of masks are what the FA2 kernels' grids have."""
    return {
        **FA2_FEATURES,
        "head_dims": head_dims,
        "lse_gradient": [False, True],
        "lengths": FA2_LENGTHS,
        "heads": [(2, 2), (4, 2), (3, 1)],
        "layout": ["contiguous", "padded", "transposed", "expanded"],
        "seqlens": [(130, 130), (70, 211), (200, 77), (1, 150)],
        "inputs": ["random", "peaked"],
        "deterministic": list(ways),
        "schedule": [{}, {"late": True, "schedule_seed": 1}, {"late": True, "schedule_seed": 2}],
    }


def case_name(case: dict) -> str:
    """A test's id."""
    return "-".join([spec_name(spec_of(case)), *(f"{name}={case[name]}" for name in _CHOICES)])


class BackwardTests:
    """``ways``: values of ``deterministic`` that the kernel serves; ``head_dims``: one for each kind of tiles whose
    masks meet blocks differently; ``head_dim_v``: beside them, None for the same."""

    kernel: ClassVar[type[AttentionKernel]]
    arch: ClassVar[SmArch]
    ways: ClassVar[tuple[bool, ...]] = (False, True)
    head_dims: ClassVar[tuple[int, ...]] = (64,)
    head_dim_v: ClassVar[int | None] = None

    def spec(self, *sizes: int, **features: Any) -> InputSpec:
        """(batch, seqlen_q, seqlen_k, heads, heads_kv, head_dim) and the family's head_dim_v."""
        return InputSpec(*sizes, head_dim_v=self.head_dim_v, **features)

    def gradients(self, spec: InputSpec, **options: Any):
        """(gradients, what they should be)."""
        return gradients_of(spec, **{"arch": self.arch.value, "family": self.kernel.family, **options})

    def check(self, spec: InputSpec, inputs: str = "peaked", **options: Any) -> reference.Gradients:
        """The gradients, all within the tolerance."""
        self.config_of(spec)
        return assert_right(spec, inputs, **{"arch": self.arch.value, "family": self.kernel.family, **options})

    def check_ways(self, spec: InputSpec, **options: Any) -> None:
        """With and without ``deterministic``."""
        for deterministic in self.ways:
            self.check(spec, deterministic=deterministic, **options)

    def config_of(self, spec: InputSpec):
        """The kernel's, which has to be what the table gives."""
        problem = problem_of_spec(spec, self.arch, direction=Direction.BACKWARD)
        assert TABLE.lookup(problem, self.kernel.family) is self.kernel
        return self.kernel.configure(problem)

    def run_case(self, case: dict) -> None:
        """One case of a grid, with the race detector."""
        self.check(spec_of(case), race=True, **{name: case[name] for name in _CHOICES}, **case["schedule"])

    def run_case_on_the_gpu(self, case: dict) -> None:
        """The same on the GPU."""
        self.check_on_the_gpu(spec_of(case), **{name: case[name] for name in _CHOICES})

    def check_on_the_gpu(self, spec: InputSpec, inputs: str, deterministic: bool = False, lse_gradient: bool = True):
        """Through torch, with the results of the family's own forward."""
        given = make_inputs(spec, inputs, device="cuda").requiring_gradients()
        dout, dlse = output_gradients(given, seed=1)
        variables = given.variables()
        out, lse = given.run(return_lse=True, family=self.kernel.family, deterministic=deterministic)
        results = ((out, lse), (dout, dlse)) if lse_gradient else ((out,), (dout,))
        grads = reference.Gradients.of(variables, torch.autograd.grad(results[0], list(variables.values()), results[1]))
        tensors = (t.detach() for t in (given.q, given.k, given.v))
        dlse = dlse if lse_gradient else None
        errors = reference.check_gradients(grads, *tensors, dout, dlse, **given.options())
        assert all(error.ok for error in errors.values()), errors

    # tiles of keys have 128
    @pytest.mark.sampled
    @pytest.mark.parametrize("sink_tokens", [1, 29, 127, 128, 129, 320, 10_000])
    def test_sink_inside_touching_and_beyond_the_tile(self, sink_tokens):
        self.check_ways(self.spec(1, 192, 320, 1, 1, 64, window=(100, 0), sink_tokens=sink_tokens))

    @pytest.mark.sampled
    @pytest.mark.parametrize("window", [(0, 0), (1, 64), (127, 0), (300, 2**31 - 2), (2**31 - 2, 0)], ids=str)
    def test_window_edges(self, window):
        self.check_ways(self.spec(1, 150, 260, 1, 1, 64, window=window))

    @pytest.mark.sampled
    @pytest.mark.parametrize("residue", [-2, -1, 0, 1, 2])
    @pytest.mark.parametrize("window", [(None, 0), (128, 0), (64, 64)], ids=str)
    def test_mask_edges_that_meet_tile_edges(self, window, residue):
        """The diagonal and the window's sides pass within two keys of the corner of a tile, on either side."""
        for head_dim in self.head_dims:
            self.check(self.spec(1, 128, 256 + residue, 1, 1, head_dim, window=window))

    @pytest.mark.sampled
    @pytest.mark.parametrize("causal", [False, True])
    @pytest.mark.parametrize("residues", [(0, 0), (1, -1), (-1, 1)])
    def test_lengths_around_the_tiles(self, residues, causal):
        for head_dim in self.head_dims:
            spec = self.spec(1, 128, 128, 1, 1, head_dim, causal=causal)
            c = self.config_of(spec)
            lengths = {"seqlen_q": c.tile_m + residues[0], "seqlen_k": c.tile_n + residues[1]}
            self.check(dataclasses.replace(spec, **lengths), lse_gradient=False)

    @pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(129, 1), (300, 31), (1, 1)])
    @pytest.mark.parametrize("causal", [False, True])
    def test_few_keys(self, seqlen_q, seqlen_k, causal):
        self.check(self.spec(1, seqlen_q, seqlen_k, 1, 1, 64, causal=causal), lse_gradient=False)

    def test_hidden_rows_and_keys_have_no_gradient(self):
        """Causal with more queries than keys: the first 130 queries see nothing; a window hides the first keys."""
        grads = self.check(self.spec(1, 200, 70, 2, 2, 64, causal=True), "random")
        assert (grads.dq[:, :130] == 0).all() and grads.dq[:, 130:].abs().amin((0, 2, 3)).shape == (70,)
        grads = self.check(self.spec(1, 64, 300, 2, 2, 64, window=(20, 0)), "random")
        assert (grads.dk[:, :216] == 0).all() and (grads.dv[:, :216] == 0).all() and (grads.dv[:, 216] != 0).any()

    @pytest.mark.parametrize("logit", [2.0**23, 1.2e7, 1.5e7, 2.0**27])
    def test_logits_beyond_the_whole_numbers_of_fp32(self, logit):
        """Of a single key: P is 1 although the LSE's neighbours are up to 16 apart."""
        dim = self.head_dims[0]
        q = torch.zeros(1, 1, 1, dim, dtype=torch.bfloat16)
        q[..., 0] = 4096.0
        v = torch.ones(1, 1, 1, self.head_dim_v or dim, dtype=torch.bfloat16)
        leaves = [t.clone().requires_grad_() for t in (q, q, v)]
        with cute_fa.simulate(self.arch.value):
            out = cute_fa.flash_attn_func(*leaves, softmax_scale=logit / 2.0**24, family=self.kernel.family)
            dq, dk, dv = torch.autograd.grad(out, leaves, torch.full_like(out, 3.0))
        assert not dq.any() and not dk.any() and (dv == 3.0).all()

    def test_gradients_of_rows_without_keys_ignore_what_comes_in(self):
        """dLSE of rows that see nothing may be NaN, as the gradient of a logarithm of 0 is; dO anything finite."""
        given = make_inputs(self.spec(1, 100, 40, 1, 1, 64, causal=True))
        dout, dlse = output_gradients(given)
        out, lse = reference.attention(given.q, given.k, given.v, **given.options())
        dout[:, :60], dlse[..., :60] = 1e4, torch.nan
        with cute_fa.simulate(self.arch.value):
            call = call_of(given, family=self.kernel.family)
            grads = autograd.attention_backward(dout, dlse, out.bfloat16(), lse, call)
        assert (grads.dq[:, :60] == 0).all() and all(grad.isfinite().all() for grad in grads[:3])

    @pytest.mark.thorough
    def test_deterministic_under_every_schedule(self):
        """Features that sum over CTAs, on as many as run at once and on fewer."""
        spec = self.spec(9, 70, 140, 4, 2, 64, causal=True, alibi=True, learnable_sink=True)
        for deterministic in filter(None, self.ways):
            first, _ = self.gradients(spec, deterministic=deterministic)
            for seed in range(2):
                with ctas_at_a_time(seed + 1):
                    other, _ = self.gradients(spec, deterministic=deterministic, schedule_seed=seed, late=True)
                assert same_bits(first, other)

    @pytest.mark.sampled
    @pytest.mark.parametrize("dim", [0, 1, 2])
    def test_offsets_beyond_32_bits(self, dim):
        """Elements more than 2^31 apart, along the batch, the sequence or the heads; what lies between is never
        touched."""
        given = make_inputs(self.spec(2, 40, 72, 2, 2, 64))
        dout, dlse = output_gradients(given)
        out, lse = reference.attention(given.q, given.k, given.v)
        expected = reference.expected_gradients(given.q, given.k, given.v, dout, dlse)
        q, k, v, out, dout = (far_apart(t, dim) for t in (given.q, given.k, given.v, out.bfloat16(), dout))
        for deterministic in self.ways:
            choices = {"deterministic": deterministic, "family": self.kernel.family}
            call = call_of(dataclasses.replace(given, q=q, k=k, v=v), **choices)
            with cute_fa.simulate(self.arch.value):
                grads = autograd.attention_backward(dout, dlse, out, lse, call)
            assert all(error.ok for error in expected.check(grads).values())


def far_apart(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    """The same numbers with more than 2^31 elements between the first and the last of a dimension."""
    strides = list(tensor.stride())
    strides[dim] = (2**31 + 64) // (tensor.shape[dim] - 1) // 8 * 8 + 8
    reach = 1 + sum(stride * (size - 1) for stride, size in zip(strides, tensor.shape, strict=True))
    assert reach > 2**31
    return torch.empty(reach, dtype=tensor.dtype).as_strided(tensor.shape, strides).copy_(tensor)
