"""Shared memory: what a kernel declares and what its launch asks for, together, are at most what a CTA may have."""

import itertools

import pytest

from cute_fa.engine.compiler import compile_artifacts
from cute_fa.semantics.types import Direction, SmArch
from fa2_sm80.backward.config import Fa2BackwardConfig
from fa2_sm80.backward.entry import Fa2Backward
from fa2_sm80.backward.postprocess import QueryGradientConversion as Fa2Conversion
from fa2_sm80.forward.entry import Fa2Forward
from fa2_sm80.split.entry import Fa2Split
from fa3_sm90.backward.config import Fa3BackwardConfig
from fa3_sm90.backward.conversion import QueryGradientConversion as Fa3Conversion
from fa3_sm90.backward.entry import Fa3Backward
from fa3_sm90.backward_split.config import Fa3SplitBackwardConfig
from fa3_sm90.backward_split.entry import Fa3SplitBackward
from fa3_sm90.decode.entry import Fa3Decode
from fa3_sm90.forward.entry import Fa3Forward
from fa4_sm100.forward.entry import Fa4Forward
from ptxsim.timing.cubin import kernel_resources
from tests.testing.cases import small_problem

# From sm_90 on a cubin's sections count the KiB that the system takes of an SM's 228 for each CTA, and leaves 227.
RESERVED_FROM_SM_90 = 1024
HEAD_DIMS = range(8, 257, 8)
# What changes the choice of tiles: each of these and all together.
FEATURES = [{}, {"window_left": 5}, {"softcap": 1.0}, {"alibi": True}, {"page_size": 16}]
FORWARD = [*FEATURES, {name: value for feature in FEATURES for name, value in feature.items()}]
BACKWARD = [
    {"direction": Direction.BACKWARD, "deterministic": deterministic, **feature}
    for deterministic in (False, True)
    for feature in ({}, {"window_left": 5, "softcap": 1.0, "alibi": True})
]
KERNELS = {
    "fa2_fwd": (Fa2Forward, [changes for changes in FORWARD if "page_size" not in changes]),
    "fa2_split": (Fa2Split, [{**changes, "seqlen_q": rows} for changes in FORWARD for rows in (1, 64, 128)]),
    "fa2_bwd": (Fa2Backward, BACKWARD),
    "fa3_fwd": (Fa3Forward, FORWARD),
    "fa3_decode": (Fa3Decode, [{**changes, "seqlen_q": rows} for changes in FORWARD for rows in (1, 128)]),
    "fa3_bwd": (Fa3Backward, BACKWARD),
    "fa3_bwd_split": (Fa3SplitBackward, BACKWARD),
    "fa4_fwd": (Fa4Forward, [{**changes, "seqlen_q": rows} for changes in FORWARD for rows in (128, 256)]),
}
# What turns a backward's sums of dQ into dQ.
CONVERSIONS = {Fa2BackwardConfig: Fa2Conversion, Fa3BackwardConfig: Fa3Conversion}


def dynamic_bytes(config) -> int:
    """The most that a launch of the config asks for."""
    sizes = [config.smem_bytes]
    if isinstance(config, Fa3SplitBackwardConfig) or getattr(config, "query_kernel", None):
        sizes.append(config.query_kernel_smem_bytes)
    elif type(config) in CONVERSIONS:
        sizes.append(CONVERSIONS[type(config)](config).smem_bytes)
    return max(sizes)


def static_bytes(config) -> int:
    """The most that a kernel of the config declares."""
    _, cubin = compile_artifacts(config)
    reserved = RESERVED_FROM_SM_90 if config.arch.number >= 90 else 0
    kernels = [resources for resources in kernel_resources(cubin).values() if "code_bytes" in resources]
    declared = [resources["static_smem"] - reserved for resources in kernels]
    assert min(declared) >= 0
    return max(declared)


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("kernel", "arch", "largest"),
    [
        ("fa2_fwd", SmArch.SM_80, 131_072),
        ("fa2_split", SmArch.SM_80, 166_912),  # all there is
        ("fa2_split", SmArch.SM_86, 101_376),  # all there is
        ("fa2_bwd", SmArch.SM_80, 164_864),
        ("fa3_fwd", SmArch.SM_90A, 232_448),  # all there is, at (256, 176) among others
        ("fa3_decode", SmArch.SM_90A, 232_448),  # all there is
        ("fa3_bwd", SmArch.SM_90A, 224_256),
        ("fa3_bwd_split", SmArch.SM_90A, 231_936),
        ("fa4_fwd", SmArch.SM_100A, 232_448),  # all there is, at (128, 128) among others
    ],
)
def test_static_and_dynamic_fit(kernel, arch, largest):
    """Of all configs; what is static is read from the machine code of the one that asks for most."""
    cls, changes = KERNELS[kernel]
    problems = [
        small_problem(arch, head_dim=head_dim, head_dim_v=head_dim_v, **change)
        for head_dim, head_dim_v, change in itertools.product(HEAD_DIMS, HEAD_DIMS, changes)
    ]
    configs = {cls.configure(problem) for problem in problems if not cls.supports(problem)}
    asked = {config: dynamic_bytes(config) for config in configs}
    config = max(asked, key=lambda config: (asked[config], repr(config)))
    assert asked[config] == largest
    assert static_bytes(config) + asked[config] <= arch.smem_bytes
