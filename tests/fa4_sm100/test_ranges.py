"""The FA4 forward under range plans, simulated."""

from cute_fa.semantics.types import SmArch
from fa4_sm100.forward.entry import Fa4Forward
from tests.testing.range_forwards import RangeForwardTests


class TestFa4Ranges(RangeForwardTests):
    kernel, arch = Fa4Forward, SmArch.SM_100A
