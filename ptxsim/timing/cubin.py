"""Cubins: disassembly through nvdisasm, assembly through ptxas, and per-kernel resources from the ELF sections."""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import SimError

# Attributes of .nv.info entries, named EIATTR_* by cuobjdump --dump-elf.
_ATTR_FRAME_SIZE, _ATTR_MIN_STACK, _ATTR_MAX_STACK, _ATTR_REGCOUNT = 0x11, 0x12, 0x23, 0x2F
_ATTR_MAX_THREADS, _ATTR_REQNTID = 0x05, 0x10
_FORMAT_SIZED = 4

_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w]*)((?:\.[\w:]+)*)\s*(.*?)\s*;")
_ENCODING_HIGH = re.compile(r"^\s*/\* (0x[0-9a-f]{16}) \*/")
_LABEL = re.compile(r"^(\.L_x?_?\w+|\$\S+):")
_PTX_LINE = re.compile(r"^\s*//## .*, line (\d+)")
_SECTION = re.compile(r"//-+ \.text\.(\S+)\s+-+")  # a short name is padded
_TARGET = re.compile(r"^\s*\.target\s+(sm_\w+)", re.M)
_ARCH = re.compile(r"EF_CUDA_SM(\d+)|\.target\s+sm_(\d+)")


NO_SCOREBOARD = 7


class ToolMissing(SimError):
    """A CUDA binary utility is not installed."""


@dataclass
class Instruction:
    """One SASS instruction and its control code: ``stall`` is its fixed stall count in cycles, ``wait`` its mask of
    awaited scoreboards; ``write_scoreboard`` is free when the result is there, ``read_scoreboard`` when the operands
    have been read (7: none). ``line``: of the source that it comes from, 0 where the listing has none."""

    address: int
    predicate: str | None
    opcode: str
    modifiers: list[str]
    operands: list[str]
    text: str
    stall: int = 1
    wait: int = 0
    write_scoreboard: int = NO_SCOREBOARD
    read_scoreboard: int = NO_SCOREBOARD
    line: int = 0

    @property
    def name(self) -> str:
        """The opcode with its modifiers."""
        return ".".join((self.opcode, *self.modifiers))

    @property
    def source(self) -> str:
        """The instruction as one writes it."""
        return " ".join(x for x in (self.predicate, self.name, ", ".join(self.operands)) if x)


@dataclass
class Code:
    """The instructions of one kernel, and the index at which each label stands."""

    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)


def find_tool(name: str) -> str:
    """Path of a CUDA binary utility: environment variable (its upper-case name), NVIDIA's wheels, then the PATH."""
    wheels = [Path(folder, "nvidia/cu13/bin", name) for folder in sys.path]
    for candidate in (os.environ.get(name.upper()), *wheels, shutil.which(name)):
        if candidate and Path(candidate).exists():
            return str(candidate)
    raise ToolMissing(f"{name} not found: install nvidia-cuda-{name} (extra 'perf'), or set {name.upper()} to its path")


def assemble_ptx(ptx: Path) -> bytes:
    """Cubin of a PTX file for the target it names; another ptxas than the DSL's own may differ by about 1 %."""
    text = ptx.read_text().rstrip("\0")
    if not _TARGET.search(text):
        raise ValueError(f"{ptx}: no .target directive, so this is no PTX")
    return run_ptxas(find_tool("ptxas"), text)


def run_ptxas(ptxas: str, ptx: str, *options: str) -> bytes:
    """The cubin that a ptxas makes of a PTX text, for the target that it names."""
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx)
        command = [ptxas, f"-arch={_TARGET.search(ptx)[1]}", "-O3", *options, str(source), "-o", str(cubin)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SimError(f"{ptxas} refuses the PTX: {done.stderr.strip()[:400]}")
        return cubin.read_bytes()


def kernel_resources(cubin: bytes) -> dict[str, dict[str, int]]:
    """Per kernel ``regs``, ``frame``, ``min_stack``, ``max_stack``, ``static_smem``, ``code_bytes`` (bytes) and
    ``threads``; a key is absent where the cubin does not say."""
    section_table = struct.unpack_from("<Q", cubin, 0x28)[0]
    entry_size, count, names_index = struct.unpack_from("<HHH", cubin, 0x3A)
    headers = [struct.unpack_from("<IIQQQQIIQQ", cubin, section_table + i * entry_size) for i in range(count)]

    def string(offset: int) -> str:
        return cubin[offset : cubin.index(b"\0", offset)].decode(errors="replace")

    sections = [(string(headers[names_index][4] + header[0]), header) for header in headers]
    symbols = next(header for name, header in sections if name == ".symtab")
    symbol_names = headers[symbols[6]][4]

    def symbol(index: int) -> str:
        return string(symbol_names + struct.unpack_from("<I", cubin, symbols[4] + 24 * index)[0])

    resources: dict[str, dict[str, int]] = {}
    per_symbol = {_ATTR_REGCOUNT: "regs", _ATTR_FRAME_SIZE: "frame", _ATTR_MIN_STACK: "min_stack"}
    per_symbol[_ATTR_MAX_STACK] = "max_stack"
    for name, header in sections:
        offset, size = header[4], header[5]
        if name.startswith(".text."):
            resources.setdefault(name[6:], {})["code_bytes"] = size
        elif name.startswith(".nv.shared.") and "reserved" not in name:
            resources.setdefault(name[11:], {})["static_smem"] = size
        elif name.startswith(".nv.info"):
            for attribute, body in _info_entries(cubin, offset, offset + size):
                if name == ".nv.info" and attribute in per_symbol and len(body) == 8:
                    index, value = struct.unpack("<II", body)
                    resources.setdefault(symbol(index), {})[per_symbol[attribute]] = value
                elif attribute in (_ATTR_REQNTID, _ATTR_MAX_THREADS) and len(body) == 12:
                    x, y, z = struct.unpack("<III", body)
                    resources.setdefault(name[9:], {})["threads"] = x * y * z
    return resources


def _info_entries(cubin: bytes, offset: int, end: int):
    """(attribute, body) of the sized entries of one .nv.info section."""
    while offset + 4 <= end:
        form, attribute, value = struct.unpack_from("<BBH", cubin, offset)
        offset += 4
        if form == _FORMAT_SIZED:
            yield attribute, cubin[offset : offset + value]
            offset += value


def disassemble(cubin: bytes, lines: bool = False) -> tuple[int, dict[str, Code]]:
    """Compute capability (80, 90 …) and the code of every kernel, by name; with ``lines`` each instruction's source
    line, if the cubin has line information."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        result = subprocess.run(
            [find_tool("nvdisasm"), "-c", "-hex", *(["-g"] if lines else []), file.name], capture_output=True, text=True
        )
    if result.returncode:
        raise ValueError(f"nvdisasm: {result.stderr.strip()}")
    return parse_listing(result.stdout)


def parse_listing(listing: str) -> tuple[int, dict[str, Code]]:
    """The output of ``nvdisasm -c -hex``, as :func:`disassemble` gives it."""
    arch = _ARCH.search(listing)
    if not arch:
        raise ValueError("the listing names no architecture, so it is no output of nvdisasm")
    kernels: dict[str, Code] = {}
    code: Code | None = None
    source_line = 0
    for line in listing.splitlines():
        if section := _SECTION.match(line):
            code = kernels[section[1]] = Code()
        elif code is None:
            continue
        elif source := _PTX_LINE.match(line):
            source_line = int(source[1])
        elif label := _LABEL.match(line):
            code.labels[label[1]] = len(code.instructions)
        elif match := _INSTRUCTION.match(line):
            address, predicate, opcode, modifiers, rest = match.groups()
            operands = [operand.strip() for operand in rest.split(",")] if rest else []
            modifiers = modifiers.strip(".").split(".") if modifiers else []
            code.instructions.append(
                Instruction(int(address, 16), predicate, opcode, modifiers, operands, line.strip(), line=source_line)
            )
        elif (encoding := _ENCODING_HIGH.match(line)) and code.instructions:
            # Second half of the 128-bit encoding: it holds the scheduling control bits.
            bits = int(encoding[1], 16)
            last = code.instructions[-1]
            last.stall, last.wait = bits >> 41 & 15, bits >> 52 & 63
            last.write_scoreboard, last.read_scoreboard = bits >> 46 & 7, bits >> 49 & 7
    return int(arch[1] or arch[2]), kernels
