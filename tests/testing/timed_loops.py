"""What a kernel executes between its two readings of the clock."""

from __future__ import annotations

from collections import Counter

from perf.sass import disassemble
from perf.sass.flow import ControlFlow
from ptxsim.timing.cubin import Instruction


def reads_clock(instruction: Instruction) -> bool:
    return "SR_CLOCKLO" in instruction.text


def timed_loops(cubin: bytes) -> list[list[Instruction]]:
    """The outermost loops of the one kernel that lie between two readings of the clock."""
    _, codes = disassemble(cubin)
    (code,) = codes.values()
    flow = ControlFlow(code)
    readings = [i.address for i in code.instructions if reads_clock(i)]
    found = []
    for loop in flow.loops.values():
        body = flow.instructions(loop.body)
        outermost = not any(other.holds(loop) for other in flow.loops.values())
        if outermost and readings and readings[0] < body[0].address and body[-1].address < readings[-1]:
            found.append(body)
    return found


def timed_loop(cubin: bytes) -> list[Instruction]:
    """The only one."""
    (loop,) = timed_loops(cubin)
    return loop


def mix(loop: list[Instruction]) -> Counter[str]:
    """How many instructions of each opcode."""
    return Counter(instruction.opcode for instruction in loop)
