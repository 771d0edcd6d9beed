"""General registers that SASS instructions name, by number."""

from __future__ import annotations

import re

from ptxsim.timing.cubin import Instruction

_NAMED = re.compile(r"\bR(\d+)")
_VALUE = re.compile(r"[-|]*R(\d+)\b")
_PAIRED = ("FADD2", "FMUL2", "FFMA2")
_SIZES = {"64": 2, "128": 4, "WIDE": 2} | {f"x{count}": count for count in (2, 4, 8, 16, 32, 64, 128)}


def written(instruction: Instruction) -> list[int]:
    """Those of the result; LDTM.STAT has a statistic before it."""
    first = read(*instruction.operands[:1])
    if "STAT" in instruction.modifiers:
        return first + _data(instruction)
    return _data(instruction) if first else []


def read(operand: str = "") -> list[int]:
    """Those of a value: 4 and 5 of -R4.F32x2.HI_LO. Addresses, constants and predicates have none."""
    return _consecutive(operand, 2 if "F32x2" in operand else 1)


def needed(instructions: list[Instruction]) -> int:
    """Registers that a thread needs to run these: one more than the largest number named."""
    return max((_needed(instruction) for instruction in instructions), default=0)


def _needed(instruction: Instruction) -> int:
    numbers = [int(number) for number in _NAMED.findall(" ".join(instruction.operands))]
    return 1 + max(numbers + _data(instruction), default=-1)


def _data(instruction: Instruction) -> list[int]:
    """Those of what is computed, loaded or stored: the first operand, or the second after an address or statistic."""
    operands = instruction.operands
    second = "STAT" in instruction.modifiers or not read(*operands[:1])
    width = 2 if instruction.opcode in _PAIRED else 1
    width = max([width, *(_SIZES.get(modifier, 1) for modifier in instruction.modifiers)])
    return _consecutive(operands[second], width) if len(operands) > second else []


def _consecutive(operand: str, count: int) -> list[int]:
    match = _VALUE.match(operand)
    return list(range(int(match[1]), int(match[1]) + count)) if match else []
