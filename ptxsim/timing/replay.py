"""Cycles of a recorded launch: the paths of its warps, replayed by ``engine.c`` on a few SMs that share an L2."""

from __future__ import annotations

import copy
import ctypes
import functools
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from ..compiled import compiled
from ..errors import SimError
from ..host.images import cubin_of
from . import assembler
from .cubin import Code, Instruction, kernel_resources
from .gpus import Gpu
from .instructions import PIPE_NAMES, READ_LATENCY, cost, product_shape, register_reads
from .paths import OFF, PathFinder, is_branch
from .recorder import Recording

SOURCE = Path(__file__).with_name("engine.c")
MOST_CYCLES = 20_000_000
# Operations of the engine, in its order. A row is (instruction, operation, a, b, c); -1 as instruction: what the one
# before does besides.
(NONE, TRY, ARRIVE, INIT, BAR_SYNC, BAR_ARRIVE, WGMMA, WGMMA_WAIT, TMA_LOAD, TMA_TARGET, STORE, REDUCE, CP_ASYNC,
 CP_ARRIVE, COMMIT, GROUP_WAIT, CLUSTER_ARRIVE, CLUSTER_WAIT, DROP) = range(19)  # fmt: skip
REASONS = ("issuing", "stall counts", "scoreboards", "mbarriers", "named barriers", "wgmma", "pipes", "not selected",
           "wgmma queue", "register ports", "copies", "cluster")  # fmt: skip
_PIPES = 10
_SM_WARPS, _QUEUE = 64, 512  # engine.c: SM_WARPS, QUEUE
_WIDE = re.compile(r"\.(gpu|gl|sys)\b")  # scopes
_TARGET = re.compile(r"^\s*\.target\s+(sm_\w+)", re.M)
# The engine's constants in its order: of a GPU by their names, l2 and l2_reductions as bytes a cycle of the SMs
# simulated, l2_reductions also of one SM.
_CONSTANTS = ("try_wait", "wake", "arrive", "remote_arrive", "bar", "cluster_barrier", "branch", "wgmma_issue",
              "wgmma_tail", "wgmma_least", "wgmma_queue", "tensor_flops", "shared_bytes", "tma_setup", "tma_latency",
              "tma_interval", "tma_bytes", "store_latency", "global_latency", "cta_start", "register_ports",
              "register_tensor", "slots_lost", "shared_slack")  # fmt: skip


@dataclass(frozen=True)
class SmUse:
    """Cycles that an SM's parts were busy (pipes: mean of its quarters), instructions, bytes that TMA loaded."""

    tensor: int
    shared: int
    instructions: int
    tma_bytes: int
    pipes: dict[str, float]


@dataclass(frozen=True)
class Replay:
    """What a replay found: cycles of all, start and end of each CTA, for each warp its end and the cycles spent for
    each of ``REASONS`` [warps, reasons], the use of each SM, the SM of each CTA; ``marks``: of each product (wgmma)
    its warpgroup, start, end, and whether it ends a group; ``issued``, ``waited``: when each row was issued, and for
    which of ``REASONS`` it waited longest, if asked for."""

    cycles: int
    cta_times: np.ndarray
    ends: np.ndarray
    reasons: np.ndarray
    sms: list[SmUse]
    cta_sms: np.ndarray
    marks: np.ndarray
    issued: np.ndarray | None = None
    waited: np.ndarray | None = None


class ReplayStuck(SimError):
    """The warps of a replay wait for ever, or longer than the limit."""


class TimedLaunch:
    """A recorded launch with its machine code: made once, replayed with the constants of many GPUs."""

    def __init__(self, recording: Recording, cubin: bytes | None = None):
        """``cubin``: the machine code that runs; by default what the simulation has of the PTX."""
        cubin = cubin_of(recording.ptx) if cubin is None else cubin
        self.name, self.cluster_size, self.ctas = recording.name, recording.cluster_size, len(recording.ctas)
        self.conflicts, self.ptx = recording.conflicts, recording.ptx
        self.grid = recording.grid
        self.threads, self.smem = prod(recording.block), recording.smem
        self.code: Code = assembler.assemble(recording.ptx, cubin)[recording.name]
        resources = kernel_resources(cubin)[recording.name] if cubin else {}
        self.registers, self.static_smem = resources.get("regs"), resources.get("static_smem", 0)
        self.arch = _number(_TARGET.search(recording.ptx)[1])
        finder = PathFinder(self.code, recording.blocks, recording.ptx)
        self.bars: dict[int, int] = {}
        rows: list[tuple[int, int, int, int, int]] = []
        offsets = [0]
        for cta in recording.ctas:
            for trace in cta:
                rows += self._rows(finder.find(trace), len(cta))
                offsets.append(len(rows))
        self.rows = np.array(rows, np.int32).reshape(-1, 5)
        self.offsets = np.array(offsets, np.int64)
        self.owners = np.array([index // recording.stride for index in self.bars], np.int32)

    @property
    def warps_per_cta(self) -> int:
        return (len(self.offsets) - 1) // self.ctas

    def ptx_line(self, line: int) -> str:
        """The text of a PTX line."""
        return self.ptx.split("\n", line)[line - 1].strip()

    def only(self, ctas: Sequence[int]) -> TimedLaunch:
        """The launch with these of its CTAs alone, whole clusters in their order; SimError for others."""
        warps, size = self.warps_per_cta, self.cluster_size
        firsts = list(ctas[::size])
        if (
            not firsts
            or [first + k for first in firsts for k in range(size)] != list(ctas)
            or any(f % size for f in firsts)
        ):
            raise SimError(f"CTAs {list(ctas)[:8]} are no clusters of {size}")
        if not 0 <= min(ctas) <= max(ctas) < self.ctas or len(set(ctas)) != len(ctas):
            raise SimError(f"CTAs {list(ctas)[:8]}: each once, of {self.ctas}")
        chosen = copy.copy(self)
        spans = [self.offsets[[cta * warps + w, cta * warps + w + 1]] for cta in ctas for w in range(warps)]
        chosen.rows = np.concatenate([self.rows[a:b] for a, b in spans])
        chosen.offsets = np.concatenate([[0], np.cumsum([b - a for a, b in spans])])
        place = {cta: n for n, cta in enumerate(ctas)}
        chosen.owners = np.array([place.get(owner, 0) for owner in self.owners.tolist()], np.int32)
        chosen.ctas = len(ctas)
        return chosen

    def rows_of(self, cta: int) -> int:
        """How much the warps of a CTA execute."""
        return int(self.offsets[(cta + 1) * self.warps_per_cta] - self.offsets[cta * self.warps_per_cta])

    def _bar(self, index):
        return self.bars.setdefault(index, len(self.bars))

    def _rows(self, path, warps):
        rows = []
        for at, (n, operation) in enumerate(path):
            i = self.code.instructions[n]
            taken = int(at + 1 < len(path) and path[at + 1][0] != n + 1) if is_branch(i) or i.opcode == "RET" else 0
            operations = self._operations(i, operation, warps) or [(NONE, 0, 0, taken)]
            rows += [(n if k == 0 else -1, *entry) for k, entry in enumerate(operations)]
        return rows

    def _operations(self, i: Instruction, operation: Any, warps: int) -> list[tuple[int, int, int, int]]:
        """The engine's operations of an instruction."""
        if i.opcode == "WARPGROUP" and i.modifiers[0] == "DEPBAR":
            return [(WGMMA_WAIT, int(i.operands[1], 0), 0, 0)]
        if i.opcode in ("UTMACMDFLUSH", "LDGDEPBAR"):
            return [(COMMIT, 0, 0, 0)]
        if i.opcode == "DEPBAR" and i.operands[0] == "SB0" and len(i.operands) > 1:  # that of the groups of copies
            text = self.ptx_line(i.line)
            return [(GROUP_WAIT, int(i.operands[1], 0), int("bulk" in text and ".read" not in text), 0)]
        if operation is None or operation == OFF:
            return []
        kind = operation[0]
        if kind == "try":
            return [(TRY, self._bar(operation[2]), operation[3], 0)]
        if kind == "init":
            return [(INIT, self._bar(index), count, 0) for index, count in operation[2]]
        if kind == "mbar":
            return self._changes(operation[2], operation[3])
        if kind == "bar":
            return [(BAR_SYNC if operation[2] else BAR_ARRIVE, operation[3], operation[4] or warps, 0)]
        if kind == "cluster":
            return [(CLUSTER_WAIT if operation[2] else CLUSTER_ARRIVE, 0, 0, 0)]
        if kind == "wgmma":
            flops, shared, eight, ends = product_shape(i)
            return [(WGMMA, flops, shared, int(ends) | 2 * eight)]
        if kind == "tma":
            return [(TMA_LOAD, operation[2], 0, 0), *((TMA_TARGET, self._bar(x), n, 0) for x, n in operation[3])]
        if kind == "store":
            return [(REDUCE if operation[3] else STORE, operation[2], 0, 0)]
        if kind == "cp":
            return [(CP_ASYNC, operation[2], 0, 0)]
        return [
            (CP_ARRIVE, self._bar(index), n, 0 if operation[3] else n) for index, n in Counter(operation[2]).items()
        ]

    def _changes(self, what, lanes):
        """Arrivals and bytes expected or completed, of a warp's lanes."""
        arrivals, expected = Counter(), Counter()
        for index, count in lanes:
            arrivals[index] += (1 if "tx" in what else count) if "arrive" in what else 0
            expected[index] += 0 if "tx" not in what else -count if what == "complete_tx" else count
        dropped = [(DROP, self._bar(index), n, 0) for index, n in arrivals.items() if "drop" in what]
        return dropped + [(ARRIVE, self._bar(index), n, expected[index]) for index, n in arrivals.items()]

    @functools.cached_property
    def _kinds(self) -> tuple[list[int], np.ndarray, np.ndarray]:
        """Instructions that cost the same: one of each kind, the kind of each instruction, and what does not depend on
        a GPU (stall count, scoreboards, whether it branches, registers read, whether it is a fence that waits)."""
        first: dict[tuple, int] = {}
        reads = register_reads(self.code)
        kinds, fixed = [], []
        for n, (i, count) in enumerate(zip(self.code.instructions, reads, strict=True)):
            key = i.opcode, *i.modifiers, self.conflicts.get(i.line)
            kinds.append(list(first).index(key) if key in first else len(first))
            first.setdefault(key, n)
            branch = is_branch(i) or i.opcode == "RET"
            fixed.append((i.stall, i.write_scoreboard, i.read_scoreboard, i.wait, branch, count, self._waits(i)))
        return list(first.values()), np.array(kinds), np.array(fixed)

    def _waits(self, i: Instruction) -> bool:
        """Whether it is a fence of the GPU's or the system's scope, which waits until the L2 has acknowledged what came
        before it. That of a cluster's scope is part of ``cluster_barrier`` and ``remote_arrive``."""
        beyond = i.opcode == "MEMBAR" and not {"GPU", "SYS"}.isdisjoint(i.modifiers)
        return beyond and _WIDE.search(self.ptx_line(i.line)) is not None

    def instruction_table(self, gpu: Gpu) -> np.ndarray:
        """Rows of the engine's ``Instruction``."""
        examples, kinds, fixed = self._kinds
        rows = []
        for n in examples:
            c = cost(self.code.instructions[n], gpu, self.conflicts)
            rows.append((c.pipe, round(1000 * c.taken), round(c.latency), min(round(c.latency), READ_LATENCY), c.passes,
                         c.reduced))  # fmt: skip
        costs = np.array(rows)[kinds]
        stall = np.maximum(fixed[:, :1], fixed[:, 6:] * round(gpu.global_latency))
        return np.ascontiguousarray(
            np.concatenate([stall, fixed[:, 1:4], costs[:, :4], fixed[:, 4:6], costs[:, 4:]], axis=1), np.int32
        )

    def replay(self, gpu: Gpu, sms: int = 1, residency: int = 1, times: bool = False) -> Replay:
        """Replay all CTAs on ``sms`` SMs with their share of the L2's rate, ``residency`` CTAs at once on each; those
        that find no room begin when others end, in order. ``times``: also when each row was issued, and what it waited
        for."""
        ctas, warps, size = self.ctas, self.warps_per_cta, self.cluster_size
        self._check(gpu, sms, residency)
        table = self.instruction_table(gpu)
        share = sms / gpu.sms
        rates = [gpu.bytes_per_cycle(rate) * share for rate in (gpu.l2, gpu.l2_reductions)]
        constants = np.array(
            [*(getattr(gpu, n) for n in _CONSTANTS), *rates, rates[1] / sms, gpu.l2_saved * 1024 * sms]
        )
        # a warp: its end, reasons; an SM: tensor cores, shared memory twice, instructions, TMA bytes, pipes
        out = np.zeros(ctas * warps * (1 + len(REASONS)) + sms * (5 + _PIPES) + 2, np.int64)
        cta_times, cta_sms = np.zeros((ctas, 2), np.int64), np.zeros(ctas, np.int32)
        marks = np.zeros((int((self.rows[:, 1] == WGMMA).sum()) // 4 + 1, 4), np.int64)
        issued, waited = (np.zeros(len(self.rows), np.int32) if times else None for _ in range(2))
        stuck = _engine().ptxsim_replay(
            _at(table), _at(self.rows), _at(self.offsets), ctas, warps, size, sms, residency, _at(self.owners),
            len(self.bars), _at(constants), ctypes.c_int64(MOST_CYCLES), _at(out), _at(cta_times), _at(cta_sms),
            _at(marks), _at(issued), _at(waited),
        )  # fmt: skip
        per_warp = out[: ctas * warps * (1 + len(REASONS))].reshape(ctas * warps, -1)
        if stuck:
            raise ReplayStuck(f"{self.name[:60]}: {self._stuck(per_warp[:, 0], stuck)}")
        per_sm = out[per_warp.size : -2].reshape(sms, -1).tolist()
        uses = [
            SmUse(tensor, tensor_shared + shared, count, loaded, {k: pipes[v] / 4 for k, v in PIPE_NAMES.items()})
            for tensor, tensor_shared, shared, count, loaded, *pipes in per_sm
        ]
        return Replay(int(out[-2]), cta_times, per_warp[:, 0], per_warp[:, 1:], uses, cta_sms, marks[: out[-1]],
                      issued, waited)  # fmt: skip

    def _check(self, gpu, sms, residency):
        if sms < 1 or sms % self.cluster_size or sms > gpu.sms:
            raise SimError(
                f"{sms} SMs: clusters of {self.cluster_size} CTAs on at most the {gpu.sms:.0f} SMs of {gpu.name}"
            )
        if residency < 1 or residency * self.warps_per_cta > _SM_WARPS:
            raise SimError(f"{residency} CTAs of {self.warps_per_cta} warps at once: an SM holds {_SM_WARPS} warps")
        if residency * -(-self.warps_per_cta // 4) * gpu.wgmma_queue > _QUEUE:
            raise SimError(
                f"wgmma_queue = {gpu.wgmma_queue:g} of {gpu.name}: at most {_QUEUE} products may wait for an SM"
            )
        if _number(gpu.arch) != self.arch:
            raise SimError(f"{gpu.name} ({gpu.arch}) does not run machine code of sm_{self.arch}")

    def _stuck(self, ends, why):
        if why == 2:
            return f"more than {MOST_CYCLES} cycles"
        lines = []
        for warp in np.flatnonzero(ends < 0)[:8].tolist():
            row = self.rows[-ends[warp] - 1]
            cta, inside = divmod(warp, self.warps_per_cta)
            lines.append(f"CTA {cta} warp {inside} at {self.code.instructions[row[0]].source[:60]}")
        return "warps wait for ever: " + "; ".join(lines)


def timed_launches(recordings: Sequence[Recording]) -> list[TimedLaunch]:
    """The recordings with their machine code."""
    return [TimedLaunch(recording) for recording in recordings]


def _number(arch: str) -> int:
    return int(re.match(r"sm_(\d+)", arch)[1])


def _at(array):
    return None if array is None else array.ctypes.data_as(ctypes.c_void_p)


@functools.cache
def _engine():
    library = ctypes.CDLL(str(compiled(SOURCE, "engine.so", ["-O2"], "the timing engine")))
    library.ptxsim_replay.restype = ctypes.c_int
    return library
