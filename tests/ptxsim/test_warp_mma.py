"""mma.sync beyond the common shapes, mma.sp and block scaling (PTX ISA 9.7.14.3, 9.7.14.5, 9.7.14.6), by formulas for
where each lane holds what."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from ptxsim.errors import PtxError
from tests.ptxsim.test_tcgen05_mma import VALUES, sparse_rows
from tests.testing.ptx import run

LANE = np.arange(32)
BITS = {"b1": 1, "s4": 4, "u4": 4, "e2m1x2": 4, "f16": 16, "bf16": 16, "tf32": 32}
TORCH = {"f16": torch.float16, "bf16": torch.bfloat16, "tf32": torch.float32, "e4m3": torch.float8_e4m3fn,
         "e5m2": torch.float8_e5m2, "s8": torch.int8, "u8": torch.uint8}  # fmt: skip


def matrix(rng, rows, k, kind):
    """(values [rows, k] as float64, their bits as bytes [rows, bytes]); small formats as mma.sync wants them."""
    if kind in TORCH:
        low, high = {"s8": (-128, 128), "u8": (0, 256)}.get(kind, (-16, 17))
        x = torch.from_numpy(rng.integers(low, high, (rows, k)) / (1 if kind in ("s8", "u8") else 8)).to(TORCH[kind])
        return x.double().numpy(), x.contiguous().view(torch.uint8).numpy()
    if kind in ("b1", "s4", "u4"):
        bits = BITS[kind]
        values = rng.integers(-8, 8, (rows, k)) if kind == "s4" else rng.integers(0, 1 << bits, (rows, k))
        codes = (values & (1 << bits) - 1).astype(np.uint8)
    else:
        table = np.array(VALUES[kind[:4]])
        codes = rng.integers(0, 2 * len(table), (rows, k)).astype(np.uint8)
        values = np.concatenate([table, -table])[codes]
        if kind != "e2m1x2":  # e2m1 in the middle of a byte, 6 bits in its low end
            return values, codes << 2 if kind == "e2m1" else codes
        bits = 4
    stream = np.unpackbits(codes[..., None], axis=-1, bitorder="little")[..., :bits].reshape(rows, -1)
    return values.astype(float), np.packbits(stream, axis=-1, bitorder="little")


def fragment(raw):
    """Registers [32, count] of rows of bytes: register (16 bytes of K, eight rows), lane = 4 row + word."""
    words = np.ascontiguousarray(raw).view(np.uint32)
    return np.stack([words[LANE // 4 + 8 * h, LANE % 4 + 4 * j] for j in range(words.shape[1] // 4)
                     for h in range(len(raw) // 8)], 1)  # fmt: skip


def accumulators(c):
    """Registers of C [rows, 8]; f16 in pairs."""
    pairs = [c[LANE // 4 + 8 * h][LANE[:, None], (LANE % 4 * 2)[:, None] + [0, 1]] for h in range(len(c) // 8)]
    return np.ascontiguousarray(np.concatenate(pairs, 1)).view(np.uint32)


def matrix_of(registers, rows, dtype):
    """The inverse of ``accumulators``."""
    values = registers.view(dtype).reshape(32, rows // 8, 2)
    out = np.zeros((rows, 8), dtype)
    for h, e in itertools.product(range(rows // 8), range(2)):
        out[LANE // 4 + 8 * h, LANE % 4 * 2 + e] = values[:, h, e]
    return out


def issue(opcode, registers, count, rest="", more=(), target="sm_120a", **options):
    """Run one mma: ``registers`` of A, B and C [32, …], ``more`` single registers [32] as %r200 and up, ``rest`` the
    operands after C. Registers of D [32, count]."""
    loads, lists, at = "", [], 10
    for source, array in enumerate([*registers, *(np.asarray(x, np.uint32)[:, None] for x in more)]):
        first = at if source < 3 else 197 + source
        for j in range(array.shape[1]):
            loads += f"mad.wide.u32 %rd1, %t, {4 * array.shape[1]}, %in{source};"
            loads += f"ld.global.u32 %r{first + j}, [%rd1+{4 * j}];"
        lists.append("{" + ", ".join(f"%r{first + j}" for j in range(array.shape[1])) + "}")
        at += array.shape[1]
    d = "{" + ", ".join(f"%r{100 + j}" for j in range(count)) + "}"
    stores = "".join(
        f"mad.wide.u32 %rd2, %t, {4 * count}, %out0; st.global.u32 [%rd2+{4 * j}], %r{100 + j};" for j in range(count)
    )
    inputs = [np.ascontiguousarray(x) for x in registers] + [np.asarray(x, np.uint32) for x in more]
    body = f"{loads} {opcode} {d}, {', '.join(lists[:3])}{rest}; {stores}"
    return run(body, inputs, [np.zeros((32, count), np.uint32)], target=target, **options)


DTYPE = {"f32": np.float32, "f16": np.float16, "s32": np.int32}


def product(opcode, a_kind, b_kind, m, k, result, seed=1, stored=None, **options):
    """(D, C, values of A as stored, values of B) of one mma; ``stored``: columns of A that are stored."""
    rng = np.random.default_rng(seed)
    a_values, a = matrix(rng, m, stored or k, a_kind)
    b_values, b = matrix(rng, 8, k, b_kind)
    c = rng.integers(-100, 100, (m, 8)).astype(DTYPE[result])
    registers = [fragment(a), fragment(b), accumulators(c)]
    if "more" in options:
        options["more"] = options["more"](a_values)
    out = issue(opcode, registers, registers[2].shape[1], **options)
    return matrix_of(out, m, DTYPE[result]), c, a_values, b_values


INTEGERS = [(8, 16, "s8", "u8"), (8, 32, "u4", "s4"), (16, 16, "u8", "u8"), (16, 32, "s8", "s8"), (16, 64, "s4", "s4")]


@pytest.mark.parametrize(("m", "k", "a_kind", "b_kind"), INTEGERS)
def test_integers(m, k, a_kind, b_kind):
    opcode = f"mma.sync.aligned.m{m}n8k{k}.row.col.satfinite.s32.{a_kind}.{b_kind}.s32"
    d, c, a, b = product(opcode, a_kind, b_kind, m, k, "s32", target="sm_80")
    np.testing.assert_array_equal(d, a @ b.T + c)


@pytest.mark.parametrize(("m", "k"), [(8, 128), (16, 128), (16, 256)])
@pytest.mark.parametrize("operation", ["xor", "and"])
def test_single_bits(m, k, operation):
    opcode = f"mma.sync.aligned.m{m}n8k{k}.row.col.s32.b1.b1.s32.{operation}.popc"
    d, c, a, b = product(opcode, "b1", "b1", m, k, "s32", target="sm_90")
    bits = (a[:, None] != b[None]) if operation == "xor" else (a[:, None] * b[None] != 0)
    np.testing.assert_array_equal(d, bits.sum(2) + c)


@pytest.mark.parametrize("layouts", list(itertools.product(("row", "col"), repeat=2)))
@pytest.mark.parametrize(("d_kind", "c_kind"), [("f16", "f16"), ("f32", "f16"), ("f32", "f32")])
def test_quads(layouts, d_kind, c_kind):
    """m8n8k4: four products, each of two groups of four lanes."""
    rng = np.random.default_rng(2)
    a, b, c = (rng.integers(-16, 17, (4, *s)).astype(np.float16) for s in ((8, 4), (4, 8), (8, 8)))
    a_regs, b_regs = np.zeros((32, 4), np.float16), np.zeros((32, 4), np.float16)
    places = {"f16": np.zeros((32, 8), int), "f32": np.zeros((32, 8), int)}  # 8 row + column
    for lane in range(32):
        t, high, q = lane % 4, 4 * (lane >= 16), lane // 4 % 4
        for i in range(4):
            a_regs[lane, i] = a[q, t + high, i] if layouts[0] == "row" else a[q, i + high, t]
            b_regs[lane, i] = b[q, t, i + high] if layouts[1] == "row" else b[q, i, t + high]
        for i in range(8):
            places["f16"][lane, i] = 8 * (t + high) + i
            places["f32"][lane, i] = 8 * ((lane & 1) + (i & 2) + high) + (i & 4) + (lane & 2) + (i & 1)
    quads = (LANE // 4 % 4)[:, None]
    c_regs = c.reshape(4, 64)[quads, places[c_kind]].astype(DTYPE[c_kind])
    opcode = f"mma.sync.aligned.m8n8k4.{layouts[0]}.{layouts[1]}.{d_kind}.f16.f16.{c_kind}"
    registers = [np.ascontiguousarray(x).view(np.uint32) for x in (a_regs, b_regs, c_regs)]
    out = issue(opcode, registers, 4 if d_kind == "f16" else 8, target="sm_80").view(DTYPE[d_kind])
    exact = (np.matmul(a.astype(float), b.astype(float)) + c).reshape(4, 64)
    np.testing.assert_array_equal(out, exact[quads, places[d_kind]])


FLOATS = [("e4m3", "e5m2", 16, "", "f32"), ("e5m2", "e5m2", 16, "", "f16"), ("e4m3", "e4m3", 32, "", "f16")]
FLOATS += [(a, b, 32, ".kind::f8f6f4", d) for a, b in (("e2m1", "e4m3"), ("e3m2", "e2m1"), ("e5m2", "e2m3"))
           for d in ("f16", "f32")]  # fmt: skip


@pytest.mark.parametrize(("a_kind", "b_kind", "k", "kind", "result"), FLOATS)
def test_small_floats(a_kind, b_kind, k, kind, result):
    for text in (f"mma.sync.aligned.m16n8k{k}.row.col{kind}", f"mma.sync.aligned{kind}.m16n8k{k}.row.col"):
        d, c, a, b = product(f"{text}.{result}.{a_kind}.{b_kind}.{result}", a_kind, b_kind, 16, k, result)
        np.testing.assert_allclose(d, a @ b.T + c, rtol=1e-6 if result == "f32" else 2.0**-10)


# ---- block scaling -------------------------------------------------------------------------------------------------
def scales(rng, kind):
    """A random register of four scale factors in each lane, and their values [32, 4]."""
    codes = rng.integers(120, 135, (32, 4)) if kind == "ue8m0" else rng.integers(0, 0x7F, (32, 4))
    raw = np.ascontiguousarray(codes.astype(np.uint8))
    dtype = torch.float8_e8m0fnu if kind == "ue8m0" else torch.float8_e4m3fn
    return raw.view(np.uint32)[:, 0], torch.from_numpy(raw).view(dtype).double().numpy()


SCALED = [("mxf8f6f4", "", 1, "e4m3", "e2m1", "ue8m0"), ("mxf8f6f4", ".scale_vec::1X", 1, "e3m2", "e5m2", "ue8m0"),
          ("mxf4", "", 2, "e2m1x2", "e2m1x2", "ue8m0"), ("mxf4nvf4", ".scale_vec::2X", 2, "e2m1x2", "e2m1x2", "ue8m0"),
          ("mxf4nvf4", ".scale_vec::4X", 4, "e2m1x2", "e2m1x2", "ue4m3"),
          ("mxf4nvf4", ".scale_vec::4X", 4, "e2m1x2", "e2m1x2", "ue8m0")]  # fmt: skip


@pytest.mark.parametrize(("kind", "suffix", "vector", "a_kind", "b_kind", "scale"), SCALED)
@pytest.mark.parametrize("sparse", [False, True])
def test_block_scaling(kind, suffix, vector, a_kind, b_kind, scale, sparse):
    """Rows g and g + 8 are scaled by the lanes 4 g and 4 g + 1 of the selected pair, column g by the selected lane."""
    rng = np.random.default_rng(3)
    k = (64 if kind != "mxf8f6f4" else 32) * (2 if sparse else 1)
    a_words, a_scale = scales(rng, scale)
    b_words, b_scale = scales(rng, scale)
    types = ".".join(["f32", a_kind[:4], b_kind[:4], "f32", scale])
    for byte_a, thread_a, byte_b, thread_b in ((0, 0, 0, 0), (4 - vector, 1, (4 - vector) // 2 // vector * vector, 3)):
        rest = f"%r200, {{{byte_a}, {thread_a}}}, %r201, {{%rs1, %rs2}}"
        more, whole = [a_words, b_words], []
        if sparse:
            rest = f"%r202, 0, {rest}"

            def with_metadata(stored, more=more, whole=whole):
                rows, codes = sparse_rows(rng, stored, "packed" if vector > 1 else "e4m3")
                whole.append(rows)
                return [*more, metadata(codes, 8)]

        opcode = "mma.sp::ordered_metadata" if sparse else "mma"
        opcode += f".sync.aligned.m16n8k{k}.row.col.kind::{kind}.block_scale{suffix}.{types}"
        d, c, a, b = product(
            f"mov.u16 %rs1, {byte_b}; mov.u16 %rs2, {thread_b}; {opcode}", a_kind, b_kind, 16, k, "f32",
            rest=f", {rest}", more=with_metadata if sparse else lambda _, more=more: more,
            stored=k // 2 if sparse else None)  # fmt: skip
        rows = a_scale[4 * (np.arange(16) % 8) + 2 * thread_a + np.arange(16) // 8, byte_a : byte_a + vector]
        columns = b_scale[4 * np.arange(8) + thread_b, byte_b : byte_b + vector]
        a = whole[0] if sparse else a
        exact = (a * np.repeat(rows, k // vector, 1)) @ (b * np.repeat(columns, k // vector, 1)).T + c
        np.testing.assert_allclose(d, exact, rtol=1e-6, atol=1e-5 * np.abs(exact).max())


# ---- sparse A ------------------------------------------------------------------------------------------------------
def metadata(codes, bits, selector=0):
    """The register of each lane [32] for codes [16, chunks]; lanes that contribute nothing hold nonsense.

    16 bits and more: lane 4 g + t holds four chunks of row g in its lower half, of row g + 8 in its upper half. 8 bits
    and less: it holds eight chunks of row g if t is even, of row g + 8 otherwise. One lane of four holds 4 chunks a
    row, two 8, four 16; ``selector`` counts such groups.
    """
    out = np.random.default_rng(9).integers(0, 2**32, 32, dtype=np.uint32)
    lanes = codes.shape[1] // 4
    for g, t in itertools.product(range(8), range(lanes)):
        if bits > 8:
            mine = [*codes[g, 4 * t : 4 * t + 4], *codes[g + 8, 4 * t : 4 * t + 4]]
        else:
            mine = codes[g + 8 * (t % 2), 8 * (t // 2) : 8 * (t // 2) + 8]
        out[4 * g + selector * lanes + t] = sum(int(x) << 4 * i for i, x in enumerate(mine))
    return out


# types, K, selectors that exist
SPARSE = [("f16", "f16", 32, 2, "f32", ""), ("f16", "f16", 32, 2, "f16", ""), ("bf16", "bf16", 32, 2, "f32", ""),
          ("f16", "f16", 16, 4, "f32", ""), ("f16", "f16", 16, 4, "f16", ""), ("bf16", "bf16", 16, 4, "f32", ""),
          ("tf32", "tf32", 16, 2, "f32", ""), ("tf32", "tf32", 8, 4, "f32", ""),
          ("s8", "u8", 64, 1, "s32", ".satfinite"), ("u8", "s8", 32, 2, "s32", ""),
          ("u4", "s4", 128, 1, "s32", ""), ("s4", "s4", 64, 2, "s32", ".satfinite"),
          ("e4m3", "e5m2", 64, 1, "f32", ""), ("e2m1", "e3m2", 64, 1, "f16", ".kind::f8f6f4")]  # fmt: skip
SPARSE = [(variant, *case) for variant in ("sp::ordered_metadata", "sp") for case in SPARSE][:-1]  # no kinds for sp


@pytest.mark.parametrize(("variant", "a_kind", "b_kind", "k", "selectors", "result", "extra"), SPARSE)
def test_sparse(variant, a_kind, b_kind, k, selectors, result, extra):
    rng = np.random.default_rng(4)
    bits = BITS.get(a_kind, 8)
    opcode = f"mma.{variant}.sync.aligned.m16n8k{k}.row.col{extra}.{result}.{a_kind}.{b_kind}.{result}"
    for selector in range(selectors):
        whole = []

        def more(stored, selector=selector, whole=whole):
            rows, codes = sparse_rows(rng, stored, "packed" if bits == 4 else a_kind)
            whole.append(rows)
            return [metadata(codes, bits, selector)]

        d, c, _, b = product(
            opcode, a_kind, b_kind, 16, k, result, rest=f", %r200, {selector}", more=more, stored=k // 2
        )
        np.testing.assert_allclose(d, whole[0] @ b.T + c, rtol=2.0**-10 if result == "f16" else 1e-6)
    with pytest.raises(PtxError, match=f"sparsity selector {selectors} of"):
        product(opcode, a_kind, b_kind, 16, k, result, rest=f", %r200, {selectors}", more=more, stored=k // 2)


def test_selected_lane_of_the_isa():
    """PTX ISA 9.7.14.6.1: the sparsity selector of m16n8k16 names the one lane of four that is read. Here its row g
    keeps elements 0 and 1 of each four, row g + 8 elements 2 and 3; B is 2^i in row i."""
    ones = np.full((32, 2), 0x3C003C00, np.uint32)
    b = fragment(np.tile(2.0 ** (np.arange(16) % 4), (8, 1)).astype(np.float16).view(np.uint8))
    opcode = "mma.sp::ordered_metadata.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
    for selector in range(4):
        words = np.where(selector == LANE % 4, np.uint32(0xEEEE4444), np.uint32(0))  # 0 would be an error
        registers = [ones, b, np.zeros((32, 4), np.float32).view(np.uint32)]
        d = matrix_of(issue(opcode, registers, 4, f", %r200, {selector}", [words]), 16, np.float32)
        np.testing.assert_array_equal(d, np.repeat([4 * (1 + 2), 4 * (4 + 8)], 8)[:, None] * np.ones(8))


def test_order_of_metadata():
    """mma.sp takes two indices in any order, ordered_metadata only ascending ones."""
    registers = [np.zeros((32, 4), np.uint32), np.zeros((32, 4), np.uint32), np.zeros((32, 4), np.uint32)]
    opcode = "mma.{}.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32"
    more = [np.full(32, 0x11111111)]
    issue(opcode.format("sp"), registers, 4, ", %r200, 0", more)
    with pytest.raises(PtxError, match="sparsity metadata 0b0001 for f16: not two ascending indices"):
        issue(opcode.format("sp::ordered_metadata"), registers, 4, ", %r200, 0", more)


# ---- refused -------------------------------------------------------------------------------------------------------
REFUSED = [
    ("m16n8k16.row.row.f32.f16.f16.f32", (4, 2, 4, 4), "does not exist or is not simulated"),
    ("m16n8k32.row.col.f32.e2m1.e4m3.f32", (4, 2, 4, 4), "does not exist"),
    ("m16n8k16.row.col.f32.f16.f16.f16", (4, 2, 2, 4), "does not exist"),
    ("m16n8k128.row.col.s32.b1.b1.s32", (2, 1, 4, 4), "does not exist"),
    ("m16n8k16.row.col.satfinite.f32.f16.f16.f32", (4, 2, 4, 4), "does not exist"),
    ("m16n8k16.row.col.f32.f16.f16.f32", (2, 2, 4, 4), "4, 2, 2 and 4 registers where mma m16n8k16 of f16 has 4, 4, 2"),
    ("m8n8k4.row.col.f16.f16.f16.f32", (2, 2, 8, 4), "does not exist"),
    ("m16n8k64.row.col.kind::mxf4nvf4.block_scale.f32.e2m1.e2m1.f32.ue4m3", (4, 2, 4, 4), "does not exist"),
    ("m16n8k64.row.col.kind::mxf4.block_scale.f32.e2m1.e2m1.f32.ue4m3", (4, 2, 4, 4), "does not exist"),
    ("m16n8k16.row.col.fancy.f32.f16.f16.f32", (4, 2, 4, 4), "this form of the instruction is not simulated"),
    ("m16n8k16.row.col.f32.f16.f32", (4, 2, 4, 4), "has 3 types"),
    ("m16n8k8.m16n8k16.row.col.f32.f16.f16.f32", (4, 2, 4, 4), "two modifiers for shape"),
    ("sp.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32", (2, 2, 4, 4), "does not exist"),
]


@pytest.mark.parametrize(("opcode", "counts", "message"), REFUSED)
def test_what_is_refused(opcode, counts, message):
    with pytest.raises(PtxError, match=message) as caught:
        issue(
            f"mma.{opcode}" if "sync" in opcode else f"mma.sync.aligned.{opcode}",
            [np.zeros((32, n), np.uint32) for n in counts[:3]],
            counts[3],
        )
    assert opcode in caught.value.text


@pytest.mark.parametrize("selectors", ["{1, 0}, %r200, {0, 0}", "{0, 2}, %r200, {0, 0}", "{0, 0}, %r200, {0, 4}"])
def test_selectors_that_mean_nothing(selectors):
    opcode = "mma.sync.aligned.m16n8k64.row.col.kind::mxf4.block_scale.f32.e2m1.e2m1.f32.ue8m0"
    with pytest.raises(PtxError, match="selectors of scale factors: byte"):
        issue(opcode, [np.zeros((32, n), np.uint32) for n in (4, 2, 4)], 4, f", %r200, {selectors}", [np.zeros(32)])
