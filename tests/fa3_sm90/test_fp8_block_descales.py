"""Descales of blocks of keys in fp8, simulated: masks, scores and layouts, of k alone, of v alone, far apart; what the
host refuses."""

import dataclasses

import pytest
import torch

import cute_fa
from cute_fa import errors
from cute_fa.semantics.types import SmArch
from cute_fa.tools.inputs import make_inputs
from fa3_sm90.forward.entry import Fa3Forward
from tests.testing.fp8_tests import BLOCKS, Fp8BlockDescaleTests
from tests.testing.tiled_forward import Forward


class TestBlockDescales(Fp8BlockDescaleTests):
    forward = Forward(Fa3Forward, SmArch.SM_90A)


@pytest.mark.parametrize(
    ("name", "descale", "error", "message"),
    [
        ("k_descale", torch.ones(2, 2, 2), errors.ShapeError, r"k_descale \(2, 2, 2\): \(2, 2, 3\) is needed"),
        ("v_descale", torch.ones(2, 1, 3), errors.ShapeError, r"v_descale \(2, 1, 3\): \(2, 2, 3\) is needed"),
        ("v_descale", torch.ones(2, 2, 6)[..., ::2], errors.StrideError, "v_descale .*last dimension must be contig"),
        ("k_descale", torch.ones(2, 2, 3).double(), errors.DTypeError, "k_descale is float64: float32 is needed"),
        ("k_descale", torch.tensor([1.0, 1, 0]).expand(2, 2, 3), errors.ArgumentError, r"k_descale\[0, 0, 2\]=0"),
        ("q_descale", torch.ones(2, 2, 3), errors.ShapeError, r"q_descale \(2, 2, 3\): \(2, 2\) is needed, or one"),
    ],
)
def test_what_is_refused(name, descale, error, message):
    given = make_inputs(dataclasses.replace(BLOCKS, batch=2, heads=2, heads_kv=2))
    with cute_fa.simulate("sm_90a"), pytest.raises(error, match=message):
        cute_fa.flash_attn_func(given.q, given.k, given.v, **{name: descale})
