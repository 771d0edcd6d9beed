"""Exponentials that a loop evaluates on the FMA pipe instead of the MUFU: how many, and by which instructions.

2^x is split at a whole number: x plus a constant that leaves floor(x) in the low bits of the sum; a polynomial of the
fraction; the sum, shifted into the place of the exponent (23 bits), added to the polynomial's bits. By this last
instruction an exponential is recognised. Its own are the sum, what depends on the sum up to the last instruction, and
a clamp of x (FMNMX with a constant) before the sum. The scaling of x is not, since an exponential of the MUFU needs it
too. An instruction for two exponentials (FADD2, FFMA2) counts once.
"""

from __future__ import annotations

from perf.sass.registers import read, written
from ptxsim.timing.cubin import Instruction

_EXPONENT_SHIFTS = {"IMAD": (2, "0x800000"), "LEA": (3, "0x17")}  # c + (b << 23): which operand says so


def emulated_exp2(instructions: list[Instruction]) -> tuple[int, list[Instruction]]:
    """How many exponentials straight-line code emulates, and their instructions in its order."""
    sources = _sources(instructions)
    ends = [k for k, instruction in enumerate(instructions) if _adds_to_exponent(instruction)]
    own: set[int] = set()
    for end in ends:
        (shifted,) = read(instructions[end].operands[1])
        start = sources[end][shifted]
        own |= _between(start, end, sources)
        own |= {k for k in sources[start].values() if _is_clamp(instructions[k])}
    return len(ends), [instructions[k] for k in sorted(own)]


def _sources(instructions: list[Instruction]) -> list[dict[int, int]]:
    """Of each instruction: by register that it reads, which instruction wrote that, if one of these did."""
    writers: dict[int, int] = {}
    sources = []
    for k, instruction in enumerate(instructions):
        registers = [register for operand in instruction.operands[1:] for register in read(operand)]
        sources.append({register: writers[register] for register in registers if register in writers})
        writers |= dict.fromkeys(written(instruction), k)
    return sources


def _adds_to_exponent(instruction: Instruction) -> bool:
    position, shift = _EXPONENT_SHIFTS.get(instruction.opcode, (0, ""))
    return instruction.operands[position : position + 1] == [shift]


def _is_clamp(instruction: Instruction) -> bool:
    return instruction.opcode == "FMNMX" and not read(instruction.operands[2])


def _between(start: int, end: int, sources: list[dict[int, int]]) -> set[int]:
    """Instructions on the ways of the data from one to another, with both; none where there is no way."""
    if start == end:
        return {start}
    found = set().union(*(_between(start, k, sources) for k in set(sources[end].values()) if k >= start))
    return found | {end} if found else set()
