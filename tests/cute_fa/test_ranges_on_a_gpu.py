"""Range plans on a GPU: attention, its gradients, a graph that makes its plan, and that nothing synchronises."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch

from cute_fa import RangePlan, range_attention
from cute_fa.semantics import reference
from cute_fa.semantics.types import DType
from cute_fa.tools.inputs import Inputs, InputSpec, draw_ranges, make_inputs, output_gradients

if TYPE_CHECKING:
    from collections.abc import Iterator

SPECS = {
    "d64": InputSpec(1, 700, 900, 4, 2, 64, ranges=40),
    "d128, one range": InputSpec(1, 300, 300, 2, 1, 128, ranges=1),
    "d128, 1000 ranges": InputSpec(1, 2000, 1500, 2, 2, 128, dtype=DType.FP16, ranges=1000, learnable_sink=True),
    "d256, softcap": InputSpec(1, 300, 500, 2, 1, 256, ranges=9, softcap=20.0),
    "d192v128, positions": InputSpec(1, 300, 400, 2, 2, 192, 128, ranges=12, alibi=True, positions=True),
    "d80": InputSpec(1, 129, 333, 8, 1, 80, ranges=12, layout="padded"),
}
SMALL = replace(SPECS["d64"], seqlen_q=300, seqlen_k=400, ranges=12)


def ranges_of(given: Inputs) -> tuple[torch.Tensor, ...]:
    return given.q_ranges, given.k_ranges, given.attn_type_map


def totals_of(given: Inputs) -> dict[str, int]:
    return {"total_q": given.spec.seqlen_q, "total_k": given.spec.seqlen_k}


@pytest.mark.gpu
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("case", SPECS)
def test_attention_and_its_gradients(case, deterministic):
    given = make_inputs(SPECS[case], "peaked", device="cuda").requiring_gradients()
    dout, dlse = output_gradients(given, seed=1)
    variables = given.variables()
    out, lse = given.run(return_lse=True, deterministic=deterministic)
    grads = torch.autograd.grad((out, lse), list(variables.values()), (dout, dlse))
    tensors = [t.detach() for t in (given.q, given.k, given.v)]
    comparison = reference.check(out.detach(), lse.detach(), *tensors, **given.options())
    assert comparison.ok, comparison
    gradients = reference.Gradients.of(variables, grads)
    errors = reference.check_gradients(gradients, *tensors, dout, dlse, **given.options())
    assert all(error.ok for error in errors.values()), errors


@pytest.mark.gpu
@pytest.mark.parametrize("deterministic", [False, True])
def test_a_graph_makes_its_plan_anew(deterministic):
    """Captured: the plan, attention and the gradients. A replay sees what the tensors of ranges hold then."""
    given = make_inputs(SMALL, "random", device="cuda").requiring_gradients()
    dout, _ = output_gradients(given, seed=1)
    leaves = [given.q, given.k, given.v]

    def step() -> tuple[torch.Tensor, ...]:
        plan = RangePlan.build(*ranges_of(given), **totals_of(given))
        q, k, v = (leaf[0] for leaf in leaves)
        out, lse = range_attention(q, k, v, plan=plan, deterministic=deterministic, return_lse=True)
        return out[None], lse[None], *torch.autograd.grad(out, leaves, dout[0])

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # so that autograd's streams are known before the capture
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse, *grads = step()
    tensors = [t.detach() for t in leaves]
    for seed in (0, 7, 8):
        for tensor, drawn in zip(ranges_of(given), draw_ranges(SMALL, seed), strict=True):
            tensor.copy_(drawn)
        graph.replay()
        comparison = reference.check(out.detach(), lse.detach(), *tensors, **given.options())
        assert comparison.ok, (seed, comparison)
        gradients = reference.Gradients(*grads, None, None)
        errors = reference.check_gradients(gradients, *tensors, dout, **given.options())
        assert all(error.ok for error in errors.values()), (seed, errors)


@contextmanager
def synchronising_is_an_error() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.gpu
@pytest.mark.parametrize(("deterministic", "segments"), [(False, 1), (True, 1), (False, 3)])
def test_nothing_synchronises(deterministic, segments):
    """Neither building a plan, also of several key segments a query range, nor attention nor its gradients; torch's
    mode for that notices what does."""
    given = make_inputs(SMALL, "random", device="cuda").requiring_gradients()
    leaves = [given.q, given.k, given.v]
    q_ranges, k_ranges, types = ranges_of(given)
    ranges = q_ranges[::segments].contiguous(), k_ranges, types[::segments].contiguous()
    offsets = torch.arange(0, len(q_ranges) + 1, segments, dtype=torch.int32, device="cuda")

    def step() -> torch.Tensor:
        plan = RangePlan.build(*ranges, segment_offsets=offsets, **totals_of(given))
        out = range_attention(*(leaf[0] for leaf in leaves), plan=plan, deterministic=deterministic)
        return torch.autograd.grad(out, leaves, torch.ones_like(out))[0]

    first = step()  # loads the kernels
    with synchronising_is_an_error():
        second = step()
        with pytest.raises(RuntimeError, match="synchroniz"):
            second.sum().item()
    torch.testing.assert_close(second, first, atol=0.02, rtol=0.02)
