"""Which warps run next: groups of warps, divergence and reconvergence (PTX ISA 3.1, 9.6), waiting, deadlock.

Warps that are at the same block run together as one group. A branch splits a group; groups at the same block merge
again. A block with a ``.sync`` or ``.aligned`` instruction holds a part of a warp until its other lanes arrive.

The default order is deterministic: smallest (number of back edges taken, block) first, every 32nd step the group
that ran longest ago. With a seed, warps are split at random into priority classes and groups never mix classes.
"""

from __future__ import annotations

import numpy as np

from .errors import Deadlock, SimError, Trap

_IDLE_LIMIT = 100_000  # steps without a store or a completed barrier: warps spin for something that never happens
_FAILED_WAITS = 20  # times that try_wait may return false without progress


class Group:
    """Warps ``w`` that are at block ``blk``; ``M`` is None when all 32 lanes take part."""

    __slots__ = ("M", "blk", "epoch", "held", "last", "w")

    def __init__(self, blk, w, M, epoch, last=0):
        self.blk, self.w, self.M, self.epoch, self.last = blk, w, M, epoch, last
        self.held = False


class Blocked:
    """Warps that wait in block ``blk``: ``check(self)`` says for each whether it may go on.

    ``dest`` is a register that gets ``value(self, selection)`` (True without one) on the way out; ``may_fail``: the
    instruction may give up and put False there. ``info`` maps names to arrays with one row a warp.
    """

    __slots__ = ("M", "blk", "check", "dest", "epoch", "info", "may_fail", "value", "w", "why")

    def __init__(self, blk, w, M, epoch, check, why, dest, info, may_fail=False, value=None):
        self.blk, self.w, self.M, self.epoch, self.check, self.why = blk, w, M, epoch, check, why
        self.dest, self.info, self.may_fail, self.value = dest, info, may_fail, value

    def without(self, gone):
        """The record of the warps that are not selected by the bool array ``gone``."""
        keep = ~gone
        info = {k: v[keep] for k, v in self.info.items()}
        M = None if self.M is None else self.M[keep]
        return Blocked(self.blk, self.w[keep], M, self.epoch, self.check, self.why, self.dest, info, self.may_fail,
                       self.value)  # fmt: skip


class SchedulerMixin:
    """Runs the warps of ``Machine``.

    Needs prog, alive, rng, R, deferred and the numbering of warps and CTAs; owns groups, blocked, classes, priority,
    steps, line, current and the counters that ``init_scheduler`` sets.
    """

    def init_scheduler(self):
        self.instr_count = 0  # warp instructions
        self.steps = 0  # blocks executed
        self.last_activity = 0  # step of the last store, arrival or completed barrier
        self.mem_epoch = 0  # counts global writes
        self.line = 0  # PTX line of the latest instruction with side effects
        self.current = None
        self.groups, self.blocked = [], []
        self.seen_progress = 0
        self.wait_key, self.failed_waits = None, 0

    def run(self):
        """Run all warps to the end. Raises a subclass of SimError that names PTX line, CTA and warps."""
        self._start_groups()
        with np.errstate(all="ignore"):
            try:
                while self.groups or self.blocked:
                    self._step()
                while self.run_deferred():
                    pass
                self.bulk_drain()
                self.check_warpgroups()
                self.check_tensor_memory()
            except SimError as error:
                raise error.located(self.line, self.ptx_line(self.line), self.group_text()) from None
            except (IndexError, ValueError, OverflowError) as error:
                wrapped = SimError(f"the simulator failed on this instruction: {type(error).__name__}: {error}")
                raise wrapped.located(self.line, self.ptx_line(self.line), self.group_text()) from error

    def _start_groups(self):
        warps = np.arange(self.nwarps)
        complete = self.alive.all(1)
        self.classes = np.zeros(self.nwarps, np.int64)
        self.priority = [0]
        if self.rng:
            count = self.rng.randrange(2, 5)
            self.priority = list(range(count))
            self.rng.shuffle(self.priority)
            if self.rng.random() < 0.5:
                self.classes = np.array([self.rng.randrange(count) for _ in range(self.wpc)])[self.warp_in_cta]
            else:
                self.classes = np.array([self.rng.randrange(count) for _ in range(self.nwarps)])
        for c in range(len(self.priority)):
            for select, partial in ((complete & (self.classes == c), False), (~complete & (self.classes == c), True)):
                if select.any():
                    self.groups.append(Group(0, warps[select], self.alive[select] if partial else None, 0))

    # ---- names for error messages -----------------------------------------------------------------
    def ptx_line(self, number):
        """Text of a PTX line (1-based); empty if there is none."""
        lines = self.prog.k.module.text.split("\n")
        return lines[number - 1].strip()[:200] if 0 < number <= len(lines) else ""

    def warp_text(self, warp):
        return f"cta{self.cta_name(self.cta_of[warp])}.w{self.warp_in_cta[warp]}"

    def thread_text(self, warp, lane):
        return f"{self.warp_text(warp)} lane {lane}"

    def lane_text(self, warp, lanes):
        bits = sum(1 << int(lane) for lane in np.flatnonzero(lanes))
        return f"{self.warp_text(warp)} lanes 0x{bits:08x}"

    def warps_text(self, warps):
        more = f" and {len(warps) - 8} more" if len(warps) > 8 else ""
        return ", ".join(self.warp_text(x) for x in warps[:8]) + more

    def group_text(self):
        return None if self.current is None else self.warps_text(self.current.w)

    # ---- one step ---------------------------------------------------------------------------------
    def _step(self):
        self.steps += 1
        if self.progress != self.seen_progress and self.blocked:
            self.seen_progress = self.progress
            self._wake()
        if self.deferred and self.rng and self.rng.random() < 0.05:
            self.run_deferred(self.rng.randrange(len(self.deferred)))
        idle = self.steps - self.last_activity
        if idle > 256 and not idle & 63 and self.run_deferred():
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
        if self.run_deferred() or (self.blocked and self._wake()):
            return
        held = [g for g in self.groups if g.held]
        if held:
            group = min(held, key=lambda g: (self.prog.blocks[g.blk].together, g.blk))
            same = [h for h in held if h.blk == group.blk and self.classes[h.w[0]] == self.classes[group.w[0]]]
            self._execute(self._merge(same))
        elif not self._fail_waits():
            self._deadlock("no warp can run")

    def _choose(self, ready):
        if not self.rng:
            if self.steps & 31 == 0:
                return min(ready, key=lambda g: g.last)
            return min(ready, key=lambda g: (g.epoch, g.blk))
        if self.steps % 300 == 0:
            self.rng.shuffle(self.priority)
        if self.rng.random() < 0.9:
            top = max(self.priority[self.classes[g.w[0]]] for g in ready)
            ready = [g for g in ready if self.priority[self.classes[g.w[0]]] == top]
        return ready[self.rng.randrange(len(ready))]

    def _merge_with_same(self, group):
        c = self.classes[group.w[0]]
        same = [h for h in self.groups
                if h.blk == group.blk and (h.M is None) == (group.M is None) and self.classes[h.w[0]] == c]  # fmt: skip
        if len(same) > 1 and not (self.rng and group.M is None and self.rng.random() < 0.3):
            return self._merge(same)
        self.groups.remove(group)
        return group

    def _merge(self, same):
        for h in same:
            self.groups.remove(h)
        w = np.concatenate([h.w for h in same])
        epoch = max(h.epoch for h in same)
        if same[0].M is None:
            return Group(same[0].blk, np.sort(w), None, epoch, self.steps)
        M = np.concatenate([h.M for h in same])
        warps, inverse = np.unique(w, return_inverse=True)
        union = np.zeros((len(warps), 32), bool)
        np.logical_or.at(union, inverse, M)
        return Group(same[0].blk, warps, union, epoch, self.steps)

    def _hold_partial_warps(self, group):
        """The group that may run now; whole warps and held parts of warps go back to the list."""
        if group.M is None:
            return group
        complete = group.M.all(1)
        if complete.all():
            group.M = None
            return group
        if complete.any():
            self.groups.append(Group(group.blk, group.w[complete], None, group.epoch, self.steps))
            group = Group(group.blk, group.w[~complete], group.M[~complete], group.epoch, self.steps)
        if self.prog.blocks[group.blk].needs_conv:
            whole = (self.alive[group.w] == group.M).all(1)
            if not whole.all():
                part = Group(group.blk, group.w[~whole], group.M[~whole], group.epoch, self.steps)
                part.held = True
                self.groups.append(part)
                if not whole.any():
                    return None
                group = Group(group.blk, group.w[whole], group.M[whole], group.epoch, self.steps)
        return group

    def _execute(self, group):
        self.current = group
        block = self.prog.blocks[group.blk]
        w, n = group.w, len(group.w)
        group.last = self.steps
        self.instr_count += block.count * n
        if block.handler is not None:
            self.line = block.line
            group.blk = block.fall
            if group.M is not None and block.together:
                self.require_whole_warps(w, group.M)
            getattr(self, block.handler.form.handler)(block.handler, block, group)
            return
        s = slice(int(w[0]), int(w[-1]) + 1) if w[-1] - w[0] == n - 1 else w
        condition = block.func(self, self.R, s, w, group.M)
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
        self.line = block.instrs[-1].line
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
            part = Group(block.fall, w, M, group.epoch, self.steps)
            if jumps:
                self._jump(part, block)
            self.groups.append(part)

    def _exit(self, w, M):
        if M is None:
            self.alive[w] = False
        else:
            self.alive[w] &= ~M
        if self.races is not None:
            self.races.exit(w[~self.alive[w].any(1)])
        for h in self.groups:
            h.held = False
        self.barriers_after_exit(w)
        self.progress += 1
        self.last_activity = self.steps

    # ---- waiting ----------------------------------------------------------------------------------
    def block_or_go(self, b):
        """Go on with the warps that may; the others are blocked."""
        ready = b.check(b)
        if ready.any():
            self._resume(b, ready)
            if ready.all():
                return
            b = b.without(ready)
        if self.rng and b.may_fail and self.rng.random() < 0.3:
            self._resume(b, np.ones(len(b.w), bool), failed=True)
            return
        self.blocked.append(b)

    def _wake(self):
        """Look at all blocked warps again; True when some became ready."""
        found = False
        still = []
        for b in self.blocked:
            ready = b.check(b)
            if not ready.any():
                still.append(b)
                continue
            found = True
            self._resume(b, ready)
            if not ready.all():
                still.append(b.without(ready))
        self.blocked = still
        return found

    def _resume(self, b, select, failed=False):
        w, M = b.w[select], None if b.M is None else b.M[select]
        if b.dest not in (None, "_"):
            value = False if failed else True if b.value is None else b.value(b, select)
            register = self.R[self.prog.reg(b.dest)]
            register[w] = value if M is None else np.where(M, value, register[w])
        self.groups.append(Group(self.prog.blocks[b.blk].fall, w, M, b.epoch, self.steps))

    def _fail_waits(self):
        """Let try_wait return false for everybody who waits so; False after too many times without progress."""
        key = (self.progress, self.mem_epoch)
        if self.wait_key != key:
            self.wait_key, self.failed_waits = key, 0
        self.failed_waits += 1
        waiting = [b for b in self.blocked if b.may_fail]
        if self.failed_waits > _FAILED_WAITS or not waiting:
            return False
        self.blocked = [b for b in self.blocked if not b.may_fail]
        for b in waiting:
            self._resume(b, np.ones(len(b.w), bool), failed=True)
        return True

    def describe_wait(self, b):
        """Lines about what blocked warps wait for."""
        describe = {"mbarrier.try_wait": self.describe_mbarrier_wait, "bar.sync": self.describe_bar_wait,
                    "bar.red": self.describe_bar_wait, "barrier.cluster.wait": self.describe_cluster_wait,
                    "setmaxnreg": self.describe_register_wait,
                    "tcgen05.alloc": self.describe_tensor_memory_wait}  # fmt: skip
        return describe[b.why](b) if b.why in describe else []

    def _deadlock(self, reason):
        report = [f"{reason}; {len(self.blocked)} waiting groups, {len(self.groups)} running:"]
        for b in self.blocked:
            line = self.prog.blocks[b.blk].line
            report.append(f"  PTX line {line}: {self.ptx_line(line)}")
            report.append(f"      {b.why}: {self.warps_text(b.w)}")
            report += ["        " + text for text in self.describe_wait(b)]
        for g in self.groups:
            line = self.prog.blocks[g.blk].line
            report.append(f"  PTX line {line}: {self.ptx_line(line)}\n      running: {self.warps_text(g.w)}")
        first = self.blocked[0] if self.blocked else self.groups[0]
        line = self.prog.blocks[first.blk].line
        raise Deadlock("\n".join(report), line=line, text=self.ptx_line(line), where=self.warps_text(first.w))
