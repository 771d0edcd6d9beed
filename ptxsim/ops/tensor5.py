"""Tensor core of the fifth generation: PTX ISA 9.7.16 (tcgen05).

Simulated: alloc, dealloc, ld and st of 32x32b, 16x128b and 16x256b, mma of kinds f16, tf32 and f8f6f4 with
single-precision accumulators, commit, wait, fence. Refused: .ws, .sp, block scaling, cp, shift, 16x64b, 16x32bx2,
packing modes, ld.red, kind::i8, scale-input-d, collector buffers other than as hints.
"""

from __future__ import annotations

from ..errors import PtxError
from ..parser import Mem
from .forms import as_list, form, suspending

_GROUP = "cta_group::1|cta_group::2"
# registers of one repetition (.x1)
REGISTERS = {"32x32b": 1, "16x128b": 2, "16x256b": 4}
_REPEATS = "x1|x2|x4|x8|x16|x32|x64|x128"

suspending("tcgen05.alloc.{group}.sync.aligned[.{space}].b32", "h_tmem_alloc", group=_GROUP, space="shared|shared::cta")


@form("tcgen05.dealloc.{group}.sync.aligned.b32", writes=False, effect=True, group=_GROUP)
def dealloc(gen, args, mods):
    gen.emit(f"X.tmem_dealloc(w, {gen.read(args[0], 'u4')}, {gen.read(args[1], 'u4')})")


@form("tcgen05.relinquish_alloc_permit.{group}.sync.aligned", writes=False, effect=True, group=_GROUP)
def relinquish(gen, args, mods):
    gen.emit("X.tmem_relinquish(w)")


@form("tcgen05.fence::{side}", writes=False, side="before_thread_sync|after_thread_sync")
@form("tcgen05.wait::{what}.sync.aligned", writes=False, what="ld|st")
def ordering(gen, args, mods):
    """Loads and stores of tensor memory complete at once, in order."""


def _check_registers(mods, registers):
    expected = REGISTERS[mods.shape] * int(mods.num[1:])
    if len(registers) != expected:
        raise PtxError(f"{len(registers)} registers where {mods.shape}.{mods.num} has {expected}")


@form("tcgen05.ld.sync.aligned.{shape}.{num}.b32", effect=True, shape="|".join(REGISTERS), num=_REPEATS)
def load(gen, args, mods):
    registers = as_list(args[0])
    _check_registers(mods, registers)
    result = gen.temp(f"X.tmem_ld(w, {gen.address(args[1])}, {mods.shape!r}, {len(registers)})")
    for j, register in enumerate(registers):
        gen.write(register, f"{result}[{j}]", "u4")


@form("tcgen05.st.sync.aligned.{shape}.{num}.b32", writes=False, effect=True, shape="|".join(REGISTERS), num=_REPEATS)
def store(gen, args, mods):
    registers = as_list(args[1])
    _check_registers(mods, registers)
    values = ", ".join(gen.read(x, "u4") for x in registers)
    gen.emit(f"X.tmem_st(w, {gen.address(args[0])}, {mods.shape!r}, ({values},))")


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
    gen.emit(f"X.tc_commit(w, {gen.address(args[0])}, {multicast}, {gen.mask()})")


@form("tcgen05.mma.{group}.kind::{kind}[.collector::a::{buffer}]", writes=False, effect=True, group=_GROUP,
      kind="f16|tf32|f8f6f4", buffer="fill|use|lastuse|discard")  # fmt: skip
def mma(gen, args, mods):
    """[d], a (descriptor or tensor memory), b descriptor, instruction descriptor {, disabled lanes}, enable-input-d."""
    from_tmem = isinstance(args[1], Mem)
    a = gen.address(args[1]) if from_tmem else gen.read(args[1], "u8")
    rest = list(args[4:])
    disabled = "None"
    if rest and isinstance(rest[0], list):
        disabled = "(" + ", ".join(gen.read(x, "u4") for x in rest.pop(0)) + ",)"
    if len(rest) != 1:
        raise PtxError("scale-input-d is not simulated")
    enable = f"np.bool_({int(rest[0], 0) != 0})" if rest[0].lstrip("-").isdigit() else gen.predicate(rest[0])
    gen.emit(
        f"X.tc_mma(w, {mods.kind!r}, {mods.group == 'cta_group::2'}, {gen.address(args[0])}, {a}, {from_tmem}, "
        f"{gen.read(args[2], 'u8')}, {gen.read(args[3], 'u4')}, {enable}, {disabled}, {gen.mask()})"
    )
