"""The FA3 backward, simulated, against the reference: features in pairs, edges of the mask, head_dims, ragged lengths,
big strides."""

import random
from typing import ClassVar

import pytest

from cute_fa.semantics.types import DType, SmArch
from cute_fa.tools.inputs import InputSpec
from fa3_sm90.backward.entry import Fa3Backward
from tests.testing.backward_tests import BackwardTests, case_name, features
from tests.testing.cases import FA2_MASKS
from tests.testing.grid import in_turns, pairwise

# Levels as tiles have them: 128 queries a step; 64, where dQ has half a panel a warpgroup; 64, where it has whole ones.
HEAD_DIMS = {
    "64": [(64, None)],
    "sum to 128": [(8, None), (40, 24), (16, 112), (72, 40), (112, 8), (56, 72), (32, 96)],
    "64 wide": [(64, 72), (24, 128), (48, 192), (56, 104), (64, 128), (8, 184)],
    "128": [(128, None)],
    "128 wide": [(72, 64), (104, 120), (80, None), (128, 64), (96, None), (120, 88), (112, 40)],
}
WAYS = (False, True)
CASES = in_turns(pairwise(features(list(HEAD_DIMS), WAYS), seed=1), mask=FA2_MASKS, head_dims=HEAD_DIMS)
# A compile takes seconds: the first 24 of 36 cases hold 86 % of the pairs and every level; a GPU runs all.
SIMULATED_CASES = CASES[:24]
SAMPLED_HEAD_DIMS = random.Random(1).sample([(d, d_v) for d in range(8, 129, 8) for d_v in range(8, 129, 8)], 32)
RAGGED = {
    "packed": {"varlen_q": True, "varlen_k": True},
    "used": {"seqused_q": True, "seqused_k": True},
    "packed and used": {"varlen_q": True, "varlen_k": True, "seqused_q": True, "seqused_k": True},
}


class TestBackward(BackwardTests):
    kernel = Fa3Backward
    arch = SmArch.SM_90A
    ways = WAYS
    head_dims: ClassVar = (64, 128)

    @pytest.mark.sampled
    @pytest.mark.parametrize("case", SIMULATED_CASES, ids=case_name)
    def test_features_in_pairs(self, case):
        self.run_case(case)

    @pytest.mark.gpu
    @pytest.mark.parametrize("case", CASES, ids=case_name)
    def test_features_in_pairs_on_the_gpu(self, case):
        self.run_case_on_the_gpu(case)

    @pytest.mark.sampled
    @pytest.mark.parametrize("head_dims", SAMPLED_HEAD_DIMS[:6], ids=str)
    def test_head_dims(self, head_dims):
        head_dim, head_dim_v = head_dims
        self.check_ways(InputSpec(1, 150, 260, 2, 1, head_dim, head_dim_v=head_dim_v, causal=True))

    @pytest.mark.gpu
    @pytest.mark.parametrize("head_dims", SAMPLED_HEAD_DIMS, ids=str)
    def test_head_dims_on_the_gpu(self, head_dims):
        head_dim, head_dim_v = head_dims
        spec = InputSpec(1, 150, 260, 2, 1, head_dim, head_dim_v=head_dim_v, causal=True)
        self.check_on_the_gpu(spec, "peaked")

    @pytest.mark.sampled
    @pytest.mark.parametrize("head_dim", [64, 128])
    @pytest.mark.parametrize("ragged", RAGGED)
    def test_queries_without_keys_and_keys_without_queries(self, ragged, head_dim):
        """Of six sequences one has neither, one no key, one no query; odd lengths, NaN behind each. The tile of 128
        keys is full, one short, one more."""
        lengths = {"lengths_q": (0, 129, 0, 127, 65, 201), "lengths_k": (0, 0, 77, 127, 129, 128)}
        spec = InputSpec(6, 201, 129, 2, 1, head_dim, causal=True, **RAGGED[ragged], **lengths)
        self.check(spec, race=True)

    @pytest.mark.sampled
    @pytest.mark.parametrize("ragged", RAGGED)
    def test_slopes_count_no_key_behind_a_sequence(self, ragged):
        """Such keys are zeros, which move no gradient but that of the slopes; tiles that lie behind a sequence have
        parts of it, too."""
        lengths = {"lengths_q": (70, 33, 1), "lengths_k": (200, 5, 1)}
        spec = InputSpec(3, 70, 200, 2, 2, 64, alibi=True, **RAGGED[ragged], **lengths)
        self.check(spec, "random")

    @pytest.mark.sampled
    @pytest.mark.parametrize("head_dim", [64, 128])
    @pytest.mark.parametrize("dtype", [DType.BF16, DType.FP16])
    def test_a_group_shares_keys(self, head_dim, dtype):
        """Five query heads a kv head: a ring of two stages runs through an odd number of steps, of several heads."""
        self.check(InputSpec(2, 190, 150, 10, 2, head_dim, dtype=dtype, window=(60, 20)))
