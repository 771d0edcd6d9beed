"""Sampling a grid of options instead of enumerating it."""

from __future__ import annotations

import itertools
import random
from typing import Any


def pairwise(options: dict[str, list], seed: int = 0) -> list[dict[str, Any]]:
    """Cases that hold every pair of values of every two options at least once, few of them, the same for a seed.

    Greedy: each case starts with a pair not yet held, and every other option takes the value that adds most new pairs.
    """
    rng = random.Random(seed)
    names = list(options)
    missing = {
        pair
        for a, b in itertools.combinations(range(len(names)), 2)
        for pair in itertools.product([(a, i) for i in range(len(options[names[a]]))], [(b, i) for i in range(len(options[names[b]]))])
    }
    cases = []
    while missing:
        chosen = dict(rng.choice(sorted(missing)))
        for option in rng.sample(range(len(names)), len(names)):
            if option not in chosen:
                values = rng.sample(range(len(options[names[option]])), len(options[names[option]]))
                chosen[option] = max(values, key=lambda v: sum(_pair(option, v, o, w) in missing for o, w in chosen.items()))
        missing -= {_pair(*p, *q) for p, q in itertools.combinations(chosen.items(), 2)}
        cases.append({names[o]: options[names[o]][v] for o, v in sorted(chosen.items())})
    return cases


def _pair(option: int, value: int, other: int, other_value: int) -> tuple:
    return tuple(sorted([(option, value), (other, other_value)]))
