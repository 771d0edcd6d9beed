"""tcgen05.mma of all kinds, tcgen05.cp and tcgen05.shift: images of tensor memory before and after (PTX ISA 9.7.16.9
and 9.7.16.10). Layouts are written here from the ISA's text and CUTLASS's element offsets; operands without swizzle."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from ptxsim.errors import MemoryFault, PtxError
from tests.ptxsim.test_tcgen05 import A_AT, B_AT, names, tensor_run
from tests.ptxsim.test_wgmma import place

COLUMNS = 128
D, META, SCALE_A, SCALE_B, A_IN = 0, 64, 72, 80, 96  # columns: D has at most 64 of them
SCALES = f"[{SCALE_A}], [{SCALE_B}]"
VALUES = {"e2m1": [0, 0.5, 1, 1.5, 2, 3, 4, 6]}
for _name, _e, _m in (("e3m2", 3, 2), ("e2m3", 2, 3)):
    VALUES[_name] = [
        (c & (1 << _m) - 1 | (1 << _m if c >> _m else 0)) * 2.0 ** (max(c >> _m, 1) - (1 << _e - 1) + 1 - _m)
        for c in range(32)
    ]
BITS = {"e2m1": 4, "e3m2": 6, "e2m3": 6}
CODE = {"f16": 0, "bf16": 1, "tf32": 2, "e4m3": 0, "e5m2": 1, "e2m3": 3, "e3m2": 4, "e2m1": 5, "u8": 0, "s8": 1}
TORCH = {"f16": torch.float16, "bf16": torch.bfloat16, "tf32": torch.float32, "e4m3": torch.float8_e4m3fn,
         "e5m2": torch.float8_e5m2, "s8": torch.int8, "u8": torch.uint8}  # fmt: skip


def tensor_program(instruction, tmem, shared=None, descriptors=(0, 0), idesc=0, mask=(), **options):
    """Fill the columns of ``tmem`` (128 or 256) and shared memory (steps of 2 KB), issue instructions. In them columns
    are immediates, %rd3 and %rd4 the descriptors, %r61 the instruction descriptor, %r62 up the mask; %p2 is true, %p3
    false. Returns tensor memory as it is then. ``tmem`` and ``shared`` of two CTAs: the first issues for both."""
    image = np.zeros(16384, np.uint8) if shared is None else shared
    pair = tmem.ndim == 3
    instruction = re.sub(r"\[(\w+)\]", r"[%r55+\1]", instruction)  # the allocation begins at 0
    columns, load, store = tmem.shape[-1], "", ""
    for at in range(0, columns, COLUMNS):
        load += "".join(f"ld.global.u32 %r{100 + j}, [%rd7+{4 * (at + j)}];" for j in range(COLUMNS))
        load += f"tcgen05.st.sync.aligned.32x32b.x128.b32 [%r56+{at}], {names(100, COLUMNS)};"
        store += f"tcgen05.ld.sync.aligned.32x32b.x128.b32 {names(100, COLUMNS)}, [%r56+{at}];"
        store += "tcgen05.wait::ld.sync.aligned;"
        store += "".join(f"st.global.u32 [%rd8+{4 * (at + j)}], %r{100 + j};" for j in range(COLUMNS))
    copy = "".join(
        f"ld.global.v4.u32 {{%r1, %r2, %r3, %r4}}, [%rd2+{2048 * i}];"
        f"st.shared.v4.u32 [%r51+{2048 * i}], {{%r1, %r2, %r3, %r4}};"
        for i in range(image.shape[-1] // 2048)
    )
    issuer, meet, commit = "", "bar.sync 0;", "mbarrier::arrive::one.shared::cluster.b64 [%r52];"
    if pair:
        issuer, meet = "setp.eq.and.u32 %p10, %c, 0, %p10;", "barrier.cluster.arrive; barrier.cluster.wait;"
        commit = "mbarrier::arrive::one.shared::cluster.multicast::cluster.b64 [%r52], %rs1;"
    words = "".join(f"mov.b32 %r{62 + j}, 0x{w:x};" for j, w in enumerate(mask))
    body = f"""mad.wide.u32 %rd2, %c, {image.shape[-1]}, %in0; mad.wide.u32 %rd2, %t, 16, %rd2;
    mad.lo.u32 %r51, %t, 16, %r50; {copy} mov.b16 %rs1, 3;
    mad.wide.u32 %rd7, %g, {4 * columns}, %in2; mad.wide.u32 %rd8, %g, {4 * columns}, %out0; {load}
    tcgen05.wait::st.sync.aligned;
    fence.proxy.async.shared::cta; tcgen05.fence::before_thread_sync; {meet} tcgen05.fence::after_thread_sync; {issuer}
    ld.global.u64 %rd3, [%in1]; ld.global.u64 %rd4, [%in1+8]; mov.u32 %r61, 0x{idesc:x}; {words}
    setp.eq.u32 %p2, %r61, %r61; setp.ne.u32 %p3, %r61, %r61; mov.b64 %rd5, 0x8000000000;
    @!%p10 bra WAIT; {instruction}
    tcgen05.commit.cta_group::1.{commit}
  WAIT: mbarrier.try_wait.parity.shared.b64 %p11, [%r52], 0; @!%p11 bra WAIT; tcgen05.fence::after_thread_sync;
    {store}"""
    inputs = [image, np.array(descriptors, np.uint64), np.ascontiguousarray(tmem)]
    return tensor_run(body, inputs, [np.zeros_like(tmem)], columns, image.shape[-1], pair=pair, **options)


def random_words(seed=0, columns=COLUMNS):
    return np.random.default_rng(seed).integers(0, 2**32, (128, columns), dtype=np.uint32)


def operand(rng, rows, k, kind, stored="shared"):
    """(bytes [rows, …] as they are stored, values [rows, k]). ``stored``: 'shared' (sixteen codes in 16 bytes, padded),
    'packed' (two a byte) or 'tensor' (in the middle of a byte)."""
    if kind not in BITS:
        if kind in ("s8", "u8"):
            x = torch.from_numpy(rng.integers(*((-128, 128) if kind == "s8" else (0, 256)), (rows, k))).to(TORCH[kind])
        else:
            x = torch.from_numpy(rng.integers(-16, 17, (rows, k)) / 8.0).to(TORCH[kind])
        return x.contiguous().view(torch.uint8).numpy(), x.double().numpy()
    bits = BITS[kind]
    codes = rng.integers(0, 1 << bits, (rows, k)).astype(np.uint8)
    magnitudes = np.array(VALUES[kind])
    values = np.concatenate([magnitudes, -magnitudes])[codes]
    if stored == "tensor":
        return codes << ((8 - bits) // 2), values
    stream = np.unpackbits(codes[..., None], axis=-1, bitorder="little")[..., :bits]
    if stored == "packed":
        return np.packbits(stream.reshape(rows, -1), axis=-1, bitorder="little"), values
    chunks = np.packbits(stream.reshape(rows, k // 16, -1), axis=-1, bitorder="little")
    return np.concatenate([chunks, np.zeros((rows, k // 16, 16 - chunks.shape[-1]), np.uint8)], -1).reshape(
        rows, k
    ), values


def in_shared(a_bytes, b_bytes):
    """(image, descriptors) of two K-major operands without swizzle, given as bytes [rows, bytes along K]."""
    parts, descriptors = [], []
    for raw, at in ((a_bytes, A_AT), (b_bytes, B_AT)):
        image, d = place(torch.from_numpy(raw), at, 0, False, 1)
        parts.append(image)
        descriptors.append((d & (1 << 46) - 1) | 1 << 46)
    return np.concatenate(parts), descriptors


def describe(a_kind, b_kind, m, n, result=1, flags=0):
    return result << 4 | CODE[a_kind] << 7 | CODE[b_kind] << 10 | n >> 3 << 17 | m >> 4 << 24 | flags


def in_tensor(tmem, column, a_bytes):
    """Rows of A in the lanes of tensor memory, from a column on."""
    words = np.ascontiguousarray(a_bytes).view(np.uint32)
    tmem[: len(words), column : column + words.shape[1]] = words


# ---- kinds without scaling -----------------------------------------------------------------------------------------
KINDS = [("f8f6f4", a, b) for a, b in (("e4m3", "e2m1"), ("e2m1", "e3m2"), ("e3m2", "e5m2"), ("e2m3", "e2m3"))]
KINDS += [("i8", "s8", "s8"), ("i8", "u8", "s8"), ("i8", "u8", "u8")]


@pytest.mark.parametrize(("kind", "a_kind", "b_kind"), KINDS)
@pytest.mark.parametrize("from_tmem", [False, True])
def test_kinds(kind, a_kind, b_kind, from_tmem):
    rng = np.random.default_rng(4)
    a, a_values = operand(rng, 128, 32, a_kind, "tensor" if from_tmem else "shared")
    b, b_values = operand(rng, 32, 32, b_kind)
    tmem = random_words()
    start = rng.integers(-1000, 1000, (128, 32))
    tmem[:, D : D + 32] = (start.astype(np.int32) if kind == "i8" else start.astype(np.float32)).view(np.uint32)
    if from_tmem:
        in_tensor(tmem, A_IN, a)
    image, descriptors = in_shared(np.zeros_like(a) if from_tmem else a, b)
    source = f"[{A_IN}]" if from_tmem else "%rd3"
    idesc = describe(a_kind, b_kind, 128, 32, result=2 if kind == "i8" else 1)
    out = tensor_program(f"tcgen05.mma.cta_group::1.kind::{kind} [{D}], {source}, %rd4, %r61, %p2;", tmem, image,
                         descriptors, idesc)  # fmt: skip
    got = out[:, D : D + 32].view(np.int32 if kind == "i8" else np.float32)
    np.testing.assert_array_equal(got, start + a_values @ b_values.T)
    np.testing.assert_array_equal(out[:, 32:], tmem[:, 32:])


def test_saturation_of_integers():
    a, b = np.full((128, 32), 127, np.uint8), np.full((32, 32), 127, np.uint8)
    image, descriptors = in_shared(a, b)
    tmem = np.full((128, COLUMNS), 0x7FFFFFF0, np.uint32)
    for flag, expected in ((8, 0x7FFFFFFF), (0, 0x7FFFFFF0 + 32 * 127 * 127 - 2**32)):
        out = tensor_program("tcgen05.mma.cta_group::1.kind::i8 [0], %rd3, %rd4, %r61, %p2;", tmem, image,
                             descriptors, describe("s8", "s8", 128, 32, result=2, flags=flag))  # fmt: skip
        assert (out[:, :32].view(np.int32) == expected).all()


@pytest.mark.parametrize(("kind", "element"), [("f16", "f16"), ("f8f6f4", "e5m2")])
def test_half_precision_accumulators(kind, element):
    """One f16 in the lower half of each word."""
    rng = np.random.default_rng(5)
    k = 16 if element == "f16" else 32
    a, a_values = operand(rng, 64, k, element)
    b, b_values = operand(rng, 8, k, element)
    image, descriptors = in_shared(a, b)
    start = rng.integers(-50, 50, (64, 8)).astype(np.float16)
    rows = 16 + np.arange(64) % 16 + np.arange(64) // 16 * 32  # at lane 16
    tmem = random_words()
    tmem[rows, :8] = start.view(np.uint16) | np.uint32(0xABCD0000)
    out = tensor_program(f"tcgen05.mma.cta_group::1.kind::{kind} [{16 << 16 | D}], %rd3, %rd4, %r61, %p2;", tmem, image,
                         descriptors, describe(element, element, 64, 8, result=0))  # fmt: skip
    got = (out[rows, :8] & 0xFFFF).astype(np.uint16).view(np.float16)
    np.testing.assert_allclose(got, start + a_values @ b_values.T, rtol=2.0**-10)
    others = np.setdiff1d(np.arange(128), rows)
    np.testing.assert_array_equal(out[others], tmem[others])


def f16_case(n=32, k=16, m=128, seed=6):
    rng = np.random.default_rng(seed)
    a, a_values = operand(rng, m, k, "f16")
    b, b_values = operand(rng, n, k, "f16")
    return a, b, a_values @ b_values.T


def test_lanes_that_keep_their_output():
    a, b, product = f16_case()
    image, descriptors = in_shared(a, b)
    mask = (0x80000001, 0, 0xFFFF0000, 0xFFFFFFFF)
    keep = np.unpackbits(np.array(mask, "<u4").view(np.uint8), bitorder="little").astype(bool)
    tmem = random_words()
    out = tensor_program("tcgen05.mma.cta_group::1.kind::f16 [0], %rd3, %rd4, %r61, {%r62, %r63, %r64, %r65}, %p3;",
                         tmem, image, descriptors, describe("f16", "f16", 128, 32), mask)  # fmt: skip
    np.testing.assert_array_equal(out[keep], tmem[keep])
    np.testing.assert_array_equal(out[~keep, :32].view(np.float32), product[~keep])


def test_scale_of_the_input():
    a, b, product = f16_case()
    image, descriptors = in_shared(a, b)
    tmem = np.full((128, COLUMNS), np.float32(48).view(np.uint32))
    out = tensor_program("tcgen05.mma.cta_group::1.kind::f16 [0], %rd3, %rd4, %r61, %p2, 4;", tmem, image, descriptors,
                         describe("f16", "f16", 128, 32))  # fmt: skip
    np.testing.assert_array_equal(out[:, :32].view(np.float32), product + 3)


def test_shift_of_a():
    """.ashift moves A in tensor memory after the mma has read it, within 32 lanes; the second mma reads that."""
    rng = np.random.default_rng(7)
    a, a_values = operand(rng, 128, 32, "e4m3")
    b, b_values = operand(rng, 8, 32, "e4m3")
    image, descriptors = in_shared(np.zeros_like(a), b)
    tmem = random_words()
    in_tensor(tmem, A_IN, a)
    out = tensor_program(
        f"tcgen05.mma.cta_group::1.kind::f8f6f4.ashift [0], [{A_IN}], %rd4, %r61, %p3;"
        f"tcgen05.mma.cta_group::1.kind::f8f6f4.ashift.collector::a::lastuse [8], [{A_IN}], %rd4, %r61, %p3;",
        tmem, image, descriptors, describe("e4m3", "e4m3", 128, 8), late=True)  # fmt: skip
    once = np.where(np.arange(128)[:, None] % 32 == 31, a_values, np.roll(a_values, -1, 0))
    np.testing.assert_array_equal(out[:, :8].view(np.float32), a_values @ b_values.T)
    np.testing.assert_array_equal(out[:, 8:16].view(np.float32), once @ b_values.T)


@pytest.mark.parametrize("m", [32, 64, 128])
@pytest.mark.parametrize(("kind", "element", "k"), [("f16", "bf16", 16), ("tf32", "tf32", 8), ("i8", "s8", 32)])
def test_weight_stationary(m, kind, element, k):
    """Layouts G, E and D: 128 / m parts of the columns, each on m lanes of its own."""
    rng = np.random.default_rng(8)
    a, a_values = operand(rng, m, k, element)
    b, b_values = operand(rng, 64, k, element)
    image, descriptors = in_shared(a, b)
    tmem = random_words()
    idesc = describe(element, element, m, 64, result=2 if kind == "i8" else 1)
    out = tensor_program(f"tcgen05.mma.ws.cta_group::1.kind::{kind}.collector::b1::fill [0], %rd3, %rd4, %r61, %p3;",
                         tmem, image, descriptors, idesc)  # fmt: skip
    parts = 128 // m
    got = out[:, : 64 // parts].view(np.int32 if kind == "i8" else np.float32).reshape(parts, m, 64 // parts)
    np.testing.assert_allclose(got.transpose(1, 0, 2).reshape(m, 64), a_values @ b_values.T, rtol=1e-6)
    np.testing.assert_array_equal(out[:, 64 // parts :], tmem[:, 64 // parts :])


@pytest.mark.parametrize("m", [32, 64, 128])
@pytest.mark.parametrize(("kind", "element", "k"), [("f16", "f16", 16), ("f8f6f4", "e3m2", 32)])
def test_weight_stationary_with_a_in_tensor_memory(m, kind, element, k):
    """Each part of the columns multiplies A in its own lanes, as FlashMLA's "dual gemm" has it."""
    rng = np.random.default_rng(18)
    a, a_values = operand(rng, 128, k, element, "tensor")  # 128 / m matrices of m rows
    b, b_values = operand(rng, 64, k, element)
    image, descriptors = in_shared(np.zeros((8, 32), np.uint8), b)
    tmem = random_words()
    in_tensor(tmem, A_IN, a)
    out = tensor_program(f"tcgen05.mma.ws.cta_group::1.kind::{kind} [0], [{A_IN}], %rd4, %r61, %p3;", tmem, image,
                         descriptors, describe(element, element, m, 64), race=True)  # fmt: skip
    width = 64 * m // 128
    for at in range(0, 128, m):
        mine = b_values[at // m * width : at // m * width + width]
        np.testing.assert_array_equal(out[at : at + m, :width].view(np.float32), a_values[at : at + m] @ mine.T)
    np.testing.assert_array_equal(out[:, width:], tmem[:, width:])


@pytest.mark.parametrize("scaled", [False, True])
def test_pair_with_a_in_tensor_memory(scaled):
    """128 rows by two CTAs: 64 lanes of each multiply with the first half of B's rows, 64 with the second."""
    rng = np.random.default_rng(19)
    element, k = ("e5m2", 32) if scaled else ("bf16", 16)
    (a0, v0), (a1, v1) = (operand(rng, 128, k, element) for _ in range(2))  # two matrices of 64 rows each
    b, b_values = operand(rng, 32, k, element)
    images, descriptors = zip(*(in_shared(np.zeros((8, 32), np.uint8), half) for half in np.split(b, 2)), strict=True)
    tmem = np.stack([random_words(1), random_words(2)])
    for words, a in zip(tmem, (a0, a1), strict=True):
        in_tensor(words, A_IN, a)
    opcode, idesc, scales = "kind::f16", describe(element, element, 128, 32), ""
    a_scale, b_scale = np.ones((2, 64)), np.ones(32)
    if scaled:
        opcode, scales = "kind::mxf8f6f4.block_scale", f"{SCALES}, "
        idesc = CODE[element] * 0x480 | 32 >> 3 << 17 | 1 << 23 | 1 << 27
        for words in tmem:
            words[:, SCALE_A : SCALE_A + 4] = 0x7F7F7F7F
            words[:, SCALE_B : SCALE_B + 4] = 0x7F7F7F7F
        a_scale, b_scale = 2.0 ** rng.integers(-3, 4, (2, 64)), 2.0 ** rng.integers(-3, 4, 32)
        for row in range(64):
            for cta in range(2):
                tmem[cta, row % 32 :: 32, SCALE_A + row // 32] = 127 + int(np.log2(a_scale[cta, row]))
        for row in range(32):  # sixteen rows of B in each half of the lanes
            tmem[:, row % 16 + 64 * (row // 16) :: 32, SCALE_B][:, :2] = 127 + int(np.log2(b_scale[row]))
    out = tensor_program(f"tcgen05.mma.cta_group::2.{opcode} [0], [{A_IN}], %rd4, %r61, {scales}%p3;", tmem,
                         np.stack(images), descriptors[0], idesc)  # fmt: skip
    for cta, values in enumerate((v0, v1)):
        for half in range(2):
            rows, columns = slice(64 * half, 64 * half + 64), slice(16 * half, 16 * half + 16)
            wanted = (values[rows] * a_scale[cta][:, None]) @ (b_values[columns] * b_scale[columns, None]).T
            np.testing.assert_allclose(out[cta, rows, :16].view(np.float32), wanted, rtol=1e-6)
    np.testing.assert_array_equal(out[..., 16:], tmem[..., 16:])


# ---- transposed tf32 ------------------------------------------------------------------------------------------------
ATOMS_OF_32 = 1 << 61 | 1 << 46  # 128-byte swizzle


def in_runs(image, raw, start, leading, stride):
    """Put a matrix [rows, 8, 4 bytes] into lines of 32 rows, four lines of K in a core. The next 32 rows are
    ``leading`` bytes on, the next core ``stride``; the 32-byte quarters of lines 1, 2 and 3 of 512 bytes change places
    in pairs, by halves, and both."""
    for (row, k), element in np.ndenumerate(raw.view(np.uint32)[..., 0]):
        at = start + row // 32 * leading + k // 4 * stride + k % 4 * 128
        place = row % 32 // 8 ^ at % 512 // 128
        image[at + place * 32 + row % 8 * 4 :][:4] = np.frombuffer(element.tobytes(), np.uint8)


@pytest.mark.parametrize("transposed", [1, 2, 3])
@pytest.mark.parametrize("stationary", [False, True])
def test_transposed_tf32(transposed, stationary):
    """A (bit 0) and B (bit 1) MN-major, in 128-byte swizzles of 32-byte atoms (CUTLASS's Layout_MN_SW128_32B_Atom)."""
    rng = np.random.default_rng(12)
    (a, a_values), (b, b_values) = (operand(rng, rows, 8, "tf32") for rows in (128, 64))
    image, descriptors = in_shared(a, b)
    for which, (raw, at, leading, stride) in enumerate(((a, 0, 1024, 512), (b, 8192 + 256, 512, 1024))):
        if transposed >> which & 1:
            image[8192 * which : 8192 * which + 8192] = 0x55
            in_runs(image, raw.reshape(len(raw), 8, 4), at, leading, stride)
            descriptors[which] = A_AT + at >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | ATOMS_OF_32
    tmem = random_words()
    opcode = f"tcgen05.mma{'.ws' if stationary else ''}.cta_group::1.kind::tf32"
    idesc = describe("tf32", "tf32", 128, 64, 1, transposed << 15)
    out = tensor_program(f"{opcode} [0], %rd3, %rd4, %r61, %p3;", tmem, image, descriptors, idesc, race=True)
    np.testing.assert_allclose(out[:, :64].view(np.float32), a_values @ b_values.T, rtol=1e-6)


@pytest.mark.parametrize(("element", "transposed", "swizzle"), [("tf32", 3, 2), ("tf32", 3, 0), ("tf32", 0, 1),
                                                                ("f16", 3, 1), ("f16", 0, 1)])  # fmt: skip
def test_swizzles_that_do_not_fit_the_element(element, transposed, swizzle):
    kind = "tf32" if element == "tf32" else "f16"
    descriptors = [A_AT >> 4 | 64 << 16 | 64 << 32 | 1 << 46 | swizzle << 61] * 2
    major = "MN" if transposed else "K"
    with pytest.raises(
        PtxError, match=f"of {major}-major {element}: 128-byte swizzles of 32-byte atoms are for MN-maj"
    ):
        tensor_program(f"tcgen05.mma.cta_group::1.kind::{kind} [0], %rd3, %rd4, %r61, %p3;", random_words(), None,
                       descriptors, describe(element, element, 128, 32, 1, transposed << 15))  # fmt: skip


# ---- block scaling -------------------------------------------------------------------------------------------------
def scales_in_tensor(tmem, rng, column, rows, vector, first_byte, kind):
    """Random scale factors in all four quarters of tensor memory: row r in lane r % 32 and column r // 32."""
    codes = rng.integers(120, 135, (rows, vector)) if kind == "ue8m0" else rng.integers(0, 0x7F, (rows, vector))
    raw = tmem.view(np.uint8).reshape(128, COLUMNS, 4)
    for row in range(rows):
        for quarter in range(4):
            at = raw[row % 32 + 32 * quarter, column + row // 32]
            at[first_byte : first_byte + vector] = codes[row]
    dtype = torch.float8_e8m0fnu if kind == "ue8m0" else torch.float8_e4m3fn
    return torch.from_numpy(codes.astype(np.uint8)).view(dtype).double().numpy()


SCALED = [
    ("mxf8f6f4", ".scale_vec::1X", 1, a, b, "ue8m0") for a, b in (("e4m3", "e5m2"), ("e2m1", "e4m3"), ("e3m2", "e2m3"))
]
SCALED += [("mxf8f6f4", "", 1, "e5m2", "e2m1", "ue8m0"), ("mxf8f6f4", ".block32", 1, "e4m3", "e4m3", "ue8m0")]
SCALED += [("mxf4", v, 2, "e2m1", "e2m1", "ue8m0") for v in ("", ".block32", ".scale_vec::2X")]
SCALED += [
    ("mxf4nvf4", ".block32", 2, "e2m1", "e2m1", "ue8m0"),
    ("mxf4nvf4", ".scale_vec::4X", 4, "e2m1", "e2m1", "ue8m0"),
]
SCALED += [("mxf4nvf4", v, 4, "e2m1", "e2m1", "ue4m3") for v in (".scale_vec::4X", ".block16")]


def scaled_case(kind, vector, a_kind, b_kind, scale_kind, a_id=0, b_id=0, n=48):
    """(tensor memory, image, descriptors, instruction descriptor, exact product)."""
    rng = np.random.default_rng(9)
    four = kind != "mxf8f6f4"
    stored, k = ("packed", 64) if four else ("shared", 32)
    a, a_values = operand(rng, 128, k, a_kind, stored)
    b, b_values = operand(rng, n, k, b_kind, stored)
    image, descriptors = in_shared(a, b)
    tmem = random_words()
    a_scale = scales_in_tensor(tmem, rng, SCALE_A, 128, vector, a_id, scale_kind)
    b_scale = scales_in_tensor(tmem, rng, SCALE_B, n, vector, b_id, scale_kind)
    types = 1 << 7 | 1 << 10 if four else CODE[a_kind] << 7 | CODE[b_kind] << 10
    idesc = types | n >> 3 << 17 | (scale_kind == "ue8m0") << 23 | 1 << 27 | a_id << 29 | b_id << 4
    exact = (a_values * np.repeat(a_scale, k // vector, 1)) @ (b_values * np.repeat(b_scale, k // vector, 1)).T
    return tmem, image, descriptors, idesc, exact


@pytest.mark.parametrize(("kind", "suffix", "vector", "a_kind", "b_kind", "scale_kind"), SCALED)
def test_block_scaling(kind, suffix, vector, a_kind, b_kind, scale_kind):
    for a_id, b_id in ((0, 0), (3, 1) if vector == 1 else (2, 0) if vector == 2 else (0, 0)):
        tmem, image, descriptors, idesc, exact = scaled_case(kind, vector, a_kind, b_kind, scale_kind, a_id, b_id)
        tmem[:, :48] = np.float32(1).view(np.uint32)
        out = tensor_program(
            f"tcgen05.mma.cta_group::1.kind::{kind}.block_scale{suffix} [0], %rd3, %rd4, %r61, {SCALES}, %p2;", tmem,
             image, descriptors, idesc)  # fmt: skip
        np.testing.assert_allclose(out[:, :48].view(np.float32), exact + 1, rtol=1e-6)


def test_block_scaling_with_a_in_tensor_memory():
    rng = np.random.default_rng(10)
    tmem, image, descriptors, idesc, _ = scaled_case("mxf4", 2, "e2m1", "e2m1", "ue8m0", n=8)
    a, a_values = operand(rng, 128, 64, "e2m1", "packed")
    _, b_values = operand(rng, 8, 64, "e2m1", "packed")
    image, descriptors = in_shared(np.zeros_like(a), _)
    in_tensor(tmem, A_IN, a)
    a_scale, b_scale = (
        scales_in_tensor(tmem, rng, c, rows, 2, 0, "ue8m0") for c, rows in ((SCALE_A, 128), (SCALE_B, 8))
    )
    out = tensor_program(
        f"tcgen05.mma.cta_group::1.kind::mxf4.block_scale.collector::a::discard [0], [{A_IN}], %rd4, %r61, {SCALES}, "
        "%p3;", tmem, image, descriptors, idesc)  # fmt: skip
    exact = (a_values * np.repeat(a_scale, 32, 1)) @ (b_values * np.repeat(b_scale, 32, 1)).T
    np.testing.assert_allclose(out[:, :8].view(np.float32), exact, rtol=1e-6)


def test_scale_factors_that_differ_between_quarters():
    tmem, image, descriptors, idesc, _ = scaled_case("mxf8f6f4", 1, "e4m3", "e4m3", "ue8m0")
    tmem[64 + 5, SCALE_A + 2] ^= 1
    with pytest.raises(PtxError, match="column 72: lanes 0 to 31 and 64 to 95 differ"):
        tensor_program(f"tcgen05.mma.cta_group::1.kind::mxf8f6f4.block_scale [0], %rd3, %rd4, %r61, {SCALES}, "
                       "%p3;", tmem, image, descriptors, idesc)  # fmt: skip


# ---- sparse A ------------------------------------------------------------------------------------------------------
PAIRS = [(i, j) for i in range(4) for j in range(i + 1, 4)]


def sparse_rows(rng, stored, kind):
    """(whole rows [m, 2 K'], codes [m, chunks]) from stored values [m, K'] and random places."""
    width = {"tf32": 2, "packed": 8}.get(kind, 4)
    codes = np.zeros((len(stored), stored.shape[1] * 2 // width), np.uint64)
    for at in np.ndindex(codes.shape):
        first, second = PAIRS[5 * rng.integers(2)] if width == 2 else PAIRS[rng.integers(6)]
        codes[at] = first | second << 2
    return whole_rows(stored, codes, kind), codes


def whole_rows(stored, codes, kind):
    width, whole = {"tf32": 2, "packed": 8}.get(kind, 4), np.zeros((len(stored), 2 * stored.shape[1]))
    for (row, c), code in np.ndenumerate(codes):
        mine = stored[row, c * width // 2 : (c + 1) * width // 2]
        if width == 2:
            whole[row, 2 * c + int(code & 3) // 2] = mine[0]
        else:
            for q, part in zip((int(code & 3), int(code) >> 2), np.split(mine, 2), strict=True):
                at = width * c + q * width // 4
                whole[row, at : at + len(part)] = part
    return whole


SPARSE = [("f16", "f16", 16), ("tf32", "tf32", 8), ("f8f6f4", "e4m3", 32), ("i8", "s8", 32)]


def metadata_in_tensor(tmem, kind, codes, selector=0, first=0):
    """Metadata of rows in as many lanes, from ``first`` on."""
    halves = tmem.view(np.uint16).reshape(128, COLUMNS, 2)
    for row, mine in enumerate(codes):
        if kind in ("f16", "tf32"):  # 16 bits for each half of K: lane 16 (row // 16) + 8 (half of K) + row % 8
            for half in range(2):
                bits = int(sum(int(c) << 4 * i for i, c in enumerate(mine[4 * half : 4 * half + 4])))
                halves[first + row // 16 * 16 + 8 * half + row % 8, META + selector, row // 8 % 2] = bits
        else:  # 64 bits of the row's own lane
            bits = sum(int(c) << 4 * i for i, c in enumerate(mine))
            tmem[first + row, META : META + 2] = [bits & 0xFFFFFFFF, bits >> 32]


@pytest.mark.parametrize(("kind", "element", "stored"), SPARSE)
@pytest.mark.parametrize("selector", [0, 1])
def test_sparse(kind, element, stored, selector):
    rng = np.random.default_rng(11)
    a, a_values = operand(rng, 128, stored, element)
    b, b_values = operand(rng, 16, 2 * stored, element)
    image, descriptors = in_shared(a, b)
    whole, codes = sparse_rows(rng, a_values, element)
    tmem = random_words()
    selector *= kind in ("f16", "tf32")
    metadata_in_tensor(tmem, kind, codes, selector)
    idesc = describe(element, element, 128, 16, result=2 if kind == "i8" else 1, flags=4 | selector)
    out = tensor_program(f"tcgen05.mma.sp.cta_group::1.kind::{kind} [0], %rd3, %rd4, [{META}], %r61, %p3;", tmem, image,
                         descriptors, idesc)  # fmt: skip
    got = out[:, :16].view(np.int32 if kind == "i8" else np.float32)
    np.testing.assert_allclose(got, whole @ b_values.T, rtol=1e-6)


@pytest.mark.parametrize(("kind", "element", "stored"), SPARSE)
@pytest.mark.parametrize("m", [32, 64, 128])
@pytest.mark.parametrize("from_tmem", [False, True])
def test_sparse_weight_stationary(m, kind, element, stored, from_tmem):
    """The metadata of m rows is in each m lanes; A, too, in tensor memory, where it may be others."""
    rng = np.random.default_rng(20)
    a, a_values = operand(rng, 128 if from_tmem else m, stored, element)
    b, b_values = operand(rng, 64, 2 * stored, element)
    image, descriptors = in_shared(a, b)
    _, codes = sparse_rows(rng, a_values[:m], element)
    tmem = random_words()
    for first in range(0, 128, m):
        metadata_in_tensor(tmem, kind, codes, first=first)
    if from_tmem:
        in_tensor(tmem, A_IN, a)
    idesc = describe(element, element, m, 64, result=2 if kind == "i8" else 1, flags=4)
    instruction = f"tcgen05.mma.ws.sp.cta_group::1.kind::{kind} [0], {f'[{A_IN}]' if from_tmem else '%rd3'}, %rd4, "
    instruction += f"[{META}], %r61, %p3;"
    out = tensor_program(instruction, tmem, image, descriptors, idesc, race=True)
    width = m // 2
    for first in range(0, 128, m):
        mine = a_values[first : first + m] if from_tmem else a_values
        whole = whole_rows(mine, codes, element)
        got = out[first : first + m, :width].view(np.int32 if kind == "i8" else np.float32)
        part = b_values[first // m * width :][:width]
        np.testing.assert_allclose(got, whole @ part.T, rtol=1e-6)
    np.testing.assert_array_equal(out[:, width:], tmem[:, width:])
    if m < 128:
        tmem[96 + 7, META] ^= 0xFFFF  # one of the copies
        with pytest.raises(PtxError, match=f"metadata of {m} rows: lanes 0 to {m - 1} and {128 - m} to 127 differ"):
            tensor_program(instruction, tmem, image, descriptors, idesc)


def test_sparse_with_block_scaling():
    """Pairs of 4-bit elements, four scale factors for the whole row of 128."""
    rng = np.random.default_rng(12)
    a, a_values = operand(rng, 128, 64, "e2m1", "packed")
    b, b_values = operand(rng, 16, 128, "e2m1", "packed")
    image, descriptors = in_shared(a, b)
    whole, codes = sparse_rows(rng, a_values, "packed")
    tmem = random_words()
    for row in range(128):
        bits = sum(int(c) << 4 * i for i, c in enumerate(codes[row]))
        tmem[row, META : META + 2] = [bits & 0xFFFFFFFF, bits >> 32]
    a_scale, b_scale = (
        scales_in_tensor(tmem, rng, c, rows, 4, 0, "ue4m3") for c, rows in ((SCALE_A, 128), (SCALE_B, 16))
    )
    idesc = 4 | 1 << 7 | 1 << 10 | 16 >> 3 << 17 | 1 << 27
    out = tensor_program(
        f"tcgen05.mma.sp.cta_group::1.kind::mxf4nvf4.block_scale.scale_vec::4X [0], %rd3, %rd4, [{META}], %r61, "
        f"{SCALES}, %p3;", tmem, image, descriptors, idesc)  # fmt: skip
    exact = (whole * np.repeat(a_scale, 32, 1)) @ (b_values * np.repeat(b_scale, 32, 1)).T
    np.testing.assert_allclose(out[:, :16].view(np.float32), exact, rtol=1e-6)


# ---- copies and shifts ---------------------------------------------------------------------------------------------
CP_LANES = {
    "128x256b": lambda r: [r], "128x128b": lambda r: [r], "4x256b": lambda r: [32 * r],
    "64x128b.warpx2::02_13": lambda r: [r, r + 64],
    "64x128b.warpx2::01_23": lambda r: [r % 32 + 64 * (r // 32), r % 32 + 64 * (r // 32) + 32],
    "32x128b.warpx4": lambda r: [r, r + 32, r + 64, r + 96],
}  # fmt: skip


@pytest.mark.parametrize("shape", CP_LANES)
@pytest.mark.parametrize("bits", [8, 6, 4])
def test_copy_to_tensor_memory(shape, bits):
    """The instruction's rows, in core matrices of 8 rows by 16 bytes, and which lanes receive each."""
    rng = np.random.default_rng(13)
    rows, width = int(shape.split("x")[0]), 32 if "256b" in shape else 16
    if bits == 8:
        raw, formats = rng.integers(0, 256, (rows, width)).astype(np.uint8), ""
        expected = raw
    else:
        kind, formats = ("e3m2", ".b8x16.b6x16_p32") if bits == 6 else ("e2m1", ".b8x16.b4x16_p64")
        raw, _ = operand(np.random.default_rng(14), rows, width, kind, "shared")
        expected, _ = operand(np.random.default_rng(14), rows, width, kind, "tensor")
    image, descriptors = in_shared(raw, raw)
    tmem = random_words()
    lane = 31 if shape == "4x256b" else 0
    out = tensor_program(
        f"tcgen05.cp.cta_group::1.{shape}{formats} [{lane << 16 | 40}], %rd3;", tmem, image, descriptors
    )
    wanted = tmem.copy()
    for row, words in enumerate(np.ascontiguousarray(expected).view(np.uint32)):
        for at in CP_LANES[shape](row):
            wanted[at + lane, 40 : 40 + width // 4] = words
    np.testing.assert_array_equal(out, wanted)


def test_shift():
    tmem = random_words()
    out = tensor_program("tcgen05.shift.cta_group::1.down [24];", tmem)
    wanted = tmem.copy()
    for lane in range(128):
        if lane % 32 != 31:
            wanted[lane, 24:32] = tmem[lane + 1, 24:32]
    np.testing.assert_array_equal(out, wanted)


# ---- refused -------------------------------------------------------------------------------------------------------
DENSE = describe("f16", "f16", 128, 32)
REFUSED = [
    ("mma.cta_group::1.kind::f16 [0], %rd3, %rd4, %r61, %p2", DENSE | 4, "its bit for sparsity is 1"),
    ("mma.cta_group::1.kind::f16 [0], %rd3, %rd4, %r61, %p2", DENSE | 8, "saturation exists for kind::i8 only"),
    ("mma.cta_group::1.kind::f16 [0], %rd3, %rd4, %r61, %p2", DENSE | 1 << 30, "a maximum shift exists for .ws only"),
    ("mma.cta_group::1.kind::f16 [0], %rd3, %rd4, %r61, %p2", describe("bf16", "f16", 128, 32, 0),
     "not for bf16"),
    ("mma.cta_group::1.kind::f16 [0], %rd3, %rd4, %r61, %p2", DENSE | 2 << 4, "a result of type 3"),
    ("mma.cta_group::1.kind::f16 [0], %rd3, %rd4, %r61, %p2", DENSE | 2 << 7, "kind::f16 has only f16, bf16"),
    ("mma.cta_group::1.kind::f16 [65536], %rd3, %rd4, %r61, %p2", DENSE, "128 rows at lane 1, not 0"),
    ("mma.cta_group::1.kind::i8 [0], %rd3, %rd4, %r61, %p2", describe("s8", "s8", 128, 40, 2),
     "no mma of 128 x 40 by 1 CTAs"),
    ("mma.cta_group::1.kind::i8 [0], %rd3, %rd4, %r61, %p2", describe("s8", "s8", 128, 32, 2, 1 << 13),
     "negates nothing"),
    ("mma.cta_group::1.kind::f8f6f4 [0], %rd3, %rd4, %r61, %p2", describe("e2m1", "e4m3", 128, 32, 1, 1 << 15),
     "A of e2m1 cannot be transposed"),
    ("mma.cta_group::1.kind::mxf4.block_scale [0], %rd3, %rd4, %r61, [8], [16], %p2", 0x480 | 4 << 17 | 1 << 27,
     "scale factors of type ue4m3 for kind::mxf4"),
    ("mma.cta_group::1.kind::mxf4nvf4.block_scale.block16 [0], %rd3, %rd4, %r61, [8], [16], %p2",
     0x480 | 3 << 17 | 1 << 27 | 1 << 31, "K = 96 exists for dense operands in shared memory"),
    ("mma.cta_group::1.kind::mxf4nvf4.block_scale.block16 [0], %rd3, %rd4, %r61, [8], [16], %p2",
     0x480 | 4 << 17 | 1 << 27 | 2 << 29, "scale factor IDs 2 and 0, not multiples of 4"),
    ("mma.ws.cta_group::1.kind::f16 [0], %rd3, %rd4, %r61, %p2", DENSE, "no mma of 128 x 32"),
    ("mma.ws.cta_group::1.kind::f16 [0], %rd3, %rd4, %r61, %p2, %rd5", describe("f16", "f16", 128, 64),
     "zero-column mask 0x8000000000"),
    ("mma.ws.sp.cta_group::1.kind::f16 [0], %rd3, %rd4, [64], %r61, %p2", describe("f16", "f16", 64, 256, 1, 4),
     "no mma of 64 x 256"),
    ("mma.sp.cta_group::1.kind::f16 [0], [96], %rd4, [64], %r61, %p2", describe("f16", "f16", 64, 64, 1, 4),
     "64 rows of A in tensor"),
    ("mma.sp.cta_group::1.kind::f16 [0], %rd3, %rd4, [65], %r61, %p3", DENSE | 4, "metadata of kind::f16 at column 65"),
    ("mma.sp.cta_group::1.kind::f16 [0], %rd3, %rd4, [64], %r61, %p3", describe("f16", "f16", 64, 32, 1, 4),
     "with 64 rows by"),
    ("shift.cta_group::1.down [0x200000]", 0, "shift at lane 32: only lane 0"),
    ("cp.cta_group::1.4x256b [0x200000], %rd3", 0, "to lane 32 goes beyond lane 127"),
]  # fmt: skip


@pytest.mark.parametrize(("instruction", "idesc", "message"), REFUSED)
def test_what_is_refused(instruction, idesc, message):
    image, descriptors = in_shared(np.zeros((128, 32), np.uint8), np.zeros((64, 32), np.uint8))
    with pytest.raises(PtxError, match=message) as caught:
        tensor_program(f"tcgen05.{instruction};", np.zeros((128, COLUMNS), np.uint32), image, descriptors, idesc)
    assert f"tcgen05.{instruction.split()[0]}" in caught.value.text


def test_metadata_that_means_nothing():
    image, descriptors = in_shared(np.zeros((128, 32), np.uint8), np.zeros((32, 64), np.uint8))
    tmem = np.full((128, COLUMNS), 0x44444444, np.uint32)
    tmem[37, META] = 0x44441444  # indices 0 and 1 in the other order
    tensor_program(f"tcgen05.mma.sp.cta_group::1.kind::f16 [0], %rd3, %rd4, [{META}], %r61, %p3;", tmem, image,
                   descriptors, DENSE | 4)  # fmt: skip
    tmem[37, META] = 0x44445444
    with pytest.raises(PtxError, match="sparsity metadata 0b0101 for f16: not two indices"):
        tensor_program(f"tcgen05.mma.sp.cta_group::1.kind::f16 [0], %rd3, %rd4, [{META}], %r61, %p3;", tmem, image,
                       descriptors, DENSE | 4)  # fmt: skip


@pytest.mark.parametrize("bits", [1 << 61, 1 << 52 | 2 << 61])
def test_copy_from_layouts_of_the_mma_alone(bits):
    with pytest.raises(PtxError, match=r"tcgen05.cp with an absolute leading address or 32-byte atoms"):
        tensor_program(
            "tcgen05.cp.cta_group::1.128x128b [0], %rd3;", random_words(), None, [A_AT >> 4 | 1 << 46 | bits] * 2
        )


def test_copy_beyond_the_allocation():
    image, descriptors = in_shared(np.zeros((128, 32), np.uint8), np.zeros((32, 32), np.uint8))
    with pytest.raises(MemoryFault, match="columns 124 to 131"):
        tensor_program("tcgen05.cp.cta_group::1.128x256b [124], %rd3;", random_words(), image, descriptors)
