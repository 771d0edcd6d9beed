"""The path of a warp through the machine code, found from what it did in the PTX.

The simulator ran the PTX; what is timed is SASS, where ptxas has moved, merged and copied code. A path is sought that
performs the warp's operations (waits, arrivals, copies, products) in their order. At a branch the outcome of the PTX
branch of the same line is tried first; what leads to a dead end is taken back. That a path is the right one is checked
afterwards: instructions of which ptxas makes exactly one each were executed as often as in the PTX, line by line.
"""

from __future__ import annotations

import bisect
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

from ..errors import SimError
from .assembler import INSTRUCTION
from .cubin import Code, Instruction
from .instructions import PRODUCTS
from .recorder import PtxBlock

OFF = "off"  # in a path: an operation that the warp's predicate, or another elected lane, switched off
_MOST_STEPS = 5_000_000
# How many instructions the line of a barrier's instruction may be from that of its PTX: the line of its address or
# predicate.
_DISTANCE = 5
_BOTH = 2  # beside the outcome of a branch: other lanes went the other way
_END = -1  # in the place of an instruction: the warp has ended
_REACH = 12  # operations that ptxas moves over a branch, at most

_SYNCS = {"PHASECHK": "try", "EXCH": "init", "CAS": "init", "ARRIVE": "mbar"}
_OPERATIONS = {
    "HGMMA": "wgmma", "QGMMA": "wgmma", "IGMMA": "wgmma", "BAR": "bar", "UTMALDG": "tma", "UBLKCP": "tma",
    "UTMASTG": "store", "UTMAREDG": "store", "UBLKRED": "store", "LDGSTS": "cp", "ARRIVES": "cp_arrive",
    "UCGABAR_ARV": "cluster", "UCGABAR_WAIT": "cluster",
}  # fmt: skip
# Of waits for groups (wgmma, bulk, cp.async) the SASS says all, and ptxas adds some (C7512): they are not sought. Nor
# is cp.async, whose instructions ptxas reorders: each takes its line's next.
_SOUGHT = {"try", "init", "mbar", "wgmma", "bar", "tma", "store", "cp_arrive", "cluster"}
# PTX instructions of which ptxas makes one SASS instruction each: what their PTX line and the SASS opcode look like.
ONE_TO_ONE = {
    r"\bex2\.approx": ("MUFU", "EX2"),
    r"\bmma\.sync\.\S*\.m16n8k16\S*\.f32\.b?f16": ("HMMA", None),
    r"\bldmatrix\.": ("LDSM", None),
    r"\bstmatrix\.": ("STSM", None),
    r"\bwgmma\.mma_async": ("HGMMA|QGMMA|IGMMA", None),
    r"\bred\.global|\bred\.relaxed\S*\.global": ("RED|REDG", None),
}


class PathNotFound(SimError):
    """No way through the machine code performs what the warp did."""


def operation_kind(i: Instruction) -> str | None:
    """Which kind of a trace's operations an instruction performs."""
    if i.opcode == "SYNCS":
        if "A0T1" in i.modifiers:  # the first half of cp.async.mbarrier.arrive without .noinc
            return None
        return _SYNCS.get(next((m for m in i.modifiers if m in _SYNCS), ""))
    if i.opcode == "UBLKCP" and i.modifiers[:2] == ["G", "S"]:
        return "store"
    if i.opcode == "STAS" or (i.opcode.startswith("BAR") and i.opcode != "BAR"):
        return None
    return _OPERATIONS.get(i.opcode)


def branch_target(code: Code, i: Instruction) -> int:
    """Index of the instruction that a branch or call names, -1 if there is none."""
    if i.opcode in ("BRA", "UBRA", "CALL") and (label := re.search(r"`\((\.?[\w$.]+)\)", i.text)):
        return code.labels.get(label[1], -1)
    return -1


def is_branch(i: Instruction) -> bool:
    """Whether the instruction jumps; a call of a place in the kernel itself, which ptxas uses for loops' ends, too."""
    return i.opcode in ("BRA", "UBRA") or (i.opcode == "CALL" and "`(.L_x" in i.text)


def is_conditional(i: Instruction) -> bool:
    """Whether a branch may fall through."""
    return i.predicate not in (None, "@PT") or not i.operands[0].startswith("`")


def converged(trace: list[Any]) -> list[Any]:
    """The trace as if lanes that parted had met again at once: the simulator may let some of them run ahead. What both
    parts of a warp executed at the end of such a stretch becomes one."""
    units: list[list[Any]] = []  # a block with the operations that follow it
    for entry in trace:
        if _is_block(entry):
            units.append([entry])
        elif units:
            units[-1].append(entry)
    out: list[Any] = []
    n = 0
    while n < len(units):
        if isinstance(units[n][0], int):
            out += units[n]
            n += 1
            continue
        end = n
        while end < len(units) and not isinstance(units[end][0], int):
            end += 1
        out += _joined(units[n:end])
        n = end
    return out


def _is_block(entry):
    return isinstance(entry, int) or isinstance(entry[0], int)


def _joined(units):
    """A stretch in which two parts of a warp went apart."""
    parts = defaultdict(list)
    for unit in units:
        parts[unit[0][1]].append(unit)
    if len(parts) != 2 or sum(parts) != 0xFFFFFFFF:
        return [entry for unit in units for entry in unit]
    a, b = parts.values()
    k = 0
    while k < min(len(a), len(b)) and a[-1 - k][0][0] == b[-1 - k][0][0]:
        k += 1
    out = [entry for unit in a[: len(a) - k] + b[: len(b) - k] for entry in unit]
    for u, v in zip(a[len(a) - k :], b[len(b) - k :], strict=True):
        out.append(u[0][0])
        if len(u) == len(v):
            pairs = zip(u[1:], v[1:], strict=True)
            out += [(*x[:-1], x[-1] + y[-1]) if x[0] == "mbar" else x for x, y in pairs]
        else:
            out += u[1:] + v[1:]
    return out


@dataclass
class _Place:
    """What a place of a path knows of the way to it: how many outcomes of each line are used, where calls return to,
    the open regions (BSSY) in which lanes may part, and of lanes that have parted where the others begin and in which
    region."""

    used: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    calls: list[int] = field(default_factory=list)
    regions: int = 0
    parted: list[tuple[int, int]] = field(default_factory=list)

    def copy(self) -> _Place:
        return _Place(defaultdict(int, self.used), list(self.calls), self.regions, list(self.parted))


@dataclass
class _Choice:
    """A branch where the other way can still be tried."""

    other: int
    operation: int
    length: int
    place: _Place


@dataclass
class _Trace:
    """What a warp did: operations with their places, the outcomes of its branches by line, and how often it executed
    what ptxas makes one instruction each of, by line."""

    operations: list[tuple[int, Any]]
    places: list[int]
    outcomes: dict[int, list[tuple[int, int]]] = field(default_factory=lambda: defaultdict(list))
    anchors: Counter = field(default_factory=Counter)


class PathFinder:
    """Paths of warps through one kernel."""

    def __init__(self, code: Code, blocks: list[PtxBlock], ptx: str):
        self.code, self.instructions, self.blocks = code, code.instructions, blocks
        self.kinds = [operation_kind(i) for i in self.instructions]
        self.targets = [branch_target(code, i) for i in self.instructions]
        self.branches = {b.last: n for n, b in enumerate(blocks) if b.term in ("cbr", "cret")}
        self.polarities: dict[int, bool | None] = {}
        text = self.text = ptx.split("\n")
        used = {line for block in blocks for line in block.lines}
        if polls := [n for n, line in enumerate(text, 1) if "mbarrier.test_wait" in line and n in used]:
            raise PathNotFound(
                f"PTX line {polls[0]} polls an mbarrier (mbarrier.test_wait): how often depends on time, which the "
                "simulator does not know"
            )
        # of each line, how many instructions there are up to it: lines of .loc and comments do not count
        self.ranks = [0, *accumulate(INSTRUCTION.match(line.strip()) is not None for line in text)]
        self.one_to_one = []
        for pattern, (opcodes, modifier) in ONE_TO_ONE.items():
            lines = {n for n, line in enumerate(text, 1) if re.search(pattern, line)}
            if lines:
                self.one_to_one.append((lines, re.compile(opcodes), modifier))
        # Of those a path may not have more, nor fewer in the end; wgmma is sought anyway, and has another line.
        self.anchors = [self._anchor(i) if i.predicate is None else 0 for i in self.instructions]
        self.optional = [self._anchor(i) if i.predicate is not None else 0 for i in self.instructions]
        lines = {*self.anchors, *self.optional} - {0}
        self.anchored = [[line for line in block.lines if line in lines] for block in blocks]

    def find(self, trace: list[Any]) -> list[tuple[int, Any]]:
        """(index of the SASS instruction, operation that it performs, ``OFF`` or None) along a warp's path.
        PathNotFound if there is none, or none on which what ptxas makes one instruction each of is executed as often
        as in the PTX."""
        trace = converged(trace)
        path = self._walk(self._read(trace))
        self._check(trace, path)
        return self._with_copies(trace, path)

    def _with_copies(self, trace, path):
        """The path with the bytes of each cp.async."""
        copies = defaultdict(list)
        for entry in reversed(trace):
            if not _is_block(entry) and entry[0] == "cp":
                copies[entry[1]].append(entry)
        for at, (n, _) in enumerate(path):
            if self.kinds[n] == "cp":
                left = copies[self.instructions[n].line]
                path[at] = n, left.pop() if left else OFF
        if left := [line for line, entries in copies.items() if entries]:
            raise PathNotFound(f"the path of a warp lacks cp.async of PTX line {left[0]}: it is not the warp's path")
        return path

    def _read(self, trace):
        operations = [(n, e) for n, e in enumerate(trace) if not _is_block(e) and e[0] in _SOUGHT]
        read = _Trace(operations, [place for place, _ in operations])
        for number, times in Counter(e if isinstance(e, int) else e[0] for e in trace if _is_block(e)).items():
            for line in self.anchored[number]:
                read.anchors[line] += times
        steps = [(n, e if isinstance(e, int) else e[0]) for n, e in enumerate(trace) if _is_block(e)]
        parted = self._parted(trace)
        for (place, number), (_, following) in pairwise(steps):
            block = self.blocks[number]
            following, other = parted.get(place, (following, None))
            if block.term == "cbr":
                taken = following == block.target and block.target != block.fall
                both = other in (block.target, block.fall) and other != following
                read.outcomes[block.last].append((place, int(taken) | _BOTH * both))
            elif block.term == "cret":
                read.outcomes[block.last].append((place, False))
        if steps and (block := self.blocks[steps[-1][1]]).term == "cret":
            read.outcomes[block.last].append((steps[-1][0], True))
        return read

    def _parted(self, trace):
        """Where the lanes of a warp parted, one part behind the other in the trace: place of a block -> (what follows
        it, what follows it for the other lanes or None). Of the first part's last block it is what both come to."""
        found = {}
        steps = [(n, *((e, None) if isinstance(e, int) else e)) for n, e in enumerate(trace) if _is_block(e)]
        k = 1
        while k < len(steps):
            end = k
            while end < len(steps) and steps[end][2] is not None:
                end += 1
            masks = [mask for _, _, mask in steps[k:end]]
            changes = [n for n in range(1, len(masks)) if masks[n] != masks[n - 1]]
            if len(changes) == 1 and not masks[0] & masks[-1]:
                first, second = steps[k][1], steps[k + changes[0]][1]
                found[steps[k - 1][0]] = first, second
                if end < len(steps):
                    found[steps[k + changes[0] - 1][0]] = steps[end][1], None
            k = end + 1
        return found

    def _walk(self, trace: _Trace):
        operations = trace.operations
        path: list[tuple[int, Any]] = []
        choices: list[_Choice] = []
        place = _Place()
        failed: set[tuple[int, int, int]] = set()
        left, passed = Counter(trace.anchors), 0  # of the one-to-one instructions, by line; and how many are done
        furthest, wrong = (-1, 0), 0
        n = p = 0
        for _ in range(_MOST_STEPS):
            following = None
            if n == _END:
                if not (seldom := self._missing(left, path)):
                    return path
                wrong, n = seldom, path[-1][0]
            elif n < len(self.instructions):
                following = self._step(n, p, trace, path, place, choices)
                if following is not None and (line := self.anchors[n]):
                    left[line] -= 1
                    passed += 1
                    if left[line] < 0:
                        following, wrong = None, line
            if following is not None:
                n, p = following
                continue
            furthest = max(furthest, (p, n))
            choice = None
            while choices and choice is None:
                choice = choices.pop()
                for at, _ in path[choice.length :]:
                    if line := self.anchors[at]:
                        left[line] += 1
                        passed -= 1
                del path[choice.length :]
                if (choice.other, choice.operation, passed) in failed:
                    choice = None
            if choice is None:
                break
            failed.add((choice.other, choice.operation, passed))
            place = choice.place
            n, p = choice.other, choice.operation
        p, n = furthest
        if wrong and p == len(operations):
            raise PathNotFound(
                f"no path of a warp executes what PTX line {wrong} becomes {trace.anchors[wrong]} times, as the PTX "
                f"did: {self.text[wrong - 1].strip()}"
            )
        at = self.instructions[min(n, len(self.instructions) - 1)].source[:80]
        wanted = operations[p][1][:2] if p < len(operations) else "its end"
        raise PathNotFound(
            f"no path of a warp through the machine code: at {at} it should come to {wanted}, operation {p} of "
            f"{len(operations)}"
        )

    def _step(self, n, p, trace, path, place, choices):
        """Execute instruction n with p operations done: the next (n, p), (``_END``, p) at the end, None for a dead
        end."""
        i, kind = self.instructions[n], self.kinds[n]
        operations = trace.operations
        if kind in _SOUGHT:
            if p < len(operations) and self._performs(i, kind, operations[p][1]):
                path.append((n, operations[p][1]))
                return n + 1, p + 1
            # under a predicate, or where another lane than this warp's is elected
            if (i.predicate is not None and kind != "wgmma") or kind in ("tma", "store", "init"):
                path.append((n, OFF))
                return n + 1, p
            return None
        path.append((n, None))
        if i.opcode == "EXIT" or (i.opcode == "RET" and not place.calls):
            if i.predicate is None and place.parted:
                return place.parted.pop()[0], p
            if i.predicate is None:
                return (_END, p) if p == len(operations) else None
            if p < len(operations):
                return n + 1, p
            ends = self._outcome(i.line, trace, p, place.used)
            way, other = (_END, n + 1) if ends or ends is None else (n + 1, _END)
            choices.append(_Choice(other, p, len(path), place.copy()))
            return way, p
        if i.opcode == "BSSY":
            place.regions += 1
        if i.opcode == "BSYNC":
            if place.parted and place.parted[-1][1] == place.regions:
                return place.parted.pop()[0], p
            place.regions = max(place.regions - 1, 0)
        target = self.targets[n]
        if i.opcode == "CALL" and not is_branch(i):
            place.calls.append(n + 1)
            return target, p
        if i.opcode == "RET":
            return place.calls.pop(), p
        if not is_branch(i) or target < 0:
            return n + 1, p
        if not is_conditional(i):
            return (target, p) if target != n else None
        taken = self._expected(n, trace, p, place.used)
        way, other = (target, n + 1) if taken & 1 else (n + 1, target)
        choices.append(_Choice(other, p, len(path), place.copy()))
        if taken & _BOTH:
            place.parted.append((other, place.regions))
        return way, p

    def _performs(self, i, kind, operation):
        if operation[0] != kind:
            return False
        if kind == "try" and "TRYWAIT" not in i.modifiers:  # the poll behind a TRYWAIT that timed out
            return False
        if kind in ("try", "mbar", "init"):
            return abs(self.ranks[operation[1]] - self.ranks[i.line]) <= _DISTANCE
        if kind == "bar":
            return operation[2] == (i.modifiers[0] != "ARV")
        if kind == "cluster":
            return operation[2] == i.opcode.endswith("WAIT")
        return True

    def _expected(self, n, trace: _Trace, p, used):
        """Whether the trace has a branch taken at this place of the path, by the first lanes if with ``_BOTH``."""
        line = self.instructions[n].line
        if line not in self.branches or (polarity := self._polarity(n)) is None:
            return False
        outcome = self._outcome(line, trace, p, used)
        if outcome is None:
            return False
        return int((outcome & 1) == polarity) | (outcome & _BOTH)

    def _outcome(self, line, trace: _Trace, p, used):
        """What the conditional branch or exit of a PTX line did next: 1 taken, 0 not, ``_BOTH`` beside if other lanes
        went the other way; None if it does nothing more."""
        if line not in trace.outcomes:
            return None
        outcomes, places = trace.outcomes[line], trace.places
        k = used[line]
        if p:
            k = max(k, bisect.bisect_left(outcomes, (places[p - 1], False)))
        if k >= len(outcomes):
            return None
        # the next outcome, also a little beyond the next operation, which ptxas may have moved over the branch
        if p + _REACH < len(places) and outcomes[k][0] >= places[p + _REACH]:
            return None
        used[line] = k + 1
        return outcomes[k][1]

    def _missing(self, left, path):
        """A line that a path executed too seldom, also if all that is predicated was on; 0 if there is none."""
        if not any(left.values()):
            return 0
        perhaps = Counter(self.optional[n] for n, _ in path)
        return next((line for line, times in left.items() if times > perhaps[line]), 0)

    def _anchor(self, i):
        """The line of an instruction of which there is one for each in the PTX; 0 for others."""
        if i.opcode in PRODUCTS:
            return 0
        named = (x for x in self.one_to_one if i.line in x[0] and x[1].fullmatch(i.opcode))
        return i.line if any(modifier is None or modifier in i.modifiers for _, _, modifier in named) else 0

    # ---- which way of a SASS branch is which of the PTX branch ------------------------------------------------------
    def _polarity(self, n):
        """True if the SASS branch is taken where the PTX branch is, False for the opposite, None: not known."""
        if n not in self.polarities:
            number = self.branches[self.instructions[n].line]
            block = self.blocks[number]
            taken, falls = self._reached(self.targets[n], n), self._reached(n + 1, n)
            ptx_taken, ptx_falls = self._ptx_reached(block.target, number), self._ptx_reached(block.fall, number)
            lines_taken = {self.instructions[x].line for x in taken - falls}
            lines_falls = {self.instructions[x].line for x in falls - taken}
            only_taken, only_falls = ptx_taken - ptx_falls, ptx_falls - ptx_taken
            straight = len(lines_taken & only_taken) + len(lines_falls & only_falls)
            crossed = len(lines_taken & only_falls) + len(lines_falls & only_taken)
            self.polarities[n] = None if straight == crossed else straight > crossed
        return self.polarities[n]

    def _reached(self, start, stop):
        """Instructions that can be reached from ``start`` without passing ``stop``."""
        seen: set[int] = set()
        stack = [start]
        while stack:
            n = stack.pop()
            while 0 <= n < len(self.instructions) and n not in seen and n != stop:
                seen.add(n)
                i = self.instructions[n]
                if is_branch(i) and self.targets[n] >= 0:
                    stack.append(self.targets[n])
                    if not is_conditional(i):
                        break
                elif i.opcode in ("EXIT", "RET") and i.predicate is None:
                    break
                n += 1
        return seen

    def _ptx_reached(self, start, stop):
        """PTX lines of the blocks that can be reached from ``start`` without passing ``stop``."""
        seen: set[int] = set()
        stack = [start]
        while stack:
            n = stack.pop()
            if n is None or n in seen or n == stop:
                continue
            seen.add(n)
            block = self.blocks[n]
            if block.term in ("jmp", "cbr"):
                stack.append(block.target)
            if block.term not in ("jmp", "ret", "trap"):
                stack.append(block.fall)
        return {line for n in seen for line in self.blocks[n].lines}

    # ---- the check ------------------------------------------------------------------------------------------------
    def _check(self, trace, path):
        blocks = Counter(e if isinstance(e, int) else e[0] for e in trace if _is_block(e))
        executed = Counter(n for n, _ in path)
        for lines, opcodes, modifier in self.one_to_one:
            wanted = Counter()
            for number, times in blocks.items():
                for line in self.blocks[number].lines:
                    if line in lines:
                        wanted[line] += times
            found, perhaps = Counter(), Counter()  # without and with a predicate, which may have switched it off
            for n, times in executed.items():
                i = self.instructions[n]
                if opcodes.fullmatch(i.opcode) and (modifier is None or modifier in i.modifiers):
                    (found if i.predicate is None else perhaps)[i.line] += times
            if opcodes.pattern.startswith("HGMMA"):  # it has the line of its descriptor
                wanted, found = Counter({0: wanted.total()}), Counter({0: found.total()})
            wrong = [x for x in wanted | found if not found[x] <= wanted[x] <= found[x] + perhaps[x]]
            if wrong:
                line = min(wrong)
                raise PathNotFound(
                    f"the path of a warp executes {opcodes.pattern} of PTX line {line} {found[line]} times, the PTX "
                    f"{wanted[line]} times: it is not the warp's path"
                )
