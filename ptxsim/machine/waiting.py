"""Warps that an instruction suspends."""

from __future__ import annotations


class Wait:
    """Warps ``w`` with active lanes ``M`` that wait: ``check(self)`` says for each whether it may go on.

    ``why`` names the instruction. ``dest`` is a register that gets ``value(self, selection)`` (True without one) on the
    way out; ``may_fail``: the instruction may give up and put False there. ``info`` maps names to arrays with one row a
    warp. ``describe(self)`` gives lines about what is waited for. The scheduler fills in ``block``, where the warps
    are, and their ``epoch``.
    """

    __slots__ = ("M", "block", "check", "describe", "dest", "epoch", "info", "may_fail", "value", "w", "why")

    def __init__(self, group, why, check, info=None, dest=None, may_fail=False, value=None, describe=None):
        self.w, self.M, self.why, self.check, self.info = group.w, group.M, why, check, {} if info is None else info
        self.dest, self.may_fail, self.value, self.describe = dest, may_fail, value, describe
        self.block, self.epoch = None, 0

    def without(self, gone):
        """The record of the warps that are not selected by the bool array ``gone``."""
        keep = ~gone
        left = Wait(self, self.why, self.check, {k: v[keep] for k, v in self.info.items()}, self.dest, self.may_fail,
                    self.value, self.describe)  # fmt: skip
        left.w, left.M = self.w[keep], None if self.M is None else self.M[keep]
        left.block, left.epoch = self.block, self.epoch
        return left

    def lines(self):
        """Lines about what the warps wait for."""
        return self.describe(self) if self.describe else []
