"""Data movement: PTX ISA 9.7.9 (mov, ld, st, cvta, isspacep, mapa, getctarank, prefetch, createpolicy), and 9.7.13
(atom, red).

Cache operators, eviction priorities, prefetch sizes and cache policies are performance hints without functional meaning
and are accepted; memory-ordering semantics and scopes matter to the race detector only, since accesses are performed in
program order.
"""

from __future__ import annotations

import itertools

import numpy as np

from ..errors import PtxError
from .forms import KIND, SIZE, as_list, form
from .scopes import AccessOrder, scope_of

SHARED_WINDOW = np.uint64(1 << 60)  # generic addresses of shared memory carry this bit
_SPACE = "global|local|const|shared|shared::cta|shared::cluster"
_TYPE = "b8|b16|b32|b64|u8|u16|u32|u64|s8|s16|s32|s64|f16|bf16|f32|f64"
_HINTS = "[.{evict1}][.{evict2}][.{hint}][.{prefetch}]"
_HINT_NAMES = dict(
    evict1="L1::evict_normal|L1::evict_unchanged|L1::evict_first|L1::evict_last|L1::no_allocate",
    evict2="L2::evict_normal|L2::evict_first|L2::evict_last",
    hint="L2::cache_hint",
    prefetch="L2::64B|L2::128B|L2::256B",
)


def state_space(name: str | None) -> str:
    """The part of the machine that serves a state space."""
    if name is None:
        return "generic"
    return "shared" if name.startswith("shared") else "global_memory"


# ---- mov ------------------------------------------------------------------------------------------
@form("mov.{type}", type="pred|b16|b32|b64|u16|u32|u64|s16|s32|s64|f32|f64|f16|bf16")
def move(gen, args, mods):
    """Copies, packs a list into a wider register, or unpacks into a list ('_' drops a part)."""
    destination, source = args
    kind = KIND[mods.type]
    if kind != "b":
        kind = "u" + kind[1]
    if isinstance(destination, list):
        part = SIZE[kind] // len(destination)
        value = gen.read(source, kind)
        for j, register in enumerate(destination):
            if register != "_":
                shifted = f"({value} >> {kind}({8 * part * j}))" if j else value
                gen.write(register, f"{shifted}.astype(u{part})", f"u{part}")
    elif isinstance(source, list):
        part = SIZE[kind] // len(source)
        words = [f"{gen.read(x, f'u{part}')}.astype({kind})" for x in source]
        gen.write(destination, " | ".join([words[0]] + [f"({x} << {kind}({8 * part * j}))" for j, x in
                                                        enumerate(words) if j]), kind)  # fmt: skip
    else:
        gen.write(destination, gen.read(source, kind), kind)


# ---- ld, st ---------------------------------------------------------------------------------------
def _synchronise(gen, mods, operand, reads, writes):
    """Tell observers of an access that may synchronise: not a weak one."""
    acquires, releases = mods.sem in ("acquire", "acq_rel"), mods.sem in ("release", "acq_rel")
    order = AccessOrder(acquires, releases, reads, writes, scope_of(gen.instr.op))
    gen.tell("ordered_access", "w", gen.address(operand), repr(state_space(mods.space)), gen.fn(order), gen.mask())


def _count(mods) -> int:
    return int(mods.vec[1]) if mods.vec else 1


@form("ld.{space}[.{vec}].{type}", effect=True, space="param|param::entry", vec="v2|v4", type=_TYPE)
def load_parameter(gen, args, mods):
    """Of a parameter, or of an address in a register that ``mov`` took of one: that of the bytes on the host."""
    memory, kind = args[1], KIND[mods.type]
    parameters = gen.kernel.params
    if gen.kernel.regtype(memory.base) is not None:
        count = len(as_list(args[0]))
        values = gen.temp(f"X.global_memory.load(w, {gen.address(memory)}, {kind}, {count}, {gen.mask()})")
        for j, register in enumerate(as_list(args[0])):
            gen.write(register, f"{values}[{j}]", kind)
        return
    if memory.base not in parameters:
        raise PtxError(f"{memory.base} is not a kernel parameter")
    offset = parameters[memory.base][0] + memory.off
    for j, register in enumerate(as_list(args[0])):
        gen.write(register, f"X.symbols.param({offset + j * SIZE[kind]}, {kind})", kind)


@form(
    f"ld[.{{sem}}][.{{scope}}][.{{space}}]{_HINTS}[.{{vec}}].{{type}}",
    effect=True,
    sem="weak|volatile|relaxed|acquire",
    space=_SPACE,
    vec="v2|v4|v8",
    type=_TYPE,
    **_HINT_NAMES,
)
@form(f"ld[.{{sem}}][.{{space}}][.{{cop}}]{_HINTS}[.{{vec}}].{{type}}", effect=True, sem="weak", space=_SPACE,
      cop="ca|cg|cs|lu|cv", vec="v2|v4|v8", type=_TYPE, **_HINT_NAMES)  # fmt: skip
# the state space first, as ptxas takes it, too: FlashAttention-4's semaphores
@form("ld.{space}.{sem}.{scope}[.{vec}].{type}", effect=True, space="global", sem="relaxed|acquire", vec="v2|v4",
      type=_TYPE)  # fmt: skip
@form(f"ld.{{space}}[.{{cop}}].nc{_HINTS}[.{{vec}}].{{type}}", effect=True, space="global", cop="ca|cg|cs",
      vec="v2|v4|v8", type=_TYPE, **_HINT_NAMES)  # fmt: skip
def load(gen, args, mods):
    destinations, kind = as_list(args[0]), KIND[mods.type]
    if len(destinations) != _count(mods):
        raise PtxError(f"{len(destinations)} destinations for a vector of {_count(mods)}")
    address = gen.address(args[1])
    if getattr(mods, "sem", "weak") not in (None, "weak"):
        _synchronise(gen, mods, args[1], reads=True, writes=False)
    values = gen.temp(f"X.{state_space(mods.space)}.load(w, {address}, {kind}, {len(destinations)}, {gen.mask()})")
    for j, register in enumerate(destinations):
        gen.write(register, f"{values}[{j}]", kind)


@form(
    f"st[.{{sem}}][.{{scope}}][.{{space}}]{_HINTS}[.{{vec}}].{{type}}",
    effect=True,
    sem="weak|volatile|relaxed|release",
    space=_SPACE,
    vec="v2|v4|v8",
    type=_TYPE,
    **_HINT_NAMES,
)
@form(f"st[.{{sem}}][.{{space}}][.{{cop}}]{_HINTS}[.{{vec}}].{{type}}", effect=True, sem="weak", space=_SPACE,
      cop="wb|cg|cs|wt", vec="v2|v4|v8", type=_TYPE, **_HINT_NAMES)  # fmt: skip
def store(gen, args, mods):
    if mods.space == "const":
        raise PtxError("constant memory is not writable")
    sources, kind = as_list(args[1]), "u" + KIND[mods.type][1]
    if len(sources) != _count(mods):
        raise PtxError(f"{len(sources)} sources for a vector of {_count(mods)}")
    values = ", ".join(gen.read(x, kind) for x in sources)
    if getattr(mods, "sem", "weak") not in (None, "weak"):
        _synchronise(gen, mods, args[0], reads=False, writes=True)
    gen.emit(f"X.{state_space(mods.space)}.store(w, {gen.address(args[0])}, {kind}, ({values},), {gen.mask()})")


# ---- atom, red ------------------------------------------------------------------------------------
# operation -> types (PTX ISA 9.7.13, atom)
ATOMIC_TYPES = {
    "add": "u32|s32|u64|f16|f16x2|bf16|bf16x2|f32|f64",
    "min": "u32|s32|u64|s64|f16|f16x2|bf16|bf16x2",
    "max": "u32|s32|u64|s64|f16|f16x2|bf16|bf16x2",
    "and": "b32|b64",
    "or": "b32|b64",
    "xor": "b32|b64",
    "exch": "b32|b64",
    "cas": "b16|b32|b64",
    "inc": "u32",
    "dec": "u32",
}
_ATOMIC_SPACE = "global|shared|shared::cta|shared::cluster"


def _atomic(gen, args, mods, wanted):
    operation = mods.op
    count = _count(mods) if hasattr(mods, "vec") else 1
    kind = KIND[mods.type]
    operands = [as_list(x) for x in args[1:]]
    operands = operands[: 2 if operation == "cas" else 1]  # a cache policy may follow
    if any(len(x) != count for x in operands):
        raise PtxError(f"operands do not match a vector of {count}")
    values = ", ".join("(" + ", ".join(gen.read(x, kind) for x in group) + ",)" for group in operands)
    if not mods.type.startswith(("f", "bf")):
        _synchronise(gen, mods, args[0], reads=wanted, writes=True)
    return (
        f"X.atomics.update(w, {gen.address(args[0])}, {state_space(mods.space)!r}, {operation!r}, {mods.type!r}, "
        f"({values},), {gen.mask()}, {wanted})"
    )


def atomic(gen, args, mods):
    destinations = as_list(args[0])
    if destinations == ["_"]:
        gen.emit(_atomic(gen, args[1:], mods, False))
        return
    old = gen.temp(_atomic(gen, args[1:], mods, True))
    for j, register in enumerate(destinations):
        gen.write(register, f"{old}[{j}]", "u" + KIND[mods.type][1])  # old values come as bits


def reduction(gen, args, mods):
    gen.emit(_atomic(gen, args, mods, False))


# ptxas takes them in any order; the DSL writes space, scope, sem for atomics with an order, and sem last for no other
_HEADS = ("[.{sem}][.{scope}][.{space}].{op}", "[.{sem}].{space}.{scope}.{op}", ".{space}[.{scope}].{sem}.{op}")
for (_op, _types), _head in itertools.product(ATOMIC_TYPES.items(), _HEADS):
    _names = dict(sem="relaxed|acquire|release|acq_rel", space=_ATOMIC_SPACE, op=_op, hint="L2::cache_hint")
    for _root, _function, _writes in (("atom", atomic, True), ("red", reduction, False)):
        if _root == "red" and _op in ("exch", "cas"):
            continue
        # integer forms, forms of 16-bit floats, and vectors of floats in global memory
        form(f"{_root}{_head}[.{{hint}}].{{type}}", writes=_writes, effect=True, type=_types, **_names)(_function)
        if "f16" in _types:
            form(f"{_root}{_head}.noftz[.{{hint}}].{{type}}", writes=_writes, effect=True, type="f16|f16x2|bf16|bf16x2",
                 **_names)(_function)  # fmt: skip
            form(f"{_root}{_head}[.noftz][.{{hint}}].{{vec}}.{{type}}", writes=_writes, effect=True, vec="v2|v4|v8",
                 type="f32|f16|f16x2|bf16|bf16x2", **_names)(_function)  # fmt: skip


# ---- address conversion ---------------------------------------------------------------------------
@form("cvta[.{to}].{space}.{type}", to="to", space=_SPACE + "|param|param::entry", type="u32|u64")
def convert_address(gen, args, mods):
    """Generic addresses of shared memory carry a window bit; all other spaces are host addresses as they are."""
    kind = KIND[mods.type]
    x = gen.read(args[1], kind)
    if mods.space.startswith("shared"):
        x = f"{x} & {kind}(0xffffffff)" if mods.to else f"{gen.fn(SHARED_WINDOW)} | {x}"
    gen.write(args[0], x, kind)


@form("isspacep.{space}", space="global|local|shared|shared::cta|shared::cluster")
def is_in_space(gen, args, mods):
    gen.write(args[0], f"X.generic.is_space(w, {mods.space!r}, {gen.read(args[1], 'u8')})", "b")


@form("mapa[.{space}].{type}", space="shared::cluster", type="u32|u64")
def map_to_rank(gen, args, mods):
    kind = KIND[mods.type]
    gen.write(args[0], f"X.symbols.mapa({gen.read(args[1], kind)}, {gen.read(args[2], 'u4')}, {kind})", kind)


@form("getctarank[.{space}].{type}", space="shared::cluster", type="u32|u64")
def rank_of_address(gen, args, mods):
    gen.write(args[0], f"(({gen.read(args[1], KIND[mods.type])} >> 24) & 0xff).astype(u4)", "u4")


# ---- hints ----------------------------------------------------------------------------------------
@form("prefetch[.{space}].{level}", writes=False, space="global|local|param|const",
      level="L1|L2|L2::evict_last|L2::evict_normal|tensormap")  # fmt: skip
@form("prefetchu.L1", writes=False)
@form("applypriority[.global].L2::evict_normal", writes=False)
def hint(gen, args, mods):
    """No functional meaning."""


@form("createpolicy.fractional.{rest}.b64",
      rest="L2::evict_last|L2::evict_normal|L2::evict_first|L2::evict_unchanged")  # fmt: skip
@form("createpolicy.fractional.{rest}.{other}.b64",
      rest="L2::evict_last|L2::evict_normal|L2::evict_first|L2::evict_unchanged",
      other="L2::evict_first|L2::evict_unchanged")  # fmt: skip
@form("createpolicy.range[.global].{rest}[.{other}].b64",
      rest="L2::evict_last|L2::evict_normal|L2::evict_first|L2::evict_unchanged",
      other="L2::evict_first|L2::evict_unchanged")  # fmt: skip
@form("createpolicy.cvt.L2.b64")
def cache_policy(gen, args, mods):
    """Policies are hints: their value is never looked at."""
    gen.write(args[0], "u8(0)", "u8")
