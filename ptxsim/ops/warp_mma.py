"""Matrix products of a warp: PTX ISA 9.7.14.5 (mma.sync) and 9.7.14.6 (mma.sp).

ptxas takes the modifiers of mma in any order (CUTLASS writes them in other orders than the ISA), so that the opcode is
taken apart here instead of by a template.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..errors import PtxError
from .forms import TABLE, Form, as_list
from .sparsity import metadata_threads

_SMALL = ("e4m3", "e5m2", "e3m2", "e2m3", "e2m1")
_TYPES = ("f16", "bf16", "tf32", "f32", "f64", *_SMALL, "s8", "u8", "s4", "u4", "b1", "s32", "ue8m0", "ue4m3")
# elements of A and B that go together -> (legal shapes, of sparse A, legal results)
_FAMILIES = {
    ("f16",): (("m16n8k8", "m16n8k16"), ("m16n8k16", "m16n8k32"), ("f16", "f32")),
    ("bf16",): (("m16n8k8", "m16n8k16"), ("m16n8k16", "m16n8k32"), ("f32",)),
    ("tf32",): (("m16n8k4", "m16n8k8"), ("m16n8k8", "m16n8k16"), ("f32",)),
    ("e4m3", "e5m2"): (("m16n8k16", "m16n8k32"), ("m16n8k64",), ("f16", "f32")),
    ("s8", "u8"): (("m8n8k16", "m16n8k16", "m16n8k32"), ("m16n8k32", "m16n8k64"), ("s32",)),
    ("s4", "u4"): (("m8n8k32", "m16n8k32", "m16n8k64"), ("m16n8k64", "m16n8k128"), ("s32",)),
    ("b1",): (("m8n8k128", "m16n8k128", "m16n8k256"), (), ("s32",)),
}
# kind -> the same for it, and scale factors of a row with the types that they may have
_KINDS = {
    "kind::f8f6f4": (_SMALL, "m16n8k32", "m16n8k64", ("f16", "f32"), {None: (0, ())}),
    "kind::mxf8f6f4": (_SMALL, "m16n8k32", "m16n8k64", ("f32",), dict.fromkeys((None, "1X"), (1, ("ue8m0",)))),
    "kind::mxf4": (("e2m1",), "m16n8k64", "m16n8k128", ("f32",), dict.fromkeys((None, "2X"), (2, ("ue8m0",)))),
    "kind::mxf4nvf4": (("e2m1",), "m16n8k64", "m16n8k128", ("f32",),
                       {"2X": (2, ("ue8m0",)), "4X": (4, ("ue4m3", "ue8m0"))}),
}  # fmt: skip
# how a byte holds a smaller element; mxf4 has two in a byte
_STORED = {"e2m1": "e2m1_mid", "e3m2": "e3m2_low", "e2m3": "e2m3_low"}
_BITS = {"f16": 16, "bf16": 16, "tf32": 32, "s4": 4, "u4": 4, "e2m1x2": 4, "b1": 1}


@dataclass(frozen=True)
class MmaSpec:
    """What the opcode of an mma says: D (m x 8) = A (m x k) B (k x 8) + C. Elements are keys of ``numerics.DECODE``."""

    m: int
    k: int
    a: str
    b: str
    result: str  # f16, f32 or s32
    clamp: bool = False  # satfinite
    operation: str = ""  # xor of single bits
    sparse: bool = False
    ordered: bool = False  # metadata
    vector: int = 0  # scale factors of a row, 0 without scaling
    scale: str = ""  # ue8m0 or ue4m3


def _modifiers(opcode):
    """The opcode's parts by meaning; PtxError for a part that is unknown, doubled, or missing."""
    found = {"types": [], "layouts": []}

    def note(name, value):
        if name in found:
            raise PtxError(f"{opcode}: two modifiers for {name}")
        found[name] = value

    for part in opcode.split(".")[1:]:
        if part in _TYPES:
            found["types"].append(part)
        elif part in ("row", "col"):
            found["layouts"].append(part)
        elif re.fullmatch(r"m\d+n\d+k\d+", part):
            note("shape", part)
        elif part in ("sync", "aligned", "satfinite", "popc", "block_scale"):
            note(part, True)
        elif part in ("xor", "and"):
            note("operation", part)
        elif part in ("sp", "sp::ordered_metadata"):
            note("sparse", part)
        elif part in _KINDS:
            note("kind", part)
        elif part in ("scale_vec::1X", "scale_vec::2X", "scale_vec::4X"):
            note("vector", part[-2:])
        else:
            raise PtxError(f"this form of the instruction is not simulated: {opcode}")
    if not {"sync", "aligned", "shape"} <= found.keys() or len(found["layouts"]) != 2:
        raise PtxError(f"this form of the instruction is not simulated: {opcode}")
    if len(found["types"]) != (5 if "block_scale" in found else 4):
        raise PtxError(f"{opcode} has {len(found['types'])} types")
    return found


def _spec(opcode, found):
    """``MmaSpec`` of everything but m8n8k4; PtxError for combinations that do not exist or are not simulated."""
    d, a, b, c = found["types"][:4]
    sparse, shape = "sparse" in found, found["shape"]
    vector, scale = 0, ""
    if "kind" in found:
        family, dense_shape, sparse_shape, results, vectors = _KINDS[found["kind"]]
        shapes = (sparse_shape,) if sparse else (dense_shape,)
        vector, scales = vectors.get(found.get("vector"), (-1, ()))
        scale = found["types"][4] if "block_scale" in found else ""
        good = vector >= 0 and bool(vector) == ("block_scale" in found) and scale in (scales or ("",))
        good = good and found.get("sparse") != "sp"
    else:
        family = next((f for f in _FAMILIES if a in f), ())
        dense_shapes, sparse_shapes, results = _FAMILIES.get(family, ((), (), ()))
        shapes = sparse_shapes if sparse else dense_shapes
        good = not {"block_scale", "vector"} & found.keys()
    bits = ("operation" in found, "popc" in found) == ((a == "b1",) * 2)
    good = good and bits and a in family and b in family and shape in shapes and d in results and c == d
    if not good or found["layouts"] != ["row", "col"] or ("satfinite" in found and (d != "s32" or a == "b1")):
        raise PtxError(f"{opcode} does not exist or is not simulated")
    m, k = int(shape[1 : shape.index("n")]), int(shape.split("k")[1])
    if "kind" in found:
        packed = found["kind"] in ("kind::mxf4", "kind::mxf4nvf4")
        a, b = ("e2m1x2" if packed else _STORED.get(x, x) for x in (a, b))
    return MmaSpec(m, k, a, b, d, "satfinite" in found, found.get("operation", ""), sparse,
                   found.get("sparse") == "sp::ordered_metadata", vector, scale)  # fmt: skip


def _check_counts(spec, d, a, b, c):
    chunks = spec.k * _BITS.get(spec.a, 8) // 128  # of 16 bytes along K
    results = spec.m // 4 // (2 if spec.result == "f16" else 1)
    expected = (results, spec.m // 8 * chunks // (2 if spec.sparse else 1), chunks, results)
    if tuple(map(len, (d, a, b, c))) != expected:
        raise PtxError(f"{len(d)}, {len(a)}, {len(b)} and {len(c)} registers where mma m{spec.m}n8k{spec.k} of "
                       f"{spec.a} has {expected[0]}, {expected[1]}, {expected[2]} and {expected[3]}")  # fmt: skip


def translate(gen, args, mods):
    """d, a, b, c {, metadata, selector} {, scale a, {byte, thread}, scale b, {byte, thread}}."""
    opcode = gen.instr.op
    found = _modifiers(opcode)
    d, a, b, c = (as_list(x) for x in args[:4])
    if found["types"][:4] == ["f64"] * 4:
        double(gen, found, d, a, b, c)
        return

    def read(registers):
        return "(" + ", ".join(gen.read(x, "u4") for x in registers) + ",)"

    if found["shape"] == "m8n8k4":
        call = f"X.warp_mma.quad(w, {quad(opcode, found, d, a, b, c)}, {read(a)}, {read(b)}, {read(c)})"
    else:
        spec = _spec(opcode, found)
        _check_counts(spec, d, a, b, c)
        rest, more = list(args[4:]), []
        if spec.sparse:
            metadata, selector = as_list(rest.pop(0))[0], int(rest.pop(0), 0)
            if not 0 <= selector < 4 // metadata_threads(spec.a, spec.k):
                raise PtxError(f"sparsity selector {selector} of {opcode}")
            more += [gen.read(metadata, "u4"), str(selector)]
        for _ in range(2 if spec.vector else 0):
            scales, (byte, thread) = as_list(rest.pop(0))[0], rest.pop(0)
            more += [gen.read(scales, "u4"), gen.read(byte, "u2"), gen.read(thread, "u2")]
        if rest:
            raise PtxError(f"{len(rest)} operands too many")
        call = f"X.warp_mma.multiply(w, {gen.fn(spec)}, {', '.join([read(a), read(b), read(c), *more])})"
    result = gen.temp(call)
    for j, register in enumerate(d):
        gen.write(register, f"{result}[{j}]", "u4")


def quad(opcode, found, d, a, b, c):
    """Text of the first arguments of ``quad_mma``; f16 may be added to f32, not the other way."""
    d_type, a_type, b_type, c_type = found["types"]
    counts = {"f16": 4, "f32": 8}
    good = len(found) == 5 and (a_type, b_type) == ("f16", "f16") and d_type in counts and c_type in counts
    if not good or (d_type, c_type) == ("f16", "f32"):
        raise PtxError(f"{opcode} does not exist or is not simulated")
    if (len(d), len(a), len(b), len(c)) != (counts[d_type], 2, 2, counts[c_type]):
        raise PtxError(f"{len(d)}, {len(a)}, {len(b)} and {len(c)} registers do not fit {opcode}")
    return f"{tuple(found['layouts'])}, {d_type!r}, {c_type!r}"


def double(gen, found, d, a, b, c):
    """Registers hold one element each; m8n8 exists with k4 alone."""
    m, k = re.fullmatch(r"m(\d+)n8k(\d+)", found["shape"]).groups() if "n8" in found["shape"] else ("", "")
    if (m, k) not in (("8", "4"), ("16", "4"), ("16", "8"), ("16", "16")) or found["layouts"] != ["row", "col"]:
        raise PtxError(f"mma {found['shape']} of f64 does not exist")
    if len(found) != 5:
        raise PtxError(f"modifiers of an mma of f64: {sorted(found)}")
    halves, quarters = int(m) // 8, int(k) // 4
    if (len(d), len(a), len(b), len(c)) != (2 * halves, halves * quarters, quarters, 2 * halves):
        raise PtxError(f"{len(d)}, {len(a)}, {len(b)} and {len(c)} registers do not fit mma {found['shape']} of f64")
    a, b, c = (", ".join(gen.read(x, "f8") for x in v) for v in (a, b, c))
    result = gen.temp(f"X.warp_mma.double(w, ({a},), ({b},), ({c},))")
    for j, register in enumerate(d):
        gen.write(register, f"{result}[{j}]", "f8")


_SYNTAX = "mma[.{sp|sp::ordered_metadata}].sync.aligned.{shape}.{kinds and types}, in any order"
TABLE["mma"] = [Form(_SYNTAX, re.compile(r"mma\..*"), translate, True, True, None, False)]
