"""A kernel's instruction list to basic blocks with generated functions, and what is known of it before it runs."""

from __future__ import annotations

import itertools
import re

import numpy as np

from .. import ops
from ..errors import PtxError
from ..ops.forms import NUMPY, SIZE
from ..ops.instruction import Instr
from .blocks import Block, is_control, is_convergent
from .codegen import BlockGen
from .offsets import offset_products
from .tensor_uses import tensor_uses
from .undefined import undefined_registers

REGISTER_KIND = {
    "pred": "b", "b8": "u2", "b16": "u2", "s16": "u2", "u16": "u2", "f16": "u2", "bf16": "u2", "u8": "u2", "s8": "u2",
    "b32": "u4", "s32": "u4", "u32": "u4", "f32": "u4", "f16x2": "u4", "bf16x2": "u4",
    "b64": "u8", "s64": "u8", "u64": "u8", "f64": "u8", "b128": "c16",
}  # fmt: skip


class Program:
    """Blocks and register numbering of a kernel, and the generated functions.

    Raises PtxError, with line and text, for every instruction that is not simulated.
    """

    def __init__(self, kernel):
        self.k = kernel
        self.regs = {}  # register name -> number
        self.regkind = []  # number -> kind
        self.globals = {"np": np, **{k: v for k, v in NUMPY.items() if k != "b"}}
        self._names = {}  # id of a helper function -> its name in generated code
        self._lower_guards()
        self._split()
        self._find_cross_registers()
        self.undefined = {self.reg(name) for name in sorted(undefined_registers(self.blocks, kernel))}
        self.offset_products = offset_products(self.body)
        self.tensor_uses = tensor_uses(self.blocks, kernel)
        roots = {i.root for i in self.body}
        self.takes_over = "clusterlaunchcontrol" in roots
        self.has_bar_reductions = any(i.form.handler == "named_barriers.reduce" for i in self.body)
        self.has_tensor_memory = "tcgen05" in roots
        groups = {x for i in self.body if i.root == "tcgen05" for x in i.parts if x.startswith("cta_group::")}
        if len(groups) > 1:
            raise PtxError("tcgen05 instructions of one kernel with cta_group::1 and with cta_group::2")
        self.source = "\n".join(BlockGen(self, b).generate() for b in self.blocks)
        exec(compile(self.source, f"<ptx {kernel.name[:40]}>", "exec"), self.globals)
        for b in self.blocks:
            b.func = self.globals[f"block_{b.idx}"]

    def _lower_guards(self):
        """Give every instruction its form; turn guards of convergent and suspending instructions into branches.

        Such an instruction concerns whole warps, so that a guard means that a warp does not come to it at all.
        """
        kernel = self.k
        body, new_index, labels = [], {}, {}
        for index, i in enumerate(kernel.body):
            new_index[index] = len(body)
            i.form, i.mods = ops.lookup(i)
            if i.pred and (is_convergent(i) or i.form.handler) and not is_control(i):
                label = f"$guard{index}"
                skip = Instr("bra", [label], i.line, i.pred, not i.neg)
                skip.form, skip.mods = ops.lookup(skip)
                plain = Instr(i.op, i.args, i.line)
                plain.form, plain.mods = i.form, i.mods
                body += [skip, plain]
                labels[label] = len(body)
            else:
                body.append(i)
        new_index[len(kernel.body)] = len(body)
        self.labels = {name: new_index[at] for name, at in kernel.labels.items()} | labels
        self.body = body

    def _split(self):
        body = self.body
        starts = {0, len(body)} | set(self.labels.values())
        for n, i in enumerate(body):
            if is_control(i):
                starts.add(n + 1)
            if i.form.handler:
                starts |= {n, n + 1}
        starts = sorted(starts)
        last_line = body[-1].line if body else 0
        self.blocks = [Block(k, body[a:e], body[a].line) for k, (a, e) in enumerate(itertools.pairwise(starts))]
        self.blocks.append(Block(len(self.blocks), [], last_line))
        at = {start: k for k, start in enumerate(starts)}
        for b in self.blocks:
            if not b.instrs:
                b.term = "ret"
                continue
            last = b.instrs[-1]
            b.fall = b.idx + 1
            if last.root == "bra":
                b.target = at[self.labels[last.args[0]]]
                b.term = "cbr" if last.pred else "jmp"
            elif last.root in ("ret", "exit"):
                b.term = "cret" if last.pred else "ret"
            elif last.root == "trap":
                b.term = "ctrap" if last.pred else "trap"
            elif last.form.handler:
                b.handler = last

    def _find_cross_registers(self):
        """Registers that live in the register file: read in some block before a definition there."""
        self.cross = set()
        for b in self.blocks:
            defined = set()
            for i in b.instrs:
                defs, uses = ops.defs_uses(i, self.k)
                if i.pred:
                    uses = uses | {i.pred} | defs  # a guarded definition keeps the old value
                self.cross |= {r for r in uses if r not in defined or b.handler}
                defined |= defs
                if b.handler:
                    self.cross |= defs

    def reg(self, name: str) -> int:
        number = self.regs.get(name)
        if number is None:
            type_name = self.k.regtype(name)
            if type_name is None:
                raise PtxError(f"unknown register {name}")
            number = self.regs[name] = len(self.regkind)
            self.regkind.append(REGISTER_KIND[type_name])
        return number

    def kind_of(self, name: str) -> str:
        return self.regkind[self.reg(name)]

    def const(self, kind: str, bits: int) -> str:
        """Name of a NumPy scalar in generated code."""
        name = f"c_{kind}_{bits:x}".replace("-", "m")
        if name not in self.globals:
            size = SIZE[kind]
            raw = (bits & ((1 << 8 * size) - 1)).to_bytes(size, "little")
            self.globals[name] = np.bool_(bits) if kind == "b" else np.frombuffer(raw, NUMPY[kind])[0]
        return name

    def function(self, helper) -> str:
        """Name of a helper function (or another constant object) in generated code."""
        name = self._names.get(id(helper))
        if name is None:
            base = re.sub(r"\W", "_", getattr(helper, "__name__", "helper"))
            name = self._names[id(helper)] = f"{base}_{len(self._names)}"
            self.globals[name] = helper
        return name
