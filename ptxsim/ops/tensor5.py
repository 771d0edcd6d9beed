"""Tensor core of the fifth generation: PTX ISA 9.7.16 (tcgen05).

Refused: zero-column masks, sparse A of 64 rows a CTA but for .ws, tcgen05.shift at other lanes than 0. Collector
buffers and .fill, .use are hints.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..errors import PtxError
from .forms import KIND, NUMPY, as_list, form, suspending
from .instruction import Mem
from .numerics import EXTREMES

_GROUP = "cta_group::1|cta_group::2"
# registers of one repetition (.x1)
REGISTERS = {"32x32b": 1, "16x64b": 1, "16x128b": 2, "16x256b": 4, "16x32bx2": 1}
# shape with its multicast -> (bytes of a row, lane of each row; one column for each copy)
_ROWS = np.arange(128)
SHAPES = {
    "128x256b": (32, _ROWS[:, None]),
    "128x128b": (16, _ROWS[:, None]),
    "4x256b": (32, 32 * np.arange(4)[:, None]),
    "64x128b.warpx2::02_13": (16, np.arange(64)[:, None] + [0, 64]),
    "64x128b.warpx2::01_23": (16, (np.arange(64) % 32 + np.arange(64) // 32 * 64)[:, None] + [0, 32]),
    "32x128b.warpx4": (16, np.arange(32)[:, None] + [0, 32, 64, 96]),
}
_REPEATS = "x1|x2|x4|x8|x16|x32|x64|x128"

suspending(
    "tcgen05.alloc.{group}.sync.aligned[.{space}].b32",
    "tensor_memory.allocate",
    group=_GROUP,
    space="shared|shared::cta",
)


@form("tcgen05.dealloc.{group}.sync.aligned.b32", writes=False, effect=True, group=_GROUP)
def dealloc(gen, args, mods):
    gen.emit(f"X.tensor_memory.free(w, {gen.read(args[0], 'u4')}, {gen.read(args[1], 'u4')})")


@form("tcgen05.relinquish_alloc_permit.{group}.sync.aligned", writes=False, effect=True, group=_GROUP)
def relinquish(gen, args, mods):
    gen.emit("X.tensor_memory.relinquish(w)")


@form("tcgen05.fence::{side}", writes=False, side="before_thread_sync|after_thread_sync")
def fence(gen, args, mods):
    """Accesses to tensor memory are ordered as they are; observers are told."""
    gen.tell("tensor_fence", "w", gen.mask(), repr(mods.side))


@form("tcgen05.wait::{what}.sync.aligned", writes=False, what="ld|st")
def wait(gen, args, mods):
    """Loads and stores of tensor memory complete at once; observers are told."""
    gen.tell("tensor_wait", "w", repr(mods.what))


def _check_registers(mods, registers):
    expected = REGISTERS[mods.shape] * int(mods.num[1:])
    if len(registers) != expected or expected > 128:
        raise PtxError(f"{len(registers)} registers where {mods.shape}.{mods.num} has {expected}, at most 128")


def _second_half(mods, immediates):
    """The columns between the halves of 16x32bx2, which is an operand of this shape alone."""
    if len(immediates) != (mods.shape == "16x32bx2"):
        raise PtxError(f"{len(immediates)} immediates for {mods.shape}")
    return int(immediates[0], 0) if immediates else 0


@form("tcgen05.ld.sync.aligned.{shape}.{num}[.{pack}].b32", effect=True, shape="|".join(REGISTERS), num=_REPEATS,
      pack="pack::16b")  # fmt: skip
def load(gen, args, mods):
    registers = as_list(args[0])
    _check_registers(mods, registers)
    second = _second_half(mods, args[2:])
    result = gen.temp(
        f"X.tensor_memory.load(w, {gen.address(args[1])}, {mods.shape!r}, {len(registers)}, {second}, "
        f"{bool(mods.pack)})"
    )
    for j, register in enumerate(registers):
        gen.write(register, f"{result}[{j}]", "u4")


def reduced(words, operation, kind, absolute, nan):
    """The least or largest of each thread's registers [registers, n, 32] (uint32), as ``kind``."""
    values = words.view(NUMPY[kind])
    if kind != "f4":
        return (np.minimum if operation == "min" else np.maximum).reduce(values)
    found = EXTREMES[operation + (".NaN" if nan else "")].reduce(np.abs(values) if absolute else values)
    return np.where(np.isnan(found), np.uint32(0x7FFFFFFF).view(np.float32), found)


# ptxas takes the type before or after the operation: the ISA's syntax has it after, its example before
@form("tcgen05.ld.red.sync.aligned.{shape}.{num}.{op}[.{abs}][.{nan}].{type}", effect=True, destinations=2,
      shape="32x32b|16x32bx2", num=_REPEATS, op="min|max", abs="abs", type="f32|u32|s32")  # fmt: skip
@form("tcgen05.ld.red.sync.aligned.{shape}.{num}.{type}.{op}[.{abs}][.{nan}]", effect=True, destinations=2,
      shape="32x32b|16x32bx2", num=_REPEATS, op="min|max", abs="abs", type="f32|u32|s32")  # fmt: skip
def load_and_reduce(gen, args, mods):
    """Registers, result, [address] {, columns to the second half}. What a thread loads is what it reduces, with
    16x32bx2 too: ptxas makes that two instructions, one for each half of the warp (as run on sm_103a)."""
    registers, kind = as_list(args[0]), KIND[mods.type]
    _check_registers(mods, registers)
    if mods.num == "x1" or (kind != "f4" and (mods.abs or mods.nan)):
        raise PtxError(f"tcgen05.ld.red of {mods.num} {mods.type}: at least x2, and .abs and .NaN are for f32")
    second = _second_half(mods, args[3:])
    words = gen.temp(
        f"X.tensor_memory.load(w, {gen.address(args[2])}, {mods.shape!r}, {len(registers)}, {second}, False)"
    )
    options = f"{mods.op!r}, {kind!r}, {bool(mods.abs)}, {bool(mods.nan)}"
    found = gen.temp(f"{gen.fn(reduced)}({words}, {options})")
    for j, register in enumerate(registers):
        gen.write(register, f"{words}[{j}]", "u4")
    gen.write(args[1], found, kind)


@form("tcgen05.st.sync.aligned.{shape}.{num}[.{unpack}].b32", writes=False, effect=True, shape="|".join(REGISTERS),
      num=_REPEATS, unpack="unpack::16b")  # fmt: skip
def store(gen, args, mods):
    registers = as_list(args[-1])
    _check_registers(mods, registers)
    second = _second_half(mods, args[1:-1])
    values = ", ".join(gen.read(x, "u4") for x in registers)
    gen.emit(
        f"X.tensor_memory.store(w, {gen.address(args[0])}, {mods.shape!r}, ({values},), {second}, {bool(mods.unpack)})"
    )


@form(
    "tcgen05.commit.{group}.mbarrier::arrive::one[.{space}][.{multicast}].b64",
    writes=False,
    effect=True,
    group=_GROUP,
    space="shared::cluster",
    multicast="multicast::cluster",
)
def commit(gen, args, mods):
    multicast = gen.read(args[1], "u2") if mods.multicast else "None"
    gen.emit(f"X.tensor_memory.commit(w, {gen.address(args[0])}, {multicast}, {gen.mask()})")


_FORMAT_BITS = {None: 8, "b8x16.b6x16_p32": 6, "b8x16.b4x16_p64": 4}


@form("tcgen05.cp.{group}.{shape}[.{formats}]", writes=False, effect=True, group=_GROUP, shape="|".join(SHAPES),
      formats="b8x16.b6x16_p32|b8x16.b4x16_p64")  # fmt: skip
def copy(gen, args, mods):
    gen.emit(
        f"X.tcgen05_copy.copy(w, {mods.shape!r}, {mods.group == 'cta_group::2'}, {_FORMAT_BITS[mods.formats]}, "
        f"{gen.address(args[0])}, {gen.read(args[1], 'u8')}, {gen.mask()})"
    )


@form("tcgen05.shift.{group}.down", writes=False, effect=True, group=_GROUP)
def shift(gen, args, mods):
    gen.emit(f"X.tcgen05_copy.shift(w, {mods.group == 'cta_group::2'}, {gen.address(args[0])}, {gen.mask()})")


@dataclass(frozen=True)
class MmaForm:
    """What the opcode of a tcgen05.mma and its immediate say. ``vector``: scale factors of a row, 0 without scaling;
    ``input_scale``: D is multiplied by 2^-input_scale first."""

    kind: str
    pair: bool  # .cta_group::2
    a_in_tmem: bool
    stationary: bool  # .ws
    sparse: bool
    vector: int
    shift: bool  # .ashift
    input_scale: int


# kind -> scale factors in a row of A, by what the opcode says
_VECTORS = {
    "mxf8f6f4": {None: 1, "scale_vec::1X": 1, "block32": 1},
    "mxf4": {None: 2, "scale_vec::2X": 2, "block32": 2},
    "mxf4nvf4": {"scale_vec::2X": 2, "block32": 2, "scale_vec::4X": 4, "block16": 4},
}
_COLLECTOR = "fill|use|lastuse|discard"


@form("tcgen05.mma[.{sparse}].{group}.kind::{kind}[.{shift}][.collector::a::{buffer}]", writes=False, effect=True,
      sparse="sp", group=_GROUP, kind="f16|tf32|f8f6f4|i8", shift="ashift", buffer=_COLLECTOR)  # fmt: skip
@form("tcgen05.mma[.{sparse}].{group}.kind::{kind}.block_scale[.{vector}][.collector::a::{buffer}]", writes=False,
      effect=True, sparse="sp", group=_GROUP, kind="|".join(_VECTORS),
      vector="scale_vec::1X|scale_vec::2X|scale_vec::4X|block16|block32", buffer=_COLLECTOR)  # fmt: skip
@form("tcgen05.mma.{stationary}[.{sparse}].cta_group::1.kind::{kind}[.collector::{b}::{buffer}]", writes=False,
      effect=True, stationary="ws", sparse="sp", kind="f16|tf32|f8f6f4|i8", b="b0|b1|b2|b3",
      buffer=_COLLECTOR)  # fmt: skip
def mma(gen, args, mods):
    """[d], a (descriptor or tensor memory), b descriptor {, [metadata]}, instruction descriptor
    {, [scale a], [scale b]} {, disabled lanes}, enable-input-d {, scale-input-d or zero-column mask}."""
    from_tmem, stationary = isinstance(args[1], Mem), hasattr(mods, "stationary")
    a = gen.address(args[1]) if from_tmem else gen.read(args[1], "u8")
    sparse, scaled = bool(getattr(mods, "sparse", None)), hasattr(mods, "vector")
    rest, others = list(args[3:]), []
    if sparse:
        others.append(f"meta={gen.address(rest.pop(0))}")
    instruction = gen.read(rest.pop(0), "u4")
    vector = 0
    if scaled:
        vector = _VECTORS[mods.kind].get(mods.vector)
        if vector is None:
            raise PtxError(f"scale vectors of kind::{mods.kind}: {' or '.join(filter(None, _VECTORS[mods.kind]))}")
        others += [f"scale_a={gen.address(rest.pop(0))}", f"scale_b={gen.address(rest.pop(0))}"]
    elif not stationary and isinstance(rest[0], list):
        words = rest.pop(0)
        if len(words) != (8 if mods.group == "cta_group::2" else 4):
            raise PtxError(f"{len(words)} words of disabled output lanes")
        others.append("disabled=(" + ", ".join(gen.read(x, "u4") for x in words) + ",)")
    enable = rest.pop(0)
    enable = f"np.bool_({int(enable, 0) != 0})" if enable.lstrip("-").isdigit() else gen.predicate(enable)
    input_scale = 0
    if rest and stationary:
        others.append(f"zero_mask={gen.read(rest.pop(0), 'u8')}")
    elif rest and not scaled:
        input_scale = int(rest.pop(0), 0)
        if mods.kind not in ("f16", "tf32") or not 0 <= input_scale <= 15:
            raise PtxError(f"scale-input-d {input_scale} of kind::{mods.kind}: 0 to 15, and for f16 and tf32 only")
    if rest:
        raise PtxError(f"{len(rest)} operands too many")
    shift = bool(getattr(mods, "shift", None))
    if shift and (not from_tmem or mods.buffer in ("fill", "use")):
        raise PtxError("ashift takes A from tensor memory, and neither fill nor use of the collector")
    pair = getattr(mods, "group", "") == "cta_group::2"
    spec = MmaForm(mods.kind, pair, from_tmem, stationary, sparse, vector, shift, input_scale)
    gen.emit(
        f"X.tcgen05_mma.multiply(w, {gen.fn(spec)}, {gen.address(args[0])}, {a}, {gen.read(args[2], 'u8')}, "
        f"{instruction}, {enable}, dict({', '.join(others)}), {gen.mask()})"
    )
