"""The FA3 forward, simulated, against the fp32 reference: features in pairs, edges of the mask, which blocks are
loaded, how tiles are shared out, pages, big strides."""

from typing import ClassVar

from cute_fa.semantics.types import SmArch
from fa3_sm90.forward.entry import Fa3Forward
from tests.testing.forward_tests import ForwardTests
from tests.testing.tiled_forward import Forward


class TestForward(ForwardTests):
    forward = Forward(Fa3Forward, SmArch.SM_90A)
    packed_tokens: ClassVar = {3: 3 * 21, 5: 3 * 12, 32: 3 * 2}  # of three warpgroups with 64 rows each
