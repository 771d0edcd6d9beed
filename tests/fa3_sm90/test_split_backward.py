"""The FA3 backward for wide head_dims, simulated, against the reference: features in pairs, edges of the mask,
head_dims, ragged lengths, adversarial schedules."""

import dataclasses
import functools
import random
from typing import ClassVar

import pytest

from cute_fa.semantics.types import Direction, DType, SmArch
from cute_fa.tools.inputs import InputSpec
from cute_fa.tools.trial import problem_of_spec
from fa3_sm90.backward_split.entry import Fa3SplitBackward
from tests.testing.backward_tests import BackwardTests, case_name, features
from tests.testing.cases import FA2_MASKS
from tests.testing.gradients import assert_right, gradients_of, same_bits
from tests.testing.grid import in_turns, pairwise
from tests.testing.simulated import ctas_at_a_time

# Rings of two stages of K and one of V; of two; with a third stage of Q and dO.
HEAD_DIMS = {
    "256": [(256, None), (248, None), (256, 240)],
    "two stages": [(256, 192), (192, 240), (224, None)],
    "three stages": [(192, None), (192, 128), (136, 128), (64, 208), (256, 8), (8, 256), (152, 112)],
}
CASES = in_turns(pairwise(features(list(HEAD_DIMS), (False, True)), seed=2), mask=FA2_MASKS, head_dims=HEAD_DIMS)
SIMULATED_CASES = CASES[:16]
WIDE = [(d, d_v) for d in range(8, 257, 8) for d_v in range(8, 257, 8) if -(-d // 16) * 16 + -(-d_v // 16) * 16 > 256]
SAMPLED_HEAD_DIMS = random.Random(3).sample(WIDE, 32)
RAGGED = {
    "packed": {"varlen_q": True, "varlen_k": True},
    "used": {"seqused_q": True, "seqused_k": True},
    "packed and used": {"varlen_q": True, "varlen_k": True, "seqused_q": True, "seqused_k": True},
}


class TestSplitBackward(BackwardTests):
    kernel = Fa3SplitBackward
    arch = SmArch.SM_90A
    head_dims: ClassVar = (64,)
    head_dim_v: ClassVar = 208

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
        self.check(InputSpec(1, 150, 260, 2, 1, head_dim, head_dim_v=head_dim_v, causal=True))

    @pytest.mark.gpu
    @pytest.mark.parametrize("head_dims", SAMPLED_HEAD_DIMS, ids=str)
    def test_head_dims_on_the_gpu(self, head_dims):
        head_dim, head_dim_v = head_dims
        spec = InputSpec(1, 150, 260, 2, 1, head_dim, head_dim_v=head_dim_v, causal=True)
        self.check_on_the_gpu(spec, "peaked")

    @pytest.mark.parametrize("ragged", RAGGED)
    def test_queries_without_keys_and_keys_without_queries(self, ragged):
        """Of seven sequences one has neither, one no key, one no query; odd lengths, NaN behind each. Tiles of 64 keys
        and of 128 queries are full, one short, one more; of the last, half is behind the queries."""
        lengths = {"lengths_q": (0, 129, 0, 127, 65, 201, 64), "lengths_k": (0, 0, 77, 127, 129, 128, 65)}
        spec = self.spec(7, 201, 129, 2, 1, 64, causal=True, **RAGGED[ragged], **lengths)
        self.check(spec, race=True)

    @pytest.mark.parametrize("ragged", RAGGED)
    def test_slopes_count_no_key_behind_a_sequence(self, ragged):
        """Such keys are zeros, which move no gradient but that of the slopes; tiles that lie behind a sequence have
        parts of it, too."""
        lengths = {"lengths_q": (190, 33, 1), "lengths_k": (200, 5, 1)}
        spec = self.spec(3, 190, 200, 2, 2, 64, alibi=True, **RAGGED[ragged], **lengths)
        self.check(spec, "random")

    @pytest.mark.parametrize("dtype", [DType.BF16, DType.FP16])
    def test_a_group_shares_keys(self, dtype):
        """Five query heads a kv head: a ring runs through steps of several heads."""
        self.check(self.spec(2, 190, 150, 10, 2, 64, dtype=dtype, window=(60, 20)))

    @pytest.mark.parametrize("features", [{"softcap": 3.0}, {"softcap": 3.0, "alibi": True}], ids=str)
    def test_what_is_handed_on_holds_the_softcap(self, features):
        """dK's warpgroup gets P times the cap's derivatives, dV's keeps P."""
        self.check(self.spec(1, 130, 200, 2, 1, 64, **features), race=True)


PACKED = {"varlen_q": True, "varlen_k": True, "lengths_q": (450, 0, 70), "lengths_k": (300, 60, 0)}
# Rings that run full and over, in several heads; tiles without queries and without keys.
SPECS = {
    "256": InputSpec(1, 400, 300, 3, 1, 256, causal=True, alibi=True, learnable_sink=True),
    "192, 128": InputSpec(3, 450, 300, 2, 1, 192, head_dim_v=128, window=(150, 20), dtype=DType.FP16, **PACKED),
}
# CTAs at a time, and how their warps run
SCHEDULES = [
    (64, {"late": True}),
    (64, {"schedule_seed": 1}),
    (1, {"late": True, "schedule_seed": 2}),
    (3, {"late": True, "schedule_seed": 3}),
]


@functools.cache
def usual(name: str):
    """The gradients under the usual schedule, found right."""
    grads, expected = gradients_of(SPECS[name], "peaked", arch="sm_90a", family="fa3", race=True)
    assert all(error.ok for error in expected.check(grads).values())
    return grads


@pytest.mark.parametrize(("sms", "schedule"), SCHEDULES, ids=str)
@pytest.mark.parametrize("name", SPECS)
def test_the_same_bits_under_every_schedule(name, sms, schedule):
    with ctas_at_a_time(sms):
        grads, _ = gradients_of(SPECS[name], "peaked", arch="sm_90a", family="fa3", race=True, **schedule)
    assert same_bits(usual(name), grads)


class TestClusters:
    """Two CTAs that own keys and share their queries."""

    # the second CTA of the last pair has no keys; queries end within a CTA's half of a block
    @pytest.mark.parametrize("schedule", [{}, {"late": True, "schedule_seed": 1}], ids=str)
    @pytest.mark.parametrize(
        "spec",
        [
            InputSpec(1, 100, 17 * 64 - 9, 2, 1, 64, head_dim_v=208),
            InputSpec(3, 150, 128, 4, 2, 256, seqused_q=True, lengths_q=(150, 31, 0), alibi=True),
        ],
        ids=["odd", "used"],
    )
    def test_right(self, spec, schedule):
        config = Fa3SplitBackward.configure(problem_of_spec(spec, SmArch.SM_90A, direction=Direction.BACKWARD))
        assert config.cluster == 2
        assert_right(spec, "peaked", arch="sm_90a", family="fa3", race=True, **schedule)

    def test_the_bits_of_one_cta(self):
        """Under a bound that hides nothing there are no clusters."""
        spec = InputSpec(2, 150, 250, 2, 1, 192)
        alone = dataclasses.replace(spec, window=(None, 1000))
        pairs, single = (gradients_of(s, "peaked", arch="sm_90a", family="fa3")[0] for s in (spec, alone))
        assert same_bits(pairs, single)
