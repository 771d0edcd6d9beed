"""Reads a Chrome trace and checks it against the rules of the Trace Event Format, as far as ptxsim uses it.

The rules are those of the format's definition ("Trace Event Format", Google) and of Perfetto's importer of JSON, which
drops what breaks them without a word. Perfetto itself is not run: its trace processor is a binary that the Python
package downloads.
"""

import json
from collections import defaultdict
from dataclasses import dataclass, field

# Fields of an event by its phase: what must be there, and what may be beside it.
FIELDS = {
    "M": ({"name", "pid", "args"}, {"tid"}),  # metadata
    "X": ({"name", "pid", "tid", "ts", "dur"}, {"args"}),  # a span
    "i": ({"name", "pid", "tid", "ts", "s"}, {"args"}),  # an instant
    "b": ({"name", "pid", "tid", "ts", "cat", "id"}, {"args"}),  # begin and end of an asynchronous slice
    "e": ({"name", "pid", "tid", "ts", "cat", "id"}, {"args"}),
    "s": ({"name", "pid", "tid", "ts", "cat", "id"}, set()),  # start and finish of a flow
    "f": ({"name", "pid", "tid", "ts", "cat", "id", "bp"}, set()),
}
METADATA = {"process_name": str, "process_sort_index": int, "thread_name": str, "thread_sort_index": int}


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
    """What is in a trace: AssertionError where an event breaks the format, spans of a track cross, or ends of slices
    and flows do not match."""
    whole = json.loads(path.read_text(), parse_constant=_no_constant)
    assert set(whole) == {"traceEvents", "otherData"}
    events = whole["traceEvents"]
    found, names, opened, flows = Found(), {}, {}, defaultdict(list)
    for event in events:
        _check_fields(event)
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


def _no_constant(name):
    raise AssertionError(f"{name} is not JSON")


def _check_fields(event):
    needed, allowed = FIELDS[event["ph"]]
    assert needed <= set(event) - {"ph"} <= needed | allowed, event
    # Perfetto reads process and thread numbers as uint32; a pid or tid of 0 is the idle thread
    assert all(type(event[key]) is int and 0 < event[key] < 2**32 for key in ("pid", "tid") if key in event), event
    assert all(type(event[key]) in (int, float) and event[key] >= 0 for key in ("ts", "dur") if key in event), event
    assert all(type(event[key]) is str and event[key] for key in ("name", "cat") if key in event), event
    assert type(event.get("args", {})) is dict
    if event["ph"] == "M":
        ((key, value),) = event["args"].items()
        assert type(value) is METADATA[event["name"]]
        assert key == ("name" if value is event["args"].get("name") else "sort_index")
        assert ("tid" in event) == event["name"].startswith("thread")
    if event["ph"] == "i":
        assert event["s"] == "t"  # of its thread
    if "id" in event:
        assert int(event["id"], 16) > 0 and event["id"].startswith("0x")
    if event["ph"] == "f":
        assert event["bp"] == "e"  # bound to the span around it, not to the next one


def _check_nesting(spans):
    around = []
    for name, start, end in spans:
        while around and around[-1] <= start + 1e-9:
            around.pop()
        assert not around or end <= around[-1] + 1e-9, f"{name} crosses the span around it"
        around.append(end)
