"""Asynchronous stores and reductions to a cluster's shared memory (PTX ISA 9.7.9.13 st.async, 9.7.13.8 red.async), and
what is refused by name: multimem (9.7.9.16), which addresses the memories of several GPUs.
"""

from __future__ import annotations

from ..errors import PtxError
from .forms import KIND, as_list, form

_BYTES = "shared::cluster.mbarrier::complete_tx::bytes"


def _store(gen, args, values, kind, reduction):
    listed = ", ".join(gen.read(x, kind) for x in values)
    gen.emit(
        f"X.remote_stores.store(w, {gen.address(args[0])}, ({listed},), {gen.address(args[2])}, {reduction!r}, "
        f"{gen.mask()})"
    )


@form(f"st.async[.weak].{_BYTES}[.{{vector}}].{{type}}", writes=False, effect=True, vector="v2|v4",
      type="b32|u32|s32|f32|b64|u64|s64|f64")  # fmt: skip
def store(gen, args, mods):
    """[destination], value or {values}, [mbarrier]."""
    values, count = as_list(args[1]), int((mods.vector or "v1")[1:])
    kind = "u" + KIND[mods.type][1]
    if len(values) != count or count * int(kind[1]) > 16:
        raise PtxError(f"{len(values)} values of {kind[1]} bytes for a vector of {count}, at most 16 bytes")
    _store(gen, args, values, kind, None)


@form(f"red.async.relaxed.cluster.{_BYTES}.{{op}}.{{type}}", writes=False, effect=True, op="inc|dec", type="u32")
@form(f"red.async.relaxed.cluster.{_BYTES}.{{op}}.{{type}}", writes=False, effect=True, op="min|max|add",
      type="u32|s32")  # fmt: skip
@form(f"red.async.relaxed.cluster.{_BYTES}.{{op}}.{{type}}", writes=False, effect=True, op="and|or|xor", type="b32")
@form(f"red.async.relaxed.cluster.{_BYTES}.{{op}}.{{type}}", writes=False, effect=True, op="add", type="u64|s64")
def reduce(gen, args, mods):
    _store(gen, args, [args[1]], "u" + KIND[mods.type][1], (mods.op, mods.type))


_MULTIMEM = "add|min|max|and|or|xor"


@form("multimem.ld_reduce[.{sem}][.{scope}][.global].{op}[.acc::f32][.{vector}].{type}", op=_MULTIMEM,
      vector="v2|v4|v8", type="b32|b64|u32|u64|s32|s64|f16|f16x2|bf16|bf16x2|f32|f64")  # fmt: skip
@form("multimem.st[.{sem}][.{scope}][.global][.{vector}].{type}", vector="v2|v4|v8",
      type="b32|b64|u32|u64|s32|s64|f16|f16x2|bf16|bf16x2|f32|f64")  # fmt: skip
@form("multimem.red[.{sem}][.{scope}][.global].{op}[.{vector}].{type}", op=_MULTIMEM, vector="v2|v4|v8",
      type="b32|b64|u32|u64|s32|s64|f16|f16x2|bf16|bf16x2|f32|f64")  # fmt: skip
def multimem(gen, args, mods):
    raise PtxError(f"{gen.instr.op} addresses the memories of several GPUs; one GPU is simulated")
