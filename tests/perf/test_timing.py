"""Timing with a made-up clock: order, warm-up, quantiles, ceilings."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from perf.timing import Ceilings, Effort, Timing, measure_ceilings, time_interleaved
from perf.workload import Work
from tests.testing.clock import FakeDevice


class Named:
    """A call that can be told from others."""

    def __init__(self, name: str, buffers: int):
        self.name, self.buffers, self.count = name, buffers, 0

    def __call__(self):
        self.count += 1

    def __repr__(self):
        return f"{self.name}{self.buffers}"


def test_rounds_hold_every_callable_once_and_rotate_buffers_and_order():
    device = FakeDevice()
    calls = {name: [Named(name, buffers) for buffers in range(2)] for name in "abc"}
    timings = time_interleaved(device, calls, Effort(budget_ms=6, least=1, most=50))
    # a call takes 1 ms of the budget's six: six rounds behind two of warm-up
    assert {name: len(timing.samples) for name, timing in timings.items()} == dict.fromkeys("abc", 6)
    runs = [call for kind, call in device.log if kind == "run"]
    assert sorted(map(repr, runs)) == ["a0", "a1", "b0", "b1", "c0", "c1"]
    rounds = [calls for kind, calls in device.log if kind == "time"]
    assert [[repr(call) for call in round_] for round_ in rounds[2:6]] == [
        ["a0", "b0", "c0"],
        ["b1", "c1", "a1"],
        ["c0", "a0", "b0"],
        ["a1", "b1", "c1"],
    ]
    assert Counter(round_[0].name for round_ in rounds[2:]) == {"a": 2, "b": 2, "c": 2}


def test_samples_belong_to_the_callable_whatever_the_order():
    cost = {"fast": 1.0, "slow": 5.0}
    device = FakeDevice(lambda call, number: cost[call.name] + 0.01 * number)
    calls = {name: [Named(name, 0)] for name in cost}
    timings = time_interleaved(device, calls, Effort(budget_ms=50, least=1, most=100))
    assert all(1.0 <= time < 2.0 for time in timings["fast"].samples)
    assert all(5.0 <= time < 6.0 for time in timings["slow"].samples)
    # ten calls of the slowest fit; the first of the four warm-up calls are not among the samples
    assert len(timings["slow"].samples) == 9
    assert min(timings["fast"].samples) == pytest.approx(1.04)


@pytest.mark.parametrize(("slowest_ms", "rounds"), [(0.001, 100), (1.0, 50), (30.0, 10), (0.0, 100)])
def test_effort_is_bounded(slowest_ms, rounds):
    assert Effort(budget_ms=50, least=10, most=100).rounds(slowest_ms) == rounds


def test_quantiles():
    timing = Timing((5.0, 1.0, 2.0, 4.0, 3.0, 11.0))
    assert (timing.quantile(20), timing.median, timing.quantile(80)) == (2.0, 3.5, 5.0)


def test_no_callables_take_no_time():
    device = FakeDevice()
    assert time_interleaved(device, {}, Effort()) == {}


def test_ceilings_are_the_best_product_and_the_bytes_of_a_copy():
    """128³ at 1 ms, 256³ at 2 ms; 2²² bytes copied in 1 ms."""
    sizes = []

    def duration(call, number):
        out = call()
        sizes.append(out.shape)
        return 2.0 if out.shape[-1] == 256 else 1.0

    ceilings = measure_ceilings(FakeDevice(duration), [torch.bfloat16], Effort(least=1), sizes=(128, 256))
    assert ceilings.tflops == {torch.bfloat16: pytest.approx(2 * 256**3 / 2e-3 / 1e12)}
    assert ceilings.gbps == pytest.approx(2 * 2**22 / 1e-3 / 1e9)
    assert {tuple(size) for size in sizes} == {(2**20,), (128, 128), (256, 256)}


def test_roofline_is_the_slower_of_both_ceilings():
    ceilings = Ceilings({torch.bfloat16: 800.0}, gbps=4000.0)
    compute = ceilings.roofline(Work(pairs=0, flops=8 * 10**12, bytes=10**9), torch.bfloat16)
    assert compute == (pytest.approx(10.0), "compute")
    memory = ceilings.roofline(Work(pairs=0, flops=8 * 10**9, bytes=4 * 10**9), torch.bfloat16)
    assert memory == (pytest.approx(1.0), "memory")
