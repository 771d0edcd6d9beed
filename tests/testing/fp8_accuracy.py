"""How accurate the FA3 forward in fp8 is, simulated with the accumulators of 14 bits that Hopper has:

    python -m tests.testing.fp8_accuracy sums       # what sums of n wgmma lose, in ptxsim.machine.accumulate
    python -m tests.testing.fp8_accuracy scores     # what that does to Q·Kᵀ and the LSE
    python -m tests.testing.fp8_accuracy lengths    # O at 1k, 8k and 64k keys, with and without promotion
    python -m tests.testing.fp8_accuracy outliers   # FlashAttention-3's inputs with outliers, and what cute_fa.fp8 does

print the tables of docs/fp8.md; ``lengths`` takes 8 minutes of a CPU core, the others about one.
"""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

import cute_fa
from cute_fa import fp8, reference
from cute_fa.engine import compiler
from cute_fa.engine.contract import AttentionTensors
from cute_fa.semantics.call import Call
from cute_fa.semantics.problem import AttentionProblem
from cute_fa.semantics.tensors import problem_of
from cute_fa.semantics.types import SmArch
from fa3_sm90.forward.entry import Fa3Forward
from ptxsim.machine.accumulate import limited_sum
from tests.testing.unpromoted import UnpromotedConfig

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

BITS = 14
PRODUCTS = 32  # of one wgmma
QUERIES = 64


def accumulated(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """left (16, K) · right (K, N), K / 32 wgmma one after the other with 14 bits."""
    total = np.zeros((1, 16, right.shape[1]), np.float32)
    for first in range(0, left.shape[1], PRODUCTS):
        part = slice(first, first + PRODUCTS)
        total = limited_sum(left[None, :, part], np.ascontiguousarray(right[part].T), total, BITS)
    return total[0]


def shaped(values: str, x: torch.Tensor) -> torch.Tensor:
    """Of standard normal numbers those of another distribution."""
    return {"normal": x + 1, "positive": x.abs(), "mean 0": x, "skewed": (2 * x).exp()}[values]


class Operands(NamedTuple):
    """q, k, v in fp8, (1, tokens, heads, head_dim), and their descales (1, heads) or ()."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    q_descale: torch.Tensor
    k_descale: torch.Tensor
    v_descale: torch.Tensor

    @classmethod
    def of(cls, *values: torch.Tensor) -> Operands:
        """q, k, v quantised per head."""
        codes, descales = zip(*map(fp8.quantize_per_head, values), strict=True)
        return cls(*codes, *descales)

    def descales(self) -> dict[str, torch.Tensor]:
        return dict(zip(self._fields[3:], self[3:], strict=True))

    def reference(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        return reference.attention(*self[:3], **self.descales(), dtype=dtype)


def near_uniform(head_dim: int, keys: int, values: str, seed: int = 0) -> Operands:
    """Scores of standard deviation 0.1, so that all keys count alike, and values of mean 1: those that a short
    accumulator loses most of. ``values``: "normal", N(1, 1), or "positive", |N(0, 1)|."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, n, 1, head_dim, generator=generator) for n in (QUERIES, keys, keys))
    return Operands.of(0.3 * q, 0.3 * k, shaped(values, v))


def few_keys(head_dim: int, values: str, seed: int = 0) -> Operands:
    """600 keys, q and k of magnitude 1: "positive", |N(0, 1)|, or "mean 0"."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, n, 1, head_dim, generator=generator) for n in (QUERIES, 600, 600))
    return Operands.of(shaped(values, q), shaped(values, k), v)


def score_sums(operands: Operands) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores of the first head, and what they would be with all products positive: fp64 (queries, keys)."""
    q, k = (fp8.dequantize(*pair)[0, :, 0].double() for pair in zip(operands[:2], operands[3:5], strict=True))
    scale = q.shape[1] ** -0.5
    return scale * q @ k.T, scale * q.abs() @ k.abs().T


def lse_bound(operands: Operands) -> torch.Tensor:
    """How far the LSE (queries) may be off: as far as if each score were off by its bound."""
    scores, magnitudes = score_sums(operands)
    bound = fp8.sum_error_bound(operands.q.shape[-1] // PRODUCTS)
    return (scores + bound * magnitudes).logsumexp(-1) - scores.logsumexp(-1)


def simulated(
    operands: Operands, bits: int | None = BITS, out_dtype: torch.dtype = torch.float16
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) of the kernel; fp16, whose own rounding is below what is looked for."""
    with cute_fa.simulate("sm_90a", num_sms=1, fp8_bits=bits):
        return cute_fa.flash_attn_func(*operands[:3], **operands.descales(), out_dtype=out_dtype, return_lse=True)


def call_and_problem(operands: Operands) -> tuple[Call, AttentionProblem]:
    call = Call.made(*operands[:3], **operands.descales(), out_dtype="fp16")
    return call, problem_of(SmArch.SM_90A, call)


def promote_every(operands: Operands) -> int:
    """Of the kernel's config."""
    return Fa3Forward.configure(call_and_problem(operands)[1]).promote_every


def unpromoted(operands: Operands) -> torch.Tensor:
    """O of the kernel without promotion."""
    call, problem = call_and_problem(operands)
    config = UnpromotedConfig.like(Fa3Forward.configure(problem))
    out = torch.full((*call.q.shape[:3], call.v.shape[3]), math.nan, dtype=torch.float16)
    tensors = AttentionTensors(*operands[:3], out, torch.empty(call.lse_shape), call.extras)
    with cute_fa.simulate("sm_90a", num_sms=1, fp8_bits=BITS):
        compiler.compiled(config).launch(Fa3Forward.arguments(problem, config, tensors, 1))
    return out


def relative_rms(actual: torch.Tensor, exact: torch.Tensor) -> float:
    """‖actual − exact‖ / ‖exact‖."""
    return ((actual.double() - exact).norm() / exact.norm()).item()


def lowprec(operands: Operands, out_dtype: torch.dtype = torch.float16) -> torch.Tensor:
    """What an exact accumulator would give: P alone is rounded, and O."""
    return operands.reference(fp8.E4M3)[0].to(out_dtype)


def table(*names: str) -> None:
    print("|", " | ".join(names), "|")
    print("|" + "---|" * len(names))


def row(*cells: str | int | float) -> None:
    print("|", " | ".join(f"{cell:.1e}" if isinstance(cell, float) else str(cell) for cell in cells), "|", flush=True)


def lost(values: str, instructions: int) -> float:
    """Root mean square of what P·V loses, relative to Σ p |v|; P as of scores of standard deviation 0.1."""
    generator = torch.Generator().manual_seed(0)
    size, columns = PRODUCTS * instructions, 256
    p = (200 * torch.exp(0.1 * torch.randn(16, size, generator=generator))).to(fp8.E4M3).double().numpy()
    v = fp8.quantize_per_tensor(shaped(values, torch.randn(size, columns, generator=generator))).codes.double().numpy()
    error = (accumulated(p.astype(np.float32), v.astype(np.float32)) - p @ v) / (p @ np.abs(v))
    return math.sqrt((error**2).mean())


def print_sums():
    numbers = (1, 2, 3, 4, 5, 6, 8, 16, 64, 256)
    table("values", *(f"n = {n}" for n in numbers))
    for values in ("mean 0", "normal", "positive", "skewed"):
        row(values, *(lost(values, n) for n in numbers))
    row("bound", *map(fp8.sum_error_bound, numbers))


def print_scores():
    table("head_dim", "n", "q and k", "mean of Σ ∣q k∣", "LSE's error", "its bound", "with exact sums")
    for head_dim in (64, 128, 256):
        for values in ("mean 0", "positive"):
            operands = few_keys(head_dim, values)
            _, exact = operands.reference(torch.float64)
            lse = [(simulated(operands, bits)[1] - exact).abs().max().item() for bits in (BITS, None)]
            size = score_sums(operands)[1].mean().item()
            row(head_dim, head_dim // PRODUCTS, values, size, lse[0], lse_bound(operands).max().item(), lse[1])


def print_lengths():
    table("head_dim", "n", "values", "keys", "kernel", "lowprec", "kernel, bf16", "lowprec, bf16", "without promotion")
    for head_dim in (64, 128, 256):
        for values in ("normal", "positive"):
            for keys in (1024, 8192, 65536):
                operands = near_uniform(head_dim, keys, values)
                exact, _ = operands.reference(torch.float64)
                out, low = simulated(operands)[0], lowprec(operands)
                found = (relative_rms(t, exact) for t in (out, low, out.bfloat16(), low.bfloat16()))
                n = promote_every(operands)
                row(head_dim, n, values, keys, *found, relative_rms(unpromoted(operands), exact))


def with_outliers(queries: int, keys: int, heads: int, head_dim: int = 128, seed: int = 0) -> list[torch.Tensor]:
    """q, k, v of N(0, 1) + N(0, 100) · Bernoulli(0.001), 100 the variance (arXiv 2407.08608, section 4.3)."""
    generator = torch.Generator().manual_seed(seed)

    def one(tokens: int) -> torch.Tensor:
        x, outlier = torch.randn(2, 1, tokens, heads, head_dim, generator=generator)
        return x + 10 * outlier * (torch.rand(x.shape, generator=generator) < 1e-3)

    return [one(tokens) for tokens in (queries, keys, keys)]


def schemes() -> Iterator[tuple[str, int | None, Callable[[torch.Tensor], fp8.Quantized]]]:
    """(name, block size, how to quantise)."""
    yield "per tensor", None, fp8.quantize_per_tensor
    yield "per head", None, fp8.quantize_per_head
    yield "per 128 tokens", 128, lambda x: fp8.quantize_per_block(x, 128)


def errors(out: torch.Tensor, exact: torch.Tensor) -> tuple[float, float]:
    """(RMSE, largest error)."""
    difference = out.double() - exact
    return difference.square().mean().sqrt().item(), difference.abs().max().item()


def print_outliers():
    sizes = (512, 2048, 2), (1024, 8192, 2)
    short, long = (f"{q} × {k} × {h}" for q, k, h in sizes)
    columns = f"kernel, {short}", f"lowprec, {short}", f"lowprec, {long}"
    table("", "q, k", *(part for column in columns for part in (f"{column}: RMSE", "largest")))
    inputs = [with_outliers(*size) for size in sizes]
    exact = [reference.attention(*given, dtype=torch.float64)[0] for given in inputs]
    half = [[t.half() for t in given] for given in inputs]
    with cute_fa.simulate("sm_90a", num_sms=1):
        out = cute_fa.flash_attn_func(*half[0])
    low = [reference.attention(*given, dtype=torch.float16)[0] for given in half]
    row("fp16", "as they are", *errors(out, exact[0]), *errors(low[0], exact[0]), *errors(low[1], exact[1]))
    signs = fp8.random_signs(128)
    for rotation in ("as they are", "rotated"):
        for name, block_size, quantise in schemes():
            cells = []
            for i, (q, k, v) in enumerate(inputs):
                if rotation == "rotated":
                    q, k = (fp8.hadamard(t, signs) for t in (q, k))
                made = [quantise(t) for t in (q, k, v)]
                if i == 0 and block_size is None:
                    operands = Operands(*(m.codes for m in made), *(m.descale for m in made))
                    cells += errors(simulated(operands)[0], exact[0])
                elif i == 0:
                    cells += "–", "–"
                values = [fp8.dequantize(*m, block_size=block_size) for m in made]
                cells += errors(reference.attention(*values, dtype=fp8.E4M3)[0], exact[i])
            row(f"fp8 {name}", rotation, *cells)


COMMANDS = {"sums": print_sums, "scores": print_scores, "lengths": print_lengths, "outliers": print_outliers}

if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in COMMANDS:
        sys.exit(__doc__)
    COMMANDS[sys.argv[1]]()
