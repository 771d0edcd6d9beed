"""Cluster launch control (PTX ISA, "clusterlaunchcontrol"): a running cluster takes over the tile of one that has not
been launched yet.

The grid has a cluster for each tile. Those that run ask for the next tile while they compute one; the hardware hands
out what it would have launched next, so that SMs which are done early, or are free late, take tiles as they come. No
document promises an order. A warp of each CTA asks, and hands the answer to the others through shared memory.
"""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32, const_expr

from cute_fa.device.pipeline_spec import RESPONSE_BYTES
from cute_fa.device.ring import Ring, RingState

NO_TILE = -1


class Handout(NamedTuple):
    """``ring`` of ``HANDOUT_STAGES``, released by every warp that takes tiles; ``responses``: as many times 16 bytes in
    shared memory; ``ctas`` of a cluster, of which the first asks for all."""

    ring: Ring
    responses: cute.Pointer
    ctas: int

    def response(self, stage: Int32) -> cute.Pointer:
        """Where a stage's answer is."""
        return self.responses + stage

    def take(self, place: RingState) -> Int32:
        """By a warp: the next tile, ``NO_TILE`` behind the last."""
        self.ring.wait(place)
        first_cta, _, _, granted = cute.arch.clc_response(self.response(place.stage))
        cute.arch.fence_proxy("async.shared", space="cta")
        self.ring.release(place.stage)
        return cutlass.select_(granted != 0, first_cta // self.ctas, Int32(NO_TILE))


@cute.jit
def hand_out(scheduler):
    """The asking warp: walks over the same tiles as the others, and asks for the next one of each."""
    ring, response, ctas = scheduler.handout.ring, scheduler.handout.response, scheduler.handout.ctas
    valid, advance, wait_free, expect = scheduler.valid, scheduler.next, ring.wait_free, ring.expect
    asks = cute.arch.block_idx_in_cluster() == 0 if const_expr(ctas > 1) else Boolean(True)
    state = scheduler.first()
    while valid(state):
        stage = state.place.stage
        if asks:  # in a pair all warps of both CTAs release the first one's
            wait_free(state.place)
        expect(stage, RESPONSE_BYTES)
        if asks:
            with cute.arch.elect_one():
                cute.arch.issue_clc_query(ring.full + stage, response(stage), multicast=ctas > 1)
        state = advance(state)
