"""Sums of tensor instructions with roundings (``simulate(arithmetic=…)``): by hand, by exact fractions, and of PTX."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch

import ptxsim
from cute_fa.engine import worlds
from ptxsim.errors import SimError
from ptxsim.machine import machine
from ptxsim.machine.launch import LaunchConfig
from ptxsim.machine.products import products
from ptxsim.machine.tensor_sums import ARITHMETICS, TensorSums, distinct_rule, hardware_rule
from tests.ptxsim import test_tcgen05_mma as tcgen05
from tests.ptxsim import test_warp_mma as warp_mma
from tests.ptxsim import test_wgmma as wgmma
from tests.testing.copy_kernel import compile_scale
from tests.testing.ptx import same_bits

A100, H100, B200 = (TensorSums("hardware", arch) for arch in (80, 90, 100))
DISTINCT = TensorSums("distinct", 90)
TORCH = {"f16": torch.float16, "bf16": torch.bfloat16, "e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
LEAST = {"f16": -14, "bf16": -126, "tf32": -126, "f32": -126, "e4m3": -6, "e5m2": -14}  # exponents of normal numbers


def one(sums, instruction, element, a, b, start=0.0, result="f32", **options):
    """One element of D, of a row of A and a column of B."""
    a, b, start = (np.array(x, np.float32).reshape(1, 1, -1) for x in (a, b, start))
    # products.c takes rows in fours and columns in eights
    with np.errstate(all="ignore"):
        out = sums.add(instruction, (element, element), result, a.repeat(4, 1), b.repeat(8, 1),
                       start.repeat(4, 1).repeat(8, 2), **options)  # fmt: skip
    assert (out.view(np.uint32) == out.view(np.uint32)[0, 0, 0]).all()
    return out[0, 0, 0]


# ---- by hand ---------------------------------------------------------------------------------------------------------
# their product is 2^-25: the last bit that Hopper keeps beside 1, the first that Ampere cuts
SMALL = 2.0**-12, 2.0**-13


def beside_one(count, places=15):
    """A row and a column whose products are 1, then ``count`` times 2^-25, then zeros."""
    return ([1.0, *[x] * count, *[0.0] * (places - count)] for x in SMALL)


def test_small_products_beside_a_large_one():
    """15 · 2^-25 beside 1 is 3.75 units in the last place. fp32 sums of nearest numbers lose each of the 15."""
    a, b = beside_one(15)
    exact = np.array(a, np.float32)[None, None], np.array(b, np.float32)[None, None]
    assert products(exact[0].repeat(4, 1), exact[1].repeat(8, 1))[0, 0, 0] == 1
    for instruction in ("mma", "wgmma"):
        assert one(H100, instruction, "f16", a, b) == 1 + 3 * 2.0**-23
        assert one(H100, instruction, "f16", [-x for x in a], b) == -1 - 3 * 2.0**-23  # towards zero
    assert one(B200, "tcgen05", "f16", a, b) == 1 + 3 * 2.0**-23
    assert one(A100, "mma", "f16", a, b) == 1


def test_cancellation():
    """What the largest terms cut stays cut when they cancel. Ampere's second half knows nothing of the first."""
    a, b = beside_one(15)
    assert one(H100, "mma", "f16", a, b, -1.0) == 15 * 2.0**-25
    assert one(A100, "mma", "f16", a, b, -1.0) == 8 * 2.0**-25
    assert one(H100, "mma", "f16", [1.0, 2.0**-13], [1.0, 2.0**-13], -1.0) == 0
    assert one(H100, "mma", "f16", [2.0**-13], [2.0**-13]) == 2.0**-26


def test_two_halves_of_k_and_the_whole():
    """14 · 2^-25 are 3.5 units in the last place; seven of them 1.75, cut twice."""
    a, b = beside_one(14)
    assert one(H100, "mma", "f16", a, b) == 1 + 3 * 2.0**-23
    apart = [[x for one_of in row for x in (one_of, 0.0)] for row in (a, b)]  # a sparse row with its zeros
    assert one(H100, "mma", "f16", *apart, sparse=True) == 1 + 3 * 2.0**-23
    assert one(H100, "mma", "f16", *apart) == 1 + 2 * 2.0**-23
    halves = one(H100, "mma", "f16", a[8:], b[8:], one(H100, "mma", "f16", a[:8], b[:8]))
    assert halves == 1 + 2 * 2.0**-23
    # on Ampere they are the same, here beside 2^-1, of which they are 14 and 7 quarters of the last bit kept
    start = np.float32(2.0**-1)
    a = [0.0, *a[1:]]
    whole = one(A100, "mma", "f16", a, b, start)
    assert whole == one(A100, "mma", "f16", a[8:], b[8:], one(A100, "mma", "f16", a[:8], b[:8], start))
    assert whole == 2.0**-1 + (3 + 3) * 2.0**-24 and one(H100, "mma", "f16", a, b, start) == 2.0**-1 + 7 * 2.0**-24


def test_the_exponent_of_a_product_is_that_of_its_factors():
    """1.5 · 1.5 = 2.25 counts as 2^0, so that 2^-25 is kept beside it: eight of them are a unit in its last place."""
    assert one(H100, "mma", "f16", [1.5, *[SMALL[0]] * 8], [1.5, *[SMALL[1]] * 8]) == 2.25 + 2.0**-22
    assert one(H100, "mma", "f16", [1.5, *[SMALL[0]] * 8], [1.0, *[SMALL[1]] * 8], 2.25) == 3.75


def test_subnormal_factors():
    """The exponent of a subnormal f16 is -14: 2^-24 · 1 counts as 2^-14, and 2^-40 is beyond the last bit. As bf16
    these numbers are normal."""
    a, b = [2.0**-24, 2.0**-20], [1.0, 2.0**-20]
    assert one(H100, "mma", "f16", a, b) == 2.0**-24
    assert one(H100, "mma", "bf16", a, b) == 2.0**-24 + 2.0**-40


def test_fp8():
    """Hopper's wgmma keeps 13 bits below the largest exponent, and 13 of the result; its mma.sync and Blackwell 25."""
    a, b = [1.0, *[2.0**-7] * 31], [1.0, *[2.0**-7] * 31]
    assert one(H100, "wgmma", "e5m2", a, b) == 1
    assert one(H100, "mma", "e5m2", a, b) == one(B200, "tcgen05", "e5m2", a, b) == 1 + 31 * 2.0**-14
    a = [1.0, *[1.5 * 2.0**-6] * 31]
    assert one(H100, "wgmma", "e5m2", a, b) == 1 + 31 * 2.0**-13
    assert one(H100, "wgmma", "e5m2", a, b, 1.0) == 2 + 30 * 2.0**-13  # 2 has its 13th bit at 2^-12
    same_bits(one(H100, "wgmma", "e5m2", [0.0], [0.0], np.float32(1234.567)), np.float32(1234.5))
    # sm_89: two sums of 16 products, and beside 2 the second keeps none
    assert one(TensorSums("hardware", 89), "mma", "e5m2", a, b, 1.0) == 2 + 14 * 2.0**-13


def test_results_in_half_precision_are_the_nearest():
    a, b = [1.0, 2.0**-5, 2.0**-12], [1.0, 2.0**-6, 2.0**-12]  # 1 and half a unit in the last place, and a little
    assert one(H100, "mma", "f16", a[:2], b[:2], result="f16") == 1
    assert one(H100, "mma", "f16", a, b, result="f16") == 1 + 2.0**-10
    assert one(H100, "mma", "f16", [256.0], [256.0], result="f16") == np.inf


def test_ends_of_the_range():
    largest = np.finfo(np.float32).max
    assert one(H100, "mma", "bf16", [2.0**50], [2.0**53], largest) == largest  # 2^103, half a unit in the last place
    assert one(H100, "mma", "bf16", [2.0**64, 2.0**64], [2.0**63, 2.0**63]) == np.inf
    assert one(H100, "mma", "bf16", [np.inf], [-2.0], largest) == -np.inf
    for a, b, start in (([np.inf], [0.0], 1.0), ([np.inf], [1.0], -np.inf), ([np.nan], [1.0], 0.0)):
        assert one(H100, "mma", "bf16", a, b, start).view(np.uint32) == 0x7FFFFFFF
    assert one(H100, "mma", "bf16", [2.0**-75], [1.5 * 2.0**-74]) == 2.0**-149  # the smallest one
    assert not np.signbit(one(H100, "mma", "f16", [-0.0], [1.0], -0.0))


# ---- by fractions ----------------------------------------------------------------------------------------------------
def exponent(x, least):
    return max(math.frexp(x)[1] - 1, least) if x else -math.inf


def by_fractions(a, b, start, element, bits, at_once, fraction):
    """An element of D with exact fractions, as float32."""
    for k in range(0, len(a), at_once):
        pairs = [(float(x), float(y)) for x, y in zip(a[k : k + at_once], b[k : k + at_once], strict=True)]
        least = LEAST[element]
        exponents = [exponent(x, least) + exponent(y, least) for x, y in pairs] + [exponent(float(start), -126)]
        terms = [Fraction(x) * Fraction(y) for x, y in pairs] + [Fraction(float(start))]
        unit = Fraction(2) ** (max(exponents) - bits)
        total = sum(int(x / unit) for x in terms) * unit  # int() of a fraction goes towards zero
        if not total:
            start = 0.0
            continue
        e = total.numerator.bit_length() - total.denominator.bit_length()
        e -= abs(total) < Fraction(2) ** e
        unit = Fraction(2) ** (e - fraction)
        start = float(int(total / unit) * unit)
    return start


def drawn(rng, shape, element):
    """Numbers of a format with exponents far apart, as float32."""
    x = torch.from_numpy(rng.standard_normal(shape) * 2.0 ** rng.integers(-14, 2, shape))
    if element == "tf32":
        return (x.float().numpy().view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)
    return x.to(TORCH[element]).float().numpy()


CASES = [("mma", "f16", 80), ("mma", "tf32", 80), ("mma", "e4m3", 89), ("mma", "bf16", 90), ("wgmma", "f16", 90),
         ("wgmma", "tf32", 90), ("wgmma", "e4m3", 90), ("mma", "e4m3", 120), ("tcgen05", "e5m2", 100)]  # fmt: skip


@pytest.mark.parametrize("arithmetic", ["hardware", "distinct"])
@pytest.mark.parametrize(("instruction", "element", "arch"), CASES)
def test_random_products(arithmetic, instruction, element, arch):
    rng, depth = np.random.default_rng(3), {"tf32": 8, "f16": 16, "bf16": 16}.get(element, 32)
    a, b = drawn(rng, (2, 16, depth), element), drawn(rng, (2, 8, depth), element)
    start = drawn(rng, (2, 16, 8), "tf32") * np.float32(np.pi)
    got = TensorSums(arithmetic, arch).add(instruction, (element, element), "f32", a, b, start)
    rule = (
        hardware_rule(arch, instruction, element) if arithmetic == "hardware" else distinct_rule(instruction, element)
    )
    expected = np.array([[[by_fractions(a[i, r], b[i, c], start[i, r, c], element, *rule) for c in range(8)]
                          for r in range(16)] for i in range(2)])  # fmt: skip
    np.testing.assert_array_equal(got, expected)
    assert (got != products(a, b) + start).mean() > 0.2


def test_rules_of_the_architectures():
    """Those of the paper: bits, products of a sum, bits of an fp32 result."""
    assert hardware_rule(80, "mma", "f16") == hardware_rule(86, "mma", "bf16") == (24, 8, 23)
    assert hardware_rule(80, "mma", "tf32") == (24, 4, 23)
    assert hardware_rule(89, "mma", "e4m3") == (13, 16, 13)
    assert hardware_rule(90, "mma", "f16") == hardware_rule(90, "wgmma", "bf16") == (25, 16, 23)
    assert hardware_rule(90, "wgmma", "e4m3") == (13, 32, 13) and hardware_rule(90, "mma", "e4m3") == (25, 32, 23)
    for arch, instruction in ((100, "mma"), (100, "tcgen05"), (103, "tcgen05"), (120, "mma")):
        assert hardware_rule(arch, instruction, "bf16") == (25, 16, 23)
        assert hardware_rule(arch, instruction, "e4m3") == hardware_rule(arch, instruction, "e2m3") == (25, 32, 23)
        assert hardware_rule(arch, instruction, "e2m1", grouped=True)[0] == 35
    kinds = list(itertools.product(("mma", "wgmma", "tcgen05"), ("f16", "e4m3", "tf32")))
    assert len({distinct_rule(*kind).bits for kind in kinds}) == len(kinds)


def test_scale_factors():
    """mxf4: the products of a group are added exactly and scaled, then cut to 35 bits below the exponents of the scale
    factors, however large their sum is: ± 576 beside 96 · 2^-41, which is 1.5 · 2^-35. The factors of a group of
    zeros do not count."""
    a, b = np.zeros((1, 4, 64), np.float32), np.full((1, 8, 64), 6.0, np.float32)
    a[..., :16], a[..., 16:32], a[..., 32:48] = 6, -6, 1
    rows, columns, start = np.ones((1, 4, 4)), np.ones((1, 8, 4)), np.zeros((1, 4, 8), np.float32)
    rows[..., 3] = 2.0**20

    def add(scale_format):
        scales = rows, columns, scale_format
        return B200.add("tcgen05", ("e2m1x2", "e2m1x2"), "f32", a, b, start, scales)

    for scale, expected in ((2.0**-40, 3 * 2.0**-35), (2.0**-41, 2.0**-35), (2.0**-42, 0)):
        rows[..., 2] = scale
        assert (add("ue8m0") == expected).all()
    # a subnormal factor of ue4m3 has the exponent -6
    a[...], b[...], start[...], rows[...], columns[..., 1] = 0, 1, -(2.0**-9), 2.0**-9, 2.0**-34
    a[..., [0, 16]] = 1
    assert (add("ue8m0") == 2.0**-43).all() and (add("ue4m3") == 0).all()


# ---- in any company --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("sums", [A100, H100, DISTINCT], ids=["A100", "H100", "distinct"])
def test_an_element_depends_on_its_row_and_column_alone(sums):
    rng = np.random.default_rng(8)
    a, b = drawn(rng, (40, 16, 16), "f16"), drawn(rng, (1, 64, 16), "f16")  # more than is computed at once
    start = drawn(rng, (40, 16, 64), "tf32")
    whole = sums.add("mma", ("f16", "f16"), "f32", a, b, start)
    rows, columns = rng.permutation(16), rng.permutation(64)[:8]
    for which in (slice(0, 1), slice(39, 40), rng.permutation(40)):
        part = sums.add("mma", ("f16", "f16"), "f32", a[which][:, rows], b[:, columns],
                        start[which][:, rows][..., columns])  # fmt: skip
        same_bits(part, np.ascontiguousarray(whole[which][:, rows][..., columns]))


# ---- instructions ----------------------------------------------------------------------------------------------------
def gaussian(rng, shape, kind):
    x = torch.from_numpy(rng.standard_normal(shape)).to(TORCH[kind])
    return x, x.double().numpy()


def operands(kind, k, n=8):
    """The bytes of A (64 rows) and B that ``by_wgmma`` multiplies."""
    rng = np.random.default_rng(11)
    return [gaussian(rng, (rows, k), kind)[0].contiguous().view(torch.uint8).numpy() for rows in (64, n)]


def by_wgmma(kind, k, sums, **options):
    return wgmma.product(8, k, "f32", kind, kind, draw=gaussian, tensor_sums=sums, **options)[0]


def by_mma(kind, k, sums, step=None):
    """In 16 rows; ``step``: so many of k at a time."""
    (a, b), step, size = operands(kind, k), step or k, 32 // k
    opcode = f"mma.sync.aligned.m16n8k{step}.row.col.f32.{kind}.{kind}.f32"
    out = []
    for rows in np.split(a, 4):
        d = np.ones((16, 8), np.float32)
        for first in range(0, size * k, size * step):
            part = slice(first, first + size * step)
            registers = [warp_mma.fragment(rows[:, part]), warp_mma.fragment(b[:, part]), warp_mma.accumulators(d)]
            d = warp_mma.issue(opcode, registers, 4, target="sm_100a", tensor_sums=sums).view(np.float32)
            d = np.ascontiguousarray(warp_mma.matrix_of(d.view(np.uint32), 16, np.float32))
        out.append(d)
    return np.concatenate(out)


def by_tcgen05(kind, sums, flags=0):
    a, b = operands(kind, 16 if kind in ("f16", "bf16") else 32)
    image, descriptors = tcgen05.in_shared(np.concatenate([a, a]), b)
    tmem = np.full((128, tcgen05.COLUMNS), np.float32(1).view(np.uint32))
    name = "f16" if kind in ("f16", "bf16") else "f8f6f4"
    instruction = f"tcgen05.mma.cta_group::1.kind::{name} [0], %rd3, %rd4, %r61, %p2;"
    described = tcgen05.describe(kind, kind, 128, 8, flags=flags)
    out = tcgen05.tensor_program(instruction, tmem, image, descriptors, described, tensor_sums=sums)
    out = np.ascontiguousarray(out[:, :8]).view(np.float32)
    same_bits(out[:64], out[64:])
    return out[:64]


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_instructions_agree_on_hopper_and_blackwell_and_nowhere_else(kind):
    plain = by_mma(kind, 16, None)
    for other in (by_wgmma(kind, 16, None), by_tcgen05(kind, None)):
        same_bits(other, plain)
    hopper = by_mma(kind, 16, H100)
    same_bits(by_wgmma(kind, 16, H100), hopper)
    same_bits(by_wgmma(kind, 16, H100, from_registers=True, late=True, seed=1), hopper)
    same_bits(by_mma(kind, 16, B200), hopper)
    same_bits(by_tcgen05(kind, B200), hopper)
    same_bits(by_tcgen05(kind, B200, flags=1 << 13), by_wgmma(kind, 16, H100, scales="-1, 1"))  # 1 - A B
    ampere = by_mma(kind, 16, A100)
    same_bits(by_mma(kind, 16, A100, step=8), ampere)
    assert (hopper != plain).any() and (ampere != hopper).any() and (by_mma(kind, 16, H100, step=8) != hopper).any()
    np.testing.assert_allclose(hopper, plain, rtol=0, atol=2.0**-18)


@pytest.mark.parametrize("kind", ["f16", "e4m3"])
def test_kinds_are_told_apart(kind):
    """In the test mode any two instructions give other bits, and each the same ones again. Products of fp8 have few
    bits, and many of their sums need no rounding."""
    k, share, close = (16, 0.8, 2.0**-11) if kind == "f16" else (32, 0.15, 2.0**-7)
    results = by_mma(kind, k, DISTINCT), by_wgmma(kind, k, DISTINCT), by_tcgen05(kind, DISTINCT)
    for one_of, other in itertools.combinations(results, 2):
        assert (one_of != other).mean() > share
        np.testing.assert_allclose(one_of, other, rtol=0, atol=close)
    same_bits(by_wgmma(kind, k, TensorSums("distinct", 120), late=True), results[1])


@pytest.mark.parametrize("sums", [H100, B200], ids=["H100", "B200"])
def test_every_form_of_the_instructions(monkeypatch, sums):
    """Small numbers, whose sums are hardly rounded: sparse, scaled, negated, without accumulator or with a scaled one,
    to half precision, four products at once."""
    monkeypatch.setattr("tests.testing.ptx.LaunchConfig", lambda *a, **k: LaunchConfig(*a, **k | {"tensor_sums": sums}))
    warp_mma.test_quads(("row", "col"), "f32", "f16")
    warp_mma.test_sparse("sp", "f16", "f16", 32, 2, "f16", "")
    for case, sparse in zip(warp_mma.SCALED, (False, False, False, True, True, False), strict=True):
        warp_mma.test_block_scaling(*case, sparse)
    wgmma.test_accumulation_and_signs()
    wgmma.test_types("f16", "f16", 16, "f16", True)
    wgmma.test_types("s8", "s8", 32, "s32", False)
    tcgen05.test_scale_of_the_input()
    tcgen05.test_lanes_that_keep_their_output()
    tcgen05.test_half_precision_accumulators("f16", "f16")
    tcgen05.test_pair_with_a_in_tensor_memory(True)
    tcgen05.test_sparse_with_block_scaling()
    for case in tcgen05.SCALED:
        tcgen05.test_block_scaling(*case)


# ---- options ---------------------------------------------------------------------------------------------------------
def test_the_arithmetic_reaches_the_launch(monkeypatch):
    seen, finish = [], machine.Machine.run
    monkeypatch.setattr(
        machine.Machine, "run", lambda self: (seen.append(self.wave.launch.tensor_sums), finish(self))[1]
    )
    for arithmetic in ARITHMETICS:
        with ptxsim.simulate("sm_90a", arithmetic=arithmetic) as simulation:
            a, b = torch.ones(300), torch.zeros(300)
            simulation.call(compile_scale(), (a, b, None, 3.0, 300))
    assert [None if x is None else (x.arithmetic, x.arch) for x in seen] == [None, ("hardware", 90), ("distinct", 90)]
    assert ARITHMETICS == worlds.ARITHMETICS


def test_requests_that_mean_nothing():
    with pytest.raises(SimError, match="arithmetic is 'exact'; there are float32, hardware, distinct"):
        ptxsim.simulate("sm_90a", arithmetic="exact").__enter__()
    with pytest.raises(SimError, match="fp8_bits with arithmetic 'distinct', which rounds sums of fp8 products itself"):
        ptxsim.simulate("sm_90a", arithmetic="distinct", fp8_bits=14).__enter__()
