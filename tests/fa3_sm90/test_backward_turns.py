"""Deterministic gradients on sm_90a: tiles of keys add to dQ in order, whatever runs when, and none waits for ever."""

import pytest
import torch

import cute_fa
from cute_fa.engine.autograd import attention_backward
from cute_fa.semantics.types import DType
from cute_fa.tools.inputs import InputSpec, make_inputs
from ptxsim import Observer
from tests.testing.gradients import assert_right, call_of, gradients_of, same_bits
from tests.testing.simulated import ctas_at_a_time
from tests.testing.turns import Turns

MASKS = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window": (70, 30)},
    "sink": {"window": (40, 0), "sink_tokens": 5},
    "sinks of two tiles": {"window": (90, None), "sink_tokens": 200},
    "no left bound": {"window": (None, 90)},
}

FA3 = {"arch": "sm_90a", "family": "fa3"}


def spec_of(head_dim: int = 64, **changes) -> InputSpec:
    sizes = {"batch": 1, "seqlen_q": 200, "seqlen_k": 500, "heads": 2, "heads_kv": 1}
    return InputSpec(**sizes | {"head_dim": head_dim} | changes)


class Waves(Observer):
    """How many CTAs each wave has."""

    def __init__(self):
        self.ctas = []

    def end(self, machine, error):
        self.ctas.append(machine.wave.nctas)


def test_so_many_ctas_run_at_a_time():
    """What the tests below say of few SMs: a launch of four tiles of keys on three."""
    q, k = (torch.randn(1, length, 1, 64, dtype=torch.bfloat16, requires_grad=True) for length in (100, 500))
    with ctas_at_a_time(3), cute_fa.simulate("sm_90a") as simulation:
        out = cute_fa.flash_attn_func(q, k, k, deterministic=True)
        waves = Waves()
        simulation.observers.append(waves)
        out.backward(torch.randn_like(out))
    assert waves.ctas == [1, 3, 1, 1]  # statistics, the tiles of keys, dQ


@pytest.mark.sampled
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_right_on_one_sm(head_dim, mask):
    """A tile whose turn never came would wait for ever: the simulator says so."""
    with ctas_at_a_time(1):
        assert_right(spec_of(head_dim, **MASKS[mask]), "peaked", **FA3, deterministic=True)


@pytest.mark.sampled
@pytest.mark.parametrize("mask", MASKS)
def test_same_bits_under_every_schedule(mask):
    spec = spec_of(**MASKS[mask])
    first, _ = gradients_of(spec, **FA3, deterministic=True)
    for seed, sms in enumerate((2, 3, 16)):
        with ctas_at_a_time(sms):
            other, _ = gradients_of(spec, **FA3, deterministic=True, schedule_seed=seed, late=seed > 0)
        assert same_bits(first, other)


def test_packed_sequences_with_empty_ones():
    lengths = {"lengths_q": (130, 0, 257, 5), "lengths_k": (300, 40, 0, 129)}
    spec = spec_of(batch=4, varlen_q=True, varlen_k=True, causal=True, seqlen_q=257, seqlen_k=300, **lengths)
    with ctas_at_a_time(2):
        assert_right(spec, "peaked", **FA3, deterministic=True, race=True)


def test_without_turns_the_order_shows():
    """What deterministic=True is there for: without it another schedule gives other bits, of dQ alone."""
    spec = spec_of(seqlen_k=1000, dtype=DType.FP16)
    first, _ = gradients_of(spec, **FA3)
    others = [gradients_of(spec, **FA3, schedule_seed=seed)[0] for seed in range(3)]
    assert any(not torch.equal(first.dq, other.dq) for other in others)
    assert all(torch.equal(first.dk, other.dk) and torch.equal(first.dv, other.dv) for other in others)


@pytest.mark.sampled
@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_turn_is_taken_before_the_additions_and_passed_on_behind_them(head_dim):
    turns, given = Turns(), make_inputs(spec_of(head_dim))
    out, lse = torch.zeros_like(given.q), torch.zeros(1, 2, 200)
    with cute_fa.simulate("sm_90a") as simulation:
        simulation.observers.append(turns)
        attention_backward(out, None, out, lse, call_of(given, deterministic=True, family="fa3"))
    steps = 2 * 4 * -(-200 // (128 if head_dim == 64 else 64))  # two heads, four tiles of keys
    assert turns.passed == steps <= turns.taken and turns.faults == []
