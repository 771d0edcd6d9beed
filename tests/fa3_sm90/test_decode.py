"""The Hopper decode, simulated, against the fp32 reference: features in pairs, shares of CTAs, pages, what is read."""

from collections import Counter

import pytest

from cute_fa.semantics.types import SmArch
from cute_fa.tools.inputs import InputSpec
from fa3_sm90.decode.entry import Fa3Decode
from tests.testing.cases import fa2_cases, small_problem
from tests.testing.loads import recorded_loads
from tests.testing.split_tests import Split, SplitTests, case_name, features

FEATURES = features(
    lengths=[
        {},
        {"seqused_k": True},
        {"varlen_q": True, "varlen_k": True},
        {"seqused_q": True, "page_size": 8},
        {"varlen_q": True, "page_size": 64},
        {"varlen_q": True, "seqused_q": True, "page_size": 16},
    ]
)


class TestDecode(SplitTests):
    split = Split("fa3_decode", "sm_90a")
    ctas_per_sm = 1

    def loads(self, given, num_sms):
        with recorded_loads() as loads:
            self.split.check(given, num_sms=num_sms)
        return loads

    def key_bytes(self, given, num_sms):
        return sum(load.bytes for load in self.loads(given, num_sms))

    def key_blocks(self, given, num_sms):
        """One box each."""
        of_k = (load for load in self.loads(given, num_sms) if load.extents[0] == given.spec.head_dim)
        return list(Counter(load.cta for load in of_k).values())

    @pytest.mark.parametrize("case", fa2_cases(FEATURES), ids=case_name)
    def test_features_in_pairs(self, case):
        self.split.run_case(case)

    @pytest.mark.gpu
    @pytest.mark.parametrize("case", fa2_cases(FEATURES), ids=case_name)
    def test_features_in_pairs_on_the_gpu(self, case):
        self.split.run_case_on_the_gpu(case)

    @pytest.mark.parametrize("page_size", [8, 16, 32, 64, 128, 256])
    def test_page_sizes(self, page_size):
        """Pages shorter than, as long as, and longer than a block of 64 keys; unlisted pages and unused slots are
        NaN."""
        self.split.run(InputSpec(2, 2, 300, 4, 2, 64, page_size=page_size, causal=True), "peaked", num_sms=5)


def test_every_pair_of_head_dims_fits_shared_memory():
    for head_dim in range(8, 257, 8):
        for head_dim_v in range(8, 257, 8):
            for seqlen_q in (1, 17, 100):
                sizes = {"head_dim": head_dim, "head_dim_v": head_dim_v, "seqlen_q": seqlen_q}
                config = Fa3Decode.configure(small_problem(SmArch.SM_90A, num_heads_kv=1, **sizes))
                assert config.smem_bytes <= config.arch.smem_bytes and config.stages >= 2
