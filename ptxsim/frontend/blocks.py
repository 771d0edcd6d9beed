"""Basic blocks, and what kinds of instructions end them or hold warps together."""

from __future__ import annotations

import re

from ..ops.instruction import Instr

_CONVERGENT = re.compile(r"\.(sync|aligned)(\.|$)")


def is_convergent(instruction: Instr) -> bool:
    """Whether lanes of a warp wait for each other in front of the instruction."""
    return bool(_CONVERGENT.search(instruction.op)) or instruction.root in ("bar", "barrier")


def is_aligned(instruction: Instr) -> bool:
    """Whether all live lanes of a warp must execute the instruction together: PTX ISA 9.7.13.1, bar.sync is
    barrier.sync.aligned; bar.warp.sync has a membermask."""
    return ".aligned" in instruction.op or (instruction.root == "bar" and instruction.parts[1] != "warp")


def is_control(instruction: Instr) -> bool:
    return instruction.root in ("bra", "ret", "exit", "trap")


class Block:
    """A basic block; ``term`` is fall, jmp, cbr (guarded branch), ret, cret (guarded return) or trap."""

    __slots__ = ("count", "fall", "func", "handler", "idx", "instrs", "line", "needs_conv", "src", "target", "term",
                 "together")  # fmt: skip

    def __init__(self, idx, instrs, line):
        self.idx, self.instrs, self.line = idx, instrs, line
        self.count = len(instrs)
        self.handler = self.func = self.target = self.fall = None
        self.needs_conv = any(is_convergent(i) for i in instrs)
        self.together = any(is_aligned(i) for i in instrs)
        self.term = "fall"

    def successors(self):
        """Numbers of the blocks that may come next."""
        falls = [] if self.fall is None or self.term in ("jmp", "ret", "trap") else [self.fall]
        return falls + ([self.target] if self.term in ("jmp", "cbr") else [])
