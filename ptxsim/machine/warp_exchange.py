"""Warp-level communication at run time: PTX ISA 9.7.9 shfl.sync and 9.7.13 vote, match, redux, elect.

Values are arrays [warps, 32]; ``M`` is the mask of active lanes, None for all.
"""

from __future__ import annotations

import numpy as np

from ..arrays import full_width
from ..errors import SyncError
from ..frontend.locations import source_of
from ..ops.numerics import EXTREMES

_u4 = np.uint32
_LANE_BITS = _u4(1) << np.arange(32, dtype=_u4)


class WarpExchange:
    """Communication inside warps; ``lines_elsewhere(warp)`` gives the PTX lines where other lanes of a warp are."""

    def __init__(self, wave, lines_elsewhere):
        self.wave, self.lines_elsewhere = wave, lines_elsewhere

    def lanes(self, w, M, guard):
        """Lanes that are active and whose guard holds, as a bool array."""
        guard = full_width(guard, len(w))
        return guard if M is None else M & guard

    def require_whole(self, w, M):
        """An ``.aligned`` instruction must be executed by all live lanes of a warp."""
        missing = (self.wave.alive[w] != M).any(1)
        if missing.any():
            j = int(missing.argmax())
            text = self.wave.text
            away = ", ".join(
                f"PTX line {line}: {self.wave.ptx_line(line)}{source_of(text, line)}"
                for line in self.lines_elsewhere(w[j])
            )
            raise SyncError(
                "an .aligned instruction is executed by a part of a warp (bar.sync and bar.arrive are aligned, too)"
                + (f"\n    other lanes are at {away}" if away else ""),
                where=self.wave.lane_text(w[j], M[j]),
            )

    def require_members(self, w, M, members):
        """The lanes that execute must be exactly the live lanes of the membermask."""
        if M is None and np.ndim(members) == 0 and members == 0xFFFFFFFF:
            return
        active = self.wave.alive[w] if M is None else M
        mask = (full_width(members, len(w)) * active).max(1, initial=0).astype(_u4)
        wanted = ((mask[:, None] & _LANE_BITS) != 0) & self.wave.alive[w]
        wrong = (wanted != active).any(1)
        if wrong.any():
            j = int(wrong.argmax())
            raise SyncError(
                f"the membermask 0x{int(mask[j]):08x} names other lanes than the ones that execute",
                where=self.wave.lane_text(w[j], active[j]),
            )

    def shuffle(self, w, mode, a, b, c):
        """(value of the source lane, whether it is in range); segments and clamp as PTX ISA 9.7.9 defines them."""
        n = len(w)
        a = full_width(a, n)
        lane = np.arange(32)
        b, c = np.asarray(b).astype(np.int64), np.asarray(c).astype(np.int64)
        clamp, segment = c & 31, (c >> 8) & 31
        highest = (lane & segment) | (clamp & ~segment)
        lowest = lane & segment
        b = b & 31
        if mode == "idx":
            source = lowest | (b & ~segment)
            inside = source <= highest
        elif mode == "bfly":
            source = lane ^ b
            inside = source <= highest
        elif mode == "up":
            source = lane - b
            inside = source >= highest
        else:
            source = lane + b
            inside = source <= highest
        source = np.where(inside, source, lane)
        if source.ndim == 1:
            return a[:, source], np.broadcast_to(inside, (n, 32))
        return np.take_along_axis(a, np.broadcast_to(source, (n, 32)), 1), np.broadcast_to(inside, (n, 32))

    def elect(self, w, M):
        """(leader's lane, whether this lane is the leader): the lowest active lane."""
        n = len(w)
        chosen = np.zeros((n, 32), bool)
        if M is None:
            chosen[:, 0] = True
            return np.zeros((n, 32), _u4), chosen
        first = M.argmax(1)
        chosen[np.arange(n), first] = M.any(1)
        return np.broadcast_to(first.astype(_u4)[:, None], (n, 32)), chosen

    def vote(self, w, mode, condition, M):
        """vote.sync (PTX ISA 9.7.13) over the active lanes: any, all, uni (bool [n, 32]) or ballot (uint32 [n, 32])."""
        n = len(w)
        condition = full_width(condition, n)
        active = np.ones((n, 32), bool) if M is None else M
        if mode == "ballot":
            result = ((condition & active) * _LANE_BITS).sum(1, dtype=np.uint64).astype(_u4)
        elif mode == "any":
            result = (condition & active).any(1)
        elif mode == "all":
            result = (condition | ~active).all(1)
        else:
            result = (condition | ~active).all(1) | (~condition | ~active).all(1)
        return np.broadcast_to(result[:, None], (n, 32))

    def match_any(self, w, a, M):
        """Mask of the active lanes that have the same value."""
        n = len(w)
        a = full_width(a, n)
        active = np.ones((n, 32), bool) if M is None else M
        equal = (a[:, :, None] == a[:, None, :]) & active[:, None, :]
        return (equal * _LANE_BITS).sum(2, dtype=np.uint64).astype(_u4)

    def reduce(self, w, operation, a, M, nan):
        """Reduction over the active lanes; ``nan``: a NaN operand wins (min and max of f32)."""
        n = len(w)
        a = full_width(a, n)
        if a.dtype.kind == "f":
            function = EXTREMES[operation + (".NaN" if nan else "")]
        else:
            function = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and,
                        "or": np.bitwise_or, "xor": np.bitwise_xor}[operation]  # fmt: skip
        if M is None:
            result = function.reduce(a, axis=1, dtype=a.dtype)
        else:
            result = np.array([function.reduce(a[j][M[j]], dtype=a.dtype) for j in range(n)], a.dtype)
        return np.broadcast_to(result[:, None], (n, 32))
