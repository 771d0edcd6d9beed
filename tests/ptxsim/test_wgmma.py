"""wgmma: operand layouts, types, scales, groups (PTX ISA 9.7.15)."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from ptxsim.errors import PtxError, SyncError, UninitializedRead
from ptxsim.machine.accumulate import limited_sum
from tests.ptxsim.test_matrix import SIZE, a_registers, elements
from tests.testing.ptx import run

SHARED = ".shared .align 1024 .b8 buffer[32768];"
SPAN_CODE = {0: 0, 128: 1, 64: 2, 32: 3}
A_AT, B_AT = 1024, 1024 + 8192  # shared addresses: the first variable lies at 1024


def descriptor(start, leading, stride, span):
    return start >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | SPAN_CODE[span] << 62


def swizzled(address, span):
    return address ^ (address >> 7 & {0: 0, 32: 1, 64: 3, 128: 7}[span]) << 4


def place(matrix, start, span, mn_major, size):
    """Byte image and descriptor of a matrix [rows, K] in one of the canonical layouts (tiles laid out by hand: core
    matrices of 8 rows by 16 bytes, or swizzle atoms of 8 lines by ``span`` bytes)."""
    raw = matrix.contiguous().view(torch.uint8).reshape(*matrix.shape, size).numpy()
    rows, depth = matrix.shape
    image = np.zeros(8192, np.uint8)
    if not mn_major and span == 0:  # core matrices: next 16 bytes of K 128 bytes on, next 8 rows after all of K
        leading, stride = 128, depth * size // 16 * 128
    elif not mn_major:
        leading, stride = 16, 8 * span
    elif span == 0:  # cores of 16 bytes along rows by 8 lines of K
        stride, leading = 128, rows * size // 16 * 128
    else:  # atoms of span bytes along rows by 8 lines of K; next atom along rows after all of K
        leading, stride = depth // 8 * 8 * span, 8 * span
    for r in range(rows):
        for k in range(depth):
            along, across = (r, k) if mn_major else (k, r)
            b = along * size
            if span == 0:
                step_along, step_across = (stride, leading) if mn_major else (leading, stride)
                offset = b // 16 * step_along + across // 8 * step_across + across % 8 * 16 + b % 16
            elif mn_major:
                offset = b // span * leading + across // 8 * stride + across % 8 * span + b % span
            else:
                offset = across // 8 * stride + across % 8 * span + b
            at = swizzled(start + offset, span) - start
            image[at : at + size] = raw[r, k]
    return image, descriptor(start, leading, stride, span)


def kernel(
    n,
    k,
    result,
    a_kind,
    b_kind,
    a_operand,
    scale_d="1",
    scales="1, 1",
    transposes="",
    wait="wgmma.wait_group.sync.aligned 0;",
    before="",
    after="",
    accumulators=None,
):
    """128 threads: copy both images to shared memory, run one wgmma, store the accumulators [128, count]."""
    count = n // 4 if result == "f16" else n // 2
    registers = accumulators or [f"%f{j}" if result == "f32" else f"%r{100 + j}" for j in range(count)]
    start = "".join(
        f"mov.b32 {r}, 0x{0x3F800000 if result == 'f32' else 3 if result == 's32' else 0x3C004000:08x};"
        for r in registers
    )
    stores = "".join(f"st.global.b32 [%rd9+{4 * j}], {r};" for j, r in enumerate(registers))
    copy = "".join(
        f"ld.global.v4.u32 {{%r1, %r2, %r3, %r4}}, [%rd2+{2048 * i}];"
        f"st.shared.v4.u32 [%r51+{2048 * i}], {{%r1, %r2, %r3, %r4}};"
        for i in range(8)
    )
    numbers = "" if result == "s32" else f", {scales}{transposes}"
    return f"""mov.u32 %r50, buffer; mul.wide.u32 %rd1, %t, 16; add.s64 %rd2, %in0, %rd1; mad.lo.u32 %r51, %t, 16, %r50;
    {copy} ld.global.u64 %rd3, [%in1]; ld.global.u64 %rd4, [%in1+8]; mad.wide.u32 %rd5, %t, 16, %in2;
    ld.global.v4.u32 {{%r5, %r6, %r7, %r8}}, [%rd5]; mad.wide.u32 %rd9, %t, {4 * count}, %out0; {start}
    fence.proxy.async.shared::cta; bar.sync 0; setp.ne.b32 %p1, {scale_d}, 0; {before} wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n{n}k{k}.{result}.{a_kind}.{b_kind} {{{", ".join(registers)}}}, {a_operand}, %rd4,
      %p1{numbers};
    wgmma.commit_group.sync.aligned; {wait} {after} {stores}"""


def product(
    n, k, result, a_kind, b_kind, spans=(128, 128), mn=(0, 0), from_registers=False, late=False, seed=None,
    fp8_bits=None, tensor_sums=None, draw=elements, **options
):  # fmt: skip
    rng = np.random.default_rng(11)
    a, a_values = draw(rng, (64, k), a_kind)
    b, b_values = draw(rng, (n, k), b_kind)
    image_a, desc_a = place(a, A_AT, spans[0], mn[0], SIZE[a_kind])
    image_b, desc_b = place(b, B_AT, spans[1], mn[1], SIZE[b_kind])
    image = np.concatenate([image_a, image_b])
    fragments = np.concatenate([a_registers(a[16 * w : 16 * w + 16], SIZE[a_kind]) for w in range(4)])
    two_byte = SIZE[a_kind] == 2
    transposes = "" if not two_byte else f", {mn[1]}" if from_registers else f", {mn[0]}, {mn[1]}"
    operand = "{%r5, %r6, %r7, %r8}" if from_registers else "%rd3"
    body = kernel(n, k, result, a_kind, b_kind, operand, transposes=transposes, **options)
    count = n // 4 if result == "f16" else n // 2
    out = run(
        body,
        [image, np.array([desc_a, desc_b], np.uint64), fragments],
        [np.zeros((128, count), np.uint32)],
        threads=128,
        declarations=SHARED,
        late=late,
        seed=seed,
        fp8_bits=fp8_bits,
        tensor_sums=tensor_sums,
    )
    got = np.zeros((64, n), np.float32)
    values = out.view({"f32": np.float32, "f16": np.float16, "s32": np.int32}[result]).reshape(4, 8, 4, n // 8, 2, 2)
    for w in range(4):  # warp, row, lane in row, block of 8 columns, row half, element
        for half in range(2):
            block = values[w, :, :, :, half]  # row, t, block, e
            got[16 * w + 8 * half : 16 * w + 8 * half + 8] = block.transpose(0, 2, 1, 3).reshape(8, n)
    return got, a_values @ b_values.T


START = {"f32": np.full((1, 8), 1.0), "s32": np.full((1, 8), 3.0), "f16": np.tile([2.0, 1.0], (1, 4))}


def starting(result, n):
    return np.tile(START[result], (1, n // 8))


TYPES = [
    ("f16", "f16", 16, "f32"),
    ("f16", "f16", 16, "f16"),
    ("bf16", "bf16", 16, "f32"),
    ("tf32", "tf32", 8, "f32"),
    ("e4m3", "e4m3", 32, "f32"),
    ("e5m2", "e4m3", 32, "f16"),
    ("s8", "s8", 32, "s32"),
    ("u8", "s8", 32, "s32"),
]


@pytest.mark.parametrize(("a", "b", "k", "result"), TYPES)
@pytest.mark.parametrize("from_registers", [False, True])
def test_types(a, b, k, result, from_registers):
    got, exact = product(24, k, result, a, b, from_registers=from_registers)
    np.testing.assert_allclose(got, exact + starting(result, 24), rtol=2.0**-10 if result == "f16" else 1e-6, atol=1e-6)


@pytest.mark.parametrize("span", [0, 32, 64, 128])
@pytest.mark.parametrize("mn", [(0, 0), (1, 0), (0, 1), (1, 1)])
def test_layouts(span, mn):
    """Both operands K-major and MN-major with every swizzle."""
    got, exact = product(64, 16, "f32", "f16", "f16", spans=(span, span), mn=mn)
    np.testing.assert_allclose(got, exact + 1, rtol=1e-6, atol=1e-6)


def test_accumulation_and_signs():
    got, exact = product(16, 16, "f32", "f16", "f16", scale_d="0")
    np.testing.assert_allclose(got, exact, rtol=1e-6, atol=1e-6)
    got, exact = product(16, 16, "f32", "f16", "f16", scales="-1, 1")
    np.testing.assert_allclose(got, 1 - exact, rtol=1e-6, atol=1e-6)
    got, exact = product(16, 16, "f32", "f16", "f16", scales="-1, -1")
    np.testing.assert_allclose(got, 1 + exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("a", "b", "k", "result"), TYPES[:3])
def test_late_mode_gives_the_same(a, b, k, result):
    for seed in (None, 1):
        got, exact = product(16, k, result, a, b, late=True, seed=seed)
        np.testing.assert_allclose(
            got, exact + starting(result, 16), rtol=2.0**-10 if result == "f16" else 1e-6, atol=1e-6
        )


def test_chain_in_late_mode():
    """A second wgmma continues on the accumulators of the first before anything is waited for."""
    again = """wgmma.mma_async.sync.aligned.m64n16k16.f32.f16.f16 {%f0, %f1, %f2, %f3, %f4, %f5, %f6, %f7}, %rd3,
    %rd4, %p1, 1, 1, 0, 0; wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;"""
    got, exact = product(16, 16, "f32", "f16", "f16", late=True, wait=again)
    np.testing.assert_allclose(got, 2 * exact + 1, rtol=1e-6, atol=1e-6)


def test_accumulators_read_early():
    """Without the wait the late mode gives NaNs; by default the fault stays unnoticed."""
    early = "add.f32 %f0, %f0, 0f00000000;"
    got, exact = product(16, 16, "f32", "f16", "f16", wait=early)
    np.testing.assert_allclose(got, exact + 1, rtol=1e-6, atol=1e-6)
    got, _ = product(16, 16, "f32", "f16", "f16", wait=early, late=True)
    assert np.isnan(got[:, [0, 2, 4, 6]][:8]).all()


# ---- sums of fp8 products with few bits ------------------------------------------------------------------------------


def cut(value, unit):
    """A fraction rounded towards zero to a multiple of ``unit``."""
    return int(value / unit) * unit  # int() of a fraction goes towards zero


def exponent(value):
    """floor(log2 |value|) of a fraction."""
    return math.frexp(float(value))[1] - 1


def sum_of_few_bits(terms, bits):
    """The sum by exact fractions: terms cut to ``bits`` below the largest one, the sum cut to ``bits`` of its own."""
    terms = [Fraction(float(x)) for x in terms if x]
    if not terms:
        return 0.0
    unit = Fraction(2) ** (max(map(exponent, terms)) - bits + 1)
    total = sum(cut(x, unit) for x in terms)
    return float(cut(total, Fraction(2) ** (exponent(total) - bits + 1))) if total else 0.0


def set_accumulators(count, bits):
    return "".join(f"mov.b32 %f{j}, 0x{bits:08x};" for j in range(count))


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("from_registers", [False, True])
@pytest.mark.parametrize(("a", "b"), [("e4m3", "e4m3"), ("e5m2", "e4m3")])
def test_fp8_sums_of_14_bits(a, b, from_registers, late):
    start = np.float32(1234.567)
    options = dict(before=set_accumulators(4, int(start.view(np.uint32))), from_registers=from_registers, late=late)
    rng = np.random.default_rng(11)  # the same elements as in product()
    _, left = elements(rng, (64, 32), a)
    _, right = elements(rng, (8, 32), b)
    full, exact = product(8, 32, "f32", a, b, **options)
    np.testing.assert_allclose(full, exact + start, rtol=1e-6)
    for bits in (14, 10):
        got, _ = product(8, 32, "f32", a, b, fp8_bits=bits, **options)
        expected = [[sum_of_few_bits([start, *(x * y)], bits) for y in right] for x in left]
        np.testing.assert_array_equal(got, np.array(expected, np.float32))
        assert (got != full).mean() > 0.9


def test_fp8_sums_to_half_precision_and_without_an_accumulator():
    got, exact = product(16, 32, "f16", "e4m3", "e4m3", fp8_bits=14)
    np.testing.assert_allclose(got, exact + starting("f16", 16), rtol=2.0**-10, atol=2.0**-8)
    got, exact = product(16, 32, "f32", "e4m3", "e4m3", fp8_bits=14, scale_d="0")
    np.testing.assert_allclose(got, exact, atol=32 * np.abs(exact).max() * 2.0**-13)
    same, exact = product(16, 16, "f32", "f16", "f16", fp8_bits=14)  # 16-bit operands keep float32
    np.testing.assert_allclose(same, exact + 1, rtol=1e-6, atol=1e-6)


def test_probes_of_the_accumulator():
    """What SageAttention2 reports of A = B = 0: D with its ten lowest mantissa bits zero. And why long sums lose: 2^14
    swallows products below 2, however many."""
    rng = np.random.default_rng(0)
    zero = np.zeros((1, 16, 32), np.float32)
    start = rng.standard_normal((1, 16, 8)).astype(np.float32) * 2.0 ** rng.integers(-60, 60, (1, 16, 8)).astype(
        np.float32
    )
    got = limited_sum(zero, zero[0, :8], start, 14)
    np.testing.assert_array_equal(got.view(np.uint32), start.view(np.uint32) & np.uint32(0xFFFFFC00))
    half, one = np.full((1, 16, 32), 0.5, np.float32), np.ones((8, 32), np.float32)
    np.testing.assert_array_equal(limited_sum(half, one, np.full((1, 16, 8), 2.0**14, np.float32), 14), 2.0**14)
    np.testing.assert_array_equal(limited_sum(half, one, np.full((1, 16, 8), 2.0**14, np.float32), 24), 2.0**14 + 16)
    infinite = limited_sum(half, one, np.full((1, 16, 8), np.inf, np.float32), 14)
    np.testing.assert_array_equal(infinite, np.inf)


def test_operand_overwritten_before_the_wait():
    overwrite = "st.shared.u32 [%r51], %t; wgmma.wait_group.sync.aligned 0;"
    product(16, 16, "f32", "f16", "f16", wait=overwrite)
    with pytest.raises(SyncError, match=r"shared memory operand \(descriptor 0x.* was overwritten before") as caught:
        product(16, 16, "f32", "f16", "f16", wait=overwrite, late=True)
    assert "wgmma.wait_group" in caught.value.text


def test_wait_that_leaves_a_group_pending():
    """wait_group 1 after one group retires nothing."""
    got, _ = product(
        16, 16, "f32", "f16", "f16", wait="wgmma.wait_group.sync.aligned 1; add.f32 %f0, %f0, 0f00000000;", late=True
    )
    assert np.isnan(got[0, 0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("or.b64 %rd4, %rd4, 0x2000000000000;", "base offset"),
        ("or.b64 %rd4, %rd4, 0x4000;", "bits set that mean nothing"),
        (
            "add.s64 %rd4, %rd4, 8;",
            r"the start 0x2480 lies in line 1 of a 128-byte swizzle pattern, which repeats every 1024",
        ),
        ("add.s64 %rd3, %rd3, 56;", r"lies in line 7 of a 128-byte swizzle pattern"),
    ],
)
def test_bad_descriptors(change, message):
    with pytest.raises(PtxError, match=message) as caught:
        product(16, 16, "f32", "f16", "f16", before=change)
    assert "wgmma.mma_async" in caught.value.text


@pytest.mark.parametrize(("span", "repeats"), [(32, 256), (64, 512)])
def test_starts_of_shorter_patterns(span, repeats):
    """A pattern begins every 256 or 512 bytes; between them a base offset would be needed."""
    with pytest.raises(PtxError, match=f"line 1 of a {span}-byte swizzle pattern, which repeats every {repeats}"):
        product(16, 16, "f32", "f16", "f16", spans=(span, span), before="add.s64 %rd4, %rd4, 8;")
    product(16, 16, "f32", "f16", "f16", spans=(span, span), before=f"add.s64 %rd4, %rd4, {repeats // 16};")


def test_shapes_of_integers():
    """m64n40 exists for floats and not for integers."""
    got, exact = product(40, 16, "f32", "f16", "f16")
    np.testing.assert_allclose(got, exact + 1, rtol=1e-6, atol=1e-6)
    with pytest.raises(PtxError, match="m64n40 of integers"):
        product(40, 32, "s32", "s8", "s8")
    got, exact = product(48, 32, "s32", "s8", "s8")
    np.testing.assert_array_equal(got, exact + 3)


def test_unwritten_operand():
    with pytest.raises(UninitializedRead, match="NaN is written to global memory") as caught:
        product(16, 16, "f32", "f16", "f16", before="add.s64 %rd4, %rd4, 768;")
    assert "wgmma.mma_async" in caught.value.text


@pytest.mark.parametrize(
    ("n", "k", "result", "a", "b"),
    [
        (16, 8, "f32", "f16", "f16"),
        (16, 16, "f16", "bf16", "bf16"),
        (16, 32, "f32", "s8", "s8"),
        (16, 16, "f32", "f16", "bf16"),
    ],
)
def test_types_that_do_not_exist(n, k, result, a, b):
    with pytest.raises(PtxError, match="is not simulated"):
        run(
            kernel(n, k, result, a, b, "%rd3", transposes=", 0, 0"),
            [np.zeros(4)] * 3,
            [np.zeros(4)],
            declarations=SHARED,
        )
