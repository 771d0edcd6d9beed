"""Comparison and selection: PTX ISA 9.7.6 (setp, set, selp, slct), and setp of 16-bit floats, 9.7.7."""

from __future__ import annotations

from ..errors import PtxError
from . import numerics
from .floating import flush
from .forms import KIND, form

_SIGNS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_UNSIGNED = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
_INVERSE = {"lt": ">=", "le": ">", "gt": "<=", "ge": "<"}
_COMPARE = "eq|ne|lt|le|gt|ge|lo|ls|hi|hs|equ|neu|ltu|leu|gtu|geu|num|nan"
_TYPES = "b16|b32|b64|u16|u32|u64|s16|s32|s64|f16|bf16|f32|f64"
_FLOATS = ("f16", "bf16", "f32", "f64")


def _integer_comparison(gen, compare, type_name, a, b):
    kind = KIND[type_name]
    if compare in _UNSIGNED:
        kind, compare = "u" + kind[1], _UNSIGNED[compare]
    if compare not in _SIGNS or (type_name[0] == "b" and compare not in ("eq", "ne")):
        raise PtxError(f"comparison {compare} does not exist for {type_name}")
    return f"({gen.read(a, kind)} {_SIGNS[compare]} {gen.read(b, kind)})"


def _float_comparison(gen, compare, type_name, a, b, ftz):
    if type_name in ("f16", "bf16"):
        decode = gen.fn(numerics.f16_to_f32 if type_name == "f16" else numerics.bf16_to_f32)
        x, y = (gen.temp(f"{decode}({gen.read(v, 'u2')})") for v in (a, b))
    else:
        x, y = gen.read(a, KIND[type_name]), gen.read(b, KIND[type_name])
    if ftz:
        x, y = (gen.temp(f"{gen.fn(flush)}({v})") for v in (x, y))
    if compare in ("num", "nan"):
        either = f"(np.isnan({x}) | np.isnan({y}))"
        return either if compare == "nan" else f"np.logical_not{either}"
    if compare == "ne":
        return f"(({x} < {y}) | ({x} > {y}))"
    if compare in _SIGNS:
        return f"({x} {_SIGNS[compare]} {y})"
    ordered = compare[:-1]  # the unordered forms are also true where an operand is NaN
    if ordered == "ne":
        return f"({x} != {y})"
    if ordered == "eq":
        return f"np.logical_not(({x} < {y}) | ({x} > {y}))"
    if ordered not in _INVERSE:
        raise PtxError(f"comparison {compare} does not exist for {type_name}")
    return f"np.logical_not({x} {_INVERSE[ordered]} {y})"


def _comparison(gen, compare, type_name, a, b, ftz):
    if type_name in _FLOATS:
        return _float_comparison(gen, compare, type_name, a, b, ftz)
    return _integer_comparison(gen, compare, type_name, a, b)


@form("setp.{compare}[.{bool}][.{ftz}].{type}", compare=_COMPARE, bool="and|or|xor", type=_TYPES)
def set_predicate(gen, args, mods):
    """One or two predicates (``p|q``): the comparison and its complement, each combined with operand c."""
    if mods.ftz and mods.type not in ("f32", "f16"):
        raise PtxError(f".ftz does not exist for {mods.type}")
    result = gen.temp(_comparison(gen, mods.compare, mods.type, args[1], args[2], mods.ftz))
    destinations = args[0].split("|")
    complement = gen.temp(f"np.logical_not({result})") if len(destinations) > 1 else None
    if mods.bool:
        sign = {"and": "&", "or": "|", "xor": "^"}[mods.bool]
        c = gen.temp(gen.predicate(args[3]))
        result = f"({result} {sign} {c})"
        complement = complement and f"({complement} {sign} {c})"
    gen.write(destinations[0], result, "b")
    if complement:
        gen.write(destinations[1], complement, "b")


@form("set.{compare}[.{ftz}].{result}.{type}", compare=_COMPARE, result="u32|s32|f32", type=_TYPES)
def set_value(gen, args, mods):
    """All ones (integers) or 1.0 (f32) where the comparison holds."""
    if mods.ftz and mods.type not in ("f32", "f16"):
        raise PtxError(f".ftz does not exist for {mods.type}")
    test = _comparison(gen, mods.compare, mods.type, args[1], args[2], mods.ftz)
    if mods.result == "f32":
        gen.write(args[0], f"np.where({test}, f4(1), f4(0))", "f4")
    else:
        gen.write(args[0], f"np.where({test}, u4(0xffffffff), u4(0))", "u4")


@form("selp.{type}", type="pred|b16|b32|b64|u16|u32|u64|s16|s32|s64|f32|f64")
def select(gen, args, mods):
    kind = KIND[mods.type]
    if kind != "b":
        kind = "u" + kind[1]
    gen.write(
        args[0], f"np.where({gen.predicate(args[3])}, {gen.read(args[1], kind)}, {gen.read(args[2], kind)})", kind
    )


@form("slct[.{ftz}].{type}.{test}", type="b16|b32|b64|u16|u32|u64|s16|s32|s64|f32|f64", test="s32|f32")
def select_by_sign(gen, args, mods):
    """The first operand where the third is not negative, else the second."""
    if mods.ftz and mods.test != "f32":
        raise PtxError(".ftz does not exist for slct of s32")
    kind = "u" + KIND[mods.type][1]
    x = gen.read(args[3], KIND[mods.test])
    gen.write(args[0], f"np.where({x} >= 0, {gen.read(args[1], kind)}, {gen.read(args[2], kind)})", kind)
