"""range_attention in torch's modes: inference, autocast, deterministic algorithms, torch.func; and arguments that are
refused by what the caller called them."""

import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import cute_fa
from cute_fa import RangePlan, range_attention
from cute_fa.api import ready_plans
from cute_fa.semantics import reference
from cute_fa.semantics.errors import ArgumentError, DTypeError, NoBackwardError, RangeError, ShapeError, StrideError
from cute_fa.semantics.ranges import HostRanges

HEADS, HEADS_KV = 4, 2
STREAMING = ready_plans.streaming_llm(150, 150, 4, 32)
DOCUMENTS = ready_plans.causal_documents([50, 70, 30])


def tensors(head_dim: int = 64) -> list[torch.Tensor]:
    """q, k, v and dout."""
    rng = torch.Generator().manual_seed(0)
    return [torch.randn(150, h, head_dim, generator=rng).bfloat16() for h in (HEADS, HEADS_KV, HEADS_KV, HEADS)]


def gradients(q, k, v, dout, between=None, **given) -> tuple[torch.Tensor, ...]:
    """Of q, k and v; ``between`` is called before the backward."""
    inputs = [tensor.clone().requires_grad_() for tensor in (q, k, v)]
    out = range_attention(*inputs, **given)
    if between is not None:
        between()
    return torch.autograd.grad(out, inputs, dout)


def close(host: HostRanges, grads: tuple[torch.Tensor, ...], q, k, v, dout) -> bool:
    """Whether gradients are those of attention with the dense mask."""
    inputs = [tensor.float().requires_grad_() for tensor in (q, k, v)]
    k_all, v_all = (tensor.repeat_interleave(HEADS // HEADS_KV, 1) for tensor in inputs[1:])
    scores = torch.einsum("ihd,jhd->hij", inputs[0], k_all) * q.shape[-1] ** -0.5
    hidden = ~torch.from_numpy(host.mask())
    out = torch.einsum("hij,jhd->ihd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v_all)
    right = torch.autograd.grad(out, inputs, dout.float())
    return all((a.float() - b).abs().amax() < 0.05 for a, b in zip(grads, right, strict=True))


@pytest.fixture
def algorithms():
    """Restores whether algorithms are deterministic."""
    yield torch.use_deterministic_algorithms
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("host", [STREAMING, DOCUMENTS], ids=["native", "simple"])
def test_a_plan_first_used_in_inference_mode_trains(host):
    q, k, v, dout = tensors()
    with cute_fa.simulate("sm_80"):
        with torch.inference_mode():
            plan = RangePlan.build(host)
            range_attention(q, k, v, plan=plan)
        assert close(host, gradients(q, k, v, dout, plan=plan), q, k, v, dout)


@pytest.mark.sampled
@pytest.mark.parametrize("head_dim", [64, 256])
def test_deterministic_algorithms_between_the_forward_and_the_backward(head_dim, algorithms):
    """The forward decides, since it makes the walks; those that there are not are asked for by name."""
    given = tensors(head_dim)
    with cute_fa.simulate("sm_80"):
        plan = RangePlan.build(STREAMING)
        algorithms(True)
        grads = gradients(*given, plan=plan, between=lambda: algorithms(False))
        assert close(STREAMING, grads, *given)
        assert torch.equal(grads[0], gradients(*given, plan=plan, deterministic=True)[0])
        message = r"deterministic=True with a range plan: ask for it, .* before the forward"
        with pytest.raises(NoBackwardError, match=message):
            gradients(*given, plan=RangePlan.build(STREAMING), between=lambda: algorithms(True))


@pytest.mark.parametrize("host", [STREAMING, DOCUMENTS], ids=["native", "simple"])
def test_autocast(host):
    q, k, v, dout = tensors()
    with cute_fa.simulate("sm_80"):
        plan = RangePlan.build(host)
        with torch.autocast("cpu", torch.bfloat16):
            out, lse = range_attention(q.float(), k, v.float(), plan=plan, return_lse=True)
            grads = gradients(q.float(), k.float(), v.float(), dout, plan=plan)
    ranges = dict(
        zip(
            ("q_ranges", "k_ranges", "attn_type_map"),
            map(torch.from_numpy, (host.q_ranges, host.k_ranges, host.types)),
            strict=True,
        )
    )
    assert reference.check(out[None], lse[None], q[None], k[None], v[None], **ranges).ok
    assert [grad.dtype for grad in grads] == 3 * [torch.float32] and close(host, grads, q, k, v, dout)


def test_a_plan_first_used_in_a_transform_is_made_anew():
    q, k, v, dout = tensors()
    with cute_fa.simulate("sm_80"):
        plan = RangePlan.build(STREAMING)
        with pytest.raises(NoBackwardError, match=re.escape("inside a transform of torch.func")):
            torch.func.grad(lambda x: range_attention(x, k, v, plan=plan).sum())(q)
        # q is not what is differentiated
        torch.func.grad(lambda x: x.sum() + range_attention(q, k, v, plan=plan).sum().detach())(torch.zeros(1))
        assert not plan.walks_made
        assert close(STREAMING, gradients(q, k, v, dout, plan=plan), q, k, v, dout)


def test_a_plan_first_used_with_fake_tensors_is_made_anew():
    """Nothing is read of tensors without values, and no walk without values is kept."""
    q, k, v, _ = tensors()
    ranges = [torch.from_numpy(array) for array in (STREAMING.q_ranges, STREAMING.k_ranges, STREAMING.types)]
    with cute_fa.simulate("sm_80"):
        plan = RangePlan.build(STREAMING)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fakes = [mode.from_tensor(tensor) for tensor in (q, k, v)]
            assert range_attention(*fakes, plan=plan).shape == q.shape
            assert range_attention(*fakes, *map(mode.from_tensor, ranges)).shape == q.shape
        assert not plan.walks_made
        right = range_attention(q, k, v, plan=plan)
        for given in ((q, k, v), (q, k, v, *ranges)):

            class Attention(torch.nn.Module):
                def forward(self, *tensors):
                    return range_attention(*tensors, plan=RangePlan.build(STREAMING) if len(tensors) == 3 else None)

            assert torch.equal(torch.export.export(Attention(), given).module()(*given), right)


def test_errors_show_what_the_caller_gave():
    """Shapes without a batch, and names of range_attention's own arguments."""
    q, k, v, _ = tensors()
    with cute_fa.simulate("sm_80") as simulation:
        plan = RangePlan.build(STREAMING)
        for tensors_given, more, error, message in (
            ((q, k, v[:, :1]), {}, ShapeError, "v (150, 1, 64) and k (150, 2, 64): all sizes but the last"),
            ((q, k, v[:100]), {}, ShapeError, "v (100, 2, 64) and k (150, 2, 64): all sizes but the last"),
            ((q.repeat(1, 1, 2)[..., ::2], k, v), {}, StrideError, "q has strides (512, 128, 2)"),
            ((q[:, :0], k, v), {}, ShapeError, "q (150, 0, 64): num_heads=0"),
            ((q.float(), k, v), {}, DTypeError, "q is float32: float16 or bfloat16 is needed"),
            ((q.int(), k, v), {}, DTypeError, "q is int32: float16 or bfloat16 is needed"),
            ((q, k, v), {"return_lse": 3}, ArgumentError, "return_lse=3: True or False"),
            ((q, k, v), {"sink": torch.zeros(2, 3)}, ShapeError, "sink (2, 3): (logits, 4) is needed for the 4 heads"),
            ((q, k, v), {"sink": torch.zeros(2, 4).int()}, DTypeError, "sink is int32: float32 is needed"),
        ):
            with pytest.raises(error, match="^" + re.escape(message)):
                range_attention(*tensors_given, plan=plan, **more)
        assert not simulation.launches  # before anything runs


def test_arguments_of_build_that_are_none():
    pair, totals = [[0, 1]], {"total_q": 1, "total_k": 1}
    for given, error, message in (
        ({"q_ranges": STREAMING, "k_ranges": pair}, ArgumentError, "k_ranges with a HostRanges for q_ranges"),
        ({"q_ranges": STREAMING, "total_q": 99}, ArgumentError, "total_q with a HostRanges for q_ranges"),
        ({"q_ranges": STREAMING, "mask_capacity": "3"}, ArgumentError, "mask_capacity='3': an int is needed"),
        ({"q_ranges": STREAMING, "mask_capacity": 2.5}, ArgumentError, "mask_capacity=2.5: an int is needed"),
        ({"q_ranges": STREAMING, "mask_capacity": 0}, ArgumentError, "mask_capacity=0: at least 1 is needed"),
        ({"q_ranges": None, **totals}, ArgumentError, "q_ranges is missing"),
        ({"q_ranges": pair, **totals}, ArgumentError, "k_ranges is missing"),
        ({"q_ranges": [[0, 1], [1]], "k_ranges": pair, **totals}, ShapeError, "q_ranges=[[0, 1], [1]]: all its rows"),
    ):
        with pytest.raises(error, match="^" + re.escape(message)):
            RangePlan.build(**given)


def test_segment_offsets_on_the_device_are_checked():
    """As those that the host knows, ranges numbered as they were given."""
    q, k, v, _ = tensors()
    given = {
        "q_ranges": [[0, 75], [75, 150]],
        "k_ranges": [[0, 10], [20, 30], [40, 150]],
        "attn_type_map": [0, 1],
        "segment_offsets": [0, 2, 3],
    }
    with cute_fa.simulate("sm_80"):
        for changes, message in (
            ({"segment_offsets": [-1, 2, 3]}, "segment_offsets[0]=-1: between 0 and the 3 k_ranges"),
            ({"segment_offsets": [0, 1, 9]}, "segment_offsets[2]=9: between 0 and the 3 k_ranges"),
            ({"segment_offsets": [0, 5, 3]}, "segment_offsets goes from 5 to 3 at 2: offsets never decrease"),
            ({"q_ranges": [[0, 75], [75, 151]]}, "q_ranges[1]=(75, 151): between 0 and the 150 queries"),
            ({"attn_type_map": [0, 3]}, "attn_type_map[1]=3: one of 0 (full), 1 (causal)"),
        ):
            plan = {name: torch.as_tensor(value).int() for name, value in (given | changes).items()}
            with pytest.raises(RangeError, match="^" + re.escape(message)):
                range_attention(q, k, v, **plan)
