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

from .locations import source_of
from .names import readable
from .observed import ObservedMachine
from .warps import full_width

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


class TracedMachine(ObservedMachine):
    """``ObservedMachine`` that writes to a ``Trace``. Call ``begin`` before ``run``."""

    def begin(self, trace: Trace, name: str, number: int) -> None:
        """``name`` and ``number`` are those of the launch."""
        self.trace, self.origin, self.clock = trace, trace.end, trace.end
        self.process = [next(trace.processes) for _ in range(self.nctas)]
        self.tracks = {}  # warp -> [track, end of its last wait] of each of its tracks
        self.phases = {}  # flat index of an mbarrier -> [track, number of the phase, its start]
        self.completed = {}  # flat index of an mbarrier -> start of the phase that completed last
        self.operations = {}  # (kind, warp) -> _Operations
        self.issuing = self.landing = None  # names of the copies being issued; the copy that arrives
        self.batches = {}  # warp -> _Copy of its tcgen05.mma that are not committed
        self.committing = False  # inside of tcgen05.commit
        self.places = {}  # PTX line -> arguments that name it
        for cta, pid in enumerate(self.process):
            self._meta("process_name", pid, name=f"launch {number} cta{self.cta_name(cta)} {readable(name)}")
            self._meta("process_sort_index", pid, sort_index=pid)
        for warp in np.argsort(self.cta_of, kind="stable").tolist():
            if self.alive[warp].any():
                self._lane(warp)

    def run(self):
        try:
            super().run()
        finally:
            self._close()

    def _close(self):
        """The end of the wave, or of what was possible: waits and phases that are still open end here."""
        now = self._now()
        for b in self.blocked:
            for j in range(len(b.w)):
                self._wait(b, j, now, never=True)
        for index, (track, number, start) in self.phases.items():
            pid = self.process[index // self.smem_stride]
            self._span(f"phase {number}, not completed", pid, track, start, now, {})
        for (kind, warp), mine in self.operations.items():
            opened = [] if mine.start is None else [(mine.start, self._group_name(mine))]
            for start, name in [*mine.committed, *opened]:
                if start is not None:
                    self._slice(kind, f"{name}, not waited for", warp, start, now)
        self.trace.end = -(-now // STEP) * STEP + STEP

    # ---- writing ----------------------------------------------------------------------------------
    def _now(self):
        self.clock = max(self.clock + _EVENT, self.origin + self.steps * STEP)
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
        self._emit("b", name, *place, start, **common, args={"warp": int(self.warp_in_cta[warp])})
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
            tid, pid = next(self.trace.tracks), self.process[self.cta_of[warp]]
            own = int(self.warp_in_cta[warp])
            self._meta("thread_name", pid, tid, name=f"warp {own}" + (", other lanes" if number else ""))
            self._meta("thread_sort_index", pid, tid, sort_index=10 * own + min(number, 9))
            mine.append([tid, 0])
        return mine[number]

    def _track(self, warp):
        """(process, track) of a warp."""
        return self.process[self.cta_of[warp]], self._lane(warp)[0]

    def _place(self, line):
        if line not in self.places:
            place = {"PTX line": line, "PTX": self.ptx_line(line)}
            source = source_of(self.prog.k.module.text, line).strip(" ()")
            self.places[line] = {**place, "source": source} if source else place
        return self.places[line]

    def _instant(self, w, name):
        """An instant on the track of each warp; ``name`` takes the warp's row."""
        now = self._now()
        for j, warp in enumerate(w.tolist()):
            self._emit("i", name(j), *self._track(warp), now, s="t", args=self._place(self.line))

    # ---- waits ------------------------------------------------------------------------------------
    def block_or_go(self, b):
        b.info["since"] = np.full(len(b.w), self._now())
        super().block_or_go(b)

    def _resume(self, b, select, failed=False):
        now = self._now()
        for j in np.flatnonzero(select).tolist():
            self._wait(b, j, now, failed=failed)
        super()._resume(b, select, failed)

    def _wait(self, b, j, now, failed=False, never=False):
        warp, start = int(b.w[j]), int(b.info["since"][j])
        pid = self.process[self.cta_of[warp]]
        number = 0
        while (lane := self._lane(warp, number))[1] > start:
            number += 1
        lane[1] = now
        name = self.wait_text(b, j) + (", gives up" if failed else ", never ends" if never else "")
        self._span(name, pid, lane[0], start, now, self._place(self.prog.blocks[b.blk].line))
        if b.why == "mbarrier.try_wait" and not failed and not never:
            index = self.signal_of(b, j)
            if index in self.completed:
                cta = self.process[index // self.smem_stride]
                phase = (cta, self.phases[index][0], self.completed[index])
                self._flow("phase → wait", phase, (pid, lane[0], start))

    # ---- mbarriers --------------------------------------------------------------------------------
    def mbar_init(self, w, address, count, M):
        super().mbar_init(w, address, count, M)
        index, mask = self._barrier_lanes(w, address, M)
        now = self._now()
        for i in np.unique(index[mask]).tolist():
            if i not in self.phases:
                pid, tid = self.process[i // self.smem_stride], next(self.trace.tracks)
                self._meta("thread_name", pid, tid, name=f"mbarrier 0x{i % self.smem_stride:x}")
                self._meta("thread_sort_index", pid, tid, sort_index=1000 + i % self.smem_stride)
                self.phases[i] = [tid, 0, now]
            else:  # used again: the new barrier's phases follow
                self.phases[i][1:] = 0, now
            self.completed.pop(i, None)

    def mbar_update(self, index, arrive=0, tx=0, drop=0):
        index, before = int(index), self.progress
        old = super().mbar_update(index, arrive, tx, drop)
        pid = self.process[index // self.smem_stride]
        track, number, start = self.phases[index]
        now = self._now()
        if self.landing is not None:  # the arrow ends at a span of its own: the phase began before the copy
            self._span(f"{self.landing.name} arrives", pid, track, now - 2, now, {})
            self._flow(f"{self.landing.name} → phase", self.landing.flow, (pid, track, now - 2))
        if self.progress != before:
            self._span(f"phase {number}", pid, track, start, now, {})
            self.phases[index][1:] = number + 1, now
            self.completed[index] = start
        return old

    def note(self, w, text):
        super().note(w, text)
        if self.issuing is None:
            self._instant(w, text)

    # ---- copies -----------------------------------------------------------------------------------
    def _issue(self, warp, name):
        """A short span where a copy is issued; the copy."""
        track, now = self._track(int(warp)), self._now()
        self._span(name, *track, now, now + _EVENT, self._place(self.line))
        return _Copy(name, int(warp), now, (*track, now))

    def _copies(self, w, M, name, address):
        """Names of the copies that one instruction issues, thread by thread."""
        address = full_width(address, len(w))
        return (f"{name} 0x{int(address[j, lane]):x}" for j, lane in self.active_threads(w, M))

    def _issuing(self, names, instruction, *args):
        self.issuing = names
        try:
            instruction(*args)
        finally:
            self.issuing = None

    def tensor_load(self, w, destination, address, coordinates, barrier, multicast, M, pair):
        self._issuing(self._copies(w, M, "TMA load", destination), super().tensor_load, w, destination, address,
                      coordinates, barrier, multicast, M, pair)  # fmt: skip

    def bulk_load(self, w, destination, source, size, barrier, multicast, M):
        self._issuing(self._copies(w, M, "bulk load", destination), super().bulk_load, w, destination, source, size,
                      barrier, multicast, M)  # fmt: skip

    def bulk_shared(self, w, destination, source, size, barrier, M):
        self._issuing(self._copies(w, M, "bulk copy", destination), super().bulk_shared, w, destination, source, size,
                      barrier, M)  # fmt: skip

    def tensor_store(self, w, address, coordinates, source, reduction, M):
        self._issuing(self._copies(w, M, "TMA store", source), super().tensor_store, w, address, coordinates, source,
                      reduction, M)  # fmt: skip

    def bulk_store(self, w, destination, source, size, reduction, M):
        self._issuing(self._copies(w, M, "bulk store", source), super().bulk_store, w, destination, source, size,
                      reduction, M)  # fmt: skip

    def defer(self, warp, action):
        super().defer(warp, action if self.issuing is None else self._arriving(action, self._issue(
            warp, next(self.issuing))))  # fmt: skip

    def _arriving(self, action, copy, kind="copy"):
        """The action, with its end shown as that of the copy."""

        def perform():
            self.landing = copy
            try:
                action()
            finally:
                self.landing = None
            self._slice(kind, copy.name, copy.warp, copy.start, self._now())

        return perform

    def bulk_add(self, warp, lane, action):
        name = next(self.issuing)
        self._issue(warp, name)
        self._operation("bulk group", warp, name)
        super().bulk_add(warp, lane, action)

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

    def _retire(self, kind, w, keep):
        now = self._now()
        for warp in w.tolist():
            mine = self.operations.get((kind, warp))
            while mine is not None and len(mine.committed) > keep:
                start, name = mine.committed.pop(0)
                if start is not None:
                    self._slice(kind, name, warp, start, now)

    def cp_async(self, w, destination, source, size, source_size, M):
        for warp in (w if M is None else w[M.any(1)]).tolist():
            self._operation("cp.async group", warp, f"cp.async of {size} bytes a lane")
        super().cp_async(w, destination, source, size, source_size, M)

    def h_cp_async_commit(self, i, block, group):
        super().h_cp_async_commit(i, block, group)
        self._commit("cp.async group", group.w)

    def h_cp_async_wait(self, i, block, group):
        super().h_cp_async_wait(i, block, group)
        if i.parts[2] == "wait_all":
            self._commit("cp.async group", group.w)
        self._retire("cp.async group", group.w, 0 if i.parts[2] == "wait_all" else int(i.args[0], 0))

    def h_bulk_commit(self, i, block, group):
        super().h_bulk_commit(i, block, group)
        self._commit("bulk group", group.w)

    def h_bulk_wait(self, i, block, group):
        super().h_bulk_wait(i, block, group)
        self._retire("bulk group", group.w, int(i.args[0], 0))

    def _leaders(self, w):
        return w[self.warp_in_cta[w] % _WARPGROUP == 0]

    def wgmma(self, w, spec, a, b, c, scale_d, *metadata):
        for warp in self._leaders(w).tolist():
            self._operation("wgmma group", warp, f"wgmma m64n{spec.n}k{spec.k}")
        return super().wgmma(w, spec, a, b, c, scale_d, *metadata)

    def wgmma_commit(self, w):
        super().wgmma_commit(w)
        self._commit("wgmma group", self._leaders(w))

    def h_wgmma_wait(self, i, block, group):
        super().h_wgmma_wait(i, block, group)
        self._retire("wgmma group", self._leaders(group.w), int(i.args[0], 0))

    # ---- tcgen05 ----------------------------------------------------------------------------------
    def tc_mma(self, w, form, d, a, b, instruction, enable, others, M):
        for warp in (w if M is None else w[M.any(1)]).tolist():
            if warp not in self.batches:
                self.batches[warp] = self._issue(warp, f"tcgen05.mma kind::{form.kind}")
        super().tc_mma(w, form, d, a, b, instruction, enable, others, M)

    def tc_commit(self, w, barrier, multicast, M):
        self.committing = True
        super().tc_commit(w, barrier, multicast, M)
        self.committing = False

    def _tc_defer(self, warp, action):
        if self.committing and int(warp) in self.batches:  # the commit of these
            action = self._arriving(action, self.batches.pop(int(warp)), "tcgen05.mma")
        super()._tc_defer(warp, action)
