"""The table of instruction forms: which PTX the simulator knows, and the function that translates each.

A form is written as PTX ISA writes its syntax: ``[...]`` is optional, ``{name}`` is one of the alternatives given for
that name, everything else is literal::

    @form("shfl.sync.{mode}.b32", mode="up|down|bfly|idx")
    def shuffle(gen, args, mods): ...

An opcode that matches no form is refused (``PtxError``): nothing is ignored and nothing is guessed. ``mods`` has one
attribute a name: the alternative that was found, or None.

Kinds: values in generated code are NumPy arrays ``[warps, 32]``; a kind is NumPy's letter and size in bytes ("u4",
"i8", "f4"; "b" is a predicate). 16-bit floats are held as bits ("u2", pairs as "u4"), since NumPy has no bfloat16.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np

from ..errors import PtxError
from .instruction import Mem

KIND = {
    "s8": "i1", "s16": "i2", "s32": "i4", "s64": "i8", "u8": "u1", "u16": "u2", "u32": "u4", "u64": "u8",
    "b8": "u1", "b16": "u2", "b32": "u4", "b64": "u8", "f32": "f4", "f64": "f8", "pred": "b",
    "f16": "u2", "bf16": "u2", "f16x2": "u4", "bf16x2": "u4", "f32x2": "u8", "tf32": "u4",
}  # fmt: skip
SIZE = {
    "b": 1,
    "u1": 1,
    "u2": 2,
    "u4": 4,
    "u8": 8,
    "i1": 1,
    "i2": 2,
    "i4": 4,
    "i8": 8,
    "f2": 2,
    "f4": 4,
    "f8": 8,
    "c16": 16,
}
NUMPY = {
    "b": np.bool_, "u1": np.uint8, "u2": np.uint16, "u4": np.uint32, "u8": np.uint64,
    "i1": np.int8, "i2": np.int16, "i4": np.int32, "i8": np.int64, "f2": np.float16, "f4": np.float32, "f8": np.float64,
    "c16": np.complex128,  # a carrier of 128 bits, never a number
}  # fmt: skip

# alternatives that many forms share
VOCABULARY = {
    "ftz": "ftz",
    "sat": "sat",
    "relu": "relu",
    "nan": "NaN",
    "rnd": "rn|rz|rm|rp",
    "int": "u16|u32|u64|s16|s32|s64",
    "bits": "b16|b32|b64",
    "sem": "weak|volatile|relaxed|acquire|release|acq_rel",
    "scope": "cta|cluster|gpu|sys",
    "shared": "shared|shared::cta|shared::cluster",
}


@dataclass(frozen=True)
class Form:
    """One line of the table; ``syntax`` is the template with the alternatives of its names in their places."""

    syntax: str
    pattern: re.Pattern
    translate: Callable | None
    writes: bool  # the first operand is a destination
    effect: bool  # touches memory, barriers or other lanes: errors need its line
    handler: str | None  # part and method of the machine that run it, for instructions that may suspend a warp
    reads_first: bool  # the destination is read as well (accumulators)
    destinations: int = 1  # operands that are written, if the first is


TABLE: dict[str, list[Form]] = {}


def _pattern(template: str, names: dict[str, str]) -> re.Pattern:
    out = []
    for token in re.findall(r"\[|\]|\{\w+\}|[^\[\]{}]+", template):
        if token == "[":
            out.append("(?:")
        elif token == "]":
            out.append(")?")
        elif token.startswith("{"):
            name = token[1:-1]
            choices = names.get(name) or VOCABULARY[name]
            out.append(f"(?P<{name}>{'|'.join(re.escape(c) for c in choices.split('|'))})")
        else:
            out.append(re.escape(token))
    return re.compile("".join(out))


def _syntax(template: str, names: dict[str, str]) -> str:
    def alternatives(match):
        found = names.get(match[1]) or VOCABULARY[match[1]]
        return f"{{{found}}}" if "|" in found else found

    return re.sub(r"\{(\w+)\}", alternatives, template)


def known(root: str = "") -> list[str]:
    """The syntax of every form, or of those of one instruction (``mbarrier``), sorted."""
    return sorted({entry.syntax for name, entries in TABLE.items() if root in ("", name) for entry in entries})


def form(template, *, writes=True, effect=False, handler=None, reads_first=False, destinations=1, **names):
    """Register the decorated translator ``(gen, args, mods)`` for a form; may be applied several times."""

    def register(translate):
        text = _syntax(template, names), _pattern(template, names)
        entry = Form(*text, translate, writes, effect, handler, reads_first, destinations)
        TABLE.setdefault(template.split(".")[0].split("[")[0], []).append(entry)
        return translate

    return register


def suspending(template, handler, **names):
    """Register a form that may suspend its warp: it gets a block of its own and is run by ``handler``, "part.method" of
    the machine, which takes the instruction and the group and gives None or a ``machine.waiting.Wait``."""
    form(template, writes=False, effect=True, handler=handler, **names)(None)


@functools.lru_cache(maxsize=4096)
def _find(opcode: str):
    for entry in TABLE.get(opcode.split(".")[0], ()):
        match = entry.pattern.fullmatch(opcode)
        if match:
            return entry, SimpleNamespace(**match.groupdict())
    return None


def lookup(instruction) -> tuple[Form, SimpleNamespace]:
    """The form of an instruction and its modifiers; PtxError if there is none."""
    found = _find(instruction.op)
    if found is None:
        root = instruction.op.split(".")[0]
        known = "this form of the instruction is not simulated" if root in TABLE else "unknown instruction"
        raise PtxError(f"{known}: {instruction.op}", line=instruction.line, text=instruction.text)
    return found


# ---- operands -------------------------------------------------------------------------------------
def as_list(operand) -> list:
    return operand if isinstance(operand, list) else [operand]


def register_names(operand, kernel, out: set) -> None:
    """Collect the registers that an operand mentions."""
    if isinstance(operand, (list, tuple)):
        for x in operand:
            register_names(x, kernel, out)
    elif isinstance(operand, Mem):
        for x in (operand.base, operand.coords, operand.extra):
            if x is not None:
                register_names(x, kernel, out)
    else:
        for token in operand.split("|"):
            token = token.lstrip("!")
            if kernel.regtype(token) is not None:
                out.add(token)


def defs_uses(instruction, kernel) -> tuple[set, set]:
    """Registers that an instruction writes and reads (its guard not included). Several analyses ask; do not change the
    sets."""
    if instruction.accesses is None:
        instruction.accesses = _defs_uses(instruction, kernel)
    return instruction.accesses


def _defs_uses(instruction, kernel):
    defs, uses = set(), set()
    args = instruction.args
    if instruction.root in ("bra", "ret", "exit", "trap") or not args:
        return defs, uses
    entry = instruction.form
    if (not entry.writes and entry.handler not in ("mbarriers.try_wait", "named_barriers.reduce")) or isinstance(
        args[0], Mem
    ):
        register_names(args, kernel, uses)
        return defs, uses
    register_names(args[: entry.destinations], kernel, defs)
    register_names(args[entry.destinations :], kernel, uses)
    if entry.reads_first:
        uses |= defs
    return defs, uses


def width_of(type_name: str) -> int:
    """Bits of a PTX type."""
    return 8 * SIZE[KIND[type_name]]
