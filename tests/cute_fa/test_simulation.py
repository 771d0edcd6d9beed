"""What ``cute_fa.simulate`` hands on to the simulator."""

import json

import pytest
import torch

import cute_fa
from cute_fa.semantics.errors import ArgumentError


def events(path):
    return json.loads(path.read_text())["traceEvents"]


def test_trace_and_line_information(tmp_path):
    """Kernels compiled with and without line information stay apart, in one process and in the cache."""
    q, k, v = (torch.randn(1, 64, 1, 64).bfloat16() for _ in range(3))
    outs, sources = [], []
    for name, line_info in (("plain", False), ("lines", True), ("again", False)):
        path = tmp_path / f"{name}.json"
        with cute_fa.simulate("sm_80", trace=path, line_info=line_info):
            outs.append(cute_fa.flash_attn_func(q, k, v))
        sources.append({event["args"]["source"] for event in events(path) if "source" in event.get("args", {})})
        assert any("cp.async.wait_group" in event["name"] for event in events(path))
    assert sources[0] == sources[2] == set()
    assert any("fa2_sm80/forward/kernel.py:" in source for source in sources[1])
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


def test_fp8_bits_reach_the_machine():
    with cute_fa.simulate("sm_90a", fp8_bits=14) as simulation:
        assert simulation.fp8_bits == 14
    with cute_fa.simulate("sm_90a") as simulation:
        assert simulation.fp8_bits is None
    for bad in (7, 25, 14.0, True):
        with pytest.raises(ArgumentError, match=f"fp8_bits={bad!r}: 8 to 24"), cute_fa.simulate("sm_90a", fp8_bits=bad):
            pass


def test_arithmetic_reaches_the_machine():
    with cute_fa.simulate("sm_90a", arithmetic="hardware") as simulation:
        assert simulation.arithmetic == "hardware"
    with cute_fa.simulate("sm_90a") as simulation:
        assert simulation.arithmetic == "float32"
    for options, message in (
        ({"arithmetic": "exact"}, "arithmetic='exact': there are float32, hardware, distinct"),
        ({"arithmetic": "distinct", "fp8_bits": 14}, "fp8_bits=14 with arithmetic='distinct'"),
    ):
        with pytest.raises(ArgumentError, match=message), cute_fa.simulate("sm_90a", **options):
            pass
