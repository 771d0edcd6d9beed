"""Tiles by cluster launch control: whatever order the hardware hands them out in, which no document promises."""

from __future__ import annotations

from collections import deque

import pytest

from cute_fa.semantics import reference
from cute_fa.tools.inputs import InputSpec, make_inputs
from ptxsim.host import launches
from tests.testing.simulated import call

PACKED = InputSpec(
    batch=6,
    seqlen_q=600,
    seqlen_k=130,
    heads=1,
    heads_kv=1,
    varlen_q=True,
    varlen_k=True,
    lengths_q=(600, 1, 300, 0, 257, 2),
    lengths_k=(130, 129, 100, 5, 1, 64),
)
DENSE = InputSpec(batch=3, seqlen_q=600, seqlen_k=130, heads=1, heads_kv=1)


class LastFirst(deque):
    """Clusters that wait, of which the last one is launched or handed out first."""

    def popleft(self):
        return self.pop()


@pytest.mark.parametrize("spec", [DENSE, PACKED], ids=["dense", "packed"])
def test_tiles_in_reverse_order(spec: InputSpec, monkeypatch):
    given = make_inputs(spec, "peaked")
    monkeypatch.setattr(launches, "deque", LastFirst)
    out, lse, simulated = call(given, "sm_100a", {"num_sms": 2}, family="fa4")
    assert simulated.launches[-1].grid[0] > 2
    assert reference.check(out, lse, given.q, given.k, given.v, **given.options()).ok
