"""Ping-pong of the consumer warpgroups: who may issue matrix products next."""

import cutlass.cute as cute
from cutlass import Int32, const_expr

from fa3_sm90.config import WARPGROUP

# Named barrier of each consumer's turn; 0 is the CTA's own.
FIRST_TURN_BARRIER = 1


class Turns:
    """Warpgroups issue their products in a fixed cycle, so that the softmax of one runs beside the products of another
    (FlashAttention-3, arXiv 2407.08608, section 3.1). A named barrier of each warpgroup is completed by its own wait
    and the arrival of the one before it."""

    def __init__(self, warpgroups: int, index: Int32):
        self.warpgroups, self.index = warpgroups, index

    @cute.jit
    def start(self):
        """Once: the last warpgroup hands the first turn to the first."""
        if self.index == self.warpgroups - 1:
            self.pass_on()

    def take(self):
        """Wait for the own turn."""
        cute.arch.barrier(barrier_id=FIRST_TURN_BARRIER + self.index, number_of_threads=2 * WARPGROUP)

    @cute.jit
    def pass_on(self):
        """Hand the turn to the next warpgroup."""
        following = self.index + 1
        if const_expr(self.warpgroups == 2):
            following = 1 - self.index
        else:
            following = Int32(0) if following == self.warpgroups else following
        cute.arch.barrier_arrive(barrier_id=FIRST_TURN_BARRIER + following, number_of_threads=2 * WARPGROUP)
