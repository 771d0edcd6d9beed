"""What the FA3 forward in fp8 loses to accumulators of 14 bits, held to the bounds that docs/fp8.md derives."""

import pytest
import torch

from cute_fa import fp8
from tests.testing.fp8_accuracy import (
    few_keys,
    lowprec,
    lse_bound,
    near_uniform,
    promote_every,
    relative_rms,
    score_sums,
    simulated,
    unpromoted,
)

pytestmark = pytest.mark.without_races  # test_fp8.py has these kernels with the detector


def typical_loss(instructions: int) -> float:
    """Of sums of positive products, relative root mean square: n²/4 units of 2^-13, see the table of docs/fp8.md."""
    return instructions**2 / 4 * 2.0**-13


@pytest.mark.parametrize("values", ["normal", "positive"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_sums_keep_to_the_bound(head_dim, values):
    """O beside that of the same kernel with exact sums, element by element, and beside lowprec as a whole."""
    operands = near_uniform(head_dim, 2048, values)
    n = promote_every(operands)
    exact, _ = operands.reference(torch.float64)
    out, full = simulated(operands)[0].double(), simulated(operands, bits=None)[0].double()
    magnitudes, _ = operands._replace(v=operands.v.float().abs().to(fp8.E4M3)).reference(torch.float64)
    assert not torch.equal(out, full)
    assert ((out - full).abs() <= (fp8.sum_error_bound(n) + 2.0**-10) * magnitudes).all()  # of which fp16 is 2^-10
    assert relative_rms(out, exact) <= relative_rms(lowprec(operands), exact) + typical_loss(n)


def test_long_contexts_lose_no_more_than_short_ones():
    """At head_dim 64, whose sums are the longest; in bf16 the rounding of O, 1.6e-3, is part of both sides."""
    short, long = (near_uniform(64, keys, "normal") for keys in (1024, 65536))
    errors = []
    for operands in (short, long):
        exact, _ = operands.reference(torch.float64)
        out, low = simulated(operands)[0], lowprec(operands)
        for kind in (torch.float16, torch.bfloat16):
            errors.append((relative_rms(out.to(kind), exact), relative_rms(low.to(kind), exact)))
    (short16, _), (short_bf16, _), (long16, low16), (long_bf16, low_bf16) = errors
    assert long16 <= 1.1 * short16
    assert long16 <= 2 * low16
    assert long_bf16 <= 1.1 * short_bf16
    assert long_bf16 <= 1.1 * low_bf16


@pytest.mark.parametrize("head_dim", [64, 128])
def test_without_promotion_long_contexts_are_lost(head_dim):
    operands = near_uniform(head_dim, 4096, "normal")
    exact, _ = operands.reference(torch.float64)
    error = relative_rms(unpromoted(operands), exact)
    assert 0.02 < error < 0.2
    assert relative_rms(simulated(operands)[0], exact) < 1e-3


@pytest.mark.parametrize("values", ["mean 0", "positive"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_lse_keeps_to_the_bound(head_dim, values):
    """Q·Kᵀ is one sum of head_dim / 32 instructions. With q and k positive each score loses, and the LSE with them: at
    head_dim 256 more than the 1e-3 that exact sums keep to."""
    operands = few_keys(head_dim, values)
    n = head_dim // 32
    _, exact = operands.reference(torch.float64)
    lse, full = (simulated(operands, bits)[1] for bits in (14, None))
    assert (full - exact).abs().max() <= 1e-3
    error = (exact - lse)[0, 0]
    assert (error.abs() <= lse_bound(operands)).all()
    assert (error.abs().max() > 1e-3) == (values == "positive")
    if values == "positive":
        # twice, since products of two such numbers are skewed
        assert (error <= 2 * typical_loss(n) * score_sums(operands)[0].amax(-1) + 1e-3).all()
