"""The FA3 forward under range plans, simulated."""

from cute_fa.semantics.types import SmArch
from fa3_sm90.forward.entry import Fa3Forward
from tests.testing.range_forwards import RangeForwardTests


class TestFa3Ranges(RangeForwardTests):
    kernel, arch = Fa3Forward, SmArch.SM_90A
