"""Ping-pong of the consumer warpgroups: who may issue matrix products next."""

import cutlass.cute as cute
from cutlass import Int32

from fa3_sm90.common.wgmma import WARPGROUP

# Named barrier of each consumer's turn; 0 is the CTA's own.
FIRST_TURN_BARRIER = 1


class Turns:
    """Warpgroups issue their products in a fixed cycle, so that the softmax of one runs beside the products of another
    (FlashAttention-3, arXiv 2407.08608, section 3.1). A named barrier of each warpgroup is completed by its own wait
    and the arrival of the one before it."""

    def __init__(self, warpgroups: int, index: Int32):
        following = (index + 1) % warpgroups
        # through a shuffle, which ptxas does not compute again in every iteration as it would the numbers
        self.own = cute.arch.make_warp_uniform(FIRST_TURN_BARRIER + index)
        self.following = cute.arch.make_warp_uniform(FIRST_TURN_BARRIER + following)
        self.last = index == warpgroups - 1

    @cute.jit
    def start(self):
        """Once: the last warpgroup hands the first turn to the first."""
        if self.last:
            self.pass_on()

    def take(self):
        """Wait for the own turn."""
        cute.arch.barrier(barrier_id=self.own, number_of_threads=2 * WARPGROUP)

    def pass_on(self):
        """Hand the turn to the next warpgroup."""
        cute.arch.barrier_arrive(barrier_id=self.following, number_of_threads=2 * WARPGROUP)
