"""``apply_rotary_emb`` against the rotation of complex numbers, and its gradients."""

import inspect

import pytest
import torch

import cute_fa
from cute_fa import apply_rotary_emb
from cute_fa.compat import fa2, fa3
from cute_fa.semantics.errors import (
    ArgumentError,
    CumulativeSeqlensError,
    CuteFaError,
    DTypeError,
    LengthError,
    ShapeError,
)

OFFSETS = {"zero": 0, "int": 7, "tensor": torch.tensor([3, 0, 9], dtype=torch.int32)}


def tables(positions=40, half=16, dtype=torch.float32):
    angle = 6.28 * torch.rand(positions, half, generator=torch.Generator().manual_seed(1))
    return angle.cos().to(dtype), angle.sin().to(dtype)


def expected(x, cos, sin, positions, interleaved):
    """x (rows, heads, head_dim), each row turned by e^(iθ) of its position, in fp64."""
    half = cos.shape[-1]
    part, rest = x.double()[..., : 2 * half], x.double()[..., 2 * half :]
    pairs = part.unflatten(-1, (half, 2)) if interleaved else part.unflatten(-1, (2, half)).transpose(-1, -2)
    turned = torch.complex(pairs[..., 0], pairs[..., 1]) * torch.complex(cos.double(), sin.double())[positions][:, None]
    pairs = torch.view_as_real(turned)
    part = pairs.flatten(-2) if interleaved else pairs.transpose(-1, -2).flatten(-2)
    return torch.cat((part, rest), -1)


def positions_of(offsets, lengths):
    starts = offsets.tolist() if isinstance(offsets, torch.Tensor) else [offsets] * len(lengths)
    return torch.tensor([start + t for start, length in zip(starts, lengths, strict=True) for t in range(length)])


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("offsets", OFFSETS)
@pytest.mark.parametrize("lengths", [None, (5, 0, 12)])
def test_values_and_gradients(lengths, offsets, interleaved, inplace):
    """Sequences of one length, or packed, with an empty one among them; a quarter of the elements stay."""
    cos, sin = tables(half=12)
    packed = {}
    if lengths is not None:
        packed = {"cu_seqlens": torch.tensor([0, 5, 5, 17], dtype=torch.int32), "max_seqlen": 12}
    shape = (3, 6, 2, 32) if lengths is None else (17, 2, 32)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
    before = x.detach().clone()
    positions = positions_of(OFFSETS[offsets], lengths or (6, 6, 6))
    dout = torch.randn(shape)
    out = apply_rotary_emb(x, cos, sin, interleaved, inplace, OFFSETS[offsets], **packed)
    [dx] = torch.autograd.grad(out, x, dout)
    kind = (out.dtype, out.shape)
    assert kind == (x.dtype, x.shape)
    for ours, given, sine in ((out, before, sin), (dx, dout, -sin)):
        theirs = expected(given.reshape(-1, 2, 32), cos, sine, positions, interleaved).reshape(shape)
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-6, atol=1e-6)
    assert torch.equal(x, out if inplace else before)


def test_one_rounding():
    """16-bit rows and tables are multiplied in fp32 and rounded once."""
    x = torch.randn(2, 5, 3, 32, generator=torch.Generator().manual_seed(0)).half()
    cos, sin = tables(dtype=torch.float16)
    theirs = expected(x.reshape(-1, 3, 32), cos, sin, positions_of(0, (5, 5)), False).reshape(x.shape)
    assert (apply_rotary_emb(x, cos, sin).double() - theirs).abs().max() <= 2**-11 * theirs.abs().max() * 1.001


def test_in_place_within_a_graph():
    """What stands before the rotation gets its gradient, and what uses x afterwards sees the rotated values."""
    cos, sin = tables()
    x = torch.randn(1, 4, 2, 32, requires_grad=True)
    doubled = 2 * x
    out = apply_rotary_emb(doubled, cos, sin, inplace=True)
    dout = torch.randn_like(x)
    [dx] = torch.autograd.grad(doubled, x, dout)
    assert out is doubled
    torch.testing.assert_close(dx, 2 * apply_rotary_emb(dout, cos, -sin))


def test_gradients_of_the_tables():
    cos, sin = (t.double().requires_grad_() for t in tables(9, 4))
    x = torch.randn(2, 3, 2, 10, dtype=torch.float64, requires_grad=True)
    offsets = OFFSETS["tensor"][:2]
    assert torch.autograd.gradcheck(lambda *args: apply_rotary_emb(*args, seqlen_offsets=offsets), (x, cos, sin))


def test_traced_and_without_data():
    cos, sin = tables()
    x, offsets = torch.randn(3, 6, 2, 32), OFFSETS["tensor"]
    compiled = torch.compile(apply_rotary_emb, fullgraph=True, backend="eager")
    assert torch.equal(
        compiled(x, cos, sin, seqlen_offsets=offsets), apply_rotary_emb(x, cos, sin, False, False, offsets)
    )
    meta = apply_rotary_emb(x.to("meta"), cos.to("meta"), sin.to("meta"), seqlen_offsets=offsets.to("meta"))
    assert (meta.device.type, meta.shape) == ("meta", x.shape)


def test_beyond_the_tables():
    """The last position where values are not checked, an error where they are."""
    cos, sin = tables(4)
    x, offsets = torch.randn(1, 2, 1, 32), torch.tensor([3], dtype=torch.int32)
    out = apply_rotary_emb(x, cos, sin, seqlen_offsets=offsets)
    torch.testing.assert_close(out[:, 1:], apply_rotary_emb(x[:, 1:], cos[3:], sin[3:]))
    with cute_fa.simulate("sm_80"):
        with pytest.raises(LengthError, match="sequence 0 rotates by positions 3 to 4: cos has 4"):
            apply_rotary_emb(x, cos, sin, seqlen_offsets=offsets)
        with pytest.raises(CumulativeSeqlensError, match="cu_seqlens ends at 3: the packed tensor has 2 rows"):
            apply_rotary_emb(x[0], cos, sin, cu_seqlens=torch.tensor([0, 3], dtype=torch.int32))
        with pytest.raises(LengthError, match="max_seqlen=1: a sequence has 2 rows"):
            apply_rotary_emb(x[0], cos, sin, cu_seqlens=torch.tensor([0, 2], dtype=torch.int32), max_seqlen=1)


X = torch.zeros(2, 3, 2, 32)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": X[0]}, ShapeError, r"x has shape \(3, 2, 32\): \(batch, seqlen, heads, head_dim\)"),
        ({"x": X.int()}, DTypeError, "x is int32"),
        ({"cos": None}, ArgumentError, "cos is NoneType"),
        ({"sin": torch.zeros(40, 8)}, ShapeError, r"sin \(40, 8\): \(40, 16\)"),
        ({"cos": torch.zeros(40, 17), "sin": torch.zeros(40, 17)}, ShapeError, "rotates 34 elements: head_dim is 32"),
        ({"seqlen_offsets": 38}, LengthError, "seqlen_offsets=38 and 3 rows of x: cos has 40 positions"),
        ({"seqlen_offsets": -1}, LengthError, "seqlen_offsets=-1"),
        ({"seqlen_offsets": 0.5}, ArgumentError, "seqlen_offsets=0.5: an int or a tensor"),
        ({"seqlen_offsets": torch.zeros(3, dtype=torch.int32)}, ShapeError, r"seqlen_offsets \(3,\): \(2,\)"),
        ({"seqlen_offsets": torch.zeros(2)}, DTypeError, "seqlen_offsets is float32"),
        ({"cu_seqlens": torch.zeros(2, dtype=torch.int32)}, ShapeError, r"x has shape .*: \(total, heads, head_dim\)"),
        ({"x": X[0], "cu_seqlens": torch.zeros(2)}, DTypeError, "cu_seqlens is float32: int32"),
        ({"interleaved": 1.5}, ArgumentError, "interleaved=1.5"),
        ({"max_seqlen": 2.5}, ArgumentError, "max_seqlen=2.5"),
        ({"inplace": True, "cos": torch.zeros(40, 16, requires_grad=True)}, ArgumentError, "inplace=True with cos"),
    ],
)
def test_errors(change, error, message):
    cos, sin = tables()
    with pytest.raises(CuteFaError, match=message) as caught:
        apply_rotary_emb(**{"x": X, "cos": cos, "sin": sin} | change)
    assert type(caught.value) is error


def test_order():
    names = "x cos sin interleaved inplace seqlen_offsets cu_seqlens max_seqlen".split()
    assert list(inspect.signature(fa2.apply_rotary_emb).parameters) == names
    assert fa2.apply_rotary_emb is fa3.apply_rotary_emb is cute_fa.apply_rotary_emb
