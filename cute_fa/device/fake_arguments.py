"""Arguments for ``cute.compile``: tensors of unknown sizes and strides, and None for what a config does not have."""

from functools import partial

import cutlass.cute as cute
from cutlass import Float32, Int32

from cute_fa.device.arguments import CommonArguments, Descales
from cute_fa.device.dtypes import CUTE_DTYPE
from cute_fa.device.seqlen import LengthTensors
from cute_fa.device.visibility import Window
from cute_fa.engine.contract import FeatureConfig
from cute_fa.semantics.options import TensorOption, options_of
from cute_fa.semantics.problem import AttentionProblem

_ELEMENTS = {"int32": Int32, "float32": Float32}


def fake_tensor(element, *shape, aligned: int = 1) -> cute.Tensor:
    """A tensor whose last dimension is contiguous; its address and other strides are multiples of ``aligned``
    elements."""
    strides = [cute.sym_int64(divisibility=aligned) for _ in shape[:-1]]
    alignment = element.width // 8 * aligned
    return cute.runtime.make_fake_tensor(element, shape, stride=(*strides, 1), assumed_align=alignment)


def fake_vector(element, dimensions: int = 1) -> cute.Tensor:
    """A tensor of that many dimensions of any size."""
    return fake_tensor(element, *(cute.sym_int() for _ in range(dimensions)))


def fake_strided(element, dimensions: int) -> cute.Tensor:
    """A tensor of that many dimensions of any size and stride."""
    shape, strides = ([cute.sym_int() for _ in range(dimensions)], [cute.sym_int64() for _ in range(dimensions)])
    return cute.runtime.make_fake_tensor(element, shape, stride=strides, assumed_align=element.width // 8)


def fake_activations(element, packed: bool, head_dim: int) -> cute.Tensor:
    """(batch, rows, heads, head_dim), or (rows, heads, head_dim) if packed, in multiples of 16 bytes."""
    shape = [cute.sym_int() for _ in range(2 if packed else 3)]
    return fake_tensor(element, *shape, head_dim, aligned=128 // element.width)


def fake_key_major(element, head_dim: int) -> cute.Tensor:
    """(batch, rows, heads, head_dim) with the rows contiguous, other strides in multiples of 16 bytes."""
    batch, heads, columns = (cute.sym_int64(divisibility=128 // element.width) for _ in range(3))
    shape = (*(cute.sym_int() for _ in range(3)), head_dim)
    return cute.runtime.make_fake_tensor(element, shape, stride=(batch, 1, heads, columns), assumed_align=16)


def optional(wanted: bool, make):
    """``make()`` if wanted, else None."""
    return make() if wanted else None


def _fake_option(config: FeatureConfig, tensor: TensorOption) -> cute.Tensor:
    element, dimensions = _ELEMENTS[tensor.dtype], tensor.dimensions
    if tensor.wider and getattr(config, tensor.wider):
        return fake_vector(element, dimensions + 1)
    if tensor.cache_like and getattr(config, tensor.cache_like):
        return fake_strided(element, dimensions + 2)
    if tensor.packed and getattr(config, tensor.packed):
        return fake_vector(element, dimensions - 1)
    return (fake_strided if tensor.strided else fake_vector)(element, dimensions)


def common_fakes(config: FeatureConfig) -> CommonArguments:
    """What ``cute_fa.engine.contract.common_arguments`` gives at run time."""
    c = config
    fakes = {
        of.tensor.name: optional(getattr(c, of.flag), partial(_fake_option, c, of.tensor))
        for of in options_of(AttentionProblem).values()
        if of.tensor is not None
    }
    bounds = (c.window_left, c.window_right, c.sink_tokens)
    fakes |= {
        "q": fake_activations(CUTE_DTYPE[c.dtype], c.cu_seqlens_q, c.head_dim),
        "k": fake_activations(CUTE_DTYPE[c.dtype_k], c.cu_seqlens_k, c.head_dim),
        "v": fake_activations(CUTE_DTYPE[c.dtype_v], c.cu_seqlens_k, c.head_dim_v),
        "out": fake_activations(CUTE_DTYPE[c.out_dtype], c.cu_seqlens_q, c.head_dim_v),
        "lse": fake_vector(Float32, 2 if c.cu_seqlens_q else 3),
        "lengths": LengthTensors(*(fakes[name] for name in LengthTensors._fields)),
        "window": Window(*(optional(given, lambda: Int32(0)) for given in bounds)),
        "softmax_scale": Float32(0.0),
        "softcap": optional(c.softcap, lambda: Float32(0.0)),
        "descales": Descales(*(fakes[name] for name in ("q_descale", "k_descale", "v_descale"))),
    }
    if c.key_major_v:
        fakes["v"] = fake_key_major(CUTE_DTYPE[c.dtype_v], c.head_dim_v)
    return CommonArguments(*(fakes[name] for name in CommonArguments._fields))
