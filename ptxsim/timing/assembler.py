"""The machine code of a kernel with the PTX line that each instruction comes from.

A DSL's cubin has no such lines. The same release of ptxas makes the same code again out of the PTX, now with lines: a
``.loc`` before each instruction names its own line. Whether the code is the same is checked byte by byte; where it is
not, nothing is guessed.
"""

from __future__ import annotations

import functools
import hashlib
import re
import sys
from pathlib import Path

from ..errors import SimError
from ..host.cubin import code_sections
from .cubin import Code, disassemble, run_ptxas

# The ptxas of the DSL's compilers, by the PTX version that they write: nvidia-cutlass-dsl 4.8.1 for CUDA 12 and 13.
RELEASES = {
    "8.8": ("12.9.86", "nvidia/cuda_nvcc/bin/ptxas", "nvidia-cuda-nvcc-cu12==12.9.86"),
    "9.4": ("13.4.59", "nvidia/cu13/bin/ptxas", "nvidia-cuda-nvcc==13.4.59"),
}
_VERSION = re.compile(r"^\s*\.version\s+(\S+)", re.M)
INSTRUCTION = re.compile(r"^(?![.{}$)]|//)\S(?!.*:$)")


class CodeDiffers(SimError):
    """ptxas does not make the kernel's machine code out of its PTX."""


def find_ptxas(ptx: str) -> str:
    """The ptxas that belongs to a PTX text, by the version that it names; SimError if it is not installed."""
    version = _VERSION.search(ptx)
    if version is None:
        raise SimError("the PTX has no .version")
    if version[1] not in RELEASES:
        known = ", ".join(f"{v} (ptxas {release})" for v, (release, _, _) in RELEASES.items())
        raise SimError(f"no ptxas is known that makes the machine code of PTX {version[1]}: {known}")
    release, path, package = RELEASES[version[1]]
    for folder in sys.path:
        if (found := Path(folder, path)).exists():
            return str(found)
    raise SimError(f"ptxas {release}, which makes the machine code of PTX {version[1]}, is missing: install {package}")


def with_lines(ptx: str) -> str:
    """The PTX with a ``.loc`` of its own line before each instruction; locations that it has are dropped."""
    out, inside = [], False
    for number, line in enumerate(ptx.rstrip("\0").split("\n"), 1):
        text = line.strip()
        if text.startswith((".loc", ".file")):
            continue
        if inside and INSTRUCTION.match(text):
            out.append(f".loc 1 {number} 0")
        out.append(line)
        inside = inside or text == "{"
    return "\n".join(out) + '\n.file 1 "kernel.ptx"\n'


def assemble(ptx: str, cubin: bytes | None = None) -> dict[str, Code]:
    """The code of every kernel of a PTX module, by name, with PTX lines. ``cubin``: the machine code that runs, which
    ptxas has to make; CodeDiffers if it makes another."""
    return _assemble(ptx.rstrip("\0"), None if cubin is None else _code(cubin))


@functools.lru_cache(maxsize=64)
def _assemble(ptx, code):
    ptxas = find_ptxas(ptx)
    made = run_ptxas(ptxas, with_lines(ptx), "-lineinfo")
    if code is not None and _code(made) != code:
        raise CodeDiffers(
            f"{ptxas} makes other machine code of the PTX than the one that runs: it was compiled by another release "
            "of ptxas or with other options, and what is not known exactly is not timed"
        )
    return disassemble(made, lines=True)[1]


def _code(cubin):
    """Hash of the instructions of all kernels."""
    digest = hashlib.sha256()
    for name, text in sorted(code_sections(cubin).items()):
        digest.update(name.encode() + text)
    return digest.hexdigest()
