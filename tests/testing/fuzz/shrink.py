"""Making a failing problem smaller: features dropped, sizes reduced, as long as it fails in the same way."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from cute_fa.semantics.errors import CuteFaError
from cute_fa.semantics.types import SmArch
from cute_fa.tools.inputs import InputSpec
from cute_fa.tools.trial import Machine
from tests.testing.fuzz.problem import FUNCTIONS, CacheSpec, Problem, changed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MOST_TRIALS = 120


def shrink(problem: Problem, fails: Callable[[Problem], bool], most_trials: int = MOST_TRIALS) -> Problem:
    """A problem that fails and of which no simpler one does, as far as ``most_trials`` calls of ``fails`` tell."""
    trials = 0
    tried = {problem}
    searching = True
    while searching:
        searching = False
        for simpler in simplifications(problem):
            if simpler in tried:
                continue
            if trials == most_trials:
                return problem
            tried.add(simpler)
            trials += 1
            if fails(simpler):
                problem, searching = simpler, True
                break
    return problem


def simplifications(problem: Problem) -> Iterator[Problem]:
    """Problems with one thing less, those that the table serves."""
    for make in _changes(problem):
        try:
            simpler = make()
            if simpler != problem and simpler.objection() is None:
                yield simpler
        except (CuteFaError, ValueError):  # the parts do not fit each other any more
            continue


def _changes(problem: Problem) -> Iterator[Callable[[], Problem]]:
    """What cuts most comes first: whole sequences, then rows and heads, which make every later trial cheaper."""
    for b in range(problem.spec.batch):
        yield lambda b=b: _without_sequence(problem, b)
    yield from _smaller(problem)
    for changes in _defaults(problem):
        yield lambda changes=changes: changed(problem, **changes)


def _defaults(problem: Problem) -> Iterator[dict[str, Any]]:
    """Fields at their defaults: alone, or together where one has no meaning without the other."""
    yield {"schedule_seed": None, "late": False, "race": False}
    plain = Machine(SmArch.SM_80, simulated=True)
    for part, default in (("machine", plain), ("spec", InputSpec()), ("cache", CacheSpec()), ("", None)):
        value = getattr(problem, part) if part else problem
        for field in dataclasses.fields(value):
            simplest = getattr(default, field.name) if default is not None else field.default
            if simplest is not dataclasses.MISSING and field.name not in _SIZES:
                yield {field.name: simplest}
    spec = problem.spec
    yield {"window": (None, None), "sink_tokens": 0}
    yield {"alibi": False, "alibi_per_batch": False, "slopes_gradient": False}
    if spec.alibi_per_batch:
        yield {"alibi": True, "alibi_per_batch": False}
    yield {"head_dim": 64, "head_dim_v": 64}
    yield {"head_dim_v": spec.head_dim}
    yield {"rotary_dim": 0, "rotary_starts": None, "rotary_dtype": "fp32", "rotary_interleaved": False}
    yield {"codes": None, "copied": False, "one_descale": False}
    yield {"varlen_q": False, "varlen_k": False, "lengths_q": None, "lengths_k": None}
    for name in ("q", "k"):
        lengths = {} if getattr(problem, f"varies_{name}") else {f"lengths_{name}": None}
        yield {f"varlen_{name}": False, f"seqused_{name}": False, f"lengths_{name}": None}
        yield {f"varlen_{name}": False, **lengths}
    if spec.page_size is not None:
        yield {"page_size": None, "seqused_k": True}
    yield {"seqlen_k_per_split": 0}
    if problem.num_splits > 2:
        yield {"num_splits": 2}
    yield {"call": "flash_attn_func"}
    yield {"positions": False, "alibi": False, "slopes_gradient": False}
    yield {"call": "flash_attn_func", "ranges": 0, "positions": False, "plan": None, "segments": 1}
    if problem.call not in FUNCTIONS:
        yield {"call": "flash_attn_varlen_func", "heads_first": False, "num_splits": problem.num_splits or 1}


# What ``_smaller`` takes care of.
_SIZES = (
    "batch",
    "seqlen_q",
    "seqlen_k",
    "lengths_q",
    "lengths_k",
    "heads",
    "heads_kv",
    "head_dim_v",
    "new",
    "leftpad",
)


def _without_sequence(problem: Problem, b: int) -> Problem:
    rows = {}
    for name, value in (*vars(problem.spec).items(), *vars(problem.cache).items()):
        if name in ("lengths_q", "lengths_k", "new", "leftpad", "rotary_starts") and value is not None:
            rows[name] = value[:b] + value[b + 1 :]
    return changed(problem, batch=problem.spec.batch - 1, **rows)


def _smaller(problem: Problem) -> Iterator[Callable[[], Problem]]:
    spec, cache = problem.spec, problem.cache
    yield lambda: changed(problem, heads=1, heads_kv=1)
    yield lambda: changed(problem, heads=spec.heads // spec.heads_kv, heads_kv=1)
    yield lambda: changed(problem, heads=spec.heads_kv)
    for name in ("cache.new", "cache.leftpad"):
        field = name.removeprefix("cache.")
        yield lambda field=field: changed(problem, **{field: None})
        rows = getattr(cache, field)
        for b, row in enumerate(rows or ()):
            for less in _less(row):
                yield lambda field=field, rows=rows, b=b, less=less: changed(problem, **{field: _put(rows, b, less)})
    for field in ("lengths_q", "lengths_k"):
        lengths = getattr(spec, field)
        longest = field.replace("lengths", "seqlen")
        if lengths is None:
            for less in _less(getattr(spec, longest)):
                yield lambda less=less, longest=longest: changed(problem, **{longest: less})
            continue
        yield lambda lengths=lengths, longest=longest: changed(problem, **{longest: max(1, *lengths)})
        for b, length in enumerate(lengths):
            for less in _less(length):
                cut = _put(lengths, b, less)
                yield lambda field=field, cut=cut, longest=longest: changed(
                    problem, **{field: cut, longest: max(1, *cut)}
                )
    for i in range(len(problem.parts)):
        yield lambda i=i: replace(problem, parts=problem.parts[:i] + problem.parts[i + 1 :])
    for i, bound in enumerate(spec.window):
        for less in _less(bound or 0):
            yield lambda i=i, less=less: changed(problem, window=_put(spec.window, i, less))
    for field in ("sink_tokens", "ranges"):
        for less in _less(getattr(spec, field)):
            yield lambda field=field, less=less: changed(problem, **{field: less})


def _less(number: int) -> list[int]:
    """Smaller numbers, the smallest first."""
    return sorted({n for n in (0, 1, number // 2, number - number // 4, number - 1) if 0 <= n < number})


def _put(values: tuple, i: int, value: Any) -> tuple:
    return (*values[:i], value, *values[i + 1 :])
