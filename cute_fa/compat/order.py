"""Functions with a peer's positional order."""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from cute_fa.semantics.errors import ArgumentError

if TYPE_CHECKING:
    from collections.abc import Callable

INFINITE = (-1, -1)
Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def in_order(
    call: Callable[[dict[str, Any]], Result],
) -> Callable[[Callable[Parameters, Any]], Callable[Parameters, Result]]:
    """A decorator of a function without a body: it takes its parameters by position or keyword and gives ``call`` those
    that the caller passed, by name, whose result it returns. Raises ArgumentError for missing or surplus arguments."""

    def decorate(declared: Callable[Parameters, Any]) -> Callable[Parameters, Result]:
        parameters = inspect.signature(declared).parameters
        names, function = tuple(parameters), declared.__name__
        required = [name for name, parameter in parameters.items() if parameter.default is inspect.Parameter.empty]

        @functools.wraps(declared)
        def taking(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
            if len(args) > len(names):
                raise ArgumentError(f"{function}: {len(args)} positional arguments, it takes {len(names)}")
            given = dict(zip(names, args, strict=False))
            for key, value in kwargs.items():
                if key not in parameters:
                    raise ArgumentError(f"{function}: {key}: no such argument")
                if key in given:
                    raise ArgumentError(f"{function}: {key} is given twice")
                given[key] = value
            for key in required:
                if key not in given:
                    raise ArgumentError(f"{function}: {key} is missing")
            return call(given)

        return taking

    return decorate
