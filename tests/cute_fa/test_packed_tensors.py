"""FlashAttention 2's functions of one tensor for q, k and v, and its helpers around padded batches."""

import pytest
import torch

import cute_fa
from cute_fa.compat import fa2
from cute_fa.semantics.errors import ShapeError, UnsupportedArgumentError
from tests.testing.calls import ints, rows


@pytest.fixture(autouse=True)
def simulated():
    with cute_fa.simulate("sm_80"):
        yield


def gradient(function, tensor):
    leaf = tensor.detach().requires_grad_()
    out = function(leaf)
    (grad,) = torch.autograd.grad(out.float().square().sum(), leaf)
    return out, grad


def same(ours, theirs):
    assert all(a.equal(b) and b.float().abs().max() > 0.1 for a, b in zip(ours, theirs, strict=True))


OPTIONS = {"causal": True, "window_size": (30, 0), "softcap": 9.0}


def test_qkv():
    qkv = rows(2, 40, 3, 4, 64)
    ours = gradient(lambda t: fa2.flash_attn_qkvpacked_func(t, 0.0, 0.2, **OPTIONS), qkv)
    same(ours, gradient(lambda t: fa2.flash_attn_func(*t.unbind(2), 0.0, 0.2, **OPTIONS), qkv))
    out, lse, mask = fa2.flash_attn_qkvpacked_func(qkv, return_attn_probs=True)
    assert (out.shape, lse.shape, mask.shape) == ((2, 40, 4, 64), (2, 4, 40), (0,))


def test_kv():
    q, kv = rows(2, 24, 4, 64), rows(2, 40, 2, 2, 64)
    ours = gradient(lambda t: fa2.flash_attn_kvpacked_func(q, t, **OPTIONS), kv)
    same(ours, gradient(lambda t: fa2.flash_attn_func(q, *t.unbind(2), **OPTIONS), kv))


def test_packed_qkv():
    qkv, offsets = rows(50, 3, 4, 64), ints(0, 20, 50)
    ours = gradient(lambda t: fa2.flash_attn_varlen_qkvpacked_func(t, offsets, 30, causal=True), qkv)
    lengths = (offsets, offsets, 30, 30)
    same(ours, gradient(lambda t: fa2.flash_attn_varlen_func(*t.unbind(1), *lengths, causal=True), qkv))


def test_packed_kv():
    q, kv, lengths = rows(50, 4, 64), rows(70, 2, 2, 64), (ints(0, 20, 50), ints(0, 30, 70), 30, 40)
    ours = gradient(lambda t: fa2.flash_attn_varlen_kvpacked_func(q, t, *lengths, causal=True), kv)
    same(ours, gradient(lambda t: fa2.flash_attn_varlen_func(q, *t.unbind(1), *lengths, causal=True), kv))


def test_head_dims_are_padded():
    qkv = rows(1, 24, 3, 2, 20)
    same([fa2.flash_attn_qkvpacked_func(qkv)], [fa2.flash_attn_func(*qkv.unbind(2))])


def test_refusals():
    with pytest.raises(ShapeError, match=r"^qkv \(2, 40, 2, 4, 64\): \(…, 3, heads, head_dim\) is needed"):
        fa2.flash_attn_qkvpacked_func(rows(2, 40, 2, 4, 64))
    with pytest.raises(ShapeError, match=r"^kv \(2, 40, 3, 4, 64\)"):
        fa2.flash_attn_kvpacked_func(rows(2, 40, 4, 64), rows(2, 40, 3, 4, 64))
    with pytest.raises(UnsupportedArgumentError, match=r"^dropout_p=0.1"):
        fa2.flash_attn_qkvpacked_func(rows(2, 40, 3, 4, 64), 0.1)


def test_padded_batches():
    """Tokens out of a batch and back, with places of no tokens, and the gradient."""
    hidden = rows(3, 5, 2, 8).float()
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 0, 0, 0], [0, 1, 1, 0, 1]])
    unused = torch.tensor([[0, 0, 0, 1, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 0]])
    tokens, indices, cu_seqlens, longest, used = fa2.unpad_input(hidden, mask, unused)
    assert tokens.equal(hidden.flatten(0, 1)[[0, 1, 2, 3, 11, 12, 14]])
    assert (cu_seqlens.tolist(), cu_seqlens.dtype, longest, used.tolist()) == ([0, 4, 4, 7], torch.int32, 4, [3, 0, 3])
    padded = fa2.pad_input(tokens, indices, 3, 5)
    assert padded.equal(hidden * (mask + unused)[..., None, None])
    leaf = hidden.clone().requires_grad_()
    back = fa2.pad_input(fa2.unpad_input(leaf, mask.bool())[0], fa2.unpad_input(leaf, mask.bool())[1], 3, 5)
    assert torch.autograd.grad((2 * back).sum(), leaf)[0].equal((2 * mask)[..., None, None].expand_as(hidden).float())
    assert fa2.index_first_axis(hidden, torch.tensor([2, 0])).equal(hidden[[2, 0]])
    with pytest.raises(ShapeError, match=r"^attention_mask \(3, 4\): \(3, 5\) is needed"):
        fa2.unpad_input(hidden, mask[:, :4])
    with pytest.raises(ShapeError, match=r"^indices \(6,\): one for each of the 7 rows"):
        fa2.pad_input(tokens, indices[:6], 3, 5)
