"""Kernel launches: what the host code asks for, and running it wave by wave."""

from __future__ import annotations

import ctypes
import struct
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import numpy as np

from ..analysis.dependents import Prerequisite, history_of
from ..errors import SimError
from ..machine.events import Observer
from ..machine.global_memory import Ranges
from ..machine.launch import LaunchConfig
from ..machine.limits import check_launch
from ..machine.machine import Machine
from ..machine.tensor_sums import TensorSums
from .host_memory import aligned_bytes, extent, integers
from .programs import LoadedProgram, number, runs_on, static_smem

MAX_CTAS = 64  # CTAs that run together in one wave


@dataclass(frozen=True)
class LoadedKernel:
    """What the handle of a kernel stands for: its PTX and name, the registers of a thread as the cubin says (None: not
    known), and whether its machine code has kept setmaxnreg."""

    ptx: str
    name: str
    registers: int | None = None
    resizes: bool = True


@dataclass(frozen=True)
class LaunchRequest:
    """What a launch asks for.

    ``grid``, ``block`` and ``cluster`` are dim3 tuples, ``smem`` bytes of dynamic shared memory; ``arguments`` is the
    address of an array of pointers to the arguments' bytes. ``cooperative``: all CTAs run together; ``early``: on a GPU
    it may start before the launch before it ends.
    """

    kernel: LoadedKernel
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    cluster: tuple[int, int, int] = (1, 1, 1)
    smem: int = 0
    arguments: int = 0
    cooperative: bool = False
    early: bool = False

    @classmethod
    def read(cls, kernel: LoadedKernel, config: int, arguments: int) -> LaunchRequest:
        """From a cudaLaunchConfig_t at an address: uint32 grid[3], block[3]; uint64 dynamic shared memory, stream,
        attributes*; uint32 n. An attribute has 72 bytes: uint32 id, padding, and the value from byte 8 on."""
        raw = ctypes.string_at(config, 52)
        geometry = struct.unpack_from("<6I", raw, 0)
        smem, _, attributes = struct.unpack_from("<QQQ", raw, 24)
        (n_attributes,) = struct.unpack_from("<I", raw, 48)
        cluster, cooperative, early = (1, 1, 1), False, False
        for at in range(attributes, attributes + 72 * n_attributes, 72):
            (identifier,) = integers(at, "I", 1)
            # The other attributes are about speed.
            if identifier == 2:  # cudaLaunchAttributeCooperative
                cooperative = integers(at + 8, "I", 1) != (0,)
            elif identifier == 4:  # cudaLaunchAttributeClusterDimension
                cluster = integers(at + 8, "I", 3)
            elif identifier == 6:  # cudaLaunchAttributeProgrammaticStreamSerialization
                early = integers(at + 8, "I", 1) != (0,)
        return cls(kernel, geometry[:3], geometry[3:], cluster, smem, arguments, cooperative, early)


@dataclass(frozen=True)
class Launch:
    """One kernel launch: its geometry in CTAs and threads, dynamic shared memory in bytes, and what it cost here."""

    name: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    cluster: tuple[int, int, int]
    smem: int
    time: float  # seconds of simulation, without translation
    warp_instrs: int  # instructions executed, counted per warp
    steps: int  # scheduler steps
    translate_time: float  # seconds that parsing and translating the PTX took, once per process
    registers: int | None  # of a thread, as the cubin says


@dataclass(frozen=True)
class Conditions:
    """Under which a launch is simulated: the options of ``simulate``, how many CTAs run in a wave, the legal global
    memory, and who observes a wave (``observers`` makes a list of them for each)."""

    arch: str
    seed: int | None
    late: bool
    race: bool
    sm_count: int
    fp8_bits: int | None
    arithmetic: str
    together: int
    ranges: Ranges
    observers: Callable[[], list[Observer]]


class Launcher:
    """Runs launches, one after the other. On a GPU the next one may start while the latest runs (``prerequisite``)."""

    def __init__(self):
        self.prerequisite: Prerequisite | None = None

    def run(self, request: LaunchRequest, loaded: LoadedProgram, under: Conditions) -> Launch:
        """Run one launch of a translated kernel; SimError for one that the device would refuse."""
        arch, kernel, registers = under.arch, loaded.program.k, request.kernel.registers
        if not runs_on(loaded.target, arch):
            raise SimError(f"compiled for {loaded.target}, which does not run on the simulated {arch}")
        check_launch(number(arch), kernel, request.grid, request.block, request.cluster, request.smem,
                     static_smem(kernel), registers)  # fmt: skip
        cluster = kernel.cluster if kernel.cluster and request.cluster == (1, 1, 1) else request.cluster
        variables = loaded.global_arrays
        launch = LaunchConfig(
            loaded.program, request.grid, request.block, cluster, request.smem, _parameters(kernel, request.arguments),
            under.ranges, {name: array.ctypes.data for name, array in variables.items()}, registers,
            request.kernel.resizes or registers is None, under.seed, under.late, under.fp8_bits,
            None if under.arithmetic == "float32" else TensorSums(under.arithmetic, number(arch)),
        )  # fmt: skip
        races = history_of(loaded.program, self.prerequisite if request.early else None) if under.race else None
        started = time.perf_counter()
        instructions = steps = 0
        pending = deque(range(0, prod(request.grid), prod(cluster)))
        while pending:
            ran = self._run_wave(launch, pending, request.cooperative, variables, races, under)
            instructions += ran.scheduler.instr_count
            steps += ran.wave.step
        seconds = time.perf_counter() - started
        self.prerequisite = Prerequisite.of(loaded.program, races)
        return Launch(request.kernel.name, request.grid, request.block, cluster, request.smem, seconds, instructions,
                      steps, loaded.translate_time, registers)  # fmt: skip

    def _run_wave(self, launch, pending, cooperative, variables, races, under):
        """Run as many clusters as fit in one wave; returns its machine."""
        per_cluster = prod(launch.cluster)
        # Where running CTAs may take over others' clusters, only as many as the device holds are launched at once.
        together = under.sm_count if launch.program.takes_over else under.together
        clusters = len(pending) if cooperative else max(together // per_cluster, 1)
        starts = [pending.popleft() for _ in range(min(clusters, len(pending)))]
        ran = Machine(launch, [first + rank for first in starts for rank in range(per_cluster)], pending)
        legal = [launch.params, *variables.values(), *ran.symbols.local_arrays]
        launch.ranges.prepare([extent(array) for array in legal])
        # the detector hears last, so that others know of an access that it refuses; it may refuse the whole kernel
        detectors = [] if races is None else [races.detector(ran)]
        ran.attach(*under.observers(), *detectors)
        ran.run()
        return ran


def _parameters(kernel, arguments: int) -> np.ndarray:
    """The bytes of the parameters, from an array of pointers."""
    params = aligned_bytes(max(kernel.param_bytes, 1))
    for i, (offset, size) in enumerate(kernel.param_list):
        (at,) = integers(arguments + 8 * i, "Q", 1)
        params[offset : offset + size] = np.frombuffer(ctypes.string_at(at, size), np.uint8)
    return params
