"""What the kernels of the forwards whose CTAs share all key blocks take."""

from typing import NamedTuple

from cutlass import Float32, Int32

from cute_fa.device.arguments import CommonArguments
from cute_fa.device.fake_arguments import common_fakes, fake_vector, optional
from cute_fa.device.split_parts import Parts
from cute_fa.device.split_walk import SplitGrid


class SplitArguments(NamedTuple):
    """``parts``: scratch memory, empty where no tile is cut."""

    common: CommonArguments
    parts: Parts
    grid: SplitGrid

    @classmethod
    def fakes(cls, config) -> "SplitArguments":
        """For ``cute.compile``; ``config``: of the kernel, with ``even``: whether the line is cut evenly, and
        ``batch_invariant``: whether there are chunks."""
        parts, *of_chunks = (
            optional(given, lambda: Int32(0)) for given in (not config.even, *[config.batch_invariant] * 2)
        )
        grid = SplitGrid(Int32(0), Int32(0), parts, *of_chunks)
        return cls(common_fakes(config), Parts(fake_vector(Float32, 3), fake_vector(Float32, 2)), grid)
