"""What the grids of the forwards vary that walk over tiles of queries by TMA, FA3's and FA4's: levels, and their pairs.

One compile a case: as many levels as shape the code or the control flow differently, no more. Some levels stand for
several values, which the cases take in turns.
"""

import dataclasses

import torch

from cute_fa.semantics.problem import LiteralWindow
from cute_fa.semantics.types import DType
from cute_fa.tools.inputs import InputSpec
from tests.testing.cases import spec_name, spec_of
from tests.testing.grid import in_turns, pairwise

E4M3, E5M2 = DType.E4M3, DType.E5M2

MASKS = {
    "none": [{}],
    "causal": [{"causal": True}],
    "window": [
        {"window": (137, 11)},
        {"window": LiteralWindow(None, -5)},
        {"window": (0, None)},
        {"window": LiteralWindow(-20, 90)},
        {"window": (None, 9)},
        {"window": LiteralWindow(-4, None)},
    ],
    "sink": [
        {"window": (60, 0), "sink_tokens": 5},
        {"window": LiteralWindow(-12, 60), "sink_tokens": 30},
        {"window": (70, None), "sink_tokens": 90},
        {"window": LiteralWindow(-6, None), "sink_tokens": 20},
    ],
}
LENGTHS = {
    "dense": [{}],
    "packed": [
        {"varlen_q": True, "varlen_k": True},
        {"varlen_q": True, "varlen_k": True, "seqused_q": True, "seqused_k": True},
        {"varlen_k": True},
    ],
    "used": [
        {"seqused_q": True, "seqused_k": True},
        {"cache_leftpad": True},
        {"varlen_q": True, "seqused_k": True},
        {"cache_batch_idx": True, "cache_leftpad": True},
        {"seqused_k": True},
    ],
    "paged": [
        {"varlen_q": True, "page_size": 16},
        {"page_size": 8},
        {"cache_batch_idx": True, "page_size": 64},
        {"seqused_q": True, "page_size": 32},
        {"page_size": 1024},
        {"varlen_q": True, "seqused_q": True, "page_size": 512},
    ],
}
_FEATURES = {
    "mask": list(MASKS),
    "alibi": [{}, {"alibi": True}, {"alibi_per_batch": True}],
    "softcap": [0.0, 15.0],
    "learnable_sink": [False, True],
    "lengths": list(LENGTHS),
    "pack_gqa": [None, False, True],
    "inputs": ["peaked", "random"],
}
_TURNS = {"mask": MASKS, "lengths": LENGTHS}

HEAD_DIMS = {
    "64": [(64, None)],
    "128": [(128, None)],
    "256": [(256, None)],
    "small": [(d, None) for d in (8, 24, 40, 56, 16, 48, 32)],
    "medium": [(d, None) for d in (72, 96, 88, 112, 80, 104, 120)],
    "large": [(136, 248), (160, 144), (200, 176), (216, 152), (232, 208), (240, 184), (168, 224)],
    "unequal": [(192, 128), (64, 256), (256, 64), (240, 256), (8, 128), (128, 8), (72, 40)],
}
# Persistent or not, and SMs.
CTAS = {"single": [("off", 132)], "one": [("on", 1)], "two": [("on", 2)], "more": [("on", 3), ("auto", 132)]}
FEATURES = _FEATURES | {
    "dtype": [DType.BF16, DType.FP16],
    "head_dims": list(HEAD_DIMS),
    "heads": [(2, 2), (4, 2), (3, 1), (5, 1)],
    "ctas": list(CTAS),
    "layout": ["contiguous", "padded", "transposed", "expanded"],
    "seqlens": [(130, 130), (70, 301), (200, 77), (1, 150)],
    "schedule": [
        {"late": True},
        {"late": True, "schedule_seed": 1},
        {"late": True, "schedule_seed": 2, "race": True},
        {"schedule_seed": 3, "race": True},
    ],
}

FP8_DTYPES = {
    "e4m3": [(E4M3, E4M3, E4M3)],
    "e5m2": [(E5M2, E5M2, E5M2)],
    "mixed": [(E4M3, E5M2, E4M3), (E5M2, E4M3, E4M3), (E4M3, E4M3, E5M2), (E5M2, E4M3, E5M2)],
}
FP8_HEAD_DIMS = {
    "narrow": [(64, None), (48, None), (16, 112), (80, None), (128, 16), (112, None), (32, 96)],
    "128": [(128, None)],
    "256": [(256, None)],
    "wide": [(192, 128), (64, 256), (176, 208), (160, None), (256, 64), (240, 176), (144, 224), (208, 144), (48, 240)],
}
FP8_FEATURES = _FEATURES | {
    "dtypes": list(FP8_DTYPES),
    "out_dtype": [torch.bfloat16, torch.float16],
    "head_dims": list(FP8_HEAD_DIMS),
    "heads": [(2, 2), (2, 1), (3, 1)],
    "ctas": [("off", 132), ("on", 2), ("on", 1)],
    "layout": ["padded", "transposed", "expanded"],
    "seqlens": [(70, 301), (200, 77), (1, 150)],
    "descales": [True, True, False],
    "schedule": [
        {"late": True, "schedule_seed": 1},
        {"late": True, "schedule_seed": 2, "race": True},
        {"schedule_seed": 3, "race": True},
    ],
}


def cases() -> list[dict]:
    """Pairs of the levels in 16 bits, each level that stands for several values having its next one."""
    return in_turns(pairwise(FEATURES, seed=13), head_dims=HEAD_DIMS, ctas=CTAS, **_TURNS)


def fp8_cases() -> list[dict]:
    """The same in fp8."""
    return in_turns(pairwise(FP8_FEATURES, seed=1), dtypes=FP8_DTYPES, head_dims=FP8_HEAD_DIMS, **_TURNS)


def spec_of_case(case: dict, scale: int = 1) -> InputSpec:
    """Of either grid; ``scale``: factor of the lengths and of the window."""
    if "dtypes" not in case:
        return spec_of(case, scale)
    dtype, dtype_k, dtype_v = case["dtypes"]
    spec = spec_of(case | {"dtype": dtype}, scale)
    return dataclasses.replace(spec, dtype_k=dtype_k, dtype_v=dtype_v, descales=case["descales"])


def case_name(case: dict) -> str:
    """A test's id."""
    return f"{spec_name(spec_of_case(case))}-pack={case['pack_gqa']}-{case['ctas']}-{case['inputs']}"
