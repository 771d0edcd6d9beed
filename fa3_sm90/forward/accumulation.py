"""How the blocks' products P·V become O.

wgmma keeps about 14 bits of a sum of fp8 products (DeepSeek-V3 technical report, arXiv 2412.19437, section 3.3.2), too
few for the keys of a long context: there each block's P·V starts from zero and is added to O in fp32 registers.
"""

from collections.abc import Callable

import cutlass.cute as cute
from cutlass import Float32
from cutlass.cute.nvgpu import warpgroup

from cute_fa.device.fragments import warpgroup_rows_and_columns
from cute_fa.device.registers import placed_fma
from cute_fa.device.softmax import OnlineSoftmax
from fa3_sm90.forward.products import Products
from fa3_sm90.forward.rows import ROWS


class Direct:
    """wgmma adds to O itself, which is rescaled between two products."""

    def __init__(self, products: Products):
        self.output = products.acc_o
        self.rows = warpgroup_rows_and_columns(self.output)

    def clear(self):
        """Before a tile."""
        self.output.fill(0.0)

    def settle(self, softmax: OnlineSoftmax):
        """Between the wait for a block's product and the start of the next."""
        softmax.rescale(self.rows)

    def go_on(self, start: Callable[[int], None], beside: Callable[[int, int], None]):
        """What is left of the product that has been started, ``start(part)`` starts it. Beside it all shares of the
        exponentials are computed: ``beside(i, n)`` is share i of n."""
        beside(0, 1)

    def finish(self):
        """After the wait for the last product."""


class Promoted:
    """O = O · factor + P·V of a block, one fma an element: rescaling comes with it. Where registers do not hold a whole
    P·V beside O, its columns are computed in ``parts``, one after the other."""

    def __init__(self, products: Products, parts: int, has_units: bool):
        """``has_units``: blocks of v have descales of their own, and O is in units of the last block's."""
        self.partial, self.parts = products.acc_o, parts
        self.output = cute.make_rmem_tensor(products.shape_output, Float32)
        self.factors = cute.make_rmem_tensor(ROWS, Float32)
        self.has_units = has_units
        if has_units:
            self.ratio = cute.make_rmem_tensor(1, Float32)

    def clear(self):
        """Before a tile."""
        self.output.fill(0.0)
        self.partial.fill(0.0)
        self.factors.fill(1.0)

    def settle(self, softmax: OnlineSoftmax):
        """Between the wait for a block's last part and the start of the next block, whose factors are known by then."""
        self.finish()
        softmax.take_factors(self.factors)
        if self.has_units:
            self.factors.store(self.factors.load() * self.ratio[0])

    def change_unit(self, ratio: Float32):
        """The next :meth:`settle` starts a block of v with another descale: ``ratio`` takes O to its unit."""
        if self.has_units:
            self.ratio[0] = ratio

    def go_on(self, start: Callable[[int], None], beside: Callable[[int, int], None]):
        """All parts but the first, each once the one before is done, with a share of the exponentials beside each."""
        if self.parts == 1:
            beside(0, 1)
        for part in range(1, self.parts):
            warpgroup.wait_group(0)
            self.promote(part - 1)
            warpgroup.fence()
            start(part)
            beside(part - 1, self.parts - 1)

    def finish(self):
        """After the wait for the last part."""
        self.promote(self.parts - 1)

    def promote(self, part: int):
        """Add a part of P·V to O."""
        first = part * cute.size(self.partial)
        output = warpgroup_rows_and_columns(cute.make_tensor(self.output.iterator + first, self.partial.layout))
        partial = warpgroup_rows_and_columns(self.partial)
        for r in range(ROWS):
            for c in range(cute.size(partial, mode=[1])):
                output[r, c] = placed_fma(output[r, c], self.factors[r], partial[r, c])
