"""Every config of our kernel that fits, predicted: the tiles, stages and clusters that a heuristic could choose."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from cute_fa.engine.overrides import tunable
from cute_fa.engine.table import TABLE
from cute_fa.semantics.errors import CuteFaError
from cute_fa.semantics.types import SmArch
from perf.predict.kernels import OurKernel, problem_of
from perf.predict.model import Prediction, Predictor
from perf.predict.ranking import Ranking, ranked
from perf.workload import Workload
from ptxsim.errors import SimError
from ptxsim.timing.gpus import Gpu

# Values that are tried of the fields that a config has; what does not fit the SM or the problem the kernel refuses.
GRID: dict[str, tuple[Any, ...]] = {
    "warpgroups": (2, 3),
    "tile_n": (64, 80, 96, 112, 128, 160, 176),
    "stages": (2, 3, 4),
    "cluster": (1, 2),
    "turns": (True, False),
}


@dataclass(frozen=True)
class Found:
    """A config beside the chosen one; ``refused`` says why it was not predicted."""

    settings: dict[str, Any]
    prediction: Prediction | None = None
    ranking: Ranking | None = None
    refused: str | None = None
    spills: int = 0


def searched(
    workload: Workload, arch: SmArch, gpu: Gpu, ensemble: int, grid: dict[str, tuple[Any, ...]] = GRID
) -> Iterator[Found]:
    """Every config of the grid, in its order, ranked beside what the heuristic chooses."""
    problem = problem_of(workload, arch)
    kernel = TABLE.lookup(problem)
    chosen_config = kernel.configure(problem)
    fields = [name for name in grid if name in tunable(kernel)]
    chosen = Predictor(OurKernel(workload, arch, {}))
    for values in itertools.product(*(grid[name] for name in fields)):
        settings = dict(zip(fields, values, strict=True))
        changed = {name: value for name, value in settings.items() if getattr(chosen_config, name) != value}
        yield _tried(
            lambda changed=changed: Predictor(OurKernel(workload, arch, changed)), settings, chosen, gpu, ensemble
        )


def _tried(make: Callable[[], Predictor], settings, chosen, gpu, ensemble) -> Found:
    try:
        predictor = make()
        result = predictor.predict(gpu, ensemble)
    except (CuteFaError, SimError) as error:
        return Found(settings, refused=str(error))
    return Found(settings, result, ranked(predictor, chosen, gpu, ensemble), spills=predictor.spills)
