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
    # a setting is (option's name, index of its value)
    settings = {name: [(name, i) for i in range(len(values))] for name, values in options.items()}
    missing = {
        frozenset(pair)
        for first, second in itertools.combinations(settings.values(), 2)
        for pair in itertools.product(first, second)
    }
    cases = []
    while missing:
        chosen = dict(rng.choice(sorted(map(sorted, missing))))
        for name in rng.sample(list(options), len(options)):
            if name not in chosen:
                candidates = rng.sample(settings[name], len(settings[name]))
                gains = [sum(frozenset((c, other)) in missing for other in chosen.items()) for c in candidates]
                chosen[name] = candidates[gains.index(max(gains))][1]
        missing -= {frozenset(pair) for pair in itertools.combinations(chosen.items(), 2)}
        cases.append({name: values[chosen[name]] for name, values in options.items()})
    return cases


def in_turns(cases: list[dict[str, Any]], **levels: dict[str, list]) -> list[dict[str, Any]]:
    """The cases with, for each option of ``levels``, a value in the place of the level's name: the values that the
    level stands for, one after the other."""
    turns = {
        option: {name: itertools.cycle(values) for name, values in named.items()} for option, named in levels.items()
    }
    return [case | {option: next(named[case[option]]) for option, named in turns.items()} for case in cases]
