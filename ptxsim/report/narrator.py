"""Events in words: what warps do, as texts about synchronisation, copies and matrix instructions."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np

from ..arrays import active_warps
from ..machine.events import Observer
from ..machine.mbarriers import mbarrier_fields


def first_lane(M, j):
    """The first active lane of row ``j``."""
    return 0 if M is None else int(M[j].argmax())


class Narrator(Observer, ABC):
    """Calls ``note(w, text)`` for what the warps ``w`` do; ``text(j)`` says it of ``w[j]``. Base of the history and of
    traces."""

    def begin(self, machine):
        self.machine, self.wave, self.shared = machine, machine.wave, machine.shared
        self._told = None  # step, line and warp of the latest copy or commit

    def end(self, machine, error):
        self.machine = self.wave = self.shared = None  # what outlives the wave must not keep its memory

    @abstractmethod
    def note(self, w, text):
        """The warps ``w`` do something."""

    def _note_once(self, warp, text):
        """What an instruction does for each lane or target is told once for each warp."""
        instruction = self.wave.step, self.wave.line, warp
        if instruction != self._told:
            self._told = instruction
            self.note(np.array([warp]), lambda j: text)

    # ---- waits ----------------------------------------------------------------------------------------------------
    def signal_of(self, wait, j):
        """Flat index of the mbarrier that a waiting warp, row ``j`` of the record, waits for."""
        return self.shared.flat(wait.w[j], wait.info["address"][j, first_lane(wait.M, j)])

    def wait_text(self, wait, j):
        """What row ``j`` of a ``Wait`` waits for."""
        if wait.why == "mbarrier.try_wait":
            wanted = int(wait.info["wanted"][j, first_lane(wait.M, j)])
            parity = wanted & 1 if "parity" in wait.block.handler.parts else wanted >> 63
            return f"waits for mbarrier {self.barrier_text(wait.w[j], self.signal_of(wait, j))}, parity {parity}"
        if wait.why in ("bar.sync", "bar.red"):
            return f"waits at barrier {int(wait.info['barrier'][j])} ({wait.why})"
        return f"waits in {wait.why}"

    def state_text(self, wait, j):
        """How far what row ``j`` of a ``Wait`` waits for is."""
        if wait.why == "mbarrier.try_wait":
            word = self.machine.mbarriers.words[self.signal_of(wait, j) >> 3]
            phase, expected, pending, tx = mbarrier_fields(word)
            return f"it is in phase {phase}, {pending} of {expected} arrivals pending, tx-count {tx}"
        rows = np.arange(len(wait.w)) == j
        return "; ".join(line.strip() for line in wait.without(~rows).lines())

    def barrier_text(self, warp, index):
        """Address of an mbarrier as a warp sees it: with the CTA where that is another one."""
        cta, offset = divmod(int(index), self.shared.stride)
        return f"0x{offset:x}" + ("" if cta == self.wave.cta_of[warp] else f" of cta{self.wave.cta_name(cta)}")

    # ---- arrivals -------------------------------------------------------------------------------------------------
    def mbarrier_changed(self, w, operation, index, count, mask):
        rows = np.flatnonzero(mask.any(1))
        if not rows.size:
            return
        first = mask[rows].argmax(1)  # lane
        w, index, count = w[rows], index[rows, first], count[rows, first]
        name = {"arrive_tx": "arrive.expect_tx", "arrive_drop_tx": "arrive_drop.expect_tx"}.get(operation, operation)

        def text(j):
            more = f" {int(count[j])} bytes" if "tx" in operation else ""
            return f"{name}{more} at mbarrier {self.barrier_text(w[j], index[j])}"

        self.note(w, text)

    def bar_reached(self, w, cta, barrier, waits):
        if not waits:
            self.note(w, lambda j: f"bar.arrive at barrier {barrier[j]}")

    def cluster_arrived(self, w, cluster, relaxed):
        self.note(w, lambda j: "barrier.cluster.arrive")

    # ---- copies ---------------------------------------------------------------------------------------------------
    def copy_text(self, copy):
        """What a copy is, by the address in shared memory that its instruction names."""
        if copy.is_store:
            return f"{copy.name} from 0x{copy.address:x}"
        # what one instruction sends to several CTAs signals the barrier of each
        if not copy.targets:
            return f"{copy.name} to 0x{copy.address:x}, for no CTA"
        own = [signal for cta, _, signal in copy.targets if cta == self.wave.cta_of[copy.warp]]
        signal = own[0] if own else copy.targets[0][2]
        return f"{copy.name} to 0x{copy.address:x}, mbarrier {self.barrier_text(copy.warp, signal)}"

    def group_committed(self, kind, w):
        if kind != "wgmma":  # which is said with the products of the group
            self.note(w, lambda j: f"{kind}.commit_group")

    def group_awaited(self, kind, w, pending, read):
        if pending is None:
            text = f"{kind}.wait_all"
        else:
            text = f"{kind}.wait_group{'.read' if read else ''} {pending}"
        self.note(w, lambda j: text)

    # ---- matrix instructions --------------------------------------------------------------------------------------
    def tcgen05_mma(self, w, form, M):
        self.note(active_warps(w, M), lambda j: f"tcgen05.mma kind::{form.kind}")

    def tcgen05_commit(self, commit):
        self._note_once(commit.warp, f"tcgen05.commit to mbarrier 0x{commit.barrier & 0xFFFFFF:x}")
