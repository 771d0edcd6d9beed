"""Damage to the synchronisation of a kernel, one instruction at a time, for ``python -m ptxsim mutate``.

Every instruction that orders accesses is a site, with one or more mutants:

========= ============================================================= ==========================================
kind      instructions                                                  mutants
========= ============================================================= ==========================================
barrier   bar.sync, bar.arrive, bar.warp.sync, barrier.cluster          deleted
fence     fence, membar, fence.proxy, fence.mbarrier_init,              deleted
          wgmma.fence, tcgen05.fence
wait      mbarrier.try_wait and test_wait                               yes at once; the other phase; of a peek also
                                                                        no at once
wait      cp.async, cp.async.bulk and wgmma wait_group, wait_all,       deleted; one group more may be pending
          tcgen05.wait
arrive    mbarrier.arrive without bytes, cp.async.mbarrier.arrive       deleted; one arrival more
expect_tx mbarrier.arrive.expect_tx, mbarrier.expect_tx                 deleted; 16 bytes less; 16 bytes more
commit    cp.async, cp.async.bulk and wgmma commit_group,               deleted
          tcgen05.commit
========= ============================================================= ==========================================

A peek is a test_wait or try_wait that the code does not spin on: the next wait in the code follows if it says no, which
a peek may do at any time. In the mutants of that wait it does: else the peek would hide most of them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from ..frontend.parser import Kernel
from ..ops.instruction import Instr, Mem

KINDS = ("barrier", "fence", "wait", "arrive", "expect_tx", "commit")
PEEK_FAILS = "no at once"
_WRONG = "%ptxsim_wrong"  # a register for a damaged operand
_SPIN = ("bra", "setp", "selp", "mov", "not", "xor", "cvt", "and")  # between a wait and the branch back to it


@dataclass(frozen=True)
class Mutant:
    """Instructions in the place of the one with number ``index`` of the kernel's body, or of several: ``edits``."""

    index: int
    line: int  # of the PTX, 1-based
    op: str  # the opcode of what is damaged
    kind: str
    change: str
    edits: tuple[tuple[int, tuple[Instr, ...]], ...]
    peek: int | None = None  # line of the peek that says no


def plan(kernel: Kernel) -> list[Mutant]:
    """All mutants of a kernel, in the order of the code."""
    mutants, peek = [], None  # the index of a peek whose wait is still to come
    for index, i in enumerate(kernel.body):
        kind = kind_of(i)
        if kind is None:
            continue
        tests, hidden = kind == "wait" and i.root == "mbarrier", ()
        before, line = peek, None
        if tests:
            peek = index if is_peek(kernel, index) else None
        if tests and peek is None and before is not None:
            hidden, line = ((before, (_answer(kernel.body[before], "setp.ne.u32"),)),), kernel.body[before].line
        for change, instructions in _changes(kernel, index, i, kind):
            mutants.append(Mutant(index, i.line, i.op, kind, change, ((index, tuple(instructions)), *hidden), line))
    return mutants


def damaged(kernel: Kernel, *mutants: Mutant) -> Kernel:
    """The kernel with these mutants, of different instructions, in place."""
    changes = {index: instructions for m in mutants for index, instructions in m.edits}
    body, starts = [], []
    for index, i in enumerate(kernel.body):
        starts.append(len(body))
        body += changes.get(index, (i,))
    starts.append(len(body))
    labels = {label: starts[at] for label, at in kernel.labels.items()}
    return replace(kernel, body=body, labels=labels, regtypes={**kernel.regtypes, _WRONG: "b32"})


def kind_of(i: Instr) -> str | None:
    """What a synchronisation does; None for other instructions. See the table above."""
    op, parts = i.op, i.parts
    if re.match(r"(bar|barrier)(\.cta|\.warp|\.cluster)?\.(sync|arrive|wait)\b", op):
        return "barrier"
    if parts[0] in ("fence", "membar") or op.startswith(("wgmma.fence", "tcgen05.fence")):
        return "fence"
    if op.startswith("tcgen05.wait") or (parts[0] == "mbarrier" and parts[1] in ("try_wait", "test_wait")):
        return "wait"
    if parts[0] in ("cp", "wgmma") and any(part in ("wait_group", "wait_all") for part in parts):
        return "wait"
    if parts[0] == "mbarrier" and "expect_tx" in parts:
        return "expect_tx"
    if (parts[0] == "mbarrier" and parts[1] in ("arrive", "arrive_drop")) or op.startswith("cp.async.mbarrier.arrive"):
        return "arrive"
    if (parts[0] in ("cp", "wgmma") and "commit_group" in parts) or op.startswith("tcgen05.commit"):
        return "commit"
    return None


def is_peek(kernel: Kernel, index: int) -> bool:
    """Whether the code goes on if this try_wait or test_wait says no."""
    for i in kernel.body[index + 1 : index + 9]:
        if i.root not in _SPIN:
            return True
        if i.root == "bra" and index - 8 <= kernel.labels[i.args[0]] <= index:
            return False
    return True


def _changes(kernel, index, i, kind):
    """(what is changed, instructions in the place of ``i``)"""
    if kind == "wait" and i.root == "mbarrier":
        yield "yes at once", [_answer(i, "setp.eq.u32")]
        if "parity" in i.parts:
            done, at, phase, *rest = i.args
            yield "other phase", [Instr("xor.b32", [_WRONG, phase, "1"], i.line), _with(i, [done, at, _WRONG, *rest])]
        if is_peek(kernel, index):
            yield PEEK_FAILS, [_answer(i, "setp.ne.u32")]
        return
    state = i.args[0] if i.root == "mbarrier" and not isinstance(i.args[0], Mem) and i.args[0] != "_" else None
    yield "deleted", [Instr("mov.b64", [state, "0"], i.line, i.pred, i.neg)] if state else []
    if "wait_group" in i.parts:
        yield "one group more", [_with(i, [str(int(i.args[0], 0) + 1)])]
    if kind == "expect_tx":
        for change, difference in (("16 bytes less", "-16"), ("16 bytes more", "16")):
            yield change, _add(i, i.args, difference)
    if kind == "arrive" and i.root == "mbarrier":
        counted = len(i.args) > 1 + (not isinstance(i.args[0], Mem))
        yield "one arrival more", _add(i, i.args, "1") if counted else [_with(i, [*i.args, "2"])]


def _with(i, args):
    return Instr(i.op, args, i.line, i.pred, i.neg)


def _answer(i, comparison):
    """The predicate of a wait, without waiting."""
    return Instr(comparison, [i.args[0].split("|")[0], "0", "0"], i.line, i.pred, i.neg)


def _add(i, args, difference):
    """The instruction with something added to its last operand."""
    return [Instr("add.s32", [_WRONG, args[-1], difference], i.line), _with(i, [*args[:-1], _WRONG])]
