"""The FA4 forward in fp8, simulated, against the fp32 reference: features in pairs, head_dims, descales of blocks, V
with its keys contiguous."""

from cute_fa.semantics.types import SmArch
from fa4_sm100.forward.entry import Fa4Forward
from tests.testing.fp8_tests import Fp8BlockDescaleTests, Fp8FeatureTests, Fp8KeyMajorTests, Fp8Tests
from tests.testing.tiled_forward import Forward

FORWARD = Forward(Fa4Forward, SmArch.SM_100A)


class TestFp8(Fp8Tests):
    forward = FORWARD


class TestFeatures(Fp8FeatureTests):
    forward = FORWARD


class TestBlockDescales(Fp8BlockDescaleTests):
    forward = FORWARD


class TestKeyMajor(Fp8KeyMajorTests):
    forward = FORWARD
