"""Arguments for ``cute.compile``: tensors of unknown sizes and strides, and None for what a config does not have."""

import cutlass.cute as cute
from cutlass import Int32

from cute_fa.device.block_range import Window
from cute_fa.device.seqlen import LengthTensors


def fake_tensor(element, *shape, aligned: int = 1) -> cute.Tensor:
    """A tensor whose last dimension is contiguous; its address and other strides are multiples of ``aligned``
    elements."""
    strides = [cute.sym_int64(divisibility=aligned) for _ in shape[:-1]]
    alignment = element.width // 8 * aligned
    return cute.runtime.make_fake_tensor(element, shape, stride=(*strides, 1), assumed_align=alignment)


def fake_vector(element, dimensions: int = 1) -> cute.Tensor:
    """A tensor of that many dimensions of any size."""
    return fake_tensor(element, *(cute.sym_int() for _ in range(dimensions)))


def fake_activations(element, packed: bool, head_dim: int) -> cute.Tensor:
    """(batch, rows, heads, head_dim), or (rows, heads, head_dim) if packed, in multiples of 16 bytes."""
    shape = [cute.sym_int() for _ in range(2 if packed else 3)]
    return fake_tensor(element, *shape, head_dim, aligned=128 // element.width)


def optional(wanted: bool, make):
    """``make()`` if wanted, else None."""
    return make() if wanted else None


def fake_lengths(config) -> LengthTensors:
    """The length tensors that a config's flags name."""
    names = ("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k")
    return LengthTensors(*(optional(getattr(config, name), lambda: fake_vector(Int32)) for name in names))


def fake_window(config) -> Window:
    """The window's bounds that a config's flags name."""
    flags = (config.window_left, config.window_right, config.sink_tokens)
    return Window(*(optional(flag, lambda: Int32(0)) for flag in flags))
