"""The FA3 backward under adversarial schedules: warps in seeded orders, copies as late as is legal, few SMs."""

import functools
import itertools

import pytest
import torch

from cute_fa.semantics.types import DType
from cute_fa.tools.inputs import InputSpec
from tests.testing.gradients import gradients_of, same_bits
from tests.testing.simulated import ctas_at_a_time

PACKED = {"varlen_q": True, "varlen_k": True, "lengths_q": (450, 0, 70), "lengths_k": (300, 60, 0)}
# Rings of two stages that run full and over, in several heads; tiles without queries and without keys. Tiles of 128
# queries, and of 64 whose dQ has half a panel a warpgroup and a whole one.
SPECS = {
    "128 queries": InputSpec(1, 400, 300, 3, 1, 64, causal=True, alibi=True, learnable_sink=True),
    "128 queries, packed": InputSpec(3, 450, 300, 2, 1, 64, window=(150, 20), dtype=DType.FP16, **PACKED),
    "half a panel": InputSpec(1, 330, 260, 2, 2, 64, head_dim_v=128, window=(None, 9)),
    "whole panels": InputSpec(3, 450, 300, 2, 1, 128, causal=True, softcap=15.0, **PACKED),
}
# How many CTAs run at a time, and how.
SCHEDULES = [
    (64, {"late": True}),
    (64, {"schedule_seed": 1}),
    (1, {"late": True, "schedule_seed": 2}),
    (2, {"late": True, "schedule_seed": 3}),
    (3, {"schedule_seed": 4}),
]


@functools.cache
def usual(name: str):
    """The gradients under the usual schedule, found right."""
    grads, expected = gradients_of(SPECS[name], "peaked", arch="sm_90a", family="fa3", race=True)
    assert all(error.ok for error in expected.check(grads).values())
    return grads, expected


@pytest.mark.sampled
@pytest.mark.parametrize(("sms", "schedule"), SCHEDULES, ids=str)
@pytest.mark.parametrize("name", SPECS)
def test_right_and_all_but_dq_of_the_same_bits(name, sms, schedule):
    """dQ is summed in the order in which the tiles of keys come."""
    first, expected = usual(name)
    with ctas_at_a_time(sms):
        grads, _ = gradients_of(SPECS[name], "peaked", arch="sm_90a", family="fa3", race=True, **schedule)
    errors = expected.check(grads)
    assert all(error.ok for error in errors.values()), errors
    assert same_bits(first._replace(dq=grads.dq), grads)


@pytest.mark.sampled
@pytest.mark.parametrize("name", SPECS)
def test_dq_of_the_same_bits_where_one_tile_runs_at_a_time(name):
    """What a tile adds to dQ is always the same."""
    schedules = [{}, {"late": True, "schedule_seed": 1}, {"schedule_seed": 2}]
    with ctas_at_a_time(1):
        runs = [gradients_of(SPECS[name], "peaked", arch="sm_90a", family="fa3", **s)[0] for s in schedules]
    assert all(torch.equal(a.dq, b.dq) for a, b in itertools.pairwise(runs))
