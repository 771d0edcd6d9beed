"""What the kernels of the split-KV forward take."""

from typing import NamedTuple, Optional

import cutlass.cute as cute
from cutlass import Float32, Int32

from cute_fa.device.arguments import CommonArguments
from cute_fa.device.fake_arguments import common_fakes, fake_vector, optional
from fa2_sm80.split.config import Fa2SplitConfig


class Parts(NamedTuple):
    """What the splits leave for the second kernel, fp32: normalised ``out`` (splits, rows, head_dim_v), unwritten where
    ``lse`` (splits, rows) is −inf, or +inf for a query that does not count. Rows are the elements of the caller's LSE,
    in its order."""

    out: cute.Tensor
    lse: cute.Tensor


class SplitArguments(NamedTuple):
    """``parts``: None unless the keys are split; ``seqlen_q``: the longest, which sizes the grid."""

    common: CommonArguments
    parts: Optional[Parts]
    seqlen_q: Int32
    num_splits: Int32


def split_fakes(config: Fa2SplitConfig) -> SplitArguments:
    """Arguments for ``cute.compile``."""
    return SplitArguments(
        common=common_fakes(config),
        parts=optional(config.split, lambda: Parts(fake_vector(Float32, 3), fake_vector(Float32, 2))),
        seqlen_q=Int32(0),
        num_splits=Int32(0),
    )
