"""What the warps of a launch did, in order: the basic blocks that they executed, and their operations."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..machine.events import Observer
from ..machine.mbarriers import mbarrier_fields

BANKS = 32
_SAMPLES = 64  # warps' accesses of one instruction that are looked at for bank conflicts


@dataclass(frozen=True)
class PtxBlock:
    """A basic block: the lines of its instructions, the numbers of the blocks that may follow (``term`` as in
    ``frontend.blocks.Block``), the line of what ends it."""

    lines: tuple[int, ...]
    target: int | None
    fall: int | None
    term: str
    last: int | None


@dataclass
class Recording:
    """A launch. ``ctas[n][warp]`` is a warp's trace: numbers of blocks, a pair (block, mask of active lanes) where
    lanes have parted, and operations ``(kind, PTX line, …)``:

    init [(mbarrier, count)], mbar operation [(mbarrier, count)], try mbarrier parity, bar waits barrier warps, cluster
    waits, tma bytes [(mbarrier, bytes)], store bytes reduces, cp bytes, cp_arrive [mbarrier] noinc, commit kind,
    wait kind pending, wgmma.

    mbarriers are flat indices, ``stride`` bytes of shared memory a CTA. ``conflicts``: how often an access of a warp to
    shared memory goes through the banks on average, by PTX line.
    """

    name: str
    ptx: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    cluster: tuple[int, int, int]
    smem: int
    stride: int
    blocks: list[PtxBlock]
    ctas: list[list[list[Any]]] = field(default_factory=list)
    conflicts: dict[int, float] = field(default_factory=dict)

    @property
    def cluster_size(self) -> int:
        x, y, z = self.cluster
        return x * y * z


class Recorder(Observer):
    """Records every launch of a simulation; ``recordings`` are finished ones. For one simulation at a time."""

    def __init__(self):
        self.recordings: list[Recording] = []
        self._launch = None  # LaunchConfig of the latest recording: a launch runs in several waves

    def begin(self, machine):
        self.machine, self.wave, self.shared = machine, machine.wave, machine.shared
        self.traces = [[] for _ in range(machine.wave.nwarps)]
        self.bars = {}  # warp -> entry of the named barrier that it came to last
        self.at_bar = {}  # (cta, barrier) -> entries of the warps that have arrived
        self.latest = None  # step, line and warp of the latest copy, and its entry
        if machine.wave.launch is not self._launch:
            self._launch = machine.wave.launch
            self.banks = {}  # line -> [passes, accesses]
            self.recordings.append(self._new(machine))

    @staticmethod
    def _new(machine):
        wave, launch = machine.wave, machine.wave.launch
        blocks = []
        for b in wave.program.blocks:
            lines = tuple(i.line for i in b.instrs)
            blocks.append(PtxBlock(lines, b.target, b.fall, b.term, lines[-1] if lines else None))
        kernel = wave.program.k
        return Recording(kernel.name, kernel.module.text, launch.grid, launch.block, launch.cluster, launch.smem,
                         machine.shared.stride, blocks)  # fmt: skip

    def end(self, machine, error):
        if error is not None:
            self._launch = None
            self.recordings.pop()
        else:
            recording, wave = self.recordings[-1], machine.wave
            first = len(recording.ctas)
            shift = first * recording.stride
            recording.ctas += [[None] * wave.wpc for _ in range(wave.nctas)]
            for warp, trace in enumerate(self.traces):
                moved = [_moved(entry, shift) for entry in trace] if shift else trace
                recording.ctas[first + int(wave.cta_of[warp])][int(wave.warp_in_cta[warp])] = moved
            for line, (passes, accesses) in self.banks.items():
                recording.conflicts[line] = passes / accesses
        self.machine = self.wave = self.shared = self.traces = None

    def _add(self, w, M, make):
        for j, warp in enumerate(w.tolist()):
            lanes = range(32) if M is None else np.flatnonzero(M[j]).tolist()
            if lanes:
                self.traces[warp].append(make(j, lanes))

    # ---- control flow ---------------------------------------------------------------------------------------------
    def issue(self, block, w, M):
        number = block.idx
        for j, warp in enumerate(w.tolist()):
            self.traces[warp].append(number if M is None else (number, int(np.packbits(M[j]).view(">u4")[0])))

    # ---- barriers -------------------------------------------------------------------------------------------------
    def mbarrier_initialised(self, w, index, mask):
        words, line = self.machine.mbarriers.words, self.wave.line
        self._add(w, mask, lambda j, lanes: ("init", line, [
            (int(index[j, x]), mbarrier_fields(words[int(index[j, x]) >> 3])[1]) for x in lanes]))  # fmt: skip

    def mbarrier_changed(self, w, operation, index, count, mask):
        line = self.wave.line
        self._add(w, mask, lambda j, lanes: ("mbar", line, operation, [
            (int(index[j, x]), int(count[j, x])) for x in lanes]))  # fmt: skip

    def wait_begins(self, wait):
        line = wait.block.line
        if wait.why == "mbarrier.try_wait":
            parity = "parity" in wait.block.handler.parts

            def entry(j, lanes):
                wanted = int(wait.info["wanted"][j, lanes[0]])
                index = self.shared.flat(wait.w[j], wait.info["address"][j, lanes[0]])
                return ("try", line, int(index), wanted & 1 if parity else wanted >> 63)

            self._add(wait.w, wait.M, entry)
        elif wait.why == "barrier.cluster.wait":
            self._add(wait.w, None, lambda j, lanes: ("cluster", line, True))

    def wait_ends(self, wait, selected, failed):
        if failed and wait.why == "mbarrier.try_wait":  # it begins again
            for warp in wait.w[selected].tolist():
                trace = self.traces[warp]
                at = max(n for n, e in enumerate(trace) if not isinstance(e, int) and e[:2] == ("try", wait.block.line))
                del trace[at]

    def bar_reached(self, w, cta, barrier, waits):
        line = self.wave.line
        for j, warp in enumerate(w.tolist()):
            entry = ["bar", line, waits, int(barrier[j]), 0]
            self.traces[warp].append(entry)
            self.bars[warp] = entry

    def bar_arrived(self, warp, cta, barrier, waits):
        self.at_bar.setdefault((cta, barrier), []).append(self.bars[warp])

    def bar_together(self, w, cta, waits):
        warps = Counter(cta.tolist())
        for j, warp in enumerate(w.tolist()):
            self.bars[warp][4] = warps[int(cta[j])]

    def bar_completed(self, cta, barrier):
        entries = self.at_bar.pop((cta, barrier), [])
        for entry in entries:
            entry[4] = len(entries)

    def cluster_arrived(self, w, cluster, relaxed):
        line = self.wave.line
        self._add(w, None, lambda j, lanes: ("cluster", line, False))

    # ---- copies ---------------------------------------------------------------------------------------------------
    def copy_issued(self, copy):
        if not copy.name.startswith(("TMA", "bulk")):
            return
        now = self.wave.step, self.wave.line, copy.warp
        if self.latest is None or self.latest[0] != now:
            entry = ["store", now[1], 0, copy.reduces] if copy.is_store else ["tma", now[1], 0, []]
            self.traces[copy.warp].append(entry)
            self.latest = now, entry
        entry = self.latest[1]
        if not copy.repeated:
            entry[2] += copy.size
        if not copy.is_store:
            counted = copy.size if copy.counted is None else copy.counted
            entry[3] += [(int(signal), counted) for _, _, signal in copy.targets]

    def cp_async(self, w, index, source, size, source_size, mask):
        line = self.wave.line
        self._add(w, mask, lambda j, lanes: ("cp", line, size * len(lanes)))
        self._banks(line, w, index, size, mask)

    def cp_async_arrives(self, w, index, mask):
        line = self.wave.line
        noinc = "noinc" in self.wave.ptx_line(line)
        self._add(w, mask, lambda j, lanes: ("cp_arrive", line, [int(index[j, x]) for x in lanes], noinc))

    def group_committed(self, kind, w):
        line = self.wave.line
        self._add(w, None, lambda j, lanes: ("commit", line, kind))

    def group_awaited(self, kind, w, pending, read):
        line = self.wave.line
        self._add(w, None, lambda j, lanes: ("wait", line, kind, pending))

    # ---- matrix instructions, shared memory -----------------------------------------------------------------------
    def wgmma(self, w, spec, operands):
        line = self.wave.line
        self._add(w, None, lambda j, lanes: ("wgmma", line))

    def read_shared(self, w, index, size, M):
        self._banks(self.wave.line, w, index, size, M)

    def write_shared(self, w, index, size, M, values=None):
        self._banks(self.wave.line, w, index, size, M)

    def _banks(self, line, w, index, size, M):
        passes = self.banks.setdefault(line, [0, 0])
        for j in range(min(len(w), _SAMPLES - passes[1])):
            at = index[j] if M is None or index.shape[1] != 32 else index[j][M[j]]
            passes[0] += bank_passes(at, size)
            passes[1] += 1


def bank_passes(index: np.ndarray, size: int) -> int:
    """How often a warp's access of ``size`` bytes a lane goes through the 32 banks of 4 bytes: lanes go together as
    long as they have 128 bytes, and for each bank as many times as there are words of it to read."""
    together = max(BANKS * 4 // max(size, 4), 1)
    passes = 0
    for first in range(0, len(index), together):
        lanes = np.asarray(index[first : first + together], np.int64)
        words = np.unique((lanes[:, None] + np.arange(0, size, 4)) >> 2)
        passes += int(np.bincount(words % BANKS).max())
    return max(passes, 1)


def _moved(entry, shift):
    """An entry with the mbarriers of CTAs that come later in the launch."""
    kind = entry[0] if not isinstance(entry, int) else None
    if kind == "try":
        return (*entry[:2], entry[2] + shift, entry[3])
    if kind in ("init", "mbar", "tma"):
        return (*entry[:-1], [(index + shift, count) for index, count in entry[-1]])
    if kind == "cp_arrive":
        return (*entry[:2], [index + shift for index in entry[2]], entry[3])
    return entry
