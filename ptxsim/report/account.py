"""A short account of a failure: which role is where and waits on what, and what it did last.

A role is a set of warps of a CTA, named by warpgroup where it is whole ones, that are in the same state; CTAs that look
the same are told once. Of a deadlock all live warps are told, of any other failure those that the error names.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from ..errors import Deadlock
from ..frontend.locations import source_of

EVENTS = 8  # of each role
_ROLES = 8
_WARP = re.compile(r"(cta\(\d+,\d+,\d+\))\.w(\d+)")


@dataclass(frozen=True)
class Role:
    """Some warps in one state: ``name`` and ``state`` say who and what, ``line`` is the PTX line where they are,
    ``text`` that line, ``source`` `` (file.py:12)`` or empty; ``events`` are the latest ones of the first warp."""

    name: str
    state: str
    line: int
    text: str
    source: str
    events: tuple[str, ...]


@dataclass(frozen=True)
class Account:
    """``roles`` of a failure; ``left_out`` is how many more there are."""

    roles: tuple[Role, ...]
    left_out: int = 0

    def __str__(self) -> str:
        parts = []
        for role in self.roles:
            parts.append(f"{role.name}: {role.state}\n    at PTX line {role.line}: {role.text}{role.source}")
            parts += [f"    {'last: ' if i == 0 else '      '}{event}" for i, event in enumerate(role.events)]
        if self.left_out:
            parts.append(f"and {self.left_out} roles more")
        return "\n".join(parts)


def account(history, error) -> Account:
    """The account of an error that ended the run of the wave that a ``History`` observes."""
    wave = history.wave
    states = _states(history) if isinstance(error, Deadlock) else _sides(wave, error)
    roles = []
    for (line, state), warps in _grouped(states):
        for names, some in _by_cta(wave, warps):
            ptx = " ".join(wave.ptx_line(line).split())
            roles.append((names, state, line, ptx, _source(wave, line), some[0]))
    told = [Role(*role, _timeline(history, first)) for *role, first in roles[:_ROLES]]
    return Account(tuple(told), len(roles) - len(told))


def _sides(wave, error):
    """(warp, PTX line, what it did) of the warps that an error names, as its own and as the other side of a race; if
    it names none, of one that ran."""
    line = error.line or wave.line
    mine = _warps_in(wave, error.where or "")
    found = [(warp, line, "is at the fault") for warp in mine or list(_running(wave)[:1])]
    if getattr(error, "other", None):
        line, _, who = error.other
        found += [(warp, line, "made the earlier access") for warp in _warps_in(wave, who)]
    return found


def _warps_in(wave, text):
    """The warps of the wave that a text names."""
    names = {(cta, int(warp)) for cta, warp in _WARP.findall(text)}
    return [w for w in range(wave.nwarps)
            if (f"cta{wave.cta_name(wave.cta_of[w])}", int(wave.warp_in_cta[w])) in names]  # fmt: skip


def _running(wave):
    return () if wave.running is None else wave.running


def _states(history):
    """(warp, PTX line, what it does) of every live warp, of parts of a warp each."""
    found, wave, scheduler = [], history.wave, history.machine.scheduler
    for wait in scheduler.waits:
        for j, warp in enumerate(wait.w.tolist()):
            more = history.state_text(wait, j)
            own = f" of cta{wave.cta_name(wave.cta_of[warp])}"
            state = _part(wait.M, j) + history.wait_text(wait, j) + (f": {more.replace(own, '')}" if more else "")
            found.append((warp, wait.block.line, state))
    seen = {warp for warp, *_ in found} | {int(warp) for g in scheduler.groups for warp in g.w}
    found += [(warp, wave.line, "runs") for warp in map(int, _running(wave))
              if warp not in seen and wave.alive[warp].any()]  # fmt: skip
    for g in scheduler.groups:
        for j, warp in enumerate(g.w.tolist()):
            state = "waits for the other lanes of the warp" if g.held else "runs"
            found.append((warp, wave.program.blocks[g.blk].line, _part(g.M, j) + state))
    return found


def _part(M, j):
    """Lanes of a part of a warp, as an opening of what is said about it."""
    if M is None or M[j].all():
        return ""
    return f"(lanes 0x{sum(1 << int(lane) for lane in np.flatnonzero(M[j])):08x}) "


def _grouped(states):
    """((line, state), sorted warps) of equal states, in the order of their first warps."""
    warps = {}
    for warp, line, state in sorted(states):
        mine = warps.setdefault((line, state), [])
        if warp not in mine[-1:]:
            mine.append(warp)
    return warps.items()


def _by_cta(wave, warps):
    """(name, warps) of the CTAs of which the same warps are in a set, told together."""
    of_cta = {}
    for warp in warps:
        of_cta.setdefault(int(wave.cta_of[warp]), []).append(warp)
    alike = {}
    for cta, mine in of_cta.items():
        alike.setdefault(tuple(wave.warp_in_cta[mine].tolist()), []).append((cta, mine))
    for numbers, found in alike.items():
        others = len(found) - 1
        more = f" and {others} other CTA{'s' if others > 1 else ''}" if others else ""
        name = f"{role_name(numbers)} of cta{wave.cta_name(found[0][0])}{more}"
        yield name, found[0][1]


def _ranges(numbers):
    """Sorted numbers as text: 0-3, 5."""
    runs = [[n for _, n in run] for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def role_name(numbers) -> str:
    """Name of a set of warps of a CTA, given by their sorted numbers."""
    warps = f"warp{'s' if len(numbers) > 1 else ''} {_ranges(numbers)}"
    groups = sorted({n // 4 for n in numbers})
    if len(numbers) != 4 * len(groups):
        return warps
    return f"warpgroup{'s' if len(groups) > 1 else ''} {_ranges(groups)} ({warps})"


def _source(wave, line):
    """`` (file.py:12)`` of a PTX line, relative to the working directory; empty without line information."""
    return source_of(wave.text, line).replace(os.path.join(os.getcwd(), ""), "")


def _timeline(history, warp):
    lines = []
    for event in history.latest.of(warp)[-EVENTS:]:
        j = event.row(warp)
        until = "" if event.until is None else (
            f", until step {event.until[j]}" if event.until[j] >= 0 else ", and has not gone on")  # fmt: skip
        place = f"PTX line {event.line}{_source(history.wave, event.line)}"
        lines.append(f"step {event.since[j]}, {place}: {event.text(j)}{until}")
    return tuple(lines)
