"""The launch path: what is prepared once for a description, and what each call puts in its place."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

import cute_fa
from cute_fa.device.tiled_backward import Launch, Scratch, TiledBackward
from cute_fa.engine import attention as engine
from cute_fa.engine import plan as plans
from cute_fa.engine.autograd import attention_backward
from cute_fa.engine.contract import AttentionTensors, CommonArguments
from cute_fa.semantics.call import Call, Extras
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
            assert common[10:] == (2.0, None, None, (None, None, None), None, None, None, None) and seqlen_q == 5
        assert asked == [7]
        # Slopes of all sequences alike are expanded, in each call its own.
        for given, (common, _) in call((2,)):
            assert common[7].data_ptr() == given.extras.alibi_slopes.data_ptr()
            assert common[0] is given.q and common[1] is given.k
        assert asked == [7, 7]


BACKWARD_ARCHS = ["sm_80", "sm_90a"]


@pytest.fixture
def backward(monkeypatch):
    """``backward(arch, q, k, v, **fields)``: what launches of the backward of a call of ``Call.made`` are given, of
    which none is compiled, and how often the kernel was asked for its arguments: two calls with tensors of their
    own."""
    arguments, launched, asked = TiledBackward.arguments.__func__, [], []

    def counted(cls, *given):
        asked.append(cls)
        return arguments(cls, *given)

    kernel = type("Kernel", (), {"launch": lambda self, args: launched.append(args)})()
    monkeypatch.setattr(plans, "PLANS", {})
    monkeypatch.setattr(plans, "compiled", lambda config: kernel)
    monkeypatch.setattr(TiledBackward, "arguments", classmethod(counted))

    def run(arch, q, k, v, dlse=None, **fields):
        launched.clear(), asked.clear()
        grads = []
        with cute_fa.simulate(arch):
            for _ in range(2):
                call = Call.made(q.clone(), k.clone(), v.clone(), **fields)
                given = torch.randn_like(q), dlse, torch.randn_like(q), torch.zeros(call.lse_shape)
                slopes = call.extras.alibi_slopes is not None
                grads.append((call, given, attention_backward(*given, call, slopes)))
        return [(Launch(*args), *made) for args, made in zip(launched, grads, strict=True)], len(asked)

    return run


@pytest.mark.parametrize("arch", BACKWARD_ARCHS)
@pytest.mark.parametrize("slopes_shape", [(4,), (2, 4)])
def test_a_backward_is_asked_for_its_arguments_once(backward, arch, slopes_shape):
    """Slopes of all sequences alike are expanded, their gradient and the sink's are matrices for the kernels."""
    q, k, v = torch.randn(3, 2, 150, 4, 64).bfloat16().unbind()
    k, v = k[:, :, :2], v[:, :, :2]
    slopes, sink, used = torch.rand(slopes_shape), torch.rand(4), torch.tensor([100, 150], dtype=torch.int32)
    dlse = torch.randn(2, 4, 150)
    fields = {"alibi_slopes": slopes, "learnable_sink": sink, "seqused_k": used}
    launches, asked = backward(arch, q, k, v, dlse, **fields, window_right=0, deterministic=True)
    assert asked == 1
    for launch, call, (dout, dlse, out, lse), grads in launches:
        common = CommonArguments(*launch.common)
        assert [common.q, common.k, common.v, common.out, common.lse] == [call.q, call.k, call.v, out, lse]
        assert common.alibi_slopes.data_ptr() == slopes.data_ptr() and common.alibi_slopes.shape == (2, 4)
        assert common.learnable_sink is sink and common.lengths[3] is used and common.window[:2] == (None, 0)
        assert [launch.dout, launch.dlse, launch.dq, launch.dk, launch.dv] == [dout, dlse, *grads[:3]]
        assert launch.dalibi.data_ptr() == grads.dalibi.data_ptr() and launch.dsink.data_ptr() == grads.dsink.data_ptr()
        assert launch.dalibi.shape == (2 if slopes.dim() == 2 else 1, 4) and launch.dsink.shape == (1, 4)
        assert (grads.dalibi.shape, grads.dsink.shape) == (slopes_shape, (4,))
        assert (launch.seqlen_q, launch.seqlen_k) == (150, 150)


@pytest.mark.parametrize("arch", BACKWARD_ARCHS)
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_scratch_memory_is_as_large_as_stated_and_each_launch_has_its_own(backward, arch, deterministic, packed):
    """The figures of :class:`TiledBackward`: what is stated is what is allocated."""
    heads, head_dim, batch, lengths, longest = 4, 72, 3, [200, 7, 130], 200
    q, k, v = torch.randn(3, batch, longest, heads, head_dim).bfloat16().unbind()
    fields = {"deterministic": deterministic, "alibi_slopes": torch.rand(heads), "learnable_sink": torch.rand(heads)}
    if packed:
        q, k, v = (t.flatten(0, 1)[: sum(lengths)] for t in (q, k, v))
        offsets = torch.tensor([0, 200, 207, 337], dtype=torch.int32)
        fields |= dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), offsets)
        fields |= dict.fromkeys(("max_seqlen_q", "max_seqlen_k"), longest)
    launches, asked = backward(arch, q, k, v, **fields)
    assert asked == 1
    ((plan),) = plans.PLANS.values()
    c, (first, second) = plan.config, (Scratch(*launch.scratch) for launch, *_ in launches)
    m_blocks, n_blocks = -(-longest // c.tile_m), -(-longest // c.tile_n)
    tiles = sum(lengths) // c.tile_m + batch if packed else batch * m_blocks
    assert not packed or tiles >= sum(-(-length // c.tile_m) for length in lengths)
    summed = arch == "sm_90a" or not deterministic  # sm_80 computes dQ in a kernel of its own
    bytes_a_head = tiles * c.tile_m * (8 + summed * 4 * c.head_dim_padded)
    bytes_a_head += batch * (4 * m_blocks + 4 * c.slope_parts * n_blocks)
    turns = arch == "sm_90a" and deterministic
    assert sum(t.nbytes for t in first if t is not None) == heads * bytes_a_head + turns * (4 * tiles * heads + 4)
    assert (first.dq is not None, first.turns is not None) == (summed, turns)
    for mine, other in zip(first, second, strict=True):
        assert mine is None or (mine.data_ptr() != other.data_ptr() and mine.shape == other.shape)
        assert mine is None or (mine.is_contiguous() and mine.device == q.device)


def test_splits_have_memory_of_their_own(launched):
    q = torch.randn(1, 2, 8, 64, dtype=torch.bfloat16)
    k = torch.randn(1, 4096, 1, 64, dtype=torch.bfloat16)
    for _ in range(2):
        cute_fa.flash_attn_func(q, k, k, num_splits=3)
    (first, second), splits = [args[1] for args in launched], 3
    assert [tuple(t.shape) for t in first] == [(splits, 16, 64), (splits, 16)] and first[0].dtype is torch.float32
    assert not {t.data_ptr() for t in first} & {t.data_ptr() for t in second}
    assert [args[2] for args in launched] == [(splits, 1, splits, None, None)] * 2


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
