"""Kernels translated for the simulator, once per process."""

from __future__ import annotations

import functools
import hashlib
import re
import time
from dataclasses import dataclass

import numpy as np

from ..errors import SimError
from ..frontend.parser import Kernel, parse_module
from ..frontend.program import Program
from .host_memory import aligned_bytes


@dataclass
class LoadedProgram:
    """A kernel translated for the simulator, with the module's global variables."""

    program: Program
    global_arrays: dict[str, np.ndarray]
    target: str
    translate_time: float


_programs: dict[tuple[bytes, str], LoadedProgram] = {}  # by the hash of the PTX and the kernel's name


_parsed = functools.lru_cache(maxsize=8)(parse_module)  # a module may hold several kernels


def parsed_kernel(ptx: str, name: str) -> Kernel:
    """The kernel ``name`` of the PTX module, parsed."""
    module = _parsed(ptx)
    if name not in module.kernels:
        raise SimError(f"the PTX has no kernel {name}; it has {', '.join(module.kernels)}")
    return module.kernels[name]


def static_smem(kernel: Kernel) -> int:
    """Bytes of the shared variables that the PTX declares with a size."""
    end = 0
    for alignment, size in [*kernel.module.shared.values(), *kernel.shared.values()]:
        end = -(-end // alignment) * alignment + (size or 0)
    return end


def load_program(ptx: str, name: str) -> LoadedProgram:
    """The kernel ``name`` of the PTX module, parsed and translated once per process."""
    key = hashlib.sha256(ptx.encode()).digest(), name
    if key not in _programs:
        started = time.perf_counter()
        kernel = parsed_kernel(ptx, name)
        program = Program(kernel)
        arrays = {}
        for variable, (_, size, data) in kernel.module.globals.items():
            arrays[variable] = aligned_bytes(max(size or 1, 1), 256)
            if data:
                arrays[variable][:size] = np.frombuffer(data, np.uint8)
        target = re.search(r"^\s*\.target\s+(sm_\w+)", ptx, re.M)
        if target is None:
            raise SimError("the PTX has no .target")
        _programs[key] = LoadedProgram(program, arrays, target.group(1), time.perf_counter() - started)
    return _programs[key]


def number(arch: str) -> int:
    """The number of an architecture: 90 for sm_90a."""
    return int(re.search(r"\d+", arch).group())


def runs_on(target: str, arch: str) -> bool:
    """Whether a cubin for ``target`` runs on ``arch``: the same major version and no newer; with the suffix f the
    same family, which is that too; with the suffix a the same architecture."""
    mine, theirs = number(target), number(arch)
    if target.endswith("a"):
        return mine == theirs
    return mine // 10 == theirs // 10 and mine <= theirs
