"""What the FA3 forward in fp8 loses to accumulators of 14 bits, held to the bounds that docs/fp8.md derives."""

import math

import pytest
import torch

from cute_fa import fp8, reference
from tests.testing.fp8_accuracy import (
    Operands,
    errors,
    few_keys,
    lowprec,
    lse_bound,
    near_uniform,
    promote_every,
    relative_rms,
    score_sums,
    simulated,
    unpromoted,
    with_outliers,
)

pytestmark = pytest.mark.without_races  # test_fp8.py has these kernels with the detector


def typical_loss(instructions: int) -> float:
    """Of sums of positive products, relative root mean square: n²/4 units of 2^-13, see the table of docs/fp8.md."""
    return instructions**2 / 4 * 2.0**-13


@pytest.mark.sampled
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


@pytest.mark.thorough
def test_long_contexts_lose_no_more_than_short_ones():
    """In bf16 the rounding of O, 1.6e-3, is part of both sides."""
    short, long = (near_uniform(64, keys, "normal") for keys in (1024, 65536))
    measured = []
    for operands in (short, long):
        exact, _ = operands.reference(torch.float64)
        out, low = simulated(operands)[0], lowprec(operands)
        for kind in (torch.float16, torch.bfloat16):
            measured.append((relative_rms(out.to(kind), exact), relative_rms(low.to(kind), exact)))
    (short16, _), (short_bf16, _), (long16, low16), (long_bf16, low_bf16) = measured
    assert long16 <= 1.1 * short16
    assert long16 <= 2 * low16
    assert long_bf16 <= 1.1 * short_bf16
    assert long_bf16 <= 1.1 * low_bf16


@pytest.mark.sampled
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


@pytest.mark.parametrize(("sink", "kept"), [(0, 1 - 127 / 1023), (1023, 0.0)])
def test_an_attention_sink_costs_the_keys_of_its_own_block(sink, kept):
    """One key, of values 0, has 2^20 times the weight of each of the others, which P cannot hold beside it. Blocks are
    visited from the last to the first: those behind the first key's own have been added before it is met."""
    q, k, v = torch.zeros(1, 64, 1, 128), torch.zeros(1, 1024, 1, 128), torch.ones(1, 1024, 1, 128)
    q[..., 0], k[:, sink, :, 0], v[:, sink] = 1.0, 20 * math.log(2) * 128**0.5, 0.0
    operands = Operands.of(q, k, v)
    exact, _ = operands.reference(torch.float64)
    out, _ = simulated(operands, out_dtype=torch.bfloat16)
    torch.testing.assert_close(out.double() / exact, torch.full_like(exact, kept), rtol=0.01, atol=0)


def test_outliers():
    """FlashAttention-3's inputs: what the kernel adds to the error of quantised values is not seen, and a rotation
    takes a quarter of it or more."""
    q, k, v = with_outliers(256, 2048, 2)
    exact, _ = reference.attention(q, k, v, dtype=torch.float64)
    signs = fp8.random_signs(128)
    found = []
    for rotated in (False, True):
        operands = Operands.of(*(fp8.hadamard(t, signs) if rotated else t for t in (q, k)), v)
        error, low = (errors(out, exact)[0] for out in (simulated(operands)[0], lowprec(operands)))
        assert error <= 1.05 * low
        found.append(error)
    assert found[1] < 0.75 * found[0]
    assert found[1] < 1e-2
