"""Draws one CTA of a trace of ptxsim: python docs/draw_trace.py TRACE.json FIGURE.png [CTA]

Rows are warps and, above them, the bulk copies and wgmma groups in flight. Colours: waits at mbarriers and at other
barriers, wgmma groups, copies; arrows lead from the issue of a copy over the phase that it completes to the first wait
that the phase ends.
"""

import json
import re
import sys
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Patch

WAIT, BARRIER, WGMMA, COPY, ARROW = "#c9d3e0", "#e8c9a0", "#5b9e6f", "#c0504d", "#c0504d"


def read(path, cta):
    """(names of tracks, spans of tracks, asynchronous slices, flows) of a CTA, by its number in the trace."""
    events = json.loads(Path(path).read_text(encoding="utf-8"))["traceEvents"]
    pids = [event["pid"] for event in events if event["name"] == "process_name"]
    mine = [event for event in events if event["pid"] == pids[cta]]
    names = {event["tid"]: event["args"]["name"] for event in mine if event["name"] == "thread_name"}
    spans, slices, flows = [], [], defaultdict(list)
    begun = {}
    for event in mine:
        if event["ph"] == "X":
            spans.append((event["tid"], event["name"], event["ts"], event["dur"]))
        elif event["ph"] == "b":
            begun[event["id2"]["local"]] = event
        elif event["ph"] == "e":
            start = begun.pop(event["id2"]["local"])
            slices.append((event["cat"], event["tid"], event["name"], start["ts"], event["ts"]))
        elif event["ph"] in "sf":
            flows[event["id"]].append((event["name"], event["tid"], event["ts"]))
    return names, spans, slices, list(flows.values())


def draw(path, figure, cta=0):
    names, spans, slices, flows = read(path, cta)
    warps = {tid: int(name.split()[1]) for tid, name in names.items() if re.fullmatch(r"warp \d+", name)}
    active = sorted(warp for tid, warp in warps.items() if any(span[0] == tid for span in spans))
    row = {warp: i for i, warp in enumerate(active)}
    leaders = sorted({warps[tid] for kind, tid, *_ in slices if kind == "wgmma group"})
    products = {warp: -1.2 - 1.1 * i for i, warp in enumerate(reversed(leaders))}
    fig, axes = plt.subplots(figsize=(11, 4.6), dpi=90)
    for tid, name, start, length in spans:
        if tid in warps and name.startswith("waits"):
            at_barrier = "mbarrier" not in name
            axes.barh(row[warps[tid]], max(length, 0.4), 0.7, start, color=BARRIER if at_barrier else WAIT)
        elif tid in warps:
            axes.plot([start], [row[warps[tid]]], marker="v", color=COPY, markersize=5)
    for kind, tid, _, start, end in slices:
        if kind == "wgmma group":
            axes.barh(products[warps[tid]], end - start, 0.8, start, color=WGMMA, edgecolor="white", linewidth=0.6)

    def around(tid, time):
        """(start, end) of the outermost span of a track at a time: a phase or a wait, not what happens in it."""
        return min((ts, ts + length) for other, _, ts, length in spans if other == tid and ts < time < ts + length)

    ended = defaultdict(list)  # (mbarrier, phase) -> (end, warp) of the waits that it ends
    for (_, tid, start), (_, to, ts) in flows:
        if tid not in warps and to in warps:
            ended[tid, around(tid, start)].append((around(to, ts)[1], warps[to]))
    for (name, tid, start), (_, barrier, landed) in flows:
        if "load" in name and tid in warps and (waits := ended[barrier, around(barrier, landed)]):
            end, warp = min(waits)
            axes.annotate("", (end, row[warp] - 0.3), (start, row[warps[tid]] + 0.1),
                          arrowprops=dict(arrowstyle="->", color=ARROW, linewidth=0.7, alpha=0.7))  # fmt: skip
    ticks = [*products.values(), *row.values()]
    axes.set_yticks(ticks, [*(f"wgmma of warpgroup {warp // 4}" for warp in products), *(f"warp {w}" for w in row)])
    axes.invert_yaxis()
    axes.set_xlabel("steps of the simulator's scheduler (an order, not a duration on any GPU)")
    axes.spines[["top", "right"]].set_visible(False)
    legend = {"waits for an mbarrier": WAIT, "waits at another barrier": BARRIER, "wgmma group in flight": WGMMA,
              "TMA copy: issue → wait that it ends": COPY}  # fmt: skip
    axes.legend([Patch(color=color) for color in legend.values()], legend, ncols=4, loc="lower center",
                bbox_to_anchor=(0.45, 1.0), frameon=False, fontsize=9)  # fmt: skip
    fig.tight_layout()
    fig.savefig(figure)


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    draw(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
