"""Instructions of PTX as the parser leaves them: opcode, operands, guard (PTX ISA 4.3, 6)."""

from __future__ import annotations

import re
from dataclasses import dataclass

TYPE_BYTES = {
    "b8": 1,
    "u8": 1,
    "s8": 1,
    "b16": 2,
    "u16": 2,
    "s16": 2,
    "f16": 2,
    "bf16": 2,
    "b32": 4,
    "u32": 4,
    "s32": 4,
    "f32": 4,
    "b64": 8,
    "u64": 8,
    "s64": 8,
    "f64": 8,
    "f16x2": 4,
    "bf16x2": 4,
    "b128": 16,
    "pred": 1,
}


@dataclass
class Mem:
    """An address operand: ``[base+off]``, or a tensor operand ``[base, {coords}]``."""

    base: str
    off: int = 0
    coords: object = None
    extra: object = None

    def __str__(self):
        inside = self.base + (f"+{self.off}" if self.off else "")
        if self.coords is not None:
            inside += f", {operand_text(self.coords)}"
        return f"[{inside}]"


def operand_text(operand) -> str:
    if isinstance(operand, list):
        return "{" + ", ".join(map(operand_text, operand)) + "}"
    if isinstance(operand, tuple):
        return "(" + ", ".join(map(operand_text, operand)) + ")"
    return str(operand)


@dataclass
class Instr:
    """One instruction; ``form``, ``mods`` and ``accesses`` are filled in by ``frontend.program.Program``."""

    op: str  # full opcode, e.g. "add.s32"
    args: list
    line: int
    pred: str | None = None  # guard register
    neg: bool = False
    parts: tuple = ()
    form: object = None
    mods: object = None
    accesses: tuple | None = None  # the registers that it writes and reads, see ``forms.defs_uses``

    def __post_init__(self):
        self.parts = tuple(re.split(r"\.(?!:)", self.op))

    @property
    def root(self) -> str:
        return self.parts[0]

    @property
    def text(self) -> str:
        guard = f"@{'!' if self.neg else ''}{self.pred} " if self.pred else ""
        return f"{guard}{self.op} {', '.join(map(operand_text, self.args))}"
