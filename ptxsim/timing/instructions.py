"""What an instruction takes of an SM: its pipe, latency, reads of registers and passes through shared memory."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .cubin import Code, Instruction
from .gpus import Gpu

WARP = 32
QUARTERS = 4
# Pipes of the engine; 0: none beyond issue.
ALU, FMA, IMAD, XU, LSU, UNIFORM, TENSOR, CONVERT = range(1, 9)
PIPE_NAMES = {"alu": ALU, "fma": FMA, "imad": IMAD, "mufu": XU, "lsu": LSU, "uniform": UNIFORM, "mma_sync": TENSOR,
              "convert": CONVERT}  # fmt: skip

_FMA = {"FFMA", "FADD", "FMUL", "FFMA32I", "FADD32I", "FMUL32I", "HFMA2", "HADD2", "HMUL2", "FFMA2", "FADD2", "FMUL2"}
_MMA = {"HMMA", "IMMA", "QMMA", "DMMA", "BMMA"}
_IMAD = {"IMAD", "IMUL", "IDP"}
_XU = {"MUFU", "I2F", "F2I", "F2F", "FRND", "POPC", "FLO", "BREV"}
_SHARED = {"LDS", "STS", "LDSM", "STSM", "ATOMS"}
_REDUCTIONS = {"RED", "REDG", "ATOMG", "ATOM"}
_LSU = {*_SHARED, *_REDUCTIONS, "SHFL", "LDG", "STG", "LDGSTS", "LDL", "STL", "LD", "ST"}
_BRANCHES = {"BRA", "UBRA", "CALL", "RET"}
_CONTROL = {"SYNCS", "BAR", "HGMMA", "QGMMA", "IGMMA", "WARPGROUP", "EXIT", "NOP", "UTMALDG", "UTMASTG", "UTMAREDG",
            "UBLKCP", "UBLKRED", "S2R", "S2UR", "LDC", "WARPSYNC", "BSSY", "BSYNC", "DEPBAR", "USETMAXREG", "ELECT",
            "NANOSLEEP", "MEMBAR", "FENCE", "UTMACMDFLUSH", "LDGDEPBAR", "ARRIVES", "CCTL", "ERRBAR",
            "CGAERRBAR", "YIELD", "PREEXIT", "ACQBULK", *_BRANCHES}  # fmt: skip
_STORES = {"STS", "STG", "STL", "STSM", "ST", "ATOMS", *_REDUCTIONS}
_NO_DESTINATION = {*_STORES, "ISETP", "FSETP", "R2UR", "R2P", "BAR", "SYNCS"}
# Cycles of what has a scoreboard and no constant of its own: an order of magnitude.
_LATENCIES = {
    "S2R": 30,
    "S2UR": 30,
    "LDL": 40,
    "R2UR": 12,
    "VOTE": 12,
    "VOTEU": 12,
    "MEMBAR": 40,
    "B2R": 30,
    "REDUX": 30,
}
_DEFAULT_LATENCY = 20
READ_LATENCY = 12  # until the operands have been read, at most
PRODUCTS = ("HGMMA", "QGMMA", "IGMMA")


@dataclass(frozen=True)
class Cost:
    """What an instruction takes: ``taken`` cycles of a pipe, ``latency`` of its result, ``passes`` through shared
    memory, ``reduced`` bytes of reductions in global memory."""

    pipe: int
    taken: float
    latency: float
    passes: int
    reduced: int


def cost(i: Instruction, gpu: Gpu, conflicts: dict[int, float]) -> Cost:
    """The cost of an instruction. ``conflicts``: passes of an access to shared memory, by PTX line."""
    pipe, taken = _pipe(i, gpu)
    passes = reduced = 0
    if i.opcode in _SHARED:
        passes = round(conflicts.get(i.line, _width(i)))
    if i.opcode in _REDUCTIONS:
        reduced = WARP * 4 * _width(i)
    return Cost(pipe, taken, _latency(i, gpu), passes, reduced)


def _pipe(i: Instruction, gpu: Gpu) -> tuple[int, float]:
    op = i.opcode
    if op in _FMA:
        return FMA, WARP / gpu.fp32_lanes
    if op in _IMAD:
        return IMAD, WARP / gpu.imad_lanes
    if op in _XU:
        return XU, WARP / gpu.mufu_lanes
    if op in _MMA:
        return TENSOR, mma_sync_flops(i) * QUARTERS / gpu.mma_sync_flops
    if op in _LSU:
        return LSU, max(2, 2 * _width(i)) if op not in ("LDSM", "STSM") else 2 * _width(i)
    if op in _CONTROL:
        return 0, 1
    if op.startswith("U"):
        return UNIFORM, 2
    if op == "F2FP":
        return CONVERT, WARP / gpu.convert_lanes
    return ALU, WARP / gpu.alu_lanes


def _latency(i: Instruction, gpu: Gpu) -> float:
    op = i.opcode
    if op in _XU:
        return gpu.mufu_latency
    if op == "SHFL":
        return gpu.shuffle_latency
    if op in ("LDS", "LDSM", "ATOMS"):
        return gpu.shared_latency
    if op in ("LDG", "LD", "ATOMG", "ATOM"):
        return gpu.global_latency
    if op in ("LDC", "ULDC", "LDCU"):
        return gpu.constant_latency
    if op in _MMA:
        return gpu.mma_sync_latency
    return _LATENCIES.get(op, _DEFAULT_LATENCY)


def _width(i: Instruction) -> int:
    """Registers of a lane that an access to memory moves."""
    if i.opcode in ("LDSM", "STSM"):
        return next((int(m) for m in i.modifiers if m in ("1", "2", "4")), 1)
    return next((int(m) // 32 for m in i.modifiers if m in ("64", "128")), 1)


# Bits of an element by the modifiers that name its type; 16 where none does.
_BITS = {"TF32": 32, "F64": 64, "S8": 8, "U8": 8, "S4": 4, "U4": 4, "B1": 1, "E4M3": 8, "E5M2": 8}


def mma_sync_flops(i: Instruction) -> float:
    """FLOP of a warp's mma in units of 16-bit products, of which the tensor cores do twice as many as of 32 bits and
    half as many as of 8; HMMA.16816 is m16n8k16, DMMA.884 m8n8k4."""
    shape = next(m for m in i.modifiers if re.fullmatch(r"\d{3,5}", m))
    m, n, k = (16, 8, int(shape[3:])) if shape.startswith("168") else (int(shape[0]), int(shape[1]), int(shape[2:]))
    return 2 * m * n * k * _bits(i) / 16


def _bits(i):
    return max((_BITS[m] for m in i.modifiers if m in _BITS), default=16)


def product_shape(i: Instruction) -> tuple[int, int, bool, bool]:
    """Of a wgmma: FLOP in units of 16-bit products or, where it is of 8 bits, of such, bytes of operands in shared
    memory, whether it is of 8 bits, whether it ends a group."""
    m, n, k = map(
        int, next(re.match(r"(\d+)x(\d+)x(\d+)", x).groups() for x in i.modifiers if re.match(r"\d+x\d+x", x))
    )
    eight = i.opcode != "HGMMA"
    element = 1 if eight else _bits(i) // 8
    # the first source is a descriptor in uniform registers (gdesc), or a fragment in registers
    from_registers = bool(re.match(r"R\d", i.operands[1]))
    # of a sparse product half of A is there, and of its products half are computed
    stored = 2 if "SP" in i.modifiers else 1
    shared = n * k * element + (0 if from_registers else m * k * element // stored)
    return 2 * m * n * k * max(element, 2) // 2 // stored, shared, eight, "gsb0" in i.text


def register_reads(code: Code) -> list[int]:
    """Vector registers that each instruction reads from the register file, and not from the operand reuse cache."""
    reads, reused = [], {}
    for i in code.instructions:
        sources = i.operands if i.opcode in _NO_DESTINATION else i.operands[1:]
        count, now = 0, {}
        for slot, text in enumerate(sources):
            register = re.search(r"\bR(\d+)((?:\.\w+)*)", text)
            if not register:
                continue
            if reused.get(slot) != register[1]:
                count += _width(i) if i.opcode in _STORES and slot == len(sources) - 1 else 1
            if ".reuse" in text:
                now[slot] = register[1]
        reused = now
        reads.append(0 if i.opcode in PRODUCTS else count)
    return reads
