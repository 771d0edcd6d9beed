"""A basic block to one generated Python function.

A block function has the signature ``f(X, R, s, w, M)``:

X  the machine, whose parts run what has side effects: ``X.shared``, ``X.mbarriers`` …
R  register files: R[i] is a NumPy array [warps, 32]
s  slice or index array that selects the group's warps
w  the same warps as an int array
M  None (all 32 lanes active) or a bool array [n, 32]

and returns the condition of a guarded branch at its end. Inside a block values are Python locals that are never changed
in place; registers used in other blocks are loaded at first use and written back at the end. Lane masks therefore
matter only in the write-back and in operations with side effects.
"""

from __future__ import annotations

import re

import numpy as np

from .. import ops
from ..errors import PtxError
from ..ops.forms import NUMPY, SIZE
from .blocks import is_aligned, is_control

# PTX ISA 10; the machine supplies [warps, 32] arrays. The clocks count the scheduler's steps.
SPECIAL_REGISTERS = {
    f"{base}.{d}"
    for base in ("tid", "ntid", "ctaid", "nctaid", "clusterid", "nclusterid", "cluster_ctaid", "cluster_nctaid")
    for d in "xyz"
} | {
    "laneid",
    "warpid",
    "nwarpid",
    "smid",
    "nsmid",
    "gridid",
    "cluster_ctarank",
    "cluster_nctarank",
    "is_explicit_cluster",
    "lanemask_eq",
    "lanemask_lt",
    "lanemask_le",
    "lanemask_gt",
    "lanemask_ge",
    "clock",
    "clock64",
    "globaltimer",
    "globaltimer_lo",
    "dynamic_smem_size",
    "total_smem_size",
}

IMMEDIATE = re.compile(r"^-?(0[xX][0-9a-fA-F]+|0[fFdD][0-9a-fA-F]+|\d+\.?\d*([eE][-+]?\d+)?)U?$")


def parse_immediate(token: str, kind: str) -> int:
    """A PTX literal as raw bits of the given kind."""
    single = re.match(r"^0[fF]([0-9a-fA-F]{8})$", token)
    double = re.match(r"^0[dD]([0-9a-fA-F]{16})$", token)
    if single:
        bits = int(single.group(1), 16)
        value = np.uint32(bits).view(np.float32)
        return int(np.float64(value).view(np.uint64)) if kind == "f8" else bits
    if double:
        bits = int(double.group(1), 16)
        return int(np.float32(np.uint64(bits).view(np.float64)).view(np.uint32)) if kind == "f4" else bits
    if kind.startswith("f"):
        return int(np.frombuffer(NUMPY[kind](float(token)).tobytes(), NUMPY["u" + kind[1]])[0])
    return int(token.rstrip("U"), 0) & ((1 << 8 * SIZE[kind]) - 1)


class BlockGen:
    """Generator of one block's function; translators in ``ops`` call its methods."""

    def __init__(self, prog, block):
        self.prog, self.block = prog, block
        self.kernel = prog.k
        self.current = {}  # register -> {kind: local name}
        self.dirty = []  # registers to write back, in order
        self.lines = []
        self.temps = 0
        self.guard = None  # local name of the guard of the current instruction
        self.instr = None

    @property
    def root(self) -> str:
        return self.instr.root

    def emit(self, statement):
        self.lines.append("    " + statement)

    def temp(self, expression):
        self.temps += 1
        self.emit(f"t{self.temps} = {expression}")
        return f"t{self.temps}"

    def fn(self, helper) -> str:
        return self.prog.function(helper)

    def read(self, token, kind):
        """Local variable or constant that holds an operand, viewed as ``kind``."""
        if not isinstance(token, str):
            raise PtxError(f"operand {token} where a register or a constant is expected")
        if IMMEDIATE.match(token):
            return self.prog.const(kind, parse_immediate(token, kind))
        if token.startswith("%") and token[1:] in SPECIAL_REGISTERS:
            value = f"X.registers.special({token[1:]!r}, s)"
            if kind not in ("u4", "b"):
                value = f"{value}.astype({kind})" if SIZE[kind] != 4 else f"{value}.view({kind})"
            return self.temp(value)
        if token == "WARP_SZ":
            return self.prog.const(kind, 32)
        if self.kernel.regtype(token) is None:
            return self.symbol(token, kind)
        own = self.prog.kind_of(token)
        forms = self.current.get(token)
        number = self.prog.reg(token)
        if forms is None:
            name = f"r{number}"
            # a register that is written below must not stay a view of its file
            self.emit(f"{name} = R[{number}][s]" + (".copy()" if token in self.written else ""))
            forms = self.current[token] = {own: name}
        if kind in forms:
            return forms[kind]
        if kind == "b" or own == "b":
            raise PtxError(f"{token} is a {'predicate' if own == 'b' else 'value'} and is used as the opposite")
        name = f"r{number}_{kind}"
        if SIZE[kind] == SIZE[own]:
            self.emit(f"{name} = {next(iter(forms.values()))}.view({kind})")
        elif SIZE[kind] < SIZE[own]:
            whole = self.read(token, f"u{SIZE[own]}")
            self.emit(f"{name} = {whole}.astype(u{SIZE[kind]})" + ("" if kind[0] == "u" else f".view({kind})"))
        else:
            raise PtxError(f"register {token} is narrower than the operand")
        forms[kind] = name
        return name

    def predicate(self, token):
        """A predicate operand, which may be negated by '!'."""
        if token.startswith("!"):
            return f"np.logical_not({self.read(token[1:], 'b')})"
        return self.read(token, "b")

    def symbol(self, name, kind):
        kernel = self.kernel
        if name in kernel.params:
            return self.temp(f"X.symbols.param_address({kernel.params[name][0]})")
        if name in kernel.shared or name in kernel.module.shared:
            return self.temp(f"X.symbols.shared({name!r}, s)" + ("" if kind == "u4" else f".astype({kind})"))
        if name in kernel.local:
            return self.temp(f"X.symbols.local({name!r}, s)")
        if name in kernel.module.globals:
            return self.temp(f"X.symbols.global_variable({name!r})")
        raise PtxError(f"unknown operand {name}")

    def write(self, token, expression, kind):
        """Assign an expression of the given kind to a register, honouring the guard."""
        if token == "_":
            self.emit(expression)
            return
        if not isinstance(token, str) or self.kernel.regtype(token) is None:
            raise PtxError(f"{token} is not a register")
        own, number = self.prog.kind_of(token), self.prog.reg(token)
        if (kind == "b") != (own == "b"):
            raise PtxError(f"{token} cannot hold the result")
        if SIZE[kind] != SIZE[own]:
            if SIZE[kind] > SIZE[own]:
                raise PtxError(f"register {token} is narrower than the result")
            letter = "i" if kind[0] == "i" else "u"
            narrow = f"({expression})" + (f".view(u{SIZE[kind]})" if kind[0] == "f" else "")
            expression, kind = f"{narrow}.astype({letter}{SIZE[own]})", f"{letter}{SIZE[own]}"
        name = f"r{number}" if kind == own else f"r{number}_{kind}"
        if self.guard is not None:
            old = self.read(token, kind)
            self.emit(f"{name} = np.where({self.guard}, {self.temp(expression)}, {old})")
        else:
            self.emit(f"{name} = {expression}")
        self.current[token] = {kind: name}
        if token in self.prog.cross and token not in self.dirty:
            self.dirty.append(token)

    def mask(self):
        """Expression for the lanes that perform a side effect."""
        return "M" if self.guard is None else f"X.warps.lanes(w, M, {self.guard})"

    def tell(self, event, *arguments):
        """Tell observers of an event, a method of ``machine.events.Observer``; ``arguments`` are expressions."""
        self.emit(f"if X.events.{event}: X.events.{event}({', '.join(arguments)})")

    def address(self, memory):
        """Expression for the address of a ``Mem`` operand (u4 or u8, as its base register)."""
        base = memory.base
        if self.kernel.regtype(base) is not None:
            kind = self.prog.kind_of(base)
            value = self.read(base, kind)
        elif IMMEDIATE.match(base):
            return self.prog.const("u8", parse_immediate(base, "u8") + memory.off)
        else:
            kind = "u4" if base in self.kernel.shared or base in self.kernel.module.shared else "u8"
            value = self.symbol(base, kind)
        if not memory.off:
            return value
        mask = 0xFFFFFFFF if kind == "u4" else 0xFFFFFFFFFFFFFFFF
        return f"({value} + {self.prog.const(kind, memory.off & mask)})"

    # ---- the whole block --------------------------------------------------------------------------
    def generate(self):
        b = self.block
        self.written = set()
        for i in b.instrs:
            self.written |= ops.defs_uses(i, self.kernel)[0]
        result = "None"
        for i in b.instrs:
            self.instr = i
            try:
                if b.handler:  # run by the machine; its registers need numbers
                    defs, uses = ops.defs_uses(i, self.kernel)
                    for r in sorted(defs | uses):
                        self.prog.reg(r)
                elif is_control(i):
                    if i.pred:
                        result = self.predicate(("!" if i.neg else "") + i.pred)
                else:
                    self._translate(i)
            except PtxError as error:
                raise error.located(i.line, i.text) from None
            except (IndexError, KeyError, ValueError, AttributeError, TypeError) as error:
                raise PtxError(f"operands do not fit the instruction ({error})", line=i.line, text=i.text) from error
        self._write_back()
        self.emit(f"return {result}")
        b.src = f"def block_{b.idx}(X, R, s, w, M):\n" + "\n".join(self.lines)
        return b.src

    def _translate(self, i):
        self.guard = None
        if i.pred:
            self.guard = self.predicate(i.pred)
            if i.neg:
                self.guard = self.temp(f"np.logical_not({self.guard})")
        if i.form.effect:
            self.emit(f"X.wave.line = {i.line}")
        if is_aligned(i):
            self.emit("if M is not None: X.warps.require_whole(w, M)")
        if id(i) in self.prog.offset_products:
            self._check_offset(i)
        if id(i) in self.prog.tensor_uses:
            self.tell("tensor_use", "w", str(self.prog.tensor_uses[id(i)]))
        i.form.translate(self, i.args, i.mods)

    def _check_offset(self, i):
        a, b, *c = (self.read(x, "u4") for x in i.args[1:])
        signed, shift = self.prog.offset_products[id(i)], i.root == "shl"
        self.emit(f"X.wave.line = {i.line}")
        self.emit(f"X.offsets.check(w, {self.mask()}, {a}, {b}, {c[0] if c else 'u4(0)'}, {signed}, {shift})")

    def _write_back(self):
        if not self.dirty:
            return
        values = []
        for token in self.dirty:
            own, forms = self.prog.kind_of(token), self.current[token]
            value = forms[own] if own in forms else f"{next(iter(forms.values()))}.view({own})"
            values.append((self.prog.reg(token), value))
        self.emit("if M is None:")
        for number, value in values:
            self.emit(f"    R[{number}][s] = {value}")
        self.emit("else:")
        for number, value in values:
            self.emit(f"    R[{number}][s] = np.where(M, {value}, R[{number}][s])")
