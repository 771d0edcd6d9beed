"""Exceptions of a package, and whether they stay what they are on the way to another process."""

from __future__ import annotations

import copy
import importlib
import pickle
import pkgutil
from collections.abc import Iterator
from typing import Any


def classes(package: str) -> list[type[BaseException]]:
    """Every exception class that the modules of a package define, private ones too."""
    for module in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}."):
        if not module.name.endswith(".__main__"):
            importlib.import_module(module.name)
    mine = (c for c in set(_below(BaseException)) if c.__module__.partition(".")[0] == package)
    return sorted(mine, key=lambda c: (c.__module__, c.__qualname__))


def _below(base: type) -> Iterator[type]:
    for c in base.__subclasses__():
        yield c
        yield from _below(c)


def instances(package: str, examples: dict[type, tuple]) -> list[BaseException]:
    """One of every class, from what ``examples`` has for the class whose ``__init__`` it takes: (arguments, fields set
    later); from a message alone where that is Exception's own."""
    made = []
    for c in classes(package):
        owner = next(base for base in c.__mro__ if "__init__" in vars(base))
        if owner.__module__.partition(".")[0] == package:
            arguments, fields = examples[owner]
        else:
            arguments, fields = ("what is wrong",), {}
        error = c(*arguments)
        vars(error).update(fields, noted="a field that somebody else sets")
        made.append(error)
    return made


def assert_survives(error: BaseException) -> None:
    """Pickled by every protocol and copied both ways, it is of the same class, message and fields."""
    pickled = [pickle.loads(pickle.dumps(error, protocol)) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]
    for other in (*pickled, copy.copy(error), copy.deepcopy(error)):
        assert other is not error
        assert _described(other) == _described(error)


def _described(error: BaseException) -> tuple[Any, ...]:
    return type(error), str(error), error.args, vars(error)


def refused(arch: str) -> None:
    """A call that raises DTypeError, in whatever process."""
    import torch

    import cute_fa

    q = torch.zeros(1, 8, 1, 64)
    with cute_fa.simulate(arch):
        cute_fa.flash_attn_func(q, q, q)
