"""What each SASS opcode is for, and how much work a tensor-core instruction does.

Opcode names: the instruction set reference of NVIDIA's "CUDA Binary Utilities"; those it leaves out were read from
disassembled kernels.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

# Classes in the order in which tables print them.
CLASSES = (
    "tensor mufu_ex2 mufu_other ffma fadd fmul ffma2 fadd2 fmul2 fmnmx half conv int_alu imad mov uniform shfl "
    "lds sts ldsm stsm atoms ldg stg ldgsts red tma ldtm sttm utccp local const sync branch other"
).split()
# Classes that the integer and logic pipe executes (64 lanes a clock and SM).
ALU_CLASSES = ("fmnmx", "conv", "int_alu")

_OPCODES_OF_CLASS = {
    "ffma": "FFMA FFMA32I",
    "fadd": "FADD FADD32I",
    "fmul": "FMUL FMUL32I",
    "ffma2": "FFMA2",
    "fadd2": "FADD2",
    "fmul2": "FMUL2",
    "fmnmx": "FMNMX FMNMX3 HMNMX2 VHMNMX",
    "half": "HFMA2 HADD2 HMUL2 HSETP2 HSET2 HADD2_32I HFMA2_32I",
    "conv": "F2FP F2F F2I I2F I2FP FRND F2IP I2IP",
    "mov": "MOV MOV32I CS2R UMOV R2UR S2R S2UR R2P P2R MOVM UP2UR UR2UP CS2UR",
    "imad": "IMAD IMUL IDP IDP4A",
    "shfl": "SHFL REDUX CREDUX VOTE VOTEU MATCH",
    "lds": "LDS",
    "sts": "STS STAS",
    "ldsm": "LDSM LDSM_U",
    "stsm": "STSM",
    "atoms": "ATOMS REDS",
    "ldg": "LDG LD",
    "stg": "STG ST",
    "ldgsts": "LDGSTS",
    "red": "RED REDG REDAS ATOM ATOMG",
    "ldtm": "LDTM LDT",
    "sttm": "STTM STT",
    "utccp": "UTCCP",
    "local": "LDL STL",
    "const": "LDC ULDC LDCU",
    "sync": "SYNCS SYNCS_U BAR DEPBAR LDGDEPBAR LDGBAR MEMBAR FENCE ERRBAR CGAERRBAR CCTL CCTLL CCTLT WARPGROUP "
    "WARPGROUPSET ELECT ARRIVES NANOSLEEP UCGABAR_ARV UCGABAR_WAIT UTCBAR PREEXIT B2R USETMAXREG",
    "branch": "BRA UBRA BRX BRXU JMP JMX JMXU EXIT CALL RET BREAK KILL RTT BPT BMOV WARPSYNC BSSY BSYNC YIELD ACQBULK "
    "ENDCOLLECTIVE",
    "other": "NOP PMTRIG LEPC GETLMEMBASE",
}
_CLASS_OF_OPCODE = {opcode: name for name, opcodes in _OPCODES_OF_CLASS.items() for opcode in opcodes.split()}
_TENSOR = re.compile(r"(HMMA|IMMA|QMMA|OMMA|DMMA|BMMA|HGMMA|QGMMA|IGMMA|BGMMA|UTC\w*MMA)$")
# Shapes of the warp-level MMAs, which their names write without separators.
_WARP_MMA_SHAPES = {
    "884": (8, 8, 4),
    "1684": (16, 8, 4),
    "1688": (16, 8, 8),
    "8816": (8, 8, 16),
    "16816": (16, 8, 16),
    "8832": (8, 8, 32),
    "16832": (16, 8, 32),
    "16864": (16, 8, 64),
}
_WARP_MMAS = ("HMMA", "IMMA", "QMMA", "OMMA", "BMMA", "DMMA")
# Multiple of the 16-bit rate at which the tensor cores execute an opcode.
_RATES = {"QGMMA": 2, "IGMMA": 2, "QMMA": 2, "IMMA": 2}
_TCGEN05 = {"UTCHMMA": (16, 1), "UTCQMMA": (32, 2), "UTCIMMA": (32, 2)}  # K of one instruction, rate
_LABEL_MODIFIER = re.compile(r"(\d+x\d+x\d+|\d{4,6}|F32|F16|BF16|E4M3|E5M2|S8|U8|S32|TF32|SP|2CTA)$")


def is_tensor(opcode: str) -> bool:
    return bool(_TENSOR.match(opcode))


def is_warpgroup_mma(opcode: str) -> bool:
    """WGMMA: one instruction for four warps, operands in shared memory."""
    return opcode in ("HGMMA", "QGMMA", "IGMMA", "BGMMA")


def is_tcgen05(opcode: str) -> bool:
    return opcode.startswith("UTC")


def classify(opcode: str, modifiers: list[str]) -> str:
    """One of ``CLASSES``. What is in no list is ALU work: IADD3, LOP3, SHF, LEA, SEL, ISETP, FSETP, PRMT …"""
    if is_tensor(opcode):
        return "tensor"
    if opcode == "MUFU":
        return "mufu_ex2" if "EX2" in modifiers else "mufu_other"
    if opcode == "IMAD" and "MOV" in modifiers:
        return "mov"
    if opcode in _CLASS_OF_OPCODE:
        return _CLASS_OF_OPCODE[opcode]
    if opcode.startswith(("UTMA", "UBLK")):
        return "tma"
    if opcode.startswith("UCGABAR"):
        return "sync"
    return "uniform" if opcode.startswith("U") else "int_alu"


@dataclass(frozen=True)
class TensorOperation:
    """One tensor-core instruction: ``flops`` per warp (per warpgroup for WGMMA, per SM for tcgen05) or None where the
    shape is behind a descriptor that was not found; bytes of its operands in shared memory; rate against 16-bit."""

    label: str
    flops: int | None
    smem_bytes: int
    rate: int


def tensor_operation(
    opcode: str, modifiers: list[str], operands: list[str], mn: tuple[int, int] | None = None
) -> TensorOperation:
    """``mn`` is the shape read from a tcgen05 instruction descriptor."""
    rate = _RATES.get(opcode, 1)
    label = ".".join([opcode] + [m for m in modifiers if _LABEL_MODIFIER.match(m)])
    for modifier in modifiers:
        if match := re.match(r"(\d+)x(\d+)x(\d+)$", modifier):
            m, n, k = map(int, match.groups())
            element = {16: 2, 32: 1}.get(k, 4)
            # One descriptor: A comes from registers if a register operand precedes it, else the descriptor names both.
            descriptors = sum("gdesc" in operand for operand in operands)
            from_registers = (
                descriptors == 1 and len(operands) >= 3 and operands[1].startswith("R") and operands[1][:2] != "RZ"
            )
            smem = n * k * element + (0 if from_registers else m * k * element)
            return TensorOperation(label + (".RS" if from_registers else ".SS"), 2 * m * n * k, smem, rate)
        if modifier in _WARP_MMA_SHAPES and opcode in _WARP_MMAS:
            m, n, k = _WARP_MMA_SHAPES[modifier]
            return TensorOperation(label, 2 * m * n * k, 0, rate)
    if is_tcgen05(opcode) and mn:
        k, rate = _TCGEN05.get(opcode, (16, 1))
        m = mn[0] // (2 if "2CTA" in modifiers else 1)  # a .2CTA instruction is shared by two SMs
        return TensorOperation(f"{label}.{mn[0]}x{mn[1]}x{k}", 2 * m * mn[1] * k, 0, rate)
    return TensorOperation(label, None, 0, rate)
