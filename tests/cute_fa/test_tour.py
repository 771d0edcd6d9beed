"""The tour's layers: their published figures, and that the comparison would notice each feature missing."""

from __future__ import annotations

import re
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import cute_fa
from cute_fa.engine import plan as plans
from cute_fa.engine.recording import config_of
from cute_fa.engine.table import TABLE
from cute_fa.semantics import reference
from cute_fa.semantics.names import canonical_name
from cute_fa.semantics.tensors import TORCH_DTYPES
from cute_fa.semantics.types import SmArch
from cute_fa.tools.inputs import Inputs
from cute_fa.tools.tour import (
    GEMMA2_LOCAL,
    GPT_OSS,
    LAYERS,
    LLAMA3,
    LLAMA3_FP8,
    MISTRAL,
    SIMULATED_LENGTH,
    STREAMING,
    alibi_slopes,
    itinerary,
    layer_inputs,
    layers_of,
)
from cute_fa.tools.tour_keys import tour_configs
from cute_fa.tools.trial import problem_of_spec

# What leaves each feature out, in the reference's options.
_WITHOUT = {
    "window_size": (None, None),
    "sink_tokens": 0,
    "softcap": 0.0,
    "alibi_slopes": None,
    "learnable_sink": None,
    "q_descale": None,
    "k_descale": None,
    "v_descale": None,
}


@pytest.mark.parametrize("layer", (*LAYERS, LLAMA3_FP8), ids=lambda layer: layer.name)
def test_leaving_out_a_feature_is_outside_tolerance(layer):
    inputs = layer_inputs(layer, SIMULATED_LENGTH)
    options = inputs.options()
    expected = reference.expected(inputs.q, inputs.k, inputs.v, **options)
    used = [name for name, off in _WITHOUT.items() if torch.is_tensor(options[name]) or options[name] != off]
    for name in used:
        changed = reference.attention(inputs.q, inputs.k, inputs.v, **{**options, name: _WITHOUT[name]})
        assert not expected.check(*changed).ok, name
    if layer.window is not None:
        left, right = options["window_size"]
        for wrong in (left - 1, left + 1):
            changed = {**options, "window_size": (wrong, right)}
            comparison = expected.check(*reference.attention(inputs.q, inputs.k, inputs.v, **changed))
            assert not comparison.ok, f"left bound {wrong}"


def test_the_text_gives_scores_with_structure():
    inputs = layer_inputs(LLAMA3, SIMULATED_LENGTH)
    q, k = inputs.q[0, :, 0].float(), inputs.k[0, :, 0].float()
    scores = (q @ k.T / 128**0.5).tril()
    largest = torch.softmax(scores.masked_fill(~torch.ones_like(scores).tril().bool(), -torch.inf), -1).amax(-1)
    # White noise of unit variance would give about 0.05 here.
    assert largest[64:].mean() > 0.2


def test_inputs_are_reproducible_and_follow_the_text():
    first, second = (layer_inputs(GPT_OSS, 100) for _ in range(2))
    assert torch.equal(first.k, second.k)
    longer = layer_inputs(GPT_OSS, 120)
    assert torch.equal(longer.v[:, :100], first.v)  # no byte knows a later one


def test_windows_scale_only_where_they_would_hide_nothing():
    assert MISTRAL.window_at(MISTRAL.length) == 4096
    assert MISTRAL.window_at(320) == 4096 * 320 // 16384
    assert MISTRAL.mask(320) == "causal, window 4096 → 80 at this length"
    assert GPT_OSS.window_at(320) == 128
    assert STREAMING.mask(8192) == "causal, sink 4, window 2044"


def test_a_window_counts_the_query_itself():
    assert GPT_OSS.spec(320).window == (127, None)
    assert GEMMA2_LOCAL.spec(8192).window == (4095, None)


def test_slopes_are_the_published_ones():
    assert alibi_slopes(32)[[0, 31]].tolist() == pytest.approx([2**-0.25, 2**-8])
    with pytest.raises(ValueError, match="24 heads"):
        alibi_slopes(24)


def test_every_layer_is_visited():
    stops = itinerary()
    assert {stop.layer for stop in stops} - {LLAMA3_FP8} == set(LAYERS)
    if stops[0].machine.simulated:
        assert {stop.machine.arch.value for stop in stops} == {"sm_80", "sm_90a", "sm_100a"}
        for arch in (SmArch.SM_90A, SmArch.SM_100A):
            layers = {stop.layer for stop in stops if stop.machine.arch is arch}
            assert {layer.head_dim for layer in layers} == {64, 128, 256} and LLAMA3_FP8 in layers
            for feature in ("window", "sink_tokens", "softcap", "learnable_sink"):
                assert {bool(getattr(layer, feature)) for layer in layers} == {False, True}


def test_the_documentation_shows_the_present_tour(monkeypatch):
    monkeypatch.setattr("cute_fa.tools.tour.gpu_arch", lambda: None)
    page = Path(__file__).parents[2].joinpath("docs", "tour.md").read_text()
    shown = re.findall(r"│ (.+?), \d+/\d+ heads +│ (\w+) .*\n│ (.+?) +│ simulated .*\n│ (fa\w+)", page)
    expected = []
    for stop in itinerary():
        problem = problem_of_spec(stop.layer.spec(stop.length), stop.machine.arch)
        name = canonical_name(TABLE.lookup(problem), problem)
        expected.append((stop.layer.name, stop.machine.arch.value, stop.mask, name))
    assert shown == expected


def test_more_text_than_there_is():
    with pytest.raises(ValueError, match="the text has 45325 bytes"):
        layer_inputs(replace(LLAMA3, heads=1, heads_kv=1), 10**5)


@pytest.mark.parametrize("arch", [SmArch.SM_80, SmArch.SM_90A, SmArch.SM_100A], ids=lambda arch: arch.value)
def test_the_kernels_that_bundles_have_of_it_are_those_that_it_launches(tmp_path, monkeypatch, arch):
    """Each layer at full length, forward and backward, up to the launch; the memory is never touched."""
    monkeypatch.setattr(plans, "compiled", lambda config: types.SimpleNamespace(launch=lambda arguments: None))
    monkeypatch.setattr(plans, "PLANS", {})
    with cute_fa.simulate(arch), cute_fa.record_keys(tmp_path / "keys"):
        for layer in layers_of(arch):
            sizes = (
                (1, layer.length, heads, layer.head_dim) for heads in (layer.heads, layer.heads_kv, layer.heads_kv)
            )
            fp8 = layer.dtype.is_fp8
            q, k, v = (torch.empty(size, dtype=torch.bfloat16, requires_grad=not fp8) for size in sizes)
            slopes = alibi_slopes(layer.heads) if layer.alibi else None
            sink = torch.zeros(layer.heads, requires_grad=True) if layer.learnable_sink else None
            descales = {}
            if fp8:
                q, k, v = (t.to(TORCH_DTYPES[layer.dtype]) for t in (q, k, v))
                descales = {f"{name}_descale": torch.ones(1, layer.heads_kv) for name in "qkv"}
            inputs = Inputs(layer.spec(layer.length), q, k, v, alibi_slopes=slopes, learnable_sink=sink, **descales)
            out = inputs.run(num_splits=1)
            if not fp8:
                torch.autograd.grad(out, (q, k, v), torch.empty_like(out))
    recorded = [config_of(line) for line in (tmp_path / "keys").read_text().splitlines()]
    assert recorded == tour_configs(arch)
    assert len(recorded) == 15 and sum(config.dtype.is_fp8 for config in recorded) == 1
