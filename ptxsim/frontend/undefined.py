"""Registers that may be read before anything has written them: what they hold then is undefined (PTX ISA 5.1).

In a kernel they start as NaN patterns (``numerics.UNDEFINED``), not as zeros, so that a result that depends on them is
wrong in the simulator, too: accumulators that nobody cleared, elements that a predicated load left out. Registers that
are always written first are not touched, which are nearly all.
"""

from __future__ import annotations

from .. import ops


def undefined_registers(blocks, kernel) -> set[str]:
    """Registers that are live at the entry of a kernel: on some path from there, a read comes before every write.

    A guarded write leaves the value of the lanes that do not take part, and does not count.
    """
    exposed, written, live = [], [], []
    for b in blocks:
        reads, writes = set(), set()
        for i in b.instrs:
            defs, uses = ops.defs_uses(i, kernel)
            reads |= (uses | ({i.pred} if i.pred else set())) - writes
            if not i.pred:
                writes |= defs
        exposed.append(reads)
        written.append(writes)
        live.append(set(reads))
    changed = True
    while changed:
        changed = False
        for b in reversed(blocks):
            after = set().union(*(live[n] for n in b.successors()))
            before = exposed[b.idx] | after - written[b.idx]
            if before != live[b.idx]:
                live[b.idx], changed = before, True
    return live[0]
