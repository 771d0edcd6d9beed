"""Which of two kernels is faster, if the model can tell."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from perf.predict.model import Predictor
from ptxsim.timing.gpus import Gpu

# Differences that no draw of the constants explains: a replay resonates, so that a constant which no steady state
# should notice moves a kernel's time by up to 3 % (TMA latency 600 → 400 at head_dim 64).
RESONANCE = 0.03


@dataclass(frozen=True)
class Ranking:
    """Speed of one kernel over another's: mean and standard deviation of the ratio over draws of the constants that are
    the same for both, by explanation (``base`` and the GPU's rivals)."""

    ratios: dict[str, tuple[float, float]]

    @property
    def verdict(self) -> str:
        """ "faster" or "slower" if every explanation says so beyond two standard deviations, and beyond ``RESONANCE``;
        else "cannot tell"."""
        margins = [(mean, max(2 * spread, RESONANCE)) for mean, spread in self.ratios.values()]
        if all(mean - margin > 1 for mean, margin in margins):
            return "faster"
        if all(mean + margin < 1 for mean, margin in margins):
            return "slower"
        return "cannot tell"


def explanations(gpu: Gpu, head_dim: int) -> dict[str, Gpu]:
    """The GPU as its file has it, and as rival explanations of the same measurements have it."""
    return {"base": gpu, **{name: gpu.rival(name, head_dim) for name in gpu.rivals}}


def ranked(one: Predictor, other: Predictor, gpu: Gpu, ensemble: int) -> Ranking:
    """How much faster ``one`` is than ``other``."""
    ratios = {}
    for name, explained in explanations(gpu, one.kernel.workload.head_dim).items():
        draws = [explained if seed == 0 else explained.sample(seed) for seed in range(ensemble)]
        found = [other.sample(draw).seconds / one.sample(draw).seconds for draw in draws]
        ratios[name] = statistics.mean(found), statistics.pstdev(found)
    return Ranking(ratios)
