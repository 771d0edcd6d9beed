"""Functions with a peer's positional order, made from a table of its parameters."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from cute_fa.semantics.errors import ArgumentError

if TYPE_CHECKING:
    from collections.abc import Callable

REQUIRED = inspect.Parameter.empty
INFINITE = (-1, -1)


def in_order(name: str, parameters: dict[str, Any], call: Callable[[dict[str, Any]], Any], doc: str) -> Callable:
    """A function ``name`` that takes ``parameters`` (name to default, REQUIRED without one) by position or keyword and
    gives ``call`` those that the caller passed, by name. Raises ArgumentError for missing or surplus arguments."""
    names = tuple(parameters)
    required = tuple(name for name, default in parameters.items() if default is REQUIRED)

    def function(*args, **kwargs):
        if len(args) > len(names):
            raise ArgumentError(f"{name}: {len(args)} positional arguments, it takes {len(names)}")
        given = dict(zip(names, args, strict=False))
        for key, value in kwargs.items():
            if key not in parameters:
                raise ArgumentError(f"{name}: {key}: no such argument")
            if key in given:
                raise ArgumentError(f"{name}: {key} is given twice")
            given[key] = value
        for key in required:
            if key not in given:
                raise ArgumentError(f"{name}: {key} is missing")
        return call(given)

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    described = [inspect.Parameter(key, kind, default=default) for key, default in parameters.items()]
    function.__signature__ = inspect.Signature(described)
    function.__name__ = function.__qualname__ = name
    function.__doc__ = doc
    return function
