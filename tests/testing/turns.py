"""Deterministic gradients of the Hopper backward, watched: tiles of keys take turns at a dQ."""

import ptxsim


class Turns(ptxsim.Observer):
    """What the warps that add to dQ do around their turns: how many these are (``taken``, ``passed``), and ``faults``,
    what they left out. That shows in dQ's bits under few schedules (a missing wait in 4 of 24, with copies as late as
    is legal), or not at all in a simulator where no addition overtakes another (a missing fence)."""

    def __init__(self):
        self.taken, self.passed, self.faults = 0, 0, []

    def begin(self, machine):
        self.adding, self.unfenced = set(), set()

    def copy_issued(self, copy):
        if copy.is_store:
            self.adding.add(int(copy.warp))
            if copy.warp in self.unfenced:
                self.faults.append("additions without a fence between them and the turn")

    def group_awaited(self, kind, w, pending, read):
        if kind == "bulk" and pending == 0 and not read:
            self.adding -= set(w.tolist())

    def fence(self, w, M, what):
        if what == "async.global":
            self.unfenced -= set(w.tolist())

    def ordered_access(self, w, address, space, order, M):
        warps = set(w.tolist())
        if order.acquires:
            self.taken += len(warps)
            self.unfenced |= warps
        if order.releases:
            self.passed += len(warps)
            self.faults += ["a turn passed on before its additions were done"] * len(warps & self.adding)
