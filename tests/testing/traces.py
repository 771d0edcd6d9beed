"""Reads a Chrome trace and checks it against the rules of the Trace Event Format, as far as ptxsim uses it.

The rules are those of the format's definition ("Trace Event Format", Google) and of Perfetto's importer of JSON, which
drops or moves what breaks them without a word. What is found here is what Perfetto shows: ``perfetto.shown``.
"""

import json
from collections import defaultdict
from dataclasses import dataclass, field

# Fields of an event by its phase: what must be there, and what may be beside it.
FIELDS = {
    "M": ({"name", "pid", "args"}, {"tid"}),  # metadata
    "X": ({"name", "pid", "tid", "ts", "dur"}, {"args"}),  # a span
    "i": ({"name", "pid", "tid", "ts", "s"}, {"args"}),  # an instant
    "b": ({"name", "pid", "tid", "ts", "cat", "id2", "args"}, set()),  # begin and end of an asynchronous slice
    "e": ({"name", "pid", "tid", "ts", "cat", "id2"}, set()),
    "s": ({"name", "pid", "tid", "ts", "cat", "id"}, set()),  # start and finish of a flow
    "f": ({"name", "pid", "tid", "ts", "cat", "id", "bp"}, set()),
}
METADATA = {"process_name": str, "process_sort_index": int, "thread_name": str, "thread_sort_index": int}


@dataclass
class Track:
    spans: list = field(default_factory=list)  # (name, start, end), by start
    depths: list = field(default_factory=list)  # how many spans are around each
    instants: list = field(default_factory=list)  # (name, time)


@dataclass
class Found:
    processes: dict = field(default_factory=dict)  # pid -> name
    tracks: dict = field(default_factory=lambda: defaultdict(dict))  # pid -> name of the track -> Track
    slices: dict = field(default_factory=lambda: defaultdict(list))  # pid -> (category, name, warp, start, end)
    flows: list = field(default_factory=list)  # (name, (pid, track, span), (pid, track, span)), bound to these spans
    problems: list = field(default_factory=list)  # (name, count) of what Perfetto reports

    def in_order(self):
        """Itself, with what has no order of its own sorted."""
        for slices in self.slices.values():
            slices.sort()
        self.flows.sort()
        return self


def check_trace(path):
    """What is in a trace, times in µs: AssertionError where an event breaks the format, spans of a track cross, ends of
    slices and flows do not match, or Perfetto would show a flow between other spans or in the opposite direction."""
    whole = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_constant)
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
            track.spans.append((name, time, round(time + event["dur"], 3)))
        elif event["ph"] == "i":
            track.instants.append((name, time))
        elif event["ph"] == "b":
            assert event["id2"]["local"] not in opened
            opened[event["id2"]["local"]] = event
        elif event["ph"] == "e":
            start = opened.pop(event["id2"]["local"])
            assert all(start[key] == event[key] for key in ("cat", "name", "pid", "tid")) and start["ts"] <= time
            assert names[event["tid"]] == f"warp {start['args']['warp']}"
            found.slices[pid].append((event["cat"], name, start["args"]["warp"], start["ts"], time))
        else:
            flows[event["id"]].append((event["ph"], name, (pid, names[event["tid"]], time)))
    assert not opened
    for tracks in found.tracks.values():
        for track in tracks.values():
            track.depths = _depths(track.spans)
    for ends in flows.values():
        (begin, name, start), (finish, same, end) = ends
        assert (begin, finish) == ("s", "f") and name == same and start[2] < end[2]
        start, end = (_bound(found, *place) for place in (start, end))
        assert start[2][1] <= end[2][1], name  # Perfetto directs a flow from the span that begins first
        found.flows.append((name, start, end))
    return found.in_order()


def _bound(found, pid, track, time):
    """The place of a flow's end with the span around it, which has to be what began last: Perfetto binds it to that."""
    found = found.tracks[pid][track]
    around = [span for span in found.spans if span[1] < time < span[2]]
    begun = [span for span in (*found.spans, *found.instants) if span[1] <= time]
    last = max(begun, key=lambda span: span[1])
    assert last in around, (track, time, last)
    return pid, track, last


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
    number = event.get("id")
    if "id2" in event:  # of its process; Perfetto has but one place for slices whose id is that of the whole trace
        ((scope, number),) = event["id2"].items()
        assert scope == "local" and set(event.get("args", {})) == ({"warp"} if event["ph"] == "b" else set())
    if number is not None:
        assert int(number, 16) > 0 and number.startswith("0x")
    if event["ph"] == "f":
        assert event["bp"] == "e"  # bound to the span around it, not to the next one


def _depths(spans):
    """How many spans of its track are around each."""
    around, depths = [], []
    for name, start, end in spans:
        while around and around[-1] <= start:
            around.pop()
        assert not around or end <= around[-1], f"{name} crosses the span around it"
        depths.append(len(around))
        around.append(end)
    return depths
