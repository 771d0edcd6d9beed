"""Replays in the Chrome trace event format, which Perfetto (ui.perfetto.dev) opens; 1 µs is a cycle of the SMs' clock.

* a process for each CTA of each launch, in it a track for each warp: spans where it waited, named by what for and by
  the instruction that could not be issued, instants for barriers, copies and products;
* a process for the tensor cores of each launch, in it a track for each SM: a span for each product (wgmma).

PTX line, PTX and source line of an instruction are its arguments.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np

from ..frontend.locations import source_of
from ..names import readable
from .replay import NONE, REASONS, Replay, TimedLaunch

_SHORTEST = 8  # cycles of a wait that is shown
_PAUSE = 1000  # cycles between launches


class Timeline:
    """Events of replayed launches, written to ``path`` at its end."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.path.write_text("")  # an unusable path is an error before anything runs
        self.events: list[dict[str, Any]] = []
        self.origin = self.launches = 0
        self.numbers = itertools.count(1)

    def add(self, launch: TimedLaunch, replay: Replay) -> None:
        """Show a launch, replayed with ``times``, behind those before it."""
        name = f"launch {self.launches} {readable(launch.name)}"
        for cta in range(launch.ctas):
            process = self._process(f"{name} CTA {cta} on SM {replay.cta_sms[cta]}")
            for warp in range(launch.warps_per_cta):
                self._warp(
                    launch, replay, cta * launch.warps_per_cta + warp, process, self._track(process, f"warp {warp}")
                )
        if len(replay.marks):
            self._tensor_cores(launch, replay, self._process(f"{name} tensor cores"))
        self.origin += replay.cycles + _PAUSE
        self.launches += 1

    def write(self) -> None:
        """Write what there is as JSON, in the order of time."""
        events = sorted(self.events, key=lambda event: event.get("ts", -1))
        whole = {
            "traceEvents": events,
            "otherData": {"time": "cycles of the SMs' clock, 1 cycle = 1 µs", "by": "ptxsim"},
        }
        self.path.write_text(json.dumps(whole, ensure_ascii=False), encoding="utf-8")

    def _process(self, name):
        number = next(self.numbers)
        self.events.append({"ph": "M", "pid": number, "name": "process_name", "args": {"name": name}})
        return number

    def _track(self, process, name):
        number = next(self.numbers)
        self.events.append({"ph": "M", "pid": process, "tid": number, "name": "thread_name", "args": {"name": name}})
        return number

    def _warp(self, launch, replay, warp, process, track):
        span = slice(*launch.offsets[warp : warp + 2])
        rows, times, waited = launch.rows[span], replay.issued[span], replay.waited[span]
        own = np.flatnonzero(rows[:, 0] >= 0)
        since = int(replay.cta_times[warp // launch.warps_per_cta, 0])
        for k in own.tolist():
            instruction, now = launch.code.instructions[rows[k, 0]], int(times[k])
            place = {"pid": process, "tid": track}
            if now - since >= _SHORTEST:
                title = f"{REASONS[waited[k]]}: {instruction.name}"
                self.events.append({"ph": "X", **place, "ts": self.origin + since, "dur": now - since, "name": title,
                                    "args": self._place(launch, instruction)})  # fmt: skip
            if rows[k, 1] != NONE:
                self.events.append({"ph": "i", **place, "ts": self.origin + now, "s": "t", "name": instruction.name,
                                    "args": self._place(launch, instruction)})  # fmt: skip
            since = now + 1

    @staticmethod
    def _place(launch, instruction):
        place = {"SASS": instruction.source, "PTX line": instruction.line}
        if instruction.line:
            place["PTX"] = launch.ptx_line(instruction.line)
            if source := source_of(launch.ptx, instruction.line).strip(" ()"):
                place["source"] = source
        return place

    def _tensor_cores(self, launch, replay, process):
        groups = -(-launch.warps_per_cta // 4)
        tracks = {}
        for group, start, end, _ in replay.marks.tolist():
            cta, inside = divmod(group, groups)
            sm = int(replay.cta_sms[cta])
            if sm not in tracks:
                tracks[sm] = self._track(process, f"SM {sm}")
            name = f"wgmma of CTA {cta} warpgroup {inside}"
            self.events.append({"ph": "X", "pid": process, "tid": tracks[sm], "ts": self.origin + start,
                                "dur": max(end - start, 1), "name": name})  # fmt: skip
