"""Every kernel that claims it gives the same bits in any order of warps, with asynchronous work early or late, and on
any number of SMs: the forwards, decoding with an append, the deterministic backward, on each architecture."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cute_fa
from cute_fa.tools.inputs import InputSpec, make_inputs
from tests.testing.gradients import gradients_of
from tests.testing.simulated import unwritten_is_nan

pytestmark = pytest.mark.without_races

ROOT = Path(__file__).parents[2]
ARCHS = ["sm_80", "sm_90a", "sm_100a"]
MODES = [
    {},
    {"num_sms": 1},
    {"num_sms": 2, "schedule_seed": 1},
    {"num_sms": 3, "late": True},
    {"num_sms": 132, "schedule_seed": 2},
]


def forward(mode, arch):
    given = make_inputs(InputSpec(2, 200, 300, 2, 1, 64, causal=True))
    with cute_fa.simulate(arch, **mode), unwritten_is_nan():
        return given.run(return_lse=True)


def forward_of_features(mode, arch):
    features = {"window": (90, 0), "sink_tokens": 5, "alibi": True, "softcap": 20.0, "learnable_sink": True}
    given = make_inputs(InputSpec(2, 150, 270, 2, 1, 128, varlen_q=True, varlen_k=True, **features))
    with cute_fa.simulate(arch, **mode), unwritten_is_nan():
        return given.run(return_lse=True)


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
    """All that sums over blocks and CTAs: dQ, dK of two query heads, gradients of slopes and sink."""
    spec = InputSpec(2, 70, 140, 4, 2, 64, causal=True, alibi=True, learnable_sink=True)
    return gradients_of(spec, arch=arch, deterministic=True, **mode)[0]


CASES = [
    (kernel, arch) for kernel in (forward, forward_of_features, decoding, deterministic_backward) for arch in ARCHS
]


def bits(tensors):
    """A digest of them."""
    return hashlib.sha256(b"".join(x.contiguous().view(torch.uint8).numpy().tobytes() for x in tensors)).hexdigest()


@pytest.mark.sampled
@pytest.mark.parametrize(("kernel", "arch"), CASES, ids=lambda x: getattr(x, "__name__", x))
def test_same_bits_in_every_schedule(kernel, arch):
    first = bits(kernel(MODES[0], arch))
    for mode in MODES[1:]:
        assert bits(kernel(mode, arch)) == first, mode


@pytest.mark.thorough
def test_same_bits_whatever_blas_does():
    """With other threads, and another machine's routines where NumPy's BLAS is OpenBLAS."""
    code = "from tests.cute_fa import test_bits as t; print(*(t.bits(t.forward({}, arch)) for arch in t.ARCHS))"
    expected = [bits(forward({}, arch)) for arch in ARCHS]
    for threads, core in (("1", "Haswell"), ("2", "Prescott")):
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": threads, "OPENBLAS_CORETYPE": core}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.stdout.split() == expected, done.stderr
