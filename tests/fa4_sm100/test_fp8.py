"""The FA4 forward in fp8, simulated, against the fp32 reference: features in pairs, head_dims, descales of blocks, V
with its keys contiguous."""

import dataclasses
import math

import pytest
import torch

from cute_fa.semantics.types import DType, SmArch
from cute_fa.tools.inputs import InputSpec, make_inputs
from fa4_sm100.forward.entry import Fa4Forward
from tests.testing.fp8_tests import PAIRS, Fp8BlockDescaleTests, Fp8FeatureTests, Fp8KeyMajorTests, Fp8Tests
from tests.testing.tiled_forward import Forward

FORWARD = Forward(Fa4Forward, SmArch.SM_100A)


class TestFp8(Fp8Tests):
    forward = FORWARD

    @pytest.mark.sampled
    @pytest.mark.parametrize("index", range(0, len(PAIRS), 2))
    def test_pairs_of_head_dims(self, index):
        """Others are in the grid of features and among the shapes of ``test_forward.py``."""
        super().test_pairs_of_head_dims(index)

    def test_scores_at_the_limit(self):
        """From 2^24 on 1 is no digit of a score in log2 units: P of the best key, which each query sees alone, may have
        been rounded to e4m3, and is in its range."""
        given = make_inputs(InputSpec(1, 64, 300, 1, 1, 64, dtype=DType.E4M3, descales=False), "random")
        scores = torch.einsum("bqhd,bkhd->bhqk", given.q.double(), given.k.double())
        descale = 2.0**23.5 * 8 * math.log(2) / scores.max()
        given = dataclasses.replace(given, q_descale=torch.full((1, 1), descale))
        out, lse, _ = self.forward.launch(given)
        torch.testing.assert_close(lse.double(), scores.amax(-1) * given.q_descale / 8.0, rtol=1e-6, atol=0.0)
        best = given.v[0, scores[0, 0].argmax(-1)]
        torch.testing.assert_close(out[0].float(), best.float(), rtol=2.0**-4, atol=0.0)


class TestFeatures(Fp8FeatureTests):
    forward = FORWARD

    @pytest.mark.sampled
    @pytest.mark.parametrize("page_size", [8, 256])
    def test_pages_give_the_bits_of_contiguous_keys(self, page_size, contiguous):
        """The other sizes are in the grid of features."""
        super().test_pages_give_the_bits_of_contiguous_keys(page_size, contiguous)


class TestBlockDescales(Fp8BlockDescaleTests):
    forward = FORWARD


class TestKeyMajor(Fp8KeyMajorTests):
    forward = FORWARD
