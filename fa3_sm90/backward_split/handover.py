"""P on its way from the warpgroup of dV to that of dK: both hold the same scores in the same threads.

P has a stage where Q has one. A stage is free when the next Q has come there: the warpgroup of dK releases Q behind its
reads of P. And where P has come, Q has.
"""

import cutlass.cute as cute
from cutlass import Int32, Uint32
from cutlass.cute.arch import inline_ptx

from cute_fa.device.ring import Ring, RingState
from fa3_sm90.backward_split.config import TILE
from fa3_sm90.common.wgmma import WARPGROUP

_STAGE_BYTES = TILE * TILE * 2
_QUADS = _STAGE_BYTES // (16 * WARPGROUP)


class Handover:
    """One side of it, of one thread: quad e of thread t lies at (e · 128 + t) · 16 bytes of a stage."""

    def __init__(self, pointer: cute.Pointer, ring: Ring, thread: Int32):
        self.ring = ring
        self.address = cute.arch.make_warp_uniform(pointer.toint()) + thread * 16

    def put(self, p: cute.Tensor, stage: Int32):
        """Narrowed P, in the order of the accumulator, by a warpgroup that has waited for Q of the step."""
        words = cute.recast_tensor(p, Uint32)
        address = self.address + stage * _STAGE_BYTES
        for quad in range(_QUADS):
            inline_ptx(
                f"st.shared.v4.b32 [{{$r0}}+{quad * 16 * WARPGROUP}], {{{{$r1}}, {{$r2}}, {{$r3}}, {{$r4}}}};",
                read_only_args=[address, *(words[4 * quad + e] for e in range(4))],
            )
        self.ring.signal(stage)

    def take(self, p: cute.Tensor, state: RingState):
        """Into a fragment like the one that was put. Q of the step has come then."""
        words = cute.recast_tensor(p, Uint32)
        self.ring.wait(state)
        address = self.address + state.stage * _STAGE_BYTES
        for quad in range(_QUADS):
            values = inline_ptx(
                "ld.shared.v4.b32 {{$w0}, {$w1}, {$w2}, {$w3}}, [{$r0}+" + str(quad * 16 * WARPGROUP) + "];",
                write_only_types=[Uint32] * 4,
                read_only_args=[address],
            )
            for e in range(4):
                words[4 * quad + e] = values[e]
