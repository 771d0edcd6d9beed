"""Registers: the files that generated code reads and writes, special registers (PTX ISA 10), operands of handlers."""

from __future__ import annotations

import numpy as np

from ..frontend.codegen import IMMEDIATE, parse_immediate
from ..ops.forms import NUMPY
from ..ops.numerics import UNDEFINED

_u4 = np.uint32


class Registers:
    """``files[number]`` is a register of all warps, an array [warps, 32]; ``program.reg(name)`` gives the number.
    ``words`` [registers, warps, 32] are those of 32 bits that outlive a basic block, all in one array.

    Registers that may be read before they are written start as NaN patterns (``frontend.undefined``).
    """

    def __init__(self, wave, symbols):
        self.wave, self.symbols = wave, symbols
        launch, program = wave.launch, wave.program
        self._fill_special_registers(launch.grid, launch.block, launch.cluster, launch.smem,
                                     symbols.static + launch.smem)  # fmt: skip
        self.files = [np.zeros((wave.nwarps, 32), NUMPY[kind]) for kind in program.regkind]
        shared = [n for n in sorted(map(program.reg, program.cross)) if program.regkind[n] == "u4"]
        self.words = np.zeros((len(shared), wave.nwarps, 32), _u4)
        for row, number in enumerate(shared):
            self.files[number] = self.words[row]
        for number in program.undefined:
            register = self.files[number]
            if register.dtype.kind == "u":
                register[:] = UNDEFINED & np.iinfo(register.dtype).max

    def _fill_special_registers(self, grid, block, cluster, dynamic, total):
        def everywhere(value):
            return np.ascontiguousarray(np.broadcast_to(np.asarray(value, _u4), (self.wave.nwarps, 32)))

        def of_cta(values):
            return everywhere(np.array(list(values), _u4)[self.wave.cta_of][:, None])

        table = self.special_values = {}
        steps = (1, block[0], block[0] * block[1])
        for d, x in enumerate("xyz"):
            table[f"tid.{x}"] = everywhere(self.wave.thread // steps[d] % block[d])
            table[f"ntid.{x}"] = everywhere(block[d])
            table[f"nctaid.{x}"] = everywhere(grid[d])
            table[f"ctaid.{x}"] = of_cta(c[d] for c in self.wave.cta_coord)
            table[f"clusterid.{x}"] = of_cta(c[d] for c in self.wave.cluster_coord)
            table[f"nclusterid.{x}"] = everywhere(grid[d] // cluster[d])
            table[f"cluster_ctaid.{x}"] = of_cta(c[d] for c in self.wave.cta_in_cluster)
            table[f"cluster_nctaid.{x}"] = everywhere(cluster[d])
        table["laneid"] = everywhere(np.arange(32))
        table["warpid"] = everywhere(self.wave.warp_in_cta[:, None])
        table["nwarpid"] = everywhere(self.wave.wpc)
        table["cluster_ctarank"] = of_cta(self.wave.rank_of_cta)
        table["cluster_nctarank"] = everywhere(self.wave.cluster_size)
        table["is_explicit_cluster"] = np.full((self.wave.nwarps, 32), self.wave.cluster_size > 1)
        table["smid"] = of_cta(range(self.wave.nctas))
        table["nsmid"] = everywhere(self.wave.nctas)
        table["gridid"] = everywhere(0)
        table["dynamic_smem_size"] = everywhere(dynamic)
        table["total_smem_size"] = everywhere(total)
        bit = np.uint64(1) << np.arange(32, dtype=np.uint64)
        one = np.uint64(1)
        for name, value in (("eq", bit), ("lt", bit - one), ("le", bit + bit - one), ("ge", ~(bit - one)),
                            ("gt", ~(bit + bit - one))):  # fmt: skip
            table[f"lanemask_{name}"] = everywhere((value & np.uint64(0xFFFFFFFF)).astype(_u4))

    def special(self, name, s):
        """A special register (PTX ISA 10) of the warps ``s`` as an array [n, 32]."""
        if name in self.special_values:
            return self.special_values[name][s]
        # the clocks: steps of the scheduler
        return np.full((len(self.wave.cta_rank[s]), 32), self.wave.step & 0xFFFFFFFF, _u4)

    def value(self, token, w, kind="u4"):
        """Value of a register, immediate or shared variable for the warps ``w``; ``kind`` is that of an immediate."""
        if IMMEDIATE.match(token):
            return np.array(parse_immediate(token, kind), np.uint64).astype(NUMPY[kind])
        if self.wave.program.k.regtype(token) is None:
            return np.asarray(self.symbols.addresses[token])
        return self.files[self.wave.program.reg(token)][w]

    def address(self, memory, w):
        """Address of a ``ops.instruction.Mem`` for the warps ``w``."""
        base = memory.base
        if IMMEDIATE.match(base):
            address = np.asarray(_u4(int(base, 0)))
        elif self.wave.program.k.regtype(base) is None:
            address = np.asarray(self.symbols.shared(base, w))
        else:
            address = self.files[self.wave.program.reg(base)][w]
        return address + address.dtype.type(memory.off)
