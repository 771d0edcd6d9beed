"""Rows of microbenchmarks on a GPU whose constants are known."""

from __future__ import annotations

from perf.microbench.benchmark import REPETITIONS


def rows_of(config, name, counts, cycles, **more):
    """Rows as a kernel gives them that takes ``cycles(count)``."""
    for repetition in range(REPETITIONS):
        for count in counts:
            figures = {"cycles": cycles(count), "seconds": cycles(count) / 1.5e9}
            yield {"kernel": name, **config.parameters(), **more, "count": count, "repetition": repetition, **figures}
