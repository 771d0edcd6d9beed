"""Every kernel that claims it gives the same bits in any order of warps, with asynchronous work early or late, and on
any number of SMs: the forwards, decoding with an append, the deterministic backward, on each architecture."""

from __future__ import annotations

import pytest
import torch

import cute_fa
from cute_fa.inputs import InputSpec, make_inputs
from tests.testing.gradients import gradients_of
from tests.testing.simulated import unwritten_is_nan

pytestmark = pytest.mark.without_races

ARCHS = ["sm_80", "sm_90a", "sm_100a"]
MODES = [
    {},
    {"num_sms": 1},
    {"num_sms": 2, "schedule_seed": 1},
    {"num_sms": 3, "late": True},
    {"num_sms": 132, "schedule_seed": 2, "late": True},
]


def forward(mode, arch):
    """Rows of keys that do not fill a tile, of two lengths of queries, causal."""
    given = make_inputs(InputSpec(2, 200, 333, 4, 2, 64, causal=True))
    with cute_fa.simulate(arch, **mode), unwritten_is_nan():
        return given.run(return_lse=True)


def forward_of_features(mode, arch):
    features = {"window": (90, 0), "sink_tokens": 5, "alibi": True, "softcap": 20.0, "learnable_sink": True}
    given = make_inputs(InputSpec(3, 150, 270, 2, 1, 128, varlen_q=True, varlen_k=True, **features))
    with cute_fa.simulate(arch, **mode), unwritten_is_nan():
        return given.run(return_lse=True)


def forward_of_fp8(mode, arch):
    given = make_inputs(InputSpec(2, 200, 333, 4, 2, 128, causal=True))
    q, k, v = (x.to(torch.float8_e4m3fn) for x in (given.q, given.k, given.v))
    with cute_fa.simulate(arch, **mode), unwritten_is_nan():
        return cute_fa.flash_attn_func(q, k, v, causal=True, return_lse=True)


def decoding(mode, arch):
    """Two new tokens are rotated and appended, then attention in three splits and their combination."""
    given = make_inputs(InputSpec(2, 2, 300, 4, 1, 128, page_size=16, lengths_k=(300, 130)))
    k, v = given.k.clone(), given.v.clone()
    rng = torch.Generator().manual_seed(1)
    new = [torch.randn(2, 2, 1, 128, generator=rng).bfloat16() for _ in range(2)]
    angles = 6.0 * torch.rand(300, 64, generator=rng)
    with cute_fa.simulate(arch, **mode), unwritten_is_nan():
        out, lse = cute_fa.flash_attn_with_kvcache(
            *(given.q, k, v, *new), cache_seqlens=given.seqused_k - 2, page_table=given.page_table, causal=True,
            rotary_cos=angles.cos(), rotary_sin=angles.sin(), num_splits=3, return_lse=True)  # fmt: skip
    return out, lse, k, v


def deterministic_backward(mode, arch):
    return gradients_of(InputSpec(2, 130, 200, 4, 2, 64, causal=True), arch=arch, deterministic=True, **mode)[0][:3]


def deterministic_backward_of_features(mode, arch):
    features = {"window": (90, 0), "alibi": True, "softcap": 20.0, "learnable_sink": True}
    spec = InputSpec(2, 100, 140, 2, 1, 128, **features)
    return gradients_of(spec, arch=arch, deterministic=True, **mode)[0]


KERNELS = [forward, forward_of_features, decoding, deterministic_backward, deterministic_backward_of_features]
CASES = [(kernel, arch) for kernel in KERNELS for arch in ARCHS] + [(forward_of_fp8, "sm_90a")]


def bits(tensors):
    return [x.contiguous().view(torch.uint8).numpy().tobytes() for x in tensors]


@pytest.mark.parametrize(("kernel", "arch"), CASES, ids=lambda x: getattr(x, "__name__", x))
def test_same_bits_in_every_schedule(kernel, arch):
    first = bits(kernel(MODES[0], arch))
    for mode in MODES[1:]:
        assert bits(kernel(mode, arch)) == first, mode
