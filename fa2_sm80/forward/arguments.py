"""What the kernel of the FA2 forward takes."""

from typing import NamedTuple

from cutlass import Int32

from cute_fa.device.arguments import CommonArguments
from cute_fa.device.fake_arguments import common_fakes
from fa2_sm80.forward.config import Fa2ForwardConfig


class ForwardArguments(NamedTuple):
    """``seqlen_q``: the longest, which sizes the grid."""

    common: CommonArguments
    seqlen_q: Int32


def forward_fakes(config: Fa2ForwardConfig) -> ForwardArguments:
    """Arguments for ``cute.compile``."""
    return ForwardArguments(common_fakes(config), seqlen_q=Int32(0))
