"""Matrix instructions of a warp but for products, and of a warpgroup: PTX ISA 9.7.14.5 (ldmatrix, stmatrix, movmatrix)
and 9.7.15 (wgmma)."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import PtxError
from .forms import as_list, form, suspending

_F16_TYPES = ("f16", "bf16")
_FP8_TYPES = ("e4m3", "e5m2")
_INT8_TYPES = ("s8", "u8")


# ---- ldmatrix, stmatrix, movmatrix ----------------------------------------------------------------
@form("ldmatrix.sync.aligned.m8n8.{num}[.{trans}][.{space}].b16", effect=True, num="x1|x2|x4", trans="trans",
      space="shared|shared::cta")  # fmt: skip
def load_matrix(gen, args, mods):
    destinations = as_list(args[0])
    if len(destinations) != int(mods.num[1]):
        raise PtxError(f"{len(destinations)} destinations for {mods.num}")
    result = gen.temp(f"X.matrices.load(w, {gen.address(args[1])}, {len(destinations)}, {bool(mods.trans)})")
    for j, register in enumerate(destinations):
        gen.write(register, f"{result}[{j}]", "u4")


_BYTES = {"b8": 8, "b8x16.b6x16_p32": 6, "b8x16.b4x16_p64": 4}


@form("ldmatrix.sync.aligned.m8n16.{num}[.{space}].{formats}", effect=True, num="x1|x2|x4",
      space="shared|shared::cta", formats="b8x16.b6x16_p32|b8x16.b4x16_p64")  # fmt: skip
@form("ldmatrix.sync.aligned.m16n16.{num}.{trans}[.{space}].{formats}", effect=True, num="x1|x2", trans="trans",
      space="shared|shared::cta", formats="|".join(_BYTES))  # fmt: skip
def load_byte_matrix(gen, args, mods):
    destinations, wide = as_list(args[0]), hasattr(mods, "trans")
    if len(destinations) != int(mods.num[1]) * (2 if wide else 1):
        raise PtxError(f"{len(destinations)} destinations for {mods.num}")
    result = gen.temp(
        f"X.matrices.load_bytes(w, {gen.address(args[1])}, {len(destinations)}, {wide}, {_BYTES[mods.formats]})"
    )
    for j, register in enumerate(destinations):
        gen.write(register, f"{result}[{j}]", "u4")


@form("stmatrix.sync.aligned.m16n8.{num}.trans[.{space}].b8", writes=False, effect=True, num="x1|x2|x4",
      space="shared|shared::cta")  # fmt: skip
def store_byte_matrix(gen, args, mods):
    sources = as_list(args[1])
    if len(sources) != int(mods.num[1]):
        raise PtxError(f"{len(sources)} sources for {mods.num}")
    gen.emit(f"X.matrices.store_bytes(w, {gen.address(args[0])}, ({', '.join(gen.read(x, 'u4') for x in sources)},))")


@form("stmatrix.sync.aligned.m8n8.{num}[.{trans}][.{space}].b16", writes=False, effect=True, num="x1|x2|x4",
      trans="trans", space="shared|shared::cta")  # fmt: skip
def store_matrix(gen, args, mods):
    sources = as_list(args[1])
    if len(sources) != int(mods.num[1]):
        raise PtxError(f"{len(sources)} sources for {mods.num}")
    values = ", ".join(gen.read(x, "u4") for x in sources)
    gen.emit(f"X.matrices.store(w, {gen.address(args[0])}, ({values},), {bool(mods.trans)})")


@form("movmatrix.sync.aligned.m8n8.trans.b16", effect=True)
def transpose_matrix(gen, args, mods):
    gen.write(args[0], f"X.matrices.transpose(w, {gen.read(args[1], 'u4')})", "u4")


# ---- wgmma ----------------------------------------------------------------------------------------
@dataclass(frozen=True)
class WgmmaSpec:
    """What the opcode and the immediates of a wgmma say: D (64 x n) = ± A (64 x k) B (k x n) + D."""

    n: int
    k: int
    result: str  # f16, f32 or s32
    a_type: str
    b_type: str
    negate: bool  # the product's sign: that of scale-a times scale-b
    transpose_a: bool  # M-major, in shared memory
    transpose_b: bool  # N-major
    clamp: bool = False  # satfinite
    selector: int | None = None  # of the metadata of a sparse A, None for a dense one

    @property
    def a_depth(self):
        """Raw elements of A along K: half of a sparse one is stored, eight single bits are a byte."""
        return self.k // 2 if self.selector is not None else self.b_depth

    @property
    def b_depth(self):
        return self.k // 8 if self.b_type == "b1" else self.k


def _same_family(a: str, b: str) -> bool:
    return a == b or any(a in family and b in family for family in (_FP8_TYPES, _INT8_TYPES))


_WGMMA_RESULTS = {
    "f16": ("f16", "f32"),
    "bf16": ("f32",),
    "tf32": ("f32",),
    "e4m3": ("f16", "f32"),
    "e5m2": ("f16", "f32"),
    "s8": ("s32",),
    "u8": ("s32",),
    "b1": ("s32",),
}
_WGMMA_K = {"f16": 16, "bf16": 16, "tf32": 8, "e4m3": 32, "e5m2": 32, "s8": 32, "u8": 32, "b1": 256}
_ALL_N = "|".join(str(n) for n in range(8, 257, 8))


@form("wgmma.mma_async[.{sparse}].sync.aligned.m64n{n}k{k}[.{satfinite}].{d}.{a}.{b}", effect=True, reads_first=True,
      sparse="sp", n=_ALL_N, k="8|16|32|64", satfinite="satfinite", d="f16|f32|s32",
      a="f16|bf16|tf32|e4m3|e5m2|s8|u8", b="f16|bf16|tf32|e4m3|e5m2|s8|u8")  # fmt: skip
@form("wgmma.mma_async.sync.aligned.m64n{n}k{k}.{d}.{a}.{b}.and.popc", effect=True, reads_first=True, n=_ALL_N,
      k="256", d="s32", a="b1", b="b1")  # fmt: skip
def warpgroup_mma(gen, args, mods):
    """d, a (descriptor or four registers), b descriptor {, metadata, selector}, scale-d, and immediates: scale-a,
    scale-b (floats), then transposition of A (descriptor form) and B (16-bit types)."""
    sparse, clamp = bool(getattr(mods, "sparse", None)), bool(getattr(mods, "satfinite", None))
    depth = _WGMMA_K[mods.a] * (2 if sparse else 1)
    if mods.d not in _WGMMA_RESULTS[mods.a] or int(mods.k) != depth or not _same_family(mods.a, mods.b):
        raise PtxError(f"wgmma k{mods.k} of {mods.a} and {mods.b} to {mods.d} is not simulated")
    if mods.d == "s32" and int(mods.n) > 24 and int(mods.n) % 16:
        raise PtxError(f"wgmma m64n{mods.n} of integers: beyond 24, n is a multiple of 16")
    if clamp and mods.d != "s32":
        raise PtxError("satfinite exists for integer types only")
    accumulators, from_registers = args[0], isinstance(args[1], list)
    expected = int(mods.n) // (4 if mods.d == "f16" else 2)
    if len(accumulators) != expected:
        raise PtxError(f"{len(accumulators)} accumulator registers where {expected} are needed")
    rest, metadata, selector = list(args[3:]), "", None
    if sparse:
        metadata, selector = f", {gen.read(rest.pop(0), 'u4')}", int(rest.pop(0), 0)
        if selector > (1 if mods.a in (*_F16_TYPES, "tf32") else 0):
            raise PtxError(f"sparsity selector {selector} for {mods.a}")
    scale_d = rest.pop(0)
    immediates = [int(x, 0) for x in rest]
    scale_a = scale_b = 1
    if mods.d != "s32":
        scale_a, scale_b, *immediates = immediates
    if scale_a not in (1, -1) or scale_b not in (1, -1):
        raise PtxError("scales of A and B must be 1 or -1")
    transpose_a = transpose_b = 0
    if mods.a in _F16_TYPES:
        transpose_a, transpose_b = ([0] + immediates) if from_registers else immediates
    elif immediates:
        raise PtxError(f"unexpected operands {immediates}")
    a = "(" + ", ".join(gen.read(x, "u4") for x in args[1]) + ",)" if from_registers else gen.read(args[1], "u8")
    c = ", ".join(gen.read(x, "u4") for x in accumulators)
    scale_d = f"np.bool_({int(scale_d, 0) != 0})" if scale_d.lstrip("-").isdigit() else gen.predicate(scale_d)
    spec = WgmmaSpec(
        int(mods.n), int(mods.k), mods.d, mods.a, mods.b, scale_a * scale_b < 0, bool(transpose_a), bool(transpose_b),
        clamp, selector,
    )  # fmt: skip
    result = gen.temp(
        f"X.wgmma.multiply(w, {gen.fn(spec)}, {a}, {gen.read(args[2], 'u8')}, ({c},), {scale_d}{metadata})"
    )
    for j, register in enumerate(accumulators):
        gen.write(register, f"{result}[{j}]", "u4")


@form("wgmma.commit_group.sync.aligned", writes=False, effect=True)
def commit_group(gen, args, mods):
    gen.emit("X.wgmma.commit(w)")


@form("wgmma.fence.sync.aligned", writes=False)
def wgmma_fence(gen, args, mods):
    """Orders registers and shared memory before wgmma; accesses are in order anyway."""


suspending("wgmma.wait_group.sync.aligned", "wgmma.wait")
