"""Reads a Chrome trace and checks its structure, as Perfetto needs it."""

import json
from collections import defaultdict
from dataclasses import dataclass, field


@dataclass
class Track:
    spans: list = field(default_factory=list)  # (name, start, end), by start
    instants: list = field(default_factory=list)  # (name, time)


@dataclass
class Found:
    processes: dict = field(default_factory=dict)  # pid -> name
    tracks: dict = field(default_factory=lambda: defaultdict(dict))  # pid -> name of the track -> Track
    slices: dict = field(default_factory=lambda: defaultdict(list))  # pid -> (category, name, start, end)
    flows: list = field(default_factory=list)  # (name, (pid, track, time), (pid, track, time))


def check_trace(path):
    """What is in a trace: AssertionError where spans of a track cross, or ends of slices and flows do not match."""
    events = json.loads(path.read_text())["traceEvents"]
    found, names, opened, flows = Found(), {}, {}, defaultdict(list)
    assert {event["ph"] for event in events} <= set("MXibesf")
    for event in events:
        if event["ph"] == "M" and event["name"] == "process_name":
            assert event["pid"] not in found.processes
            found.processes[event["pid"]] = event["args"]["name"]
        elif event["ph"] == "M" and event["name"] == "thread_name":
            assert event["tid"] not in names  # track numbers are not reused in another process
            names[event["tid"]] = event["args"]["name"]
            found.tracks[event["pid"]][event["args"]["name"]] = Track()
    order = [event["ts"] for event in events if "ts" in event]
    assert order == sorted(order)
    for event in events:
        if event["ph"] == "M":
            continue
        pid, name, time = event["pid"], event["name"], event["ts"]
        track = found.tracks[pid][names[event["tid"]]]
        if event["ph"] == "X":
            assert event["dur"] > 0
            track.spans.append((name, time, time + event["dur"]))
        elif event["ph"] == "i":
            track.instants.append((name, time))
        elif event["ph"] == "b":
            assert event["id"] not in opened
            opened[event["id"]] = event
        elif event["ph"] == "e":
            start = opened.pop(event["id"])
            assert (start["cat"], start["name"], start["pid"]) == (event["cat"], name, pid) and start["ts"] <= time
            found.slices[pid].append((event["cat"], name, start["ts"], time))
        else:
            flows[event["id"]].append((event["ph"], name, (pid, names[event["tid"]], time)))
    assert not opened
    for tracks in found.tracks.values():
        for track in tracks.values():
            _check_nesting(track.spans)
    for ends in flows.values():
        (begin, name, start), (finish, same, end) = ends
        assert (begin, finish) == ("s", "f") and name == same and start[2] < end[2]
        for pid, track, time in (start, end):  # Perfetto binds an end to the span around it
            assert any(first < time < last for _, first, last in found.tracks[pid][track].spans), (name, track, time)
        found.flows.append((name, start, end))
    return found


def _check_nesting(spans):
    around = []
    for name, start, end in spans:
        while around and around[-1] <= start + 1e-9:
            around.pop()
        assert not around or end <= around[-1] + 1e-9, f"{name} crosses the span around it"
        around.append(end)
