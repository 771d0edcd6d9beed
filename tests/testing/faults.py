"""Planted faults: damage one synchronisation of a kernel's PTX at a time.

Not every synchronisation that one removes is missed by the kernel: the wait for a stage that nobody has used yet, the
release after the last tile, a barrier that only orders warps for speed. The sites below are those that are needed by
their place in the code, by these rules:

* ``no cp.async wait``, ``no bar.sync``: a cp.async.wait_group directly followed by a bar.sync, and that bar.sync: the
  warps read each other's copies next. (A wait_group followed by a stricter one is not needed.)
* ``no wait``, ``wrong phase``: the mbarrier wait, with the peek at the same barrier before it, that is followed by a
  wgmma before the next wait: it waits for the operands that the wgmma reads.
* ``no producer wait``: a wait inside a loop that is followed by a TMA load: it waits until the stage has been read.
* ``no arrive``: an mbarrier arrival inside a loop: it releases a stage for the loads of the following iterations.
* ``early release``: an arrival inside two loops, of tiles and of stages, directly after a wgmma.wait_group: moved
  before it, where a wgmma still reads the stage. (In the outer loop alone the next use may be far away.)
* ``short expect_tx``, ``long expect_tx``: every announcement of a TMA load's bytes, 16 bytes off.
* ``no wgmma wait``: a wgmma.wait_group after which the accumulators are read.
* ``no barrier before the output``: the bar.sync between writing the output tile to shared memory and reading it back,
  which is the last one, or the last one before the first bulk store; and the bar.arrive directly before it, if there
  is one.
* ``no barrier before writing``: the last bar.sync before the first stmatrix: all warps, or the store before, have read
  what the output tile overwrites.
* ``no bulk wait``: a cp.async.bulk.wait_group.read inside a loop: the next iteration writes where the store reads.
* ``no turn``: a bar.arrive inside a loop, which another warpgroup waits for.
"""

import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from unittest import mock

from ptxsim.host import programs

ARRIVE = re.compile(r"(@!?%p\d+\s+)?mbarrier\.arrive\.shared")
BULK_STORE = re.compile(r"cp\.async\.bulk\.tensor\S*\.global\.shared")
WAIT = re.compile(r"mbarrier\.try_wait\S*\s+(?P<done>%?\w+),\s*\[(?P<at>[^\]]+)\],\s*(?P<phase>%?\w+)")


@dataclass(frozen=True)
class Fault:
    """Replacement of PTX lines: (1-based number, new text)."""

    kind: str
    edits: tuple[tuple[int, str], ...]

    def __str__(self) -> str:
        return f"{self.kind} at line {self.edits[-1][0]}"

    def plant(self, ptx: str) -> str:
        lines = ptx.split("\n")
        for number, text in self.edits:
            lines[number - 1] = text
        return "\n".join(lines)


def changed_programs(change: Callable[[str], str]) -> AbstractContextManager:
    """Inside, launches run what ``change`` makes of a kernel's PTX."""
    load = programs.load_program
    return mock.patch.object(programs, "load_program", lambda text, name: load(change(text), name))


def plan(ptx: str) -> list[Fault]:
    """Every fault that the rules allow, in the order of the code."""
    code = [(number, line.strip()) for number, line in enumerate(ptx.split("\n"), 1)]
    # What decides: synchronisation, and the instructions that need it
    events = [(n, s) for n, s in code if re.search(r"mbarrier|bar\.|wgmma|cp\.async", s)]
    loops = _loops(code)
    last_barrier = _last_barrier(code, BULK_STORE)
    writing = _last_barrier(code, re.compile("stmatrix"))
    faults = []
    for i, (number, text) in enumerate(events):
        before = events[i - 1][1] if i else ""
        after = events[i + 1][1] if i + 1 < len(events) else ""
        depth = sum(first < number < last for first, last in loops)
        in_loop = depth > 0
        if text.startswith("cp.async.wait_group") and after.startswith("bar.sync"):
            faults.append(Fault("no cp.async wait", ((number, ""),)))
        if text.startswith("bar.sync") and before.startswith("cp.async.wait_group"):
            faults.append(Fault("no bar.sync", ((number, ""),)))
        if number == last_barrier or (text.startswith("bar.arrive") and events[i + 1][0] == last_barrier):
            faults.append(Fault("no barrier before the output", ((number, ""),)))
        if text.startswith("wgmma.wait_group"):
            faults.append(Fault("no wgmma wait", ((number, ""),)))
        if number == writing:
            faults.append(Fault("no barrier before writing", ((number, ""),)))
        if text.startswith("cp.async.bulk.wait_group.read") and in_loop:
            faults.append(Fault("no bulk wait", ((number, ""),)))
        if text.startswith("bar.arrive") and in_loop:
            faults.append(Fault("no turn", ((number, ""),)))
        if ARRIVE.match(text) and in_loop:
            faults.append(Fault("no arrive", ((number, ""),)))
            if before.startswith("wgmma.wait_group") and depth > 1:
                faults.append(Fault("early release", ((events[i - 1][0], ""), (number, f"{text} {before}"))))
        if expect := re.match(r"(mbarrier\.arrive\.expect_tx.*,\s*)(%?\w+);", text):
            for kind, change in (("short expect_tx", -16), ("long expect_tx", 16)):
                edit = f"{{ .reg .b32 wrong; add.s32 wrong, {expect[2]}, {change}; {expect[1]} wrong; }}"
                faults.append(Fault(kind, ((number, edit),)))
        if WAIT.match(text) and "bra" in code[number][1]:
            faults += _wait_faults(events, i, in_loop)
    return faults


def _wait_faults(events, i, in_loop):
    """Faults of the waiting loop whose try_wait is event ``i``."""
    waits = [events[i]]
    peek = WAIT.match(events[i - 1][1])
    if peek and not peek["done"].startswith("P"):
        waits.insert(0, events[i - 1])
    next_use = next((s for _, s in events[i + 1 :] if re.match(r"wgmma\.mma|cp\.async\.bulk\.tensor", s)), "")
    next_wait = next((j for j in range(i + 1, len(events)) if WAIT.match(events[j][1])), len(events))
    feeds_wgmma = any(s.startswith("wgmma.mma") for _, s in events[i + 1 : next_wait])
    removed = tuple((n, f"setp.eq.u32 {WAIT.match(s)['done']}, 0, 0;") for n, s in waits)
    flipped = tuple((n, _flip(s)) for n, s in waits)
    if feeds_wgmma:
        return [Fault("no wait", removed), Fault("wrong phase", flipped)]
    if in_loop and next_use.startswith("cp.async.bulk.tensor"):
        return [Fault("no producer wait", removed)]
    return []


def _last_barrier(code, instruction):
    """Line of the last bar.sync before the first such instruction, or of all if there is none."""
    end = next((number for number, text in code if instruction.match(text)), len(code))
    return max(number for number, text in code[:end] if text.startswith("bar.sync"))


def _flip(text):
    """The wait with the other phase."""
    wait = WAIT.match(text)
    other = text.replace(f"], {wait['phase']}", "], other", 1)
    return f"{{ .reg .b32 other; xor.b32 other, {wait['phase']}, 1; {other} }}"


def _loops(code):
    """(first, last) line of each loop: a label and the last branch back to it."""
    labels = {line[:-1]: number for number, line in code if re.fullmatch(r"\$\w+:", line)}
    branches = [(number, re.search(r"bra(?:\.uni)?\s+(\$\w+);", line)) for number, line in code if "bra" in line]
    return [(labels[m[1]], number) for number, m in branches if m and labels[m[1]] < number]
