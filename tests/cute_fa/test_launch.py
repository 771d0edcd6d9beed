"""The launch path: what is prepared once for a description, and what each call puts in its place."""

from __future__ import annotations

import pytest
import torch

import cute_fa
from cute_fa import ops
from cute_fa.kernel import AttentionTensors
from fa2_sm80.forward import Fa2Forward


def tensors(count: int) -> list[torch.Tensor]:
    return [torch.full((2,), float(i)) for i in range(count)]


def test_packing_puts_tensors_in_their_places():
    a, b, c, d = tensors(4)
    pack = ops.packer((b, None, (c, 3, (a, a)), 1.5, (1, 2), a, (b, None)), (a, b, c))
    assert pack((b, c, d)) == (c, None, (d, 3, (b, b)), 1.5, (1, 2), b, (c, None))


@pytest.mark.parametrize("nested", [False, True])
def test_tensors_of_another_origin_are_not_kept(nested):
    a, b, c = tensors(3)
    foreign = (b, a.expand(2)) if nested else b
    assert ops.packer((a, foreign, 1), (a, c)) is None


def test_arguments_are_those_of_the_kernel_in_every_call(monkeypatch):
    """Packed lengths and per-batch slopes: tensors at all levels of the arguments."""
    launched, asked = [], []
    arguments = Fa2Forward.arguments

    def counted(problem, tensors, num_sms):
        asked.append(num_sms)
        return arguments(problem, tensors, num_sms)

    monkeypatch.setattr(Fa2Forward, "arguments", counted)
    monkeypatch.setattr(ops, "_plans", {})
    kernel = type("Kernel", (), {"launch": lambda self, args: launched.append(args)})()
    monkeypatch.setattr(ops, "compiled", lambda config: kernel)
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
            yield AttentionTensors(q, k, v, out, lse, offsets, *[None] * 6, slopes, None), launched[-1]

    with cute_fa.simulate("sm_80", num_sms=7):
        for given, (common, seqlen_q) in call((2, 2)):
            assert [common[i] is given[i] for i in range(5)] == [True] * 5
            assert common[5][0] is offsets and common[7] is given.alibi_slopes
            assert common[10:] == (2.0, None) and seqlen_q == 5
        assert asked == [7]
        # Slopes of all sequences alike are expanded, into a tensor of each call's own.
        for given, (common, _) in call((2,)):
            assert common[7].data_ptr() == given.alibi_slopes.data_ptr()
            assert common[0] is given.q and common[1] is given.k
        assert len(asked) == 1 + 1 + 2


def test_plans_hold_no_tensors():
    q = torch.randn(1, 8, 2, 16, dtype=torch.bfloat16)
    with cute_fa.simulate("sm_80"):
        cute_fa.flash_attn_func(q, q, q)
    for plan in ops._plans.values():
        assert not any(isinstance(value, torch.Tensor) for value in vars(plan).values())
        cells = [cell.cell_contents for cell in plan.pack.__closure__ or ()] if plan.pack else []
        assert not any(isinstance(value, (torch.Tensor, AttentionTensors)) for value in cells)
