"""Control flow of a SASS kernel: basic blocks, dominators, natural loops.

Loops are found through dominators and back edges, so that blocks which ptxas moved out of line still count. Dominators:
Cooper, Harvey and Kennedy, "A Simple, Fast Dominance Algorithm".
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from ptxsim.timing.cubin import Code, Instruction

_TARGET = re.compile(r"`\((\.L\w+)\)")
_ENDS_BLOCK = ("BRA", "UBRA", "BRX", "JMP", "EXIT", "RET", "BSYNC")


@dataclass
class Loop:
    """A natural loop: its blocks, and the blocks that jump back to its header."""

    header: int
    body: set[int]
    latches: set[int] = field(default_factory=set)

    def holds(self, other: Loop) -> bool:
        """Whether the other loop is nested in this one."""
        return self.header != other.header and other.body <= self.body


class ControlFlow:
    """Blocks are numbered in the order of their code; ``blocks[b]`` is block b's first instruction and its end."""

    def __init__(self, code: Code):
        self.code = code
        self.blocks = self._find_blocks()
        self.successors = self._find_successors()
        self.predecessors: list[list[int]] = [[] for _ in self.blocks]
        for block, targets in enumerate(self.successors):
            for target in targets:
                self.predecessors[target].append(block)
        self.idom = self._find_dominators()
        self.loops = self._find_loops()

    def instructions(self, blocks: set[int]) -> list[Instruction]:
        return [i for b in sorted(blocks) for i in self.code.instructions[slice(*self.blocks[b])]]

    def dominates(self, above: int, below: int) -> bool:
        """Whether every path from the entry to ``below`` passes ``above``."""
        while above != below:
            if below == 0 or below not in self.idom:
                return False
            below = self.idom[below]
        return True

    def _targets(self, instruction: Instruction) -> list[int]:
        labels = self.code.labels
        return [labels[name] for name in _TARGET.findall(instruction.text) if name in labels]

    def _find_blocks(self) -> list[tuple[int, int]]:
        instructions = self.code.instructions
        end = len(instructions)
        leaders = {0} | {index for index in self.code.labels.values() if index < end}
        leaders |= {k + 1 for k, i in enumerate(instructions) if i.opcode in _ENDS_BLOCK and k + 1 < end}
        starts = sorted(leaders)
        return list(zip(starts, [*starts[1:], end], strict=True))

    def _find_successors(self) -> list[set[int]]:
        instructions, labels = self.code.instructions, self.code.labels
        block_at = {start: number for number, (start, _) in enumerate(self.blocks)}
        successors = []
        for _, end in self.blocks:
            last, targets = instructions[end - 1], {end}
            if last.opcode in ("BRA", "UBRA", "JMP"):
                unconditional = last.predicate in (None, "@PT") and last.operands[0].startswith("`(")
                targets = set(self._targets(last)[:1]) | (set() if unconditional else {end})
            elif last.opcode in ("BRX", "BRXU"):
                targets |= {labels[name] for name in re.findall(r"\.L\w+", last.text) if name in labels}
            elif last.opcode in ("EXIT", "RET") and not last.predicate:
                targets = set()
            successors.append({block_at[target] for target in targets if target in block_at})
        return successors

    def _find_dominators(self) -> dict[int, int]:
        """Immediate dominator of every reachable block."""
        postorder: list[int] = []
        seen, stack = {0}, [(0, iter(sorted(self.successors[0])))]
        while stack:
            block, targets = stack[-1]
            target = next((t for t in targets if t not in seen), None)
            if target is None:
                postorder.append(block)
                stack.pop()
            else:
                seen.add(target)
                stack.append((target, iter(sorted(self.successors[target]))))
        order = postorder[::-1]
        number = {block: n for n, block in enumerate(order)}
        idom, changed = {0: 0}, True
        while changed:
            changed = False
            for block in order[1:]:
                known = [p for p in self.predecessors[block] if p in idom]
                new = known[0]
                for other in known[1:]:
                    while new != other:
                        while number[new] > number[other]:
                            new = idom[new]
                        while number[other] > number[new]:
                            other = idom[other]
                if idom.get(block) != new:
                    idom[block], changed = new, True
        return idom

    def _find_loops(self) -> dict[int, Loop]:
        """Natural loops by header; back edges to one header make one loop."""
        loops: dict[int, Loop] = {}
        for latch in self.idom:
            for header in self.successors[latch]:
                if not self.dominates(header, latch):
                    continue
                loop = loops.setdefault(header, Loop(header, {header}))
                loop.latches.add(latch)
                stack = [latch]
                while stack:
                    block = stack.pop()
                    if block not in loop.body:
                        loop.body.add(block)
                        stack.extend(p for p in self.predecessors[block] if p in self.idom)
        return loops
