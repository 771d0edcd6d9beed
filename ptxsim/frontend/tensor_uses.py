"""Where registers that tcgen05.ld loads are used first: PTX ISA 9.7.16.6.4.5, register dependencies.

An instruction that reads such a register waits for the load. Found in the program, flow-insensitively: a register may
hold what any of the loads into it has brought.
"""

from __future__ import annotations

from ..ops import defs_uses


def tensor_uses(blocks, kernel) -> dict[int, tuple[int, ...]]:
    """Instructions (id) that read registers of tcgen05.ld, with the PTX lines of those loads; only the first in a block
    after each load."""
    loads = {}  # register -> lines
    for block in blocks:
        for i in block.instrs:
            if i.op.startswith("tcgen05.ld"):
                for register in defs_uses(i, kernel)[0]:
                    loads.setdefault(register, set()).add(i.line)
    found = {}
    for block in blocks if loads else ():
        seen = set()
        for i in block.instrs:
            uses = defs_uses(i, kernel)[1]
            lines = {line for register in uses & loads.keys() for line in loads[register]} - seen
            if lines:
                found[id(i)] = tuple(sorted(lines))
                seen |= lines
            if i.op.startswith("tcgen05.ld"):
                seen.discard(i.line)
    return found
