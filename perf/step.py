"""Cycles of one SM that 128 keys cost a forward on tcgen05, pipe by pipe: a crude model of which one is the busiest.

A CTA takes blocks of N keys past its M rows: two tiles of 128, or one where tensor memory's 512 columns hold the scores
and O of one alone. Of a block, with head dims d and dv (the published cost model of FlashAttention-4, arXiv 2603.05451;
with M = N = d = dv it is 4MNd/8192, 3MNd/8192 and MN/16):

* tensor: 2MN(d + dv) flops at 8192 a clock, which is M = 128 rows, N columns and 16 elements of K in N/2 cycles; fp8
  takes half. Both were measured on a B200 (SemiAnalysis, microbench-blackwell).
* smem: bytes of Q, K and V that each tile's products read at 128 a clock, P being in tensor memory. Of a pair of CTAs
  each reads half of K and V.
* exp2: MN exponentials at 16 a clock, 32 on sm_103a.

Of the code, its softmax warps' loop once for each tile, as :mod:`perf.sass` counts it without conditional blocks. Each
of the SM's four quadrants runs one of a tile's four warps:

* mufu: 8 cycles a warp instruction (16 lanes a clock and SM), 4 on sm_103a;
* fma: 1 a scalar FP32 instruction, 2 a packed one or an IMAD (32 FP32 lanes a quadrant);
* issue: one warp instruction a clock and quadrant.
"""

from __future__ import annotations

from dataclasses import dataclass

from perf.sass import KernelReport
from perf.sass.metrics import SM_MODELS

KEYS = 128
_TILE_M = 128
_TENSOR_MEMORY_COLUMNS = 512


@dataclass(frozen=True)
class Step:
    """Cycles of one SM for ``KEYS`` keys, by pipe."""

    tensor: float
    smem: float
    exp2: float
    mufu: float
    fma: float
    issue: float

    @property
    def busiest(self) -> float:
        """Of what the softmax warps run."""
        return max(self.mufu, self.fma, self.issue)


def step_of(report: KernelReport, head_dim: int, head_dim_v: int, itemsize: int) -> Step:
    """``report``: of a forward on tcgen05; ``itemsize``: bytes of an element of Q, K and V, 1 or 2."""
    softmax = report.score_loop
    model, tile_n = SM_MODELS[report.arch], softmax.scores
    blocks = KEYS / tile_n
    tiles = min(2, _TENSOR_MEMORY_COLUMNS // (tile_n + head_dim_v))
    ctas = 2 if any("2CTA" in shape for shape in report.main_loop.shapes) else 1
    scores = tiles * _TILE_M * KEYS
    read = itemsize * tiles * (blocks * _TILE_M * head_dim + KEYS * (head_dim + head_dim_v) / ctas)
    return Step(
        tensor=2 * scores * (head_dim + head_dim_v) / model.flops * itemsize / 2,
        smem=read / 128,
        exp2=scores * model.mufu / 128,
        **{name: blocks * tiles * softmax.usual[name] for name in ("mufu", "fma", "issue")},
    )
