"""Which warps run next: groups of warps, divergence and reconvergence (PTX ISA 3.1, 9.6), waiting, deadlock.

Warps that are at the same block run together as one group. A branch splits a group; groups at the same block merge
again. A block with a ``.sync`` or ``.aligned`` instruction holds a part of a warp until its other lanes arrive.

The default order is deterministic: smallest (number of back edges taken, block) first, every 32nd step the group
that ran longest ago. With a seed, warps are split at random into priority classes and groups never mix classes.
"""

from __future__ import annotations

import operator

import numpy as np

from ..errors import Deadlock, Trap

_IDLE_LIMIT = 100_000  # steps without a store or a completed barrier: warps spin for something that never happens
_FAILED_WAITS = 20  # times that try_wait may return false without progress


class Group:
    """Warps ``w`` that are at block ``blk``; ``M`` is None when all 32 lanes take part."""

    __slots__ = ("M", "blk", "epoch", "held", "last", "w")

    def __init__(self, blk, w, M, epoch, last=0):
        self.blk, self.w, self.M, self.epoch, self.last = blk, w, M, epoch, last
        self.held = False


class Scheduler:
    """Runs the warps of a wave. ``groups`` can run or are held, ``waits`` are suspended.

    ``after_exit`` are functions to tell of warps that have ended.
    """

    def __init__(self, wave, registers, deferred, after_exit):
        self.wave, self.events, self.registers, self.deferred = wave, wave.events, registers, deferred
        self.after_exit = after_exit
        self.instr_count = 0  # warp instructions
        self.groups, self.waits = [], []
        self.seen_progress = 0
        self.wait_key, self.failed_waits = None, 0

    def run(self, machine):
        """Run all warps to the end. ``machine`` is what generated code works on, and where the handlers of instructions
        that may suspend a warp are."""
        # held while it runs only: a cycle would keep the wave's memory until the next garbage collection
        self.machine, self.handlers = machine, {}
        try:
            self._start_groups()
            while self.groups or self.waits:
                self._step()
            while self.deferred.run_one():
                pass
        finally:
            self.machine, self.handlers = None, {}

    def _start_groups(self):
        warps = np.arange(self.wave.nwarps)
        complete = self.wave.alive.all(1)
        self.classes = np.zeros(self.wave.nwarps, np.int64)
        self.priority = [0]
        rng = self.wave.rng
        if rng:
            count = rng.randrange(2, 5)
            self.priority = list(range(count))
            rng.shuffle(self.priority)
            if rng.random() < 0.5:  # alike in all CTAs
                self.classes = np.array([rng.randrange(count) for _ in range(self.wave.wpc)])[self.wave.warp_in_cta]
            else:
                self.classes = np.array([rng.randrange(count) for _ in range(self.wave.nwarps)])
        for c in range(len(self.priority)):
            for select, partial in ((complete & (self.classes == c), False), (~complete & (self.classes == c), True)):
                if select.any():
                    self.groups.append(Group(0, warps[select], self.wave.alive[select] if partial else None, 0))

    # ---- one step ---------------------------------------------------------------------------------
    def _step(self):
        self.wave.step += 1
        if self.wave.progress != self.seen_progress and self.waits:
            self.seen_progress = self.wave.progress
            self._wake()
        if self.deferred.pending and self.wave.rng and self.wave.rng.random() < 0.05:
            self.deferred.run_one(self.wave.rng.randrange(len(self.deferred.pending)))
        idle = self.wave.step - self.wave.last_activity
        if idle > 256 and not idle & 63 and self.deferred.run_one():
            return
        if idle > _IDLE_LIMIT:
            self._deadlock(f"{_IDLE_LIMIT} steps without a store or a completed barrier: warps spin")
        ready = [g for g in self.groups if not g.held]
        if not ready:
            self._nothing_ready()
            return
        group = self._merge_with_same(self._choose(ready))
        group = self._hold_partial_warps(group)
        if group is not None:
            self._execute(group)

    def _nothing_ready(self):
        if self.deferred.run_one() or (self.waits and self._wake()):
            return
        held = [g for g in self.groups if g.held]
        if held:
            group = min(held, key=lambda g: (self.wave.program.blocks[g.blk].together, g.blk))
            same = [h for h in held if h.blk == group.blk and self.classes[h.w[0]] == self.classes[group.w[0]]]
            self._execute(self._merge(same))
        elif not self._fail_waits():
            self._deadlock("no warp can run")

    def _choose(self, ready):
        if not self.wave.rng:
            if self.wave.step & 31 == 0:
                return min(ready, key=lambda g: g.last)
            return min(ready, key=lambda g: (g.epoch, g.blk))
        if self.wave.step % 300 == 0:
            self.wave.rng.shuffle(self.priority)
        if self.wave.rng.random() < 0.9:
            top = max(self.priority[self.classes[g.w[0]]] for g in ready)
            ready = [g for g in ready if self.priority[self.classes[g.w[0]]] == top]
        return ready[self.wave.rng.randrange(len(ready))]

    def _merge_with_same(self, group):
        c = self.classes[group.w[0]]
        same = [h for h in self.groups
                if h.blk == group.blk and (h.M is None) == (group.M is None) and self.classes[h.w[0]] == c]  # fmt: skip
        if len(same) > 1 and not (self.wave.rng and group.M is None and self.wave.rng.random() < 0.3):
            return self._merge(same)
        self.groups.remove(group)
        return group

    def _merge(self, same):
        for h in same:
            self.groups.remove(h)
        w = np.concatenate([h.w for h in same])
        epoch = max(h.epoch for h in same)
        if same[0].M is None:
            return Group(same[0].blk, np.sort(w), None, epoch, self.wave.step)
        M = np.concatenate([h.M for h in same])
        warps, inverse = np.unique(w, return_inverse=True)
        union = np.zeros((len(warps), 32), bool)
        np.logical_or.at(union, inverse, M)
        return Group(same[0].blk, warps, union, epoch, self.wave.step)

    def _hold_partial_warps(self, group):
        """The group that may run now; whole warps and held parts of warps go back to the list."""
        if group.M is None:
            return group
        complete = group.M.all(1)
        if complete.all():
            group.M = None
            return group
        if complete.any():
            self.groups.append(Group(group.blk, group.w[complete], None, group.epoch, self.wave.step))
            group = Group(group.blk, group.w[~complete], group.M[~complete], group.epoch, self.wave.step)
        if self.wave.program.blocks[group.blk].needs_conv:
            whole = (self.wave.alive[group.w] == group.M).all(1)
            if not whole.all():
                part = Group(group.blk, group.w[~whole], group.M[~whole], group.epoch, self.wave.step)
                part.held = True
                self.groups.append(part)
                if not whole.any():
                    return None
                group = Group(group.blk, group.w[whole], group.M[whole], group.epoch, self.wave.step)
        return group

    def _execute(self, group):
        self.wave.running = group.w
        block = self.wave.program.blocks[group.blk]
        w, n = group.w, len(group.w)
        group.last = self.wave.step
        self.instr_count += block.count * n
        if self.events.issue:
            self.events.issue(block, w, group.M)
        if block.handler is not None:
            self.wave.line = block.line
            group.blk = block.fall
            if group.M is not None and block.together:
                self.machine.warps.require_whole(w, group.M)
            wait = self._handler(block.handler.form.handler)(block.handler, group)
            if wait is None:
                self.groups.append(group)
            else:
                wait.block, wait.epoch = block, group.epoch
                self._wait_or_go(wait)
            return
        s = slice(int(w[0]), int(w[-1]) + 1) if w[-1] - w[0] == n - 1 else w
        condition = block.func(self.machine, self.registers.files, s, w, group.M)
        term = block.term
        if term == "fall":
            group.blk = block.fall
        elif term == "jmp":
            self._jump(group, block)
        elif term == "ret":
            self._exit(w, group.M)
            return
        elif term == "trap":
            self._trap(block)
        else:
            taken = self._outcome(condition, group)
            if taken is None:
                self._split(group, block, condition)
                return
            if taken and term == "cret":
                self._exit(w, group.M)
                return
            if taken and term == "ctrap":
                self._trap(block)
            if taken and term == "cbr":
                self._jump(group, block)
            else:
                group.blk = block.fall
        self.groups.append(group)

    def _trap(self, block):
        self.wave.line = block.instrs[-1].line
        raise Trap("the kernel executed trap")

    @staticmethod
    def _outcome(condition, group):
        """True or False where all active lanes agree, else None."""
        condition = np.asarray(condition)
        if group.M is None and condition.all():
            return True
        if not condition.any():
            return False
        condition = np.broadcast_to(condition, (len(group.w), 32))
        if group.M is None:
            return None
        if not (~condition & group.M).any():
            return True
        return None if (condition & group.M).any() else False

    def _jump(self, group, block):
        if block.target <= block.idx and group.M is None:
            group.epoch += 1
        group.blk = block.target

    def _split(self, group, block, condition):
        """A guarded branch with both outcomes: up to four groups (whole warps and parts of warps on either side)."""
        n = len(group.w)
        condition = np.broadcast_to(condition, (n, 32))
        active = np.ones((n, 32), bool) if group.M is None else group.M
        taken, not_taken = condition & active, ~condition & active
        any_taken, any_not = taken.any(1), not_taken.any(1)
        outcomes = (
            (any_taken & ~any_not, None, True),
            (any_not & ~any_taken, None, False),
            (any_taken & any_not, taken, True),
            (any_taken & any_not, not_taken, False),
        )
        for select, mask, jumps in outcomes:
            if not select.any():
                continue
            w = group.w[select]
            M = mask[select] if mask is not None else None if group.M is None else group.M[select]
            if jumps and block.term == "cret":
                self._exit(w, M)
                continue
            if jumps and block.term == "ctrap":
                self._trap(block)
            part = Group(block.fall, w, M, group.epoch, self.wave.step)
            if jumps:
                self._jump(part, block)
            self.groups.append(part)

    def _handler(self, name):
        """The function of the machine that runs an instruction: "part.method"."""
        handler = self.handlers.get(name)
        if handler is None:
            handler = self.handlers[name] = operator.attrgetter(name)(self.machine)
        return handler

    def _exit(self, w, M):
        self.wave.exit(w, M)
        for h in self.groups:
            h.held = False
        for told in self.after_exit:
            told(w)
        self.wave.advance()

    def lines_elsewhere(self, warp):
        """PTX lines where lanes of a warp are that do not execute now."""
        others = [self.wave.program.blocks[group.blk].line for group in self.groups if warp in group.w]
        others += [wait.block.line for wait in self.waits if warp in wait.w]
        return sorted({*others} - {0})

    # ---- waiting ----------------------------------------------------------------------------------
    def _wait_or_go(self, wait):
        """Go on with the warps that may; the others wait."""
        if self.events.wait_begins:
            self.events.wait_begins(wait)
        ready = wait.check(wait)
        if ready.any():
            self._resume(wait, ready)
            if ready.all():
                return
            wait = wait.without(ready)
        if self.wave.rng and wait.may_fail and self.wave.rng.random() < 0.3:
            self._resume(wait, np.ones(len(wait.w), bool), failed=True)
            return
        self.waits.append(wait)

    def _wake(self):
        """Look at all waiting warps again; True when some became ready."""
        found = False
        still = []
        for wait in self.waits:
            ready = wait.check(wait)
            if not ready.any():
                still.append(wait)
                continue
            found = True
            self._resume(wait, ready)
            if not ready.all():
                still.append(wait.without(ready))
        self.waits = still
        return found

    def _resume(self, wait, select, failed=False):
        if self.events.wait_ends:
            self.events.wait_ends(wait, select, failed)
        w, M = wait.w[select], None if wait.M is None else wait.M[select]
        if wait.dest not in (None, "_"):
            value = False if failed else True if wait.value is None else wait.value(wait, select)
            register = self.registers.files[self.wave.program.reg(wait.dest)]
            register[w] = value if M is None else np.where(M, value, register[w])
        self.groups.append(Group(wait.block.fall, w, M, wait.epoch, self.wave.step))

    def _fail_waits(self):
        """Let try_wait return false for everybody who waits so; False after too many times without progress."""
        key = (self.wave.progress, self.wave.global_writes)
        if self.wait_key != key:
            self.wait_key, self.failed_waits = key, 0
        self.failed_waits += 1
        failing = [wait for wait in self.waits if wait.may_fail]
        if self.failed_waits > _FAILED_WAITS or not failing:
            return False
        self.waits = [wait for wait in self.waits if not wait.may_fail]
        for wait in failing:
            self._resume(wait, np.ones(len(wait.w), bool), failed=True)
        return True

    def _deadlock(self, reason):
        wave, waiting = self.wave, sum(len(wait.w) for wait in self.waits)
        report = []
        for wait in self.waits:
            line = wait.block.line
            report.append(f"  PTX line {line}: {wave.ptx_line(line)}")
            report.append(f"      {wait.why}: {wave.warps_text(wait.w)}")
            report += ["        " + text for text in wait.lines()]
        for g in self.groups:
            line = wave.program.blocks[g.blk].line
            report.append(f"  PTX line {line}: {wave.ptx_line(line)}\n      running: {wave.warps_text(g.w)}")
        block, w = (
            (self.waits[0].block, self.waits[0].w)
            if self.waits
            else (wave.program.blocks[self.groups[0].blk], self.groups[0].w)
        )
        error = Deadlock(f"{reason}: {waiting} of {int(wave.alive.any(1).sum())} live warps wait", line=block.line,
                         text=wave.ptx_line(block.line), where=wave.warps_text(w))  # fmt: skip
        error.account = "\n".join(report)  # an observer may know more
        try:
            raise error
        finally:
            del error  # with its traceback it would hold this frame, and with that the machine
