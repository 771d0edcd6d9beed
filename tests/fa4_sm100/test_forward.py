"""The FA4 forward, simulated, against the fp32 reference: features in pairs, edges of the mask, which blocks are
loaded, how tiles are shared out, pages, big strides."""

from typing import ClassVar

from cute_fa.semantics.types import SmArch
from fa4_sm100.forward.entry import Fa4Forward
from tests.testing.forward_tests import ForwardTests
from tests.testing.tiled_forward import Forward


class TestForward(ForwardTests):
    forward = Forward(Fa4Forward, SmArch.SM_100A)
    packed_tokens: ClassVar = {3: 2 * 42, 5: 2 * 25, 32: 2 * 4}  # of two tiles with 128 rows each
