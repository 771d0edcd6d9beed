"""Registers of wgmma (PTX ISA 9.7.15.7): a wgmma.fence must separate other accesses to the accumulator and to A in
registers from the wgmma that follows, and wgmma.wait_group the wgmma from accesses that follow.

Found in the program, not at run time: a forward analysis over the blocks keeps, for each register that matters, whether
something may have touched it since the last fence, and whether a wgmma on it may be in flight. Moves between registers
only carry this along, and moves of constants count as nothing: NVVM and ptxas place both where they like. A path counts
even if no warp ever takes it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ..errors import WgmmaError
from ..frontend.locations import source_of
from ..ops import defs_uses
from ..ops.forms import register_names

_OLDEST = 9  # wait_group leaves at most 7 groups


@dataclass
class _State:
    """What may be on the way to an instruction.

    ``touched``: register -> line of an access after the last fence; ``flying``: register -> (committed groups since,
    0 if its own is open; line of the wgmma; whether it is an accumulator); ``unfenced``: there may have been no fence.
    """

    touched: dict = field(default_factory=dict)
    flying: dict = field(default_factory=dict)
    unfenced: bool = True

    def copy(self):
        return _State(dict(self.touched), dict(self.flying), self.unfenced)

    def join(self, other):
        """Whether the other state added something."""
        changed = other.unfenced and not self.unfenced
        self.unfenced |= other.unfenced
        for register, line in other.touched.items():
            if register not in self.touched:
                self.touched[register] = line
                changed = True
        for register, entry in other.flying.items():
            if register not in self.flying or entry[0] < self.flying[register][0]:
                self.flying[register] = entry
                changed = True
        return changed


class _Analysis:
    def __init__(self, program):
        self.program, self.kernel = program, program.k
        self.errors = []
        self.operands = {}  # id of a wgmma -> (accumulators, registers of A)
        for block in program.blocks:
            for i in block.instrs:
                if i.op.startswith("wgmma.mma"):
                    self.operands[id(i)] = self._registers(i.args[0]), self._registers(i.args[1])
        self.relevant = set().union(*(a | b for a, b in self.operands.values())) if self.operands else set()
        self._follow_moves()
        self.events = [list(self._events(block)) for block in program.blocks]

    def _registers(self, operand):
        """Registers of a list; none for a descriptor."""
        found = set()
        if isinstance(operand, list):
            register_names(operand, self.kernel, found)
        return found

    def _is_move(self, i):
        return i.root == "mov" and isinstance(i.args[0], str) and isinstance(i.args[1], str) and not i.pred

    def _follow_moves(self):
        moves = [tuple(i.args) for block in self.program.blocks for i in block.instrs if self._is_move(i)]
        before = -1
        while before != len(self.relevant):
            before = len(self.relevant)
            for to, source in moves:
                if (to in self.relevant or source in self.relevant) and self.kernel.regtype(source) is not None:
                    self.relevant |= {to, source}

    def _events(self, block):
        """(what, instruction, ...) of everything in a block that matters."""
        for i in block.instrs:
            if i.root == "wgmma":
                yield i.parts[1], i, None, None
                continue
            defs, uses = defs_uses(i, self.kernel)
            defs, uses = defs & self.relevant, uses & self.relevant
            if self._is_move(i) and defs:
                yield ("move" if i.args[1] in self.relevant else "constant"), i, defs, uses
            elif defs or uses:
                yield "other", i, defs, uses

    def run(self):
        blocks = self.program.blocks
        states = {0: _State()}
        todo = [0]
        while todo:
            number = todo.pop()
            after = self._through(number, states[number].copy(), False)
            for to in blocks[number].successors():
                if to not in states:
                    states[to] = after.copy()
                elif not states[to].join(after):
                    continue
                if to not in todo:
                    todo.append(to)
        for number in sorted(states):
            self._through(number, states[number].copy(), True)
            if self.errors:
                return self.errors[0]
        return None

    def _through(self, number, state, report):
        for what, i, defs, uses in self.events[number]:
            if what == "fence":
                state.touched.clear()
                state.unfenced = False
            elif what == "mma_async":
                self._mma(i, state, report)
            elif what == "commit_group":
                state.flying = {r: (min(age + 1, _OLDEST), *more) for r, (age, *more) in state.flying.items()}
            elif what == "wait_group":
                keep = int(i.args[0], 0)
                state.flying = {r: entry for r, entry in state.flying.items() if entry[0] <= keep}
            elif what == "constant":
                for r in defs:
                    state.touched.pop(r, None)
                    state.flying.pop(r, None)
            elif what == "move":
                to, source = i.args
                for table in (state.touched, state.flying):
                    table.pop(to, None)
                    if source in table:
                        table[to] = table[source]
            else:
                self._other(i, defs, uses, state, report)
        return state

    def _mma(self, i, state, report):
        accumulators, a = self.operands[id(i)]
        if report:
            if state.unfenced:
                self._error(i, "no wgmma.fence before the first wgmma", i.line)
            for r in sorted(accumulators | a):
                if r in state.touched:
                    self._error(i, f"no wgmma.fence between an access to {r} and this wgmma", state.touched[r])
                if r in a and state.flying.get(r, (0, 0, False))[2]:
                    self._error(i, f"A is read from {r} before wgmma.wait_group for its result", state.flying[r][1])
        for r in a:
            state.flying[r] = 0, i.line, False
        for r in accumulators:
            state.flying[r] = 0, i.line, True

    def _other(self, i, defs, uses, state, report):
        for r in sorted(defs | uses):
            state.touched[r] = i.line
            entry = state.flying.get(r)
            if entry is None:
                continue
            _, line, accumulator = entry
            if report and (accumulator or r in defs):
                action = "written" if r in defs else "read"
                self._error(i, f"the register {r} of a wgmma is {action} before wgmma.wait_group for it", line)
            if r in defs:
                del state.flying[r]

    def _error(self, i, message, line):
        text = self.kernel.module.text
        other = text.split("\n")[line - 1].strip()[:200]
        message = f"{message}: PTX line {line}: {other}{source_of(text, line)}\n    this instruction:"
        self.errors.append(WgmmaError(message + source_of(text, i.line), line=i.line, text=i.text[:200],
                                      other=(line, other, "")))  # fmt: skip


def check(program) -> None:
    """WgmmaError for the first wgmma of the program whose registers are not ordered; analysed once."""
    if not hasattr(program, "wgmma_error"):
        program.wgmma_error = _Analysis(program).run()
    if program.wgmma_error is not None:
        error = program.wgmma_error
        raise WgmmaError(error.message, line=error.line, text=error.text, other=error.other)
