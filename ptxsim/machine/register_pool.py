"""The registers of a CTA as setmaxnreg moves them between warpgroups: PTX ISA 9.7.19.5.

A launch gives each thread the registers that the cubin names, rounded up to a multiple of 8, as the hardware hands them
out. ``setmaxnreg.dec`` gives registers to the pool of the CTA, ``.inc`` waits until the pool has enough. What exited
warps owned does not return to the pool. How many registers a role really uses after its setmaxnreg is decided by ptxas
and cannot be seen in PTX.
"""

from __future__ import annotations

import numpy as np

from ..errors import SyncError
from .limits import allocated_registers
from .waiting import Wait

_LEAST, _MOST, _MULTIPLE = 24, 256, 8
_WARPGROUP = 4  # warps


class RegisterPool:
    """What each warp owns and each CTA has left; no pool is kept where the registers at launch are not known."""

    def __init__(self, wave):
        self.wave = wave
        self.launch_registers = registers = wave.launch.registers
        if registers is not None:
            self.owned_registers = np.full(self.wave.nwarps, allocated_registers(registers, 1) // 32)
            self.free_registers = np.zeros(self.wave.nctas, np.int64)
        self.resized_to = np.zeros(self.wave.nwarps, np.int64)  # count of the latest setmaxnreg, 0 if none
        self.resized_at = np.zeros(self.wave.nwarps, np.int64)  # its PTX line

    def set(self, i, group):
        """setmaxnreg: .dec at once, .inc when the pool has the registers. SyncError for counts that are not legal."""
        w, count, increase = group.w, int(i.args[0], 0), i.mods.action == "inc"
        if not self.wave.launch.resizes:  # ptxas has dropped it from the machine code
            return None
        if not _LEAST <= count <= _MOST or count % _MULTIPLE:
            raise SyncError(f"setmaxnreg to {count} registers, not a multiple of {_MULTIPLE} in {_LEAST}..{_MOST}")
        self.resized_to[w], self.resized_at[w] = count, i.line
        if self.launch_registers is None:
            return None
        for warp in w:
            owned = int(self.owned_registers[warp])
            if owned > count if increase else owned < count:
                raise SyncError(f"setmaxnreg.{i.mods.action} to {count} registers by a warp that owns {owned}",
                                where=self.wave.warp_text(warp))  # fmt: skip

        def check(wait):
            done = np.zeros(len(wait.w), bool)
            for j, warp in enumerate(wait.w):
                cta = self.wave.cta_of[warp]
                needed = 32 * (count - self.owned_registers[warp])
                if needed <= self.free_registers[cta]:
                    self.free_registers[cta] -= needed
                    self.owned_registers[warp] = count
                    done[j] = True
            self.wave.progress += bool(done.any() and not increase)
            return done

        return Wait(group, "setmaxnreg", check, dict(count=np.full(len(w), count)), describe=self.describe_wait)

    def describe_wait(self, wait):
        """Lines about the registers that blocked warps wait for: those of every warpgroup of their CTAs."""
        lines = []
        for cta in np.unique(self.wave.cta_of[wait.w])[:4]:
            total = allocated_registers(self.launch_registers, self.wave.wpc)
            lines.append(f"cta{self.wave.cta_name(cta)}: {self.free_registers[cta]} registers are free of {total} "
                         f"(launched with {self.launch_registers} a thread, {self.wave.wpc} warps)")  # fmt: skip
            waiting = {int(warp): int(count) for warp, count in zip(wait.w, wait.info["count"], strict=True)}
            for first in range(0, self.wave.wpc, _WARPGROUP):
                warps = [x * self.wave.nctas + int(cta) for x in range(first, min(first + _WARPGROUP, self.wave.wpc))]
                owned = "/".join(map(str, dict.fromkeys(self.owned_registers[warps].tolist())))
                wanted = [x for x in warps if x in waiting]
                more = sum(32 * (waiting[x] - int(self.owned_registers[x])) for x in wanted)
                lines.append(f"  warpgroup {first // _WARPGROUP} owns {owned} a thread" + (
                    f" and waits for {waiting[wanted[0]]}: {more} registers more" if wanted else ""))  # fmt: skip
        return lines

    def check_warpgroups(self):
        """At the end of a wave: SyncError unless all warps of a warpgroup executed the same setmaxnreg last.

        The same count counts as the same instruction: the last four warps of FlashAttention-4's forward for sm_100 run
        one each in branches of their own.
        """
        for first in range(0, self.wave.wpc if self.resized_to.any() else 0, _WARPGROUP):
            part = slice(first * self.wave.nctas, min(first + _WARPGROUP, self.wave.wpc) * self.wave.nctas)
            counts = self.resized_to[part].reshape(-1, self.wave.nctas)
            wrong = (counts != counts[0]).any(0) | (counts.any(0) & (len(counts) < _WARPGROUP))
            if wrong.any():
                cta = int(wrong.argmax())
                line = int(self.resized_at[part].reshape(-1, self.wave.nctas)[:, cta].max())
                raise SyncError(
                    f"setmaxnreg by some of the warps of warpgroup {first // _WARPGROUP} of "
                    f"cta{self.wave.cta_name(cta)}: all four must execute the same one",
                    line=line,
                    text=self.wave.ptx_line(line),
                )
