"""Kernels of other configs than the heuristics choose, for tests, models of time and measurements: calls inside
``with forced(TABLE.lookup(problem), cluster=2, tile_n=96)``."""

from __future__ import annotations

import typing
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from cute_fa.engine.contract import FeatureConfig
from cute_fa.engine.plan import PLANS
from cute_fa.semantics.errors import ArgumentError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from cute_fa.engine.contract import AttentionKernel

_WORDS = {"True": True, "False": False, "None": None}


@contextmanager
def forced(kernel: type[AttentionKernel], **choices: Any) -> Iterator[None]:
    """Inside, ``kernel.configure`` gives the heuristic's config with these fields in place, in all threads. Raises
    ArgumentError for a field that cannot be forced or a value of another type; a problem that a value does not serve
    raises it where it is configured. Plans from outside are put aside, compiled kernels are found by their config."""
    kinds = tunable(kernel)
    for name, value in choices.items():
        _check(kernel, kinds, name, value)
    outer, known = kernel.override, dict(PLANS)

    def override(problem: Any, config: Any) -> Any:
        config = replace(config if outer is None else outer(problem, config), **choices)
        reason = kernel.config_objection(problem, config)
        if reason is not None:
            raise ArgumentError(f"{reason} (forced: {_listed(choices)})")
        return config

    PLANS.clear()
    kernel.override = staticmethod(override) if choices else outer
    try:
        yield
    finally:
        kernel.override = outer
        PLANS.clear()
        PLANS.update(known)


def settings(kernel: type[AttentionKernel], texts: Iterable[str]) -> dict[str, Any]:
    """Choices for :func:`forced` from words like ``cluster=2`` and ``turns=False``; raises ArgumentError as it does."""
    kinds, choices = tunable(kernel), {}
    for text in texts:
        name, equals, word = text.partition("=")
        if not equals:
            raise ArgumentError(f"{text!r}: FIELD=VALUE, of {', '.join(kinds)}")
        number = word.removeprefix("-").isdecimal()
        value = int(word) if number else _WORDS.get(word, word)
        _check(kernel, kinds, name, value)
        choices[name] = value
    return choices


def tunable(kernel: type[AttentionKernel]) -> dict[str, Any]:
    """Fields of a kernel's configs that can be forced, with their types: those that no feature of a problem decides."""
    if kernel.tuned is None:
        return {}
    features, hints = {field.name for field in fields(FeatureConfig)}, typing.get_type_hints(kernel.tuned)
    return {field.name: hints[field.name] for field in fields(kernel.tuned) if field.name not in features}


def _check(kernel: type[AttentionKernel], kinds: dict[str, Any], name: str, value: Any) -> None:
    """Raise ArgumentError if ``kinds``, those of :func:`tunable`, have no such field of such a type."""
    if name not in kinds:
        rule = f"its fields are {', '.join(kinds)}" if kinds else "its configs cannot be forced"
        raise ArgumentError(f"{name}={value} of {kernel.__name__}: {rule}")
    allowed = typing.get_args(kinds[name]) or (kinds[name],)
    if type(value) not in allowed:
        words = " or ".join("None" if kind is type(None) else kind.__name__ for kind in allowed)
        raise ArgumentError(f"{name}={value!r} of {kernel.__name__}: {words} is needed")


def _listed(choices: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in choices.items())
