"""An element of a result is the same bits whatever else is computed beside it: matrix products of every instruction,
functions that NumPy vectorises, minima and maxima. The order of warps decides who is beside whom."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from ptxsim.machine.products import double_products, in_fragments, products
from ptxsim.ops import floating
from ptxsim.ops.numerics import EXTREMES
from tests.ptxsim import test_tcgen05_mma as tensor
from tests.testing.ptx import aligned, kernel_text, launch, same_bits


def wide(rng, shape):
    """Numbers of many magnitudes, of which each order of summation makes another sum."""
    return (rng.standard_normal(shape) * 2.0 ** rng.integers(-6, 7, shape)).astype(np.float32)


def summed(left, right):
    """left · rightᵀ, term by term."""
    total = np.zeros((*left.shape[:-1], right.shape[-2]), left.dtype)
    for k in range(left.shape[-1]):
        total += left[..., :, None, k] * right[..., None, :, k]
    return total


def unaligned(array):
    """The same, four bytes beyond an address that is a multiple of 64."""
    return aligned(np.concatenate([array.ravel()[:1], array.ravel()]), 64)[1:].reshape(array.shape)


# ---- products ------------------------------------------------------------------------------------------------------
SHAPES = [(16, 16, 128), (16, 32, 8), (16, 8, 72), (8, 4, 8), (128, 16, 40), (16, 256, 24)]


@pytest.mark.parametrize(("rows", "depth", "columns"), SHAPES)
def test_products_are_sums_in_order(rows, depth, columns):
    rng = np.random.default_rng(0)
    left, right, of = wide(rng, (9, rows, depth)), wide(rng, (3, columns, depth)), rng.integers(0, 3, 9)
    expected = summed(left, right[of])
    assert (expected != summed(left[..., ::-1], right[of][..., ::-1])).any()  # the order matters
    transposed = np.ascontiguousarray(right.swapaxes(1, 2)).swapaxes(1, 2)
    for b in (right, transposed, unaligned(right), np.repeat(right, 2, 0)[::2]):
        np.testing.assert_array_equal(products(left, b, of), expected)
        np.testing.assert_array_equal(products(unaligned(left), b, of, fragments=True), in_fragments(expected))
    for j, t in enumerate(of):
        np.testing.assert_array_equal(products(left[j : j + 1], right[t : t + 1])[0], expected[j])
        np.testing.assert_array_equal(products(left[: j + 1], right[of][: j + 1]), expected[: j + 1])


def test_fragments():
    """Lane 4 g + t holds columns 2 t and 2 t + 1 of each block, of rows g and g + 8."""
    got = products(np.arange(64, dtype=np.float32).reshape(4, 16, 1), np.ones((4, 24, 1), np.float32), fragments=True)
    column = products(np.ones((1, 16, 1), np.float32), np.arange(24, dtype=np.float32)[None, :, None], fragments=True)
    for block, half, odd, g, t in itertools.product(range(3), range(2), range(2), range(8), range(4)):
        register, lane = 4 * block + 2 * half + odd, 4 * g + t
        np.testing.assert_array_equal(got[register, :, lane], 16 * np.arange(4) + 8 * half + g)
        assert column[register, 0, lane] == 8 * block + 2 * t + odd


def test_nans_of_products_are_canonical():
    """PTX ISA 9.7.14: whatever they come from."""
    nans = np.array([0x7FC00001, 0xFFC12345, 0x7F800001], np.uint32).view(np.float32)
    left = np.zeros((1, 4, 3), np.float32)
    left[0, 0], left[0, 1, 0], left[0, 2, 1] = nans, np.inf, -np.inf
    right = np.ones((1, 8, 3), np.float32)
    right[0, 4:, 0] = 0
    bits = products(left, right)[0].view(np.uint32)
    assert (bits[0] == 0x7FFFFFFF).all() and (bits[1, 4:] == 0x7FFFFFFF).all()
    assert (bits[1, :4] == 0x7F800000).all() and (bits[2] == 0xFF800000).all() and not bits[3].any()


def test_products_in_double_precision_are_chains_of_fma():
    rng = np.random.default_rng(1)
    left, right = rng.standard_normal((5, 16, 4)), rng.standard_normal((5, 8, 4))
    expected = np.zeros((5, 16, 8))
    for k in range(4):
        expected = floating.fma64(left[..., :, None, k], right[..., None, :, k], expected)
    np.testing.assert_array_equal(double_products(left, right), expected)


# ---- elements of arrays --------------------------------------------------------------------------------------------
FUNCTIONS = {name: (function, 1) for name, function in floating._UNARY.items()}
FUNCTIONS |= {f"{name}.bf16x2": (floating.half_function(name, "bf16", True), 1) for name in ("ex2", "tanh")}
FUNCTIONS |= {name: (function, 2) for name, function in EXTREMES.items()}
FUNCTIONS |= {f"{name}.f16x2": (floating.half_function(name, "f16", True), 2) for name in ("max", "min.NaN")}
FUNCTIONS |= {"fma": (floating.fma32, 3), "fma.rm": (floating.single_function("fma", "rm", True, False), 3),
              "saturate": (floating.saturate, 1)}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_by_place(name):
    """Every element is the one that it is alone, in arrays of any length, place, stride and direction; but for which
    NaN it is."""
    function, count = FUNCTIONS[name]
    rng = np.random.default_rng(2)
    special = np.array([0, -0.0, np.inf, -np.inf, np.nan, 1, -126, 128, 1e-45, 3.4e38], np.float32)
    special = np.append(special, np.array([0x7FA00001, 0xFF800001], np.uint32).view(np.float32))  # signalling NaNs
    values = np.concatenate([wide(rng, 800) * 10, rng.choice(special, 400)])
    operands = [rng.permutation(values) for _ in range(count)]
    if name.endswith("x2"):
        operands = [x.view(np.uint32) for x in operands]
    kind = np.float16 if name.endswith("f16x2") else np.float32
    with np.errstate(all="ignore"):
        alone = np.concatenate([function(*(x[i : i + 1] for x in operands)) for i in range(len(values))])
        parts = [np.s_[start : start + length] for start in (0, 1, 7) for length in (*range(2, 66, 3), 300, 1100)]
        for part in [*parts, np.s_[::2], np.s_[1::3], np.s_[::-1], np.s_[900:100:-3]]:
            got = function(*(x[part] for x in operands))
            same_bits(np.ascontiguousarray(got).view(kind), np.ascontiguousarray(alone[part]).view(kind))


@pytest.mark.parametrize(("operation", "results"), [("max", (0, 0, 0, 1)), ("min", (0, 1, 1, 1))])
def test_zeros_of_extremes(operation, results):
    """+0.0 > -0.0 (PTX ISA 9.7.3, 9.7.4 and redux): 1 where the result is -0."""
    zeros = np.array([[0.0, 0.0], [0.0, -0.0], [-0.0, 0.0], [-0.0, -0.0]], np.float32)
    for function in (EXTREMES[operation], EXTREMES[operation + ".NaN"]):
        for got in (function(*zeros.T), function.reduce(zeros, axis=1)):
            np.testing.assert_array_equal(got, 0.0)
            np.testing.assert_array_equal(np.signbit(got), results)


# ---- warps beside others -------------------------------------------------------------------------------------------
def codes(rng, kind, shape):
    """Registers of random numbers of a type, none of them infinite or NaN."""
    if kind in ("f16", "bf16"):
        x = torch.from_numpy(wide(rng, (*shape, 2))).to({"f16": torch.float16, "bf16": torch.bfloat16}[kind])
        return np.ascontiguousarray(x.view(torch.int16).numpy()).view(np.uint32)[..., 0]
    if kind in ("tf32", "f32"):
        return wide(rng, shape).view(np.uint32)
    if kind in ("e4m3", "e5m2"):
        x = rng.integers(0, 0x78, (*shape, 4)) | rng.integers(0, 2, (*shape, 4)) << 7
        return x.astype(np.uint8).view(np.uint32)[..., 0]
    if kind == "ue8m0":
        return rng.integers(120, 135, (*shape, 4)).astype(np.uint8).view(np.uint32)[..., 0]
    return rng.integers(0, 2**32, shape, dtype=np.uint32)


def in_company(text, inputs, out, size, threads, everywhere=(), **options):
    """Assert that every ``size`` threads alone give what they give in a grid of four CTAs of ``threads``, in two
    schedules. ``inputs`` and ``out`` have a row for each of the 4 * threads; ``everywhere``: inputs that all have."""

    def results(part, **options):
        arrays = [aligned(x) for x in everywhere] + [aligned(x[part]) for x in inputs] + [aligned(out[part])]
        launch(text, arrays, **options)
        return arrays[-1]

    alone = [results(np.s_[first : first + size], threads=size, **options) for first in range(0, len(out), size)]
    assert np.unique(alone).size > 8
    for seed in (None, 1):
        together = results(np.s_[:], threads=threads, grid=4, seed=seed, **options)
        np.testing.assert_array_equal(together, np.concatenate(alone))


_SPARSE = "mma.sp::ordered_metadata.sync.aligned"
# opcode, registers of A, B and C, their types, and more operands: %r200 holds metadata, %r201 and %r202 scale factors
WARP_MMA = [
    ("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", (4, 2, 4), ("bf16", "bf16", "f32"), ""),
    ("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32", (4, 2, 4), ("f16", "f16", "f32"), ""),
    ("mma.sync.aligned.m16n8k8.row.col.f16.f16.f16.f16", (2, 1, 2), ("f16", "f16", "f16"), ""),
    ("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32", (4, 2, 4), ("tf32", "tf32", "f32"), ""),
    ("mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e5m2.f32", (4, 2, 4), ("e4m3", "e5m2", "f32"), ""),
    ("mma.sync.aligned.m16n8k32.row.col.kind::f8f6f4.f32.e3m2.e2m1.f32", (4, 2, 4), ("", "", "f32"), ""),
    ("mma.sync.aligned.m16n8k32.row.col.s32.s8.u8.s32", (4, 2, 4), ("", "", ""), ""),
    ("mma.sync.aligned.m8n8k4.row.col.f32.f16.f16.f32", (2, 2, 8), ("f16", "f16", "f32"), ""),
    ("mma.sync.aligned.m16n8k8.row.col.f64.f64.f64.f64", (4, 2, 4), ("f64", "f64", "f64"), ""),
    (f"{_SPARSE}.m16n8k32.row.col.f32.bf16.bf16.f32", (4, 4, 4), ("bf16", "bf16", "f32"), ", %r200, 0"),
    (f"{_SPARSE}.m16n8k64.row.col.f32.e4m3.e4m3.f32", (4, 4, 4), ("e4m3", "e4m3", "f32"), ", %r200, 0"),
    ("mma.sync.aligned.m16n8k32.row.col.kind::mxf8f6f4.block_scale.scale_vec::1X.f32.e4m3.e4m3.f32.ue8m0", (4, 2, 4),
     ("e4m3", "e4m3", "f32"), ", %r201, {0, 0}, %r202, {0, 0}"),
    ("mma.sync.aligned.m16n8k64.row.col.kind::mxf4nvf4.block_scale.scale_vec::4X.f32.e2m1.e2m1.f32.ue8m0", (4, 2, 4),
     ("", "", "f32"), ", %r201, {0, 0}, %r202, {0, 0}"),
]  # fmt: skip


@pytest.mark.parametrize(("opcode", "counts", "kinds", "more"), WARP_MMA)
def test_warps_in_company(opcode, counts, kinds, more):
    rng = np.random.default_rng(3)
    double = kinds[0] == "f64"
    kind, register, threads = ("f64", "%fd", 96) if double else ("b32", "%r", 96)
    width, groups, loads, at = 8 if double else 4, [], "", 10
    arrays = [wide(rng, (4 * threads, n)).astype(float) if double else codes(rng, x, (4 * threads, n))
              for n, x in zip(counts, kinds, strict=True)]  # fmt: skip
    for source, n in enumerate(counts):
        loads += f"mad.wide.u32 %rd{source}, %g, {width * n}, %in{source};"
        loads += "".join(f"ld.global.{kind} {register}{at + j}, [%rd{source}+{width * j}];" for j in range(n))
        groups.append("{" + ", ".join(f"{register}{at + j}" for j in range(n)) + "}")
        at += n
    arrays.append(codes(rng, "ue8m0", (4 * threads, 2)))
    loads += "mad.wide.u32 %rd9, %g, 8, %in3; ld.global.v2.u32 {%r201, %r202}, [%rd9]; mov.u32 %r200, 0x4e4e4e4e;"
    results = [f"{register}{40 + j}" for j in range(counts[2])]
    store = f"mad.wide.u32 %rd8, %g, {width * len(results)}, %out0;"
    store += "".join(f"st.global.{kind} [%rd8+{width * j}], {x};" for j, x in enumerate(results))
    body = f"{loads} {opcode} {{{', '.join(results)}}}, {', '.join(groups)}{more}; {store}"
    out = np.zeros((4 * threads, len(results)), float if double else np.uint32)
    in_company(kernel_text(body, 4, 1, target="sm_120a"), arrays, out, 32, threads)


# types, K, that of A and B, whether A is in registers, more operands (scales and transposition), some N
WGMMA = [
    ("f32.bf16.bf16", 16, "bf16", True, ", 1, 1, 1", (8, 72)),
    ("f32.f16.f16", 16, "f16", False, ", 1, 1, 1, 0", (128,)),
    ("f16.f16.f16", 16, "f16", False, ", 1, -1, 0, 0", (24,)),
    ("f32.tf32.tf32", 8, "tf32", True, ", 1, 1", (40,)),
    ("f32.e4m3.e5m2", 32, "e4m3", True, ", 1, 1", (8, 72)),
    ("f32.e5m2.e4m3", 32, "e4m3", False, ", 1, 1", (16,)),
    ("s32.s8.s8", 32, "", False, "", (32,)),
    ("sp.f32.bf16.bf16", 32, "bf16", True, ", 1, 1, 0", (8, 40)),
    ("sp.f32.e4m3.e4m3", 64, "e4m3", True, ", 1, 1", (24, 72)),
]


@pytest.mark.parametrize(("types", "k", "kind", "from_registers", "more", "n"),
                         [(*case, n) for *case, some in WGMMA for n in some])  # fmt: skip
def test_warpgroups_in_company(types, k, kind, from_registers, more, n):
    """CTAs of three warpgroups that share B, and A if it is in shared memory; seeds also separate the warps of one."""
    rng = np.random.default_rng(4)
    sparse, threads = types.startswith("sp."), 384
    count = n // 4 if types.split(".")[-3] == "f16" else n // 2
    shared, registers = codes(rng, kind, (128, 64)), codes(rng, kind, (4 * threads, 4))
    copy = "".join(f"ld.global.v4.u32 {{%r1, %r2, %r3, %r4}}, [%rd1+{16 * i}];"
                   f"st.shared.v4.u32 [%r51+{2048 * i}], {{%r1, %r2, %r3, %r4}};" for i in range(16))  # fmt: skip
    accumulators = "{" + ", ".join(f"%r{100 + j}" for j in range(count)) + "}"
    # no swizzle: cores of 128 bytes, of which the next along one direction comes first
    a, b = (at >> 4 | 128 >> 4 << 16 | 1024 >> 4 << 32 for at in (1024, 1024 + 16384))
    operand = "{%r5, %r6, %r7, %r8}" if from_registers else "%rd3"
    body = f"""and.b32 %r50, %t, 127; mad.wide.u32 %rd1, %r50, 256, %in0; mad.lo.u32 %r51, %r50, 16, 1024; {copy}
    mad.wide.u32 %rd2, %g, 16, %in1;
    ld.global.v4.u32 {{%r5, %r6, %r7, %r8}}, [%rd2]; mov.b64 %rd3, {a}; mov.b64 %rd4, {b}; mov.u32 %r9, 0x44444444;
    setp.ne.u32 %p1, %t, %t; fence.proxy.async.shared::cta; bar.sync 0; wgmma.fence.sync.aligned;
    wgmma.mma_async.{"sp." if sparse else ""}sync.aligned.m64n{n}k{k}.{types.removeprefix("sp.")} {accumulators},
      {operand}, %rd4{", %r9, 0" if sparse else ""}, %p1{more};
    wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0; mad.wide.u32 %rd9, %g, {4 * count}, %out0;"""
    body += "".join(f"st.global.b32 [%rd9+{4 * j}], %r{100 + j};" for j in range(count))
    text = kernel_text(body, 2, 1, declarations=".shared .align 1024 .b8 buffer[32768];")
    out = np.zeros((4 * threads, count), np.uint32)
    for late in (False, True):
        in_company(text, [registers], out, 128, threads, [shared], late=late)


# ---- tcgen05.mma ---------------------------------------------------------------------------------------------------
def typed(rng, shape, kind):
    """(bytes of rows, values as float32)."""
    dtype = {"f16": torch.float16, "bf16": torch.bfloat16, "tf32": torch.float32, "e5m2": torch.float8_e5m2}[kind]
    x = torch.from_numpy(wide(rng, shape)).to(dtype)
    if kind == "tf32":
        x = (x.view(torch.int32) & -0x2000).view(torch.float32)
    return x.view(torch.uint8).numpy(), x.float().numpy()


KINDS = [("f16", "bf16", 16), ("f16", "f16", 16), ("tf32", "tf32", 8), ("f8f6f4", "e5m2", 32)]
FORMS = [(128, 40, False, False), (128, 32, False, True), (64, 32, False, False), (32, 64, True, False)]


@pytest.mark.parametrize(("kind", "element", "k"), KINDS)
@pytest.mark.parametrize(("m", "n", "stationary", "from_tmem"), FORMS)
def test_tcgen05_sums_in_order(kind, element, k, m, n, stationary, from_tmem):
    """D = A · Bᵀ, its terms added from the first to the last."""
    rng = np.random.default_rng(5)
    (a, a_values), (b, b_values) = typed(rng, (m, k), element), typed(rng, (n, k), element)
    tmem = tensor.random_words()
    if from_tmem:
        tensor.in_tensor(tmem, tensor.A_IN, a)
    image, descriptors = tensor.in_shared(np.zeros_like(a) if from_tmem else a, b)
    name = "tcgen05.mma.ws.cta_group::1" if stationary else "tcgen05.mma.cta_group::1"
    source = f"[{tensor.A_IN}]" if from_tmem else "%rd3"
    idesc = tensor.describe(element, element, m, n)
    instruction = f"{name}.kind::{kind} [0], {source}, %rd4, %r61, %p3;"
    out = tensor.tensor_program(instruction, tmem, image, descriptors, idesc)
    expected = summed(a_values, b_values)
    if stationary:  # parts of the columns, below each other
        got = np.concatenate(np.split(out[:, : n * m // 128], 128 // m), 1)
    else:
        got = out[np.arange(m) % 16 + np.arange(m) // 16 * 32 if m == 64 else np.arange(m), :n]
    np.testing.assert_array_equal(np.ascontiguousarray(got).view(np.float32), expected)


def test_sparse_tcgen05_sums_in_order():
    rng = np.random.default_rng(6)
    (a, a_values), (b, b_values) = typed(rng, (128, 16), "bf16"), typed(rng, (24, 32), "bf16")
    image, descriptors = tensor.in_shared(a, b)
    whole, codes = tensor.sparse_rows(rng, a_values, "bf16")
    tmem = tensor.random_words()
    tensor.metadata_in_tensor(tmem, "f16", codes, 0)
    idesc = tensor.describe("bf16", "bf16", 128, 24, flags=4)
    instruction = f"tcgen05.mma.sp.cta_group::1.kind::f16 [0], %rd3, %rd4, [{tensor.META}], %r61, %p3;"
    out = tensor.tensor_program(instruction, tmem, image, descriptors, idesc)
    np.testing.assert_array_equal(out[:, :24].view(np.float32), summed(whole.astype(np.float32), b_values))


def test_block_scaled_tcgen05_sums_in_order():
    rng = np.random.default_rng(7)
    (a, a_values), (b, b_values) = typed(rng, (128, 32), "e5m2"), typed(rng, (24, 32), "e5m2")
    image, descriptors = tensor.in_shared(a, b)
    tmem = tensor.random_words()
    a_scale = tensor.scales_in_tensor(tmem, rng, tensor.SCALE_A, 128, 1, 0, "ue8m0")
    b_scale = tensor.scales_in_tensor(tmem, rng, tensor.SCALE_B, 24, 1, 0, "ue8m0")
    idesc = 1 << 7 | 1 << 10 | 24 >> 3 << 17 | 1 << 23 | 1 << 27
    instruction = f"tcgen05.mma.cta_group::1.kind::mxf8f6f4.block_scale [0], %rd3, %rd4, %r61, {tensor.SCALES}, %p3;"
    out = tensor.tensor_program(instruction, tmem, image, descriptors, idesc)
    expected = (summed(a_values, b_values) * a_scale * b_scale.T).astype(np.float32)
    np.testing.assert_array_equal(out[:, :24].view(np.float32), expected)
