"""Traces of simulated launches in the Chrome trace event format, which Perfetto (ui.perfetto.dev) opens.

Time is the scheduler's: one step, the execution of one basic block by one group of warps, is shown as 1 µs. It orders
events; it says nothing about how long anything takes on a GPU.

* a process for each CTA of each launch; in it a track for each warp and one for each mbarrier;
* spans for waits, on the warp's track (a second track where lanes of one warp wait for different things at once), and
  for the phases of mbarriers, on the barrier's;
* instants for arrivals; short spans where asynchronous copies are issued, and on the barrier's track where they arrive;
* asynchronous slices for copies (from issue to arrival), bulk, cp.async and wgmma groups (from the first operation to
  the wait that retires the group), and tcgen05.mma up to their commit, in the process, with the warp as an argument;
* flows from the issue of a copy to its arrival in a phase, and from the phase to the waits that it ends.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np

from ..arrays import active_warps
from ..frontend.locations import source_of
from ..machine.tensor_memory import Commit
from ..names import readable
from .narrator import Narrator

STEP = 1000  # units of time in a step of the scheduler; an event takes _EVENT of them, and later ones follow
_EVENT = 4
_WARPGROUP = 4


class Trace:
    """Events of the launches of a simulation, written to ``path`` at its end."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.path.write_text("")  # an unusable path is an error before anything runs
        self.events: list[dict[str, Any]] = []
        self.end = 0  # of the latest wave
        self.processes, self.tracks, self.ids = itertools.count(1), itertools.count(1), itertools.count(1)

    def write(self) -> None:
        """Write what there is as JSON, in the order of time. Letters are not escaped: Perfetto shows the escapes."""
        time = "scheduler steps, 1 step = 1 µs; not the time of any GPU"
        events = sorted(self.events, key=lambda event: event.get("ts", -1))
        whole = {"traceEvents": events, "otherData": {"time": time, "by": "ptxsim"}}
        self.path.write_text(json.dumps(whole, ensure_ascii=False), encoding="utf-8")


class _Operations:
    """Asynchronous operations of one kind and warp (or warpgroup): the open group and the committed ones."""

    __slots__ = ("committed", "count", "name", "start")

    def __init__(self):
        self.start, self.name, self.count, self.committed = None, "", 0, []


class _Copy:
    """One issued copy, or batch of tcgen05.mma: where and when its flow starts, and its asynchronous slice."""

    __slots__ = ("flow", "name", "start", "warp")

    def __init__(self, name, warp, start, flow):
        self.name, self.warp, self.start, self.flow = name, warp, start, flow


class Tracer(Narrator):
    """Writes what the waves of launches do to a ``Trace``."""

    def __init__(self, trace: Trace):
        self.trace, self.launch, self.number = trace, None, -1

    def begin(self, machine):
        super().begin(machine)
        trace, wave = self.trace, self.wave
        if wave.launch is not self.launch:
            self.launch, self.number = wave.launch, self.number + 1
        kernel = readable(wave.program.k.name)
        self.origin, self.clock = trace.end, trace.end
        self.process = [next(trace.processes) for _ in range(wave.nctas)]
        self.tracks = {}  # warp -> [track, end of its last wait] of each of its tracks
        self.phases = {}  # flat index of an mbarrier -> [track, number of the phase, its start]
        self.completed = {}  # flat index of an mbarrier -> start of the phase that completed last
        self.operations = {}  # (kind, warp) -> _Operations
        self.copies = {}  # copy, or commit of a batch -> _Copy
        self.landing = None  # the _Copy that arrives
        self.batches = {}  # warp -> _Copy of its tcgen05.mma that are not committed
        self.places = {}  # PTX line -> arguments that name it
        for cta, pid in enumerate(self.process):
            self._meta("process_name", pid, name=f"launch {self.number} cta{wave.cta_name(cta)} {kernel}")
            self._meta("process_sort_index", pid, sort_index=pid)
        for warp in np.argsort(wave.cta_of, kind="stable").tolist():
            if wave.alive[warp].any():
                self._lane(warp)

    def end(self, machine, error):
        """The end of the wave, or of what was possible: waits and phases that are still open end here."""
        now = self._now()
        for wait in machine.scheduler.waits:
            for j in range(len(wait.w)):
                self._wait(wait, j, now, never=True)
        for index, (track, number, start) in self.phases.items():
            pid = self.process[index // self.shared.stride]
            self._span(f"phase {number}, not completed", pid, track, start, now, {})
        for (kind, warp), mine in self.operations.items():
            opened = [] if mine.start is None else [(mine.start, self._group_name(mine))]
            for start, name in [*mine.committed, *opened]:
                if start is not None:
                    self._slice(kind, f"{name}, not waited for", warp, start, now)
        self.trace.end = -(-now // STEP) * STEP + STEP
        self.copies, self.batches, self.landing = {}, {}, None
        super().end(machine, error)

    # ---- writing ----------------------------------------------------------------------------------
    def _now(self):
        self.clock = max(self.clock + _EVENT, self.origin + self.wave.step * STEP)
        return self.clock

    def _emit(self, phase, name, pid, tid, time, **more):
        self.trace.events.append(dict(ph=phase, name=name, pid=pid, tid=tid, ts=time / STEP, **more))

    def _meta(self, kind, pid, tid=None, **args):
        track = {} if tid is None else {"tid": tid}
        self.trace.events.append(dict(ph="M", name=kind, pid=pid, **track, args=args))

    def _span(self, name, pid, tid, start, end, args):
        self._emit("X", name, pid, tid, start, dur=(end - start) / STEP, args=args)

    def _slice(self, kind, name, warp, start, end):
        """An asynchronous slice of a warp. Its id is that of its process: Perfetto shows slices with ids of the whole
        trace together, outside of their processes. It shows no track for them: the warp is an argument."""
        place, common = self._track(warp), dict(cat=kind, id2={"local": f"0x{next(self.trace.ids):x}"})
        self._emit("b", name, *place, start, **common, args={"warp": int(self.wave.warp_in_cta[warp])})
        self._emit("e", name, *place, end, **common)

    def _flow(self, name, start, end):
        """An arrow between two spans, each given as (process, track, its start). The ends lie at their starts: Perfetto
        binds an end to what began last on its track, also if that is over. And it directs an arrow from the span that
        begins first."""
        common = dict(cat="flow", id=f"0x{next(self.trace.ids):x}")
        for phase, (pid, tid, begin), more in (("s", start, {}), ("f", end, {"bp": "e"})):
            self._emit(phase, name, pid, tid, begin + 1, **common, **more)

    def _lane(self, warp, number=0):
        """[track, end of its last wait] of a warp; further ones for lanes that wait at the same time."""
        mine = self.tracks.setdefault(warp, [])
        if number == len(mine):
            tid, pid = next(self.trace.tracks), self.process[self.wave.cta_of[warp]]
            own = int(self.wave.warp_in_cta[warp])
            self._meta("thread_name", pid, tid, name=f"warp {own}" + (", other lanes" if number else ""))
            self._meta("thread_sort_index", pid, tid, sort_index=10 * own + min(number, 9))
            mine.append([tid, 0])
        return mine[number]

    def _track(self, warp):
        """(process, track) of a warp."""
        return self.process[self.wave.cta_of[warp]], self._lane(warp)[0]

    def _place(self, line):
        if line not in self.places:
            place = {"PTX line": line, "PTX": self.wave.ptx_line(line)}
            source = source_of(self.wave.text, line).strip(" ()")
            self.places[line] = {**place, "source": source} if source else place
        return self.places[line]

    # ---- waits ------------------------------------------------------------------------------------
    def wait_begins(self, wait):
        wait.info["since"] = np.full(len(wait.w), self._now())

    def wait_ends(self, wait, selected, failed):
        now = self._now()
        for j in np.flatnonzero(selected).tolist():
            self._wait(wait, j, now, failed=failed)

    def _wait(self, wait, j, now, failed=False, never=False):
        warp, start = int(wait.w[j]), int(wait.info["since"][j])
        pid = self.process[self.wave.cta_of[warp]]
        number = 0
        while (lane := self._lane(warp, number))[1] > start:
            number += 1
        lane[1] = now
        name = self.wait_text(wait, j) + (", gives up" if failed else ", never ends" if never else "")
        self._span(name, pid, lane[0], start, now, self._place(wait.block.line))
        if wait.why == "mbarrier.try_wait" and not failed and not never:
            index = self.signal_of(wait, j)
            if index in self.completed:
                cta = self.process[index // self.shared.stride]
                phase = (cta, self.phases[index][0], self.completed[index])
                self._flow("phase → wait", phase, (pid, lane[0], start))

    # ---- mbarriers --------------------------------------------------------------------------------
    def mbarrier_initialised(self, w, index, mask):
        now = self._now()
        for i in np.unique(index[mask]).tolist():
            if i not in self.phases:
                pid, tid = self.process[i // self.shared.stride], next(self.trace.tracks)
                self._meta("thread_name", pid, tid, name=f"mbarrier 0x{i % self.shared.stride:x}")
                self._meta("thread_sort_index", pid, tid, sort_index=1000 + i % self.shared.stride)
                self.phases[i] = [tid, 0, now]
            else:  # used again: the new barrier's phases follow
                self.phases[i][1:] = 0, now
            self.completed.pop(i, None)

    def mbarrier_updated(self, index, arrivals, completed):
        pid = self.process[index // self.shared.stride]
        track, number, start = self.phases[index]
        now = self._now()
        if self.landing is not None:  # the arrow ends at a span of its own: the phase began before the copy
            self._span(f"{self.landing.name} arrives", pid, track, now - 2, now, {})
            self._flow(f"{self.landing.name} → phase", self.landing.flow, (pid, track, now - 2))
        if completed:
            self._span(f"phase {number}", pid, track, start, now, {})
            self.phases[index][1:] = number + 1, now
            self.completed[index] = start

    def note(self, w, text):
        """An instant on the track of each warp."""
        now = self._now()
        for j, warp in enumerate(w.tolist()):
            self._emit("i", text(j), *self._track(warp), now, s="t", args=self._place(self.wave.line))

    # ---- copies -----------------------------------------------------------------------------------
    def _issue(self, warp, name):
        """A short span where a copy is issued; the copy."""
        track, now = self._track(warp), self._now()
        self._span(name, *track, now, now + _EVENT, self._place(self.wave.line))
        return _Copy(name, warp, now, (*track, now))

    def copy_issued(self, copy):
        name = f"{copy.name} 0x{copy.address:x}"
        issued = self._issue(copy.warp, name)
        if copy.is_store:
            self._operation("bulk group", copy.warp, name)
        else:
            self.copies[copy] = issued

    def copy_lands(self, copy):
        self.landing = self.copies.get(copy)

    def copy_landed(self, copy):
        self.landing = None
        issued = self.copies.pop(copy, None)
        if issued is not None:
            kind = "tcgen05.mma" if isinstance(copy, Commit) else "copy"
            self._slice(kind, issued.name, issued.warp, issued.start, self._now())

    # ---- groups of asynchronous operations --------------------------------------------------------
    def _operation(self, kind, warp, name):
        mine = self.operations.setdefault((kind, int(warp)), _Operations())
        if mine.start is None:
            mine.start, mine.name, mine.count = self._now(), name, 0
        mine.count += 1

    @staticmethod
    def _group_name(mine):
        return mine.name if mine.count == 1 else f"{mine.count} × {mine.name}"

    def _commit(self, kind, w):
        for warp in w.tolist():
            mine = self.operations.get((kind, warp))
            if mine is not None:  # an empty group counts too
                mine.committed.append((mine.start, self._group_name(mine)))
                mine.start = None

    def _retire(self, kind, w, pending):
        now = self._now()
        for warp in w.tolist():
            mine = self.operations.get((kind, warp))
            while mine is not None and len(mine.committed) > pending:
                start, name = mine.committed.pop(0)
                if start is not None:
                    self._slice(kind, name, warp, start, now)

    def _of_group(self, kind, w):
        """The warps on whose tracks groups are shown: the first ones of warpgroups for wgmma."""
        return w[self.wave.warp_in_cta[w] % _WARPGROUP == 0] if kind == "wgmma" else w

    def cp_async(self, w, index, source, size, source_size, mask):
        for warp in w[mask.any(1)].tolist():
            self._operation("cp.async group", warp, f"cp.async of {size} bytes a lane")

    def wgmma(self, w, spec, operands):
        for warp in self._of_group("wgmma", w).tolist():
            self._operation("wgmma group", warp, f"wgmma m64n{spec.n}k{spec.k}")

    def group_committed(self, kind, w):
        super().group_committed(kind, w)
        self._commit(f"{kind} group", self._of_group(kind, w))

    def group_awaited(self, kind, w, pending, read):
        super().group_awaited(kind, w, pending, read)
        w = self._of_group(kind, w)
        if pending is None:
            self._commit(f"{kind} group", w)
        self._retire(f"{kind} group", w, pending or 0)

    # ---- tcgen05 ----------------------------------------------------------------------------------
    def tcgen05_mma(self, w, form, M):
        for warp in active_warps(w, M).tolist():
            if warp not in self.batches:
                self.batches[warp] = self._issue(warp, f"tcgen05.mma kind::{form.kind}")
        super().tcgen05_mma(w, form, M)

    def tcgen05_commit(self, commit):
        super().tcgen05_commit(commit)
        if commit.warp in self.batches:
            self.copies[commit] = self.batches.pop(commit.warp)
