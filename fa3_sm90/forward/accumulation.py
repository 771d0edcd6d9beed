"""How the blocks' products P·V become O.

wgmma keeps about 14 bits of a sum of fp8 products (DeepSeek-V3 technical report, arXiv 2412.19437, section 3.3.2), too
few for the keys of a long context: there each block's P·V starts from zero and is added to O in fp32 registers.
"""

import cutlass.cute as cute

from cute_fa.device.fragments import warpgroup_rows_and_columns
from cute_fa.device.softmax import OnlineSoftmax
from fa3_sm90.forward.rows import ROWS


class Direct:
    """wgmma adds to O itself, which is rescaled between two products."""

    def __init__(self, acc: cute.Tensor):
        self.output, self.rows = acc, warpgroup_rows_and_columns(acc)

    def clear(self):
        """Before a tile."""
        self.output.fill(0.0)

    def settle(self, softmax: OnlineSoftmax):
        """Between the wait for a block's product and the start of the next."""
        softmax.rescale(self.rows)

    def finish(self):
        """After the wait for the last product."""


class Promoted:
    """O = O · factor + P·V of a block, one fma an element: rescaling comes with it."""

    def __init__(self, acc: cute.Tensor):
        """``acc``: the accumulator of one block's P·V."""
        self.partial = acc
        self.output = cute.make_rmem_tensor_like(acc)
        self.factors = cute.make_rmem_tensor(ROWS, self.output.element_type)

    def clear(self):
        """Before a tile."""
        self.output.fill(0.0)
        self.partial.fill(0.0)
        self.factors.fill(1.0)

    def settle(self, softmax: OnlineSoftmax):
        """Between the wait for a block's product and the start of the next; the next one's factors are known by then."""
        self.finish()
        softmax.take_factors(self.factors)

    def finish(self):
        """After the wait for the last product."""
        output, partial = warpgroup_rows_and_columns(self.output), warpgroup_rows_and_columns(self.partial)
        for r in range(ROWS):
            row = output[r, None]
            row.store(row.load() * self.factors[r] + partial[r, None].load())
