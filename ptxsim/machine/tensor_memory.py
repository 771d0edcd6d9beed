"""Tensor memory of the fifth generation's tensor core at run time: PTX ISA 9.7.16 (tcgen05).

Tensor memory is [128 lanes, 512 columns] of 32 bits for each CTA; an address is lane << 16 | column. In the late
mode the operations of one warp are deferred together with their commit and performed in order.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..arrays import active_threads, full_width
from ..errors import MemoryFault, PtxError, SyncError
from .waiting import Wait

_u4 = np.uint32
COLUMNS = 512


@dataclass(eq=False, frozen=True, slots=True)
class Commit:
    """tcgen05.commit of a thread: an arrival at the mbarrier with flat index ``signal`` when what the warp issued
    before is over; ``barrier`` is the address that the instruction names."""

    warp: int
    barrier: int
    signal: int


class TensorMemory:
    """Tensor memory of the CTAs: ``words`` [CTAs, 128, 512] (uint32), and which columns are allocated.

    ``allocations`` maps (CTA, first column) to (columns, PTX line). A program without tcgen05 has none of it.
    """

    def __init__(self, wave, shared, registers, mbarriers, deferred):
        self.wave, self.events, self.shared, self.registers = wave, wave.events, shared, registers
        self.mbarriers, self.deferred = mbarriers, deferred
        self.queues = {}  # warp -> deferred operations, in order
        self.allocations = {}
        if wave.program.has_tensor_memory:
            self.relinquished = np.zeros(wave.nctas, bool)
            self.words = np.full((wave.nctas, 128, COLUMNS), 0xFFFFFFFF, _u4)
            self.used = np.zeros((wave.nctas, COLUMNS), bool)

    def defer(self, warp, action):
        """Perform an operation of a warp now, or (late mode) after those that it issued before."""
        warp = int(warp)
        if not self.wave.late:
            action()
            return
        queue = self.queues.setdefault(warp, [])
        if not queue:
            self.deferred.later(lambda: self._drain(warp))
        queue.append(self.deferred.located(action, self.wave.warp_text, warp))

    def _drain(self, warp):
        for action in self.queues.pop(warp):
            action()

    # ---- allocation -------------------------------------------------------------------------------
    def allocate(self, i, group):
        """Waits until enough columns are free, then writes the address of the first to shared memory."""
        w = group.w
        destination = full_width(self.registers.address(i.args[0], w), len(w))
        columns = full_width(self.registers.value(i.args[1], w), len(w))[:, 0].astype(np.int64)
        for count in columns:
            if count < 32 or count > COLUMNS or count & (count - 1):
                raise PtxError(f"tcgen05.alloc of {count} columns, not a power of two from 32 to {COLUMNS}")
        if self.relinquished[self.wave.cta_of[w]].any():
            raise SyncError("tcgen05.alloc after tcgen05.relinquish_alloc_permit of the same CTA")
        first_lane = np.arange(32)[None] == 0

        def check(wait):
            done = np.zeros(len(wait.w), bool)
            for j, warp in enumerate(wait.w):
                used, count = self.used[self.wave.cta_of[warp]], int(wait.info["columns"][j])
                base = next((x for x in range(0, COLUMNS - count + 1, count) if not used[x : x + count].any()), None)
                if base is not None:
                    used[base : base + count] = True
                    self.allocations[int(self.wave.cta_of[warp]), base] = count, i.line
                    self.shared.store(
                        wait.w[j : j + 1], wait.info["destination"][j : j + 1], _u4, (_u4(base),), first_lane
                    )
                    done[j] = True
            return done

        return Wait(group, "tcgen05.alloc", check, dict(destination=destination, columns=columns),
                    describe=self.describe_wait)  # fmt: skip

    def describe_wait(self, wait):
        """Lines about the columns that blocked warps wait for."""
        lines = []
        for cta, columns in zip(self.wave.cta_of[wait.w][:4].tolist(), wait.info["columns"].tolist(), strict=False):
            mine = sorted((base, *held) for (owner, base), held in self.allocations.items() if owner == cta)
            held = ", ".join(f"{count} from column {base} (PTX line {line})" for base, count, line in mine)
            lines.append(f"{columns} of the {COLUMNS} columns of cta{self.wave.cta_name(cta)}; allocated: {held}")
        return lines

    def relinquish(self, w):
        """tcgen05.relinquish_alloc_permit: the CTA may not allocate any more."""
        self.relinquished[self.wave.cta_of[w]] = True

    def check_freed(self):
        """At the end of a wave: SyncError for columns that nobody gave back."""
        for (cta, base), (count, line) in self.allocations.items():
            raise SyncError(f"the kernel ends without tcgen05.dealloc of the {count} columns from {base} of "
                            f"cta{self.wave.cta_name(cta)}", line=line, text=self.wave.ptx_line(line))  # fmt: skip

    def free(self, w, address, columns):
        """tcgen05.dealloc of ``columns`` columns; MemoryFault if they are not allocated, or not as one piece."""
        address, columns = full_width(address, len(w)), full_width(columns, len(w))
        for j, warp in enumerate(w):
            first, count = int(address[j, 0]) & 0xFFFF, int(columns[j, 0])
            cta = int(self.wave.cta_of[warp])
            self.require_allocated(cta, first, first + count)
            if self.allocations.get((cta, first), (0, 0))[0] != count:
                raise MemoryFault(
                    f"tcgen05.dealloc of {count} columns from {first} of cta{self.wave.cta_name(cta)}: not what a "
                    "tcgen05.alloc gave"
                )
            if self.events.tensor_freed:
                self.events.tensor_freed(int(warp), cta, first, count)
            del self.allocations[cta, first]
            self.used[cta, first : first + count] = False
        self.wave.progress += 1

    def require_allocated(self, cta, first, end):
        """MemoryFault unless the columns from ``first`` up to ``end`` of a CTA are allocated."""
        if end > COLUMNS or not self.used[cta, first:end].all():
            raise MemoryFault(
                f"tensor memory columns {first} to {end - 1} of cta{self.wave.cta_name(cta)} are not allocated"
            )

    def read(self, cta, lanes, first, count):
        """``count`` columns of some lanes of a CTA as a copy [lanes, count] (uint32)."""
        self.require_allocated(cta, first, first + count)
        return self.words[cta, lanes, first : first + count]

    # ---- ld and st --------------------------------------------------------------------------------
    def _cells(self, w, address, shape, registers, second, packed):
        """(CTA [n, 1, 1, 1], lane [n, 32, registers, 1], column [n, 32, registers, 1 or 2]) of a load or store.

        ``second``: columns from the first to the second half of 16x32bx2; ``packed``: a register is the low halves of
        two columns. Lanes and columns as in PTX ISA 9.7.16.2.3.1, whose figures CUTLASS writes as layouts
        (include/cute/atom/copy_traits_sm100.hpp).
        """
        address = full_width(address, len(w))[:, 0].astype(np.int64)
        lane0, column0 = ((x)[:, None, None, None] for x in (address >> 16, address & 0xFFFF))
        t, r = np.arange(32)[:, None], np.arange(registers)[None, :]
        offset = np.zeros_like(t)
        if shape == "32x32b":
            lane, column = t + 0 * r, r + 0 * t
        elif shape == "16x256b":
            lane, column = t // 4 + 8 * (r % 4 // 2), (t % 4) * 2 + r % 2 + 8 * (r // 4)
        elif shape == "16x128b":
            lane, column = t // 4 + 8 * (r % 2), t % 4 + 4 * (r // 2)
        elif shape == "16x64b":
            lane, column = t // 4 + 8 * (t % 2) + 0 * r, t // 2 % 2 + 2 * r
        else:  # 16x32bx2
            lane, column, offset = t % 16 + 0 * r, r + 0 * t, t // 16 * second
        column = (2 * column[..., None] + [0, 1] if packed else column[..., None]) + offset[..., None]
        lane, column = lane0 + lane[None, ..., None], column0 + column[None]
        quarter = (self.wave.warp_in_cta[w] % 4)[:, None, None, None]
        if (lane // 32 != quarter).any():
            j = int((lane // 32 != quarter).any((1, 2, 3)).argmax())
            raise MemoryFault(
                f"tcgen05.ld or st of lanes {int(lane[j].min())} to {int(lane[j].max())} by a warp "
                f"that may only "
                f"touch lanes {32 * int(quarter.ravel()[j])} and up",
                where=self.wave.warp_text(w[j]),
            )
        for cta, low, high in zip(self.wave.cta_of[w], column.min((1, 2, 3)), column.max((1, 2, 3)), strict=False):
            self.require_allocated(cta, int(low), int(high) + 1)
        return self.wave.cta_of[w][:, None, None, None], lane, column

    def load(self, w, address, shape, registers, second, packed):
        """tcgen05.ld: registers [registers, n, 32] (uint32). MemoryFault for lanes of another warp, or free columns."""
        cells = self._cells(w, address, shape, registers, second, packed)
        if self.events.tensor_registers:
            self.events.tensor_registers(w, *cells[1:], (shape, registers, second, packed), False)
        values = self.words[cells]
        values = (values & _u4(0xFFFF))[..., 0] | values[..., 1] << _u4(16) if packed else values[..., 0]
        return np.ascontiguousarray(values.transpose(2, 0, 1))

    def store(self, w, address, shape, values, second, packed):
        """tcgen05.st of a list of registers [n, 32]; raises as ``load``."""
        words = np.stack([full_width(x, len(w)) for x in values], axis=-1)[..., None]
        if packed:
            words = np.concatenate([words & _u4(0xFFFF), words >> _u4(16)], axis=-1)
        cells = self._cells(w, address, shape, len(values), second, packed)
        if self.events.tensor_registers:
            self.events.tensor_registers(w, *cells[1:], (shape, len(values), second, packed), True)
        self.words[cells] = words
        self.wave.active()

    # ---- commit -----------------------------------------------------------------------------------
    def commit(self, w, barrier, multicast, M):
        """tcgen05.commit: one arrival at an mbarrier (in each CTA of the mask ``multicast``) after earlier ones."""
        barrier = full_width(barrier, len(w))
        for j, lane in active_threads(w, M):
            warp, at = int(w[j]), int(barrier[j, lane])
            cta, offset = self.shared.locate(warp, at)
            targets = [cta]
            if multicast is not None:
                targets = self.wave.multicast_targets(warp, int(full_width(multicast, len(w))[j, lane]))
            for c in targets:
                commit = Commit(warp, at, c * self.shared.stride + offset)
                if self.events.tcgen05_commit:
                    self.events.tcgen05_commit(commit)
                self.defer(warp, lambda commit=commit: self._arrive(commit))

    def _arrive(self, commit):
        if self.events.copy_lands:
            self.events.copy_lands(commit)
        self.mbarriers.update(commit.signal, arrive=1)
        if self.events.copy_landed:
            self.events.copy_landed(commit)
