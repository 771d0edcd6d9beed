"""What the FA3 forward in fp8 loses to accumulators of 14 bits, held to the bounds that docs/fp8.md derives."""

import pytest
import torch

from cute_fa import fp8
from tests.testing.fp8_accuracy import (
    Operands,
    lowprec,
    near_uniform,
    promote_every,
    relative_rms,
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


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_scores_and_lse_keep_to_the_bound(head_dim):
    """Q·Kᵀ is one sum of head_dim / 32 instructions. With q and k positive each score loses, the LSE with them: at
    head_dim 256 more than the 1e-3 of exact sums, by far less than the bound."""
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(1, n, 1, head_dim, generator=generator) for n in (64, 600, 600))
    operands = Operands.of(q.abs(), k.abs(), v)
    n = head_dim // 32
    _, exact = operands.reference(torch.float64)
    _, lse = simulated(operands)
    _, full = simulated(operands, bits=None)
    assert (full - exact).abs().max() <= 1e-3
    values = [fp8.dequantize(*pair)[0, :, 0].double() for pair in zip(operands[:2], operands[3:5], strict=True)]
    scores = values[0] @ values[1].T * head_dim**-0.5  # of positive elements: the sums of magnitudes too
    bound = ((1 + fp8.sum_error_bound(n)) * scores).logsumexp(-1) - scores.logsumexp(-1)
    error = (exact - lse)[0, 0]
    assert (error.abs() <= bound).all()
    assert error.mean() > 0
    assert (error <= 2 * typical_loss(n) * scores.amax(-1) + 1e-3).all()  # products of two such numbers are skewed
    if head_dim == 256:
        assert error.max() > 1e-3


def test_peaked_scores_in_14_bits():
    """The kernel with a whole problem's features, within the tolerance of exact sums and what the bound adds."""
    generator = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(1, 200, 1, 128, generator=generator) for _ in range(3))
    operands = Operands.of(2 * q, 2 * k, v)
    _, exact = operands.reference(torch.float64)
    _, lse = simulated(operands)
    values = [fp8.dequantize(*pair)[0, :, 0].double() for pair in zip(operands[:2], operands[3:5], strict=True)]
    scores = values[0] @ values[1].T * 128**-0.5
    magnitudes = values[0].abs() @ values[1].abs().T * 128**-0.5
    bound = (scores + fp8.sum_error_bound(4) * magnitudes).logsumexp(-1) - scores.logsumexp(-1)
    assert ((exact - lse)[0, 0].abs() <= bound + 1e-3).all()
