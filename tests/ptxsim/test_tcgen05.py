"""Tensor memory and the tensor core of the fifth generation (PTX ISA 9.7.16)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ptxsim.errors import Deadlock, MemoryFault, PtxError, RaceError, SyncError
from tests.ptxsim.test_matrix import SIZE, elements
from tests.ptxsim.test_wgmma import place
from tests.testing.ptx import run

SHARED = ".shared .align 1024 .b8 buffer[16384]; .shared .align 8 .b64 bar; .shared .align 4 .b32 base;"
A_AT, B_AT = 1024, 1024 + 8192
SPAN_CODE = {0: 0, 128: 2, 64: 4, 32: 6}
ALLOC = """mov.u32 %r50, buffer; mov.u32 %r52, bar; mov.u32 %r53, base; setp.eq.u32 %p10, %t, 0; shr.u32 %r54, %t, 5;
    @%p10 mbarrier.init.shared.b64 [%r52], 1; setp.ne.u32 %p9, %r54, 0; @%p9 bra ALLOCATED;
    tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r53], COLUMNS;
    tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned;
  ALLOCATED: bar.sync 0; ld.shared.u32 %r55, [%r53]; mad.lo.u32 %r56, %r54, 0x200000, %r55;"""
FREE = "@!%p9 tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r55, COLUMNS;"


def tensor_run(body, inputs, outputs, columns=128, shared=16384, pair=False, **options):
    """``pair``: by two CTAs, with cta_group::2 throughout."""
    text = (ALLOC + body + "bar.sync 0;" + FREE).replace("COLUMNS", str(columns))
    if pair:
        text = text.replace("cta_group::1", "cta_group::2")
        options |= {"grid": 2, "cluster": 2}
    declarations = SHARED.replace("16384", str(shared))
    return run(text, inputs, outputs, threads=128, declarations=declarations, target="sm_103a", **options)


def names(first, count):
    return "{" + ", ".join(f"%r{first + j}" for j in range(count)) + "}"


def cells(shape, registers, lane):
    """(lane of the quarter, column) of each register of a thread: PTX ISA 9.7.16.2.3, figures of the shapes."""
    out = []
    for r in range(registers):
        if shape == "32x32b":
            out.append((lane, r))
        elif shape == "16x128b":
            out.append((lane // 4 + 8 * (r % 2), lane % 4 + 4 * (r // 2)))
        elif shape == "16x64b":
            out.append((lane // 4 + 8 * (lane % 2), lane // 2 % 2 + 2 * r))
        elif shape == "16x32bx2":  # the second half 20 columns on
            out.append((lane % 16, r + 20 * (lane // 16)))
        else:
            out.append((lane // 4 + 8 * (r // 2 % 2), lane % 4 * 2 + r % 2 + 8 * (r // 4)))
    return out


SHAPES = [("32x32b", 1), ("16x64b", 1), ("16x128b", 2), ("16x256b", 4), ("16x32bx2", 1)]


@pytest.mark.parametrize(("shape", "unit"), SHAPES)
@pytest.mark.parametrize("repeat", [1, 2, 4])
def test_store_and_load(shape, unit, repeat):
    """Each warp stores words with one shape and reads them back as plain 32x32b rows."""
    half = ", 20" if shape == "16x32bx2" else ""
    count = unit * repeat
    width = max(c for lane in range(32) for _, c in cells(shape, count, lane)) + 1
    make = "".join(f"mad.lo.u32 %r{100 + j}, %t, 1000, {j};" for j in range(count))
    zero = "".join(f"mov.u32 %r{160 + j}, 0;" for j in range(32))
    read = "".join(f"st.global.u32 [%rd2+{4 * j}], %r{200 + j};" for j in range(32))
    body = f"""{make} {zero} tcgen05.st.sync.aligned.32x32b.x32.b32 [%r56], {names(160, 32)};
    tcgen05.st.sync.aligned.{shape}.x{repeat}.b32 [%r56]{half}, {names(100, count)}; tcgen05.wait::st.sync.aligned;
    tcgen05.ld.sync.aligned.32x32b.x32.b32 {names(200, 32)}, [%r56]; tcgen05.wait::ld.sync.aligned;
    mad.wide.u32 %rd2, %t, 128, %out0; {read}"""
    out = tensor_run(body, [], [np.zeros((128, 32), np.uint32)])
    expected = np.zeros((128, 32), np.uint32)
    for thread in range(128):
        for j, (lane, column) in enumerate(cells(shape, count, thread % 32)):
            expected[thread // 32 * 32 + lane, column] = thread * 1000 + j
    assert width <= 32
    np.testing.assert_array_equal(out, expected)
    back = "".join(f"st.global.u32 [%rd2+{4 * j}], %r{200 + j};" for j in range(count))
    body = f"""{make} tcgen05.st.sync.aligned.{shape}.x{repeat}.b32 [%r56+32]{half}, {names(100, count)};
    tcgen05.ld.sync.aligned.{shape}.x{repeat}.b32 {names(200, count)}, [%r56+32]{half};
    mad.wide.u32 %rd2, %t, 128, %out0; {back}"""
    out = tensor_run(body, [], [np.zeros((128, 32), np.uint32)])
    np.testing.assert_array_equal(out[:, :count], np.arange(128)[:, None] * 1000 + np.arange(count))


@pytest.mark.parametrize(("shape", "unit"), [("32x32b", 1), ("16x64b", 1), ("16x256b", 4)])
def test_packing(shape, unit):
    """unpack::16b puts the halves of a register into the low halves of two columns, pack::16b takes them from there."""
    make = "".join(f"mad.lo.u32 %r{100 + j}, %t, 0x10001000, {0x7FF7 * j + 5};" for j in range(unit))
    read = "".join(f"st.global.u32 [%rd2+{4 * j}], %r{200 + j};" for j in range(16))
    back = "".join(f"st.global.u32 [%rd3+{4 * j}], %r{220 + j};" for j in range(unit))
    zero = "".join(f"mov.u32 %r{160 + j}, 0;" for j in range(16))
    body = f"""{make} {zero} tcgen05.st.sync.aligned.32x32b.x16.b32 [%r56], {names(160, 16)};
    tcgen05.st.sync.aligned.{shape}.x1.unpack::16b.b32 [%r56], {names(100, unit)}; tcgen05.wait::st.sync.aligned;
    tcgen05.ld.sync.aligned.32x32b.x16.b32 {names(200, 16)}, [%r56];
    tcgen05.ld.sync.aligned.{shape}.x1.pack::16b.b32 {names(220, unit)}, [%r56]; tcgen05.wait::ld.sync.aligned;
    mad.wide.u32 %rd2, %t, 64, %out0; {read} mad.wide.u32 %rd3, %t, {4 * unit}, %out1; {back}"""
    out, again = tensor_run(body, [], [np.zeros((128, 16), np.uint32), np.zeros((128, unit), np.uint32)])
    expected, words = np.zeros((128, 16), np.uint32), np.zeros((128, unit), np.uint32)
    for thread in range(128):
        for j, (lane, column) in enumerate(cells(shape, unit, thread % 32)):
            words[thread, j] = thread * 0x10001000 + 0x7FF7 * j + 5 & 0xFFFFFFFF
            at = expected[thread // 32 * 32 + lane]
            at[2 * column : 2 * column + 2] = words[thread, j] & 0xFFFF, words[thread, j] >> 16
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(again, words)


def load_and_reduce(suffix, words, shape="32x32b", half=""):
    """What each thread loads of [128, columns] words and gets of them: (words [128, registers], result [128])."""
    columns = words.shape[1]
    count = columns // 2 if half else columns
    load = "".join(f"ld.global.u32 %r{100 + j}, [%rd1+{4 * j}];" for j in range(columns))
    store = "".join(f"st.global.u32 [%rd2+{4 * j}], %r{160 + j};" for j in range(count))
    kind = "f32" if "f32" in suffix else "u32"
    register = "%f1" if kind == "f32" else "%r60"
    body = f"""mad.wide.u32 %rd1, %t, {4 * columns}, %in0; {load} mad.wide.u32 %rd2, %t, {4 * count}, %out0;
    mad.wide.u32 %rd3, %t, 4, %out1;
    tcgen05.st.sync.aligned.32x32b.x{columns}.b32 [%r56], {names(100, columns)}; tcgen05.wait::st.sync.aligned;
    tcgen05.ld.red.sync.aligned.{shape}.x{count}.{suffix} {names(160, count)}, {register}, [%r56]{half};
    tcgen05.wait::ld.sync.aligned; {store} st.global.{kind} [%rd3], {register};"""
    return tensor_run(body, [words], [np.zeros((128, count), np.uint32), np.zeros(128, np.uint32)], race=True)


def bits_of(values):
    return np.array(values, np.float32).view(np.uint32)


@pytest.mark.parametrize(("suffix", "words", "result"), [
    ("u32.max", [9, 2, 15, 4], 15),
    ("max.u32", [9, 0x80000002, 15, 4], 0x80000002),
    ("s32.min", np.array([-5, 7, -20, 3], np.int32).view(np.uint32), -20 & 0xFFFFFFFF),
    ("max.s32", np.array([-5, -7, -20, -3], np.int32).view(np.uint32), -3 & 0xFFFFFFFF),
    ("max.abs.NaN.f32", [*bits_of([1, -4]), 0x7FC12345, *bits_of([2])], 0x7FFFFFFF),
    ("f32.max.abs", [*bits_of([1, -4]), 0x7FC12345, *bits_of([2])], bits_of(4)),
    ("min.abs.f32", bits_of([4, -2, 0.5, -8]), bits_of(0.5)),
    ("min.f32", bits_of([4, -2, 0.5, -8]), bits_of(-8)),
    ("max.f32", [0x7FC12345] * 4, 0x7FFFFFFF),
    ("max.f32", bits_of([-192, -200, -193, -512]), bits_of(-192)),
])  # fmt: skip
def test_load_with_reduction(suffix, words, result):
    """Five of these were observed on a B300; the loaded words keep their bits, also of a NaN."""
    words = np.tile(np.array(words, np.uint32), (128, 1))
    loaded, found = load_and_reduce(suffix, words)
    np.testing.assert_array_equal(loaded, words)
    np.testing.assert_array_equal(found, np.full(128, result, np.uint32))


@pytest.mark.parametrize("shape", ["32x32b", "16x32bx2"])
def test_reduction_of_what_a_thread_loads(shape):
    words = np.random.default_rng(5).integers(0, 2**32, (128, 16), dtype=np.uint32)
    loaded, found = load_and_reduce("min.u32", words, shape, ", 8" if shape == "16x32bx2" else "")
    lane = np.arange(128)
    if shape == "16x32bx2":  # sixteen lanes of each quarter, half of the columns in each half of the warp
        rows = lane // 32 * 32 + lane % 16
        mine = np.where((lane % 32 < 16)[:, None], words[rows, :8], words[rows, 8:])
    else:
        mine = words
    np.testing.assert_array_equal(loaded, mine)
    np.testing.assert_array_equal(found, mine.min(1))


def test_reductions_that_do_not_exist():
    words = np.zeros((128, 4), np.uint32)
    for suffix in ("max.abs.u32", "s32.max.NaN"):
        with pytest.raises(PtxError, match=r"\.abs and \.NaN are for f32"):
            load_and_reduce(suffix, words)
    with pytest.raises(PtxError, match=r"tcgen05\.ld\.red of x1 f32: at least x2"):
        load_and_reduce("max.f32", words[:, :1])


def test_a_result_that_nobody_waited_for():
    """The result too is a register of the load: what overwrites the cells needs no wait once it has been read."""
    body = f"""mov.f32 %f2, 0f3F800000; tcgen05.st.sync.aligned.32x32b.x2.b32 [%r56], {{%f2, %f2}};
    tcgen05.wait::st.sync.aligned; tcgen05.ld.red.sync.aligned.32x32b.x2.max.f32 {names(160, 2)}, %f1, [%r56]; READ
    tcgen05.st.sync.aligned.32x32b.x2.b32 [%r56], {{%f2, %f2}}; tcgen05.wait::st.sync.aligned;
    tcgen05.wait::ld.sync.aligned;"""
    tensor_run(body.replace("READ", "add.f32 %f3, %f1, %f1;"), [], [np.zeros(1)], race=True)
    with pytest.raises(RaceError, match=r"tcgen05\.ld"):
        tensor_run(body.replace("READ", ""), [], [np.zeros(1)], race=True)


FORMATS = {"f16": 0, "bf16": 1, "tf32": 2, "e4m3": 0, "e5m2": 1}
KINDS = [
    ("f16", "f16", "f16"),
    ("f16", "bf16", "bf16"),
    ("tf32", "tf32", "tf32"),
    ("f8f6f4", "e4m3", "e4m3"),
    ("f8f6f4", "e5m2", "e4m3"),
]


def multiply(
    kind,
    a_kind,
    b_kind,
    m=128,
    n=32,
    span=32,
    from_tmem=False,
    enable="0",
    flags=0,
    late=False,
    mutate="",
    mn=0,
    skip=0,
):
    """One tcgen05.mma into columns 0 to n - 1, started from ones; returns (accumulators [128, n], A B^T)."""
    rng = np.random.default_rng(3)
    depth = 32 // SIZE[a_kind]
    a, a_values = elements(rng, (m, depth), a_kind)
    b, b_values = elements(rng, (n, depth), b_kind)
    image_a, desc_a = place(a, A_AT + skip, span, 0, SIZE[a_kind])
    image_a = np.roll(image_a, skip)
    image_b, desc_b = place(b, B_AT, span, mn, SIZE[b_kind])
    descriptors = [(d & (1 << 46) - 1) | 1 << 46 | SPAN_CODE[span] << 61 for d in (desc_a, desc_b)]
    instruction = 1 << 4 | FORMATS[a_kind] << 7 | FORMATS[b_kind] << 10 | mn << 16 | n >> 3 << 17 | m >> 4 << 24 | flags
    ones = "".join(f"mov.b32 %r{160 + j}, 0x3f800000;" for j in range(32))
    copy = "".join(
        f"ld.global.v4.u32 {{%r1, %r2, %r3, %r4}}, [%rd2+{2048 * i}];"
        f"st.shared.v4.u32 [%r51+{2048 * i}], {{%r1, %r2, %r3, %r4}};"
        for i in range(8)
    )
    rows = a.contiguous().view(torch.uint8).numpy().reshape(m, 32)
    operand, to_tmem = "%rd3", ""
    if from_tmem:
        words = "".join(f"ld.global.u32 %r{100 + j}, [%rd5+{4 * j}];" for j in range(8))
        to_tmem = f"""mad.wide.u32 %rd5, %t, 32, %in2; {words}
        tcgen05.st.sync.aligned.32x32b.x8.b32 [%r56+64], {names(100, 8)}; tcgen05.wait::st.sync.aligned;"""
        operand = "[%r60]"
    store = "".join(f"st.global.u32 [%rd7+{4 * j}], %r{200 + j};" for j in range(n))
    body = f"""mul.wide.u32 %rd1, %t, 16; add.s64 %rd2, %in0, %rd1; mad.lo.u32 %r51, %t, 16, %r50; {copy} {ones}
    ld.global.u64 %rd3, [%in1]; ld.global.u64 %rd4, [%in1+8]; {to_tmem} add.u32 %r60, %r55, 64;
    tcgen05.st.sync.aligned.32x32b.x32.b32 [%r56], {names(160, 32)}; tcgen05.wait::st.sync.aligned;
    tcgen05.fence::before_thread_sync; bar.sync 0; tcgen05.fence::after_thread_sync; setp.ne.u32 %p1, {enable}, 0;
    mov.u32 %r61, {instruction}; {mutate}
    @%p10 tcgen05.mma.cta_group::1.kind::{kind} [%r55], {operand}, %rd4, %r61, %p1;
    @%p10 tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r52];
  WAIT: mbarrier.try_wait.parity.shared.b64 %p11, [%r52], 0; @!%p11 bra WAIT;
    tcgen05.fence::after_thread_sync; tcgen05.ld.sync.aligned.32x32b.x{n}.b32 {names(200, n)}, [%r56];
    tcgen05.wait::ld.sync.aligned; mad.wide.u32 %rd7, %t, {4 * n}, %out0; {store}"""
    out = tensor_run(
        body,
        [np.concatenate([image_a, image_b]), np.array(descriptors, np.uint64), np.resize(rows, (128, 32))],
        [np.zeros((128, n), np.float32)],
        late=late,
    )
    return out, a_values @ b_values.T


@pytest.mark.parametrize(("kind", "a", "b"), KINDS)
@pytest.mark.parametrize("from_tmem", [False, True])
def test_kinds(kind, a, b, from_tmem):
    for late in (False, True):
        out, exact = multiply(kind, a, b, from_tmem=from_tmem, late=late)
        np.testing.assert_allclose(out, exact, rtol=1e-6, atol=1e-6)


def test_accumulation_signs_and_layouts():
    out, exact = multiply("f16", "f16", "f16", enable="1")
    np.testing.assert_allclose(out, exact + 1, rtol=1e-6, atol=1e-6)
    out, exact = multiply("f16", "f16", "f16", flags=1 << 13)
    np.testing.assert_allclose(out, -exact, rtol=1e-6, atol=1e-6)
    out, exact = multiply("f16", "f16", "f16", flags=1 << 13 | 1 << 14, span=0)
    np.testing.assert_allclose(out, exact, rtol=1e-6, atol=1e-6)
    out, exact = multiply("f16", "f16", "f16", span=64, n=32, m=64, mn=1)
    rows = np.arange(64) % 16 + np.arange(64) // 16 * 32  # 64 rows: 16 lanes of each warp's quarter
    np.testing.assert_allclose(out[rows], exact, rtol=1e-6, atol=1e-6)
    untouched = np.setdiff1d(np.arange(128), rows)
    np.testing.assert_array_equal(out[untouched], 1)


def test_operand_that_starts_inside_of_a_swizzle_pattern():
    """The pattern begins at multiples of 1024 bytes, wherever the operand does."""
    for span, skip in ((32, 128), (64, 384)):
        out, exact = multiply("f16", "f16", "f16", span=span, skip=skip, m=64)
        np.testing.assert_allclose(out[np.arange(64) % 16 + np.arange(64) // 16 * 32], exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("mutate", "message"),
    [
        ("or.b64 %rd4, %rd4, 0x10000000000000;", "tcgen05 descriptor"),
        ("and.b32 %r61, %r61, 0xff81ffff;", "no mma of 128 x 0 by 1 CTAs"),
    ],
)
def test_descriptors_that_are_refused(mutate, message):
    with pytest.raises(PtxError, match=message) as caught:
        multiply("f16", "f16", "f16", mutate=mutate)
    assert "tcgen05.mma" in caught.value.text


def test_columns_and_lanes_that_are_not_allowed():
    with pytest.raises(MemoryFault, match=r"columns 96 to 127 of cta\(0,0,0\) are not allocated"):
        tensor_run(
            f"tcgen05.ld.sync.aligned.32x32b.x32.b32 {names(100, 32)}, [%r56+96];", [], [np.zeros(1)], columns=64
        )
    with pytest.raises(MemoryFault, match="by a warp that may only touch lanes 32 and up"):
        tensor_run("tcgen05.ld.sync.aligned.32x32b.x1.b32 {%r1}, [%r55];", [], [np.zeros(1)])
    with pytest.raises(PtxError, match="48 columns, not a power of two"):
        tensor_run("", [], [np.zeros(1)], columns=48)


def one_warp(body):
    """A warp that holds its permit to allocate: 256 columns from 0 first."""
    alloc = "mov.u32 %r53, base; tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r53], 256;"
    run(alloc + body, [], [np.zeros(1)], declarations=SHARED, target="sm_100a")


REST = "tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r53], {};"
GIVE = "tcgen05.dealloc.cta_group::1.sync.aligned.b32 {}, {};"


def test_capacity_of_tensor_memory():
    one_warp(REST.format(256) + GIVE.format(0, 256) + GIVE.format(256, 256))
    one_warp(GIVE.format(0, 256) + REST.format(512) + GIVE.format(0, 512))
    with pytest.raises(Deadlock) as caught:
        one_warp(REST.format(512))
    assert "512 of the 512 columns of cta(0,0,0); allocated: 256 from column 0 (PTX line" in str(caught.value)
    assert caught.value.text.endswith("[%r53], 512;")


@pytest.mark.parametrize(
    ("body", "error", "message"),
    [
        ("", SyncError, "ends without tcgen05.dealloc of the 256 columns from 0 of cta"),
        (GIVE.format(0, 128), MemoryFault, "dealloc of 128 columns from 0 .* not what a tcgen05.alloc gave"),
        (GIVE.format(128, 128), MemoryFault, "dealloc of 128 columns from 128"),
        (GIVE.format(0, 256) * 2, MemoryFault, "columns 0 to 255 of cta.* are not allocated"),
        ("tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned;" + REST.format(32), SyncError,
         "alloc after tcgen05.relinquish_alloc_permit"),
        (GIVE.format(0, 256).replace("::1", "::2"), PtxError, "with cta_group::1 and with cta_group::2"),
    ],
)  # fmt: skip
def test_allocations_that_are_wrong(body, error, message):
    with pytest.raises(error, match=message):
        one_warp(body)


REFUSED = [
    "tcgen05.ld.sync.aligned.16x32bx2.x1.b32 {%r1}, [%r55]",
    "tcgen05.ld.sync.aligned.32x32b.x1.b32 {%r1}, [%r55], 1",
    "tcgen05.cp.cta_group::1.64x128b [%r55], %rd1",
    "tcgen05.mma.cta_group::1.kind::mxf4nvf4.block_scale [%r55], %rd1, %rd2, %r1, [%r55], [%r55], %p1",
    "tcgen05.mma.cta_group::1.kind::f8f6f4 [%r55], %rd1, %rd2, %r1, %p1, 3",
    "tcgen05.mma.cta_group::1.kind::f16.ashift [%r55], %rd1, %rd2, %r1, %p1",
    "tcgen05.mma.cta_group::1.kind::f16 [%r55], %rd1, %rd2, %r1, {%r1, %r2}, %p1",
    "tcgen05.ld.sync.aligned.32x32b.x2.b32 %r1, [%r55]",
]


@pytest.mark.parametrize("instruction", REFUSED)
def test_forms_that_are_refused(instruction):
    with pytest.raises(PtxError) as caught:
        tensor_run(instruction + ";", [], [np.zeros(1)])
    assert instruction.split()[0] in caught.value.text and caught.value.line
