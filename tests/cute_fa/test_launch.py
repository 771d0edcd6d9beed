"""The launch path: what is prepared once for a description, and what each call puts in its place."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

import cute_fa
from cute_fa.engine import attention as engine
from cute_fa.engine import plan as plans
from cute_fa.engine.contract import AttentionTensors
from cute_fa.semantics.call import Extras
from cute_fa.semantics.errors import CuteFaError
from fa2_sm80.forward.entry import Fa2Forward


def tensors(count: int) -> list[torch.Tensor]:
    return [torch.full((2,), float(i)) for i in range(count)]


def test_packing_puts_tensors_in_their_places():
    a, b, c, d = tensors(4)
    pack = plans.packer((b, None, (c, 3, (a, a)), 1.5, (1, 2), a, (b, None)), (a, b, c))
    assert pack((b, c, d)) == (c, None, (d, 3, (b, b)), 1.5, (1, 2), b, (c, None))


@pytest.mark.parametrize("nested", [False, True])
def test_tensors_of_another_origin_are_not_kept(nested):
    a, b, c = tensors(3)
    foreign = (b, a.expand(2)) if nested else b
    assert plans.packer((a, foreign, 1), (a, c)) is None


def test_arguments_are_those_of_the_kernel_in_every_call(monkeypatch):
    """Packed lengths and per-batch slopes: tensors at all levels of the arguments."""
    launched, asked = [], []
    arguments = Fa2Forward.arguments

    def counted(problem, config, tensors, num_sms):
        asked.append(num_sms)
        return arguments(problem, config, tensors, num_sms)

    monkeypatch.setattr(Fa2Forward, "arguments", counted)
    monkeypatch.setattr(plans, "PLANS", {})
    kernel = type("Kernel", (), {"launch": lambda self, args: launched.append(args)})()
    monkeypatch.setattr(plans, "compiled", lambda config: kernel)
    offsets = torch.tensor([0, 3, 8], dtype=torch.int32)
    options = dict(max_seqlen_q=5, max_seqlen_k=5, causal=True, softcap=2.0, family="fa2")

    def call(slopes_shape):
        # One tensor as q, k and v in the first call, three in the second.
        same = torch.randn(8, 2, 16, dtype=torch.bfloat16)
        slopes = torch.rand(slopes_shape)
        for q, k, v in ((same, same, same), [torch.randn_like(same) for _ in range(3)]):
            out, lse = cute_fa.flash_attn_varlen_func(
                q, k, v, offsets, offsets.clone(), alibi_slopes=slopes, return_lse=True, **options
            )
            yield AttentionTensors(q, k, v, out, lse, Extras(offsets, alibi_slopes=slopes)), launched[-1]

    with cute_fa.simulate("sm_80", num_sms=7):
        for given, (common, seqlen_q) in call((2, 2)):
            assert [common[i] is given[i] for i in range(5)] == [True] * 5
            assert common[5][0] is offsets and common[7] is given.extras.alibi_slopes
            assert common[10:] == (2.0, None, None, (None, None, None), None, None, None) and seqlen_q == 5
        assert asked == [7]
        # Slopes of all sequences alike are expanded, in each call its own.
        for given, (common, _) in call((2,)):
            assert common[7].data_ptr() == given.extras.alibi_slopes.data_ptr()
            assert common[0] is given.q and common[1] is given.k
        assert asked == [7, 7]


def test_plans_hold_no_tensors(monkeypatch):
    monkeypatch.setattr(plans, "PLANS", {})
    q = torch.randn(1, 8, 2, 16, dtype=torch.bfloat16)
    with cute_fa.simulate("sm_80"):
        cute_fa.flash_attn_func(q, q, q)
    for plan in plans.PLANS.values():
        assert not any(isinstance(value, torch.Tensor) for value in vars(plan).values())
        held = [cell.cell_contents for cell in plan.pack.__closure__]
        held += [item for value in held if isinstance(value, tuple) for item in value]
        assert not any(isinstance(value, (torch.Tensor, AttentionTensors)) for value in held)


@pytest.fixture
def launched(monkeypatch):
    """What kernels would be launched with, of which none is compiled; simulated as on sm_80."""
    launched = []
    kernel = type("Kernel", (), {"launch": lambda self, args: launched.append(args)})()
    monkeypatch.setattr(plans, "PLANS", {})
    monkeypatch.setattr(plans, "compiled", lambda config: kernel)
    with cute_fa.simulate("sm_80"):
        yield launched


def test_another_call_like_one_before_does_without_the_dispatcher(launched, monkeypatch):
    q = torch.randn(1, 8, 2, 16, dtype=torch.bfloat16)
    slopes, sink = torch.rand(2), torch.rand(2, dtype=torch.bfloat16)
    offsets = torch.tensor([0, 8], dtype=torch.int32)
    calls = [
        lambda q: cute_fa.flash_attn_func(q, q, q, causal=True),
        lambda q: cute_fa.flash_attn_func(q, q, q, window_size=[3, 0], alibi_slopes=slopes, learnable_sink=sink),
        lambda q: cute_fa.flash_attn_varlen_func(q[0], q[0], q[0], offsets, offsets, 8, 8),
        lambda q: cute_fa.flash_attn_varlen_func(q, q, q, None, None, None, None, seqused_k=offsets[1:]),
    ]
    for call in calls:
        call(q)
    monkeypatch.setattr(engine, "_attention_op", None)
    for call in calls:
        again = q.clone()
        out = call(again)
        common = launched[-1][0]
        assert [common[i].data_ptr() for i in range(4)] == [again.data_ptr()] * 3 + [out.data_ptr()]
        with pytest.raises(TypeError):  # the operator is needed for a gradient
            call(again.requires_grad_())
        with torch.no_grad():
            call(again)
    assert len(launched) == 3 * len(calls)


# Values that are equal to good ones, and of a kind that is refused.
LIKE_GOOD_ONES = [
    ({"causal": True}, {"causal": 1.0}),
    ({"causal": False}, {"causal": 0.0}),
    ({"deterministic": False}, {"deterministic": 0.0}),
    ({"pack_gqa": False}, {"pack_gqa": 0.0}),
    ({"sink_tokens": 1}, {"sink_tokens": True}),
    ({"sink_tokens": 1}, {"sink_tokens": 1.0}),
    ({"num_splits": 1}, {"num_splits": True}),
    ({"softcap": 1}, {"softcap": True}),
    ({"softmax_scale": 1.0}, {"softmax_scale": True}),
    ({"window_size": (1, 0)}, {"window_size": (True, 0)}),
    ({"window_size": (1, 0)}, {"window_size": (1.0, 0)}),
    ({"window_size": (1, 0)}, {"window_size": {1: 1, 0: 0}}),
    ({"window_size": [1, 0]}, {"window_size": [1, False]}),
    ({"return_lse": True}, {"return_lse": 1.0}),
    ({"return_attn_probs": False}, {"return_attn_probs": 0.0}),
    ({}, {"v": None}),
    ({}, {"v": [[[[1.0]]]]}),
    ({}, {"v": torch.zeros(1, 8, 2, 16).to_sparse()}),
    ({}, {"dropout_p": 0.1}),
]


@pytest.mark.parametrize(("good", "bad"), LIKE_GOOD_ONES, ids=str)
def test_what_was_seen_before_hides_no_error(launched, good, bad):
    q = torch.randn(1, 8, 2, 16, dtype=torch.bfloat16)
    given = {"q": q, "k": q, "v": q, "causal": True}
    for _ in range(2):
        cute_fa.flash_attn_func(**given | good)
    with pytest.raises(CuteFaError):
        cute_fa.flash_attn_func(**given | good | bad)
    assert len(launched) == 2


def test_calls_keep_no_tensor_alive(launched):
    q = torch.randn(1, 8, 2, 16, dtype=torch.bfloat16)
    sink = torch.zeros(2)
    kept = [weakref.ref(q), weakref.ref(sink)]
    for _ in range(2):
        kept.append(weakref.ref(cute_fa.flash_attn_func(q, q, q, learnable_sink=sink)))
    launched.clear()
    del q, sink
    gc.collect()
    assert [ref() for ref in kept] == [None] * 4


def test_a_gradient_fills_in_no_defaults(launched, monkeypatch):
    """torch does at 0.5 ms a call, for operators that are given only a formula."""
    monkeypatch.setattr("torch._library.utils.fill_defaults", None)
    q, k, v = torch.randn(3, 1, 8, 2, 16, dtype=torch.bfloat16).unbind()
    assert cute_fa.flash_attn_func(q.requires_grad_(), k, v).requires_grad
    assert len(launched) == 1
