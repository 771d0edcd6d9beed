"""The registers of a CTA as setmaxnreg moves them between warpgroups: PTX ISA 9.7.19.5.

A launch gives each thread the registers that the cubin names, rounded up to a multiple of 8, as the hardware hands them
out. ``setmaxnreg.dec`` gives registers to the pool of the CTA, ``.inc`` waits until the pool has enough. What exited
warps owned does not return to the pool. How many registers a role really uses after its setmaxnreg is decided by ptxas
and cannot be seen in PTX.
"""

from __future__ import annotations

import numpy as np

from .errors import SyncError
from .limits import allocated_registers
from .scheduler import Blocked

_LEAST, _MOST, _MULTIPLE = 24, 256, 8
_WARPGROUP = 4  # warps


class RegisterMixin:
    """setmaxnreg of ``Machine``. Needs the scheduler and the numbering of warps; owns launch_registers,
    owned_registers, free_registers, resizes, resized_to and resized_at."""

    def init_registers(self, registers):
        """``registers``: those of a thread at launch; None if they are not known, then no pool is kept."""
        self.launch_registers = registers
        self.resizes = True  # False: ptxas has dropped setmaxnreg from the machine code, and it does nothing
        if registers is not None:
            self.owned_registers = np.full(self.nwarps, allocated_registers(registers, 1) // 32)
            self.free_registers = np.zeros(self.nctas, np.int64)
        self.resized_to = np.zeros(self.nwarps, np.int64)  # count of the latest setmaxnreg, 0 if none
        self.resized_at = np.zeros(self.nwarps, np.int64)  # its PTX line

    def h_setmaxnreg(self, i, block, group):
        """setmaxnreg: .dec at once, .inc when the pool has the registers. SyncError for counts that are not legal."""
        w, count, increase = group.w, int(i.args[0], 0), i.mods.action == "inc"
        if not self.resizes:
            self.groups.append(group)
            return
        if not _LEAST <= count <= _MOST or count % _MULTIPLE:
            raise SyncError(f"setmaxnreg to {count} registers, not a multiple of {_MULTIPLE} in {_LEAST}..{_MOST}")
        self.resized_to[w], self.resized_at[w] = count, i.line
        if self.launch_registers is None:
            self.groups.append(group)
            return
        for warp in w:
            owned = int(self.owned_registers[warp])
            if owned > count if increase else owned < count:
                raise SyncError(f"setmaxnreg.{i.mods.action} to {count} registers by a warp that owns {owned}",
                                where=self.warp_text(warp))  # fmt: skip

        def check(b):
            done = np.zeros(len(b.w), bool)
            for j, warp in enumerate(b.w):
                cta = self.cta_of[warp]
                needed = 32 * (count - self.owned_registers[warp])
                if needed <= self.free_registers[cta]:
                    self.free_registers[cta] -= needed
                    self.owned_registers[warp] = count
                    done[j] = True
            self.progress += bool(done.any() and not increase)
            return done

        self.block_or_go(Blocked(block.idx, w, group.M, group.epoch, check, "setmaxnreg", None,
                                 dict(count=np.full(len(w), count))))  # fmt: skip

    def describe_register_wait(self, b):
        """Lines about the registers that blocked warps wait for: those of every warpgroup of their CTAs."""
        lines = []
        for cta in np.unique(self.cta_of[b.w])[:4]:
            total = allocated_registers(self.launch_registers, self.wpc)
            lines.append(f"cta{self.cta_name(cta)}: {self.free_registers[cta]} registers are free of {total} "
                         f"(launched with {self.launch_registers} a thread, {self.wpc} warps)")  # fmt: skip
            waiting = {int(warp): int(count) for warp, count in zip(b.w, b.info["count"], strict=True)}
            for first in range(0, self.wpc, _WARPGROUP):
                warps = [x * self.nctas + int(cta) for x in range(first, min(first + _WARPGROUP, self.wpc))]
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
        for first in range(0, self.wpc if self.resized_to.any() else 0, _WARPGROUP):
            part = slice(first * self.nctas, min(first + _WARPGROUP, self.wpc) * self.nctas)
            counts = self.resized_to[part].reshape(-1, self.nctas)
            wrong = (counts != counts[0]).any(0) | (counts.any(0) & (len(counts) < _WARPGROUP))
            if wrong.any():
                cta = int(wrong.argmax())
                line = int(self.resized_at[part].reshape(-1, self.nctas)[:, cta].max())
                raise SyncError(
                    f"setmaxnreg by some of the warps of warpgroup {first // _WARPGROUP} of cta{self.cta_name(cta)}: "
                    f"all four must execute the same one",
                    line=line,
                    text=self.ptx_line(line),
                )
