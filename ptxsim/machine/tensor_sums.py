"""Sums of products as tensor cores round them: ``simulate(arithmetic="hardware")``, and ``"distinct"`` for tests.

The model is that of MMA-Sim (arXiv 2511.10909), which its authors compared with GPUs bit by bit; NVIDIA documents none
of it. Some products, which are exact, and the accumulator are one sum. Each term has an exponent: an accumulator its
own, a product those of its two factors together, so that its significand is below 4. Every term is cut, towards zero,
to a multiple of 2^(e - bits), e being the largest exponent among them; the terms are added exactly; the sum is rounded
towards zero to fp32 (to fewer bits where a rule says so), or to the nearest f16. An instruction that has more products
than one sum takes goes on with the result as the accumulator.

An element of the result is a function of its row of A, its column of B and its accumulator alone.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .products import products

ARITHMETICS = ("float32", "hardware", "distinct")

_u4, _f4, _f8 = np.uint32, np.float32, np.float64
_ELEMENTS = 1 << 14  # of the result at once: its four arrays take 512 KB, what fits in a core's cache
# The least exponents of normal numbers. A smaller number has that exponent, and a significand below 1.
_LEAST = {"f32": -126, "tf32": -126, "bf16": -126, "f16": -14, "e5m2": -14, "e4m3": -6, "e3m2": -2, "e2m3": 0,
          "e2m1": 0, "ue8m0": -127, "ue4m3": -6}  # fmt: skip
_BYTES = {"tf32": 4, "bf16": 2, "f16": 2}  # others 1
# What a term that is 0 has as its exponent, MMA-Sim's -133 of Hopper and Blackwell (Ampere -132). Here no sum has a
# smaller one, so that results differ from MMA-Sim's only where all terms are below 2^-131.
_ZERO = 2.0**-133
_GROUP = 16  # products of fp4 that are added exactly, before they are scaled
_ALL = 1 << 20  # products of an instruction, however many


class Rule(NamedTuple):
    """How an instruction adds up: ``bits`` that are kept below the largest exponent, how many ``products`` are one sum,
    and how many bits an fp32 result has behind the leading one."""

    bits: int
    products: int
    fraction: int = 23


def hardware_rule(arch: int, instruction: str, element: str, grouped: bool = False) -> Rule:
    """MMA-Sim's parameters of sm_``arch``; ``instruction`` is "mma", "wgmma" or "tcgen05", ``element`` that of A,
    ``grouped``: several scale factors a row, where a term is a group of products."""
    size = _BYTES.get(element, 1)
    if grouped:
        return Rule(35, _ALL)
    if size == 1 and (instruction == "wgmma" or arch == 89):
        return Rule(13, 16 if arch == 89 else 32, 13)
    return Rule(24, 16 // size) if arch < 90 else Rule(25, 32 // size)


def distinct_rule(instruction: str, element: str) -> Rule:
    """A number of bits for each instruction and width of elements that no other has: 13 to 21. Fewer for narrow
    elements, whose results are compared less strictly."""
    narrowest = {1: 13, 2: 16, 4: 19}[_BYTES.get(element, 1)]
    return Rule(narrowest + ("mma", "wgmma", "tcgen05").index(instruction), _ALL)


class TensorSums:
    """The sums of one architecture. ``arithmetic`` is "hardware" or "distinct", ``arch`` a number such as 90."""

    def __init__(self, arithmetic: str, arch: int):
        self.arithmetic, self.arch = arithmetic, arch

    def add(self, instruction, elements, result, left, right, start, scales=None, sparse=False):
        """start + left · rightᵀ as float32 [n, rows, columns].

        ``left`` [n, rows, K], ``right`` [n or 1, columns, K] and ``start`` [n, rows, columns] are float32, ``elements``
        the formats of A and B, ``result`` "f32" or "f16". ``scales`` are the factors of blocks of K (float64
        [n, rows, blocks] and [n or 1, columns, blocks]) and their format; ``sparse``: half of ``left`` is zeros that
        are not stored.
        """
        formats = [x.split("_")[0].removesuffix("x2") for x in elements]
        *factors, scale_format = scales or (None,)
        grouped = bool(factors) and factors[0].shape[-1] > 1
        if self.arithmetic == "distinct":
            rule = distinct_rule(instruction, formats[0])
        else:
            rule = hardware_rule(self.arch, instruction, formats[0], grouped)
        out = np.empty(start.shape, _f4)
        step, stored = max(1, _ELEMENTS // start[0].size), 2 if sparse else 1
        for first in range(0, len(start), step):
            part = slice(first, first + step)
            a, b, total, *scale = (x if len(x) == 1 else x[part] for x in (left, right, start, *factors))
            if grouped:
                x, y = _grouped_factors(a, b, *scale, scale_format, _GROUP * stored)
            else:
                x, y = _factors(a, formats[0], *scale[:1]), _factors(b, formats[1], *scale[1:])
                x, y = [v[..., None] for v in x], [v[:, :, None] for v in y]
            for k in range(0, len(x[0]), rule.products * stored):
                these = slice(k, k + rule.products * stored)
                exact = _sum([v[these] for v in x], [v[these] for v in y], total, result, rule.bits)
                total = _rounded(exact, result, rule.fraction)
            out[part] = total
        return out


def _power(x, element):
    """2 to the exponent of each number of a format, as float64; 0 of 0, and anything of infinities and NaNs."""
    bits = x.astype(_f4).view(_u4) & _u4(0x7F800000)
    power = np.minimum(np.maximum(bits.view(_f4), _f4(2.0 ** _LEAST[element])), _f4(2.0**127))
    return np.where(x == 0, _f8(0), power)


def _factors(x, element, scale=1.0):
    """Numbers [n, rows, K] times a power of 2 for each row [n, rows, 1]: they and 2 to their exponents [K, n, rows]."""
    return [np.ascontiguousarray((v * scale).transpose(2, 0, 1)) for v in (x.astype(_f8), _power(x, element))]


def _grouped_factors(left, right, row_scales, column_scales, scale_format, size):
    """As two pairs of ``_factors``, [groups, n, rows, columns] and [groups, n, 1, columns], of fp4 with scale factors.
    The products of a group are added exactly, then scaled; the exponent of the term is that of the scale factors."""
    groups = left.shape[-1] // size

    def split(x):
        x = np.broadcast_to(x, (len(left), *x.shape[1:]))
        return x.reshape(*x.shape[:2], groups, size).transpose(2, 0, 1, 3).reshape(-1, x.shape[1], size)

    def of_groups(scales):
        return np.repeat(scales, groups // scales.shape[-1], -1).transpose(2, 0, 1)

    a, b, shape = split(left), split(right), (groups, *left.shape[:2], right.shape[1])
    dots = products(a, b).reshape(shape)  # exact: at most 16 · 36, in quarters
    any_product = products(np.abs(a), np.abs(b)).reshape(shape) > 0
    rows, columns = of_groups(row_scales)[..., None], of_groups(column_scales)[:, :, None]
    return (dots * rows, any_product * _power(rows, scale_format)), (columns, _power(columns, scale_format))


def _sum(left, right, start, result, bits):
    """The sum over k of left[k] · right[k], and ``start``, before it is rounded: exact in float64. The factors of terms
    come with 2 to their exponents."""
    top, term = _power(start, result), np.empty(start.shape)
    for x, y in zip(left[1], right[1], strict=True):
        np.maximum(top, np.multiply(x, y, out=term), out=top)
    quantum = np.maximum(top, _ZERO) * 2.0**-bits
    per_quantum = 1 / quantum
    total = np.trunc(start * per_quantum)
    for x, y in zip(left[0], right[0], strict=True):
        np.multiply(np.multiply(x, y, out=term), per_quantum, out=term)
        total += np.trunc(term, out=term)
    return (total + 0.0) * quantum  # whole numbers below 2^52; -0 becomes +0


def _rounded(x, result, fraction):
    """float64 to float32 as an instruction rounds its result. NaNs are 0x7fffffff."""
    if result == "f16":
        out = x.astype(np.float16).astype(_f4)
    else:
        out = x.astype(_f4)
        away = (np.abs(out) > np.abs(x)) & (np.abs(x) < 2.0**128)
        out = np.where(away, np.nextafter(out, _f4(0)), out)
        out = (out.view(_u4) & _u4(0xFFFFFFFF << (23 - fraction) & 0xFFFFFFFF)).view(_f4)
    return np.where(np.isnan(x), _u4(0x7FFFFFFF), out.view(_u4)).view(_f4)
