"""The FA3 forward in fp8, simulated, against the fp32 reference: types, head_dims, masks, scores and layouts in pairs,
pages, what lies outside the lengths."""

from cute_fa.semantics.types import SmArch
from fa3_sm90.forward.entry import Fa3Forward
from tests.testing.fp8_tests import Fp8FeatureTests
from tests.testing.tiled_forward import Forward


class TestFeatures(Fp8FeatureTests):
    forward = Forward(Fa3Forward, SmArch.SM_90A)
