"""ldmatrix, stmatrix, movmatrix and mma.sync (PTX ISA 9.7.14)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ptxsim.errors import MemoryFault, UninitializedRead
from tests.testing.ptx import run

SHARED = ".shared .align 128 .b8 buffer[4096];"
# copy 16 bytes a lane from the input to shared memory, and the address of a lane's 16-byte row
FILL = """mov.u32 %r50, buffer; mul.wide.u32 %rd1, %t, 16; add.s64 %rd2, %in0, %rd1; mad.lo.u32 %r51, %t, 16, %r50;
ld.global.v4.u32 {%r1, %r2, %r3, %r4}, [%rd2]; st.shared.v4.u32 [%r51], {%r1, %r2, %r3, %r4}; bar.sync 0;"""


def fragment_places(count):
    """Word j of lane i of an ldmatrix result: (matrix, row, first column)."""
    lane = np.arange(32)
    return [(j, lane // 4, lane % 4 * 2) for j in range(count)]


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix_and_stmatrix(count, transposed):
    matrices = np.random.default_rng(0).integers(0, 2**16, (4, 8, 8), dtype=np.uint16)
    trans = ".trans" if transposed else ""
    names = "{" + ", ".join(f"%r{10 + j}" for j in range(count)) + "}"
    store = "".join(
        f"mad.wide.u32 %rd5, %t, 4, %out0; st.global.u32 [%rd5+{128 * j}], %r{10 + j};" for j in range(count)
    )
    body = FILL + f"ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {names}, [%r51];" + store
    out = run(body, [matrices], [np.zeros((count, 32), np.uint32)], declarations=SHARED)
    source = matrices.swapaxes(1, 2) if transposed else matrices
    for j, row, column in fragment_places(count):
        np.testing.assert_array_equal(out[j] & 0xFFFF, source[j, row, column])
        np.testing.assert_array_equal(out[j] >> 16, source[j, row, column + 1])
    # and back: storing the fragments gives the matrices again
    body = (
        FILL
        + f"""ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {names}, [%r51]; add.u32 %r51, %r51, 1024;
    stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 [%r51], {names}; bar.sync 0; setp.lt.u32 %p1, %t, {8 * count};
    @%p1 ld.shared.v4.u32 {{%r1, %r2, %r3, %r4}}, [%r51]; add.s64 %rd6, %out0, %rd1;
    @%p1 st.global.v4.u32 [%rd6], {{%r1, %r2, %r3, %r4}};"""
    )
    out = run(body, [matrices], [np.zeros((4, 8, 8), np.uint16)], declarations=SHARED)
    np.testing.assert_array_equal(out[:count], matrices[:count])


@pytest.mark.parametrize("count", [1, 2])
def test_ldmatrix_of_bytes(count):
    """16 x 16, transposed: lane 4 c + t holds rows 4 t to 4 t + 3 of column c, then of column c + 8."""
    matrices = np.random.default_rng(3).integers(0, 256, (2, 16, 16), dtype=np.uint8)
    names = ", ".join(f"%r{10 + j}" for j in range(2 * count))
    store = "".join(
        f"mad.wide.u32 %rd5, %t, 4, %out0; st.global.u32 [%rd5+{128 * j}], %r{10 + j};" for j in range(2 * count)
    )
    body = FILL + f"ldmatrix.sync.aligned.m16n16.x{count}.trans.shared.b8 {{{names}}}, [%r51];" + store
    out = run(body, [matrices], [np.zeros((2 * count, 32, 4), np.uint8)], declarations=SHARED, target="sm_100a")
    for register, lane, byte in np.ndindex(2 * count, 32, 4):
        wanted = matrices[register // 2, lane % 4 * 4 + byte, lane // 4 + 8 * (register % 2)]
        assert out[register, lane, byte] == wanted


@pytest.mark.parametrize(("bits", "formats"), [(4, "b8x16.b4x16_p64"), (6, "b8x16.b6x16_p32")])
@pytest.mark.parametrize("wide", [False, True])
def test_ldmatrix_that_unpacks(bits, formats, wide):
    """Sixteen codes at the beginning of each row of 16 bytes become bytes, then move as bytes do."""
    codes = np.random.default_rng(4).integers(0, 1 << bits, (32, 16)).astype(np.uint8)
    stream = np.unpackbits(codes[..., None], axis=-1, bitorder="little")[..., :bits].reshape(32, -1)
    rows = np.full((32, 16), 0xEE, np.uint8)
    rows[:, : 2 * bits] = np.packbits(stream, axis=-1, bitorder="little")
    shape = "m16n16.x2.trans" if wide else "m8n16.x4"
    store = "".join(f"mad.wide.u32 %rd5, %t, 4, %out0; st.global.u32 [%rd5+{128 * j}], %r{10 + j};" for j in range(4))
    body = FILL + f"ldmatrix.sync.aligned.{shape}.shared.{formats} {{%r10, %r11, %r12, %r13}}, [%r51];" + store
    out = run(body, [rows], [np.zeros((4, 32, 4), np.uint8)], declarations=SHARED, target="sm_120a")
    for j, lane, byte in np.ndindex(4, 32, 4):
        row, column = 8 * j + lane // 4, lane % 4 * 4 + byte
        if wide:
            row, column = 16 * (j // 2) + lane % 4 * 4 + byte, lane // 4 + 8 * (j % 2)
        assert out[j, lane, byte] == codes[row, column]


@pytest.mark.parametrize("count", [1, 2, 4])
def test_stmatrix_of_bytes(count):
    """16 x 8, transposed: byte a + 2 b of lane 4 c + t goes to column c + 8 b of row 2 t + a."""
    words = np.random.default_rng(5).integers(0, 256, (32, count, 4), dtype=np.uint8)
    loads = "".join(
        f"mad.wide.u32 %rd1, %t, {4 * count}, %in0; ld.global.u32 %r{10 + j}, [%rd1+{4 * j}];" for j in range(count)
    )
    names = ", ".join(f"%r{10 + j}" for j in range(count))
    body = f"""{loads} mov.u32 %r50, buffer; mad.lo.u32 %r51, %t, 16, %r50;
    stmatrix.sync.aligned.m16n8.x{count}.trans.shared.b8 [%r51], {{{names}}}; bar.sync 0;
    setp.lt.u32 %p1, %t, {8 * count}; @%p1 ld.shared.v4.u32 {{%r1, %r2, %r3, %r4}}, [%r51];
    mad.wide.u32 %rd6, %t, 16, %out0; @%p1 st.global.v4.u32 [%rd6], {{%r1, %r2, %r3, %r4}};"""
    out = run(body, [words], [np.zeros((8 * count, 16), np.uint8)], declarations=SHARED, target="sm_100a")
    for lane, j, byte in np.ndindex(32, count, 4):
        assert out[8 * j + lane % 4 * 2 + byte % 2, lane // 4 + 8 * (byte // 2)] == words[lane, j, byte]


def test_movmatrix():
    matrix = np.random.default_rng(1).integers(0, 2**16, (8, 8), dtype=np.uint16)
    body = """mad.wide.u32 %rd1, %t, 4, %in0; ld.global.u32 %r1, [%rd1]; mad.wide.u32 %rd2, %t, 4, %out0;
    movmatrix.sync.aligned.m8n8.trans.b16 %r2, %r1; st.global.u32 [%rd2], %r2;"""
    np.testing.assert_array_equal(run(body, [matrix], [np.zeros_like(matrix)]), matrix.T)


def test_ldmatrix_faults():
    with pytest.raises(MemoryFault, match="misaligned: 16 bytes"):
        run(FILL + "add.u32 %r51, %r51, 8; ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r5, %r6, %r7, %r8}, [%r51];",
            [np.zeros((4, 8, 8), np.uint16)], [np.zeros(1)], declarations=SHARED)  # fmt: skip


def test_unwritten_operand_that_reaches_the_result():
    """Rows that nobody wrote are harmless as long as nothing that comes of them is stored."""
    matrices = np.ones((4, 8, 8), np.float16)
    body = (
        FILL
        + """ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r5, %r6, %r7, %r8}, [%r51+256]; mov.u32 %r9, 0;
    mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%r10, %r11, %r12, %r13}, {%r5, %r6, %r7, %r8}, {%r1, %r2},
      {%r9, %r9, %r9, %r9};
    mad.wide.u32 %rd5, %t, 4, %out0; st.global.u32 [%rd5], %r STORED;""".replace(" STORED", "{stored}")
    )
    # matrices 0 and 1 of the operand are written (rows 0-7 and 8-15 of its first half), 2 and 3 are not
    with pytest.raises(UninitializedRead, match="a NaN is written to global memory") as caught:
        run(body.replace("{stored}", "10"), [matrices], [np.zeros(32, np.float32)], declarations=SHARED)
    assert "ldmatrix" in caught.value.text and "shared memory 0x600" in str(caught.value)
    run(body.replace("{stored}", "1"), [matrices], [np.zeros(32, np.float32)], declarations=SHARED)


# ---- mma.sync ------------------------------------------------------------------------------------------------------

TORCH = {"f16": torch.float16, "bf16": torch.bfloat16, "e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2,
         "s8": torch.int8, "u8": torch.uint8, "tf32": torch.float32}  # fmt: skip
SIZE = {"f16": 2, "bf16": 2, "e4m3": 1, "e5m2": 1, "s8": 1, "u8": 1, "tf32": 4}


def elements(rng, shape, kind):
    """(stored elements, their values as float64)."""
    if kind in ("s8", "u8"):
        x = torch.from_numpy(rng.integers(*((-128, 128) if kind == "s8" else (0, 256)), shape)).to(TORCH[kind])
    else:
        x = torch.from_numpy(rng.integers(-16, 17, shape) / 8.0).to(TORCH[kind])
    return x, x.double().numpy()


def words(x):
    return x.contiguous().view(torch.uint8).numpy().view(np.uint32)


def a_registers(x, size):
    """PTX ISA's fragment of A: register = (k half, row half), lane = 4 * row + word in the half."""
    w = words(x)  # [16, K * size / 4]
    lane = np.arange(32)
    halves = w.shape[1] // 4
    return np.stack([w[lane // 4 + 8 * rh, lane % 4 + 4 * kh] for kh in range(halves) for rh in range(2)], 1)


def b_registers(x):
    w = words(x.T)  # [8, K * size / 4]: B is column major
    lane = np.arange(32)
    return np.stack([w[lane // 4, lane % 4 + 4 * kh] for kh in range(w.shape[1] // 4)], 1)


CASES = [("f16", "f16", k, d) for k in (8, 16) for d in ("f32", "f16")]
CASES += [("bf16", "bf16", k, "f32") for k in (8, 16)] + [("tf32", "tf32", k, "f32") for k in (4, 8)]
CASES += [(a, b, k, "s32") for a, b in (("s8", "s8"), ("u8", "s8"), ("u8", "u8")) for k in (16, 32)]
CASES += [(a, b, 32, d) for a, b in (("e4m3", "e4m3"), ("e5m2", "e4m3")) for d in ("f32", "f16")]


@pytest.mark.parametrize(("a_kind", "b_kind", "k", "result"), CASES)
def test_mma(a_kind, b_kind, k, result):
    rng = np.random.default_rng(7)
    a, a_values = elements(rng, (16, k), a_kind)
    b, b_values = elements(rng, (k, 8), b_kind)
    lane = np.arange(32)
    rows, columns = [lane // 4, lane // 4 + 8], lane % 4 * 2
    c = rng.integers(-100, 100, (16, 8)).astype({"f32": np.float32, "f16": np.float16, "s32": np.int32}[result])
    exact = a_values @ b_values + c
    pairs = [np.stack([c[r, columns], c[r, columns + 1]], 1) for r in rows]
    c_registers = np.ascontiguousarray(np.concatenate(pairs, 1)).view(np.uint32)  # [32, 4 or 2]
    a_regs, b_regs = a_registers(a, SIZE[a_kind]), b_registers(b)
    loads, names, at = "", [], 0
    for source, array in enumerate((a_regs, b_regs, c_registers)):
        mine = []
        for j in range(array.shape[1]):
            loads += (
                f"mad.wide.u32 %rd1, %t, {4 * array.shape[1]}, %in{source}; ld.global.u32 %r{10 + at}, [%rd1+{4 * j}];"
            )
            mine.append(f"%r{10 + at}")
            at += 1
        names.append("{" + ", ".join(mine) + "}")
    count = c_registers.shape[1]
    d = "{" + ", ".join(f"%r{60 + j}" for j in range(count)) + "}"
    stores = "".join(
        f"mad.wide.u32 %rd2, %t, {4 * count}, %out0; st.global.u32 [%rd2+{4 * j}], %r{60 + j};" for j in range(count)
    )
    types = f"{result}.{a_kind}.{b_kind}.{result}"
    body = loads + f"mma.sync.aligned.m16n8k{k}.row.col.{types} {d}, {', '.join(names)};" + stores
    out = run(body, [a_regs, b_regs, c_registers], [np.zeros((32, count), np.uint32)], target="sm_90a")
    got = np.zeros((16, 8))
    values = out.view(c.dtype).reshape(32, 2, 2)
    for half, r in enumerate(rows):
        got[r, columns], got[r, columns + 1] = values[:, half, 0], values[:, half, 1]
    if result == "s32":
        np.testing.assert_array_equal(got, exact)
    else:
        np.testing.assert_allclose(got, exact, rtol=2.0**-10 if result == "f16" else 1e-6)


@pytest.mark.parametrize(("a_kind", "b_kind"), [("s4", "s4"), ("u4", "s4"), ("u4", "u4")])
@pytest.mark.parametrize("k", [32, 64])
def test_four_bit_integers(a_kind, b_kind, k):
    """Eight elements a register, the first in the lowest bits; rows, columns and lanes as for 8 bits."""
    rng = np.random.default_rng(2)
    ranges = {"s4": (-8, 8), "u4": (0, 16)}
    a, b = rng.integers(*ranges[a_kind], (16, k)), rng.integers(*ranges[b_kind], (k, 8))

    def packed(x):  # [rows, k / 8] words
        shifted = (x & 15).astype(np.uint64).reshape(len(x), -1, 8) << (4 * np.arange(8, dtype=np.uint64))
        return shifted.sum(-1).astype(np.uint32)

    lane, wa, wb = np.arange(32), packed(a), packed(np.ascontiguousarray(b.T))
    a_regs = np.stack([wa[lane // 4 + 8 * rh, lane % 4 + 4 * kh] for kh in range(k // 32) for rh in (0, 1)], 1)
    b_regs = np.stack([wb[lane // 4, lane % 4 + 4 * kh] for kh in range(k // 32)], 1)
    text, names, at = "", [], 10
    for source, array in enumerate((a_regs, b_regs)):
        names.append("{" + ", ".join(f"%r{at + j}" for j in range(array.shape[1])) + "}")
        for j in range(array.shape[1]):
            text += f"mad.wide.u32 %rd1, %t, {4 * array.shape[1]}, %in{source}; ld.global.u32 %r{at}, [%rd1+{4 * j}];"
            at += 1
    text += f"""mov.u32 %r1, 100;
      mma.sync.aligned.m16n8k{k}.row.col.s32.{a_kind}.{b_kind}.s32 {{%r40, %r41, %r42, %r43}},
      {names[0]}, {names[1]}, {{%r1, %r1, %r1, %r1}}; mad.wide.u32 %rd2, %t, 16, %out0;
      st.global.v4.u32 [%rd2], {{%r40, %r41, %r42, %r43}};"""
    out = run(text, [a_regs, b_regs], [np.zeros((8, 4, 2, 2), np.int32)])  # row, t, row half, e
    np.testing.assert_array_equal(out.transpose(2, 0, 1, 3).reshape(16, 8), a @ b + 100)


@pytest.mark.parametrize(("m", "k"), [(8, 4), (16, 4), (16, 8), (16, 16)])
def test_double_precision(m, k):
    """One element a register: A (row, t), (row + 8, t), then the next four columns; B (t, column)."""
    rng = np.random.default_rng(4)
    a, b, c = rng.standard_normal((m, k)), rng.standard_normal((k, 8)), rng.standard_normal((m, 8))
    lane, halves = np.arange(32), m // 8
    a_regs = [a[lane // 4 + 8 * rh, lane % 4 + 4 * kq] for kq in range(k // 4) for rh in range(halves)]
    b_regs = [b[lane % 4 + 4 * kq, lane // 4] for kq in range(k // 4)]
    c_regs = [c[lane // 4 + 8 * rh, lane % 4 * 2 + e] for rh in range(halves) for e in range(2)]
    values = np.stack(a_regs + b_regs + c_regs, 1)
    text = "".join(f"mad.wide.u32 %rd1, %t, {8 * values.shape[1]}, %in0; ld.global.f64 %fd{10 + j}, [%rd1+{8 * j}];"
                   for j in range(values.shape[1]))  # fmt: skip
    names, at = [], 10
    for part in (a_regs, b_regs, c_regs):
        names.append("{" + ", ".join(f"%fd{at + j}" for j in range(len(part))) + "}")
        at += len(part)
    results = [f"%fd{40 + j}" for j in range(2 * halves)]
    text += f"mma.sync.aligned.m{m}n8k{k}.row.col.f64.f64.f64.f64 {{{', '.join(results)}}}, {', '.join(names)};"
    text += f"mad.wide.u32 %rd2, %t, {16 * halves}, %out0;"
    text += "".join(f"st.global.f64 [%rd2+{8 * j}], {x};" for j, x in enumerate(results))
    out = run(text, [values], [np.zeros((8, 4, halves, 2))])
    np.testing.assert_allclose(out.transpose(2, 0, 1, 3).reshape(m, 8), a @ b + c, rtol=1e-13)


def test_integer_saturation():
    """Without .satfinite sums wrap; with it they clamp."""
    body = """mov.u32 %r1, 0x7f7f7f7f; mov.u32 %r2, 0x7fffffff;
    mma.sync.aligned.m16n8k32.row.col{clamp}.s32.s8.s8.s32 {{%r10, %r11, %r12, %r13}}, {{%r1, %r1, %r1, %r1}},
      {{%r1, %r1}},
      {{%r2, %r2, %r2, %r2}}; mad.wide.u32 %rd2, %t, 4, %out0; st.global.u32 [%rd2], %r10;"""
    out = run(body.format(clamp=""), [], [np.zeros(32, np.int32)])
    np.testing.assert_array_equal(out, 2**31 - 1 + 32 * 127 * 127 - 2**32)
    out = run(body.format(clamp=".satfinite"), [], [np.zeros(32, np.int32)])
    np.testing.assert_array_equal(out, 2**31 - 1)
