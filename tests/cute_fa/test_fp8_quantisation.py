"""``cute_fa.fp8``: codes and descales against plain formulas, odd input, the rotation, and the bound of its sums."""

import math

import numpy as np
import pytest
import torch

from cute_fa import fp8
from cute_fa.semantics import errors
from ptxsim.machine.accumulate import limited_sum

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
TYPES = pytest.mark.parametrize("dtype", [E4M3, E5M2])
LARGEST = {E4M3: 448.0, E5M2: 57344.0}
# Half the distance of neighbours: relative to normal numbers, absolute for denormal ones.
RELATIVE, ABSOLUTE = {E4M3: 2.0**-4, E5M2: 2.0**-3}, {E4M3: 2.0**-10, E5M2: 2.0**-17}
CU_SEQLENS = torch.tensor([0, 40, 40, 75], dtype=torch.int32)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def uneven(*shape):
    """Normal numbers, of which every sequence, head and run of 8 tokens has its own magnitude, 1e-3 to 1e3."""
    batch, rows, heads, _ = shape
    magnitudes = 10.0 ** (
        6 * torch.rand(batch, -(-rows // 8), heads, 1, generator=torch.Generator().manual_seed(1)) - 3
    )
    return normal(*shape) * magnitudes.repeat_interleave(8, 1)[:, :rows]


def bits(codes):
    return codes.view(torch.uint8)


def assert_close_to(x, quantized, descales, dtype):
    """Codes × ``descales``, which broadcast over x, lie as close to x as the type allows."""
    codes = quantized.codes
    assert (codes.dtype, codes.shape, quantized.descale.dtype) == (dtype, x.shape, torch.float32)
    error = (codes.double() * descales.double() - x.double()).abs()
    allowed = torch.maximum(RELATIVE[dtype] * x.abs().double(), ABSOLUTE[dtype] * descales.double())
    assert (error <= allowed * (1 + 1e-5)).all()


@TYPES
@pytest.mark.parametrize("descale", [1.0, 0.37, 2.0**-126])
def test_codes_to_values_and_back(dtype, descale):
    codes, descale = torch.arange(256, dtype=torch.uint8).view(dtype), torch.tensor(descale)
    values = fp8.dequantize(codes, descale)
    torch.testing.assert_close(values, (codes.double() * descale.double()).float(), rtol=0, atol=0, equal_nan=True)
    back = fp8.quantize(values, descale, dtype)
    nan = codes.float().isnan()
    assert int(nan.sum()) == (2 if dtype == E4M3 else 6)
    assert torch.equal(bits(back)[~nan], bits(codes)[~nan])
    assert back.float()[nan].isnan().all()


@TYPES
def test_per_tensor(dtype):
    x = normal(3, 50, 7)
    made = fp8.quantize_per_tensor(x, dtype)
    assert made.descale.shape == ()
    assert made.descale == x.abs().max() / LARGEST[dtype]
    assert made.codes.float().abs().max() == LARGEST[dtype]
    assert_close_to(x, made, made.descale, dtype)
    torch.testing.assert_close(fp8.dequantize(*made), made.codes.float() * made.descale, rtol=0, atol=0)


@TYPES
@pytest.mark.parametrize("heads_kv", [None, 2])
def test_per_head(dtype, heads_kv):
    x = uneven(3, 40, 6, 32)
    made = fp8.quantize_per_head(x, dtype, heads_kv=heads_kv)
    groups = heads_kv or 6
    assert made.descale.shape == (3, groups)
    largest = x.reshape(3, 40, groups, -1).abs().amax((1, 3))
    torch.testing.assert_close(made.descale, largest / LARGEST[dtype])
    descales = made.descale[:, None].repeat_interleave(6 // groups, 2)[..., None]
    assert_close_to(x, made, descales, dtype)
    torch.testing.assert_close(fp8.dequantize(*made), made.codes.float() * descales, rtol=0, atol=0)


@TYPES
@pytest.mark.parametrize("heads_kv", [None, 2])
def test_per_block(dtype, heads_kv):
    """37 tokens in blocks of 16: the last one is short."""
    x = uneven(2, 37, 4, 16)
    made = fp8.quantize_per_block(x, 16, dtype, heads_kv=heads_kv)
    groups = heads_kv or 4
    assert made.descale.shape == (2, groups, 3)
    for block in range(3):
        part = slice(16 * block, 16 * (block + 1))
        alone = fp8.quantize_per_head(x[:, part], dtype, heads_kv=heads_kv)
        assert torch.equal(made.descale[..., block], alone.descale)
        assert torch.equal(bits(made.codes[:, part]), bits(alone.codes))
    values = fp8.dequantize(*made, block_size=16)
    descales = made.descale.repeat_interleave(16, 2)[..., :37].repeat_interleave(4 // groups, 1)
    assert_close_to(x, made, descales.transpose(1, 2)[..., None], dtype)
    assert (values - x).norm() <= 0.6 * RELATIVE[dtype] * x.norm()


@pytest.mark.parametrize("block_size", [None, 16])
def test_packed_sequences_are_quantised_each_for_itself(block_size):
    """40, 0 and 35 tokens, and 5 rows that belong to none and may hold anything."""
    x = uneven(1, 80, 4, 16)[0]
    x[75:] = torch.tensor([math.nan, 1e30, math.inf, -1e30, 0.0])[:, None, None]
    options = {"heads_kv": 2, "cu_seqlens": CU_SEQLENS}
    if block_size is None:
        made = fp8.quantize_per_head(x, **options)
    else:
        made = fp8.quantize_per_block(x, block_size, **options, max_seqlen=40)
    assert made.descale.shape == (3, 2) if block_size is None else (3, 2, 3)
    values = fp8.dequantize(*made, block_size=block_size, cu_seqlens=CU_SEQLENS)
    for sequence, rows in ((0, slice(0, 40)), (2, slice(40, 75))):
        alone = (
            fp8.quantize_per_head(x[None, rows], heads_kv=2)
            if block_size is None
            else fp8.quantize_per_block(x[None, rows], block_size, heads_kv=2)
        )
        assert torch.equal(bits(made.codes[rows]), bits(alone.codes[0]))
        assert torch.equal(made.descale[sequence], alone.descale[0])
        assert torch.equal(values[rows], fp8.dequantize(*alone, block_size=block_size)[0])
    assert (made.descale[1] == 1).all()


def test_blocks_of_packed_sequences_reach_as_far_as_the_rows_by_default():
    made = fp8.quantize_per_block(uneven(1, 80, 4, 16)[0], 16, cu_seqlens=CU_SEQLENS)
    assert made.descale.shape == (3, 4, 5)
    assert (made.descale[..., 3:] == 1).all()


@TYPES
def test_a_given_scale_saturates(dtype):
    x = torch.tensor([1.0, -2.0, 1e30, -1e30, 0.99 * LARGEST[dtype], 3e38])
    codes = fp8.quantize(x, torch.tensor(1.0), dtype)
    largest = LARGEST[dtype]
    assert codes.float().tolist() == [1.0, -2.0, largest, -largest, largest, largest]
    assert fp8.quantize(x[2:3], torch.tensor(1e-30), dtype).float() == largest  # though x / descale overflows


@TYPES
@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32])
def test_odd_input(dtype, kind):
    zeros = fp8.quantize_per_head(torch.zeros(1, 4, 2, 8, dtype=kind), dtype)
    assert (zeros.descale == 1).all()
    assert (bits(zeros.codes) == 0).all()

    x = normal(1, 6, 2, 8, dtype=kind)
    x[0, 1, 0, 3], x[0, 2, 0, 4], x[0, 2, 0, 5] = math.nan, math.inf, -math.inf
    clean = x.nan_to_num(0.0, 0.0, 0.0)
    made, expected = fp8.quantize_per_head(x, dtype), fp8.quantize_per_head(clean, dtype)
    assert torch.equal(made.descale, expected.descale)
    finite = x.isfinite()
    assert torch.equal(bits(made.codes)[finite], bits(expected.codes)[finite])
    largest = math.inf if dtype == E5M2 else 448.0
    rest = torch.tensor([math.nan, largest, -largest])
    torch.testing.assert_close(made.codes.float()[~finite], rest, rtol=0.0, atol=0.0, equal_nan=True)

    large = torch.tensor([torch.finfo(kind).max, -torch.finfo(kind).max / 2], dtype=kind)
    torch.testing.assert_close(fp8.dequantize(*fp8.quantize_per_tensor(large, dtype)), large.float())
    tiny = torch.full((4,), torch.finfo(kind).smallest_normal / 4, dtype=kind)
    made = fp8.quantize_per_tensor(tiny, dtype)
    assert made.descale >= 2.0**-126
    assert (fp8.dequantize(*made).double() - tiny.double()).abs().max() <= tiny[0].double() * RELATIVE[
        dtype
    ] + 2.0**-136


def test_empty_tensors():
    made = fp8.quantize_per_tensor(torch.zeros(0, 3))
    assert (made.codes.shape, float(made.descale)) == ((0, 3), 1.0)
    made = fp8.quantize_per_head(torch.zeros(2, 0, 3, 8))
    assert (made.codes.shape, made.descale.tolist()) == ((2, 0, 3, 8), [[1.0] * 3] * 2)
    made = fp8.quantize_per_block(torch.zeros(0, 5, 3, 8), 4)
    assert (made.codes.shape, made.descale.shape) == ((0, 5, 3, 8), (0, 3, 2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dequantised_into_16_bits(dtype):
    made = fp8.quantize_per_head(uneven(2, 9, 2, 8))
    values = fp8.dequantize(*made, dtype)
    assert torch.equal(values, fp8.dequantize(*made).to(dtype))


def matrix(size, signs=None, **options):
    return fp8.hadamard(torch.eye(size), signs, **options)


@pytest.mark.parametrize("head_dim", [1, 8, 64, 96, 128, 192, 240, 256])
def test_rotation_is_orthonormal(head_dim):
    signs = fp8.random_signs(head_dim, 3)
    rotation = matrix(head_dim, signs)
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(head_dim), atol=1e-6, rtol=0)
    torch.testing.assert_close(matrix(head_dim, signs, inverse=True), rotation.T, atol=1e-7, rtol=0)
    # blocks of powers of two, all of whose elements are as large
    first = 1 << (head_dim.bit_length() - 1)
    torch.testing.assert_close(rotation[:first, :first].abs(), torch.full((first, first), first**-0.5))
    assert (rotation[:first, first:] == 0).all()
    assert head_dim < 8 or rotation.unique(dim=0).shape[0] == head_dim


def test_matrix_of_size_4():
    expected = torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2
    assert torch.equal(matrix(4), expected)
    signs = torch.tensor([1.0, -1.0, -1.0, 1.0])
    assert torch.equal(matrix(4, signs), signs[:, None] * expected)


def test_signs_follow_the_seed():
    signs = fp8.random_signs(256, 5)
    assert torch.equal(signs, fp8.random_signs(256, torch.Generator().manual_seed(5)))
    assert not torch.equal(signs, fp8.random_signs(256, 6))
    assert signs.abs().eq(1).all()
    assert abs(signs.sum()) < 60


@pytest.mark.parametrize("head_dim", [64, 96, 256])
def test_scores_stay_and_outliers_spread(head_dim):
    """q and k with one large channel, as models have them: it decides the scores, and so does its rounding."""
    q, k = normal(2, 300, 4, head_dim)
    for t in (q, k):
        t[..., 3] *= 20
    signs = fp8.random_signs(head_dim)

    def scores(q, k):
        return torch.einsum("qhd,khd->hqk", q.double(), k.double())

    def quantised(x):
        return fp8.dequantize(*fp8.quantize_per_head(x[None]))[0]

    exact = scores(q, k)
    turned = [fp8.hadamard(t, signs) for t in (q, k)]
    torch.testing.assert_close(scores(*turned), exact, atol=1e-3, rtol=0)
    for before, after in zip((q, k), turned, strict=True):
        torch.testing.assert_close(after.norm(dim=-1), before.norm(dim=-1))
        assert after.abs().max() < 0.25 * before.abs().max()
    plain, better = ((scores(*map(quantised, pair)) - exact).norm() for pair in ((q, k), turned))
    assert better < 0.25 * plain


def test_rotation_in_16_bits_is_rounded_once():
    x = normal(5, 128, dtype=torch.bfloat16) * 100
    signs = fp8.random_signs(128)
    assert torch.equal(fp8.hadamard(x, signs), fp8.hadamard(x.float(), signs).bfloat16())


def test_gradients():
    x, w, signs = normal(3, 96).requires_grad_(), normal(3, 96, seed=1), fp8.random_signs(96)
    (gradient,) = torch.autograd.grad((fp8.hadamard(x, signs) * w).sum(), x)
    torch.testing.assert_close(gradient, fp8.hadamard(w, signs, inverse=True))
    with pytest.raises(errors.NoBackwardError, match=r"x requires a gradient: rounding to codes has none"):
        fp8.quantize_per_tensor(x)
    with torch.no_grad():
        codes, descale = fp8.quantize_per_tensor(x)
    descale.requires_grad_()
    (gradient,) = torch.autograd.grad(fp8.dequantize(codes, descale).sum(), descale)
    torch.testing.assert_close(gradient, codes.float().sum())


def everything(q, packed, signs, cu_seqlens):
    rotated = fp8.hadamard(q, signs)
    made = [
        fp8.quantize_per_tensor(rotated),
        fp8.quantize_per_head(rotated, E5M2, heads_kv=2),
        fp8.quantize_per_block(rotated, 16),
        fp8.quantize_per_head(packed, cu_seqlens=cu_seqlens),
        fp8.quantize_per_block(packed, 16, heads_kv=2, cu_seqlens=cu_seqlens, max_seqlen=40),
    ]
    values = fp8.dequantize(*made[4], torch.bfloat16, block_size=16, cu_seqlens=cu_seqlens)
    return [*(bits(codes) for codes, _ in made), *(descale for _, descale in made), values]


def test_compiled():
    """One graph, that serves another length too."""
    signs = fp8.random_signs(32)
    compiled = torch.compile(everything, fullgraph=True, dynamic=True)
    for rows in (40, 57):
        q, packed = normal(2, rows, 4, 32), normal(rows + 40, 4, 32)
        expected = everything(q, packed, signs, CU_SEQLENS)
        assert all(map(torch.equal, compiled(q, packed, signs, CU_SEQLENS), expected))


def test_no_value_reaches_the_host():
    """Meta tensors have none to give."""
    q, packed = torch.empty(2, 30, 4, 32, device="meta"), torch.empty(80, 4, 32, device="meta")
    for made in everything(q, packed, torch.empty(32, device="meta"), CU_SEQLENS.to("meta")):
        assert made.is_meta


X = torch.zeros(2, 5, 4, 8)
BAD = {
    "kind": (
        lambda: fp8.quantize_per_tensor(X, torch.int16),
        errors.ArgumentError,
        "dtype=torch.int16: torch.float8_e4m3fn, torch.float8_e5m2 or torch.int8 is needed",
    ),
    "input": (lambda: fp8.quantize_per_head(X.double()), errors.DTypeError, "x is float64: float16, bfloat16 or"),
    "dims": (lambda: fp8.quantize_per_head(X[0]), errors.ShapeError, r"x has shape \(5, 4, 8\): \(batch, seqlen"),
    "packed dims": (
        lambda: fp8.quantize_per_head(X, cu_seqlens=CU_SEQLENS),
        errors.ShapeError,
        r"x has shape \(2, 5, 4, 8\): \(total, heads, head_dim\) with cu_seqlens",
    ),
    "offsets": (
        lambda: fp8.quantize_per_head(X[0], cu_seqlens=CU_SEQLENS.long()),
        errors.DTypeError,
        "cu_seqlens is int64",
    ),
    "no heads": (lambda: fp8.quantize_per_head(X[:, :, :0]), errors.ShapeError, r"x \(2, 5, 0, 8\): at least 1 head"),
    "groups": (
        lambda: fp8.quantize_per_head(X, heads_kv=3),
        errors.ArgumentError,
        "heads_kv=3: a divisor of the 4 heads",
    ),
    "no groups": (lambda: fp8.quantize_per_head(X, heads_kv=0), errors.ArgumentError, "heads_kv=0: at least 1"),
    "block": (lambda: fp8.quantize_per_block(X, 0), errors.ArgumentError, "block_size=0: at least 1 is needed"),
    "half a block": (lambda: fp8.quantize_per_block(X, 2.5), errors.ArgumentError, "block_size=2.5: an int is needed"),
    "length": (
        lambda: fp8.quantize_per_block(X, 2, max_seqlen=5),
        errors.ArgumentError,
        "max_seqlen=5 without cu_seqlens",
    ),
    "16-bit descale": (
        lambda: fp8.quantize(X, torch.ones(2, 4).half()),
        errors.DTypeError,
        "descale is float16: float32 is needed",
    ),
    "another batch": (
        lambda: fp8.quantize(X, torch.ones(1, 4)),
        errors.ShapeError,
        r"descale \(1, 4\): \(\) or \(batch,",
    ),
    "other heads": (lambda: fp8.quantize(X, torch.ones(2, 3)), errors.ShapeError, r"descale \(2, 3\): .*divisor of 4"),
    "blocks without a size": (lambda: fp8.quantize(X, torch.ones(2, 4, 3)), errors.ShapeError, r"descale \(2, 4, 3\)"),
    "too few blocks": (
        lambda: fp8.quantize(X, torch.ones(2, 4, 2), block_size=2),
        errors.ShapeError,
        r"descale \(2, 4, 2\): 2 blocks of 2 for 5 tokens",
    ),
    "device": (
        lambda: fp8.quantize(X, torch.ones((), device="meta")),
        errors.DeviceError,
        "descale is on meta and x on cpu",
    ),
    "a list": (lambda: fp8.quantize_per_head([1.0]), errors.ArgumentError, "x is list: a torch.Tensor is needed"),
    "a number": (lambda: fp8.quantize(X, 2.0), errors.ArgumentError, "descale is float: a torch.Tensor is needed"),
    "codes": (
        lambda: fp8.dequantize(X, torch.tensor(1.0)),
        errors.DTypeError,
        "codes is float32: float8_e4m3fn, float8_e5m2 or int8 is",
    ),
    "values": (
        lambda: fp8.dequantize(X.to(E4M3), torch.tensor(1.0), torch.int32),
        errors.ArgumentError,
        "dtype=torch.int32: float16, bfloat16 or float32",
    ),
    "rotation": (lambda: fp8.hadamard(X.to(E4M3)), errors.DTypeError, "x is float8_e4m3fn: float16"),
    "signs": (lambda: fp8.hadamard(X, torch.ones(4)), errors.ShapeError, r"signs \(4,\): \(8,\) is needed"),
    "no signs": (lambda: fp8.random_signs(0), errors.ArgumentError, "head_dim=0: at least 1 is needed"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    call, error, message = BAD[case]
    with pytest.raises(error, match=message) as caught:
        call()
    assert type(caught.value) is error


def accumulated(left, right, count):
    """Σ left · right with 14 bits, and exactly: of rows of 32 · n elements, n instructions."""
    total = np.zeros((1, 16, 1), np.float32)
    for i in range(left.shape[1] // 32):
        part = slice(32 * i, 32 * (i + 1))
        total = limited_sum(left[None, :, part], right[None, part], total, 14)
    return total[0, :, 0], left.astype(np.float64) @ right.astype(np.float64)


@pytest.mark.parametrize("instructions", [1, 2, 4, 5, 8])
def test_sums_keep_to_the_bound(instructions):
    """Whatever is summed; and there is a sum that comes within 8 % of the bound: one product, and 32 n − 1 that are
    just too small to be seen beside it."""
    rng = np.random.default_rng(instructions)
    bound = fp8.sum_error_bound(instructions)
    for power in (0, 4, 8, 12):  # how far magnitudes differ
        size = 32 * instructions
        left = (rng.standard_normal((16, size)) * 2.0 ** rng.uniform(-power, 0, (16, size))).astype(np.float32)
        left = torch.from_numpy(left).to(E4M3).float().numpy()
        right = torch.from_numpy(rng.standard_normal(size).astype(np.float32)).to(E4M3).float().numpy()
        got, exact = accumulated(left, right, instructions)
        assert (np.abs(got - exact) <= bound * (np.abs(left) @ np.abs(right))).all()
    left = np.full((16, 32 * instructions), 1.75, np.float32)
    right = np.full(32 * instructions, 1.125 * 2.0**-9, np.float32)
    left[:, 0], right[0] = 2.0**3, 2.0**2
    got, exact = accumulated(left, right, instructions)
    np.testing.assert_array_equal(got, 32.0)
    assert (0.92 * bound < (exact - got) / exact).all()
    assert ((exact - got) / exact < bound).all()


def test_no_sequences():
    """As attention takes them: packed rows that belong to none."""
    packed, offsets = normal(3, 2, 8), torch.zeros(1, dtype=torch.int32)
    for made, shape in (
        (fp8.quantize_per_head(packed, cu_seqlens=offsets), (0, 2)),
        (fp8.quantize_per_block(packed, 2, cu_seqlens=offsets), (0, 2, 2)),
        (fp8.quantize_per_head(packed[None][:0]), (0, 2)),
    ):
        assert made.descale.shape == shape
    assert fp8.quantize(packed, torch.ones(0, 2), cu_seqlens=offsets).shape == (3, 2, 8)
